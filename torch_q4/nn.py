"""Modules whose weights stay in blocks: drop-in for ``nn.Linear`` and ``nn.Embedding``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_q4 import formats
from torch_q4.formats import Format
from torch_q4.ops import FormatLike, _check_blocks, dequantize, linear_unchecked, quantize

__all__ = ["QuantEmbedding", "QuantLinear", "QuantizeReport", "pack_", "quantize_"]

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


@dataclasses.dataclass
class QuantizeReport:
    """What :func:`quantize_` did.

    Attributes:
        quantized: the name of each module that was replaced, and its format.
        skipped: the name of each module that was chosen but left as it is, and why.
        bytes_before: bytes of the replaced weights, each tied one counted once.
        bytes_after: bytes of their blocks, likewise.
    """

    quantized: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0


def quantize_(
    model: nn.Module,
    fmt: FormatLike | Mapping[str, FormatLike] | Callable[[str], FormatLike | None],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    importance: Mapping[str, Tensor] | None = None,
    compute: str = "exact",
) -> QuantizeReport:
    """Replaces a model's linear and embedding layers by quantised ones, in place.

    Layers that share a weight share its blocks afterwards. A layer whose columns are no whole
    number of blocks, or whose weight is not float32, float16 or bfloat16, is left as it is and
    reported. Nothing is replaced before every format has been understood.

    Args:
        model: any module. A model that is itself a layer cannot be replaced in place: use
            ``QuantLinear.from_linear``.
        fmt: one format; or formats by module name, modules without one left alone; or a function
            of the name that returns a format or None.
        filter_fn: ``filter_fn(module, name)`` says which layers to quantise, torchao's way; by
            default all of ``nn.Linear`` and ``nn.Embedding`` (subclasses, which may do more than
            the layer itself, are left alone).
        importance: float32 ``(in_features,)`` by module name, see :func:`torch_q4.quantize`.
        compute: the arithmetic of the linear layers, see :func:`torch_q4.linear`.

    Returns:
        What was quantised and what was skipped, with the reason.

    Raises:
        ValueError: unknown format or ``compute``, a name that no layer of the model has, or a
            model that is itself a layer.
        TypeError: a format of a wrong type.
    """
    if compute not in ("exact", "int8"):
        raise ValueError(f"quantize_: compute must be exact or int8, got {compute}")
    if type(model) in (nn.Linear, nn.Embedding):
        raise ValueError(
            f"quantize_: model must hold the layers to replace, got a bare "
            f"{type(model).__name__}; use QuantLinear.from_linear or QuantEmbedding.from_embedding"
        )
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in (nn.Linear, nn.Embedding)
    }
    for what, names in (("fmt", fmt), ("importance", importance)):
        unknown = sorted(set(names) - set(layers)) if isinstance(names, Mapping) else []
        if unknown:
            raise ValueError(f"quantize_: {what} must name layers of the model, got {unknown}")

    chosen: dict[str, Format] = {}
    for name, module in layers.items():
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if isinstance(fmt, Mapping):
            wanted = fmt.get(name)
        elif callable(fmt):
            wanted = fmt(name)
        else:
            wanted = fmt
        if wanted is not None:
            chosen[name] = formats.get(wanted)

    report = QuantizeReport()
    replaced: dict[int, nn.Module] = {}  # a module that stands in two places stays one
    blocks_of: dict[tuple[int, str], nn.Parameter] = {}  # and so does a weight of two modules
    keep_alive: list[nn.Module] = []  # ids above stay unique while their owners live
    for name, found in chosen.items():
        module = layers[name]
        reason = _reason_to_skip(module, found)
        if reason is not None:
            report.skipped[name] = reason
            continue
        keep_alive.append(module)
        if id(module) not in replaced:
            key = (id(module.weight), found.name)
            if key not in blocks_of:
                weight = module.weight.detach()
                weights = importance.get(name) if importance is not None else None
                blocks = quantize(weight, found, weights)
                _ops.pack_.default(blocks, found.type_id)
                blocks_of[key] = nn.Parameter(blocks, requires_grad=False)
                report.bytes_before += weight.numel() * weight.element_size()
                report.bytes_after += blocks.numel()
            replaced[id(module)] = _replacement(module, blocks_of[key], found, compute)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replaced[id(module)])
        report.quantized[name] = found.name
    return report


def _reason_to_skip(module: nn.Module, fmt: Format) -> str | None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    columns = weight.shape[-1]
    if columns % fmt.block_elems:
        return f"columns must be a multiple of {fmt.block_elems} for {fmt.name}, got {columns}"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"weight must be float32, float16 or bfloat16, got {weight.dtype}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm must be None, got {module.max_norm}"
    return None


def _replacement(
    module: nn.Module, blocks: nn.Parameter, fmt: Format, compute: str
) -> QuantLinear | QuantEmbedding:
    new: QuantLinear | QuantEmbedding
    if isinstance(module, nn.Linear):
        new = QuantLinear.from_blocks(blocks, fmt, module.bias, compute=compute, packed=True)
    else:
        assert isinstance(module, nn.Embedding)
        new = QuantEmbedding.from_blocks(
            blocks, fmt, module.weight.dtype, module.padding_idx, packed=True
        )
    return new.train(module.training)
