"""Importance: what is gathered, what is written, and what llama.cpp's two kinds of files say."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

import torch_q4
from torch_q4 import Importance, collect_importance, formats, load_importance
from torch_q4.importance import for_tensor


class Model(nn.Module):
    """Two layers, one of them seen twice for each call, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 64)
        self.twice = nn.Linear(64, 64)
        self.last = nn.Linear(64, 32)
        self.unused = nn.Linear(64, 64)

    def forward(self, indices: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.embedding(indices) * scale
        return self.last(self.twice(self.twice(x)))


def batches() -> list[torch.Tensor]:
    return [torch.randint(16, (2, 5)) for _ in range(3)]


# ---- gathering -----------------------------------------------------------------------------------


def test_is_the_mean_of_squares() -> None:
    model, data = Model(), batches()
    found = collect_importance(model, data)
    assert list(found) == ["twice", "last"]
    with torch.no_grad():
        x = model.embedding(torch.cat(data)).reshape(-1, 64)
        hidden = model.twice(x)
        expected = torch.cat([x, hidden]).double().square().mean(0)
        last = model.twice(hidden).double().square().mean(0)
    torch.testing.assert_close(found["twice"].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["last"].double(), last, rtol=1e-5, atol=0)
    assert found["twice"].dtype == torch.float32
    assert found.counts["twice"].item() == 60
    assert found.chunks == 3


def test_batches_of_every_kind_and_the_filter() -> None:
    model = Model()
    indices = torch.arange(10)
    plain = collect_importance(model, [indices])
    for batch in ((indices, 1.0), [indices], {"indices": indices, "scale": 1.0}):
        found = collect_importance(model, [batch], lambda module, name: name == "last")
        assert list(found) == ["last"]
        assert torch.equal(found["last"], plain["last"])


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = Model()
    collect_importance(model, batches())
    with pytest.raises(IndexError):
        collect_importance(model, [torch.tensor([99])])
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_half_precision_activations_do_not_overflow() -> None:
    model = nn.Sequential(nn.Linear(32, 8, dtype=torch.float16))
    x = torch.full((4, 32), 300.0, dtype=torch.float16)  # 300**2 > 65504
    assert collect_importance(model, [x])["0"].eq(90_000).all()


def test_packed_layers_and_quantize_() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 8))
    data = [torch.randn(64, 256) * torch.where(torch.arange(256) % 8 == 0, 5.0, 0.2)]
    found = collect_importance(model, data)
    original = model[0].weight.detach().clone()
    plain = torch_q4.quantize(original, "q4_k")
    torch_q4.quantize_(model, "q4_k", importance=found)
    assert torch.equal(model[0].weight, torch_q4.quantize(original, "q4_k", found["0"]))

    def error(blocks: torch.Tensor) -> float:
        return float((data[0] @ (torch_q4.dequantize(blocks, "q4_k") - original).T).norm())

    assert error(model[0].weight) < 0.9 * error(plain)
    assert torch.equal(collect_importance(model, data)["0"], found["0"])  # of a packed layer


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (nn.Sequential(nn.ReLU()), [torch.ones(1)], "must have linear layers to watch, got none"),
        (nn.Sequential(nn.Linear(2, 2)), [], "must be at least 1 batch, got none"),
        (
            nn.Sequential(nn.Linear(2, 2)),
            [torch.tensor([[1.0, float("inf")]])],
            "activations must be finite, got some that are not in '0'",
        ),
    ],
)
def test_refused(model: nn.Module, data: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^collect_importance: .*{message}"):
        collect_importance(model, data)


# ---- files ---------------------------------------------------------------------------------------


def test_saved_as_llama_cpp_does(tmp_path: Path) -> None:
    names = {"twice": "blk.0.ffn_up.weight", "last": "blk.0.ffn_down.weight"}
    found = collect_importance(Model(), batches(), dataset="text.txt").renamed(names)
    found.save(tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].types == [gguf.GGUFValueType.UINT32]
    assert [(tensor.name, list(tensor.shape)) for tensor in reader.tensors] == [
        ("blk.0.ffn_down.weight.in_sum2", [64]),
        ("blk.0.ffn_down.weight.counts", [1, 1]),
        ("blk.0.ffn_up.weight.in_sum2", [64]),
        ("blk.0.ffn_up.weight.counts", [1, 1]),
    ]
    assert reader.tensors[3].data.item() == 60

    again = load_importance(tmp_path / "imatrix.gguf")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert (again.datasets, again.chunks, again.chunk_size) == (("text.txt",), 3, found.chunk_size)


def write_dat(path: Path, entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> Path:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        raw = name.encode()
        parts.append(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values)))
        parts.append(struct.pack(f"<{len(values)}f", *values))
    path.write_bytes(b"".join(parts) + tail)
    return path


def test_older_file(tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": (4, [8.0, 2.0]), "blk.0.attn_k.weight": (0, [3.0, 1.0])}
    found = load_importance(write_dat(tmp_path / "a.dat", entries))
    assert found["blk.0.attn_q.weight"].tolist() == [2.0, 0.5]
    assert found["blk.0.attn_k.weight"].tolist() == [3.0, 1.0]  # no calls: the values as they are
    tail = struct.pack("<ii", 7, 4) + b"wiki"
    found = load_importance(write_dat(tmp_path / "b.dat", entries, tail))
    assert (found.chunks, found.datasets) == (7, ("wiki",))


def test_experts(tmp_path: Path) -> None:
    found = Importance({"w": torch.tensor([2.0, 4.0, 9.0, 9.0])}, {"w": torch.tensor([2.0, 0.0])})
    assert found["w"].tolist() == [1.0, 2.0, 1.0, 1.0]  # no row reached the second expert
    found.save(tmp_path / "a.gguf")
    assert load_importance(tmp_path / "a.gguf")["w"].tolist() == [1.0, 2.0, 1.0, 1.0]
    weights = for_tensor(found, "w", (2, 5, 2))
    assert weights is not None
    assert weights.tolist() == [[1.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the entry count must end within the file's 0 bytes, got 4"),
        (struct.pack("<i", 0), "must be an imatrix GGUF file, or start with a count of 1 to 0"),
        (b"not an imatrix file at all, but text", "or start with a count of 1 to 3 entries"),
        (struct.pack("<ii", 1, -5) + bytes(20), "the name of entry 0 must end within"),
        (struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<ii", 1, 1 << 30), "values of 'ab' must"),
        (struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<ii", 1, 0), "'ab' must have values"),
        (struct.pack("<ii", 1, 2) + b"\xff\xff" + struct.pack("<iif", 1, 1, 1), "must be UTF-8"),
        (struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<iif", 1, 1, -1), "not negative, .* 'ab'"),
        (
            struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<iif", 1, 1, float("nan")),
            "values must be finite and not negative, got others in 'ab'",
        ),
    ],
)
def test_damaged_older_files(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.dat").write_bytes(raw)
    with pytest.raises(ValueError, match=f"^load_importance: .*{message}"):
        load_importance(tmp_path / "a.dat")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "the file must have entries, got none"),
        ({"a.in_sum2": torch.ones(4)}, "'a' must have sums and counts, got only one"),
        ({"a.in_sum2": torch.ones(4).half(), "a.counts": torch.ones(1)}, "must be float32, got"),
        ({"a.in_sum2": torch.ones(4), "a.counts": torch.ones(3)}, "multiple of its 3 counts"),
        ({"a.in_sum2": -torch.ones(4), "a.counts": torch.ones(1)}, "not negative"),
        (
            {"a.in_sum2": torch.ones(4), "a.counts": -torch.ones(1)},
            "counts must be .* not negative",
        ),
        (
            {"a.in_sum2": torch.ones(4), "a.counts": torch.ones(1) / 0},
            "counts must be finite .* 'a'",
        ),
    ],
)
def test_damaged_gguf_files(tmp_path: Path, tensors, message: str) -> None:
    torch_q4.save_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(ValueError, match=f"^load_importance: .*{message}"):
        load_importance(tmp_path / "a.gguf")
    raw = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(raw[:20])
    with pytest.raises(ValueError, match=r"^load_importance: "):
        load_importance(tmp_path / "a.gguf")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, got in ((tmp_path / "pipe", "a FIFO"), ("/dev/zero", "a character device")):
        with pytest.raises(OSError, match=f"load_importance: .* regular file, got {got}"):
            load_importance(path)


@pytest.mark.quantises
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_is_no_mean_of_squares(fmt: formats.Format, value: float) -> None:
    """As llama.cpp refuses what is not finite; a negative one would ask for the largest error."""
    bad = torch.ones(256)
    bad[3] = value
    words = rf"importance must be finite and not negative, got {value} at \(3,\)"
    with pytest.raises(ValueError, match=words):
        torch_q4.quantize_(nn.Sequential(nn.Linear(256, 8)), fmt, importance={"0": bad})


def test_for_tensor() -> None:
    values = {"blk.0.x.weight": torch.ones(4), "token_embd.weight": torch.ones(7)}
    assert for_tensor(None, "a", (2, 4)) is None
    assert for_tensor(values, "a", (2, 4)) is None
    found = for_tensor(values, "blk.0.x.weight", (2, 4))
    assert found is not None
    assert found.shape == (1, 4)
    assert for_tensor(values, "token_embd.weight", (2, 4)) is None  # llama.cpp leaves it out, too
    with pytest.raises(ValueError, match=r"'blk.0.x.weight' must have 8 values, got 4"):
        for_tensor(values, "blk.0.x.weight", (2, 8))
