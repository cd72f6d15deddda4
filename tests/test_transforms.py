"""The operators under opcheck, autograd, torch.compile, torch.export, autocast and vmap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import EPS, dense64, random_blocks
from torch.library import opcheck

import torch_q4
from torch_q4 import formats

ops = torch.ops.torch_q4
K = 256


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_opcheck_quantize(fmt) -> None:
    w = torch.randn(3, K)
    opcheck(ops.quantize.default, (w, fmt.type_id))
    opcheck(ops.quantize.default, (w.half(), fmt.type_id, torch.rand(K)))


def test_opcheck_dequantize(fmt, dtype) -> None:
    opcheck(ops.dequantize.default, (random_blocks(fmt, 3, K), fmt.type_id, dtype))


def test_opcheck_embedding(fmt, dtype) -> None:
    indices = torch.tensor([[0, 2], [1, 1]])
    opcheck(ops.embedding.default, (indices, random_blocks(fmt, 3, K), fmt.type_id, dtype))


def test_opcheck_linear(fmt, dtype) -> None:
    blocks = random_blocks(fmt, 5, K)
    x = torch.randn(2, 3, K, dtype=dtype, requires_grad=True)
    bias = torch.randn(5, dtype=dtype, requires_grad=True)
    opcheck(ops.linear.default, (x, blocks, fmt.type_id))
    opcheck(ops.linear.default, (x, blocks, fmt.type_id, bias, "int8"))


def test_opcheck_linear_transposed(fmt, dtype) -> None:
    grad = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    opcheck(ops.linear_transposed.default, (grad, random_blocks(fmt, 5, K), fmt.type_id))


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_gradients_match_float64(fmt, dtype, compute) -> None:
    """The gradient is that of the exact product in either arithmetic, as of a straight-through."""
    blocks = random_blocks(fmt, 37, K)
    w = dense64(blocks, fmt)
    x = torch.randn(2, 3, K, dtype=dtype, requires_grad=True)
    bias = torch.randn(37, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 3, 37, dtype=dtype)
    torch_q4.linear(x, blocks, fmt, bias, compute=compute).backward(upstream)

    wanted_x = upstream.double() @ w
    wanted_bias = upstream.double().sum((0, 1))
    assert (x.grad.double() - wanted_x).norm() <= 2 * EPS[dtype] * wanted_x.norm()
    assert (bias.grad.double() - wanted_bias).norm() <= 4 * EPS[dtype] * wanted_bias.norm()
    assert x.grad.dtype == bias.grad.dtype == dtype


def test_gradcheck(fmt) -> None:
    """Finite differences: linear is linear, so a large step costs nothing in accuracy."""
    blocks = random_blocks(fmt, 4, K)
    blocks = torch_q4.quantize(torch_q4.dequantize(blocks, fmt) / 4, fmt)
    x = torch.randn(2, K, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)

    def function(x, bias):
        return torch_q4.linear(x, blocks, fmt, bias)

    tolerances = {"eps": 0.25, "atol": 1e-4, "rtol": 1e-4, "nondet_tol": 0.0, "fast_mode": True}
    torch.autograd.gradcheck(function, (x, bias), **tolerances)
    torch.autograd.gradgradcheck(function, (x, bias), **tolerances)


def test_gradient_of_one_row_without_leading_dimensions(fmt) -> None:
    blocks = random_blocks(fmt, 7, K)
    x = torch.randn(K, requires_grad=True)
    bias = torch.randn(7, requires_grad=True)
    torch_q4.linear(x, blocks, fmt, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.ones(7))
    torch.testing.assert_close(x.grad.double(), dense64(blocks, fmt).sum(0), rtol=1e-4, atol=1e-4)


def test_gradient_with_strided_upstream(fmt) -> None:
    blocks = random_blocks(fmt, 6, K)
    x = torch.randn(3, K, requires_grad=True)
    torch_q4.linear(x, blocks, fmt).sum().backward()  # an expanded, zero-stride gradient
    wanted = dense64(blocks, fmt).sum(0).expand(3, K)
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_backward_makes_no_dense_weight() -> None:
    """A weight of 64 MB in float32 passes through backward within a fraction of that."""
    from torch.profiler import ProfilerActivity, profile

    fmt = formats.get("q4_0")
    n = k = 4096
    blocks = random_blocks(fmt, n, k)
    x = torch.randn(4, k, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        torch_q4.linear(x, blocks, fmt).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.events())
    assert 0 < allocated < 0.05 * n * k * 4


def test_blocks_cannot_be_trained() -> None:
    fmt = formats.get("q4_0")
    layer = torch_q4.QuantLinear.from_blocks(random_blocks(fmt, 4, K), fmt)
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight.requires_grad_(True)
    dense = torch.randn(4, K, requires_grad=True)
    with pytest.raises(TypeError, match=r"linear: blocks must be uint8, got torch\.float32"):
        torch_q4.linear(torch.randn(2, K), dense, fmt)


# ---- torch.compile and torch.export --------------------------------------------------------------


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_compile_linear(fmt, compute) -> None:
    blocks = random_blocks(fmt, 12, K)
    bias = torch.randn(12)

    def function(x):
        return torch_q4.linear(x.relu(), blocks, fmt, bias, compute=compute) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (5, 1, 9, 0):
        x = torch.randn(m, K)
        torch.testing.assert_close(compiled(x), function(x))


def test_compile_everything_else(fmt) -> None:
    def function(w, indices):
        blocks = torch_q4.quantize(w, fmt)
        rows = torch_q4.embedding(indices, blocks, fmt, torch.bfloat16)
        return blocks, rows, torch_q4.dequantize(blocks, fmt, torch.float16)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        w, indices = torch.randn(rows, K), torch.randint(0, rows, (3, rows))
        for got, wanted in zip(compiled(w, indices), function(w, indices), strict=True):
            assert torch.equal(got, wanted)


def test_compile_training_step(fmt) -> None:
    layer = torch_q4.QuantLinear.from_blocks(random_blocks(fmt, 12, K), fmt, torch.zeros(12))

    def loss(x):
        return layer(x).square().mean()

    x = torch.randn(5, K, requires_grad=True)
    loss(x).backward()
    wanted_x, wanted_bias = x.grad, layer.bias.grad
    x.grad = layer.bias.grad = None
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(x).backward()
    torch.testing.assert_close(x.grad, wanted_x)
    torch.testing.assert_close(layer.bias.grad, wanted_bias)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    """The default backend, which generates and compiles C++."""
    fmt = formats.get("q4_k")
    model = torch.nn.Sequential(torch.nn.Linear(K, K), torch.nn.GELU(), torch.nn.Linear(K, 8))
    torch_q4.quantize_(model, fmt)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, K)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_export(fmt) -> None:
    layer = torch_q4.QuantLinear.from_blocks(random_blocks(fmt, 12, K), fmt, torch.randn(12))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(3, K),), dynamic_shapes=({0: batch},))
    assert "torch_q4.linear" in program.graph_module.code
    for m in (2, 7):
        x = torch.randn(m, K)
        torch.testing.assert_close(program.module()(x), layer(x))


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_behaves_as_for_f_linear(fmt, to) -> None:
    blocks = random_blocks(fmt, 12, K)
    w = torch_q4.dequantize(blocks, fmt)
    x, bias = torch.randn(3, K), torch.randn(12)
    with torch.autocast("cpu", dtype=to):
        plain = F.linear(x, w, bias)
        packed = torch_q4.linear(x, blocks, fmt, bias)
        with torch.autocast("cpu", enabled=False):
            assert torch_q4.linear(x, blocks, fmt, bias).dtype == torch.float32
    assert packed.dtype == plain.dtype == to
    torch.testing.assert_close(packed, torch_q4.linear(x.to(to), blocks, fmt, bias.to(to)))
    x.requires_grad_(True)
    with torch.autocast("cpu", dtype=to):
        torch_q4.linear(x, blocks, fmt, bias).float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_under_compile() -> None:
    fmt = formats.get("q4_k")
    layer = torch_q4.QuantLinear.from_blocks(random_blocks(fmt, 12, K), fmt, torch.randn(12))

    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(3, K)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.bfloat16
    assert torch.equal(compiled(x), function(x))


# ---- vmap ----------------------------------------------------------------------------------------


def test_vmap_over_the_first_argument(fmt) -> None:
    blocks = random_blocks(fmt, 12, K)
    x = torch.randn(4, 3, K)
    wanted = torch_q4.linear(x, blocks, fmt)
    got = torch.vmap(lambda row: torch_q4.linear(row, blocks, fmt))(x)
    torch.testing.assert_close(got, wanted)
    middle = torch.vmap(lambda row: torch_q4.linear(row, blocks, fmt), in_dims=1)(x)
    torch.testing.assert_close(middle, wanted.transpose(0, 1), rtol=1e-5, atol=1e-4)
    stacked = torch.stack([blocks, blocks.flip(0)])
    got = torch.vmap(lambda b: torch_q4.dequantize(b, fmt))(stacked)
    assert torch.equal(got, torch_q4.dequantize(stacked, fmt))
    w = torch.randn(2, 3, K)
    assert torch.equal(torch.vmap(lambda w: torch_q4.quantize(w, fmt))(w),
                       torch_q4.quantize(w, fmt))  # fmt: skip
    indices = torch.randint(0, 12, (2, 5))
    assert torch.equal(torch.vmap(lambda i: torch_q4.embedding(i, blocks, fmt))(indices),
                       torch_q4.embedding(indices, blocks, fmt))  # fmt: skip
