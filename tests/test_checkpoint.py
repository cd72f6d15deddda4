"""Packed weights in safetensors: what goes in comes out, and any reader can open it."""

from __future__ import annotations

import json
import pickletools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_q4
from torch_q4 import QuantEmbedding, QuantLinear, formats

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
    blocks = torch_q4.quantize(torch.randn(5, 512), fmt)
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
