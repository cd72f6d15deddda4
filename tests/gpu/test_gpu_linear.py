"""linear and linear_transposed on the GPU, against float64: every kernel, layout and dtype."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EPS
from gpu_support import (
    DEVICE,
    ON_GPU,
    assert_near,
    assert_within,
    blocks_on_device,
    by_rows,
    gpu_only,
    ops,
    randn,
    several,
    weight,
)

import torch_q4
from torch_q4 import formats

pytestmark = pytest.mark.gpu

ROWS = (0, 1, 2, 3, 5, 8, 9, 16, 17, 64, 129, 512)
KERNELS = (
    "reference", "rows", "tiles_16", "tiles_64", "pipelined_16", "pipelined_64", "pipelined_128",
    "hopper_rows", "hopper_many", "blas",
)  # fmt: skip


def kernels_here(dtype: torch.dtype, packed: bool) -> list[str]:
    """What _linear_with can be asked for on this device."""
    return ops._linear_kernels(dtype, packed, torch.cuda.current_device()).split()


def shapes(fmt: formats.Format) -> list[tuple[int, int]]:
    """(N, K): odd N, and K that is no whole number of anything."""
    return [(1, 256), (37, 768), (130, 512), (5, 2048), (1041, 1280)] + (
        [(33, fmt.block_elems), (7, 23 * fmt.block_elems)] if fmt.block_elems < 256 else []
    )


@pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
def test_exact(fmt, dtype, packed) -> None:
    for n, k in shapes(fmt):
        canonical, blocks_packed, w = weight(fmt, n, k)
        blocks = blocks_packed if packed else canonical
        for m in ROWS:
            x = randn(several(m), k, dtype=dtype)
            bias = randn(n, dtype=dtype) if m % 2 else None
            dense = w.to(dtype)

            def product(x, blocks=blocks, bias=bias):
                return torch_q4.linear(x, blocks, fmt, bias, packed=packed)

            y = by_rows(product, x, m)
            plain = by_rows(functools.partial(F.linear, weight=dense, bias=bias), x, m)
            assert y.dtype == dtype
            assert y.device == x.device
            assert_near(y, x, w, bias, plain)


@gpu_only
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel(fmt, dtype, kernel) -> None:
    """The kernels that the table of choices knows, at sizes at which it would not choose them."""
    layouts = [packed for packed in (True, False) if kernel in kernels_here(dtype, packed)]
    if not layouts:
        pytest.skip("for other dtypes or devices")
    for n, k in shapes(fmt):
        canonical, blocks_packed, w = weight(fmt, n, k)
        for m in ROWS:
            x = randn(several(m), k, dtype=dtype)
            bias = randn(n, dtype=dtype) if m % 2 else None
            dense = w.to(dtype)
            # The reference kernel sums each output in one go, whose float32 error is the larger.
            dense_product = functools.partial(F.linear, weight=dense, bias=bias)
            one_sum = kernel == "reference" and dtype == torch.float32
            plain = None if one_sum else by_rows(dense_product, x, m)
            for packed in layouts:
                blocks = blocks_packed if packed else canonical

                def product(x, blocks=blocks, bias=bias, packed=packed):
                    return ops._linear_with(x, blocks, fmt.type_id, bias, "exact", packed, kernel)

                y = by_rows(product, x, m)
                assert y.dtype == dtype
                assert_near(y, x, w, bias, plain)


@gpu_only
def test_blas_is_torchs_own_product(fmt, dtype) -> None:
    """F.linear's bits, of matrices and of more dimensions, with a bias and without."""
    canonical, packed, w = weight(fmt, 130, 512)
    dense = w.to(dtype)
    for x in (
        randn(300, 512, dtype=dtype),
        randn(3, 100, 512, dtype=dtype),
        randn(4, 5, 20, 512, dtype=dtype)[1:],
    ):
        for bias in (None, randn(130, dtype=dtype)):
            wanted = F.linear(x, dense, bias)
            for blocks in (canonical, packed):
                is_packed = blocks is packed
                y = ops._linear_with(x, blocks, fmt.type_id, bias, "exact", is_packed, "blas")
                assert torch.equal(y, wanted)


@gpu_only
def test_all_kernels_are_tested() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for packed in (True, False):
            assert set(kernels_here(dtype, packed)) <= set(KERNELS)
    capability = torch.cuda.get_device_capability()
    built = "sm_90a" in str(ops.gpu_table())
    if torch.version.cuda and capability == (9, 0) and built:
        assert {"hopper_rows", "hopper_many"} <= set(kernels_here(torch.float16, True))


@gpu_only
@pytest.mark.parametrize(
    ("kernel", "rows"),
    [
        ("hopper_rows", (1, 7, 8, 9, 33, 64, 65, 128, 200)),
        ("hopper_many", (1, 127, 128, 129, 257, 600)),
    ],
)
def test_kernels_for_hopper(fmt, dtype, kernel, rows) -> None:
    """As in test_each_kernel, with K split and not, blocks of every size, and the same twice."""
    if kernel not in kernels_here(dtype, True):
        pytest.skip("for other dtypes or devices")
    more = fmt.block_elems % 256
    for n, k in ((37, 1280 + more), (2073, 1280 + more), (8455, 768 - more)):
        _, packed, w = weight(fmt, n, k)
        dense = w.to(dtype)
        for m in rows:
            x = randn(several(m), k, dtype=dtype)
            bias = randn(n, dtype=dtype) if m % 2 else None

            def product(x, packed=packed, bias=bias):
                return ops._linear_with(x, packed, fmt.type_id, bias, "exact", True, kernel)

            y = by_rows(product, x, m)
            assert y.dtype == dtype
            plain = by_rows(functools.partial(F.linear, weight=dense, bias=bias), x, m)
            assert_near(y, x, w, bias, plain)
            assert torch.equal(by_rows(product, x, m), y)


@gpu_only
def test_one_hot_activations_give_the_weight(fmt, dtype) -> None:
    """Each row of x selects an element of K: every place of a fragment, with nothing to add to it.

    In 16 bits a kernel may round a weight's scale, its shift (as large as the largest weight) and
    the weight itself; another weight is further off than that.
    """
    n, k = 48, 768
    canonical, blocks_packed, w = weight(fmt, n, k)
    for columns in (8,) if dtype == torch.float32 else (16, 64):
        # In each next tile of so many rows, a row selects the next element.
        count = columns * k
        tile = torch.arange(count, device=DEVICE) // columns
        chosen = (tile + 7 * (torch.arange(count, device=DEVICE) % columns)) % k
        x = torch.zeros(count, k, device=DEVICE, dtype=dtype)
        x[torch.arange(count, device=DEVICE), chosen] = 1
        wanted = w.T[chosen]
        bound = EPS[dtype] * wanted.abs() * (1 + 2**-6) + EPS[torch.float32] * w.abs().max()
        if dtype != torch.float32:
            bound += EPS[dtype] / 2 * w.abs().max()
        bound += torch.finfo(dtype).smallest_normal * EPS[dtype]
        for kernel in kernels_here(dtype, packed=True):
            if kernel == "blas":
                continue
            y = ops._linear_with(x, blocks_packed, fmt.type_id, None, "exact", True, kernel)
            assert_within(y, wanted, bound, kernel)
        y = ops._linear_with(x, canonical, fmt.type_id, None, "exact", False, "rows")
        assert_within(y, wanted, bound, "rows of canonical rows")


@gpu_only
def test_internal_operator_refuses() -> None:
    fmt = formats.get("q4_0")
    blocks, x = blocks_on_device(fmt, 16, 64), randn(3, 64)
    for arguments, words in (
        ((x, "exact", True, "fast"), "kernel must be one of reference, rows, .*, got fast"),
        ((x, "exact", False, "tiles_16"), "blocks must be packed for tiles_16, got canonical"),
        ((x, "exact", True, "tiles_64"), "x must be float16 or bfloat16 for tiles_64, got torch"),
        ((x, "int8", True, "blas"), "kernel must be rows for compute int8, got blas"),
    ):
        data, compute, packed, kernel = arguments
        with pytest.raises(RuntimeError, match=f"_linear_with: {words}"):
            ops._linear_with(data, blocks, fmt.type_id, None, compute, packed, kernel)
    for kernel in {"hopper_rows", "hopper_many"} - set(kernels_here(torch.float16, packed=True)):
        words = f"the GPU must be sm_90, with kernels built for sm_90a, for {kernel}, got"
        with pytest.raises(RuntimeError, match=f"_linear_with: {words}"):
            ops._linear_with(x.half(), blocks, fmt.type_id, None, "exact", True, kernel)


@gpu_only
@pytest.mark.parametrize(
    ("kernel", "rows"),
    [
        ("rows", 65535 * 8 + 100),
        ("tiles_16", 65535 * 16 + 100),
        ("pipelined_16", 65535 * 16 + 100),
        ("hopper_rows", 65535 * 128 + 100),
        ("hopper_many", (256 << 20) // 512 + 300),  # of which it arranges so many at a time
        ("reference", 65536 * 9),
    ],
)
def test_more_rows_than_one_grid_has(kernel, rows) -> None:
    if kernel not in kernels_here(torch.float16, packed=True):
        pytest.skip("for other devices")
    fmt = formats.get("q4_0")
    _, packed, w = weight(fmt, 17, 32)
    x = torch.randn(rows, 32, device=DEVICE, dtype=torch.float16)
    y = ops._linear_with(x, packed, fmt.type_id, None, "exact", True, kernel)
    assert_near(y, x, w, None, F.linear(x, w.half()))
    torch.testing.assert_close(y[-100:], F.linear(x, w.half())[-100:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
def test_int8(fmt, dtype, packed) -> None:
    for n, k in shapes(fmt):
        canonical, blocks_packed, w = weight(fmt, n, k)
        blocks = blocks_packed if packed else canonical
        for m in ROWS:
            x = randn(m, k, dtype=dtype)
            bias = randn(n, dtype=dtype) if m % 2 else None
            outputs = [torch_q4.linear(x, blocks, fmt, bias, compute="int8", packed=packed)]
            if ON_GPU:
                outputs.append(
                    ops._linear_with(x, blocks, fmt.type_id, bias, "int8", packed, "rows")
                )
            product = x.double() @ w.T
            wanted = product if bias is None else product + bias.double()
            allowed = 1e-2 * product.norm() + EPS[dtype] * wanted.norm()
            for y in outputs:
                assert y.dtype == dtype
                assert y.shape == (m, n)
                if m * n >= 16:  # a sum over too few outputs has no stable ratio
                    assert (y.double() - wanted).norm() <= allowed


@pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
def test_transposed(fmt, dtype, packed) -> None:
    for n, k in shapes(fmt):
        canonical, blocks_packed, w = weight(fmt, n, k)
        for m in (0, 1, 3, 8, 9, 65, 130):
            grad = randn(m, n, dtype=dtype)
            blocks = blocks_packed if packed else canonical
            got = ops.linear_transposed(grad, blocks, fmt.type_id, packed)
            assert got.dtype == dtype
            assert got.shape == (m, k)
            wanted = grad.double() @ w
            plain = (grad @ w.to(dtype)).double()
            rounding = 0.5 * EPS[dtype] * wanted.norm()
            # float32 sums of N products, in whatever order: by the statistics of rounding.
            sums = EPS[torch.float32] * n**0.5 * (grad.double().norm() * w.norm(dim=0)).norm()
            assert (got.double() - wanted).norm() <= (
                2 * torch.maximum((plain - wanted).norm(), rounding) + 0.25 * sums
            )


# ---- strides, alignment, sizes -------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_leading_dimensions_and_strides(fmt, compute) -> None:
    blocks, _, _ = weight(fmt, 11, 256)
    x = randn(2, 3, 4, 256)

    def linear(x):
        return torch_q4.linear(x, blocks, fmt, compute=compute)

    y = linear(x)
    assert y.shape == (2, 3, 4, 11)
    assert y.is_contiguous()
    # Another number of rows may mean another kernel, which need not round activations to int8.
    same = {"rtol": 1e-5, "atol": 1e-4 if compute == "exact" else 1.0}
    torch.testing.assert_close(linear(x[0, 0, 0]), y[0, 0, 0], **same)
    torch.testing.assert_close(linear(x.permute(2, 0, 1, 3)), y.permute(2, 0, 1, 3), **same)
    torch.testing.assert_close(linear(x[:, ::2]), y[:, ::2], **same)
    wide = randn(5, 512)
    assert torch.equal(linear(wide[:, ::2]), linear(wide[:, ::2].contiguous()))
    torch.testing.assert_close(linear(x[:1, :1].expand(2, 3, 4, 256)), y[:1, :1].expand_as(y),
                               **same)  # fmt: skip
    assert linear(x[:0]).shape == (0, 3, 4, 11)
    assert linear(x[:, :, :0]).shape == (2, 3, 0, 11)


def shifted(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy that starts so many elements past an allocation's aligned start."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    return room[elements:].view_as(tensor).copy_(tensor)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_misaligned_views(fmt, dtype, compute) -> None:
    """Tensors that start anywhere: kernels read 16 bytes at a time, and must not there."""
    canonical, packed, _ = weight(fmt, 37, 768)
    bias = randn(37, dtype=dtype)
    for m in (1, 3, 17, 70):
        x = randn(m, 768, dtype=dtype)
        for blocks, is_packed in ((canonical, False), (packed, True)):

            def linear(x, blocks, bias, is_packed=is_packed):
                return torch_q4.linear(x, blocks, fmt, bias, compute=compute, packed=is_packed)

            wanted = linear(x, blocks, bias)
            assert torch.equal(linear(shifted(x, 1), blocks, bias), wanted)
            assert torch.equal(linear(x, shifted(blocks, 1), bias), wanted)
            # torch's own product, which adds the bias, may choose by alignment.
            got = linear(shifted(x, 3), shifted(blocks, 2), shifted(bias, 1)).double()
            assert (got - wanted.double()).norm() <= 2 * EPS[dtype] * wanted.double().norm()
            grad = randn(m, 37, dtype=dtype)
            back = ops.linear_transposed(grad, blocks, fmt.type_id, is_packed)
            moved = ops.linear_transposed(
                shifted(grad, 1), shifted(blocks, 5), fmt.type_id, is_packed
            )
            assert torch.equal(moved, back)


def test_two_runs_give_the_same_bits(fmt, dtype) -> None:
    _, packed, _ = weight(fmt, 130, 512)
    for m in (1, 3, 9, 64, 512):
        x, grad = randn(m, 512, dtype=dtype), randn(m, 130, dtype=dtype)
        for compute in ("exact", "int8"):
            runs = [torch_q4.linear(x, packed, fmt, compute=compute, packed=True) for _ in range(3)]
            assert all(torch.equal(run, runs[0]) for run in runs)
        backs = [ops.linear_transposed(grad, packed, fmt.type_id, True) for _ in range(3)]
        assert all(torch.equal(back, backs[0]) for back in backs)


def test_layouts_agree(fmt, dtype) -> None:
    """Each within its bound of float64 is asked above; here, that nothing else differs."""
    canonical, packed, _ = weight(fmt, 37, 768)
    for m in (1, 5, 30, 200):
        x = randn(m, 768, dtype=dtype)
        for compute in ("exact", "int8"):
            one = torch_q4.linear(x, canonical, fmt, compute=compute)
            other = torch_q4.linear(x, packed, fmt, compute=compute, packed=True)
            difference = (one.double() - other.double()).norm() / one.double().norm()
            assert difference <= (2 * EPS[dtype] if compute == "exact" else 2e-2)


@gpu_only
@pytest.mark.slow
def test_more_than_2_to_31_bytes_and_elements() -> None:
    """Groups of the same 16 rows, so many that offsets do not fit 32 bits: all results alike."""
    fmt = formats.get("q8_0")
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    groups, k = 4112, 32768
    canonical, packed, w = weight(fmt, 16, k)
    for blocks, is_packed in ((canonical, False), (packed, True)):
        many = blocks.repeat(groups, 1)
        assert many.numel() > 2**31
        for m in (1, 16):
            x = randn(m, k, dtype=torch.float16)
            y = torch_q4.linear(x, many, fmt, packed=is_packed).view(m, groups, 16)
            one = torch_q4.linear(x, blocks, fmt, packed=is_packed)
            same = one[:, None].expand_as(y)
            small, large = (
                ops._linear_choice(
                    torch.cuda.current_device(), fmt.type_id, x.dtype, is_packed, m, n, k
                )
                for n in (16, groups * 16)
            )
            if large != "blas":  # torch's product may add up in another order at another place
                assert torch.equal(y, y[:, :1].expand_as(y))
            if small == large and small in ("rows", "tiles_16", "pipelined_16"):
                assert torch.equal(y, same)
            else:  # these may add up in another order for another size
                torch.testing.assert_close(y, same, rtol=2 * EPS[torch.float16], atol=0.05)
                assert_near(y[:, 0], x, w, None, F.linear(x, w.half()))
        values = ops.embedding(
            torch.tensor([groups * 16 - 1, 15], device=DEVICE), many, fmt.type_id, torch.float16,
            is_packed,
        )  # fmt: skip
        assert torch.equal(values[0], values[1])
        grad = torch.zeros(1, groups * 16, device=DEVICE)
        grad[:, -16:] = randn(1, 16)
        torch.testing.assert_close(
            ops.linear_transposed(grad, many, fmt.type_id, is_packed),
            ops.linear_transposed(grad[:, -16:].contiguous(), blocks, fmt.type_id, is_packed),
        )
    again = torch_q4.pack(many, fmt) if not is_packed else torch_q4.unpack(many, fmt)
    assert torch.equal(again[-16:], canonical)
    del again
    dense = torch_q4.dequantize(canonical.repeat(groups, 1), fmt, torch.float16)
    assert dense.numel() > 2**31
    assert torch.equal(dense[-16:], torch_q4.dequantize(canonical, fmt, torch.float16))


def test_a_weight_that_is_copied_on_each_call_is_reported_once() -> None:
    """In a process of its own: it is the first one of a process that is reported."""
    code = f"""
import torch, torch_q4
blocks = torch_q4.quantize(torch.randn(64, 256, device="{DEVICE}"), "q4_0")
odd = torch.empty(blocks.numel() + 2, dtype=torch.uint8, device="{DEVICE}")[2:]
odd = odd.view_as(blocks).copy_(blocks)
x = torch.randn(3, 256, device="{DEVICE}")
wanted = torch_q4.linear(x, blocks, "q4_0")
torch_q4.linear(x, odd.clone(), "q4_0")
print("now", flush=True)
for _ in range(3):
    assert torch.equal(torch_q4.linear(x, odd, "q4_0"), wanted)
"""
    result = subprocess.run([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip
    assert result.returncode == 0, result.stdout
    before, after = result.stdout.split("now\n")
    told = "linear: blocks are copied on every call, 9216 bytes, since they are not aligned to 16"
    assert told not in before
    assert after.count(told) == 1
