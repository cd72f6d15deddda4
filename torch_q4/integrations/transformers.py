"""Runs GGUF files as Hugging Face transformers models whose weights stay packed.

The model is built from the file's own metadata on the meta device, so no weight is ever allocated;
then each linear and embedding layer whose tensor is packed is replaced by a module over a view of
the mapped file. What differs between architectures is one row of ``_ARCHITECTURES``.

The conventions undone here are those of llama.cpp's ``convert_hf_to_gguf.py``: tensor names, the
order of Llama's query and key rows, Gemma's norm weights (stored plus one), and a tied output layer
(not stored).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from torch_q4.formats import Format
from torch_q4.gguf import GGUFArray, GGUFFile, GGUFTensor, _format_of, _shown, load_gguf
from torch_q4.gguf_write import GGUFMetadata, save_gguf
from torch_q4.nn import QuantEmbedding, QuantLinear, ScaledQuantEmbedding, pack_

# Older ones convert GGUF tokenizers wrongly, without a word.
_TRANSFORMERS = (5, 18)
try:
    from transformers import __version__ as _found

    if tuple(int(part) for part in _found.split(".")[:2]) < _TRANSFORMERS:
        raise ImportError(f"transformers {_found} is too old")
    from tqdm import tqdm
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode
except ImportError as error:
    raise ImportError(
        "torch_q4.integrations.transformers needs transformers "
        f"{'.'.join(map(str, _TRANSFORMERS))} or newer: pip install torch_q4[transformers] "
        f"({error})"
    ) from error

__all__ = ["ScaledQuantEmbedding", "load_gguf_model"]

_OP = "load_gguf_model"
_PAGE = 4096


# ---- architectures -------------------------------------------------------------------------------


class _Metadata:
    """A file's metadata under its architecture's prefix, checked as it is read."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.tensors = file.tensors

    def key(self, name: str) -> str:
        return f"{self.file.architecture}.{name}"

    def get(self, name: str) -> Any:
        return self.file.metadata.get(self.key(name))

    def integer(self, name: str, default: int | None = None) -> int:
        value: Any = self.file.metadata.get(self.key(name), default)
        if type(value) is not int or value < 1:
            self.refuse(name, "be a positive integer", value)
        if value >= 1 << 32:  # llama.cpp's are uint32, whatever the type in the file
            self.refuse(name, "be below 2**32", value)
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value: Any = self.file.metadata.get(self.key(name), default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(name, "be a positive number", value)
        return float(value)

    def refuse(self, name: str, rule: str, value: object) -> NoReturn:
        _refuse(self.file, self.key(name), rule, value)


def _refuse(file: GGUFFile, key: str, rule: str, value: object, where: str = "") -> NoReturn:
    got = f"{_shown(value)}{where}"
    raise ValueError(f"{_OP}: metadata {key!r} must {rule}, got {got} ({file.path})")


def _rope(metadata: _Metadata, default_theta: float) -> dict[str, Any]:
    """The rotary embedding's base and scaling, in transformers' terms."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": metadata.number("rope.freq_base", default_theta),
    }
    # Older files have only a factor, which meant linear scaling.
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    kind = metadata.get("rope.scaling.type") or "linear"
    if kind == "none" or (kind == "linear" and factor == 1):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        metadata.refuse("rope.scaling.type", "be none, linear or yarn", kind)
    if rope["rope_theta"] <= 1:  # its logarithm is divided by
        metadata.refuse("rope.freq_base", "be above 1 for yarn", rope["rope_theta"])
    rope |= {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.integer(
            "rope.scaling.original_context_length"
        ),
    }
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if metadata.get(f"rope.scaling.{theirs}") is not None:
            rope[ours] = metadata.number(f"rope.scaling.{theirs}")
    if metadata.get("rope.scaling.attn_factor") is not None:
        # ggml's multiplies yarn's own factor, transformers' replaces it.
        own = 0.1 * math.log(factor) + 1
        rope["attention_factor"] = own * metadata.number("rope.scaling.attn_factor")
    return rope


def _base_config(metadata: _Metadata) -> dict[str, Any]:
    """What every architecture's configuration has."""
    experts = metadata.get("expert_count")
    if experts:
        metadata.refuse("expert_count", "be absent (no mixture of experts)", experts)
    hidden = metadata.integer("embedding_length")
    heads = metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(name, head_dim) != head_dim:
            metadata.refuse(name, f"equal the head dimension, {head_dim}", metadata.get(name))
    if head_dim % 2:
        metadata.refuse("attention.key_length", "be even", head_dim)
    kv_heads = metadata.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        metadata.refuse("attention.head_count", f"be a multiple of {kv_heads}", heads)
    # The layers are made before they are compared with the file's tensors, so a wrong count must
    # not get that far.
    layers = metadata.integer("block_count")
    stored = {name.split(".")[1] for name in metadata.tensors if name.startswith("blk.")}
    if layers != len(stored):
        metadata.refuse("block_count", f"be the number of layers, {len(stored)}", layers)
    embedding = metadata.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(
            f"{_OP}: the file must have a tensor 'token_embd.weight', got none "
            f"({metadata.file.path})"
        )
    if len(embedding.shape) != 2:
        raise ValueError(
            f"{_OP}: tensor 'token_embd.weight' must have 2 dimensions, got shape "
            f"{embedding.shape} ({metadata.file.path})"
        )
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }


def _llama_config(metadata: _Metadata) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(metadata, 10_000.0),
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in metadata.tensors,
    }


def _qwen2_config(metadata: _Metadata) -> dict[str, Any]:
    return {"rope_parameters": _rope(metadata, 10_000.0)}


def _qwen3_config(metadata: _Metadata) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(metadata, 1_000_000.0),
        "attention_bias": "blk.0.attn_q.bias" in metadata.tensors,
    }


def _gemma3_config(metadata: _Metadata) -> dict[str, Any]:
    layers = metadata.integer("block_count")
    # Written by some converters only; the published models all have five local layers, then a
    # global one.
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, GGUFArray):
        if len(pattern) != layers:
            metadata.refuse("attention.sliding_window_pattern", f"have {layers} entries", pattern)
        if pattern.type == "string" or pattern.type.startswith("float"):
            metadata.refuse(
                "attention.sliding_window_pattern", "be an array of bools or integers", pattern
            )
        local = [bool(entry) for entry in pattern]
    else:
        period = metadata.integer("attention.sliding_window_pattern", 6)
        local = [(layer + 1) % period != 0 for layer in range(layers)]
    # The file does not say how queries are scaled. llama.cpp knows the 27B model, the only one
    # that does not use the head dimension, by its number of layers.
    heads = metadata.integer("attention.head_count")
    hidden = metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    config = {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
        "query_pre_attn_scalar": hidden // heads if layers == 62 else head_dim,
        "rope_parameters": {
            "full_attention": _rope(metadata, 1_000_000.0),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", 10_000.0),
            },
        },
    }
    if metadata.get("final_logit_softcapping"):
        config["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    return config


# Names of modules: the file's, to transformers'. "{}" is the layer's number.
_LAYER = "model.layers.{}."
_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": _LAYER + "input_layernorm",
    "blk.{}.attn_q": _LAYER + "self_attn.q_proj",
    "blk.{}.attn_k": _LAYER + "self_attn.k_proj",
    "blk.{}.attn_v": _LAYER + "self_attn.v_proj",
    "blk.{}.attn_output": _LAYER + "self_attn.o_proj",
    "blk.{}.ffn_norm": _LAYER + "post_attention_layernorm",
    "blk.{}.ffn_gate": _LAYER + "mlp.gate_proj",
    "blk.{}.ffn_up": _LAYER + "mlp.up_proj",
    "blk.{}.ffn_down": _LAYER + "mlp.down_proj",
}
_QK_NORMS = {
    "blk.{}.attn_q_norm": _LAYER + "self_attn.q_norm",
    "blk.{}.attn_k_norm": _LAYER + "self_attn.k_norm",
}
_GEMMA3_NORMS = {
    "blk.{}.post_attention_norm": _LAYER + "post_attention_layernorm",
    "blk.{}.ffn_norm": _LAYER + "pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": _LAYER + "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How a GGUF architecture becomes a transformers model.

    Attributes:
        model_type: transformers' name of the model.
        config: metadata to the configuration's own part.
        names: the file's module names to transformers'.
        norm_offset: what the file's norm weights have been increased by.
        embedding_scaled: embedding rows are multiplied by the square root of their length.
        rotary_pairs: the rows of queries and keys lie so that a rotary pair is adjacent, where
            transformers has the pair's halves in the two halves of a head.
        float16: activations stay within float16's range.
    """

    model_type: str
    config: Callable[[_Metadata], dict[str, Any]]
    names: dict[str, str]
    norm_offset: float = 0.0
    embedding_scaled: bool = False
    rotary_pairs: bool = False
    float16: bool = True

    def tensor_name(self, name: str) -> str:
        """The file's name of a parameter; a KeyError if the architecture has no such module."""
        module, _, leaf = name.rpartition(".")
        layer = re.search(r"\.layers\.(\d+)\.", module)
        if layer:
            module = module.replace(layer[0], ".layers.{}.", 1)
        stems = {ours: theirs for theirs, ours in self.names.items()}
        return f"{stems[module]}.{leaf}".replace("{}", layer[1] if layer else "")


_ARCHITECTURES = {
    "gemma3": _Architecture(
        "gemma3_text",
        _gemma3_config,
        _DECODER | _QK_NORMS | _GEMMA3_NORMS,
        norm_offset=1.0,
        embedding_scaled=True,
        float16=False,  # the 270M model's hidden states reach 1e5, and float16 ends at 65504
    ),
    "llama": _Architecture("llama", _llama_config, _DECODER, rotary_pairs=True),
    "qwen2": _Architecture("qwen2", _qwen2_config, _DECODER),
    "qwen3": _Architecture("qwen3", _qwen3_config, _DECODER | _QK_NORMS),
}
# Llama 3's long-context scaling: divisors of the rotary frequencies, float32 (head_dim / 2,).
_ROPE_FREQS = "rope_freqs.weight"
# ``tokenizer.ggml.pre`` of Llama 3's vocabularies.
_PRE_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")


# ---- tokenizers ----------------------------------------------------------------------------------

_TOKENIZER = "tokenizer.ggml."
_NO_TOKENIZER = ("none", "no_vocab")  # llama.cpp's names for it
_TOKENIZER_MODELS = ("gpt2", "llama", "t5")
_TOKEN_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
# Merges that are not in the file are found by cutting each token in two everywhere, which takes the
# square of its length. Real tokens have at most a few hundred characters.
_LONGEST_TOKEN = 1024
_UNKNOWN = "\U0010fffd"  # the last character for private use


class _TokenizerMetadata:
    """The keys that a tokenizer is made from, checked before transformers sees them.

    Args:
        file: the file.
        rows: how many tokens the model has embeddings for.

    Attributes:
        kind: ``tokenizer.ggml.model``, or None where the file has no tokenizer.

    Raises:
        ValueError: a key is missing, of a wrong type or length, or does not fit the others.
    """

    def __init__(self, file: GGUFFile, rows: int) -> None:
        self.file = file
        self.kind: str | None = None
        kind = self.get("model")
        if kind is None or kind in _NO_TOKENIZER:
            return
        if kind not in _TOKENIZER_MODELS:
            self.refuse("model", f"be one of {', '.join(_TOKENIZER_MODELS)}", kind)
        self.kind = kind
        tokens = self.get("tokens")
        if not isinstance(tokens, GGUFArray) or tokens.type != "string":
            self.refuse("tokens", "be an array of strings", tokens)
        self.tokens = tokens
        if not 1 <= len(tokens) <= rows:
            rule = f"have 1 to {rows} elements, as there are embeddings"
            self.refuse("tokens", rule, len(tokens))
        self.check_scalars()
        self.check_arrays()

    def get(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(_TOKENIZER + name, default)

    def refuse(self, name: str, rule: str, value: object, where: str = "") -> NoReturn:
        _refuse(self.file, _TOKENIZER + name, rule, value, where)

    def check_scalars(self) -> None:
        for name in _TOKEN_IDS:
            token = self.get(f"{name}_token_id")
            if token is not None and not (type(token) is int and 0 <= token < len(self.tokens)):
                self.refuse(f"{name}_token_id", f"be a token, below {len(self.tokens)}", token)
        for name in _FLAGS:
            if not isinstance(self.get(name, False), bool):
                self.refuse(name, "be true or false", self.get(name))
        if not isinstance(self.get("pre", ""), str):
            self.refuse("pre", "be a string", self.get("pre"))
        template = self.file.metadata.get("tokenizer.chat_template", "")
        if not isinstance(template, str):
            _refuse(self.file, "tokenizer.chat_template", "be a string", template)

    def check_arrays(self) -> None:
        scores, types, merges = self.get("scores"), self.get("token_type"), self.get("merges")
        self.check_numbers("token_type", types, _INTEGERS)
        self.check_numbers("scores", scores, ("float32", "float64", *_INTEGERS))
        if scores is not None and np.isnan(np.asarray(scores)).any():
            first = int(np.isnan(np.asarray(scores)).argmax())
            self.refuse("scores", "be numbers", math.nan, f" at {first}")
        # Gemma's tokens are in the order of their merges.
        derived = merges is None and self.file.architecture != "gemma3"
        if scores is None and (self.kind == "t5" or (self.kind == "llama" and derived)):
            self.refuse("scores", f"be there for a {self.kind} tokenizer", None)
        if merges is not None:
            if not isinstance(merges, GGUFArray) or merges.type != "string":
                self.refuse("merges", "be an array of strings", merges)
            self.check_merges(merges)
            return
        if self.kind == "gpt2":
            self.refuse("merges", "be there for a gpt2 tokenizer", None)
        longest = max(map(len, self.tokens))
        if longest > _LONGEST_TOKEN:
            rule = f"have at most {_LONGEST_TOKEN} characters each where there are no merges"
            self.refuse("tokens", rule, longest)

    def check_numbers(self, name: str, values: Any, types: tuple[str, ...]) -> None:
        if values is None:
            return
        if not isinstance(values, GGUFArray) or values.type not in types:
            self.refuse(name, f"be an array of {', '.join(types[:-1])} or {types[-1]}", values)
        if len(values) != len(self.tokens):
            self.refuse(name, f"have {len(self.tokens)} elements, as tokens has", len(values))

    def check_merges(self, merges: GGUFArray) -> None:
        known = set(self.tokens)
        if self.kind == "gpt2":
            # Transformers spells what is not in the alphabet of bytes in it.
            spelling = bytes_to_unicode()
            alphabet = set(spelling.values())
            for token in [token for token in known if not alphabet.issuperset(token)]:
                known.discard(token)
                known.add("".join(spelling[byte] for byte in token.encode()))
        else:
            # And Gemma's spaces as sentencepiece does.
            known.update("\u2581" * len(token) for token in self.tokens if not token.strip(" "))
        for place, merge in enumerate(merges):
            left, space, right = merge.partition(" ")
            if not (space and left in known and right in known and left + right in known):
                rule = "be two tokens that make up a third, with one space between"
                self.refuse("merges", rule, merge, f" at {place}")

    def keys(self) -> GGUFMetadata:
        """The keys, and no other: what else is in the file would be read for nothing."""
        kept = {"general.architecture", "tokenizer.chat_template"}
        kept.update(_TOKENIZER + name for name in ("model", "pre", "tokens", "scores", "merges"))
        kept.update(_TOKENIZER + name for name in ("token_type", *_FLAGS))
        kept.update(f"{_TOKENIZER}{name}_token_id" for name in _TOKEN_IDS)
        metadata = GGUFMetadata(self.file)
        for key in self.file.metadata:
            if key not in kept:
                del metadata[key]
        return metadata


def _tokenizer(file: GGUFFile, rows: int) -> PreTrainedTokenizerBase | None:
    """Transformers' own conversion of the tokenizer that the file describes."""
    metadata = _TokenizerMetadata(file, rows)
    if metadata.kind is None:
        return None
    # Which tokens to add to a text, where a file is silent, is llama.cpp's convention: a beginning
    # for sentencepiece vocabularies and Llama 3's.
    begins = metadata.kind == "llama" or metadata.get("pre") in _PRE_LLAMA3
    # Not AutoTokenizer: it reads the file once more, only to look for a configuration, which takes
    # three times as long as the tokenizer. And not the file itself: a tokenizer.json that lies
    # beside it would be preferred to it, and by now another file can have its name.
    with tempfile.TemporaryDirectory() as folder:
        save_gguf(os.path.join(folder, "model.gguf"), {}, metadata.keys())
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                folder,
                gguf_file="model.gguf",
                local_files_only=True,
                padding_side="left",  # as generate() needs it
                add_bos_token=metadata.get("add_bos_token", begins),
                add_eos_token=metadata.get("add_eos_token", False),
            )
            # A character that no vocabulary has: now is the time to miss a token for unknown ones.
            tokenizer(_UNKNOWN)
        except (OSError, MemoryError):
            raise
        except BaseException as error:
            # A panic of tokenizers' Rust code is a BaseException of a class that nobody can import.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{_OP}: metadata {_TOKENIZER + '*'!r} must describe a {metadata.kind} tokenizer "
                f"that transformers can build, got {type(error).__name__}: {error} ({file.path})"
            ) from error
    tokenizer.name_or_path = file.path
    tokenizer.init_kwargs["name_or_path"] = file.path
    return tokenizer


# ---- loading -------------------------------------------------------------------------------------


def load_gguf_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    compute: str = "exact",
    progress: bool = True,
    pack: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Builds a transformers model and its tokenizer from a GGUF file.

    Packed tensors stay packed: their layers become :class:`torch_q4.QuantLinear` and
    :class:`torch_q4.QuantEmbedding`. On the CPU their weights lie in the mapped file's own pages
    (Llama's query and key rows, which have to be reordered, are the only copies), so loading needs
    no memory of its own for them. A tied output layer shares the embedding's parameter.

    Args:
        path: a ``.gguf`` file, or any part of a split one, of one of the architectures gemma3,
            llama, qwen2, qwen3.
        dtype: the dtype of activations and of what is not packed: float32, bfloat16 or float16
            (not for gemma3, whose activations exceed its range).
        device: where the model shall be.
        compute: the arithmetic of the packed layers, see :func:`torch_q4.linear`.
        progress: whether to show a progress bar on stderr.
        pack: whether to put weights into the packed layout, which is faster. The pages of the map
            become private to the process thereby; without it they stay the file's, shared with
            every process that maps it and dropped by the kernel when memory is short.

    Returns:
        The model, in eval mode, with a generation config that stops at the file's end-of-text
        tokens; and the tokenizer, or None where the file has none.

    Raises:
        OSError: the file cannot be opened.
        GGUFError: it is no readable GGUF file, see :func:`torch_q4.load_gguf`.
        ValueError: an architecture that is not supported, metadata that is missing or wrong, or
            tensors that are missing, unknown, of a wrong shape, or of a type that there is no
            format for.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{_OP}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if compute not in ("exact", "int8"):
        raise ValueError(f"{_OP}: compute must be exact or int8, got {compute}")
    file = load_gguf(path)
    architecture = _ARCHITECTURES.get(file.architecture or "")
    if architecture is None:
        raise ValueError(
            f"{_OP}: the architecture must be one of {', '.join(_ARCHITECTURES)}, "
            f"got {file.architecture!r} ({file.path})"
        )
    if dtype == torch.float16 and not architecture.float16:
        raise ValueError(
            f"{_OP}: dtype must be bfloat16 or float32 for {file.architecture}, whose activations "
            f"exceed float16's range, got {dtype} ({file.path})"
        )
    config = _config(file, architecture)
    _check_sizes(file, config, architecture)
    tokenizer = _tokenizer(file, config.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _Loader(file, architecture, model, dtype, torch.device(device), compute, progress).load()
    if pack:
        pack_(model)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        # Batches need some padding, and generate() warns where none is set.
        pad_token_id=file.metadata.get(
            "tokenizer.ggml.padding_token_id", file.metadata.get("tokenizer.ggml.eos_token_id")
        ),
    )
    return model.eval(), tokenizer


def _config(file: GGUFFile, architecture: _Architecture) -> PreTrainedConfig:
    metadata = _Metadata(file)
    base = _base_config(metadata)
    tokens: dict[str, int | None] = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        tokens[name] = token = file.metadata.get(key)
        if token is not None and not (type(token) is int and 0 <= token < base["vocab_size"]):
            _refuse(file, key, f"be a token, below {base['vocab_size']}", token)
    # Chat models end a turn with another token than a text.
    ends = {tokens[name]: None for name in ("eos", "eot", "eom") if tokens[name] is not None}
    described = base | architecture.config(metadata)
    with _in_our_words(_OP, f"metadata must suit {architecture.model_type}", file.path):
        return AutoConfig.for_model(
            architecture.model_type,
            **described,
            bos_token_id=tokens["bos"],
            eos_token_id=list(ends) if len(ends) > 1 else next(iter(ends), None),
            pad_token_id=tokens["padding"],
        )


@contextlib.contextmanager
def _in_our_words(op: str, rule: str, path: str) -> Iterator[None]:
    """Makes a ValueError of whatever transformers raises at what a file says."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        # A panic of tokenizers' Rust code is a BaseException of a class that nobody can import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno:  # the system's; transformers' have no number
            raise
        words = _shown(" ".join(str(error).split()))
        raise ValueError(f"{op}: {rule}, got {type(error).__name__}: {words} ({path})") from error


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the embedding and of a layer's weights, by the file's module names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * _head_dim(config)
    keys = config.num_key_value_heads * _head_dim(config)
    return {
        "token_embd": (config.vocab_size, hidden),
        "blk.{}.attn_q": (queries, hidden),
        "blk.{}.attn_k": (keys, hidden),
        "blk.{}.attn_v": (keys, hidden),
        "blk.{}.attn_output": (hidden, queries),
        "blk.{}.ffn_gate": (inner, hidden),
        "blk.{}.ffn_up": (inner, hidden),
        "blk.{}.ffn_down": (hidden, inner),
    }


def _head_dim(config: PreTrainedConfig) -> int:
    """Elements of one head; Qwen2's configuration has no entry for it."""
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _check_sizes(file: GGUFFile, config: PreTrainedConfig, architecture: _Architecture) -> None:
    """Compares what the model is made from with the file, before anything of such a size is made.

    :meth:`_Loader.check` compares every tensor, but needs the model for it.
    """
    each = sum("{}" in name for name in architecture.names)
    if config.num_hidden_layers * each > len(file.tensors):
        rule = f"be at most {len(file.tensors) // each}, with {each} tensors of a layer in the file"
        _refuse(file, f"{file.architecture}.block_count", rule, config.num_hidden_layers)
    for module, shape in _shapes(config).items():
        name = f"{module}.weight".replace("{}", "0")
        found = file.tensors.get(name)
        if found is None or found.shape != shape:
            rule = f"tensor {name!r} must have shape {shape}"
            got = found.shape if found is not None else "no such tensor"
            raise ValueError(f"{_OP}: {rule}, got {got} ({file.path})")


class _Loader:
    """Fills a model that is on the meta device with a file's tensors."""

    def __init__(
        self,
        file: GGUFFile,
        architecture: _Architecture,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device,
        compute: str,
        progress: bool,
    ) -> None:
        self.file = file
        self.architecture = architecture
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.device = device
        self.compute = compute
        self.progress = progress

    def load(self) -> None:
        self.check()
        self.done = 0
        self.bar = tqdm(
            total=sum(tensor.nbytes for tensor in self.file.tensors.values()),
            unit="B",
            unit_scale=True,
            desc=os.path.basename(self.file.path),
            disable=not self.progress,
        )
        with self.bar:
            for name in dict.fromkeys(name.rpartition(".")[0] for name in self.parameters()):
                self.load_module(name)
            self.fill_buffers()
        if self.config.tie_word_embeddings:
            self.tie()
        everything = [*self.model.named_parameters(), *self.model.named_buffers()]
        left = [name for name, value in everything if value.is_meta]
        if left:
            raise RuntimeError(
                f"{_OP}: every parameter and buffer must be filled, got none: {left}"
            )

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the file must have, by transformers' name."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if self.config.tie_word_embeddings:
            parameters.pop("lm_head.weight", None)
        return parameters

    def file_name(self, name: str) -> str:
        """The file's name of a parameter."""
        return self.architecture.tensor_name(name)

    def check(self) -> None:
        """Compares the file's tensors with the model's parameters, before anything is loaded."""
        wanted = {self.file_name(name): value for name, value in self.parameters().items()}
        special = {_ROPE_FREQS} if self.architecture.rotary_pairs else set()
        missing = [name for name in wanted if name not in self.file.tensors]
        unknown = [name for name in self.file.tensors if name not in wanted.keys() | special]
        if missing or unknown:
            self.refuse(
                f"the tensors must be those of {self.file.architecture}",
                f"{_some(missing)} missing and {_some(unknown)} unknown",
            )
        for name, parameter in wanted.items():
            shape = self.file.tensors[name].shape
            if shape != tuple(parameter.shape):
                self.refuse(f"tensor {name!r} must have shape {tuple(parameter.shape)}", shape)
        for tensor in self.file.tensors.values():  # of which the model needs all
            _format_of(_OP, tensor, self.file.path)

    def refuse(self, rule: str, value: object) -> NoReturn:
        raise ValueError(f"{_OP}: {rule}, got {value} ({self.file.path})")

    def load_module(self, name: str) -> None:
        module = self.model.get_submodule(name)
        weight = self.file.tensors[self.file_name(f"{name}.weight")]
        fmt = _format_of(_OP, weight)
        values = self.reordered(name, self.read(weight))
        bias: nn.Parameter | None = None
        if getattr(module, "bias", None) is not None:
            stored = self.file.tensors[self.file_name(f"{name}.bias")]
            self.read(stored)
            bias = self.plain(self.reordered(name, stored.dequantize(torch.float32)))

        if fmt is not None and isinstance(module, nn.Linear):
            blocks = values.to(self.device)
            packed = QuantLinear.from_blocks(blocks, fmt, bias, compute=self.compute)
            self.model.set_submodule(name, packed)
        elif fmt is not None and isinstance(module, nn.Embedding):
            self.model.set_submodule(name, self.embedding(values, fmt, module))
        else:
            # A norm, or a layer that the file's author left in floating point.
            if fmt is not None:
                values = weight.dequantize()
            offset = self.architecture.norm_offset
            if offset and not isinstance(module, (nn.Linear, nn.Embedding)):
                # In float32: near one, half precision has few bits left for what is learnt.
                values = values.float() - offset
            module.weight = self.plain(values)
            if bias is not None:
                module.bias = bias

    def embedding(self, blocks: Tensor, fmt: Format, module: nn.Embedding) -> QuantEmbedding:
        blocks = blocks.to(self.device)
        if not self.architecture.embedding_scaled:
            return QuantEmbedding.from_blocks(blocks, fmt, self.dtype, module.padding_idx)
        packed = ScaledQuantEmbedding.from_blocks(blocks, fmt, self.dtype, module.padding_idx)
        packed.embed_scale = self.embedding_scale()
        return packed

    def embedding_scale(self) -> Tensor:
        return torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype, device=self.device)

    def read(self, tensor: GGUFTensor) -> Tensor:
        """The tensor's view, its pages read from disk, so that the bar shows what takes time."""
        data = tensor.data
        data.reshape(-1).view(torch.uint8)[::_PAGE].sum()
        self.done += 1
        self.bar.set_postfix_str(f"{self.done}/{len(self.file.tensors)} tensors", refresh=False)
        self.bar.update(tensor.nbytes)
        return data

    def plain(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(device=self.device, dtype=self.dtype))

    def reordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a layer in transformers' order; blocks never cross rows, so they can move."""
        if not self.architecture.rotary_pairs or not name.endswith(("q_proj", "k_proj")):
            return rows
        # Within a head, from (pair, half) to (half, pair).
        paired = rows.reshape(-1, self.config.head_dim // 2, 2, *rows.shape[1:])
        return paired.transpose(1, 2).reshape(rows.shape)

    def tie(self) -> None:
        """Lets the output layer use the embedding's very parameter."""
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, QuantEmbedding):
            head = QuantLinear.from_blocks(embedding.blocks, embedding.format, compute=self.compute)
            self.model.set_output_embeddings(head)
        else:
            self.model.get_output_embeddings().weight = embedding.weight

    def fill_buffers(self) -> None:
        """Computes the buffers that the modules had computed on the meta device."""
        divisors: Tensor | None = None
        if _ROPE_FREQS in self.file.tensors:
            stored = self.file.tensors[_ROPE_FREQS]
            if stored.shape != (self.config.head_dim // 2,):
                rule = f"tensor {_ROPE_FREQS!r} must have shape ({self.config.head_dim // 2},)"
                self.refuse(rule, stored.shape)
            self.read(stored)
            divisors = stored.dequantize()
            # Kept with the model: what saves it has no other trace of them.
            self.config.rope_freqs = divisors.tolist()
        for module in self.model.modules():
            lost = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
            if not lost:
                continue
            if lost == ["embed_scale"]:
                module.embed_scale = self.embedding_scale()
            elif "RotaryEmbedding" in type(module).__name__:
                with torch.device("cpu"):
                    fresh = dict(type(module)(self.config).named_buffers(recurse=False))
                for name in lost:
                    frequencies = fresh[name] if divisors is None else fresh[name] / divisors
                    setattr(module, name, frequencies.to(self.device))


def _some(names: list[str]) -> str:
    """A few names and how many there are."""
    if not names:
        return "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
