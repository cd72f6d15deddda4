"""Writing files so that the final name never holds half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MODE_NEW = 0o666


class AtomicFile:
    """A file that is complete or not there: written under another name, then renamed.

    As a context manager: leaving it normally makes the file durable and gives it its name, leaving
    it by an exception removes it and keeps what had that name before. A process that is killed
    leaves a file ``.NAME.*.tmp`` behind, never a broken one under the final name.

    Args:
        path: the final name.
        size: bytes that will be written. The room is taken at once, so that a full disk is found
            before the work and not after it.
        op: what the errors call the operation.

    Raises:
        OSError: the folder cannot be written to, or lacks the room; from :meth:`write` too.
    """

    def __init__(self, path: str | os.PathLike[str], size: int, op: str) -> None:
        self.path = os.path.realpath(os.fspath(path))  # through a link, not over it
        self.size = size
        self.op = op
        self.written = 0
        self._fd = -1
        self._temporary = ""

    def __enter__(self) -> AtomicFile:
        """Makes the file under its temporary name, with room for all of it."""
        folder, name = os.path.split(self.path)
        if os.path.isdir(self.path):
            raise IsADirectoryError(
                errno.EISDIR, f"{self.op}: the path must not be a folder, got one", self.path
            )
        try:
            self._fd, self._temporary = tempfile.mkstemp(
                dir=folder, prefix=f".{name}.", suffix=".tmp"
            )
        except OSError as error:
            raise type(error)(
                error.errno,
                f"{self.op}: the folder must be one that can be written to, got: {error.strerror}",
                self.path,
            ) from error
        try:
            os.fchmod(self._fd, self._mode())
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
        if kind is not None:
            self._discard()
            return
        try:
            if self.written != self.size:
                raise RuntimeError(
                    f"{self.op}: {self.size} bytes must be written, got {self.written}"
                )
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.replace(self._temporary, self.path)
        except OSError as failure:
            self._discard()
            raise self._explained(failure) from failure
        except BaseException:
            self._discard()
            raise
        self._sync_folder()

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

    def _mode(self) -> int:
        """The permissions of the file that is replaced, or those of any new file."""
        try:
            return os.stat(self.path).st_mode & 0o777
        except FileNotFoundError:
            mask = os.umask(0)
            os.umask(mask)
            return _MODE_NEW & ~mask

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
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def _sync_folder(self) -> None:
        """Makes the new name itself durable."""
        folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without it
                raise
        finally:
            os.close(folder)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, as a view."""
    flat = tensor.detach().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(raw)
