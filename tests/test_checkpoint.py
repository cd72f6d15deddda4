"""Packed weights in safetensors: what goes in comes out, and any reader can open it."""

from __future__ import annotations

import json
import os
import pickletools
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_blocks
from torch import nn

import torch_q4
from torch_q4 import QuantEmbedding, QuantLinear, checkpoint, formats

safetensors_torch = pytest.importorskip("safetensors.torch")


class Model(nn.Module):
    """Layers of several formats, a tie, a plain layer, a buffer and a half-precision norm."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 256)
        self.first = nn.Linear(256, 128)
        self.second = nn.Linear(128, 256, bias=False)
        self.narrow = nn.Linear(256, 40)
        self.norm = nn.LayerNorm(256, dtype=torch.float16)
        self.head = nn.Linear(256, 64, bias=False)
        self.register_buffer("steps", torch.tensor([1, 2, 3]))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.embedding(indices)).relu())
        return self.head(self.norm(x.half()).float()) + self.narrow(x).sum(-1, keepdim=True)


FORMATS = {"embedding": "q6_k", "first": "q4_k", "second": "q5_0", "head": "q6_k"}
INDICES = torch.arange(10)


def quantized() -> Model:
    model = Model()
    torch_q4.quantize_(model, FORMATS)
    return model


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INDICES)


@pytest.mark.parametrize("start", ["dense", "quantised", "meta"])
def test_round_trip(tmp_path: Path, start: str) -> None:
    model = quantized()
    torch_q4.save_checkpoint(model, tmp_path / "a.safetensors")
    if start == "meta":
        with torch.device("meta"):
            other: nn.Module = Model()
    else:
        torch.manual_seed(1)
        other = Model() if start == "dense" else quantized()
    torch_q4.load_checkpoint(other, tmp_path / "a.safetensors")
    assert torch.equal(output(other), output(model))
    assert other.head.blocks is other.embedding.blocks
    assert isinstance(other.embedding, QuantEmbedding)
    assert {n: m.format for n, m in other.named_modules() if hasattr(m, "format")} == FORMATS
    assert other.state_dict().keys() == model.state_dict().keys()


def test_any_reader_opens_it(tmp_path: Path) -> None:
    model = quantized()
    torch_q4.save_checkpoint(model, tmp_path / "a.safetensors", {"note": "mine"})
    stored = safetensors_torch.load_file(tmp_path / "a.safetensors")
    state = model.state_dict()
    assert stored.keys() == state.keys() - {"head.weight"}
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    other = quantized()
    other.load_state_dict(stored | {"head.weight": stored["embedding.weight"]})
    assert torch.equal(output(other), output(model))


def test_header_says_the_formats(tmp_path: Path) -> None:
    torch_q4.save_checkpoint(quantized(), tmp_path / "a.safetensors", {"note": "mine"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    packed = {f"{name}.weight": fmt for name, fmt in FORMATS.items() if name != "head"}
    assert json.loads(metadata["torch_q4.formats"]) == packed
    assert json.loads(metadata["torch_q4.ties"]) == {"head.weight": "embedding.weight"}
    assert (metadata["note"], metadata["format"]) == ("mine", "pt")
    assert (8 + length) % 8 == 0
    for entry in header.values():  # each tensor aligned to its own items
        size = {"F32": 4, "F16": 2, "I64": 8, "I32": 4, "U8": 1}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0
    assert raw[:2] != b"\x80\x02"
    with pytest.raises(ValueError, match=r"at position|opcode|pickle"):
        list(pickletools.genops(raw))


def test_tensors_of_every_format(tmp_path: Path, fmt: formats.Format) -> None:
    """Also of the format that GGUF cannot hold."""
    blocks = random_blocks(fmt, 5, 512)
    plain = torch.randn(3, dtype=torch.float64)
    tensors: dict[str, Any] = {"w": (blocks, fmt.name), "p": plain, "e": torch.empty(0, 4)}
    torch_q4.save_safetensors(tmp_path / "a.safetensors", tensors)
    file = torch_q4.load_safetensors(tmp_path / "a.safetensors")
    assert (file.tensors["w"].format, file.tensors["w"].shape) == (fmt, (5, 512))
    assert torch.equal(file.tensors["w"].blocks, blocks)
    assert torch.equal(file.tensors["p"].data, plain)
    assert file.tensors["e"].shape == (0, 4)
    assert torch.equal(file.tensors["w"].dequantize(), torch_q4.dequantize(blocks, fmt))


def test_shards_of_a_folder(tmp_path: Path) -> None:
    torch_q4.save_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    blocks = torch_q4.quantize(torch.randn(2, 32), "q8_0")
    torch_q4.save_safetensors(tmp_path / "b.safetensors", {"y": (blocks, "q8_0")})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    file = torch_q4.load_safetensors(tmp_path)
    assert file.tensors["y"].format is formats.get("q8_0")
    assert torch.equal(file.tensors["x"].data, torch.ones(2))
    index["weight_map"]["x"] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shards must lie beside their index, got \['../a"):
        torch_q4.load_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the index must be JSON, got: "),
        ("[" * 200_000, "the index must be JSON, got: "),
        ("[]", "the index must have a weight_map of names to files, got 'None'"),
        ("{}", "must have a weight_map of names to files, got 'None'"),
        ('{"weight_map": ["a"]}', "must have a weight_map of names to files, got"),
        ('{"weight_map": {"x": 3}}', "must have a weight_map of names to files, got"),
        ('{"weight_map": {"x": ["a"], "y": "a"}}', "must have a weight_map of names to files"),
        ('{"weight_map": {"x": ""}}', r"shards must lie beside their index, got \[''\]"),
        ('{"weight_map": {"x": ".."}}', r"shards must lie beside their index, got \['..'\]"),
        ('{"weight_map": {"x": "a\\u0000"}}', r"shards must lie beside their index, got \['a.x00"),
        ('{"weight_map": {"x": "\\ud800"}}', r"shards must lie beside their index, got \['.ud800"),
    ],
)
def test_a_damaged_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"^load_safetensors: .*{message}"):
        torch_q4.load_safetensors(tmp_path)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO would be waited for, for ever."""
    (tmp_path / "shards").mkdir()
    for name in ("a.safetensors", "shards/model.safetensors.index.json"):
        os.mkfifo(tmp_path / name)
    for path in (tmp_path / "a.safetensors", tmp_path / "shards"):
        with pytest.raises(OSError, match=r"load_safetensors: the path must be .*, got a FIFO"):
            torch_q4.load_safetensors(path)
    with pytest.raises(OSError, match="got a character device"):
        torch_q4.load_safetensors("/dev/zero")


def rewrite(path: Path, change) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": "[]"}),
            r"metadata 'torch_q4.formats' must be a JSON object of strings, got '\[\]'",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": '{"w": "q99"}'}),
            "tensor 'w': format must be one of .*, got 'q99'",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": '{"w": "q4_0"}'}),
            "tensor 'w': q4_0: bytes per row must be a multiple of 18, got 34",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": '{"p": "q8_0"}'}),
            "tensor 'p': blocks must be uint8, got torch.float32",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": '{"missing": "q8_0"}'}),
            r"must name tensors of the file, got \['missing'\]",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.ties": '{"a": "missing"}'}),
            r"ties must name tensors of the file, got \['missing'\]",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": "[" * 200_000}),
            r"metadata 'torch_q4.formats' must be a JSON object of strings, got '\[\[\[",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.ties": '{"a": ' * 200_000}),
            "metadata 'torch_q4.ties' must be a JSON object of strings",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.ties": '{"a": 3}'}),
            "metadata 'torch_q4.ties' must be a JSON object of strings",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.ties": '{"w": "p"}'}),
            r"a tied name must have no tensor of its own, got \['w'\]",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.ties": '{"a": "b", "b": "a"}'}),
            r"ties must name tensors of the file, got \['a', 'b'\]",
        ),
        (
            lambda h: h["__metadata__"].update({"torch_q4.formats": {"w": "q8_0"}}),
            "the file must be a whole safetensors file, got: ",
        ),
        (lambda h: h["w"].update({"dtype": "X7"}), "the file must be a whole safetensors file"),
        (
            lambda h: h["w"].update({"data_offsets": [0, 1 << 40]}),
            "the file must be a whole safetensors file, got: ",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "a.safetensors"
    blocks = torch_q4.quantize(torch.randn(2, 32), "q8_0")
    torch_q4.save_safetensors(path, {"w": (blocks, "q8_0"), "p": torch.ones(3)})
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"^load_safetensors: .*{message}.*"):
        torch_q4.load_safetensors(path)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch_q4.save_checkpoint(quantized(), path)
    raw = path.read_bytes()
    for size in (0, 7, 100, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            torch_q4.load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        torch_q4.load_safetensors(tmp_path / "missing.safetensors")


def test_what_does_not_fit_the_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch_q4.save_checkpoint(quantized(), path)
    model = Model()
    model.first = nn.Linear(256, 64)
    with pytest.raises(ValueError, match=r"'first.weight' must have shape \(64, 256\), got"):
        torch_q4.load_checkpoint(model, path)
    model.first = nn.Identity()
    with pytest.raises(ValueError, match=r"'first.weight' must be the weight of a linear or .*ity"):
        torch_q4.load_checkpoint(model, path)
    model = Model()
    model.more = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"more\.weight"):
        torch_q4.load_checkpoint(model, path)
    torch_q4.load_checkpoint(model, path, strict=False)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensor 'x' must be one of float64, .*complex64"):
        torch_q4.save_safetensors(
            tmp_path / "a.safetensors", {"x": torch.ones(2, dtype=torch.complex64)}
        )
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"must have data, got a meta tensor"):
        torch_q4.save_checkpoint(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_by_itself(tmp_path: Path) -> None:
    layer = QuantLinear.from_linear(nn.Linear(256, 8), "q3_k")
    torch_q4.save_checkpoint(layer, tmp_path / "a.safetensors")
    file = torch_q4.load_safetensors(tmp_path / "a.safetensors")
    again = QuantLinear.from_blocks(
        file.tensors["weight"].blocks, file.tensors["weight"].format, file.tensors["bias"].data
    )
    x = torch.randn(2, 256)
    assert torch.equal(again(x), layer(x))


# ---- what a file may do to a model ---------------------------------------------------------------


def with_ties(path: Path, ties: dict[str, str]) -> None:
    rewrite(path, lambda header: header["__metadata__"].update({"torch_q4.ties": json.dumps(ties)}))


def plain_file(path: Path) -> None:
    """All of a model but its head, with no tie."""
    torch_q4.save_checkpoint(Model(tied=False), path)
    state = safetensors_torch.load_file(path)
    del state["head.weight"]
    torch_q4.save_safetensors(path, state)


def everything(model: nn.Module) -> dict[tuple[str, str], Any]:
    """All attributes of all modules, but for the contents of parameters and buffers."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }


@pytest.mark.parametrize(
    "name",
    [
        "forward",
        "first.forward",
        "first.out_features",
        "first.training",
        "first._forward_hooks",
        "first",
        "",
        ".",
        "nowhere.weight",
        "first.weight.data",
        "first.bias.requires_grad",
        "__class__",
        "first._parameters",
        "hidden",
        "head.weight_format",
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_ties_set_nothing_but_entries_of_the_state(tmp_path: Path, name: str, strict: bool) -> None:
    path = tmp_path / "a.safetensors"
    plain_file(path)
    with_ties(path, {"head.weight": "embedding.weight", name: "steps"})
    model = Model(tied=False)
    model.register_buffer("hidden", torch.tensor([7, 8, 9]), persistent=False)
    before = everything(model)
    if strict:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            torch_q4.load_checkpoint(model, path)
    else:
        torch_q4.load_checkpoint(model, path, strict=False)
        assert model.head.weight is model.embedding.weight
    assert everything(model) == before
    assert model.hidden.tolist() == [7, 8, 9]


@pytest.mark.parametrize("name", ["first.weight_format", "embedding.weight_format"])
@pytest.mark.parametrize("strict", [True, False])
def test_ties_of_the_number_of_a_format(tmp_path: Path, name: str, strict: bool) -> None:
    path = tmp_path / "a.safetensors"
    torch_q4.save_checkpoint(quantized(), path)
    state = torch_q4.load_safetensors(path).tensors
    del state[name]  # type: ignore[attr-defined]
    torch_q4.save_safetensors(path, state)
    with_ties(path, {"head.weight": "embedding.weight", name: "second.weight_format"})
    with pytest.raises(RuntimeError, match=f"{name}: the format must be"):
        torch_q4.load_checkpoint(Model(), path, strict=strict)
    with_ties(path, {"head.weight": "embedding.weight", name: "narrow.weight"})
    with pytest.raises(ValueError, match=f"'{name}' must be one integer, got torch.float32"):
        torch_q4.load_checkpoint(Model(), path, strict=strict)


def test_ties_join_one_shape_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    plain_file(path)
    with_ties(path, {"head.weight": "embedding.weight"})
    model = Model(tied=False)
    model.head.half()
    with pytest.raises(ValueError, match=r"one shape and dtype, got \(64, 256\) torch.float16 for"):
        torch_q4.load_checkpoint(model, path)
    with_ties(path, {"head.weight": "narrow.weight"})
    with pytest.raises(RuntimeError, match="size mismatch for head"):
        torch_q4.load_checkpoint(Model(tied=False), path)


def test_a_buffer_over_the_memory_of_a_parameter(tmp_path: Path) -> None:
    def model() -> nn.Module:
        layer = nn.Linear(4, 4)
        layer.register_buffer("alias", layer.weight.detach())
        return layer

    torch_q4.save_checkpoint(model(), tmp_path / "a.safetensors")
    assert torch_q4.load_safetensors(tmp_path / "a.safetensors").ties == {"alias": "weight"}
    other = model()
    other.alias = torch.zeros(4, 4)
    torch_q4.load_checkpoint(other, tmp_path / "a.safetensors")
    assert isinstance(other.weight, nn.Parameter)
    assert not isinstance(other.alias, nn.Parameter)
    assert other.alias.data_ptr() == other.weight.data_ptr()


def test_ties_across_devices_keep_their_own_copies() -> None:
    """A parameter is on one device. The meta device is one that is everywhere."""
    model = Model(tied=False)
    model.head.to("meta")
    slots = checkpoint._slots(model)
    checkpoint._tie("head.weight", slots["head.weight"], "embedding.weight",
                    slots["embedding.weight"])  # fmt: skip
    assert model.head.weight.is_meta
    blocks: dict[Any, Any] = {}
    stored = torch_q4.quantize(torch.randn(64, 256), "q6_k")
    for name in ("embedding.weight", "head.weight"):
        checkpoint._replace(model, name, formats.get("q6_k"), stored, "exact", blocks, "x")
    assert model.head.blocks is not model.embedding.blocks


def test_packed_weights_of_other_dimensions(tmp_path: Path, fmt: formats.Format) -> None:
    path = tmp_path / "a.safetensors"
    for shape in ((256,), (2, 128, 256), (0, 256), (128, 0)):
        blocks = torch.zeros(*shape[:-1], fmt.row_bytes(shape[-1]), dtype=torch.uint8)
        torch_q4.save_safetensors(path, {"first.weight": (blocks, fmt.name)})
        model = Model()
        words = rf"'first.weight' must have shape \(128, 256\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=f"load_checkpoint: {words}"):
            torch_q4.load_checkpoint(model, path, strict=False)
        assert type(model.first) is nn.Linear


def test_nothing_is_replaced_before_all_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch_q4.save_checkpoint(quantized(), path)
    model = Model()
    model.second = nn.Identity()
    with pytest.raises(ValueError, match=r"'second.weight' must be the weight of"):
        torch_q4.load_checkpoint(model, path)
    assert type(model.first) is nn.Linear
    assert type(model.embedding) is nn.Embedding


def test_a_bare_layer(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    layer = QuantLinear.from_linear(nn.Linear(256, 8), "q3_k")
    torch_q4.save_checkpoint(layer, path)
    other = QuantLinear(256, 8, "q3_k")
    torch_q4.load_checkpoint(other, path)
    x = torch.randn(2, 256)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match="must hold the layers to replace, got a bare Linear"):
        torch_q4.load_checkpoint(nn.Linear(256, 8), path)
