"""Atomic files: what they replace, what they refuse, what is left where a process ends early."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from torch_q4 import _files
from torch_q4._files import AtomicFile, require_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["unnamed", "named"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs each test where the file system has files without a name, and as if it had none."""
    if request.param == "named":
        monkeypatch.setattr(_files, "_UNNAMED", 0)
    return request.param


def write(path: str | os.PathLike[str], data: bytes = b"new") -> None:
    with AtomicFile(path, len(data), "save") as file:
        file.write(data)


def test_new_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"first", b"second", b""):
        write(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["a"]


def test_nothing_has_a_name_before_the_end(tmp_path: Path, kind: str) -> None:
    with AtomicFile(tmp_path / "a", 3, "save") as file:
        file.write(b"new")
        assert len(os.listdir(tmp_path)) == (1 if kind == "named" else 0)
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path) == ["a"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TypeError), AtomicFile(path, 3, "save") as file:
        file.write(3)  # type: ignore[arg-type]
    with (
        pytest.raises(RuntimeError, match="save: 3 bytes must be written, got 2"),
        AtomicFile(path, 3, "save") as file,
    ):
        file.write(b"ne")
    AtomicFile(path, 3, "save").__enter__()  # what an interruption just after it amounts to
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("length", [200, 236, 254, 255])
def test_long_names(tmp_path: Path, length: int) -> None:
    for name in ("x" * length, "é" * (length // 2)):
        write(tmp_path / name)
        write(tmp_path / name, b"again")
        assert (tmp_path / name).read_bytes() == b"again"


def test_a_name_that_is_too_long_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"save: .* got: File name too long") as info:
        AtomicFile(tmp_path / ("x" * 256), 3, "save").__enter__()
    assert info.value.errno == errno.ENAMETOOLONG
    assert os.listdir(tmp_path) == []


# ---- what is no regular file ---------------------------------------------------------------------


def make(path: Path, what: str) -> None:
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    else:
        kind = stat.S_IFCHR if what == "a character device" else stat.S_IFBLK
        number = os.makedev(1, 3) if what == "a character device" else os.makedev(7, 250)
        try:
            os.mknod(path, kind | 0o666, number)
        except PermissionError:
            pytest.skip("making a device takes root")


SPECIAL = ["a FIFO", "a socket", "a character device", "a block device"]


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("links", [0, 1, 2])
def test_only_regular_files_are_replaced(
    tmp_path: Path, what: str, links: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("thing")
    make(path, what)
    before = os.lstat(path)
    for _ in range(links):
        link = Path(f"{path}-link")
        link.symlink_to(path)
        path = link
    names = sorted(os.listdir())
    with pytest.raises(OSError, match=f"save: the path must be that of a regular file, got {what}"):
        write(path)
    assert os.lstat("thing") == before
    assert sorted(os.listdir()) == names


@pytest.mark.parametrize("what", SPECIAL)
def test_also_what_came_meanwhile(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"got {what}"), AtomicFile("thing", 0, "save"):
        make(Path("thing"), what)
    assert not stat.S_ISREG(os.lstat("thing").st_mode)
    assert os.listdir() == ["thing"]


# Never on /dev/null itself: a test that fails as root would take it from the whole machine.
def test_open_files_by_their_numbers(tmp_path: Path) -> None:
    with open(tmp_path / "open", "wb") as file:
        number = file.fileno()
        (tmp_path / "link").symlink_to(f"/dev/fd/{number}")
        for path in (f"/dev/fd/{number}", f"/proc/self/fd/{number}", tmp_path / "link"):
            with pytest.raises(OSError, match="must be a file's name, got that of an open file"):
                write(path)
    assert (tmp_path / "open").read_bytes() == b""
    script = "from torch_q4._files import AtomicFile as A; A('/dev/stdout', 0, 's').__enter__()"
    with open(tmp_path / "out", "wb") as file:
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True
        )
    assert "got that of an open file" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["link", "open", "out"]


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "one").symlink_to("real/file")  # leads to nothing as yet
    (real / "two").symlink_to("../one")
    write(real / "two")
    assert (real / "file").read_bytes() == b"new"
    write(tmp_path / "one", b"again")
    assert (real / "file").read_bytes() == b"again"
    assert (tmp_path / "one").is_symlink()
    assert (real / "two").is_symlink()
    (tmp_path / "lost").symlink_to("nowhere/file")
    with pytest.raises(FileNotFoundError, match="the folder must be one that can be written to"):
        write(tmp_path / "lost")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="links without end"):
        write(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("path", ["", ".", "..", "folder", "folder/", "folder/.", "new/"])
def test_folders(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(IsADirectoryError, match="save: the path must not be a folder, got one"):
        write(path)
    assert os.listdir() == ["folder"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="the folder must be one that can be written to"):
        write(tmp_path / "a" / "b")


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    write(path)  # type: ignore[arg-type]
    write(os.fsdecode(path), b"again")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe"]


# ---- permissions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_permissions(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "a")
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o666 & ~mask
        for mode in (0o604, 0o444, 0o600):
            (tmp_path / "a").chmod(mode)
            write(tmp_path / "a")
            assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == mode
    finally:
        os.umask(before)


def test_nobody_reads_meanwhile_what_nobody_could_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch(0o600)
    with AtomicFile(tmp_path / "a", 0, "save") as file:
        assert stat.S_IMODE(os.fstat(file._fd).st_mode) == 0o600


def test_the_umask_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it, if for a moment, opens the files that other threads make meanwhile to all."""

    def refuse(mask: int) -> int:
        raise AssertionError("umask must not be called")

    monkeypatch.setattr(os, "umask", refuse)
    write(tmp_path / "a")
    write(tmp_path / "a")


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A folder's default ACL as the kernel has it: version 2, then tag, permissions and id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_a_default_acl_counts(tmp_path: Path) -> None:
    nobody, none = 65534, 0xFFFFFFFF
    rights = acl((1, 6, none), (2, 4, nobody), (4, 0, none), (16, 6, none), (32, 0, none))
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", rights)
    except OSError as error:
        pytest.skip(f"the file system has no ACLs: {error}")
    (tmp_path / "plain").touch(0o666)
    write(tmp_path / "ours")
    name = "system.posix_acl_access"
    assert os.getxattr(tmp_path / "ours", name) == os.getxattr(tmp_path / "plain", name)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    """Read-only, if this user may mount it so."""
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        with pytest.raises(OSError, match="can be written to, got: Read-only file system") as info:
            write(tmp_path / "a")
        assert info.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- processes that end --------------------------------------------------------------------------

HALF_WAY = """
import os, signal, sys
from torch_q4 import _files
# Whoever runs the tests, under nohup or in the background, may ignore them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[2] == "named":
    _files._UNNAMED = 0
with _files.AtomicFile(sys.argv[1], 6, "save") as file:
    file.write(b"new")
    os.kill(os.getpid(), int(sys.argv[3]))
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
def test_a_library_that_is_killed(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    """No handler is set; without a name nothing is left all the same."""
    (tmp_path / "a").write_bytes(b"old")
    arguments = [sys.executable, "-c", HALF_WAY, str(tmp_path / "a"), kind, str(int(number))]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True)
    assert result.returncode == -number
    assert (tmp_path / "a").read_bytes() == b"old"
    left = [name for name in os.listdir(tmp_path) if name != "a"]
    if kind == "unnamed" or number == signal.SIGINT:
        assert left == []
    else:
        assert [name[:10] + name[-4:] for name in left] == [".torch_q4..tmp"]


def test_a_forked_process_removes_nothing(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "a", 3, "save") as file:
        child = os.fork()
        if child == 0:
            file._discard()
            os._exit(0)
        os.waitpid(child, 0)
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


# ---- reading -------------------------------------------------------------------------------------


def test_what_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("file")
    require_file("file", "load")
    require_file("link", "load")
    os.mkfifo("pipe")
    for path, got in (("pipe", "a FIFO"), ("/dev/zero", "a character device"), (".", "a folder")):
        with pytest.raises(OSError, match=f"load: the path must be .* regular file, got {got}"):
            require_file(path, "load")
    with pytest.raises(FileNotFoundError):
        require_file("missing", "load")
