"""Writes Hugging Face transformers models as GGUF files, and saves them packed.

The inverse of :mod:`torch_q4.integrations.transformers`, for the same architectures: names, the
order of Llama's query and key rows, Gemma's norm weights, and the metadata that describe the model.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from torch_q4 import recipes
from torch_q4._files import require_file
from torch_q4._tensors import TensorInfo
from torch_q4.checkpoint import (
    SafetensorsFile,
    _state,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
)
from torch_q4.formats import Format
from torch_q4.gguf import GGUFFile, GGUFOpaque, _shown, load_gguf
from torch_q4.gguf_write import GGUFMetadata, GGUFWriter
from torch_q4.integrations.transformers import (
    _ARCHITECTURES,
    _ROPE_FREQS,
    ScaledQuantEmbedding,
    _head_dim,
    _in_our_words,
    _shapes,
)
from torch_q4.nn import _Quantized

__all__ = ["Export", "load_pretrained", "save_gguf_model", "save_pretrained", "tensor_names"]

_OP = "save_gguf_model"
_LOAD = "load_pretrained"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_LAYER_NUMBER = re.compile(r"model\.layers\.(\d+)\.")
_Item = TypeVar("_Item")

# The recipe whose file type describes a file that is mostly of one format; some have no recipe here
# (llama.h, llama_ftype).
_FILE_TYPES = {
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "mxfp4": 38,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "iq3_xxs": 23,
    "iq1_s": 24,
    "iq3_s": 26,
    "iq2_s": 28,
    "iq1_m": 31,
    "nvfp4": 39,
    "q1_0": 40,
} | {
    recipe.base.name: recipe.file_type
    for recipe in recipes.all()
    if recipe.name == recipe.base.name and recipe.name != "q2_k"
}
_PLAIN_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


class Export:
    """How a transformers model is written as GGUF.

    Args:
        config: the model's configuration.
        like: a GGUF file whose metadata and order of tensors to take.

    Attributes:
        architecture: GGUF's name of it.
        facts: what :mod:`torch_q4.recipes` asks of it.
        notes: what a user should know about the result.

    Raises:
        ValueError: a model of another architecture, or one that GGUF cannot describe.
    """

    def __init__(self, config: PreTrainedConfig, like: GGUFFile | None = None) -> None:
        names = {row.model_type: name for name, row in _ARCHITECTURES.items()}
        if config.model_type not in names:
            raise ValueError(
                f"{_OP}: the model must be one of {', '.join(names)}, got {config.model_type!r}"
            )
        self.config = config
        self.like = like
        self.architecture = names[config.model_type]
        self.notes: list[str] = []
        if like is not None and like.architecture != self.architecture:
            raise ValueError(
                f"{_OP}: like must be of architecture {self.architecture}, "
                f"got {like.architecture} ({like.path})"
            )
        self._row = _ARCHITECTURES[self.architecture]
        self.facts = recipes.ModelFacts(
            self.architecture,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )

    @classmethod
    def from_folder(
        cls, folder: str, tensors: int, like: str | os.PathLike[str] | None = None
    ) -> Export:
        """For the model whose ``config.json`` is in a folder, and whose tensors are so many.

        Raises:
            OSError: the folder has no such file.
            ValueError: a damaged ``config.json``, or see :class:`Export`.
        """
        config = _config(_OP, folder or ".", tensors)
        return cls(config, load_gguf(like) if like is not None else None)

    def tensor_name(self, name: str) -> str:
        """GGUF's name of a parameter.

        Raises:
            ValueError: the architecture has no such parameter.
        """
        try:
            return self._row.tensor_name(name)
        except KeyError:
            raise ValueError(
                f"{_OP}: tensors must be those of {self.config.model_type}, got {name!r}"
            ) from None

    def is_left_out(self, name: str) -> bool:
        """Whether a checkpoint's tensor is none of the GGUF file's."""
        tied = self.config.tie_word_embeddings and name.startswith("lm_head.")
        return tied or name.endswith(("rotary_emb.inv_freq", "weight_format"))

    def ties(self, names: Collection[str]) -> dict[str, str]:
        """The names that a checkpoint leaves out since they share another's data."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        tied = self.config.tie_word_embeddings and head not in names and embedding in names
        return {head: embedding} if tied else {}

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """The model's row for each of the file's, or None where the order is the same."""
        module = name.rpartition(".")[0]
        if not self._row.rotary_pairs or not module.endswith(("q_proj", "k_proj")):
            return None
        # Within a head, from (half, pair) to (pair, half).
        halves = torch.arange(rows).reshape(-1, 2, self.config.head_dim // 2)
        return halves.transpose(1, 2).reshape(-1)

    def offset(self, name: str) -> float:
        """What the file's values are increased by."""
        return self._row.norm_offset if name.endswith("norm.weight") else 0.0

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors that the file has besides the parameters: Llama 3's rotary divisors."""
        kept = getattr(self.config, "rope_freqs", None)
        if kept is not None:
            return {_ROPE_FREQS: torch.tensor(kept, dtype=torch.float32)}
        rope = self.config.rope_parameters
        if rope.get("rope_type") == "llama3":
            return {_ROPE_FREQS: _llama3_divisors(rope, self.config.head_dim)}
        return {}

    def in_order(self, items: list[_Item], name: Callable[[_Item], str]) -> list[_Item]:
        """Items in the order in which ``like`` has their names; new ones last."""
        if self.like is None:
            return items
        place = {name: index for index, name in enumerate(self.like.tensors)}
        return sorted(items, key=lambda item: place.get(name(item), len(place)))

    def metadata(self) -> GGUFMetadata:
        """The file's keys: those of ``like``, or what the configuration says."""
        if self.like is not None:
            return GGUFMetadata(self.like)
        self.notes.append(
            "the file has no tokenizer: only the metadata of a GGUF file given as like holds one"
        )
        return _metadata(self.config, self.architecture)


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """What Llama 3 divides each rotary frequency by: 1 for fast ones, the factor for slow ones.

    Between the two wavelengths it goes over linearly, in the frequency.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def _metadata(config: PreTrainedConfig, architecture: str) -> GGUFMetadata:
    """The keys that the loader, and llama.cpp, build the model from."""
    metadata = GGUFMetadata({"general.architecture": architecture, "general.type": "model"})
    name = os.path.basename(getattr(config, "_name_or_path", "") or "")
    if name:
        metadata["general.name"] = name

    def put(key: str, value: Any) -> None:
        metadata[f"{architecture}.{key}"] = value

    put("context_length", config.max_position_embeddings)
    put("embedding_length", config.hidden_size)
    put("block_count", config.num_hidden_layers)
    put("feed_forward_length", config.intermediate_size)
    put("attention.head_count", config.num_attention_heads)
    put("attention.head_count_kv", config.num_key_value_heads)
    put("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps))
    head_dim = _head_dim(config)
    put("attention.key_length", head_dim)
    put("attention.value_length", head_dim)
    if architecture != "gemma3":
        put("vocab_size", config.vocab_size)
    if architecture == "llama":
        put("rope.dimension_count", head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        _gemma3_metadata(config, head_dim, put)
        rope = rope["full_attention"]
    elif getattr(config, "use_sliding_window", False):
        raise ValueError(f"{_OP}: use_sliding_window must be False for {architecture}, got True")
    put("rope.freq_base", float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        put("rope.scaling.type", kind)
        put("rope.scaling.factor", float(rope["factor"]))
    if kind == "yarn":
        put("rope.scaling.original_context_length", rope["original_max_position_embeddings"])
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(ours) is not None:
                put(f"rope.scaling.{theirs}", float(rope[ours]))
        if rope.get("attention_factor") is not None:
            own = 0.1 * math.log(rope["factor"]) + 1
            put("rope.scaling.attn_factor", float(rope["attention_factor"]) / own)
    elif kind not in ("default", "linear", "llama3"):
        raise ValueError(f"{_OP}: rope_type must be default, linear, llama3 or yarn, got {kind!r}")
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = getattr(config, f"{ours}_token_id", None)
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None:
            metadata.set(f"tokenizer.ggml.{theirs}_token_id", token, "uint32")
    return metadata


def _gemma3_metadata(
    config: PreTrainedConfig, head_dim: int, put: Callable[[str, Any], None]
) -> None:
    # The file has no key for it; the loaders go by the number of layers.
    wanted = config.hidden_size // config.num_attention_heads
    wanted = wanted if config.num_hidden_layers == 62 else head_dim
    if config.query_pre_attn_scalar != wanted:
        raise ValueError(
            f"{_OP}: query_pre_attn_scalar must be {wanted} for GGUF to describe the model, "
            f"got {config.query_pre_attn_scalar}"
        )
    put("attention.sliding_window", config.sliding_window)
    local = [kind == "sliding_attention" for kind in config.layer_types]
    if local != [(layer + 1) % 6 != 0 for layer in range(len(local))]:
        put("attention.sliding_window_pattern", local)
    base = config.rope_parameters["sliding_attention"]["rope_theta"]
    if base != 10_000:
        put("rope.freq_base_swa", float(base))
    if config.final_logit_softcapping:
        put("final_logit_softcapping", float(config.final_logit_softcapping))


def tensor_names(model: PreTrainedModel) -> dict[str, str]:
    """GGUF's tensor name for each linear and embedding layer of a model, by the layer's name.

    For :meth:`Importance.renamed`, so that llama.cpp can use what was collected here.

    Raises:
        ValueError: a model of another architecture.
    """
    export = Export(model.config)
    return {
        name: export.tensor_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, _Quantized))
    }


def save_gguf_model(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    like: str | os.PathLike[str] | GGUFFile | None = None,
    *,
    on_written: Callable[[str, int], None] | None = None,
) -> None:
    """Writes a transformers model as a GGUF file, packed layers as they are.

    What is not packed is written in its own dtype, norms and biases in float32. A model that
    ``load_gguf_model`` built in float32 gives back every tensor of its file byte for byte.

    Args:
        path: the file.
        model: a model of one of the architectures gemma3, llama, qwen2, qwen3, quantised or not.
        like: a GGUF file of that architecture, to take metadata (the tokenizer is there) and the
            order of tensors from. Without it the metadata are made from the model's configuration,
            and the file has no tokenizer.
        on_written: called with each tensor's name and bytes, for progress.

    Raises:
        ValueError: a model of another architecture, or one that GGUF cannot describe.
        OSError: see :func:`torch_q4.save_gguf`.
    """
    if like is not None and not isinstance(like, GGUFFile):
        like = load_gguf(like)
    export = Export(model.config, like)
    # Quantising the output layer alone unties it, whatever the configuration still says.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    untied = _stored(head) is not _stored(embedding)
    found: list[tuple[TensorInfo, Callable[[], Tensor]]] = []
    for name, _, (info, values) in _state(model):
        if export.is_left_out(name) and not (untied and name == "lm_head.weight"):
            continue
        order = export.row_order(name, info.shape[0])
        dtype = torch.float32 if len(info.shape) < 2 else info.dtype
        offset = export.offset(name)
        new = TensorInfo(export.tensor_name(name), info.format, info.shape, dtype)
        found.append((new, functools.partial(_stored_as, values, order, dtype, offset)))
    for name, extra in export.extra_tensors().items():
        info = TensorInfo(name, None, tuple(extra.shape), extra.dtype)
        found.append((info, extra.contiguous))
    found = export.in_order(found, lambda item: item[0].name)
    metadata = export.metadata()
    _state_types(metadata, [info for info, _ in found], like)
    with GGUFWriter(path, metadata, [info for info, _ in found]) as writer:
        for info, values in found:
            writer.write(values())
            if on_written is not None:
                on_written(info.name, info.nbytes)


def _stored(module: nn.Module) -> Tensor:
    """The tensor in which a layer keeps its weight."""
    found = module.blocks if isinstance(module, _Quantized) else module.weight
    assert isinstance(found, Tensor)
    return found


def _stored_as(
    values: Callable[[], Tensor], order: Tensor | None, dtype: torch.dtype, offset: float
) -> Tensor:
    """A parameter as the file has it, contiguous on the CPU."""
    data = values().detach().cpu()
    if order is not None:
        data = data[order]
    if offset:
        data = data.float() + offset
    return data.to(dtype).contiguous()


def _state_types(metadata: GGUFMetadata, infos: list[TensorInfo], like: GGUFFile | None) -> None:
    """Sets what the file says of its formats, unless it is still right."""
    if like is not None and all(
        info.name in like.tensors and like.tensors[info.name].format == info.format
        for info in infos
    ):
        return
    sizes: Counter[Format | torch.dtype] = Counter()
    for info in infos:
        assert not isinstance(info.format, GGUFOpaque)  # a model has no such layer
        if len(info.shape) > 1:
            sizes[info.format or info.dtype] += info.elements
    main = sizes.most_common(1)[0][0]
    if isinstance(main, Format):
        number = _FILE_TYPES.get(main.name)
        metadata.set("general.quantization_version", 2, "uint32")
    else:
        number = _PLAIN_FILE_TYPES.get(main)
    if number is not None:
        metadata.set("general.file_type", number, "uint32")


# ---- folders -------------------------------------------------------------------------------------


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    on_written: Callable[[str, int], None] | None = None,
) -> None:
    """Saves a model with packed layers to a folder, for :func:`load_pretrained`.

    The folder gets ``model.safetensors``, with the formats in its header, ``config.json``,
    ``generation_config.json``, and the tokenizer's own files.

    Args:
        model: a transformers model, quantised or not.
        folder: is made if need be; files of these names in it are replaced.
        tokenizer: saved beside the model.
        on_written: called with each tensor's name and bytes, for progress.

    Raises:
        OSError: a file cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # The weights last: a folder with weights is complete.
    save_checkpoint(model, os.path.join(folder, _WEIGHTS), on_written=on_written)


def load_pretrained(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    compute: str = "exact",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads what :func:`save_pretrained` saved: packed weights stay packed.

    Args:
        folder: the folder.
        dtype: the dtype of activations and of what is not packed.
        device: where the model shall be.
        compute: the arithmetic of the packed layers, see :func:`torch_q4.linear`.

    Returns:
        The model, in eval mode, and the tokenizer, or None where the folder has none.

    Raises:
        OSError: a file is missing.
        ValueError: a model of another architecture, or a damaged file: one that transformers can
            make nothing of, or whose sizes are not those of the tensors.
        RuntimeError: tensors that are missing or do not belong to the model.
    """
    path = os.fspath(folder) or "."
    file = load_safetensors(path)
    config = _config(_LOAD, path, len(file.tensors))
    _check_sizes(config, file)
    described = os.path.join(path, _CONFIG)
    with _in_our_words(_LOAD, "the file must describe a model", described), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is None or tensor.format is None or type(module) in (nn.Linear, nn.Embedding):
            continue
        if isinstance(module, nn.Embedding):  # Gemma's, which scales its rows
            packed = ScaledQuantEmbedding(
                module.num_embeddings, module.embedding_dim, tensor.format, module.padding_idx,
                device="meta", dtype=dtype,
            )  # fmt: skip
            model.set_submodule(name, packed)
    load_checkpoint(model, path, compute=compute)
    with _in_our_words(_LOAD, "the file must describe rotary embeddings", described):
        _fill_buffers(model, dtype)
    model.to(device=device)
    # Copies what is still a view of the file in another dtype; blocks have none to cast to.
    model.to(dtype=dtype)
    generation = os.path.join(path, "generation_config.json")
    if os.path.exists(generation):
        _json_object(_LOAD, generation)
        with _in_our_words(_LOAD, "the file must describe generation", generation):
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    tokenizer = None
    if os.path.exists(os.path.join(path, "tokenizer_config.json")):
        with _in_our_words(_LOAD, "the files must describe a tokenizer", path):
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


def _json_object(op: str, path: str) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, or is no JSON object.
    """
    require_file(path, op)
    with open(path, encoding="utf-8") as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{op}: the file must be JSON, got: {error} ({path})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{op}: the file must be a JSON object, got {_shown(found)} ({path})")
    return found


def _config(op: str, folder: str, tensors: int) -> PreTrainedConfig:
    """The configuration in a folder, for a file of so many tensors.

    Raises:
        OSError: the folder has no ``config.json``.
        ValueError: the file is damaged, or has more layers than there are tensors.
    """
    path = os.path.join(folder, _CONFIG)
    stored = _json_object(op, path)
    known = [row.model_type for row in _ARCHITECTURES.values()]
    kind = stored.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{op}: model_type must be one of {', '.join(known)}, got {_shown(kind)} ({path})"
        )
    # A configuration has lists of as many entries as there are layers, and as there are labels,
    # which a language model has no use for.
    layers = stored.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(
            f"{op}: num_hidden_layers must be at most {tensors}, as there are tensors, "
            f"got {_shown(layers)} ({path})"
        )
    stored.pop("num_labels", None)
    with _in_our_words(op, f"the file must describe a model of type {kind}", path):
        return CONFIG_MAPPING[kind].from_dict({**stored, "_name_or_path": folder})


def _check_sizes(config: PreTrainedConfig, file: SafetensorsFile) -> None:
    """Compares what a model is made from with its file, before anything of such a size is made.

    :func:`load_checkpoint` compares every tensor, but needs the model for it.
    """
    path = os.path.join(file.path, _CONFIG)
    row = next(row for row in _ARCHITECTURES.values() if row.model_type == config.model_type)
    found = {match[1] for name in file.tensors if (match := _LAYER_NUMBER.match(name))}
    each = sum("{}" in name for name in row.names)
    most = min(len(found), len(file.tensors) // each)
    if config.num_hidden_layers != most:
        raise ValueError(
            f"{_LOAD}: num_hidden_layers must be {most}, as there are layers in the tensors, "
            f"got {config.num_hidden_layers} ({path})"
        )
    with _in_our_words(_LOAD, "the sizes must be numbers", path):
        shapes = _shapes(config)
        head_dim = _head_dim(config)
    for module, shape in shapes.items():
        name = f"{row.names[module]}.weight".replace("{}", "0")
        tensor = file.tensors.get(file.ties.get(name, name))
        if tensor is None or tensor.shape != shape:
            got = tensor.shape if tensor is not None else "no such tensor"
            raise ValueError(
                f"{_LOAD}: tensor {name!r} must have shape {shape}, got {got} ({path})"
            )
    if head_dim % 2:
        raise ValueError(f"{_LOAD}: head_dim must be even, got {head_dim} ({path})")
    divisors = getattr(config, "rope_freqs", None)
    if divisors is not None and not (
        isinstance(divisors, list)
        and len(divisors) == head_dim // 2
        and all(type(divisor) in (int, float) and divisor > 0 for divisor in divisors)
    ):
        raise ValueError(
            f"{_LOAD}: rope_freqs must be {head_dim // 2} positive numbers, "
            f"got {_shown(divisors)} ({path})"
        )


def _fill_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Computes the buffers that are not saved, and whose modules were made on the meta device."""
    divisors = getattr(model.config, "rope_freqs", None)
    for module in model.modules():
        lost = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
        if isinstance(module, ScaledQuantEmbedding) or "embed_scale" in lost:
            scale = torch.tensor(model.config.hidden_size**0.5, dtype=dtype, device="cpu")
            module.embed_scale = scale
        if "_dtype_marker" in lost:
            module._dtype_marker = torch.empty(0, dtype=dtype, device="cpu")
        if "RotaryEmbedding" in type(module).__name__ and lost:
            with torch.device("cpu"):
                fresh = dict(type(module)(model.config).named_buffers(recurse=False))
            for name in lost:
                values = fresh[name]
                if divisors is not None and name.endswith("inv_freq"):
                    values = values / torch.tensor(divisors)
                setattr(module, name, values)
