"""Derivatives in every mode, of every format in both layouts; test_transforms.py has the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_blocks
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torch_q4
from torch_q4.formats import Format

ops = torch.ops.torch_q4
N, K = 19, 256  # a tile of 16 rows, and rows past it
Linear = Callable[..., Tensor]


class Weight:
    """A weight in one layout, its dequantised values, and every way of multiplying by it."""

    def __init__(self, fmt: Format, packed: bool) -> None:
        self.fmt, self.packed = fmt, packed
        blocks = random_blocks(fmt, N, K)
        self.dense = torch_q4.dequantize(blocks, fmt)
        self.blocks = torch_q4.pack(blocks, fmt) if packed else blocks

    def by_function(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch_q4.linear(x, self.blocks, self.fmt, bias, packed=self.packed)

    def by_operator(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.blocks, self.fmt.type_id, bias, "exact", self.packed)

    def transposed(self, x: Tensor) -> Tensor:
        return ops.linear_transposed(x, self.blocks, self.fmt.type_id, self.packed)

    def plain(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.dense, bias)


@pytest.fixture(params=[False, True], ids=["canonical", "packed"])
def weight(fmt, request) -> Weight:
    return Weight(fmt, request.param)


def close(got: Any, wanted: Any) -> None:
    """Equal but for sums of 256 products in another order; either may be a tuple."""
    if isinstance(wanted, (tuple, list)):
        for one, other in zip(got, wanted, strict=True):
            close(one, other)
        return
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-3 + 2e-4 * largest)


def dual(linear: Linear, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, tangent))
        found = forward_ad.unpack_dual(y).tangent
        assert found is not None, "the tangent is lost"
        return found.clone()


def forward_jacobian(linear: Linear, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autograd.functional.jacobian(
            linear, x, vectorize=True, strategy="forward-mode"
        )  # fmt: skip


def energy(linear: Linear) -> Callable[[Tensor], Tensor]:
    """Not linear in x, so that second derivatives are there to be lost."""
    return lambda x: linear(x).tanh().square().sum()


def width(linear: Linear, x: Tensor) -> int:
    return linear(x).shape[-1]


# Of a product and an x of three rows: a name, and what is computed.
DERIVATIVES: dict[str, Callable[[Linear, Tensor, Tensor], Any]] = {
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "make_dual": dual,
    "jacfwd": lambda f, x, t: jacfwd(f)(x[0]),
    "functional.jacobian": lambda f, x, t: forward_jacobian(f, x[0]),
    "grad": lambda f, x, t: grad(energy(f))(x),
    "vjp": lambda f, x, t: vjp(f, x)[1](torch.linspace(-1, 1, 3 * width(f, x)).view(3, -1))[0],
    "jacrev": lambda f, x, t: jacrev(f)(x[0]),
    "hessian": lambda f, x, t: hessian(energy(f))(x[0])[:4],
    "reverse over reverse": lambda f, x, t: jacrev(jacrev(energy(f)))(x[0])[:4],
    "reverse over forward": lambda f, x, t: grad(lambda v: jvp(energy(f), (v,), (t,))[1])(x),
    "forward over reverse": lambda f, x, t: jvp(grad(energy(f)), (x,), (t,))[1],
    "forward over forward": lambda f, x, t: jvp(
        lambda v: jvp(energy(f), (v,), (t,))[1], (x,), (t,)
    )[1],
    "vmap of grad": lambda f, x, t: vmap(grad(energy(f)))(x),
    "vmap of jvp": lambda f, x, t: vmap(lambda v, u: jvp(f, (v,), (u,)))(x, t),
    "grad of vmap": lambda f, x, t: grad(lambda v: vmap(energy(f))(v).sum())(x),
    "vmap of vmap": lambda f, x, t: vmap(vmap(f))(x[None]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_like_the_dequantised_weight(weight, name) -> None:
    x, tangent = 0.1 * torch.randn(3, K), torch.randn(3, K)
    derivative = DERIVATIVES[name]
    close(derivative(weight.by_function, x, tangent), derivative(weight.plain, x, tangent))


@pytest.mark.parametrize("name", DERIVATIVES)
def test_of_the_transposed_product(weight, name) -> None:
    """What backward calls, and so what double backward differentiates."""
    x, tangent = 0.1 * torch.randn(3, N), torch.randn(3, N)
    derivative = DERIVATIVES[name]
    close(derivative(weight.transposed, x, tangent),
          derivative(lambda v: v @ weight.dense, x, tangent))  # fmt: skip


@pytest.mark.parametrize("way", ["by_function", "by_operator"])
def test_of_the_bias(weight, way) -> None:
    linear = getattr(weight, way)
    x, bias = 0.1 * torch.randn(3, K), torch.randn(N)
    for both in (linear, weight.plain):
        assert jvp(lambda b, f=both: f(x, b), (bias,), (bias,))[1].shape == (3, N)
    for transform in (
        lambda f: jvp(f, (x, bias), (x, bias))[1],
        lambda f: jvp(lambda b: f(x, b), (bias,), (bias,))[1],
        lambda f: jvp(lambda v: f(v, bias), (x,), (x,))[1],
        lambda f: grad(lambda v, b: f(v, b).tanh().sum(), argnums=(0, 1))(x, bias),
        lambda f: grad(lambda b: f(x, b).tanh().sum())(bias),
        lambda f: hessian(lambda b: f(x[0], b).tanh().sum())(bias),
    ):
        close(transform(linear), transform(weight.plain))


@pytest.mark.filterwarnings("ignore:Input #")  # float32: finite differences with a large step
def test_gradcheck_in_every_mode(weight) -> None:
    """A product is linear, so a large step costs its finite differences no accuracy."""
    x = torch.randn(2, K, requires_grad=True)
    bias = torch.randn(N, requires_grad=True)
    upstream = torch.randn(2, N, requires_grad=True)
    tolerances = {"eps": 0.25, "atol": 2e-2, "rtol": 1e-3, "nondet_tol": 0.0, "fast_mode": True}
    for function, inputs in (
        (weight.by_function, (x, bias)),
        (weight.by_operator, (x, bias)),
        (weight.by_function, (x.detach(), bias)),
        (weight.by_function, (x, bias.detach())),
        (weight.transposed, (upstream,)),
    ):
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True, **tolerances,
        )  # fmt: skip
        if all(each.requires_grad for each in inputs):
            assert torch.autograd.gradgradcheck(
                function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True,
                check_batched_grad=True, **tolerances,
            )  # fmt: skip


def test_double_backward_and_a_graph_that_is_kept(weight) -> None:
    found = []
    for linear in (weight.by_function, weight.plain):
        x = torch.linspace(-0.1, 0.1, 3 * K).reshape(3, K).requires_grad_(True)
        (first,) = torch.autograd.grad(energy(linear)(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.equal(second, again)
        found.append((first.detach(), second))
    close(*found)


def test_vmap_over_every_argument(fmt) -> None:
    weights = [random_blocks(fmt, N, K) for _ in range(4)]
    blocks = torch.stack(weights)
    dense = torch.stack([torch_q4.dequantize(each, fmt) for each in weights])
    x, bias = torch.randn(4, 3, K), torch.randn(4, N)

    def linear(x, blocks, bias):
        return torch_q4.linear(x, blocks, fmt, bias)

    for dims in ((0, 0, 0), (0, None, 0), (None, 0, None), (None, None, 0), (0, 0, None)):
        args = [
            each if dim == 0 else each[0] for each, dim in zip((x, blocks, bias), dims, strict=True)
        ]
        plain = [args[0], dense if dims[1] == 0 else dense[0], args[2]]
        close(vmap(linear, dims)(*args), vmap(F.linear, dims)(*plain))
    last = (x.movedim(0, 2), blocks.movedim(0, 2), bias.movedim(0, 1))
    close(vmap(linear, (2, 2, 1))(*last), vmap(F.linear)(x, dense, bias))
    grads = vmap(grad(lambda x, b: linear(x, b, None).tanh().sum()))(0.1 * x, blocks)
    close(grads, vmap(grad(lambda x, w: F.linear(x, w).tanh().sum()))(0.1 * x, dense))
    # A batch of nothing.
    assert vmap(linear)(x[:0], blocks[:0], bias[:0]).shape == (0, 3, N)
    indices = torch.randint(0, N, (4, 5))
    rows = vmap(lambda i, b: torch_q4.embedding(i, b, fmt))(indices, blocks)
    assert torch.equal(rows, torch.stack([d[i] for d, i in zip(dense, indices, strict=True)]))


def test_compiled_graphs_hold_the_operators(fmt) -> None:
    """Whatever eager mode puts around them."""
    weight = Weight(fmt, packed=True)
    graphs: list[str] = []

    def backend(module, inputs):
        from functorch.compile import make_boxed_func

        graphs.append(module.code)
        return make_boxed_func(module.forward)

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: weight.by_function(x).tanh(), fullgraph=True, dynamic=True,
        backend=aot_autograd(fw_compiler=backend, bw_compiler=backend),
    )  # fmt: skip
    x = torch.randn(3, K, requires_grad=True)
    compiled(x).sum().backward()
    assert "torch_q4.linear.default" in graphs[0]
    assert "torch_q4.linear_transposed.default" in graphs[1]
    got, x.grad = x.grad, None
    weight.by_function(x).tanh().sum().backward()
    close(got, x.grad)
