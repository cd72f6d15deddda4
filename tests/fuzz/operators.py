"""Hostile arguments for every registered operator, on the CPU.

Of each operator's schema, arguments that fit are made, and then some of them are replaced: by
tensors of other dtypes, ranks, sizes, strides, devices and layouts, by numbers and strings that
nobody expects. Either the result is right, or the operator refuses with a RuntimeError in its own
words. It never writes to its arguments, and its fake says what it says.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from products import FLOATS, check_product, dense64, generator, random_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_q4 import formats
from torch_q4.formats import Format

ops = torch.ops.torch_q4
SCHEMAS = {
    schema.name.removeprefix("torch_q4::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("torch_q4::")
}
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fnuz, torch.float8_e8m0fnu,
)  # fmt: skip
INTEGERS = (
    -1, -2, -3, 0, 1, 2, 3, 4, 8, 10, 12, 14, 99, 256, 10**9, 2**31 - 1, 2**31, -(2**31), 2**32 + 2,
    2**63 - 1, -(2**63),
)  # fmt: skip
STRINGS = (
    "exact", "int8", "", "EXACT", "fast", "é", "\x00", "exact\x00", "x" * 10000, "1 rows\n",
    "-1 blas", "99999999999999999999 rows\n", "\n\n\n", "%s%n", "1",
)  # fmt: skip
# What torch says by itself: of devices and layouts without a kernel, of memory, of numbers of
# elements that no integer holds, and of dtypes that its stable ABI does not pass on.
TORCH_REFUSES = re.compile(
    r"Could not run|could not run|not enough memory|can't allocate|allocate memory|overflow|"
    r"Unhandled FakeTensor Device|no fake impl|Expected all tensors to be on the same device|"
    r"Cannot copy out of meta tensor|There was no|not implemented|unsupported|Unsupported|"
    r"The size of tensor|invalid combination|tried to allocate|too large|numel|"
    r"Not yet supported ScalarType"
)
OUT_OF_MEMORY = re.compile(
    r"out of memory: torch_q4 could not allocate (\d+) bytes for a tensor of"
)
HUGE = 1 << 30  # bytes: that there is no memory for less is a fault


def not_of_arguments(words: str) -> bool:
    """Whether an error says nothing of the arguments' rules."""
    found = OUT_OF_MEMORY.match(words)
    return bool(int(found[1]) >= HUGE if found else TORCH_REFUSES.search(words))


# ---- arguments that fit --------------------------------------------------------------------------


def fitting(rng: random.Random, op: str) -> dict[str, Any]:
    """Arguments of an operator that has tensors among them."""
    fmt = rng.choice([fmt for fmt in formats.all() if fmt.quantizes or op != "quantize"])
    n, m = rng.choice((1, 3, 16, 17, 33)), rng.choice((1, 2, 5, 20))
    k = fmt.block_elems * rng.choice((1, 2, 3))
    blocks = random_weight(rng, fmt, n, k)[0]
    if rng.random() < 0.2:  # of any bits: scales that are infinite or NaN among them
        blocks = torch.randint(0, 256, blocks.shape, dtype=torch.uint8, generator=generator(rng))
    dtype = rng.choice(FLOATS)
    x = torch.randn(m, k, generator=generator(rng)).to(dtype)
    kind = rng.randrange(10)
    if kind == 0:
        x[rng.randrange(m), rng.randrange(k)] = rng.choice(
            (float("nan"), float("inf"), -float("inf"))
        )
    elif kind == 1:
        x *= 1e4
    found: dict[str, Any] = {"format": fmt.type_id}
    if op == "quantize":
        importance = torch.rand(k, generator=generator(rng)) if rng.random() < 0.4 else None
        return {"w": x, **found, "importance": importance}
    if op in ("pack", "pack_", "unpack"):
        return {"packed" if op == "unpack" else "blocks": blocks, **found}
    if op == "dequantize":
        return {"blocks": blocks, **found, "dtype": dtype}
    found["packed"] = rng.random() < 0.4
    if op == "embedding":
        indices = torch.randint(0, n, rng.choice(((4,), (2, 3), ())), generator=generator(rng))
        return {"indices": indices.to(rng.choice((torch.int64, torch.int32))), "blocks": blocks,
                "dtype": dtype, **found}  # fmt: skip
    if op == "linear_transposed":
        grad = torch.randn(m, n, generator=generator(rng)).to(dtype)
        return {"grad": grad, "blocks": blocks, **found}
    bias = torch.randn(n, generator=generator(rng)).to(dtype) if rng.random() < 0.5 else None
    found |= {"x": x, "blocks": blocks, "bias": bias, "compute": rng.choice(("exact", "int8"))}
    if op == "_linear_with":
        found["kernel"] = rng.choice(("rows", "blas", ""))
    return found


# ---- and some that do not ------------------------------------------------------------------------


def misaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of the dtype's size."""
    raw = bytearray(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    raw[:0] = bytes(1)
    return (
        tensor
        if len(raw) == 1
        else torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape)
    )


def overlapping(rng: random.Random, tensor: Tensor) -> Tensor:
    """Rows that share memory with their neighbours."""
    sizes = list(tensor.shape)
    last = sizes[-1]
    sizes[0] = min(sizes[0], max(1, (tensor.numel() - last) // max(last // 2, 1)))
    return tensor.contiguous().as_strided(sizes, [max(last // 2, 1)] * (len(sizes) - 1) + [1])


def hostile(rng: random.Random, tensor: Tensor) -> Tensor:
    """Another tensor in a tensor's place; its values too are the same where that can be."""
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor.to(rng.choice(DTYPES)),
        lambda: tensor.to("meta"),
        lambda: tensor.unsqueeze(rng.randrange(tensor.dim() + 1)),
        lambda: tensor.flatten(),
        lambda: tensor.flatten()[:1].squeeze(),
        lambda: tensor[..., : rng.randrange(tensor.shape[-1] + 1)],
        lambda: tensor[..., 1:],
        lambda: tensor[: rng.randrange(tensor.shape[0] + 1)],
        lambda: tensor[:0],
        lambda: tensor[..., :0],
        lambda: torch.cat((tensor, tensor), rng.randrange(tensor.dim())),
        lambda: tensor.mT,
        lambda: tensor.mT.contiguous().mT,
        lambda: tensor.repeat_interleave(2, -1)[..., ::2],
        lambda: tensor.flip(0)[:, None].expand(-1, 2, *tensor.shape[1:]),
        lambda: tensor[:1].expand(rng.choice((2, 5, 40)), *tensor.shape[1:]),
        lambda: tensor[:1].expand(rng.choice((2**34, 2**40, 2**55)), *tensor.shape[1:]),
        lambda: tensor[..., :1].expand(*tensor.shape[:-1], rng.choice((64, 2**36, 2**50))),
        lambda: overlapping(rng, tensor),
        lambda: misaligned(tensor),
        lambda: torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape),
        lambda: tensor.to_sparse(),
        lambda: tensor.to_mkldnn(),
        lambda: tensor.double().to_sparse_csr().to(tensor.dtype),
        lambda: torch.empty(0, dtype=tensor.dtype),
        lambda: torch.empty(rng.choice(((0, 0), (0, 5), (5, 0), (1,) * 9)), dtype=tensor.dtype),
        lambda: tensor[(None,) * 20],
        lambda: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor,
        lambda: extreme_index(rng, tensor),
    ]  # fmt: skip
    if tensor.numel() > 1 << 20:  # it is hostile already
        return tensor
    for _ in range(4):  # not every change is possible for every tensor
        with contextlib.suppress(RuntimeError, IndexError, TypeError, ValueError):
            return rng.choice(changes)()
    return tensor


def extreme_index(rng: random.Random, tensor: Tensor) -> Tensor:
    result = tensor.clone()
    if result.numel():
        result.view(-1)[rng.randrange(result.numel())] = rng.choice(INTEGERS)
    return result


def replaced(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor):
        return hostile(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    if isinstance(value, str):
        return rng.choice(STRINGS)
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    return rng.choice((None, torch.ones(64), torch.ones(256), torch.ones(0)))


def any_value(rng: random.Random, kind: str) -> Any:
    """A value by the name of its type in the schema."""
    if kind.startswith("Optional"):
        return None if rng.random() < 0.5 else any_value(rng, kind[9:-1])
    return {
        "int": lambda: rng.choice(INTEGERS), "str": lambda: rng.choice(STRINGS),
        "bool": lambda: rng.random() < 0.5, "ScalarType": lambda: rng.choice(DTYPES),
        "Tensor": lambda: torch.randn(2, 256),
    }[kind]()  # fmt: skip


# ---- what must hold ------------------------------------------------------------------------------


def by_id(type_id: int) -> Format:
    return next(fmt for fmt in formats.all() if fmt.type_id == type_id)


def same(a: Tensor, b: Tensor) -> bool:
    nan = a.isnan() & b.isnan()
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | nan).all())


def plain(tensor: Tensor) -> Tensor:
    """A contiguous copy at an address of its own."""
    return tensor.detach().contiguous().clone()


def values(blocks: Tensor, fmt: Format, packed: bool) -> Tensor:
    blocks = ops.unpack(plain(blocks), fmt.type_id) if packed else plain(blocks)
    return dense64(blocks, fmt)


def check_result(op: str, given: dict[str, Any], result: Any, before: dict[str, Any]) -> None:
    """Holds a result against a reference; ``before`` are the arguments as they were."""
    fmt = by_id(given["format"])
    if op == "quantize":
        w, importance = plain(before["w"]).float(), before["importance"]
        assert torch.equal(result, ops.quantize(w, fmt.type_id, importance)), "depends on strides"
        return
    if op in ("pack", "pack_", "unpack"):
        blocks = plain(before["packed" if op == "unpack" else "blocks"])
        result = given["blocks"] if op == "pack_" else result
        inverse = ops.pack if op == "unpack" else ops.unpack
        assert torch.equal(inverse(plain(result), fmt.type_id), blocks)
        return
    blocks, packed = before["blocks"], given.get("packed", False)
    if op == "dequantize":
        wanted = fmt.reference(plain(blocks).unflatten(-1, (-1, fmt.block_bytes))).flatten(-2)
        assert same(result, wanted.to(given["dtype"])), "not the reference's values"
        return
    w = values(blocks, fmt, packed)
    if op == "embedding":
        wanted = w.float()[before["indices"].long()].to(given["dtype"])
        assert same(result, wanted), "not the rows"
        return
    keep = w.isfinite().all(-1)
    if op == "linear_transposed":
        grad = plain(before["grad"])
        if not bool(keep.all()) or not bool(grad.isfinite().all()):
            return
        wanted, magnitude = grad.double() @ w, grad.double().abs() @ w.abs()
        fits = magnitude < torch.finfo(grad.dtype).max / 4
        eps, eps32 = torch.finfo(grad.dtype).eps, torch.finfo(torch.float32).eps
        bound = eps * wanted.abs() + len(w) * eps32 * magnitude + 1e-7
        assert bool(((result.double() - wanted).abs() <= bound)[fits].all()), "not the product"
        return
    x, bias = plain(before["x"]), before["bias"]
    assert result.shape == (*x.shape[:-1], len(w))
    if result.numel() == 0:
        return
    if x.shape[-1] == 0:  # a sum of nothing
        nothing = torch.zeros_like(result) if bias is None else bias.expand(result.shape)
        assert same(result, nothing), "not the bias"
        return
    rows = x.reshape(-1, x.shape[-1])
    finite = rows.isfinite().all(-1)
    if bias is not None:
        keep &= bias.isfinite()
        bias = plain(bias)[keep]
    if not bool(finite.any()) or not bool(keep.any()):
        return
    y = result.reshape(-1, result.shape[-1])[finite][:, keep]
    check_product(y, rows[finite], w[keep], bias, given["compute"], normal=False)
    if bool(w.isfinite().all()):
        odd = result.reshape(-1, result.shape[-1])[~finite]
        assert not bool(odd.isfinite().all(-1).any()), "a row that is not finite gave a finite one"


def bytes_of(tensor: Tensor) -> Tensor | None:
    """All of the memory that a tensor is a view of."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def outcome_of(op: str, given: dict[str, Any]) -> tuple[Any, RuntimeError | None]:
    """What an operator gives, or how it refuses."""
    try:
        return getattr(ops, op).default(**given), None
    except RuntimeError as error:
        return None, error


def check_fake(op: str, given: dict[str, Any], result: Any, refused: str | None) -> None:
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if any(t.layout != torch.strided or t.is_meta for t in tensors):
        return  # torch itself refuses these before a kernel or a fake is asked
    given = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        fake, error = outcome_of(op, fakes)
    if error is not None:
        said = first_line(error).partition("\x00")[0]  # where a C string ends
        assert refused is not None, f"the fake refuses: {said}"
        if not not_of_arguments(refused) and not not_of_arguments(said):
            assert said == refused, f"the fake says {said}, the operator {refused}"
        return
    if refused is not None:
        by_value = re.search(r"indices must be in|must be finite|finite", refused)
        assert by_value or not_of_arguments(refused), f"the fake accepts: {refused}"
        return
    if isinstance(result, Tensor):
        assert (fake.shape, fake.dtype) == (result.shape, result.dtype), "the fake's shape differs"
        assert fake.stride() == result.stride(), "the fake's strides differ"


@functools.cache
def operators() -> tuple[str, ...]:
    """The operators that take tensors, each as often as there is to try."""
    with_tensors = [
        name for name, schema in SCHEMAS.items()
        if any(str(argument.type) == "Tensor" for argument in schema.arguments)
    ]  # fmt: skip
    return (*with_tensors, *["linear"] * 4, "embedding", "quantize", "pack_")


def tensors(rng: random.Random, folder: Path) -> str:
    """One call of an operator on tensors."""
    op = rng.choice(operators())
    given = fitting(rng, op)
    names = [argument.name for argument in SCHEMAS[op].arguments]
    assert set(given) == set(names), "the schema has arguments that this fuzzer knows nothing of"
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        name = rng.choice(names)
        given[name] = replaced(rng, given[name])
    given = {name: given[name] for name in names}
    told = f"{op}({', '.join(f'{name}={described(value)}' for name, value in given.items())})"
    before = {
        name: plain(value) if isinstance(value, Tensor) and bytes_of(value) is not None and (
            value.numel() < 1 << 24) else value
        for name, value in given.items()
    }  # fmt: skip
    memory = {
        name: (view, view.clone()) for name, value in given.items()
        if isinstance(value, Tensor) and (view := bytes_of(value)) is not None
    }  # fmt: skip
    try:
        result, error = outcome_of(op, given)
        refused = first_line(error) if error is not None else None
        if refused is not None:
            ours = re.fullmatch(rf"{op}: .+(, got .*| of \w+)", refused, re.S)
            assert ours or not_of_arguments(str(error)), f"refused in other words: {refused}"
        for name, (view, copy) in memory.items():
            if op != "pack_" or name != "blocks" or refused is not None:
                assert torch.equal(view, copy), f"{name} was written to"
            else:
                outside = torch.ones(len(view), dtype=torch.bool)
                start = given[name].storage_offset()
                outside[start : start + given[name].numel()] = False
                assert torch.equal(view[outside], copy[outside]), "wrote outside of the blocks"
        if (result if isinstance(result, Tensor) else given.get("blocks", torch.empty(0))).is_meta:
            return "computed on the meta device"
        if refused is None:
            check_result(op, given, result, before)
        if op != "pack_" or refused is not None:
            check_fake(op, given, result, refused)
    except Exception as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    return "refused" if refused is not None else "computed"


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {tuple(value.shape)} {strides} {value.device}"
    return repr(value)[:60]


def others(rng: random.Random, folder: Path) -> str:
    """One call of an operator without tensors: plans, tables, choices."""
    names = [name for name in SCHEMAS if name not in operators()]
    op = rng.choice(names)
    given = {
        argument.name: any_value(rng, str(argument.type)) for argument in SCHEMAS[op].arguments
    }
    if "format" in given and rng.random() < 0.6:
        given["format"] = rng.choice(formats.all()).type_id
    result, error = outcome_of(op, given)
    if error is not None:
        assert first_line(error), f"{op}({given}): refused without a word"
        return "refused"
    assert result is None or isinstance(result, str)
    return "computed"


FUZZERS = {"tensors": tensors, "others": others}
