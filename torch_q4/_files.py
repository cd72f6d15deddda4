"""Writing files so that the final name never holds half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNNAMED = getattr(os, "O_TMPFILE", 0)  # Linux
_MOST_LINKS = 40  # as the kernel has it
_KINDS = (
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


class AtomicFile:
    """A file that is complete or not there: it gets its name when all of it is written.

    As a context manager: leaving it normally makes the file durable and gives it its name, leaving
    it by an exception removes it and keeps what had that name before.

    Where the file system can (ext4, XFS, Btrfs, tmpfs and others), the file has no name until
    then, so that a process that is killed in whichever way, also by SIGKILL, leaves nothing. The
    one exception: a file that is there is replaced by way of a name ``.torch_q4.*.tmp``, and a kill
    in the microseconds between its link and its renaming leaves that name, with all of the file.
    Elsewhere (FAT, NFS and others) the file has such a name from its beginning, and a kill that
    Python does not see leaves it. No signal handler is set here: that is up to the program.

    A link is followed, and the file that it points to is replaced, or made if it is not there.
    Nothing but a regular file is ever replaced: a device, a FIFO, a socket, and the number of an
    open file such as ``/dev/stdout`` are refused, since what is written there is there at once.

    Args:
        path: the final name.
        size: bytes that will be written. The room is taken at once, so that a full disk is found
            before the work and not after it.
        op: what the errors call the operation.

    Raises:
        OSError: the path is that of something else than a regular file; the folder cannot be
            written to, or lacks the room; from :meth:`write` too.
    """

    def __init__(self, path: str | os.PathLike[str], size: int, op: str) -> None:
        self.path = os.fsdecode(path)
        self.size = size
        self.op = op
        self.written = 0
        self._name = ""
        self._temporary = ""
        self._fd = self._folder = -1
        self._process = os.getpid()

    def __enter__(self) -> AtomicFile:
        """Makes the file without its name, with room for all of it."""
        try:
            self.path = self._followed()
            folder, self._name = os.path.split(self.path)
            try:
                self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY)
                old = self._replaced()
                # Nobody may read meanwhile what nobody could read before. The kernel applies the
                # umask, or the folder's default ACL, to the mode of a file that is new.
                self._create(0o600 if old else 0o666)
            except OSError as error:
                if error.filename == self.path:
                    raise  # which says what is wrong already
                raise self._refused(
                    error.errno or errno.EIO,
                    f"the folder must be one that can be written to, got: {error.strerror}",
                ) from error
            if old:
                os.fchmod(self._fd, old.st_mode & 0o777)
            self._reserve()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the file its name, or removes it after an exception."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def __del__(self) -> None:
        """Removes a file that an exception left before its ``with`` block was entered."""
        if hasattr(self, "_process"):
            self._discard()

    def write(self, data: bytes | bytearray | memoryview | Tensor) -> int:
        """Appends bytes, or a contiguous tensor's bytes; returns how many."""
        if isinstance(data, Tensor):
            data = tensor_bytes(data)
        view = memoryview(data)
        count = view.nbytes
        try:
            while view.nbytes:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise self._explained(error) from error
        self.written += count
        return count

    def _refused(self, number: int, rule: str) -> OSError:
        return OSError(number, f"{self.op}: {rule}", self.path)

    def _followed(self) -> str:
        """The path behind all links; it need not be there."""
        path = self.path
        for _ in range(_MOST_LINKS):
            folder, name = os.path.split(path)
            if name in ("", os.curdir, os.pardir):
                raise self._refused(errno.EISDIR, "the path must not be a folder, got one")
            folder = os.path.realpath(folder)
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                return path
            # Such a link leads to an open file, whatever name the file may have.
            if f"{folder}/".startswith("/proc/"):
                raise self._refused(
                    errno.EINVAL, "the path must be a file's name, got that of an open file"
                )
            path = os.path.join(folder, os.readlink(path))
        raise self._refused(errno.ELOOP, "the path must lead to a file, got links without end")

    def _replaced(self) -> os.stat_result | None:
        """The regular file that has the name now, if there is one; refuses anything else."""
        try:
            found = os.lstat(self._name, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(found.st_mode):
            raise self._refused(errno.EISDIR, "the path must not be a folder, got one")
        if not stat.S_ISREG(found.st_mode):
            kind = next((text for test, text in _KINDS if test(found.st_mode)), "a link")
            raise self._refused(
                errno.EINVAL, f"the path must be that of a regular file, got {kind}"
            )
        return found

    def _create(self, mode: int) -> None:
        if _UNNAMED:
            with contextlib.suppress(OSError):  # what is no shortcoming of it, is met below again
                self._fd = os.open(".", _UNNAMED | os.O_RDWR, mode, dir_fd=self._folder)
        if self._fd >= 0:
            if os.path.exists(self._open_file):
                return
            os.close(self._fd)  # without /proc it could never get a name
            self._fd = -1
        # Shorter than most names, however long the final one is.
        self._temporary = _temporary_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._fd = os.open(self._temporary, flags, mode, dir_fd=self._folder)

    @property
    def _open_file(self) -> str:
        return f"/proc/self/fd/{self._fd}"

    def _finish(self) -> None:
        if self.written != self.size:
            raise RuntimeError(f"{self.op}: {self.size} bytes must be written, got {self.written}")
        try:
            os.fsync(self._fd)
            self._give_name()
        except OSError as error:
            raise self._explained(error) from error
        self._sync_folder()

    def _give_name(self) -> None:
        # Refuses again: something else may have got the name meanwhile.
        old = self._replaced()
        if not self._temporary:
            if old is None:
                with contextlib.suppress(FileExistsError):
                    os.link(self._open_file, self._name, dst_dir_fd=self._folder)
                    return
            self._temporary = _temporary_name()  # a link cannot replace a name, renaming can
            os.link(self._open_file, self._temporary, dst_dir_fd=self._folder)
        os.replace(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._temporary = ""

    def _reserve(self) -> None:
        if self.size == 0:
            return
        try:
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            # Some file systems cannot reserve; then writing finds out.
            if error.errno in _NO_ROOM:
                raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        if error.errno not in _NO_ROOM:
            return error
        if error.errno == errno.EFBIG:
            room = "a limit on the size of files"
        else:
            free = shutil.disk_usage(os.path.dirname(self.path)).free
            # What is reserved for this very file counts as used.
            with contextlib.suppress(OSError):
                free += os.fstat(self._fd).st_blocks * 512 if self._fd >= 0 else 0
            room = f"room for {free}"
        kept = "; the file of that name is untouched" if os.path.exists(self.path) else ""
        return OSError(
            error.errno, f"{self.op}: the disk must hold {self.size} bytes, got {room}{kept}",
            self.path,
        )  # fmt: skip

    def _discard(self) -> None:
        """Closes everything, and removes the file unless it has its name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary and self._process == os.getpid():  # a forked process has a copy of this
            with contextlib.suppress(OSError):  # what went wrong before it is to be told
                os.unlink(self._temporary, dir_fd=self._folder)
        self._temporary = ""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def _sync_folder(self) -> None:
        """Makes the new name itself durable."""
        try:
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._folder)
        except PermissionError:  # one that may be written to, but not be listed
            return
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without it
                raise
        finally:
            os.close(folder)


def _temporary_name() -> str:
    return f".torch_q4.{secrets.token_hex(8)}.tmp"


def require_file(path: str | os.PathLike[str], op: str) -> None:
    """Refuses what is there but is no regular file: a FIFO would be waited for, a device read on.

    Raises:
        OSError: there is no such file, or it is something else.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return
    kind = next((text for test, text in _KINDS if test(mode)), "a folder")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(
        number, f"{op}: the path must be that of a regular file, got {kind}", os.fspath(path)
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, as a view."""
    flat = tensor.detach().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(raw)
