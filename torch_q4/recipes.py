"""Which format each tensor of a model gets: the mixes that users know by llama.cpp's names.

A mix such as ``q4_k_m`` spends more bits where they matter: on the output layer, on the values of
attention, on the down projections of the first, the last and every third layer between. The rules,
their thresholds and the order in which they count are those of llama.cpp's quantize tool
(``llama-quant.cpp``), for the architectures that :mod:`torch_q4.integrations.transformers` runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from torch_q4 import formats
from torch_q4._tensors import TensorInfo
from torch_q4.formats import Format
from torch_q4.gguf import GGUFArray, GGUFOpaque

__all__ = [
    "ARCHITECTURES",
    "ModelFacts",
    "Recipe",
    "all",
    "choose",
    "fallback",
    "fitting",
    "get",
    "wanted",
]

# Those whose rules are tested here. llama.cpp has special cases for others.
ARCHITECTURES = ("gemma3", "llama", "qwen2", "qwen3")

Type = Format | GGUFOpaque | torch.dtype


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A mix.

    Attributes:
        name: such as ``"q4_k_m"``.
        file_type: llama.cpp's number for it, ``general.file_type`` of a file.
        base: the format that most tensors get.
    """

    name: str
    file_type: int
    base: Format

    def output(self, columns: int) -> Format:
        """What the output layer gets, and the embedding where it is that layer's weight, too."""
        plain = self.base.name == "q8_0" or self.name == "mxfp4_moe"
        if plain or columns % self.base.block_elems:
            return formats.get("q8_0")
        return formats.get("q6_k")


_RECIPES = {
    name: Recipe(name, file_type, formats.get(base))
    for name, file_type, base in (
        ("tq1_0", 36, "tq1_0"),
        ("tq2_0", 37, "tq2_0"),
        ("q2_0", 41, "q2_0"),
        ("q2_k", 10, "q2_k"),
        ("q3_k_s", 11, "q3_k"),
        ("q3_k_m", 12, "q3_k"),
        ("q3_k_l", 13, "q3_k"),
        ("mxfp4_moe", 38, "mxfp4"),
        ("iq4_xs", 30, "iq4_xs"),
        ("iq4_nl", 25, "iq4_nl"),
        ("q4_0", 2, "q4_0"),
        ("q4_1", 3, "q4_1"),
        ("q4_k_s", 14, "q4_k"),
        ("q4_k_m", 15, "q4_k"),
        ("q5_0", 8, "q5_0"),
        ("q5_1", 9, "q5_1"),
        ("q5_k_s", 16, "q5_k"),
        ("q5_k_m", 17, "q5_k"),
        ("q6_k", 18, "q6_k"),
        ("q8_0", 7, "q8_0"),
    )
}
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# What a tensor becomes whose rows are no whole number of the format's blocks.
_FALLBACKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq4_xs": "iq4_nl", "tq1_0": "q4_0", "tq2_0": "q4_0", "q2_0": "q4_0",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model.

    Attributes:
        architecture: GGUF's name of it.
        layers: number of layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        experts: experts of a mixture, 0 where there are none.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ModelFacts:
        """The facts that a GGUF file's metadata states.

        Raises:
            ValueError: a key is missing or no number.
        """
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError(
                f"quantize: metadata 'general.architecture' must be a string, got {architecture!r}"
            )

        def number(name: str, default: int | None = None) -> int:
            key = f"{architecture}.{name}"
            value = metadata.get(key, default)
            if (
                isinstance(value, (list, GGUFArray)) and value
            ):  # one for each layer; the first one counts
                value = value[0]
            if type(value) is not int or value < 0:
                raise ValueError(f"quantize: metadata {key!r} must be a number, got {value!r}")
            return value

        heads = number("attention.head_count")
        return cls(
            architecture,
            number("block_count"),
            heads,
            number("attention.head_count_kv", heads),
            number("expert_count", 0),
        )

    @property
    def queries_per_key(self) -> int:
        """How many query heads share a head of keys."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model, whose eight queries share one value."""
        if self.layers != 80:
            return False
        return self.architecture == "qwen2" or (
            self.architecture == "llama" and self.heads != self.kv_heads
        )


def all() -> list[Recipe]:
    """Every mix, in order of size."""
    return list(_RECIPES.values())


def get(name: str) -> Recipe:
    """Finds a mix by its name in any case; ``q3_k``, ``q4_k`` and ``q5_k`` are the ``_m`` ones.

    Raises:
        ValueError: no such mix; the message lists the known ones. A format without a quantiser.
    """
    lower = name.lower()
    found = _RECIPES.get(_ALIASES.get(lower, lower))
    if found is None:
        for fmt in formats.all():
            if fmt.name == lower:
                fmt.check_quantizes("quantize")
        raise ValueError(f"type must be one of {', '.join(_RECIPES)}, got {name!r}")
    return found


def choose(
    recipe: Recipe | str,
    tensors: Iterable[TensorInfo],
    facts: ModelFacts | None,
    *,
    has_importance: bool = False,
    pure: bool = False,
    overrides: Sequence[tuple[str, Format | str]] = (),
) -> dict[str, Type]:
    """The type of each tensor.

    Args:
        recipe: the mix.
        tensors: the model's tensors, under GGUF's names.
        facts: what the model is; may be None with ``pure``.
        has_importance: whether an importance matrix will be used, which changes some choices.
        pure: give every tensor the mix's base format, for any architecture.
        overrides: ``(pattern, format)``: a tensor in whose name the regular expression is found
            gets that format; the first that fits counts.

    Returns:
        Name to format; for what is not quantised the tensor's own type, a dtype or a
        :class:`GGUFOpaque`; float16 where no format suits the number of columns.

    Raises:
        ValueError: an architecture whose rules are not known, or a bad pattern.
    """
    tensors = list(tensors)
    found = wanted(
        recipe, tensors, facts, has_importance=has_importance, pure=pure, overrides=overrides
    )
    types: dict[str, Type] = {}
    for info in tensors:
        fmt = found[info.name]
        if fmt is None:
            types[info.name] = info.format or info.dtype
        else:
            types[info.name] = fitting(fmt, info.columns) or torch.float16
    return types


def wanted(
    recipe: Recipe | str,
    tensors: Iterable[TensorInfo],
    facts: ModelFacts | None,
    *,
    has_importance: bool = False,
    pure: bool = False,
    overrides: Sequence[tuple[str, Format | str]] = (),
) -> dict[str, Format | None]:
    """The format that a mix asks for, whether or not it suits the number of columns.

    The arguments are those of :func:`choose`.

    Returns:
        Name to format, or to None for what is not quantised.

    Raises:
        ValueError: an architecture whose rules are not known, or a bad pattern.
    """
    recipe = recipe if isinstance(recipe, Recipe) else get(recipe)
    tensors = list(tensors)
    if not pure:
        if facts is None:
            raise ValueError(
                f"quantize: {recipe.name} must know the model's architecture, got none; "
                f"pure gives every tensor {recipe.base.name}"
            )
        if facts.architecture not in ARCHITECTURES:
            raise ValueError(
                f"quantize: the architecture must be one of {', '.join(ARCHITECTURES)}, got "
                f"{facts.architecture!r}; pure gives every tensor {recipe.base.name}"
            )
    try:
        patterns = [(re.compile(pattern), formats.get(fmt)) for pattern, fmt in overrides]
    except re.error as error:
        raise ValueError(
            f"quantize: a pattern must be a regular expression, got {error.pattern!r}: {error}"
        ) from error

    for _, fmt in patterns:
        fmt.check_quantizes("quantize")
    rules = _Rules(recipe, facts, [info.name for info in tensors], has_importance)
    found: dict[str, Format | None] = {}
    for info in sorted(tensors, key=lambda info: _layer_then_name(info.name)):
        if not may_quantize(info):
            found[info.name] = None
            continue
        chosen = next((fmt for pattern, fmt in patterns if pattern.search(info.name)), None)
        if chosen is None:
            chosen = recipe.base if pure else rules.format_of(info)
        found[info.name] = chosen
    return {info.name: found[info.name] for info in tensors}


def fitting(fmt: Format, columns: int) -> Format | None:
    """The format, or where its blocks do not fit, the one that llama.cpp takes instead.

    q2_k, q3_k, tq1_0, tq2_0 and q2_0 become q4_0, q4_k q5_0, q5_k q5_1, q6_k q8_0 and iq4_xs
    iq4_nl, whose blocks are shorter.

    Returns:
        None if the number of columns suits neither.
    """
    for each in (fmt, fallback(fmt)):
        if each is not None and columns % each.block_elems == 0:
            return each
    return None


def fallback(fmt: Format) -> Format | None:
    """The format of shorter blocks that llama.cpp takes where this one's do not fit, if any."""
    name = _FALLBACKS.get(fmt.name)
    return formats.get(name) if name is not None else None


def may_quantize(info: TensorInfo) -> bool:
    """Whether a tensor is one to quantise: a matrix of weights that is no norm and no router."""
    dims = [size for size in info.shape]
    while dims and dims[0] == 1:  # ggml does not count leading dimensions of size one
        dims.pop(0)
    floating = info.format is not None or info.dtype.is_floating_point
    return (
        floating
        and len(dims) >= 2
        and info.name.endswith("weight")
        and "_norm.weight" not in info.name
        and "ffn_gate_inp.weight" not in info.name
        and info.name not in ("position_embd.weight", "token_types.weight")
    )


def _layer_then_name(name: str) -> tuple[int, str]:
    """llama.cpp's order of tensors, in which the rules count."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1), name


class _Rules:
    """The choice for each tensor of one model, asked for in llama.cpp's order."""

    def __init__(
        self, recipe: Recipe, facts: ModelFacts | None, names: list[str], has_importance: bool
    ) -> None:
        self.recipe = recipe
        self.facts = facts
        self.has_importance = has_importance
        self.tied = "output.weight" not in names
        self.values_count = sum("attn_v.weight" in name or "attn_qkv.weight" in name
                                for name in names)  # fmt: skip
        self.values_seen = 0
        self.downs_seen = 0

    def format_of(self, info: TensorInfo) -> Format:
        name = info.name
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return self.recipe.output(info.columns)
        if self.recipe.name == "mxfp4_moe":  # experts, stacked in one tensor, and the rest
            return formats.get("mxfp4" if len(info.shape) > 2 and info.shape[-3] > 1 else "q8_0")
        if name == "token_embd.weight":
            ternary = self.recipe.name in ("tq1_0", "tq2_0", "q2_0")
            return formats.get("q4_k") if ternary else self.recipe.base
        if "attn_v.weight" in name or "attn_qkv.weight" in name:
            chosen = self.values(self.values_seen)
            self.values_seen += 1
        elif "attn_k.weight" in name:
            chosen = "q8_0" if self.experts == 8 else None
        elif "attn_output.weight" in name:
            chosen = self.attention_output()
        elif "ffn_down" in name:
            layer = self.downs_seen
            if self.experts > 1:  # several tensors to a layer, in no certain order
                layer = max(_layer_then_name(name)[0], 0)
            chosen = self.down(layer)
            self.downs_seen += 1
        else:
            chosen = None
        return self.recipe.base if chosen is None else formats.get(chosen)

    @property
    def experts(self) -> int:
        return self.facts.experts if self.facts is not None else 0

    def values(self, index: int) -> str | None:
        assert self.facts is not None
        mix = self.recipe.name
        chosen = None
        if mix == "q2_k":
            chosen = "q4_k" if self.facts.queries_per_key >= 4 else "q3_k"
        elif mix == "q3_k_m":
            chosen = "q5_k" if index < 2 else "q4_k"
        elif mix == "q3_k_l":
            chosen = "q5_k"
        elif mix in ("q4_k_m", "q5_k_m") and _gets_more_bits(index, self.values_count):
            chosen = "q6_k"
        elif mix == "q4_k_s" and index < 4:
            chosen = "q5_k"
        elif mix in ("iq4_nl", "iq4_xs"):
            chosen = "q5_k" if self.facts.queries_per_key >= 4 else None
        if self.facts.is_70b and (chosen or self.recipe.base.name) in ("q3_k", "q4_k"):
            chosen = "q5_k"
        return "q8_0" if self.experts == 8 else chosen

    def down(self, layer: int) -> str | None:
        assert self.facts is not None
        layers = self.facts.layers
        mix = self.recipe.name
        if mix == "q2_k":
            return "q3_k"
        if mix == "q3_k_m":
            return "q5_k" if layer < layers // 16 else "q4_k"
        if mix == "q3_k_l":
            return "q5_k"
        if mix in ("q4_k_m", "q5_k_m") and _gets_more_bits(layer, layers):
            return "q6_k"
        if layer < layers // 8:
            if mix == "q4_k_s":
                return "q5_k"
            if mix in ("iq4_nl", "iq4_xs") and not self.has_importance:
                return "q5_k"
            # The first down projections can go astray with a symmetric format under importance.
            if self.has_importance and mix in ("q4_0", "q5_0"):
                return "q4_1" if mix == "q4_0" else "q5_1"
        return None

    def attention_output(self) -> str | None:
        mix = self.recipe.name
        if self.experts == 8:
            few_bits = ("q2_k", "q3_k_s", "q3_k_m", "iq4_xs", "iq4_nl", "q4_k_s", "q4_k_m")
            return "q5_k" if mix in few_bits else None
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first eighth, the last eighth, and every third layer between them."""
    first, last = layers // 8, 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2
