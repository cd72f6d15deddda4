"""The operators: public functions, and what makes them work under PyTorch's transforms.

The functions here take formats by name and raise ``ValueError`` or ``TypeError`` for bad arguments.
``torch.ops.torch_q4.*`` are the registered operators underneath: they take ggml's type number,
raise ``RuntimeError`` with the same words, and are what ``torch.compile`` and ``torch.export`` see.
Schemas and kernels are in C++ (``csrc/``), for CPU and GPU; this module adds their shape functions
("fakes"), derivatives, autocast, vmap rules and counts of operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.flop_counter import register_flop_formula

from torch_q4 import formats
from torch_q4.formats import Format

__all__ = [
    "cpu_isa",
    "dequantize",
    "embedding",
    "linear",
    "matmul_q4_0",
    "pack",
    "quantize",
    "unpack",
]

_LIBRARY = Path(__file__).parent / "_C.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"torch_q4 is not built: {_LIBRARY} is missing. "
        "Run `pip install --no-build-isolation .` in its source directory."
    )
torch.ops.load_library(_LIBRARY)

_ops = torch.ops.torch_q4
# Looking these up by their long names costs a tenth of a small product.
_linear_op = _ops.linear.default
_transposed_op = _ops.linear_transposed.default
_is_compiling = torch.compiler.is_compiling
_is_inference_mode = torch.is_inference_mode_enabled
_is_grad_enabled = torch.is_grad_enabled
_jit_trace = torch._C._get_tracing_state
_is_transforming = torch._C._are_functorch_transforms_active
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_COMPUTES = ("exact", "int8")
_GPU_QUANTIZES = ("q4_0", "q8_0")  # without importance: `has_kernel` of csrc/gpu/quantize.cpp

FormatLike = Format | str | int
_BY_NAME = {fmt.name: fmt for fmt in formats.all()}


# ---- the rules: one function per operator, the words those of csrc/checks.h ----------------------


def _format(op: str, fmt: FormatLike) -> Format:
    try:
        return formats.get(fmt)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{op}: {error}") from None


def _check_float(op: str, what: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise TypeError(f"{op}: {what} must be float32, float16 or bfloat16, got {dtype}")


def _check_device(op: str, what: str, tensor: Tensor, reference_name: str, ref: Tensor) -> None:
    if tensor.device != ref.device:
        raise ValueError(f"{op}: {what} must be on the device of {reference_name}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_blocks_dtype(op: str, blocks: Tensor) -> None:
    if blocks.dtype != torch.uint8:
        raise TypeError(f"{op}: blocks must be uint8, got {blocks.dtype}")


def _check_blocks(op: str, blocks: Tensor, fmt: Format, *, matrix: bool) -> None:
    _check_blocks_dtype(op, blocks)
    if matrix and blocks.dim() != 2:
        raise ValueError(f"{op}: blocks must have 2 dimensions, got shape {_shape(blocks)}")
    if blocks.dim() < 1:
        raise ValueError(f"{op}: blocks must have at least 1 dimension, got shape {_shape(blocks)}")
    if blocks.shape[-1] % fmt.block_bytes:
        raise ValueError(
            f"{op}: bytes per row of blocks must be a multiple of {fmt.block_bytes} for "
            f"{fmt.name}, got {blocks.shape[-1]}"
        )


def _check_columns(op: str, what: str, columns: int, fmt: Format) -> None:
    if columns % fmt.block_elems:
        raise ValueError(
            f"{op}: columns of {what} must be a multiple of {fmt.block_elems} for {fmt.name}, "
            f"got {columns}"
        )


def _check_quantize(w: Tensor, fmt: Format, importance: Tensor | None) -> None:
    fmt.check_quantizes("quantize")
    _check_float("quantize", "w", w.dtype)
    if w.dim() < 1:
        raise ValueError(f"quantize: w must have at least 1 dimension, got shape {_shape(w)}")
    columns = w.shape[-1]
    _check_columns("quantize", "w", columns, fmt)
    if importance is not None:
        if importance.dtype != torch.float32:
            raise TypeError(f"quantize: importance must be float32, got {importance.dtype}")
        if importance.dim() != 1 or importance.shape[0] != columns:
            raise ValueError(
                f"quantize: importance must have shape ({columns},), got {_shape(importance)}"
            )
        _check_device("quantize", "importance", importance, "w", w)


def _has_values(tensor: Tensor) -> bool:
    """Whether the tensor's values may be asked for: not while tracing, under vmap, or on meta."""
    return not (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def find_not_finite(values: Tensor, *, or_negative: bool = False) -> tuple[int, ...] | None:
    """The place of the first NaN or infinity, or negative value if so asked; waits for a GPU.

    None where there are no values to look at: on the meta device, while tracing, under vmap.
    """
    if values.numel() == 0 or not _has_values(values):
        return None
    values = values.detach()
    least, largest = (float(value) for value in torch.aminmax(values))  # NaN comes out of it, too
    if math.isfinite(least) and math.isfinite(largest) and not (or_negative and least < 0):
        return None
    bad = ~values.isfinite()
    if or_negative:
        bad |= values < 0
    return tuple(int(index) for index in bad.nonzero()[0])


def check_finite(what: str, values: Tensor, *, not_negative: bool = False) -> None:
    """Refuses what :func:`find_not_finite` finds.

    Args:
        what: how the error begins, as in ``"quantize: w"``.
        values: a floating tensor.
        not_negative: whether to refuse what is below zero, too.

    Raises:
        ValueError: the message has the first value that is refused, and its place.
    """
    place = find_not_finite(values, or_negative=not_negative)
    if place is not None:
        raise ValueError(
            f"{what} must be finite{' and not negative' if not_negative else ''}, got "
            f"{float(values[place])} at {place}"
        )


def _check_dequantize(blocks: Tensor, fmt: Format, dtype: torch.dtype) -> None:
    _check_blocks("dequantize", blocks, fmt, matrix=False)
    _check_float("dequantize", "dtype", dtype)


def _check_product(op: str, x_name: str, x: Tensor, blocks: Tensor) -> None:
    _check_float(op, x_name, x.dtype)
    if x.dim() < 1:
        raise ValueError(f"{op}: {x_name} must have at least 1 dimension, got shape {_shape(x)}")
    _check_device(op, "blocks", blocks, x_name, x)


def _check_linear(
    x: Tensor, blocks: Tensor, fmt: Format, bias: Tensor | None, compute: str
) -> None:
    _check_product("linear", "x", x, blocks)
    columns = x.shape[-1]
    _check_columns("linear", "x", columns, fmt)
    _check_blocks_dtype("linear", blocks)
    if blocks.dim() != 2:
        raise ValueError(f"linear: blocks must have 2 dimensions, got shape {_shape(blocks)}")
    row_bytes = columns // fmt.block_elems * fmt.block_bytes
    if blocks.shape[1] != row_bytes:
        raise ValueError(
            f"linear: blocks must have {row_bytes} bytes per row for {fmt.name} with "
            f"{columns} columns, got {blocks.shape[1]}"
        )
    if bias is not None:
        if bias.dtype != x.dtype:
            raise TypeError(f"linear: bias must have the dtype of x, {x.dtype}, got {bias.dtype}")
        if bias.dim() != 1 or bias.shape[0] != blocks.shape[0]:
            raise ValueError(
                f"linear: bias must have shape ({blocks.shape[0]},), got {_shape(bias)}"
            )
        _check_device("linear", "bias", bias, "x", x)
    if compute not in _COMPUTES:
        raise ValueError(f"linear: compute must be exact or int8, got {compute}")


def _check_linear_transposed(grad: Tensor, blocks: Tensor, fmt: Format) -> None:
    op = "linear_transposed"
    _check_product(op, "grad", grad, blocks)
    _check_blocks(op, blocks, fmt, matrix=True)
    if grad.shape[-1] != blocks.shape[0]:
        raise ValueError(
            f"{op}: grad must have {blocks.shape[0]} columns, one per row of blocks, "
            f"got {grad.shape[-1]}"
        )


def _check_embedding(indices: Tensor, blocks: Tensor, fmt: Format, dtype: torch.dtype) -> None:
    op = "embedding"
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices must be int64 or int32, got {indices.dtype}")
    _check_blocks(op, blocks, fmt, matrix=True)
    _check_float(op, "dtype", dtype)
    _check_device(op, "blocks", blocks, "indices", indices)


# ---- public functions ----------------------------------------------------------------------------


def quantize(w: Tensor, fmt: FormatLike, importance: Tensor | None = None) -> Tensor:
    """Quantises rows to blocks, byte for byte as ggml does.

    Each block's scales and codes minimise ``sum_i importance_i * (w_i - value_i)**2`` over ggml's
    grid of candidates. Without importance ggml's plain quantiser is followed. ``q8_0`` has
    nothing to weigh and ignores it.

    On a GPU, ``q4_0`` and ``q8_0`` without importance are quantised there. Everything else goes
    through the CPU and back, which waits for the device.

    NaN and infinities are refused: no block can hold them, and ggml's quantisers spoil the other
    values of their block. To find them, ``w`` is read once more, which takes up to a fifth as long
    as quantising to q4_0 or q4_1, and little beside the K formats. It is not looked at where
    looking would make a program wait that did not, that is where a GPU quantises, nor where there
    is nothing to look at: under ``torch.compile``, ``torch.export`` and ``vmap``, on the meta
    device.
    ``torch.ops.torch_q4.quantize(w, type, importance)`` takes every value anywhere.

    Args:
        w: weights, float32, float16 or bfloat16, ``(..., K)``; K a whole number of blocks.
        fmt: the format, by name or ggml type.
        importance: float32 ``(K,)``, each column's weight: llama.cpp's imatrix, the mean squared
            activation of the column. Finite and not negative, as a mean of squares is.

    Returns:
        uint8 ``(..., K // block_elems * block_bytes)`` on the device of ``w``.

    Raises:
        ValueError: unknown format, one that has no quantiser (``Format.quantizes``), a shape that
            does not fit, or values that are not finite.
        TypeError: a dtype that is not supported.
    """
    found = _format("quantize", fmt)
    _check_quantize(w, found, importance)
    if importance is not None:
        check_finite("quantize: importance", importance, not_negative=True)
    if w.device.type == "cpu" or importance is not None or found.name not in _GPU_QUANTIZES:
        check_finite("quantize: w", w)
    return _ops.quantize.default(w, found.type_id, importance)


def dequantize(blocks: Tensor, fmt: FormatLike, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decodes blocks to their values.

    float32 values are ggml's, bit for bit; float16 and bfloat16 are those rounded to nearest even.

    Args:
        blocks: uint8 ``(..., bytes)``, whole blocks in the last dimension.
        fmt: the format, by name or ggml type.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``(..., bytes // block_bytes * block_elems)`` in ``dtype``.

    Raises:
        ValueError: unknown format, or bytes that are not whole blocks.
        TypeError: blocks that are not uint8, or another dtype.
    """
    found = _format("dequantize", fmt)
    _check_dequantize(blocks, found, dtype)
    return _ops.dequantize.default(blocks, found.type_id, dtype)


def linear(
    x: Tensor,
    blocks: Tensor,
    fmt: FormatLike,
    bias: Tensor | None = None,
    *,
    compute: str = "exact",
    packed: bool = False,
) -> Tensor:
    """``y = x @ dequantize(blocks).T + bias`` without ever storing the dequantised weight.

    Differentiable with respect to ``x`` and ``bias`` in every mode: backward, double backward,
    forward mode and ``torch.func``'s transforms; the derivative of ``"int8"`` is that of the exact
    product. Blocks are integers and cannot be trained. Under ``torch.vmap`` a batch of ``x`` or
    ``bias`` is one product, a batch of ``blocks`` one product for each of them.

    Args:
        x: float32, float16 or bfloat16, ``(..., K)``, any strides.
        blocks: uint8 ``(N, K // block_elems * block_bytes)``.
        fmt: the format, by name or ggml type.
        bias: ``(N,)`` in the dtype of ``x``.
        compute: ``"exact"`` multiplies activations and dequantised weights as they are and sums in
            float32; on a GPU weights are computed in the dtype of ``x`` where that is 16 bits wide.
            ``"int8"`` first rounds each 32 activations to int8 with a float32 scale,
            which is faster (llama.cpp's arithmetic; relative squared error at most 1e-4 for
            normally distributed activations).
        packed: the blocks come from :func:`pack`, which is faster to read.

    Returns:
        ``(..., N)`` in the dtype of ``x``.

    Raises:
        ValueError: unknown format, or shapes, devices or ``compute`` that do not fit.
        TypeError: a dtype that is not supported.
    """
    found = _BY_NAME.get(fmt) if fmt.__class__ is str else None
    if found is None:
        found = _format("linear", fmt)
    if _is_compiling():
        _check_linear(x, blocks, found, bias, compute)
        return _linear_op(x, blocks, found.type_id, bias, compute, packed)
    try:
        return _linear_eager(x, blocks, found.type_id, bias, compute, packed)
    except RuntimeError as error:
        refusal = error
    # The operator makes the same checks, for less; here they tell a TypeError from a ValueError.
    _check_linear(x, blocks, found, bias, compute)
    raise refusal


def linear_unchecked(
    x: Tensor, blocks: Tensor, type_id: int, bias: Tensor | None, compute: str, packed: bool
) -> Tensor:
    """:func:`linear` by ggml's type number, its arguments checked by the operator alone."""
    if _is_compiling():
        return _linear_op(x, blocks, type_id, bias, compute, packed)
    return _linear_eager(x, blocks, type_id, bias, compute, packed)


def _linear_eager(
    x: Tensor, blocks: Tensor, type_id: int, bias: Tensor | None, compute: str, packed: bool
) -> Tensor:
    """The operator, past as much of the dispatcher as this call does not need.

    The operator's own rule for derivatives is right in every mode, but it is Python that the
    dispatcher calls, and costs more than a small product. Inference mode leaves it out by itself.
    """
    if _is_inference_mode() or _is_transforming() or forward_ad._current_level >= 0:
        return _linear_op(x, blocks, type_id, bias, compute, packed)
    if _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        if _jit_trace() is not None:  # a trace is to hold the operator, not this function
            return _linear_op(x, blocks, type_id, bias, compute, packed)
        return _linear_function(x, blocks, type_id, bias, compute, packed)
    with _BelowAutograd():
        return _linear_op(x, blocks, type_id, bias, compute, packed)


def embedding(
    indices: Tensor, blocks: Tensor, fmt: FormatLike, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decodes the rows that ``indices`` names: ``dequantize(blocks[indices])``.

    There is no gradient: indices and blocks are integers.

    On a GPU nobody looks at the indices before the kernel runs. One out of range stops the device's
    work with an error that a later call reports, as torch's own embedding does.

    Args:
        indices: int64 or int32, any shape.
        blocks: uint8 ``(rows, bytes)``.
        fmt: the format, by name or ggml type.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``(*indices.shape, bytes // block_bytes * block_elems)`` in ``dtype``.

    Raises:
        ValueError: unknown format or blocks of a wrong shape.
        TypeError: a dtype that is not supported.
        RuntimeError: an index outside ``[0, rows)``; on a GPU, see above.
    """
    found = _format("embedding", fmt)
    _check_embedding(indices, blocks, found, dtype)
    return _ops.embedding.default(indices, blocks, found.type_id, dtype)


def pack(blocks: Tensor, fmt: FormatLike) -> Tensor:
    """The same bytes in the order that kernels want to read them, 16 rows at a time.

    ``kernels/packed.h`` draws the layout. Rows past the last multiple of 16 stay as they are, so a
    row of blocks must not be taken out of a packed weight by indexing.

    Args:
        blocks: uint8 ``(N, bytes_per_row)``, GGML's own bytes.
        fmt: the format, by name or ggml type.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: unknown format or blocks of a wrong shape.
        TypeError: blocks that are not uint8.
    """
    found = _format("pack", fmt)
    _check_blocks("pack", blocks, found, matrix=True)
    return _ops.pack.default(blocks, found.type_id)


def unpack(packed: Tensor, fmt: FormatLike) -> Tensor:
    """The inverse of :func:`pack`: GGML's own bytes again.

    Args:
        packed: uint8 ``(N, bytes_per_row)`` from :func:`pack`.
        fmt: the format, by name or ggml type.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: unknown format or blocks of a wrong shape.
        TypeError: blocks that are not uint8.
    """
    found = _format("unpack", fmt)
    _check_blocks("unpack", packed, found, matrix=True)
    return _ops.unpack.default(packed, found.type_id)


def matmul_q4_0(x: Tensor, blocks: Tensor, n_rows: int, n_cols: int) -> Tensor:
    """``y = x @ W.T`` for a Q4_0 weight W of ``n_rows`` by ``n_cols``, blocks in any shape.

    Args:
        x: float32, float16 or bfloat16, ``(M, n_cols)``.
        blocks: uint8, all of W's blocks: 18 bytes each (``q4_0``, float16 scale) or 20 bytes each
            (``q4_0_f32``, float32 scale). Their number of bytes tells which.
        n_rows: rows of W.
        n_cols: columns of W, a multiple of 32.

    Returns:
        ``(M, n_rows)`` in the dtype of ``x``.

    Raises:
        ValueError: blocks that are neither, or an ``x`` of another width.
        TypeError: a dtype that is not supported.
    """
    op = "matmul_q4_0"
    if n_rows < 0 or n_cols < 0 or n_cols % 32:
        raise ValueError(
            f"{op}: n_rows must be at least 0 and n_cols a multiple of 32, got {n_rows}, {n_cols}"
        )
    if x.dim() != 2 or x.shape[1] != n_cols:
        raise ValueError(f"{op}: x must have shape (M, {n_cols}), got {_shape(x)}")
    _check_blocks_dtype(op, blocks)
    count = n_rows * (n_cols // 32)
    for name in ("q4_0", "q4_0_f32"):
        fmt = formats.get(name)
        if blocks.numel() == count * fmt.block_bytes:
            row_bytes = fmt.row_bytes(n_cols)
            return linear(x, blocks.reshape(n_rows, row_bytes), fmt)
    raise ValueError(
        f"{op}: blocks must have {18 * count} bytes (float16 scales) or {20 * count} (float32) "
        f"for {n_rows} rows of {n_cols} columns, got {blocks.numel()}"
    )


def cpu_isa() -> str:
    """The instruction set of the CPU kernels.

    One of ``amx``, ``avx512``, ``avxvnni``, ``avx2`` and ``generic``: the best one that this CPU
    has, or the one in the environment variable ``TORCH_Q4_CPU_ISA``.

    Raises:
        RuntimeError: the variable names no such set, or one that this CPU lacks.
    """
    return str(_ops.cpu_isa.default())


# ---- fakes: what torch.compile and torch.export run in place of the kernels ----------------------


def _fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a shape function; its errors become the operator's own, ``RuntimeError``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (ValueError, TypeError) as error:
                raise RuntimeError(str(error)) from None

        torch.library.register_fake(f"torch_q4::{op}", fake)
        return function

    return decorate


@_fake("quantize")
def _(w: Tensor, format: int, importance: Tensor | None = None) -> Tensor:
    fmt = _format("quantize", format)
    _check_quantize(w, fmt, importance)
    row_bytes = w.shape[-1] // fmt.block_elems * fmt.block_bytes
    return w.new_empty((*w.shape[:-1], row_bytes), dtype=torch.uint8)


@_fake("dequantize")
def _(blocks: Tensor, format: int, dtype: torch.dtype) -> Tensor:
    fmt = _format("dequantize", format)
    _check_dequantize(blocks, fmt, dtype)
    columns = blocks.shape[-1] // fmt.block_bytes * fmt.block_elems
    return blocks.new_empty((*blocks.shape[:-1], columns), dtype=dtype)


def _fake_repack(op: str) -> None:
    @_fake(op)
    def _(blocks: Tensor, format: int) -> Tensor:
        _check_blocks(op, blocks, _format(op, format), matrix=True)
        return torch.empty_like(blocks, memory_format=torch.contiguous_format)


_fake_repack("pack")
_fake_repack("unpack")


@_fake("pack_")
def _(blocks: Tensor, format: int) -> None:
    _check_blocks("pack_", blocks, _format("pack_", format), matrix=True)
    if not blocks.is_contiguous():
        raise ValueError("pack_: blocks must be contiguous, got other strides")


@_fake("linear")
def _(
    x: Tensor,
    blocks: Tensor,
    format: int,
    bias: Tensor | None = None,
    compute: str = "exact",
    packed: bool = False,
) -> Tensor:
    fmt = _format("linear", format)
    _check_linear(x, blocks, fmt, bias, compute)
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


@_fake("linear_transposed")
def _(grad: Tensor, blocks: Tensor, format: int, packed: bool = False) -> Tensor:
    fmt = _format("linear_transposed", format)
    _check_linear_transposed(grad, blocks, fmt)
    columns = blocks.shape[1] // fmt.block_bytes * fmt.block_elems
    return grad.new_empty((*grad.shape[:-1], columns))


@_fake("embedding")
def _(
    indices: Tensor, blocks: Tensor, format: int, dtype: torch.dtype, packed: bool = False
) -> Tensor:
    fmt = _format("embedding", format)
    _check_embedding(indices, blocks, fmt, dtype)
    columns = blocks.shape[1] // fmt.block_bytes * fmt.block_elems
    return indices.new_empty((*indices.shape, columns), dtype=dtype)


# ---- derivatives: y = x W^T + b, so dx = dy W and db = sum dy; a tangent passes as x does --------

# One function per operator serves backward, double backward and forward mode, and one kernel under
# the dispatcher's Autograd key applies it. torch.func's transforms call this kernel once per level,
# as they call the kernels of torch's own operators; torch.library's register_autograd has neither
# forward mode nor torch.func. The derivative of int8 arithmetic is that of the exact product.


def _derivative_of_linear(x: Tensor, blocks: Tensor, format: int, packed: bool) -> Tensor:
    """The product where it is a derivative: autocast leaves derivatives in their own dtype."""
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return _linear_op(x, blocks, format, None, "exact", packed)


def _derivative_of_transposed(grad: Tensor, blocks: Tensor, format: int, packed: bool) -> Tensor:
    """The transposed product in backward; without another derivative past the autograd key."""
    if (
        _is_compiling()
        or _is_transforming()
        or forward_ad._current_level >= 0
        or (_is_grad_enabled() and grad.requires_grad)
    ):
        return _transposed_op(grad, blocks, format, packed)
    with _BelowAutograd():
        return _transposed_op(grad, blocks, format, packed)


def _save(ctx: Any, blocks: Tensor) -> None:
    """Keeps the blocks for the derivatives that can be asked for."""
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(blocks)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(blocks)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blocks: Tensor,
        format: int,
        bias: Tensor | None,
        compute: str,
        packed: bool,
        below: Callable[..., Tensor],
    ) -> Tensor:
        ctx.format, ctx.packed = format, packed
        ctx.set_materialize_grads(False)
        _save(ctx, blocks)
        with _BelowAutograd():
            y = below(x, blocks, format, bias, compute, packed)
        ctx.shape = y.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x_grad = bias_grad = None
        if grad is not None:
            if ctx.needs_input_grad[0]:
                (blocks,) = ctx.saved_tensors
                x_grad = _derivative_of_transposed(grad, blocks, ctx.format, ctx.packed)
            if ctx.needs_input_grad[3]:
                bias_grad = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
        return x_grad, None, None, bias_grad, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *others: Tensor | None) -> Tensor | None:
        bias = others[2]
        if x is None:
            return None if bias is None else bias.expand(ctx.shape)
        (blocks,) = ctx.saved_tensors
        y = _derivative_of_linear(x, blocks, ctx.format, ctx.packed)
        return y if bias is None else y + bias


class _LinearTransposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        blocks: Tensor,
        format: int,
        packed: bool,
        below: Callable[..., Tensor],
    ) -> Tensor:
        ctx.format, ctx.packed = format, packed
        ctx.set_materialize_grads(False)
        _save(ctx, blocks)
        with _BelowAutograd():
            return below(grad, blocks, format, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        first = None
        if grad is not None:
            (blocks,) = ctx.saved_tensors
            first = _derivative_of_linear(grad, blocks, ctx.format, ctx.packed)
        return first, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        (blocks,) = ctx.saved_tensors
        return _transposed_op(grad, blocks, ctx.format, ctx.packed)


# torch.autograd.Function.apply is Python around this, with a route of its own for torch.func.
_apply_linear: Callable[..., Tensor] = super(torch.autograd.Function, _Linear).apply
_apply_transposed: Callable[..., Tensor] = super(torch.autograd.Function, _LinearTransposed).apply
_alive = torch._C._functorch.unwrap_if_dead


def _linear_function(
    x: Tensor, blocks: Tensor, type_id: int, bias: Tensor | None, compute: str, packed: bool
) -> Tensor:
    """The differentiable product outside of every transform.

    A tensor that has outlived its transform counts as the tensor inside it, as for torch's own.
    """
    bias = None if bias is None else _alive(bias)
    return _apply_linear(_alive(x), _alive(blocks), type_id, bias, compute, packed, _linear_op)


_MORE_TRANSFORMS = torch._C.DispatchKey.FuncTorchDynamicLayerBackMode


def _below_autograd(op: Any, keys: Any) -> Callable[..., Tensor]:
    """``op`` beneath the Autograd key.

    Function.apply turns derivatives off for its forward. The transforms outside of the one at hand,
    which the operator goes through next, get the modes that the caller had.
    """
    keys = keys & torch._C._after_autograd_keyset
    if not keys.has(_MORE_TRANSFORMS):
        return functools.partial(op.redispatch, keys)
    backward, forward = _is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def call(*args: Any) -> Tensor:
        with torch.set_grad_enabled(backward), forward_ad._set_fwd_grad_enabled(forward):
            return op.redispatch(keys, *args)

    return call


def _wants_derivative(*tensors: Tensor | None) -> bool:
    return forward_ad._current_level >= 0 or (
        _is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    )


def _linear_autograd(
    keys: Any,
    x: Tensor,
    blocks: Tensor,
    format: int,
    bias: Tensor | None = None,
    compute: str = "exact",
    packed: bool = False,
) -> Tensor:
    below = _below_autograd(_linear_op, keys)
    if _wants_derivative(x, bias):
        with enable_single_level_autograd_function():
            return _apply_linear(x, blocks, format, bias, compute, packed, below)
    with _BelowAutograd():
        return below(x, blocks, format, bias, compute, packed)


def _transposed_autograd(
    keys: Any, grad: Tensor, blocks: Tensor, format: int, packed: bool = False
) -> Tensor:
    below = _below_autograd(_transposed_op, keys)
    if _wants_derivative(grad):
        with enable_single_level_autograd_function():
            return _apply_transposed(grad, blocks, format, packed, below)
    with _BelowAutograd():
        return below(grad, blocks, format, packed)


_library = torch.library.Library("torch_q4", "IMPL")
_library.impl("linear", _linear_autograd, "Autograd", with_keyset=True)
_library.impl("linear_transposed", _transposed_autograd, "Autograd", with_keyset=True)


# ---- autocast: as F.linear, the product runs in the autocast dtype -------------------------------


_AUTOCAST_KEYS = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


def _register_autocast(device_type: str, key: str) -> None:

    def linear_autocast(
        x: Tensor,
        blocks: Tensor,
        format: int,
        bias: Tensor | None = None,
        compute: str = "exact",
        packed: bool = False,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype) if x.dtype in _FLOATS else x
        bias = bias.to(dtype) if bias is not None and bias.dtype in _FLOATS else bias
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return _linear_op(x, blocks, format, bias, compute, packed)

    _library.impl("linear", linear_autocast, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


# ---- vmap: every operator takes leading dimensions, so a batch of x is one more of them ----------


def _each(function: Any, info: Any, in_dims: tuple[int | None, ...], args: Any) -> Tensor:
    """One call for each sample of the batch, for arguments that no single call can take."""

    def sample(index: int) -> Tensor:
        return function(
            *(arg if dim is None else arg.select(dim, index)
              for arg, dim in zip(args, in_dims, strict=True))
        )  # fmt: skip

    if info.batch_size:
        return torch.stack([sample(index) for index in range(info.batch_size)])
    padded = [
        arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:]).unsqueeze(dim)
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    args = padded
    one = sample(0)
    return one.new_empty((0, *one.shape))


def _batch_first(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.movedim(dim, 0)


def _register_vmap(op: str) -> None:
    """A batch of the first argument is one call; a batch of any other is a call for each sample."""
    function = getattr(_ops, op).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[1:]):
            return _each(function, info, in_dims, args), 0
        return function(_batch_first(args[0], in_dims[0]), *args[1:]), 0

    torch.library.register_vmap(f"torch_q4::{op}", rule)


for _op in ("quantize", "dequantize", "linear_transposed", "embedding"):
    _register_vmap(_op)


def _linear_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    blocks: Tensor,
    format: int,
    bias: Tensor | None = None,
    compute: str = "exact",
    packed: bool = False,
) -> tuple[Tensor, int]:
    """As above; a batch of the bias is one product, to which each sample's bias is added."""
    x_dim, blocks_dim = in_dims[:2]
    bias_dim = in_dims[3] if len(in_dims) > 3 else None
    if blocks_dim is not None:
        args = (x, blocks, format, bias, compute, packed)
        dims = (x_dim, blocks_dim, None, bias_dim, None, None)
        return _each(_linear_op, info, dims, args), 0
    x = _batch_first(x, x_dim)
    if bias is None or bias_dim is None:
        return _linear_op(x, blocks, format, bias, compute, packed), 0
    y = _linear_op(x, blocks, format, None, compute, packed)
    if x_dim is None:
        y = y.unsqueeze(0)
    biases = _batch_first(bias, bias_dim)
    return y + biases.reshape(-1, *(1,) * (y.dim() - 2), biases.shape[-1]), 0


torch.library.register_vmap("torch_q4::linear", _linear_vmap)


# ---- operations, as torch.utils.flop_counter counts them: those of the dense product -------------


def _count(x_shape: Any, blocks_shape: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Two for each weight and row: ``out_shape`` and the shape of x end in N and K, or K and N."""
    return 2 * math.prod(out_shape) * x_shape[-1]


for _op in ("linear", "linear_transposed", "_linear_with"):
    register_flop_formula(getattr(_ops, _op))(_count)
