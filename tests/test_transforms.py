"""The operators under opcheck, autograd, torch.compile, torch.export, autocast and vmap."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import EPS, dense64, random_blocks
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import torch_q4
from torch_q4 import formats

ops = torch.ops.torch_q4
K = 256
GRADCHECK = {"eps": 0.25, "atol": 1e-4, "rtol": 1e-4, "nondet_tol": 0.0, "fast_mode": True}
EVERY_MODE = {"check_forward_ad": True, "check_batched_grad": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.quantises
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
    blocks = random_blocks(fmt, 4, K, 0.25)
    x = torch.randn(2, K, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)

    def function(x, bias):
        return torch_q4.linear(x, blocks, fmt, bias)

    torch.autograd.gradcheck(function, (x, bias), **GRADCHECK, **EVERY_MODE)
    torch.autograd.gradgradcheck(function, (x, bias), **GRADCHECK)


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
    stored = random_blocks(fmt, 9, K)

    def function(w, indices):
        blocks = torch_q4.quantize(w, fmt) if fmt.quantizes else stored
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


def test_jit_trace_with_a_trainable_bias() -> None:
    """A layer that torch.jit.trace records is saved with the operator in it."""
    fmt = formats.get("q4_0")
    layer = torch_q4.QuantLinear.from_blocks(random_blocks(fmt, 12, K), fmt, torch.randn(12))
    x = torch.randn(3, K)
    traced = torch.jit.trace(layer, x)
    assert "torch_q4::linear" in str(traced.graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), layer(x))


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
    if fmt.quantizes:
        w = torch.randn(2, 3, K)
        assert torch.equal(torch.vmap(lambda w: torch_q4.quantize(w, fmt))(w),
                           torch_q4.quantize(w, fmt))  # fmt: skip
    indices = torch.randint(0, 12, (2, 5))
    assert torch.equal(torch.vmap(lambda i: torch_q4.embedding(i, blocks, fmt))(indices),
                       torch_q4.embedding(indices, blocks, fmt))  # fmt: skip


def test_vmap_over_blocks_bias_and_importance(fmt) -> None:
    stacked = torch.stack([random_blocks(fmt, 4, K), random_blocks(fmt, 4, K)])
    x, grad, bias = torch.randn(2, 3, K), torch.randn(2, 3, 4), torch.randn(2, 4)

    def each(function, *args):
        return torch.stack([function(*(arg[i] for arg in args)) for i in range(2)])

    def linear(x, blocks, bias):
        return torch_q4.linear(x, blocks, fmt, bias)

    def transposed(grad, blocks):
        return ops.linear_transposed(grad, blocks, fmt.type_id)

    def embedding(indices, blocks):
        return torch_q4.embedding(indices, blocks, fmt)

    def quantize(w, importance):
        return torch_q4.quantize(w, fmt, importance)

    indices, importance = torch.randint(0, 4, (2, 5)), torch.rand(2, K) + 0.1
    cases = [
        (linear, (x, stacked, bias)),
        (transposed, (grad, stacked)),
        (embedding, (indices, stacked)),
    ]
    if fmt.quantizes:
        cases.append((quantize, (x, importance)))
    for function, args in cases:
        assert torch.equal(torch.vmap(function)(*args), each(function, *args))
        empty = torch.vmap(function)(*(arg[:0] for arg in args))
        assert empty.shape == (0, *torch.vmap(function)(*args).shape[1:])
    for dims in ((None, 0, None), (None, None, 0), (0, None, 0), (None, 0, 0)):
        args = [
            arg if dim == 0 else arg[0]
            for arg, dim in zip((x, stacked, bias), dims, strict=True)
        ]  # fmt: skip
        got = torch.vmap(linear, dims)(*args)
        wanted = torch.stack(
            [linear(*(a[i] if d == 0 else a for a, d in zip(args, dims, strict=True)))
             for i in range(2)]
        )  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


# ---- every derivative, against F.linear on the dequantised weight --------------------------------


def _loss(f):
    return lambda x, bias: f(x, bias).sin().sum()


_X, _BIAS = torch.randn(3, 64), torch.randn(5)
_TX, _TBIAS = torch.randn(3, 64), torch.randn(5)
_XS, _BIASES = torch.randn(4, 3, 64), torch.randn(4, 5)
_func, _vmap, _functional = torch.func, torch.vmap, torch.autograd.functional


def _dual(f, *, requires_grad=False, mode=True):
    with torch.set_grad_enabled(mode), forward_ad.dual_level():
        x = _X.clone().requires_grad_(requires_grad)
        tangent = _TX.clone().requires_grad_(requires_grad)
        primal, out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent), _BIAS))
        again = torch.autograd.grad(out.sin().sum(), tangent) if requires_grad else ()
        return primal, out, again


def _forward_over_reverse(f):
    with forward_ad.dual_level():
        x = _X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(_loss(f)(forward_ad.make_dual(x, _TX), _BIAS), x)
        return tuple(forward_ad.unpack_dual(grad))


def _no_grad_inside(f):
    def inner(x):
        with torch.no_grad():
            return f(x, _BIAS)

    return (
        _func.grad(lambda x: (inner(x) * x.sum()).sum())(_X),
        _func.jvp(inner, (_X,), (_TX,)),
    )


def _no_grad_outside(f):
    with torch.no_grad():
        return _func.grad(_loss(f))(_X, _BIAS), _func.hessian(_loss(f))(_X[0], _BIAS)


def _autograd_outside(f, transform):
    bias = _BIAS.clone().requires_grad_()
    return torch.autograd.grad(transform(lambda x: f(x, bias)).sin().sum(), bias)


def _outlived(f):
    """A tensor that is used after its transform has ended."""
    kept = []

    def inner(x):
        kept.append(x)
        return f(x, _BIAS).sum()

    x = _X.clone().requires_grad_()
    _func.grad(inner)(x)
    return torch.autograd.grad(f(kept[0], _BIAS).sin().sum(), x)


_both = (0, 1)
DERIVATIVES = {
    "jvp": lambda f: _func.jvp(f, (_X, _BIAS), (_TX, _TBIAS)),
    "jvp of x": lambda f: _func.jvp(lambda x: f(x, _BIAS), (_X,), (_TX,)),
    "jvp of bias": lambda f: _func.jvp(lambda bias: f(_X, bias), (_BIAS,), (_TBIAS,)),
    "jvp without bias": lambda f: _func.jvp(lambda x: f(x, None), (_X,), (_TX,)),
    "linearize": lambda f: _func.linearize(f, _X, _BIAS)[1](_TX, _TBIAS),
    "grad": lambda f: _func.grad(_loss(f), _both)(_X, _BIAS),
    "vjp": lambda f: _func.vjp(f, _X, _BIAS)[1](torch.ones(3, 5)),
    "jacrev": lambda f: _func.jacrev(f, _both)(_X, _BIAS),
    "jacfwd": lambda f: _func.jacfwd(f, _both)(_X, _BIAS),
    "hessian": lambda f: _func.hessian(_loss(f), _both)(_X[0], _BIAS),
    "jacrev jacrev": lambda f: _func.jacrev(_func.jacrev(_loss(f)))(_X[0], _BIAS),
    "jacrev jacfwd": lambda f: _func.jacrev(_func.jacfwd(_loss(f)))(_X[0], _BIAS),
    "jacfwd jacfwd": lambda f: _func.jacfwd(_func.jacfwd(_loss(f)))(_X[0], _BIAS),
    "jvp grad": lambda f: _func.jvp(_func.grad(_loss(f), _both), (_X, _BIAS), (_TX, _TBIAS)),
    "vmap grad": lambda f: _vmap(_func.grad(_loss(f), _both), (0, None))(_XS, _BIAS),
    "vmap grad, biases": lambda f: _vmap(_func.grad(_loss(f), _both))(_XS, _BIASES),
    "vmap jacrev": lambda f: _vmap(_func.jacrev(f, _both), (0, None))(_XS, _BIAS),
    "vmap of tangents": lambda f: _vmap(
        lambda x, bias: _func.jvp(f, (_X, _BIAS), (x, bias))
    )(_XS, _BIASES),
    "vmap of x's tangents": lambda f: _vmap(
        lambda x: _func.jvp(f, (_X, _BIAS), (x, _TBIAS))
    )(_XS),
    "vmap of bias's tangents": lambda f: _vmap(
        lambda bias: _func.jvp(f, (_X, _BIAS), (_TX, bias))
    )(_BIASES),
    "jvp vmap": lambda f: _func.jvp(_vmap(f), (_XS, _BIASES), (_XS + 1, _BIASES + 1)),
    "grad vmap": lambda f: _func.grad(
        lambda x, bias: _vmap(f)(x, bias).sin().sum(), _both
    )(_XS, _BIASES),
    "vmap vmap": lambda f: _vmap(_vmap(f, (0, None)), (None, 0))(_XS, _BIASES),
    "functional forward": lambda f: _functional.jacobian(
        f, (_X, _BIAS), strategy="forward-mode", vectorize=True
    ),
    "functional batched": lambda f: _functional.jacobian(f, (_X, _BIAS), vectorize=True),
    "functional hessian": lambda f: _functional.hessian(
        _loss(f), (_X[0], _BIAS), vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional jvp": lambda f: _functional.jvp(f, (_X, _BIAS), (_TX, _TBIAS)),
    "dual": _dual,
    "dual, no_grad": lambda f: _dual(f, mode=False),
    "dual, differentiated": lambda f: _dual(f, requires_grad=True),
    "dual over backward": _forward_over_reverse,
    "no_grad inside": _no_grad_inside,
    "no_grad outside": _no_grad_outside,
    "autograd outside of vmap": lambda f: _autograd_outside(f, lambda g: _vmap(g)(_XS)),
    "autograd outside of grad": lambda f: _autograd_outside(
        f, lambda g: _func.grad(lambda x: g(x).sin().sum())(_X)
    ),
    "outlived": _outlived,
}  # fmt: skip


@pytest.mark.parametrize("route", ["linear", "operator", "packed", "layer"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_linear_are_those_of_f_linear(name, route) -> None:
    fmt = formats.get("q4_1")
    blocks = random_blocks(fmt, 5, 64)
    w = torch_q4.dequantize(blocks, fmt)
    layer = torch_q4.pack_(torch_q4.QuantLinear.from_blocks(blocks, fmt))
    packed = torch_q4.pack(blocks, fmt)

    def by_layer(x, bias):
        y = layer(x)
        return y if bias is None else y + bias

    function = {
        "linear": lambda x, bias: torch_q4.linear(x, blocks, fmt, bias),
        "operator": lambda x, bias: ops.linear(x, blocks, fmt.type_id, bias),
        "packed": lambda x, bias: torch_q4.linear(x, packed, fmt, bias, packed=True),
        "layer": by_layer,
    }[route]
    got = tree_flatten(DERIVATIVES[name](function))[0]
    wanted = tree_flatten(DERIVATIVES[name](lambda x, bias: F.linear(x, w, bias)))[0]
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_every_format_in_forward_mode_and_torch_func(fmt, packed) -> None:
    blocks = random_blocks(fmt, 20, K)  # a tile of packed rows and some that are not in one
    w = torch_q4.dequantize(blocks, fmt)
    if packed:
        blocks = torch_q4.pack(blocks, fmt)
    x, tangent, grad, grad_tangent = (torch.randn(3, n) for n in (K, K, 20, 20))
    bias, bias_tangent = torch.randn(20), torch.randn(20)

    def transposed(grad):
        return ops.linear_transposed(grad, blocks, fmt.type_id, packed)

    for compute in ("exact", "int8"):

        def linear(x, bias, compute=compute):
            return torch_q4.linear(x, blocks, fmt, bias, compute=compute, packed=packed)

        _, got = torch.func.jvp(linear, (x, bias), (tangent, bias_tangent))
        torch.testing.assert_close(got, F.linear(tangent, w, bias_tangent), rtol=1e-4, atol=1e-3)
        _, pull = torch.func.vjp(linear, x, bias)
        torch.testing.assert_close(pull(grad)[0], grad @ w, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(pull(grad)[1], grad.sum(0), rtol=1e-4, atol=1e-3)
    _, got = torch.func.jvp(transposed, (grad,), (grad_tangent,))
    torch.testing.assert_close(got, grad_tangent @ w, rtol=1e-4, atol=1e-3)
    _, pull = torch.func.vjp(transposed, grad)
    torch.testing.assert_close(pull(x)[0], x @ w.T, rtol=1e-4, atol=1e-3)


def test_gradcheck_of_linear_transposed(fmt) -> None:
    blocks = random_blocks(fmt, 4, K, 0.25)
    grad = torch.randn(2, 4, requires_grad=True)

    def function(grad):
        return ops.linear_transposed(grad, blocks, fmt.type_id)

    torch.autograd.gradcheck(function, (grad,), **GRADCHECK, **EVERY_MODE)
    torch.autograd.gradgradcheck(function, (grad,), **GRADCHECK)


def test_embedding_has_no_derivative_and_disturbs_none() -> None:
    fmt = formats.get("q4_0")
    blocks, indices = random_blocks(fmt, 6, K), torch.tensor([1, 4])
    rows = torch_q4.embedding(indices, blocks, fmt)
    assert not rows.requires_grad
    scale = torch.randn(())

    def function(scale):
        return (torch_q4.embedding(indices, blocks, fmt) * scale).sum()

    torch.testing.assert_close(torch.func.grad(function)(scale), rows.sum())
    torch.testing.assert_close(torch.func.jvp(function, (scale,), (scale,))[1], rows.sum() * scale)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_saved_tensor_hooks(reentrant) -> None:
    fmt = formats.get("q4_k")
    layer = torch_q4.QuantLinear.from_blocks(random_blocks(fmt, 12, K), fmt, torch.zeros(12))
    x = torch.randn(3, K, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).sin().sum(), (x, layer.bias))
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.sin().sum().backward(retain_graph=True)
    for one, other in zip((x.grad, layer.bias.grad), wanted, strict=True):
        assert torch.equal(one, other)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor.clone(), lambda tensor: tensor
    ):
        y = layer(x)
    assert [tensor.dtype for tensor in saved] == [torch.uint8]
    assert torch.equal(torch.autograd.grad(y.sin().sum(), x)[0], wanted[0])


@pytest.mark.parametrize("operator", [False, True])
def test_only_what_is_asked_for_is_computed(operator) -> None:
    fmt = formats.get("q4_0")
    blocks, x, bias = random_blocks(fmt, 4, K), torch.randn(3, K), torch.randn(4)

    def linear(x, bias):
        if operator:
            return ops.linear(x, blocks, fmt.type_id, bias)
        return torch_q4.linear(x, blocks, fmt, bias)

    for wanted, products in ((x, 1), (bias, 0)):
        wanted.requires_grad_(True)
        with FlopCounterMode(display=False) as count:
            linear(x, bias).sum().backward()
        assert count.get_total_flops() == 2 * 3 * 4 * K * (1 + products)
        assert [tensor.grad is not None for tensor in (x, bias)] == [wanted is x, wanted is bias]
        wanted.grad = None
        wanted.requires_grad_(False)


def test_flops_are_those_of_f_linear(fmt) -> None:
    blocks = random_blocks(fmt, 12, K)
    w = torch_q4.dequantize(blocks, fmt)
    totals = []
    for function in (
        lambda x: torch_q4.linear(x, blocks, fmt),
        lambda x: ops.linear(x, blocks, fmt.type_id),
        lambda x: F.linear(x, w),
    ):
        x = torch.randn(2, 3, K, requires_grad=True)
        with FlopCounterMode(display=False) as count:
            function(x).sum().backward()
        totals.append(count.get_total_flops())
        with FlopCounterMode(display=False) as count, torch.inference_mode():
            function(x.detach())
        totals.append(count.get_total_flops())
    assert totals == [2 * 2 * 6 * 12 * K, 2 * 6 * 12 * K] * 3


def test_derivatives_under_autocast() -> None:
    """The product is in the autocast dtype, as of F.linear; derivatives are in the dtype of x."""
    fmt = formats.get("q4_0")
    blocks, x, tangent = random_blocks(fmt, 12, K), torch.randn(3, K), torch.randn(3, K)
    w = torch_q4.dequantize(blocks, fmt)

    def everything(f):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            primal, out = torch.func.jvp(f, (x,), (tangent,))
            grad = torch.func.grad(lambda x: f(x).float().sum())(x)
            leaf = x.clone().requires_grad_()
            (backward,) = torch.autograd.grad(f(leaf).float().sum(), leaf)
        return primal, out, grad, backward

    for one, other in zip(
        everything(lambda x: torch_q4.linear(x, blocks, fmt)),
        everything(lambda x: F.linear(x, w)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=0.2)


def test_second_derivative_under_autocast_keeps_float32() -> None:
    fmt = formats.get("q4_0")
    blocks, grad, upstream = random_blocks(fmt, 12, K), torch.randn(3, 12), torch.randn(3, K)
    grad.requires_grad_(True)
    y = ops.linear_transposed(grad, blocks, fmt.type_id)
    wanted = upstream.double() @ dense64(blocks, fmt).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(y, grad, upstream)
    assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()
