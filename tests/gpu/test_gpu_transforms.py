"""Autograd, autocast, torch.compile and vmap on the GPU, where the CPU's tests do not repeat."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import EPS, random_blocks
from gpu_support import DEVICE, gpu_only, ops, randn, weight

import torch_q4
from torch_q4 import QuantLinear, formats

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_gradients_through_packed_blocks(fmt, dtype, compute) -> None:
    _, packed, w = weight(fmt, 37, 768)
    for rows in (1, 5, 70):  # our own kernels, and torch's product
        x = randn(rows, 768, dtype=dtype).requires_grad_()
        bias = randn(37, dtype=dtype).requires_grad_()
        upstream = randn(rows, 37, dtype=dtype)
        y = torch_q4.linear(x, packed, fmt, bias, compute=compute, packed=True)
        y.backward(upstream)
        wanted_x, wanted_bias = upstream.double() @ w, upstream.double().sum(0)
        assert (x.grad.double() - wanted_x).norm() <= 2 * EPS[dtype] * wanted_x.norm()
        assert (bias.grad.double() - wanted_bias).norm() <= 4 * EPS[dtype] * wanted_bias.norm()


def test_gradcheck(fmt) -> None:
    """Finite differences: linear is linear, so a large step costs nothing in accuracy."""
    blocks = random_blocks(fmt, 4, 256, 0.25).to(DEVICE)
    x, bias = randn(2, 256).requires_grad_(), randn(4).requires_grad_()

    def function(x, bias):
        return torch_q4.linear(x, blocks, fmt, bias)

    tolerances = {"eps": 0.25, "atol": 1e-4, "rtol": 1e-4, "nondet_tol": 0.0, "fast_mode": True}
    torch.autograd.gradcheck(function, (x, bias), **tolerances)
    torch.autograd.gradgradcheck(function, (x, bias), **tolerances)


@gpu_only
def test_backward_makes_no_dense_weight() -> None:
    """A weight of 64 MB in float32 passes through backward within a fraction of that."""
    fmt = formats.get("q4_0")
    _, packed, _ = weight(fmt, 4096, 4096)
    x = randn(4, 4096).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch_q4.linear(x, packed, fmt, packed=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.25 * 4096 * 4096 * 4


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_behaves_as_for_f_linear(fmt, to) -> None:
    blocks, _, _ = weight(fmt, 37, 768)
    w = torch_q4.dequantize(blocks, fmt)
    x, bias = randn(3, 768), randn(37)
    with torch.autocast(DEVICE.type, dtype=to):
        plain = F.linear(x, w, bias)
        y = torch_q4.linear(x, blocks, fmt, bias)
        with torch.autocast(DEVICE.type, enabled=False):
            assert torch_q4.linear(x, blocks, fmt, bias).dtype == torch.float32
    assert y.dtype == plain.dtype == to
    assert torch.equal(y, torch_q4.linear(x.to(to), blocks, fmt, bias.to(to)))
    torch.testing.assert_close(y, plain, rtol=4 * EPS[to], atol=64 * EPS[to])
    for rows in (3, 70):
        x = randn(rows, 768).requires_grad_()
        with torch.autocast(DEVICE.type, dtype=to):
            torch_q4.linear(x, blocks, fmt, bias).float().sum().backward()
        assert x.grad.dtype == torch.float32


def test_backward_under_autocast_keeps_float32(fmt) -> None:
    """A gradient asked for inside the autocast block is not rounded to 16 bits on its way."""
    blocks, _, w = weight(fmt, 37, 768)
    for rows in (3, 70):
        x = randn(rows, 768).requires_grad_()
        y = torch_q4.linear(x, blocks, fmt)
        upstream = randn(rows, 37)
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            (grad,) = torch.autograd.grad(y, x, upstream)
        wanted = upstream.double() @ w
        assert grad.dtype == torch.float32
        assert (grad.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_compiled_layers_with_any_number_of_rows(fmt, compute) -> None:
    """One trace for every number of rows, though these go to different kernels."""
    _, packed, _ = weight(fmt, 37, 768)
    layer = QuantLinear.from_blocks(packed, fmt, randn(37).half(), compute=compute, packed=True)
    traces = 0

    def count(graph, inputs):
        nonlocal traces
        traces += 1
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for m in (5, 2, 16, 64, 300):
            x = randn(m, 768, dtype=torch.float16)
            assert torch.equal(compiled(x), layer(x))
    assert traces == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q4_0", "q4_k"])
def test_compile_reduce_overhead(name) -> None:
    """The default backend, with CUDA graphs around what it compiles."""
    fmt = formats.get(name)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 24)
    )
    torch_q4.quantize_(model, fmt)
    model = model.to(DEVICE).half().requires_grad_(False)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for m in (1, 40):
        for _ in range(4):  # the first calls warm up and record; the rest replay
            x = randn(m, 256, dtype=torch.float16)
            got = compiled(x).clone()
            torch.testing.assert_close(got, model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_compile_training_with_inductor() -> None:
    fmt = formats.get("q4_k")
    blocks, _, _ = weight(fmt, 24, 256)
    layer = QuantLinear.from_blocks(blocks, fmt, torch.zeros(24, device=DEVICE))

    def loss(x):
        return layer(x.relu()).square().mean()

    x = randn(40, 256).requires_grad_()
    loss(x).backward()
    wanted_x, wanted_bias = x.grad, layer.bias.grad
    x.grad = layer.bias.grad = None
    torch.compile(loss, fullgraph=True, dynamic=True)(x).backward()
    torch.testing.assert_close(x.grad, wanted_x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, wanted_bias, rtol=1e-3, atol=1e-4)


def test_vmap_over_x_through_packed_blocks(fmt, dtype) -> None:
    _, packed, _ = weight(fmt, 37, 768)
    x = randn(4, 3, 768, dtype=dtype)

    def linear(row):
        return torch_q4.linear(row, packed, fmt, packed=True)

    wanted = linear(x.flatten(0, 1)).unflatten(0, (4, 3))
    assert torch.equal(torch.vmap(linear)(x), wanted)
    middle = torch.vmap(linear, in_dims=1)(x)
    assert (middle.transpose(0, 1).double() - wanted.double()).norm() <= (
        2 * EPS[dtype] * wanted.double().norm()
    )


@gpu_only
def test_inference_mode_and_no_grad_give_the_same(fmt) -> None:
    _, packed, _ = weight(fmt, 37, 768)
    x = randn(5, 768, dtype=torch.float16)
    wanted = torch_q4.linear(x, packed, fmt, packed=True)
    with torch.no_grad():
        assert torch.equal(torch_q4.linear(x, packed, fmt, packed=True), wanted)
    with torch.inference_mode():
        assert torch.equal(torch_q4.linear(x, packed, fmt, packed=True), wanted)
    direct = ops.linear(x.requires_grad_(), packed, fmt.type_id, None, "exact", True)
    assert torch.equal(direct, wanted)


@pytest.mark.parametrize("rows", [1, 70])
def test_derivatives_in_every_mode(fmt, rows) -> None:
    """The CPU's tests have each of torch's modes; here those that differ in what they launch."""
    blocks, packed, w = weight(fmt, 37, 768)
    w = w.float()
    x, tangent, bias = 0.1 * randn(rows, 768), randn(rows, 768), randn(37)

    def linear(x, bias):
        return torch_q4.linear(x, packed, fmt, bias, packed=True)

    def plain(x, bias):
        return F.linear(x, w, bias)

    func = torch.func
    for derivative in (
        lambda f: func.jvp(f, (x, bias), (tangent, bias))[1],
        lambda f: func.grad(lambda v, b: f(v, b).tanh().sum(), argnums=(0, 1))(x, bias),
        lambda f: func.jvp(func.grad(lambda v: f(v, bias).tanh().sum()), (x,), (tangent,))[1],
        lambda f: func.vmap(func.grad(lambda v: f(v, bias).tanh().sum()))(x),
        lambda f: func.vmap(f, in_dims=(None, 0))(x, torch.stack([bias, -bias])),
    ):
        got, wanted = derivative(linear), derivative(plain)
        for one, other in zip(
            *(each if isinstance(each, tuple) else (each,) for each in (got, wanted)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))
    stacked = torch.stack([blocks, blocks.flip(0)])
    got = func.vmap(lambda b: torch_q4.linear(x, b, fmt))(stacked)
    torch.testing.assert_close(
        got, torch.stack([plain(x, None), plain(x, None).flip(-1)]), rtol=2e-3, atol=2e-2
    )
