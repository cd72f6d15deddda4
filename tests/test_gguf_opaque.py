"""Tensors of types that there is no format for: bytes that are listed, copied and compared."""

from __future__ import annotations

import json
import pickle
import random
import re
import struct
from pathlib import Path

import gguf
import pytest
import torch
from conftest import golden
from test_cli import COLUMNS, dense_tensors, metadata
from test_gguf import F32, Q4_0, build, tensor

import torch_q4
from torch_q4 import GGUFError, GGUFOpaque, GGUFTensor, formats, load_gguf, save_gguf
from torch_q4._tensors import info_of
from torch_q4.cli import main
from torch_q4.convert import compare_files
from torch_q4.gguf import _BLOCKS, _registered

# ggml's types that the registry has not, those that it gave up, and numbers that it never gave.
OPAQUE = [number for number in _BLOCKS if _registered(number) is None]
UNSIZED = [4, 31, 33, 43, 999, 2**31, 2**32 - 2, 2**32 - 1]
F64, I64 = 28, 27


@pytest.fixture
def save(tmp_path: Path):
    def write(content: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return path

    return write


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def file_with(kind: int, dims: list[int], data: bytes) -> bytes:
    """A file with a tensor of a type between two that are ordinary."""
    rng = random.Random(kind)
    before, after = struct.pack("<6f", *range(6)), rng.randbytes(72)
    first, second = len(padded(before)), len(padded(data))
    return build(
        tensors=[
            tensor("before", [3, 2], F32, 0),
            tensor("opaque", dims, kind, first),
            tensor("after", [64, 2], Q4_0, first + second),
        ],
        data=padded(before) + padded(data) + padded(after),
    )


def opaque(name: str, shape: tuple[int, ...], kind: int, seed: int = 0) -> GGUFTensor:
    """A tensor of a type that there is no format for; any size will do for a type without one."""
    _, block_elems, block_bytes = _BLOCKS.get(kind, ("", 8, 32))
    count = torch.Size(shape).numel() // block_elems * block_bytes
    data = torch.frombuffer(bytearray(random.Random(seed).randbytes(count)), dtype=torch.uint8)
    return GGUFTensor(name, GGUFOpaque(kind, count), shape, data)


def check_refused(read: GGUFTensor, wanted: str) -> None:
    known = "float32, .*int64, .*bfloat16, q4_0, .*q6_k"
    for op in ("dequantize", "blocks"):
        with pytest.raises(GGUFError) as error:
            getattr(read, op)() if op == "dequantize" else read.blocks
        words = rf"GGUFTensor\.{op}: tensor 'opaque' must be one of {known}.*, got {wanted}"
        assert re.fullmatch(words, str(error.value)), error.value


# ---- reading -------------------------------------------------------------------------------------


def test_sizes_are_those_of_ggml() -> None:
    theirs = {
        int(kind): (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if gguf.GGML_QUANT_SIZES[kind][0] > 1
    }
    ours = dict(_BLOCKS)
    for line in golden()["formats"]:
        name, *numbers = str(line).lower().split()
        kind, *sizes = map(int, numbers)
        assert ours[kind] == (name, *sizes)
        theirs.setdefault(kind, ours[kind])  # the newest, that the gguf package lacks
    assert ours == theirs
    for fmt in formats.all():
        if fmt.type_id in ours:
            assert ours[fmt.type_id] == (fmt.name, fmt.block_elems, fmt.block_bytes)


@pytest.mark.parametrize("kind", OPAQUE)
def test_a_type_of_ggml_without_a_format(save, tmp_path: Path, kind: int) -> None:
    name, block_elems, block_bytes = _BLOCKS[kind]
    data = random.Random(kind).randbytes(6 * block_bytes)
    path = save(file_with(kind, [3 * block_elems, 2], data))
    file = load_gguf(path)
    read = file.tensors["opaque"]
    assert read.format == GGUFOpaque(kind, len(data))
    assert (read.format.name, read.shape, read.nbytes, read.dtype) == (
        name, (2, 3 * block_elems), len(data), torch.uint8,
    )  # fmt: skip
    assert bytes(read.data.numpy()) == data
    assert info_of(read).type_name == name
    check_refused(read, rf"{name} \(type {kind}\)")
    assert file.tensors["before"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.tensors["after"].dequantize().shape == (2, 64)
    assert pickle.loads(pickle.dumps(file)).tensors["opaque"].format == read.format
    save_gguf(tmp_path / "copy.gguf", file.tensors, file)
    assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", UNSIZED)
@pytest.mark.parametrize("place", ["between", "last", "last, not padded"])
def test_a_type_that_nobody_knows(save, tmp_path: Path, kind: int, place: str) -> None:
    """All bytes up to the next tensor, or to the end of the file, are its own."""
    data = random.Random(kind).randbytes(70)
    content = file_with(kind, [5, 7], data)
    if place != "between":
        content = build(
            tensors=[tensor("before", [3, 2], F32, 0), tensor("opaque", [5, 7], kind, 32)],
            data=padded(struct.pack("<6f", *range(6))) + (data if "not" in place else padded(data)),
        )
    path = save(content)
    file = load_gguf(path)
    read = file.tensors["opaque"]
    extent = data if place == "last, not padded" else padded(data)
    assert bytes(read.data.numpy()) == extent
    assert read.format == GGUFOpaque(kind, len(extent))
    assert (read.format.name, read.shape) == (f"type {kind}", (7, 5))
    check_refused(read, f"type {kind}")
    for name in file.tensors.keys() - {"opaque"}:
        file.tensors[name].dequantize()
    save_gguf(tmp_path / "copy.gguf", file.tensors, file)
    assert (tmp_path / "copy.gguf").read_bytes() == content


def test_several_in_a_row(save) -> None:
    tensors = [tensor(f"t{n}", [1], 999 + n, 64 * n) for n in range(3)]
    file = load_gguf(save(build(tensors=tensors, data=bytes(150))))
    assert [entry.nbytes for entry in file.tensors.values()] == [64, 64, 22]


def test_types_that_torch_has_are_numbers(save) -> None:
    tensors = [tensor("f64", [2], F64, 0), tensor("i64", [3], I64, 32)]
    data = padded(struct.pack("<2d", 0.5, -1)) + struct.pack("<3q", -1, 2**62, 5)
    file = load_gguf(save(build(tensors=tensors, data=data)))
    assert file.tensors["f64"].data.tolist() == [0.5, -1]
    assert file.tensors["i64"].data.tolist() == [-1, 2**62, 5]
    assert (file.tensors["f64"].format, file.tensors["i64"].format) == (None, None)


NEXT = [tensor("t", [32], 999, 0)]
DAMAGED = {
    "columns": (
        build(tensors=[tensor("t", [300], 15, 0)], data=bytes(400)),
        r"tensor 't' must have a multiple of 256 columns for q8_k, got 300 ",
    ),
    "scalar": (
        build(tensors=[tensor("t", [], 15, 0)], data=bytes(300)),
        r"tensor 't' must have a multiple of 256 columns for q8_k, got 1 ",
    ),
    "size": (
        build(tensors=[tensor("t", [256], 15, 0)], data=bytes(291)),
        r"tensor 't' must lie within the file's \d+ bytes, got bytes \d+ to \d+ ",
    ),
    "overlap": (
        build(tensors=[tensor("t", [256], 15, 0), tensor("u", [1], F32, 256)], data=bytes(500)),
        r"tensor 'u' must have offset 320, where its data are due, got 256 ",
    ),
    "gap": (
        build(tensors=[tensor("t", [256], 15, 0), tensor("u", [1], F32, 352)], data=bytes(500)),
        r"tensor 'u' must have offset 320, where its data are due, got 352 ",
    ),
    "no bytes": (build(tensors=NEXT), r"tensor 't' must end above byte 128, got 128 "),
    "no elements": (
        build(tensors=[tensor("t", [0], 999, 0)], data=bytes(32)),
        r"tensor 't' must have 1 to 2\*\*63 - 1 elements, got dimensions \(0,\) ",
    ),
    "unknown at another place": (
        build(tensors=[tensor("t", [1], 999, 32)], data=bytes(64)),
        r"tensor 't' must have offset 0, where its data are due, got 32 ",
    ),
    "next at the same place": (
        build(tensors=[*NEXT, tensor("u", [1], F32, 0)], data=bytes(64)),
        r"tensor 't' must end above byte 160, got 160 ",
    ),
    "next before it": (
        build(
            tensors=[
                tensor("s", [1], F32, 0), tensor("t", [1], 999, 32), tensor("u", [1], F32, 0),
            ],
            data=bytes(99),
        ),
        r"tensor 't' must end above byte 224, got 192 ",
    ),
    "next not aligned": (
        build(tensors=[*NEXT, tensor("u", [1], F32, 40)], data=bytes(64)),
        r"tensor 't' must be padded to 32 bytes, got 40 ",
    ),
    "next beyond the file": (
        build(tensors=[*NEXT, tensor("u", [1], F32, 2**63)], data=bytes(64)),
        r"tensor 't' must lie within the file's 224 bytes, got bytes 160 to 9\d+ ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(save, case: str) -> None:
    content, message = DAMAGED[case]
    path = save(content)
    with pytest.raises(GGUFError) as error:
        load_gguf(path)
    assert re.fullmatch(rf"load_gguf: {message}\({path}\)", str(error.value)), error.value


@pytest.mark.parametrize("kind", [OPAQUE[-1], 999], ids=["ggml's", "newer"])
def test_a_format_that_is_registered_makes_the_tensor_ordinary(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    name, block_elems, block_bytes = _BLOCKS.get(kind, ("newer", 16, 10))
    data = random.Random(0).randbytes(6 * block_bytes)
    path = save(file_with(kind, [3 * block_elems, 2], data))
    fmt = formats.Format(
        name, kind, block_elems, block_bytes, 1.0, False, lambda blocks: blocks.float()
    )
    monkeypatch.setitem(formats._FORMATS, name, fmt)
    monkeypatch.setitem(formats._LOOKUP, name, fmt)
    monkeypatch.setitem(formats._LOOKUP, kind, fmt)
    read = load_gguf(path).tensors["opaque"]
    assert read.format is fmt
    assert read.blocks.shape == (2, 3 * block_bytes)
    assert bytes(read.blocks.numpy()) == data
    torch_q4.save_safetensors(tmp_path / "a.safetensors", {"w": read})
    assert torch_q4.load_safetensors(tmp_path / "a.safetensors").tensors["w"].format is fmt


def test_operators_and_layers_refuse_such_a_format(save) -> None:
    read = load_gguf(save(file_with(999, [64], bytes(36)))).tensors["opaque"]
    blocks = torch.zeros(2, 36, dtype=torch.uint8)
    for call in (
        lambda: torch_q4.dequantize(blocks, read.format),
        lambda: torch_q4.linear(torch.ones(1, 64), blocks, read.format),
        lambda: torch_q4.QuantLinear.from_blocks(blocks, read.format),
        lambda: save_gguf("never.gguf", {"t": (blocks, read.format)}),
    ):
        with pytest.raises(TypeError, match=r"format must be a name, .*, got GGUFOpaque\(type_id"):
            call()


# ---- writing, converting, comparing --------------------------------------------------------------


def write(path: Path, kind: int, weight: bool = False, seed: int = 0) -> Path:
    """A model with an opaque tensor that no mix quantises, or one that each would."""
    tensors: dict[str, torch_q4._tensors.TensorLike] = dict(dense_tensors())
    name = "blk.0.ffn_up.weight" if weight else "blk.0.extra_norm.weight"
    tensors[name] = opaque(name, (24, COLUMNS), kind, seed)
    tensors["last"] = opaque("last", (COLUMNS,), kind)
    save_gguf(path, tensors, metadata())
    return path


@pytest.fixture(params=[15, 999], ids=["q8_k", "type 999"])
def kind(request: pytest.FixtureRequest) -> int:
    return request.param


def shown(kind: int) -> str:
    return "q8_k (type 15)" if kind == 15 else f"type {kind}"


def test_safetensors_have_no_such_types(tmp_path: Path, kind: int) -> None:
    with pytest.raises(TypeError) as error:
        torch_q4.save_safetensors(tmp_path / "a.safetensors", {"w": opaque("w", (256,), kind)})
    words = "save_safetensors: tensor 'w' must be plain numbers or of one of torch_q4's formats"
    assert str(error.value) == f"{words}, got {shown(kind)}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pure", [False, True])
def test_quantize_copies_what_no_mix_quantises(tmp_path: Path, kind: int, pure: bool) -> None:
    source, target = write(tmp_path / "a.gguf", kind), tmp_path / "b.gguf"
    arguments = ["quantize", str(source), str(target), "--type", "q4_0"]
    assert main([*arguments, "--pure"] if pure else arguments) == 0
    before, after = load_gguf(source), load_gguf(target)
    for name in ("blk.0.extra_norm.weight", "last"):
        assert after.tensors[name].format == before.tensors[name].format
        assert torch.equal(after.tensors[name].data, before.tensors[name].data)
    assert after.tensors["blk.1.ffn_up.weight"].format is formats.get("q4_0")


def test_a_long_one_is_copied_in_panels(
    tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "a.gguf", kind), tmp_path / "b.gguf"
    monkeypatch.setattr("torch_q4.convert._PANEL", 1000)
    assert main(["quantize", str(source), str(target), "--type", "q4_0"]) == 0
    result = compare_files(source, target)
    assert [error.different for error in result.opaque] == [0, 0]


def test_refusals_name_the_tensor_before_anything_is_written(
    tmp_path: Path, kind: int, capsys
) -> None:
    left = write(tmp_path / "left.gguf", kind)
    wanted = write(tmp_path / "wanted.gguf", kind, weight=True)
    for number, (arguments, suffix, name) in enumerate([
        (["quantize", wanted, "--type", "q4_0"], "gguf", "blk.0.ffn_up.weight"),
        (["quantize", wanted, "--type", "q4_0", "--allow-requantize"], "gguf",
         "blk.0.ffn_up.weight"),
        (["quantize", wanted, "--type", "q4_0", "--pure", "--dry-run"], "gguf",
         "blk.0.ffn_up.weight"),
        (["quantize", left, "--type", "q4_0"], "safetensors", "blk.0.extra_norm.weight"),
        (["dequantize", left], "gguf", "blk.0.extra_norm.weight"),
        (["dequantize", left], "safetensors", "blk.0.extra_norm.weight"),
    ]):  # fmt: skip
        target = tmp_path / f"out.{suffix}"
        target.write_bytes(b"old")
        command, source, *options = map(str, arguments)
        assert main([command, source, str(target), *options]) == 1, number
        told = capsys.readouterr().err
        assert re.fullmatch(
            rf"torch-q4: {command}: tensor '{name}' must be one of float32, .*q6_k.*, got "
            rf"{re.escape(shown(kind))} \({source}\)\n", told
        ), told  # fmt: skip
        assert target.read_bytes() == b"old"


def test_info_lists_them(tmp_path: Path, kind: int, capsys) -> None:
    path = write(tmp_path / "a.gguf", kind)
    name = "q8_k" if kind == 15 else f"type {kind}"
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    size = {15: "7.0 kB +9.12", 999: "24.6 kB +32.00"}[kind]
    assert re.search(rf"blk\.0\.extra_norm\.weight +{name} +24 x 256 +6\.1k +{size}\n", told), told
    assert re.search(rf"\n{name} +2 +6\.4k ", told)
    words = "without a format here, so that their values cannot be read: "
    assert f"{words}blk.0.extra_norm.weight, last\n" in told
    assert main(["info", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows["last"]["type"] == name
    assert rows["last"]["bytes"] == load_gguf(path).tensors["last"].nbytes
    assert [row["name"] for row in found["tensors"] if not row["readable"]] == [
        "blk.0.extra_norm.weight", "last",
    ]  # fmt: skip
    assert found["files"] == [str(path)]


def test_compare_compares_their_bytes(tmp_path: Path, kind: int, capsys) -> None:
    a, b = write(tmp_path / "a.gguf", kind), write(tmp_path / "b.gguf", kind, seed=1)
    x, y = (load_gguf(path).tensors["blk.0.extra_norm.weight"].data for path in (a, b))
    different = int((x != y).sum())
    assert main(["compare", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"extra_norm\.weight .* {different} of {x.numel()} differ\n", told), told
    assert re.search(r"\nlast .* equal\n", told)
    assert f"{len(dense_tensors())} tensors compared, {len(dense_tensors())} equal" in told
    assert "2 tensors have no format here: the bytes of 1 are equal" in told
    assert main(["compare", "--json", str(a), str(b)]) == 0
    found = json.loads(capsys.readouterr().out)["opaque"]
    assert [row["different"] for row in found] == [different, 0]


def test_compare_of_different_types(tmp_path: Path, capsys) -> None:
    """Bytes of two types tell nothing; and one side may well have values."""
    plain = {"x": torch.randn(256), "y": opaque("y", (256,), 15), "z": opaque("z", (256,), 999)}
    other = {"x": opaque("x", (256,), 999), "y": opaque("y", (256,), 998), "z": plain["z"]}
    save_gguf(tmp_path / "a.gguf", plain)
    save_gguf(tmp_path / "b.gguf", other)
    result = compare_files(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert result.tensors == []
    assert {error.name: error.different for error in result.opaque} == {
        "x": None,
        "y": None,
        "z": 0,
    }
    assert main(["compare", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"\nx +256 +f32 +type 999 +of different types\n", told), told


def test_compare_of_different_lengths(tmp_path: Path) -> None:
    """Of a type that nobody knows, what follows may be padding: it counts as different."""
    for name, count in (("a", 70), ("b", 96)):
        data = torch.zeros(count, dtype=torch.uint8)
        save_gguf(
            tmp_path / f"{name}.gguf", {"t": GGUFTensor("t", GGUFOpaque(999, count), (5,), data)}
        )
    (found,) = compare_files(tmp_path / "a.gguf", tmp_path / "b.gguf").opaque
    assert (found.nbytes, found.different) == (70, 26)


def test_importance_must_be_numbers(tmp_path: Path, kind: int) -> None:
    save_gguf(tmp_path / "a.gguf", {"x.in_sum2": opaque("x.in_sum2", (256,), kind),
                                    "x.counts": torch.ones(1)})  # fmt: skip
    with pytest.raises(ValueError, match=r"'x\.in_sum2' must be float32, got (q8_k|type 999) \("):
        torch_q4.load_importance(tmp_path / "a.gguf")


def test_a_model_is_refused_for_a_tensor_that_it_needs(tmp_path: Path, kind: int) -> None:
    pytest.importorskip("transformers")
    from test_transformers import random_model, write_gguf

    from torch_q4.integrations.transformers import load_gguf_model

    model = random_model("llama", {})
    source = load_gguf(write_gguf(tmp_path / "a.gguf", model, "llama", ["q8_0"]))
    tensors = dict(source.tensors)
    name = "blk.1.ffn_down.weight"
    tensors[name] = opaque(name, tensors[name].shape, kind)
    save_gguf(tmp_path / "b.gguf", tensors, source)
    with pytest.raises(GGUFError) as error:
        load_gguf_model(tmp_path / "b.gguf", progress=False)
    words = rf"load_gguf_model: tensor '{name}' must be one of .*, got {re.escape(shown(kind))} \("
    assert re.match(words, str(error.value)), error.value
