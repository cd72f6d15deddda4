"""Random products held against float64: any format, shape, dtype, layout, stride and scale.

``TORCH_Q4_CPU_ISA`` decides once in a process which kernels they run on.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import random_blocks
from torch import Tensor

import torch_q4
from torch_q4 import formats
from torch_q4.formats import Format

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The smallest normal number of float32: below it there are fewer bits, or none.
TINY = 2.0**-126


def generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))


@functools.lru_cache(200)
def weights(name: str, columns: int) -> tuple[Tensor, Tensor]:
    """A few rows of weights: their blocks, and float64 values."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(columns)
        blocks = random_blocks(formats.get(name), 24, columns)
    return blocks, dense64(blocks, formats.get(name))


def random_weight(rng: random.Random, fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor]:
    """n of these rows, each any of them."""
    blocks, values = weights(fmt.name, k)
    rows = torch.randint(len(blocks), (n,), generator=generator(rng))
    return blocks[rows], values[rows]


def dense64(blocks: Tensor, fmt: Format) -> Tensor:
    """The weights by the reference, in float64."""
    split = blocks.contiguous().unflatten(-1, (-1, fmt.block_bytes))
    return fmt.reference(split).flatten(-2).double()


def strided(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values by other strides, or from another place."""
    kind = rng.randrange(6)
    if kind == 0:
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if kind == 1:
        return tensor.repeat_interleave(3, -1)[..., 1::3]
    if kind == 2:
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)
    if kind == 3 and tensor.dim() > 1:
        return torch.cat((tensor, tensor), 0)[len(tensor) :]
    return tensor


def int8_bound(x: Tensor, w: Tensor) -> Tensor:
    """What rounding each 32 activations to 127 steps may change: half a step of each, (M, N)."""
    m, k = x.shape
    largest = x.abs().view(m, k // 32, 32).amax(-1)
    sums = w.abs().view(len(w), k // 32, 32).sum(-1)
    return largest @ sums.T / 254


def check_product(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    compute: str,
    *,
    normal: bool,
    spread: bool = True,
) -> None:
    """The bounds of the README, and those of tests/test_linear.py for each element.

    ``w`` is float64. Values that the dtype does not hold are left out. ``normal`` says that x is
    normally distributed: only then has int8 a bound on the whole error. ``spread`` says that no
    column of x makes up most of each sum. Where one does, the error is the few roundings that come
    after that one product, and the BLAS at hand decides how many F.linear has: 2^-22 of the result
    is allowed too.
    """
    dtype, k = y.dtype, w.shape[1]
    assert dtype == x.dtype
    assert y.shape == (*x.shape[:-1], len(w))
    y, x = y.reshape(-1, len(w)), x.reshape(-1, k)
    wide = x.double()
    product = wide @ w.T
    wanted = product + (bias.double() if bias is not None else 0)
    magnitude = wide.abs() @ w.abs().T + (bias.double().abs() if bias is not None else 0)
    finite = magnitude < torch.finfo(dtype).max / 4
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    rounding = 0.5 * eps * wanted.abs() + 2 * torch.finfo(dtype).smallest_normal * eps
    sizes = wide.norm(dim=-1, keepdim=True) * w.norm(dim=-1)
    norms = sizes + (bias.double().abs() if bias is not None else 0)
    bound = rounding + 4 * eps32 * max(k, 1) ** 0.5 * norms + k * TINY * eps32
    if compute == "int8":
        bound = bound + 1.001 * int8_bound(wide, w)
    error = (y.double() - wanted).abs()
    wrong = finite & ~(error <= bound)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong: y{list(at)} must be "
            f"{wanted[at]:.8g} within {bound[at]:.3g}, got {y[at]:.8g}"
        )
    if wanted.numel() < 64 or not bool(finite.all()) or (compute == "int8" and not normal):
        return
    least = 0.5 * eps * wanted.norm() + wanted.numel() * TINY * eps
    if compute == "int8":
        # Of n elements, the quotient of two such norms scatters by 1 / sqrt(n).
        scatter = 1 + 2 / independent(sizes.square(), w) ** 0.5
        allowed = (1e-2 * product.norm() + 2 * least) * scatter
    else:
        plain = F.linear(x, w.to(dtype), bias).double()
        allowed = 2 * torch.maximum((plain - wanted).norm(), least)
        if not spread:
            allowed = torch.maximum(allowed, 2 * eps32 * product.norm() + least)
    assert error.norm() <= allowed, (
        f"error {error.norm() / wanted.norm():.3g} of the result, allowed are "
        f"{allowed / wanted.norm():.3g}"
    )


def independent(squares: Tensor, w: Tensor) -> float:
    """How many equally large, different elements scatter as much as these, with such squares.

    Equal rows of w give equal elements, and a large row of x or w makes up most of the whole error.
    """
    _, which = torch.unique(w.sum(-1), return_inverse=True)
    sums = squares.new_zeros(len(squares), len(w)).index_add_(1, which, squares)
    return float(sums.sum().square() / sums.square().sum())


def product(rng: random.Random, folder: Path) -> str:
    fmt, dtype = rng.choice(formats.all()), rng.choice(FLOATS)
    blocks_of_row = rng.choice((1, 1, 2, 3, 5, 8, 17, 32)) * (1 if fmt.block_elems > 32 else 8)
    if fmt.block_elems == 32 and rng.random() < 0.5:
        blocks_of_row += rng.randrange(8)
    k = fmt.block_elems * blocks_of_row
    n = rng.choice((1, 2, 7, 15, 16, 17, 31, 33, 48, 100, 257))
    m = rng.choice((0, 1, 1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 64, 65, 191, 192, 200))
    if m * n * k > 1 << 22 and rng.random() < 0.9:
        n = rng.randrange(1, 20)
    compute, packed = rng.choice(("exact", "exact", "int8")), rng.random() < 0.5
    torch.set_num_threads(rng.randrange(1, 5))

    random_numbers = generator(rng)
    x = torch.randn(m, k, generator=random_numbers)
    scale = 1.0
    if rng.random() < 0.4:
        most = 37 if dtype != torch.float16 else 3
        scale = 10.0 ** rng.uniform(-30 if dtype != torch.float16 else -3, most)
    normal = spread = True
    if rng.random() < 0.2:
        normal = False  # a few rows make up the whole error
        x *= 10.0 ** torch.randn(m, 1, generator=random_numbers)
    if rng.random() < 0.2:
        normal = False
        x[torch.rand(m, k, generator=random_numbers) < 0.9] = 0
    if rng.random() < 0.1:
        normal = spread = False
        x[..., rng.randrange(k)] *= 100
    # In float64 first: neither x nor the sums may leave the dtype's range.
    w_blocks, w = random_weight(rng, fmt, n, k)
    largest = float((x.double().abs() @ w.abs().T).max()) if m else 0.0
    scale = min(
        scale, torch.finfo(dtype).max / 16 / max(largest, float(x.abs().max()) if m else 0, 1)
    )
    x = (x.double() * scale).to(dtype)
    bias = None
    if rng.random() < 0.5:
        relative = rng.choice((1.0, 1.0, 1e-3, 1e3, 1e6)) * max(largest, 1.0) * scale / k**0.5
        relative = min(relative, torch.finfo(dtype).max / 64)
        bias = (torch.randn(n, generator=random_numbers).double() * relative).to(dtype)
    blocks = torch_q4.pack(w_blocks, fmt) if packed else w_blocks
    if rng.random() < 0.3:
        x = strided(rng, x)
        blocks = strided(rng, blocks)
        bias = strided(rng, bias) if bias is not None else None
    told = (
        f"{fmt.name} {compute} m={m} n={n} k={k} {dtype} packed={packed} scale={scale:.2g} "
        f"bias={'none' if bias is None else f'{float(bias.abs().max()):.2g}'} "
        f"threads={torch.get_num_threads()} strides={x.stride()}"
    )
    try:
        y = torch_q4.linear(x, blocks, fmt, bias, compute=compute, packed=packed)
        check_product(y, x, w, bias, compute, normal=normal, spread=spread)
    except Exception as error:
        raise AssertionError(f"{told}: {error}") from error
    if rng.random() < 0.2:
        check_transposed(rng, blocks, fmt, w, dtype, packed)
    return compute


def check_transposed(
    rng: random.Random, blocks: Tensor, fmt: Format, w: Tensor, dtype: torch.dtype, packed: bool
) -> None:
    grad = torch.randn(rng.choice((1, 3, 65)), len(w), generator=generator(rng)).to(dtype)
    got = torch.ops.torch_q4.linear_transposed(grad, blocks, fmt.type_id, packed)
    wanted = grad.double() @ w
    rounding = torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny
    sums = torch.finfo(torch.float32).eps * len(w) * (grad.double().abs() @ w.abs())
    assert bool(((got.double() - wanted).abs() <= rounding + sums).all()), f"transposed {fmt.name}"


FUZZERS = {"product": product}
