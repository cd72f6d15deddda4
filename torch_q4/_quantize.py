"""``quantize_``: a model's layers replaced by quantised ones, in place."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_q4 import _survey, formats, recipes
from torch_q4._tensors import TensorInfo
from torch_q4.formats import Format
from torch_q4.nn import (
    QuantEmbedding,
    QuantLinear,
    ScaledQuantEmbedding,
    _Quantized,
    embedding_scale,
)
from torch_q4.ops import _FLOATS, FormatLike, _format, quantize

__all__ = ["Kept", "QuantizeReport", "quantize_"]

_ops = torch.ops.torch_q4


class Kept(NamedTuple):
    """A tensor that is not quantised.

    Attributes:
        reason: why.
        nbytes: its size; 0 where it is another name of memory that is counted already.
    """

    reason: str
    nbytes: int


@dataclasses.dataclass
class QuantizeReport:
    """What :func:`quantize_` did, and what the model takes.

    The sizes are those of the model's parameters and buffers, memory that several share counted
    once. ``bytes_after`` is ``quantized_bytes`` plus the bytes of everything in ``kept``.

    Attributes:
        quantized: the name of each module that was replaced, and its format.
        fallbacks: of these, each whose columns do not fit the format that was asked for, and that
            format.
        kept: the name of each parameter and buffer that stays as it is, why, and its bytes.
        bytes_before: bytes of the whole model before.
        bytes_after: bytes of the whole model now.
        quantized_bytes: of these, bytes in blocks that were made.
        mix: the rule by which a mix chose, where a mix was asked for.
    """

    quantized: dict[str, str] = dataclasses.field(default_factory=dict)
    fallbacks: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: dict[str, Kept] = dataclasses.field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    quantized_bytes: int = 0
    mix: str | None = None

    @property
    def ratio(self) -> float:
        """The model's size now, as a part of what it was."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def __str__(self) -> str:
        """A table: what became of which bytes."""
        before, after = _size(self.bytes_before), _size(self.bytes_after)
        lines = [f"model      {before} -> {after} (ratio {self.ratio:.2f})"]
        if self.mix is not None:
            lines.append(f"mix        {self.mix}")
        formats_found = Counter(self.quantized.values())
        listed = ", ".join(f"{count} {name}" for name, count in formats_found.most_common())
        lines.append(f"quantized  {_size(self.quantized_bytes)}: {listed or 'no layers'}")
        changes = Counter((self.quantized[name], wanted) for name, wanted in self.fallbacks.items())
        for (found, wanted), count in changes.most_common():
            lines.append(f"fallback   {count} {found} instead of {wanted}")
        sizes: Counter[str] = Counter()
        names: dict[str, list[str]] = {}
        for name, (reason, size) in self.kept.items():
            sizes[reason] += size
            names.setdefault(reason, []).append(name)
        for reason, size in sizes.most_common():
            first = names[reason][0]
            more = f" and {len(names[reason]) - 1} more" if len(names[reason]) > 1 else ""
            lines.append(f"kept       {_size(size)}: {reason}: {first}{more}")
        return "\n".join(lines)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


# What a user names: one format, a mix, or formats by module.
_Wanted = (
    FormatLike | recipes.Recipe | Mapping[str, FormatLike] | Callable[[str], FormatLike | None]
)


def quantize_(
    model: nn.Module,
    fmt: _Wanted,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    importance: Mapping[str, Tensor] | None = None,
    compute: str = "exact",
    fallback: bool = True,
) -> QuantizeReport:
    """Replaces a model's linear and embedding layers by quantised ones, in place.

    Replaced are ``nn.Linear``, ``nn.Embedding``, and subclasses of ``nn.Embedding`` that do nothing
    but multiply the rows by a constant (Gemma's, Bart's). Forward and backward hooks move along.
    Everything else stays as it is and is reported with its bytes and the reason: other subclasses
    and modules, weights that are parametrised, not initialised yet, or read by another module past
    the layer's own ``forward``, rows that no format fits.

    Layers that share a weight share its blocks afterwards. They are quantised together or not at
    all: where one of them is not chosen or cannot be replaced, all of them stay. A module that
    stands under several names is chosen where one of its names is.

    The model changes once all blocks are made: an error leaves it as it was. Until then both the
    weights and their blocks take memory.

    A mix chooses a format for each tensor as llama.cpp does, for the transformers models that
    :mod:`torch_q4.recipes` knows (Gemma 3, Llama, Qwen2, Qwen3 as causal language models). In any
    other model the output layer gets what the mix gives it, q6_k or q8_0, and every other layer the
    mix's base format; the output layer is the one that ``model.get_output_embeddings()`` returns,
    and any linear layer that shares its weight with an embedding.

    Args:
        model: any module. A model that is itself a layer cannot be replaced in place: use
            ``QuantLinear.from_linear``.
        fmt: one format for all; or the name of a mix in any case, such as ``"q4_k_m"``; or a
            :class:`torch_q4.recipes.Recipe`, for those mixes that are called as a format is; or
            formats by module name, modules without one left alone; or a function of the name that
            returns a format or None.
        filter_fn: ``filter_fn(module, name)`` says which layers to quantise, torchao's way; by
            default all. It is asked for each ``nn.Linear`` and ``nn.Embedding``.
        importance: float32 ``(in_features,)`` by module name, see :func:`torch_q4.quantize`. Layers
            that share a weight share the mean of theirs.
        compute: the arithmetic of the linear layers, see :func:`torch_q4.linear`.
        fallback: whether a layer whose columns are no whole number of blocks gets the format that
            llama.cpp takes then: q4_0 for q2_k and q3_k, q5_0 for q4_k, q5_1 for q5_k, q8_0 for
            q6_k. Without it such a layer stays as it is.

    Returns:
        What was quantised, what was kept and why, and the model's real sizes; ``print`` shows it as
        a table.

    Raises:
        ValueError: unknown format or ``compute``, a name that no layer of the model has, layers
            that share a weight with different formats, a weight that is on the meta device or not
            finite, importance that does not fit, or a model that is itself a layer.
        TypeError: a format or importance of a wrong type.
    """
    if compute not in ("exact", "int8"):
        raise ValueError(f"quantize_: compute must be exact or int8, got {compute}")
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"quantize_: model must hold the layers to replace, got a bare "
            f"{type(model).__name__}; use QuantLinear.from_linear or QuantEmbedding.from_embedding"
        )
    plan = _Plan(model, fmt, filter_fn, importance, fallback)
    report = QuantizeReport(bytes_before=plan.bytes_before, mix=plan.mix)
    made: set[int] = set()
    formats_of: dict[str, str] = {}
    # All blocks, and all modules, before the first is put in: an error leaves the model as it was.
    replacements: list[tuple[str, QuantLinear | QuantEmbedding]] = []
    for weight in plan.weights:
        blocks = weight.blocks()
        made.add(id(blocks))
        for layer in weight.layers:
            new = _replacement(layer.module, blocks, weight.fmt, compute, layer.scale)
            replacements += [(name, new) for name in layer.names]
            for name in layer.names:
                formats_of[name] = weight.fmt.name
                if weight.wanted != weight.fmt:
                    report.fallbacks[name] = weight.wanted.name
    for name, new in replacements:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    held = _survey.tensors(model)
    for entry, size in zip(held, _survey.measured(held), strict=True):
        report.bytes_after += size
        if id(entry.tensor) in made:
            report.quantized[entry.path] = formats_of[entry.path]
            report.quantized_bytes += size
        elif size or _survey.nbytes(entry.tensor) or is_lazy(entry.tensor):
            report.kept[entry.name] = Kept(plan.reason(entry), size)
    return report


@dataclasses.dataclass
class _Layer:
    """A module that may be replaced.

    Attributes:
        module: the module.
        names: all its names in the model.
        scale: by what a scaled embedding multiplies its rows.
    """

    module: nn.Linear | nn.Embedding
    names: list[str]
    scale: Tensor | None = None


@dataclasses.dataclass
class _Weight:
    """A weight that is to be quantised, and the layers that have it.

    Attributes:
        layers: one, or several that are tied.
        fmt: the format that it gets.
        wanted: the format that was asked for.
        importance: of its columns, if there is any.
    """

    layers: list[_Layer]
    fmt: Format
    wanted: Format
    importance: Tensor | None = None

    @property
    def name(self) -> str:
        return self.layers[0].names[0]

    def blocks(self) -> nn.Parameter:
        """The quantised weight, packed."""
        dense = self.layers[0].module.weight.detach()
        try:
            blocks = quantize(dense, self.fmt, self.importance)
        except (ValueError, TypeError) as error:
            raise type(error)(f"quantize_: {self.name!r}: {error}") from error
        _ops.pack_.default(blocks, self.fmt.type_id)
        return nn.Parameter(blocks, requires_grad=False)


class _Plan:
    """What :func:`quantize_` is going to do; making it raises every error.

    Attributes:
        weights: those to quantise, in the model's order.
        bytes_before: the model's size.
        mix: the rule by which a mix chose.
    """

    def __init__(
        self,
        model: nn.Module,
        fmt: _Wanted,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        importance: Mapping[str, Tensor] | None,
        fallback: bool,
    ) -> None:
        held = _survey.tensors(model)
        self.bytes_before = sum(_survey.measured(held))
        self.weights: list[_Weight] = []
        self.mix: str | None = None
        # Why a tensor stays, by the module and the tensor's name there. The modules stay, too, so
        # the ids are theirs.
        self.reasons: dict[tuple[int, str], str] = {}
        self.layers = _layers(model)
        self.read = _survey.weights_read(model)
        self._check_names(model, fmt, importance)

        # What is one memory is one weight, whoever holds it.
        owners: dict[object, list[_survey.Held]] = {}
        for entry in held:
            others = owners.setdefault(entry.view, [])
            if all((entry.module, entry.leaf) != (each.module, each.leaf) for each in others):
                others.append(entry)
        tied = {
            view: entries
            for view, entries in owners.items()
            if any(id(each.module) in self.layers and each.leaf == "weight" for each in entries)
        }
        shaped = [entries for entries in tied.values() if not is_lazy(entries[0].tensor)]
        wanted = self._wanted(model, fmt, filter_fn, shaped, bool(importance))
        overlapping = _survey.overlapping(held)
        for view, entries in tied.items():
            self._decide(entries, wanted, importance or {}, fallback, view in overlapping)
        for layer in self.layers.values():
            self._note_computed(layer)
        for weight in self.weights:
            _check_finite(weight)
        del self.layers, self.read

    def reason(self, entry: _survey.Held) -> str:
        """Why a tensor of the model is not quantised."""
        module, leaf = entry.module, entry.leaf
        found = self.reasons.get((id(module), leaf))
        if found is not None:
            return found
        if is_lazy(entry.tensor):
            return "not initialised yet"
        if isinstance(module, _Quantized) and leaf == "blocks":
            return f"quantised already, {module.format}"
        if entry.is_buffer:
            return "buffers"
        if entry.tensor.dim() < 2:
            return "biases and norms: tensors of fewer than 2 dimensions"
        dimensions = f"{entry.tensor.dim()} dimensions"
        return f"{type(module).__name__} is no nn.Linear or nn.Embedding ({dimensions})"

    def _check_names(
        self, model: nn.Module, fmt: _Wanted, importance: Mapping[str, Tensor] | None
    ) -> None:
        known = {
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, (nn.Linear, nn.Embedding, _Quantized))
        }
        for what, names in (("fmt", fmt), ("importance", importance)):
            unknown = sorted(set(names) - known) if isinstance(names, Mapping) else []
            if unknown:
                raise ValueError(f"quantize_: {what} must name layers of the model, got {unknown}")

    def _wanted(
        self,
        model: nn.Module,
        fmt: _Wanted,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        tied: list[list[_survey.Held]],
        has_importance: bool,
    ) -> dict[int, Format]:
        """The format that is asked for, by the layer's id; layers that are not chosen left out."""
        by_name: Callable[[str], FormatLike | None]
        if isinstance(fmt, Mapping):
            by_name = {name: _format("quantize_", each) for name, each in fmt.items()}.get
        elif not isinstance(fmt, (Format, recipes.Recipe)) and callable(fmt):
            by_name = fmt
        else:
            found = _format_or_mix(fmt)
            if isinstance(found, Format):
                by_name = lambda name: found  # noqa: E731
            else:
                self.mix, mixed = _mixed(model, found, tied, has_importance)
                by_name = mixed.get
        wanted: dict[int, Format] = {}
        for key, layer in self.layers.items():
            for name in layer.names:
                if filter_fn is not None and not filter_fn(layer.module, name):
                    continue
                each = by_name(name)
                if each is None:
                    continue
                new = _format("quantize_", each)
                if wanted.setdefault(key, new) != new:
                    raise ValueError(
                        f"quantize_: the names of one module must have one format, got "
                        f"{wanted[key].name} and {new.name} for {layer.names}"
                    )
        return wanted

    def _decide(
        self,
        entries: list[_survey.Held],
        wanted: dict[int, Format],
        importance: Mapping[str, Tensor],
        fallback: bool,
        overlaps: bool,
    ) -> None:
        """Plans to quantise a weight, or notes why it stays, for everything that holds it."""
        asked = {
            entry.name.removesuffix(".weight"): wanted[id(entry.module)]
            for entry in entries
            if entry.leaf == "weight" and id(entry.module) in wanted
        }
        if len(set(asked.values())) > 1:
            named = {name: each.name for name, each in asked.items()}
            raise ValueError(
                f"quantize_: layers that share a weight must have one format, got {named}"
            )
        layers: list[_Layer] = []
        reasons: list[str | None] = []
        for entry in entries:
            layer = self.layers.get(id(entry.module)) if entry.leaf == "weight" else None
            if layer is None:
                kind = type(entry.module).__name__
                reasons.append(f"{kind} is no nn.Linear or nn.Embedding")
            elif is_lazy(entry.tensor):
                reasons.append("not initialised yet")
            elif id(entry.module) not in wanted:
                reasons.append("not chosen")
            else:
                reasons.append(self._reason_of_layer(layer))
                layers.append(layer)
        tensor = entries[0].tensor
        fmt: Format | None = None
        if not any(reasons):
            first = next(iter(asked.values()))
            fmt = _fitting(first, tensor.shape[-1], fallback) if tensor.dim() == 2 else None
            reasons[0] = _reason_of_weight(tensor, first, fmt, fallback, overlaps)
        if not any(reasons):
            assert fmt is not None
            weight = _Weight(layers, fmt, first)
            weight.importance = _shared_importance(weight, importance)
            if tensor.is_meta:
                raise ValueError(
                    f"quantize_: {weight.name!r}: weight must have data, got a meta tensor"
                )
            self.weights.append(weight)
            return
        cause = next(place for place, reason in enumerate(reasons) if reason)
        for entry, reason in zip(entries, reasons, strict=True):
            why = f"tied to {entries[cause].name}, which stays: {reasons[cause]}"
            self.reasons[id(entry.module), entry.leaf] = reason or why

    def _reason_of_layer(self, layer: _Layer) -> str | None:
        """Why a layer cannot be replaced; finds out by what it scales its rows."""
        module = layer.module
        kind = type(module).__name__
        extra = {*module._buffers, *module._modules, *module._parameters} - {"weight", "bias"}
        if id(module) in self.read:
            return self.read[id(module)]
        if nn.utils.parametrize.is_parametrized(module):
            return "the layer is parametrised"
        if type(module) not in (nn.Linear, nn.Embedding):
            if isinstance(module, nn.Embedding):
                layer.scale = embedding_scale(module)
                extra.discard("embed_scale")
            if layer.scale is None:
                return f"{kind} is a subclass that may do more"
        if "forward" in vars(module):
            return "the object has a forward of its own"
        if extra:
            return f"the layer holds further tensors: {', '.join(sorted(extra))}"
        if any(vars(module)[name] for name in _STATE_HOOKS):
            return "the layer has hooks on its state dict"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"max_norm must be None, got {module.max_norm}"
        return None

    def _note_computed(self, layer: _Layer) -> None:
        """Notes that what a weight is computed from stays, as under weight_norm or pruning."""
        module = layer.module
        if module._parameters.get("weight") is not None:
            return
        for part in module.modules():
            for leaf in part._parameters:
                if leaf != "bias":
                    why = f"the weight of {layer.names[0]} is computed from it"
                    self.reasons.setdefault((id(part), leaf), why)


def _layers(model: nn.Module) -> dict[int, _Layer]:
    """The linear and embedding layers of a model, by id."""
    found: dict[int, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            found.setdefault(id(module), _Layer(module, [])).names.append(name)
    return found


def _format_or_mix(fmt: FormatLike | recipes.Recipe) -> Format | recipes.Recipe:
    if isinstance(fmt, recipes.Recipe):
        return fmt
    try:
        found = formats.get(fmt)
    except TypeError as error:
        raise TypeError(f"quantize_: {error}") from None
    except ValueError:
        pass
    else:
        found.check_quantizes("quantize_")
        return found
    names = [each.name for each in formats.all() if each.quantizes]
    mixes = [each.name for each in recipes.all() if each.name not in names]
    if isinstance(fmt, str) and fmt.lower() in mixes:
        return recipes.get(fmt)
    raise ValueError(
        f"quantize_: format must be one of {', '.join(names)}, or a mix, one of "
        f"{', '.join(mixes)}, got {fmt!r}"
    )


def _mixed(
    model: nn.Module,
    recipe: recipes.Recipe,
    tied: list[list[_survey.Held]],
    has_importance: bool,
) -> tuple[str, dict[str, Format]]:
    """By which rule a mix chooses in this model, and each layer's format."""
    known = _gguf_names(model)
    found: dict[str, Format] = {}
    if known is not None:
        names, facts = known
        # A weight that layers share is one tensor of the file: the embedding's.
        infos: dict[str, list[_survey.Held]] = {}
        for entries in tied:
            theirs = [names[each.path] for each in entries if each.path in names]
            infos["token_embd" if "token_embd" in theirs else theirs[0]] = entries
        chosen = recipes.wanted(
            recipe,
            [
                TensorInfo(f"{name}.weight", None, tuple(entries[0].tensor.shape), torch.float32)
                for name, entries in infos.items()
            ],
            facts,
            has_importance=has_importance,
        )
        for name, entries in infos.items():
            fmt = chosen[f"{name}.weight"]
            if fmt is not None:
                found.update({each.path: fmt for each in entries})
        return f"{recipe.name}, as llama.cpp chooses for {facts.architecture}", found
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for entries in tied:
        modules = [each.module for each in entries]
        kinds = {isinstance(each, nn.Embedding) for each in modules}
        is_output = any(each is head for each in modules) or kinds == {True, False}
        fmt = recipe.output(entries[0].tensor.shape[-1]) if is_output else recipe.base
        found.update({each.path: fmt for each in entries})
    return f"{recipe.name}, the general rule: {recipe.base.name}, output layer apart", found


def _gguf_names(model: nn.Module) -> tuple[dict[str, str], recipes.ModelFacts] | None:
    """GGUF's name of each layer of a transformers model; None where the mixes do not know it."""
    if "transformers" not in sys.modules or not hasattr(model, "config"):
        return None
    try:
        from torch_q4.integrations import gguf_export

        names = gguf_export.tensor_names(model)
        facts = gguf_export.Export(model.config).facts
    except (ImportError, ValueError, AttributeError):  # another model, or too old a transformers
        return None
    if facts.architecture not in recipes.ARCHITECTURES:
        return None
    return {ours: name.removesuffix(".weight") for ours, name in names.items()}, facts


def _fitting(fmt: Format, columns: int, fallback: bool) -> Format | None:
    if fallback:
        return recipes.fitting(fmt, columns)
    return None if columns % fmt.block_elems else fmt


def _reason_of_weight(
    weight: Tensor, wanted: Format, fmt: Format | None, fallback: bool, overlaps: bool
) -> str | None:
    """Why a weight cannot be quantised, whoever holds it."""
    if type(weight) is not nn.Parameter:
        return f"weight must be a plain parameter, got {type(weight).__name__}"
    if weight.dtype not in _FLOATS:
        return f"weight must be float32, float16 or bfloat16, got {weight.dtype}"
    if weight.dim() != 2 or not weight.numel():
        return f"weight must be a matrix with elements, got shape {tuple(weight.shape)}"
    if overlaps:
        return "weight shares memory with another tensor of the model, of other shape or strides"
    if fmt is None:
        tried = f"columns must be a multiple of {wanted.block_elems} for {wanted.name}"
        shorter = recipes.fallback(wanted) if fallback else None
        if shorter is not None:
            tried += f" or of {shorter.block_elems} for {shorter.name}"
        return f"{tried}, got {weight.shape[-1]}"
    return None


def _shared_importance(weight: _Weight, importance: Mapping[str, Tensor]) -> Tensor | None:
    """The importance of a weight's columns: the mean of that of its layers."""
    dense = weight.layers[0].module.weight
    found: list[Tensor] = []
    for layer in weight.layers:
        for name in layer.names:
            if name not in importance:
                continue
            each = importance[name]
            if not isinstance(each, Tensor) or each.dtype != torch.float32:
                got = each.dtype if isinstance(each, Tensor) else type(each).__name__
                raise TypeError(f"quantize_: {name!r}: importance must be float32, got {got}")
            if each.shape != dense.shape[-1:]:
                raise ValueError(
                    f"quantize_: {name!r}: importance must have shape ({dense.shape[-1]},), "
                    f"got {tuple(each.shape)}"
                )
            bad = (~(each.isfinite() & (each >= 0))).nonzero()
            if len(bad):
                raise ValueError(
                    f"quantize_: {name!r}: importance must be finite and not negative, got "
                    f"{each[bad[0]].item()} at ({bad[0].item()},)"
                )
            found.append(each.to(dense.device))
            break
    if len(found) > 1:
        return torch.stack(found).mean(0)
    return found[0] if found else None


def _check_finite(weight: _Weight) -> None:
    dense = weight.layers[0].module.weight.detach()
    # The extremes are NaN where any value is, and need no second array of the weight's size.
    if all(bool(extreme.isfinite()) for extreme in dense.aminmax()):
        return
    for number, row in enumerate(dense):
        bad = (~row.isfinite()).nonzero()
        if len(bad):
            column = int(bad[0])
            raise ValueError(
                f"quantize_: {weight.name!r}: weight must be finite, got {row[column].item()} at "
                f"({number}, {column})"
            )


# Hooks that see what goes in and comes out, which is what it was before.
_MOVED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# And those that see the dense weight, which is gone.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _replacement(
    module: nn.Linear | nn.Embedding,
    blocks: nn.Parameter,
    fmt: Format,
    compute: str,
    scale: Tensor | None = None,
) -> QuantLinear | QuantEmbedding:
    new: QuantLinear | QuantEmbedding
    if isinstance(module, nn.Linear):
        new = QuantLinear.from_blocks(blocks, fmt, module.bias, compute=compute, packed=True)
    else:
        kind = QuantEmbedding if scale is None else ScaledQuantEmbedding
        dtype, padding = module.weight.dtype, module.padding_idx
        new = kind.from_blocks(blocks, fmt, dtype, padding, packed=True)
        if isinstance(new, ScaledQuantEmbedding):
            assert scale is not None
            new.embed_scale = scale
    # The very objects, so that the handles that remove a hook still do.
    vars(new).update({name: vars(module)[name] for name in _MOVED_HOOKS})
    return new.train(module.training)
