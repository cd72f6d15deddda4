"""Random weights to measure with, in any format."""

from __future__ import annotations

import torch
from torch import Tensor

import torch_q4
from torch_q4 import formats


def random_blocks(
    fmt: formats.Format | str, rows: int, k: int, generator: torch.Generator | None = None
) -> Tensor:
    """A small weight, uint8 ``(rows, bytes per row)``, normally distributed where it is quantised.

    A format without a quantiser gets random bytes, of which those blocks stay whose values have a
    root mean square of 1/2 to 2.
    """
    fmt = formats.get(fmt)
    if fmt.quantizes:
        return torch_q4.quantize(torch.randn(rows, k, generator=generator), fmt)
    blocks = torch.randint(256, (1 << 15, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    size = torch_q4.dequantize(blocks, fmt).double().square().mean(-1).sqrt()
    blocks = blocks[(size > 0.5) & (size < 2)]  # of a NaN neither is true
    chosen = torch.randint(len(blocks), (rows, k // fmt.block_elems), generator=generator)
    return blocks[chosen].flatten(-2)
