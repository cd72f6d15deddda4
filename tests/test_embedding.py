"""embedding: the rows that dequantize gives, whatever the indices' shape."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import random_blocks

import torch_q4


def test_matches_dequantize(fmt, dtype) -> None:
    blocks = random_blocks(fmt, 50, 512)
    values = torch_q4.dequantize(blocks, fmt, dtype)
    for shape in ((), (7,), (2, 3), (0,), (3, 0)):
        for index_dtype in (torch.int64, torch.int32):
            indices = torch.randint(0, 50, shape, dtype=index_dtype)
            rows = torch_q4.embedding(indices, blocks, fmt, dtype)
            assert rows.dtype == dtype
            assert torch.equal(rows, values[indices.long()])


def test_strided_indices_and_blocks(fmt) -> None:
    blocks = random_blocks(fmt, 20, 256)
    values = torch_q4.dequantize(blocks, fmt)
    indices = torch.randint(0, 10, (6, 8))
    assert torch.equal(torch_q4.embedding(indices[::2, ::3].T, blocks[::2], fmt),
                       values[::2][indices[::2, ::3].T])  # fmt: skip


@pytest.mark.parametrize("wrong", [-1, 20, 2**40])
def test_index_out_of_range(fmt, wrong) -> None:
    blocks = random_blocks(fmt, 20, 256)
    with pytest.raises(
        RuntimeError, match=rf"embedding: indices must be in \[0, 20\), got {wrong}"
    ):
        torch_q4.embedding(torch.tensor([3, wrong]), blocks, fmt)


def test_indices_that_another_thread_changes_are_not_followed() -> None:
    """Each index is read once: what is checked is what is used. Else a process would crash."""
    code = """
import threading, torch, torch_q4
blocks = torch_q4.quantize(torch.randn(64, 256), "q4_0")
indices = torch.zeros(4096, dtype=torch.int64)
done = False
def disturb():
    while not done:
        indices.fill_(1 << 40)
        indices.fill_(3)
thread = threading.Thread(target=disturb)
thread.start()
refused = 0
for _ in range(3000):
    try:
        torch_q4.embedding(indices, blocks, "q4_0")
    except RuntimeError as error:
        assert "indices must be in [0, 64), got 1099511627776" in str(error), error
        refused += 1
done = True
thread.join()
print("refused", refused)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    assert result.stdout.startswith("refused")
