"""What must be the same bit for bit on the GPU as on the CPU: decoding, layouts, quantisation."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS, golden
from gpu_support import DEVICE, gpu_only, ops, run_script, same_values, weight

import torch_q4

pytestmark = pytest.mark.gpu


def random_bytes(fmt, rows: int, columns: int) -> torch.Tensor:
    """Any blocks there can be: their scales may be huge, infinite, NaN or subnormal."""
    return torch.randint(0, 256, (rows, fmt.row_bytes(columns)), dtype=torch.uint8)


def test_dequantize(fmt, dtype) -> None:
    for rows, count in ((1, 1), (3, 5), (37, 12), (300, 40), (2, 0), (0, 4)):
        blocks = random_bytes(fmt, rows, count * fmt.block_elems)
        wanted = torch_q4.dequantize(blocks, fmt, dtype)
        got = torch_q4.dequantize(blocks.to(DEVICE), fmt, dtype)
        assert got.device.type == DEVICE.type
        assert same_values(got, wanted)


@pytest.mark.parametrize("kind", ["", "imatrix_", "raw_"])
def test_dequantize_matches_golden(ggml_fmt, kind) -> None:
    if f"{ggml_fmt.name}_{kind}blocks" not in golden():
        pytest.skip("ggml has no such quantiser")
    blocks = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}blocks"]).to(DEVICE)
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}values"])
    assert same_values(torch_q4.dequantize(blocks, ggml_fmt), wanted)


def test_dequantize_takes_any_strides_and_dimensions(fmt) -> None:
    blocks = torch.randint(0, 256, (4, 6, 2 * fmt.block_bytes), dtype=torch.uint8)
    whole, there = torch_q4.dequantize(blocks, fmt), blocks.to(DEVICE)
    assert same_values(torch_q4.dequantize(there[::2, 1::3], fmt), whole[::2, 1::3])
    assert same_values(torch_q4.dequantize(there.transpose(0, 1), fmt), whole.transpose(0, 1))
    assert same_values(torch_q4.dequantize(there[0, 0], fmt), whole[0, 0])
    room = torch.empty(blocks.numel() + 1, dtype=torch.uint8, device=DEVICE)
    odd = room[1:].view_as(blocks).copy_(there)
    assert same_values(torch_q4.dequantize(odd, fmt), whole)


@pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
def test_embedding(fmt, dtype, packed) -> None:
    blocks = random_bytes(fmt, 50, 768)
    values = torch_q4.dequantize(blocks, fmt, dtype)
    table = (torch_q4.pack(blocks, fmt) if packed else blocks).to(DEVICE)
    for shape in ((), (7,), (2, 3), (0,), (3, 0), (40, 50)):
        for index_dtype in (torch.int64, torch.int32):
            indices = torch.randint(0, 50, shape, dtype=index_dtype)
            rows = ops.embedding(indices.to(DEVICE), table, fmt.type_id, dtype, packed)
            assert same_values(rows, values[indices.long()])
    strided = torch.randint(0, 50, (6, 8)).to(DEVICE)[::2, ::3].T
    rows = ops.embedding(strided, table, fmt.type_id, dtype, packed)
    assert same_values(rows, values[strided.cpu()])


@gpu_only
@pytest.mark.parametrize("wrong", ["-1", "20", "1099511627776"])
def test_embedding_index_out_of_range(wrong) -> None:
    """As for nn.Embedding, an error of the device, which ends the process's use of it."""
    code = """
import sys, torch, torch_q4
table = torch.zeros(20, 18, dtype=torch.uint8, device="cuda")
last = torch.tensor([19], device="cuda")
assert torch_q4.embedding(last, table, "q4_0").sum() == 0
torch_q4.embedding(torch.tensor([3, int(sys.argv[1])], device="cuda"), table, "q4_0")
torch.cuda.synchronize()
print("went on")
"""
    result = run_script(code, wrong)
    assert result.returncode != 0
    assert "went on" not in result.stdout
    assert "error" in result.stderr.lower()


def test_pack_and_unpack(fmt) -> None:
    for rows in (0, 1, 15, 16, 17, 50, 400):
        for columns in (0, 256, 1280):
            blocks = random_bytes(fmt, rows, columns)
            there, wanted = blocks.to(DEVICE), torch_q4.pack(blocks, fmt)
            packed = torch_q4.pack(there, fmt)
            assert torch.equal(packed.cpu(), wanted)
            assert torch.equal(torch_q4.unpack(packed, fmt).cpu(), blocks)
            ops.pack_(there, fmt.type_id)
            assert torch.equal(there.cpu(), wanted)


def test_pack_of_misaligned_views(fmt) -> None:
    blocks = random_bytes(fmt, 50, 512)
    room = torch.empty(blocks.numel() + 1, dtype=torch.uint8, device=DEVICE)
    odd = room[1:].view_as(blocks).copy_(blocks)
    wanted = torch_q4.pack(blocks, fmt)
    assert torch.equal(torch_q4.pack(odd, fmt).cpu(), wanted)
    ops.pack_(odd, fmt.type_id)
    assert torch.equal(odd.cpu(), wanted)
    assert torch.equal(torch_q4.unpack(odd, fmt).cpu(), blocks)


# q4_0 and q8_0 have kernels of their own; the other formats' quantisers run on the CPU.
@pytest.mark.quantises
def test_quantize(fmt) -> None:
    for dtype in FLOATS:
        w = torch.cat([torch.randn(5, 1024), torch.zeros(1, 1024), 1e3 * torch.randn(1, 1024)])
        w = w.to(dtype)
        got = torch_q4.quantize(w.to(DEVICE), fmt)
        assert got.device.type == DEVICE.type
        assert torch.equal(got.cpu(), torch_q4.quantize(w, fmt))
        got = torch_q4.quantize(w.to(DEVICE)[::2, 256:768].view(2, 2, 512), fmt)
        assert torch.equal(got.cpu(), torch_q4.quantize(w[::2, 256:768].reshape(2, 2, 512), fmt))


@pytest.mark.quantises
def test_quantize_matches_golden(ggml_fmt) -> None:
    x, importance = (torch.from_numpy(golden()[name]) for name in ("x", "imatrix"))
    for weights, kind in ((None, ""), (importance.to(DEVICE), "imatrix_")):
        wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}blocks"])
        assert torch.equal(torch_q4.quantize(x.to(DEVICE), ggml_fmt, weights).cpu(), wanted)


@pytest.mark.quantises
def test_quantize_of_nothing(fmt) -> None:
    for shape in ((0, 256), (3, 0), (2, 0, 512)):
        got = torch_q4.quantize(torch.empty(shape, device=DEVICE), fmt)
        assert got.shape == (*shape[:-1], fmt.row_bytes(shape[-1]))


def test_a_weight_moves_there_and_back(fmt) -> None:
    canonical, packed, w = weight(fmt, 37, 768)
    assert torch.equal(torch_q4.pack(canonical, fmt), packed)
    assert torch.equal(torch_q4.unpack(packed, fmt), canonical)
    assert torch.equal(torch_q4.dequantize(canonical, fmt).double(), w)
