"""linear against float64, in every format, dtype, shape and arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EPS, dense64, random_blocks

import torch_q4
from torch_q4 import formats

ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 17, 64, 193)


def shapes(fmt) -> list[tuple[int, int]]:
    """(N, K): odd N, and K that is no whole number of 256-element tiles where that can be."""
    return [(1, 256), (37, 768), (130, 512), (5, 2048)] + (
        [(33, fmt.block_elems), (7, 23 * fmt.block_elems)] if fmt.block_elems < 256 else []
    )


def assert_exact(y, x, blocks, fmt, bias=None) -> None:
    """The bounds of exact arithmetic.

    In float32 each element's error is at most 4 eps sqrt(K) |x| |w|. In any dtype the whole error
    is at most twice that of F.linear on the dequantised weight, or of one rounding to the dtype;
    F.linear's own error over a handful of elements can be zero by luck, so that takes 64.
    """
    w = dense64(blocks, fmt)
    wanted = x.double() @ w.T + (bias.double() if bias is not None else 0)
    error = (y.double() - wanted).abs()
    if x.dtype == torch.float32:
        norms = x.double().norm(dim=-1, keepdim=True) * w.norm(dim=-1)
        if bias is not None:
            norms = norms + bias.double().abs()
        assert bool((error <= 4 * EPS[torch.float32] * x.shape[-1] ** 0.5 * norms).all())
    if wanted.numel() < 64:
        return
    plain = F.linear(x, w.to(x.dtype), bias).double()
    rounding = 0.5 * EPS[x.dtype] * wanted.norm()
    assert error.norm() <= 2 * torch.maximum((plain - wanted).norm(), rounding)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_exact(fmt, dtype, with_bias) -> None:
    for n, k in shapes(fmt):
        blocks = random_blocks(fmt, n, k)
        bias = torch.randn(n).to(dtype) if with_bias else None
        for m in ROWS:
            x = torch.randn(m, k).to(dtype)
            y = torch_q4.linear(x, blocks, fmt, bias)
            assert y.dtype == dtype
            assert y.shape == (m, n)
            assert_exact(y, x, blocks, fmt, bias)


# MKL's kernels for other CPUs than this one: a sum's order, and so its error, is theirs to choose.
@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
     "ONEDNN_MAX_CPU_ISA": "AVX2"},
], ids=lambda settings: "-".join(settings.values()))  # fmt: skip
def test_on_what_torch_takes_for_other_cpus(settings) -> None:
    if os.environ.get("TORCH_Q4_CPU_ISA"):
        pytest.skip("this is already such a run")
    # Not the best instruction set: on AMX no product would be torch's own. What torch multiplies is
    # dequantised: three formats stand for all.
    environment = dict(os.environ, TORCH_Q4_CPU_ISA="generic", **settings)
    tests = "(test_exact or small or bias_is_the_larger or are_zero)"
    keep = ["-k", f"{tests} and float32 and (q4_0 or q6_k or iq4_xs)"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *keep, "tests/test_linear.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 37])
def test_small_weights_and_many_rows_float32(fmt, n) -> None:
    """Where torch's own product takes over, its error depends on the panel's layout."""
    for k in (256, 2048):
        blocks, x = random_blocks(fmt, n, k), torch.randn(256, k)
        assert_exact(torch_q4.linear(x, blocks, fmt), x, blocks, fmt)


def test_a_bias_is_the_larger_part_float32(fmt) -> None:
    """A sum that started from the bias would be rounded to the bias's last bit K times."""
    blocks, bias = random_blocks(fmt, 40, 8192), torch.randn(40)
    few = blocks[:20]  # so few rows that K is split over threads
    threads = torch.get_num_threads()
    for m in (2, 4, 20, 200):
        x = 1e-2 / 8192**0.5 * torch.randn(m, 8192)
        assert_exact(torch_q4.linear(x, blocks, fmt, bias), x, blocks, fmt, bias)
        try:
            torch.set_num_threads(4)
            assert_exact(torch_q4.linear(x, few, fmt, bias[:20]), x, few, fmt, bias[:20])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q4_0_f32"])
def test_most_activations_are_zero_float32(name) -> None:
    """F.linear's error is then that of a tenth of K, and so must ours be."""
    fmt = formats.get(name)
    blocks = random_blocks(fmt, 33, 8192)
    for m in (3, 9, 65):
        x = torch.randn(m, 8192) * (torch.rand(m, 8192) < 0.1)
        assert_exact(torch_q4.linear(x, blocks, fmt), x, blocks, fmt)


def test_more_rows_than_are_prepared_at_a_time() -> None:
    blocks, bias = random_blocks(formats.get("q5_k"), 40, 256), torch.randn(40)
    x = torch.randn(2100, 256)
    x[2080] = float("nan")
    y = torch_q4.linear(x, blocks, "q5_k", bias)
    assert not y[2080].isfinite().any()
    finite = x.isfinite().all(dim=1)
    assert_exact(y[finite], x[finite], blocks, formats.get("q5_k"), bias)
    x[2080] = 0
    assert_exact(torch_q4.linear(x, blocks, "q5_k", bias), x, blocks, formats.get("q5_k"), bias)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_int8(fmt, dtype, with_bias) -> None:
    for n, k in shapes(fmt):
        blocks = random_blocks(fmt, n, k)
        bias = torch.randn(n).to(dtype) if with_bias else None
        rows = torch.randn(max(ROWS), k).to(dtype)
        products = rows.double() @ dense64(blocks, fmt).T
        for m in ROWS:
            x, product = rows[:m], products[:m]
            y = torch_q4.linear(x, blocks, fmt, bias, compute="int8")
            assert y.dtype == dtype
            assert y.shape == (m, n)
            wanted = product + (bias.double() if bias is not None else 0)
            # 1e-4 of the product, and the one rounding to the output's dtype on top.
            allowed = 1e-2 * product.norm() + EPS[dtype] * wanted.norm()
            if m * n >= 16:  # a sum over too few outputs has no stable ratio
                assert (y.double() - wanted).norm() <= allowed


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_more_of_k_than_stays_in_the_cache(fmt, compute) -> None:
    blocks, x, bias = random_blocks(fmt, 20, 8192), torch.randn(190, 8192), torch.randn(20)
    y = torch_q4.linear(x, blocks, fmt, bias, compute=compute)
    if compute == "exact":
        return assert_exact(y, x, blocks, fmt, bias)
    wanted = x.double() @ dense64(blocks, fmt).T + bias.double()
    assert (y.double() - wanted).norm() <= 1e-2 * wanted.norm()


def test_int8_is_exact_for_integers(fmt) -> None:
    """Activations that int8 holds exactly leave only float32 rounding: no systematic error."""
    blocks = random_blocks(fmt, 29, 512)
    x = torch.randint(-127, 128, (3, 512)).float()
    x[:, ::32] = 127
    y = torch_q4.linear(x, blocks, fmt, compute="int8")
    w = dense64(blocks, fmt)
    bound = 64 * EPS[torch.float32] * (x.double().abs() @ w.abs().T)
    assert bool(((y - x.double() @ w.T).abs() <= bound).all())


def test_int8_with_the_largest_codes() -> None:
    """Every product at its extreme, where 16-bit intermediate sums would saturate."""
    blocks = torch.zeros(4, 8, 34, dtype=torch.uint8)
    blocks[..., 1] = 0x3C  # scale 1.0
    blocks[..., 2:] = torch.tensor([0x80, 0x7F, 0x80, 0x7F], dtype=torch.uint8)[:, None, None]
    x = torch.tensor([1.0, -1.0]).repeat(2, 128)
    x[1].fill_(-1.0)
    y = torch_q4.linear(x, blocks.flatten(1), "q8_0", compute="int8")
    wanted = x @ torch_q4.dequantize(blocks.flatten(1), "q8_0").T
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("rows", [3, 40])
def test_scales_of_activations_do_not_matter(compute, rows) -> None:
    """float32 sums: neither huge nor tiny activations overflow or vanish."""
    blocks = random_blocks(formats.get("q4_k"), 16, 256)
    x = torch.randn(rows, 256)
    y = torch_q4.linear(x, blocks, "q4_k", compute=compute)
    for power in (-80, -20, 20, 80):
        scaled = torch_q4.linear(x * 2.0**power, blocks, "q4_k", compute=compute)
        torch.testing.assert_close(scaled * 2.0**-power, y, rtol=1e-5, atol=1e-5)


def test_each_row_of_activations_has_its_own_scale(fmt) -> None:
    """From rows of 1e-38 to rows of 1e38, and rows with both: as exact as the others."""
    blocks = random_blocks(fmt, 21, 256 + fmt.block_elems)
    k = torch_q4.dequantize(blocks, fmt).shape[1]
    x = torch.randn(45, k) * 10.0 ** torch.linspace(-38, 34, 45)[:, None]
    x[7, ::2] *= 1e10
    x[8] = 1e-45
    x[9] = 0
    w = dense64(blocks, fmt)
    y = torch_q4.linear(x, blocks, fmt)
    bound = 16 * EPS[torch.float32] * (x.double().abs() @ w.abs().T) + 1e-41
    assert bool(((y - x.double() @ w.T).abs() <= bound).all())


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("value", [1e37, 1e38, 3e38])
def test_huge_activations_do_not_overflow(fmt, compute, value) -> None:
    """Sums of products with codes, whose scales come in later, would pass float32's limit."""
    blocks = random_blocks(fmt, 37, 512, 1e-3)
    w = dense64(blocks, fmt)
    for m in (1, 2, 4, 5, 20, 200):
        x = torch.randn(m, 512)
        x[0] = value * torch.randn(512).sign()
        wanted = x.double() @ w.T
        y = torch_q4.linear(x, blocks, fmt, compute=compute)
        assert (y[0].double() - wanted[0]).norm() <= 1e-2 * wanted[0].norm()
        rest = y[1:].double() - wanted[1:]
        assert rest.norm() <= 1e-2 * wanted[1:].norm()


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("rows", [7, 35, 200])
def test_non_finite_activations_stay_in_their_row(fmt, compute, rows) -> None:
    blocks = random_blocks(fmt, 9, 512)
    x = torch.randn(rows, 512)
    wanted = torch_q4.linear(x, blocks, fmt, compute=compute)
    x[2, 5] = float("nan")
    x[4, 300] = float("inf")
    y = torch_q4.linear(x, blocks, fmt, compute=compute)
    assert not y[2].isfinite().any()
    assert not y[4].isfinite().any()
    rest = [row for row in range(rows) if row not in (2, 4)]
    # From 16 rows on another exact kernel may take over where x is not finite.
    bounds = {"rtol": 1e-5, "atol": 1e-4} if compute == "exact" and rows >= 16 else {}
    torch.testing.assert_close(y[rest], wanted[rest], **bounds)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_zero_activations(fmt, compute) -> None:
    blocks = random_blocks(fmt, 9, 256)
    assert torch.equal(torch_q4.linear(torch.zeros(2, 256), blocks, fmt, compute=compute),
                       torch.zeros(2, 9))  # fmt: skip


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_leading_dimensions_and_strides(fmt, compute) -> None:
    blocks = random_blocks(fmt, 11, 256)
    x = torch.randn(2, 3, 4, 256)

    def linear(x):
        return torch_q4.linear(x, blocks, fmt, compute=compute)

    y = linear(x)
    assert y.shape == (2, 3, 4, 11)
    assert y.is_contiguous()
    same = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(linear(x[0, 0, 0]), y[0, 0, 0], **same)
    torch.testing.assert_close(linear(x.permute(2, 0, 1, 3)), y.permute(2, 0, 1, 3), **same)
    torch.testing.assert_close(linear(x[:, ::2]), y[:, ::2], **same)
    wide = torch.randn(5, 512)
    torch.testing.assert_close(linear(wide[:, ::2]), linear(wide[:, ::2].contiguous()), **same)
    torch.testing.assert_close(linear(x[:1, :1].expand(2, 3, 4, 256)), y[:1, :1].expand_as(y))
    assert linear(x[:0]).shape == (0, 3, 4, 11)
    assert linear(x[:, :, :0]).shape == (2, 3, 0, 11)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_empty_weights(fmt, compute) -> None:
    none = torch.empty(0, fmt.row_bytes(256), dtype=torch.uint8)
    assert torch_q4.linear(torch.randn(3, 256), none, fmt, compute=compute).shape == (3, 0)
    bias = torch.randn(5)
    narrow = torch.empty(5, 0, dtype=torch.uint8)
    y = torch_q4.linear(torch.randn(3, 0), narrow, fmt, bias, compute=compute)
    assert torch.equal(y, bias.expand(3, 5))


def test_blocks_of_any_strides(fmt) -> None:
    blocks = random_blocks(fmt, 12, 256)
    x = torch.randn(2, 256)
    y = torch_q4.linear(x, blocks, fmt)
    torch.testing.assert_close(torch_q4.linear(x, blocks[::3], fmt), y[:, ::3])
    odd = torch.empty(blocks.numel() + 1, dtype=torch.uint8)[1:].view_as(blocks).copy_(blocks)
    assert torch.equal(torch_q4.linear(x, odd, fmt), y)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_threads_do_not_change_the_result(fmt, compute) -> None:
    blocks = random_blocks(fmt, 515, 512)
    threads = torch.get_num_threads()
    try:
        for m in (1, 6):
            x = torch.randn(m, 512)
            torch.set_num_threads(1)
            one = torch_q4.linear(x, blocks, fmt, compute=compute)
            torch.set_num_threads(4)
            many = torch_q4.linear(x, blocks, fmt, compute=compute)
            assert torch.equal(one, many)
        # So few rows that K is split as well: sums in another order.
        narrow = random_blocks(fmt, 20, 8192)
        for m in (1, 9):
            x, bias = torch.randn(m, 8192), torch.randn(20)
            torch.set_num_threads(1)
            one = torch_q4.linear(x, narrow, fmt, bias, compute=compute)
            torch.set_num_threads(4)
            many = torch_q4.linear(x, narrow, fmt, bias, compute=compute)
            torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-3)
            assert m < 9 or not torch.equal(one, many), "the split was not used"
    finally:
        torch.set_num_threads(threads)


def test_transposed(fmt, dtype) -> None:
    for n, k in shapes(fmt):
        blocks = random_blocks(fmt, n, k)
        w = dense64(blocks, fmt)
        for m in (0, 1, 3, 65, 130):
            grad = torch.randn(m, n).to(dtype)
            got = torch.ops.torch_q4.linear_transposed(grad, blocks, fmt.type_id)
            assert got.dtype == dtype
            assert got.shape == (m, k)
            wanted = grad.double() @ w
            # One rounding to the dtype, and of the sums: their error grows like sqrt(N) at most.
            rounding = 0.5 * EPS[dtype] * wanted.norm()
            sums = EPS[torch.float32] * n**0.5 * (grad.double().abs() @ w.abs()).norm()
            assert (got.double() - wanted).norm() <= rounding + 0.25 * sums


def test_matmul_q4_0_takes_both_layouts() -> None:
    w, x = torch.randn(24, 160), torch.randn(5, 160)
    for name in ("q4_0", "q4_0_f32"):
        blocks = torch_q4.quantize(w, name)
        wanted = torch_q4.linear(x, blocks, name)
        assert torch.equal(torch_q4.matmul_q4_0(x, blocks, 24, 160), wanted)
        assert torch.equal(torch_q4.matmul_q4_0(x, blocks.flatten(), 24, 160), wanted)


# The whole of this file again on each of the other instruction sets of this CPU: which one is
# used is decided once in a process, and this process has tested its own.
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avxvnni", "avx512", "amx"])
def test_every_instruction_set(isa) -> None:
    if os.environ.get("TORCH_Q4_CPU_ISA"):
        pytest.skip("this is already such a run")
    if torch_q4.cpu_isa() == isa:
        pytest.skip(f"{isa} is what this run is on")
    environment = dict(os.environ, TORCH_Q4_CPU_ISA=isa)
    probe = "import torch_q4; print(torch_q4.cpu_isa())"
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=environment
    )
    if "this CPU must have the instruction set" in found.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert found.stdout.strip() == isa
    files = ["tests/test_formats.py", "tests/test_linear.py", "tests/test_pack.py"]
    # Half precision passes through the same kernels, converted before and after.
    keep = ["-m", "not slow", "-k", "not float16"]  # nor bfloat16, by its name
    command = [sys.executable, "-m", "pytest", "-q", "-x", *keep, *files]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]


def test_unknown_instruction_set_is_refused() -> None:
    environment = dict(os.environ, TORCH_Q4_CPU_ISA="sse9")
    code = "import torch_q4; torch_q4.cpu_isa()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=environment)  # fmt: skip
    assert result.returncode != 0
    assert "TORCH_Q4_CPU_ISA: must be one of" in result.stderr
    assert "generic, got sse9" in result.stderr
