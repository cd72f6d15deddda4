"""Modules whose weights stay in blocks: drop-in for ``nn.Linear`` and ``nn.Embedding``."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_q4 import formats
from torch_q4.formats import Format
from torch_q4.ops import (
    _FLOATS,
    FormatLike,
    _check_blocks,
    dequantize,
    linear_unchecked,
    quantize,
)

__all__ = ["QuantEmbedding", "QuantLinear", "ScaledQuantEmbedding", "embedding_scale", "pack_"]

_ops = torch.ops.torch_q4


def _blocks_parameter(blocks: Tensor, op: str, fmt: Format) -> nn.Parameter:
    """``blocks`` as a parameter; a parameter that is passed in is kept, and so are its ties.

    A parameter and not a buffer: ``Module.to`` moves a parameter in place, so modules that share
    one still share it afterwards, where a shared buffer would be copied for each.
    """
    _check_blocks(op, blocks, fmt, matrix=True)
    if isinstance(blocks, nn.Parameter):
        return blocks
    return nn.Parameter(blocks, requires_grad=False)


class _Quantized(nn.Module):
    """A weight in blocks: what QuantLinear and QuantEmbedding share.

    The blocks are kept in one of two orders of the same bytes: GGML's own, or the packed layout
    that kernels read faster (:func:`torch_q4.pack`). ``state_dict`` holds GGML's own bytes in any
    case, as ``weight``, and the format's type number beside them, as ``weight_format``; loading
    checks it.

    The blocks are integers: ``requires_grad`` cannot be set on them and casts such as ``.half()``
    pass them by.
    """

    blocks: nn.Parameter
    format: str
    packed: bool

    def __init__(self, rows: int, columns: int, fmt: FormatLike, device: Any) -> None:
        super().__init__()
        found = formats.get(fmt)
        self.format = found.name
        self._type_id = found.type_id
        self.packed = True  # nothing is in it yet: what is loaded will be packed
        blocks = torch.empty(rows, found.row_bytes(columns), dtype=torch.uint8, device=device)
        self.blocks = nn.Parameter(blocks, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """GGML's own bytes, uint8 ``(rows, bytes_per_row)``: a copy where the layer is packed."""
        if self.packed:
            return _ops.unpack.default(self.blocks.detach(), self._type_id)
        return self.blocks

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight's values, ``(rows, columns)`` in ``dtype``."""
        return dequantize(self.weight, self.format, dtype)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Sets ``requires_grad`` of the bias, where there is one; blocks cannot be trained."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(requires_grad)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        destination[prefix + "weight_format"] = torch.tensor(self._type_id, dtype=torch.int32)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "blocks"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours, theirs = prefix + "blocks", prefix + "weight"
        key = prefix + "weight_format"
        stored = state_dict.get(key)
        if stored is None:
            missing_keys.append(key)
        elif int(stored) != self._type_id:
            error_msgs.append(
                f"{key}: the format must be {self.format} ({self._type_id}), got {int(stored)}"
            )
            return
        # The parameter is called `blocks`; everything that is said of it says `weight`.
        renamed = {theirs: ours}
        inner = {
            renamed.get(name, name): value for name, value in state_dict.items() if name != key
        }
        missing: list[str] = []
        errors: list[str] = []
        super()._load_from_state_dict(
            inner, prefix, local_metadata, strict, missing, unexpected_keys, errors
        )
        missing_keys += [theirs if name == ours else name for name in missing]
        error_msgs += [text.replace(ours, theirs) for text in errors]
        if theirs not in state_dict or errors:
            return
        if local_metadata.get("assign_to_params_buffers", False):
            self.packed = False  # the caller's own tensor, in GGML's order
        elif self.packed and not self.blocks.is_meta:
            _ops.pack_.default(self.blocks.detach(), self._type_id)


class QuantLinear(_Quantized):
    """``y = x @ W.T + b`` with W in blocks; replaces ``nn.Linear``.

    The constructor leaves the weight uninitialised, to be loaded; ``from_linear`` and
    ``from_blocks`` make one from weights.

    Args:
        in_features: K, a whole number of blocks.
        out_features: N.
        fmt: the format, by name or ggml type.
        bias: whether there is a bias.
        compute: ``"exact"`` or ``"int8"``, see :func:`torch_q4.linear`. May be changed later.
        device: where the weight and the bias live; ``"meta"`` for neither.
        dtype: the bias's dtype.

    Attributes:
        weight: uint8 ``(N, K // block_elems * block_bytes)``, GGML's own bytes; read-only.
        blocks: the parameter that stores them, in GGML's order or packed.
        packed: whether ``blocks`` is packed, see :func:`pack_`.
        bias: ``(N,)``, or None.
        format: the format's name.

    Raises:
        ValueError: unknown format, or ``in_features`` that is no whole number of blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: FormatLike,
        bias: bool = True,
        *,
        compute: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, fmt, device)
        if compute not in ("exact", "int8"):
            raise ValueError(f"QuantLinear: compute must be exact or int8, got {compute}")
        self.in_features = in_features
        self.out_features = out_features
        self.compute = compute
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        fmt: FormatLike,
        bias: Tensor | None = None,
        *,
        compute: str = "exact",
        packed: bool = False,
    ) -> QuantLinear:
        """A layer over blocks that exist; nothing is copied, and nothing is changed.

        Args:
            blocks: uint8 ``(N, bytes_per_row)``. An ``nn.Parameter`` is used as it is, so layers
                made from the same one are tied.
            fmt: the blocks' format.
            bias: ``(N,)`` in the dtype of the activations to come, or None.
            compute: see :func:`torch_q4.linear`.
            packed: whether the blocks come from :func:`torch_q4.pack`.

        Raises:
            ValueError: unknown format, or shapes that do not fit it.
            TypeError: blocks that are not uint8.
        """
        found = formats.get(fmt)
        weight = _blocks_parameter(blocks, "QuantLinear.from_blocks", found)
        if bias is not None and tuple(bias.shape) != (blocks.shape[0],):
            raise ValueError(
                f"QuantLinear.from_blocks: bias must have shape ({blocks.shape[0]},), "
                f"got {tuple(bias.shape)}"
            )
        columns = found.columns(blocks.shape[1])
        layer = cls(columns, blocks.shape[0], found, False, compute=compute, device="meta")
        layer.blocks, layer.packed = weight, packed
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        fmt: FormatLike,
        importance: Tensor | None = None,
        *,
        compute: str = "exact",
    ) -> QuantLinear:
        """Quantises a linear layer's weight; its bias is shared, not copied.

        Args:
            linear: the layer; ``in_features`` must be a whole number of blocks.
            fmt: the format to quantise to.
            importance: float32 ``(in_features,)``, see :func:`torch_q4.quantize`.
            compute: see :func:`torch_q4.linear`.

        Raises:
            ValueError: unknown format, or ``in_features`` that is no whole number of blocks.
        """
        blocks = quantize(linear.weight.detach(), fmt, importance)
        layer = cls.from_blocks(blocks, fmt, linear.bias, compute=compute)
        return pack_(layer).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., K)`` to ``(..., N)`` in the dtype of ``x``."""
        return linear_unchecked(x, self.blocks, self._type_id, self.bias, self.compute, self.packed)

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"format={self.format}, bias={self.bias is not None}, compute={self.compute}"
        )


class QuantEmbedding(_Quantized):
    """A table of rows in blocks; replaces ``nn.Embedding``.

    Rows come out in the module's floating dtype: float32 at first, and what ``.to(dtype)``,
    ``.half()`` or ``.bfloat16()`` says later.

    Args:
        num_embeddings: rows.
        embedding_dim: K, a whole number of blocks.
        fmt: the format, by name or ggml type.
        padding_idx: kept for callers that read it, as of ``nn.Embedding``; it concerns training
            only, and blocks are not trained.
        device: where the weight lives; ``"meta"`` for nowhere.
        dtype: the dtype of the rows that come out.

    Attributes:
        weight: uint8 ``(num_embeddings, K // block_elems * block_bytes)``, GGML's own bytes;
            read-only.
        blocks: the parameter that stores them, in GGML's order or packed.
        packed: whether ``blocks`` is packed, see :func:`pack_`.
        format: the format's name.

    Raises:
        ValueError: unknown format, or ``embedding_dim`` that is no whole number of blocks.
    """

    _dtype_marker: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        fmt: FormatLike,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, fmt, device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        # An empty float buffer: Module.to casts it along with everything else, and so tells the
        # dtype that is wanted now.
        marker = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("_dtype_marker", marker, persistent=False)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        fmt: FormatLike,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        *,
        packed: bool = False,
    ) -> QuantEmbedding:
        """A table over blocks that exist; nothing is copied, and nothing is changed.

        Args:
            blocks: uint8 ``(rows, bytes_per_row)``. An ``nn.Parameter`` is used as it is, so
                modules made from the same one are tied.
            fmt: the blocks' format.
            dtype: the dtype of the rows that come out.
            padding_idx: see the class.
            packed: whether the blocks come from :func:`torch_q4.pack`.

        Raises:
            ValueError: unknown format, or shapes that do not fit it.
            TypeError: blocks that are not uint8.
        """
        found = formats.get(fmt)
        weight = _blocks_parameter(blocks, "QuantEmbedding.from_blocks", found)
        columns = found.columns(blocks.shape[1])
        module = cls(blocks.shape[0], columns, found, padding_idx, device="meta", dtype=dtype)
        module.blocks, module.packed = weight, packed
        module._dtype_marker = torch.empty(0, dtype=dtype, device=blocks.device)
        return module

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, fmt: FormatLike, importance: Tensor | None = None
    ) -> QuantEmbedding:
        """Quantises an embedding's table; rows come out in the dtype that the table had.

        Raises:
            ValueError: unknown format, ``embedding_dim`` that is no whole number of blocks, or an
                embedding with ``max_norm``, which would have to rewrite rows at look-up.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"QuantEmbedding: max_norm must be None, got {embedding.max_norm}")
        blocks = quantize(embedding.weight.detach(), fmt, importance)
        module = cls.from_blocks(blocks, fmt, embedding.weight.dtype, embedding.padding_idx)
        return pack_(module).train(embedding.training)

    def forward(self, indices: Tensor) -> Tensor:
        """Maps int64 or int32 ``(...)`` to ``(..., K)``."""
        dtype = self._dtype_marker.dtype
        return _ops.embedding.default(indices, self.blocks, self._type_id, dtype, self.packed)

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"format={self.format}, dtype={self._dtype_marker.dtype}"
        )


class ScaledQuantEmbedding(QuantEmbedding):
    """A packed embedding whose rows are multiplied by a constant, as Gemma's are.

    Attributes:
        embed_scale: the constant, a scalar buffer; 1 until it is set.
    """

    embed_scale: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.ones((), device="cpu"), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        """Maps int64 or int32 ``(...)`` to ``(..., K)``."""
        rows = super().forward(indices)
        # Rounded to the rows' dtype first: so the models were trained.
        return rows * self.embed_scale.to(rows.dtype)


def embedding_scale(module: nn.Embedding | QuantEmbedding) -> Tensor | None:
    """The constant by which a subclass of an embedding multiplies its rows.

    It is the attribute ``embed_scale``, a number or a buffer, as transformers' models have it. The
    module's own ``forward`` is tried on a few rows and must give these products bit for bit.

    Returns:
        The constant, on the weight's device, or None where the module does anything else.
    """
    if isinstance(module, ScaledQuantEmbedding):
        return module.embed_scale
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, (int, float)):
        scale = torch.tensor(float(scale))
    weight = module.weight
    if not isinstance(scale, Tensor) or isinstance(scale, nn.Parameter) or scale.dim() != 0:
        return None
    if not scale.is_floating_point() or scale.is_meta or weight.dtype not in _FLOATS:
        return None
    # A copy of the module with a few rows of its own, for the real ones may all be zero.
    rows, columns = 16, module.embedding_dim
    twin = copy.copy(module)
    table = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    vars(twin).update(
        _parameters={"weight": nn.Parameter(table, requires_grad=False)},
        _buffers={name: value.cpu() for name, value in module._buffers.items()
                  if value is not None},
        num_embeddings=rows,
        padding_idx=None,
    )  # fmt: skip
    last = weight.shape[0] - 1
    edges = {0, 1, last // 2, last, module.padding_idx or 0}
    trials = [(twin, torch.arange(rows).view(2, -1)), (twin, torch.tensor([3]))]
    if not weight.is_meta:
        trials.append((module, torch.tensor(sorted(edges), device=weight.device)))
    for trial, ids in trials:
        was_training = trial.training
        for training in (False, True):
            trial.training = training
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    found = trial.forward(ids)
            except Exception:
                return None
            finally:
                trial.training = was_training
            wanted = nn.functional.embedding(ids, trial.weight)
            wanted = wanted * scale.to(wanted)
            if not isinstance(found, Tensor) or found.dtype != wanted.dtype:
                return None
            if not torch.equal(found, wanted):
                return None
    return scale.detach().to(weight.device)


_Model = TypeVar("_Model", bound=nn.Module)


def pack_(model: _Model) -> _Model:
    """Puts the weights of every quantised layer into the packed layout, in place.

    Kernels read it faster. Layers made by ``from_linear``, ``quantize_`` or the constructor are
    packed already; those made by ``from_blocks`` leave the caller's blocks alone until this is
    called. A weight that layers share is packed once; all of those layers must be in ``model``.

    Args:
        model: a quantised layer, or any module that holds some.

    Returns:
        ``model``.
    """
    layers = [module for module in model.modules() if isinstance(module, _Quantized)]
    waiting = {id(layer.blocks): layer for layer in layers if not layer.packed}
    for layer in waiting.values():
        blocks = layer.blocks.detach()
        if not blocks.is_contiguous():
            layer.blocks.data = blocks = blocks.contiguous()
        if not blocks.is_meta:
            _ops.pack_.default(blocks, layer._type_id)
    for layer in layers:
        layer.packed = True
    return model
