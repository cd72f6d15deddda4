"""pack and unpack: inverse, byte for byte what the layout says, and the same to every operator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_blocks
from torch.library import opcheck

import torch_q4

ops = torch.ops.torch_q4


def test_unpack_inverts_pack(fmt) -> None:
    for rows in (0, 1, 15, 16, 17, 32, 50):
        for columns in (0, 256, 1280):
            shape = (rows, fmt.row_bytes(columns))
            blocks = torch.randint(0, 256, shape, dtype=torch.uint8)
            packed = torch_q4.pack(blocks, fmt)
            assert packed.shape == blocks.shape
            assert torch.equal(torch_q4.unpack(packed, fmt), blocks)
            tail = rows // 16 * 16
            assert torch.equal(packed[tail:], blocks[tail:])
            in_place = blocks.clone()
            ops.pack_(in_place, fmt.type_id)
            assert torch.equal(in_place, packed)


def test_pack_is_a_permutation_within_a_block_of_16_rows(fmt) -> None:
    """Every byte of 16 rows' block stays in that block, at one place of its own."""
    blocks = torch.zeros(16, fmt.row_bytes(512), dtype=torch.uint8)
    seen = set()
    count = 512 // fmt.block_elems
    for row in (0, 1, 7, 15):
        for byte in range(fmt.block_bytes):
            blocks.zero_()
            blocks[row, (count - 1) * fmt.block_bytes + byte] = 1
            packed = torch_q4.pack(blocks, fmt).flatten()
            (place,) = packed.nonzero().flatten().tolist()
            assert place // (16 * fmt.block_bytes) == count - 1
            seen.add(place)
    assert len(seen) == 4 * fmt.block_bytes


def test_layout_of_q4_0_by_hand() -> None:
    """What kernels/packed.h draws: quants of rows 0 4 8 12 1 5 ..., then sixteen scales."""
    blocks = torch.arange(16 * 18, dtype=torch.int32).to(torch.uint8).view(16, 18)
    packed = torch_q4.pack(blocks, "q4_0").flatten()
    order = [place % 4 * 4 + place // 4 for place in range(16)]
    assert torch.equal(packed[:256].view(16, 16), blocks[order, 2:])
    assert torch.equal(packed[256:].view(16, 2), blocks[:, :2])


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_linear_does_not_depend_on_the_layout(fmt, dtype, compute) -> None:
    for n, k in ((16, 256), (37, 768), (5, 512)):
        blocks = random_blocks(fmt, n, k)
        packed = torch_q4.pack(blocks, fmt)
        bias = torch.randn(n).to(dtype)
        for m in (0, 1, 2, 5, 13, 30, 200):
            x = torch.randn(m, k).to(dtype)
            plain = torch_q4.linear(x, blocks, fmt, bias, compute=compute)
            assert torch.equal(
                torch_q4.linear(x, packed, fmt, bias, compute=compute, packed=True), plain
            )


def test_everything_else_does_not_either(fmt) -> None:
    blocks = random_blocks(fmt, 37, 768)
    packed = torch_q4.pack(blocks, fmt)
    grad = torch.randn(9, 37)
    assert torch.equal(
        ops.linear_transposed(grad, packed, fmt.type_id, True),
        ops.linear_transposed(grad, blocks, fmt.type_id),
    )
    indices = torch.arange(37)
    assert torch.equal(
        ops.embedding(indices, packed, fmt.type_id, torch.float32, True),
        torch_q4.dequantize(blocks, fmt),
    )


def test_gradient_through_packed_blocks(fmt) -> None:
    blocks = random_blocks(fmt, 20, 256)
    x = torch.randn(3, 256, requires_grad=True)
    torch_q4.linear(x, blocks, fmt).square().sum().backward()
    wanted, x.grad = x.grad, None
    torch_q4.linear(x, torch_q4.pack(blocks, fmt), fmt, packed=True).square().sum().backward()
    assert torch.equal(x.grad, wanted)


def test_opcheck(fmt) -> None:
    blocks = random_blocks(fmt, 20, 256)
    packed = torch_q4.pack(blocks, fmt)
    opcheck(ops.pack.default, (blocks, fmt.type_id))
    opcheck(ops.unpack.default, (packed, fmt.type_id))
    opcheck(ops.pack_.default, (blocks, fmt.type_id))
    x = torch.randn(3, 256, requires_grad=True)
    opcheck(ops.linear.default, (x, packed, fmt.type_id, None, "exact", True))
    grad = torch.randn(3, 20, requires_grad=True)
    opcheck(ops.linear_transposed.default, (grad, packed, fmt.type_id, True))
    opcheck(ops.embedding.default, (torch.tensor([3]), packed, fmt.type_id, torch.float16, True))


def test_strides(fmt) -> None:
    blocks = random_blocks(fmt, 64, 256)
    assert torch.equal(torch_q4.pack(blocks[::2], fmt), torch_q4.pack(blocks[::2].clone(), fmt))
    with pytest.raises(RuntimeError, match="pack_: blocks must be contiguous"):
        ops.pack_(blocks[::2], fmt.type_id)


HUGE_PAGES = """
import ctypes, re, torch, torch_q4
from pathlib import Path

def huge() -> int:  # kB of this process's memory on huge pages
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages: +([0-9]+)", text)[1])

blocks = torch.zeros(2048, 16 * 1024 // 32 * 18, dtype=torch.uint8)
before = huge()
kept = torch_q4.pack(blocks, "q4_0")
print(huge() - before)
probe = torch.ones(8 << 20, dtype=torch.uint8)
start = (probe.data_ptr() + (2 << 20) - 1) >> 21 << 21
print(ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(2 << 20), 25))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how Linux maps memory")
@pytest.mark.parametrize("setting", ["", "0"])
def test_packed_weights_are_on_huge_pages(setting) -> None:
    environment = dict(os.environ, TORCH_Q4_HUGE_PAGES=setting)
    result = subprocess.run([sys.executable, "-c", HUGE_PAGES], capture_output=True, text=True,
                            env=environment)  # fmt: skip
    assert result.returncode == 0, result.stderr
    kilobytes, collapse = map(int, result.stdout.split())
    if setting == "0":
        policy = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if policy.exists() and "[always]" in policy.read_text():
            pytest.skip("this Linux uses huge pages unasked")
        assert kilobytes == 0
    elif collapse != 0:
        pytest.skip("this Linux does not move memory to huge pages on request")
    else:
        assert kilobytes >= 8 << 10  # of 18 MB
