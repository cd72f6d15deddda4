"""What the GPU tests share. Importing it skips the importing module where there is no GPU.

With ``TORCH_Q4_TEST_DEVICE=cpu`` the tests run on the CPU instead, as far as they can: a rehearsal
of the tests themselves on a machine without a GPU.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import EPS, dense64, random_blocks
from torch import Tensor

import torch_q4
from torch_q4.formats import Format

DEVICE = torch.device(os.environ.get("TORCH_Q4_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
ROOT = Path(__file__).parents[2]

if ON_GPU and not torch.cuda.is_available():
    pytest.skip(
        "no GPU that torch can use (torch.cuda.is_available() is False)", allow_module_level=True
    )

# The comparison's float32 products are to be float32's, whatever the environment says of TF32.
torch.set_float32_matmul_precision("highest")

gpu_only = pytest.mark.skipif(not ON_GPU, reason="this is the rehearsal on the CPU")

ops = torch.ops.torch_q4


@pytest.fixture
def default_device() -> Iterator[None]:
    """Tensors are made on the device where nothing else is said."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@functools.lru_cache(maxsize=32)
def weight(fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical blocks, packed ones and the float64 values of a random weight, on the device.

    A tall weight repeats the rows of a smaller one in random order: quantising takes its time.
    """
    some = min(n, 256)
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.manual_seed(n * 1_000_003 + k)
        blocks = random_blocks(fmt, some, k)
        if n > some:
            blocks = blocks[torch.randint(some, (n,))]
    packed = torch_q4.pack(blocks, fmt)
    return blocks.to(DEVICE), packed.to(DEVICE), dense64(blocks, fmt).to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, m: int) -> Tensor:
    """``function`` of ``m`` rows of x at a time, all together again."""
    if m == 0:
        return function(x)
    return torch.cat([function(part) for part in x.split(m)])


def several(m: int) -> int:
    """A multiple of ``m``: so many rows that the norm of their errors says something.

    The outputs of one row share the rounding of what all of them multiply, such as the row's sum.
    """
    return -(-16 // m) * m if m else 0


def blocks_on_device(fmt: Format, rows: int, columns: int) -> Tensor:
    return random_blocks(fmt, rows, columns).to(DEVICE)


def same_values(got: Tensor, wanted: Tensor) -> bool:
    """Equal bit for bit in any float dtype, any NaN counting as any other; on any two devices."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    got, wanted = got.cpu(), wanted.cpu()
    nan = got.isnan() & wanted.isnan()
    return bool(((got.contiguous().view(bits) == wanted.contiguous().view(bits)) | nan).all())


def assert_near(
    y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, plain: Tensor | None = None
) -> None:
    """The bounds of exact arithmetic for ``y = x @ w.T + bias``, ``w`` in float64.

    float32: each error at most 4 eps sqrt(K) |x| |w|. Any dtype, over 64 outputs and more: the
    norm of all errors at most twice that of ``plain``, the same product by torch in that dtype, or
    of one rounding to the dtype.
    """
    product = x.double() @ w.T
    wanted = product if bias is None else product + bias.double()
    error = (y.double() - wanted).abs()
    what = f"x {tuple(x.shape)} {x.dtype}, w {tuple(w.shape)}"
    assert y.shape == wanted.shape, what
    if x.dtype == torch.float32:
        norms = x.double().norm(dim=-1, keepdim=True) * w.norm(dim=-1)
        if bias is not None:
            norms = norms + bias.double().abs()
        assert_within(y, wanted, 4 * EPS[torch.float32] * x.shape[-1] ** 0.5 * norms, what)
    if plain is None or wanted.numel() < 64:
        return
    rounding = 0.5 * EPS[x.dtype] * wanted.norm()
    allowed = 2 * torch.maximum((plain.double() - wanted).norm(), rounding)
    assert error.norm() <= allowed, (
        f"{what}: all errors must have norm {float(allowed):.3g}, got {float(error.norm()):.3g}; "
        f"{worst_place(y, wanted, error)}"
    )


def worst_place(got: Tensor, wanted: Tensor, badness: Tensor) -> str:
    """Where ``badness`` is largest, NaN first, and what is there."""
    flat = int(badness.nan_to_num(nan=float("inf")).argmax())
    place = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), wanted.shape))
    return f"at {place} got {float(got[place])}, wanted {float(wanted[place])}"


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor, what: str) -> None:
    """Each element within its bound."""
    error = (got.double() - wanted).abs()
    if not bool((error <= bound).all()):
        raise AssertionError(f"{what}: {worst_place(got, wanted, error / bound)}")


def run_script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a fresh process, where nothing has been loaded yet."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def check_script(code: str, *arguments: str) -> None:
    """:func:`run_script`, which must succeed."""
    result = run_script(code, *arguments)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"[-4000:]
