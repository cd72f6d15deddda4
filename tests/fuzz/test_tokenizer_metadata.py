"""Files whose metadata lie: whatever a key says, a file loads or is refused in clear words.

Each case takes a small file that loads, of any architecture and kind of tokenizer, and breaks a few
of its keys: types, lengths, ranges, merges and ids that belong to no token. The structure of the
file stays right; files whose bytes are damaged are another test's.
"""

from __future__ import annotations

import math
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_q4 import GGUFMetadata, save_gguf

pytest.importorskip("transformers")

from torch_q4.integrations.transformers import _ARCHITECTURES, load_gguf_model

HIDDEN, HEADS, HEAD_DIM, FEED_FORWARD = 32, 4, 8, 32
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TOKENS = {
    "gpt2": [*SPECIAL, "Ġ", *LETTERS, "th", "the", "Ġthe"],
    "llama": [*SPECIAL, "\u2581", *LETTERS, "th", "the", "\u2581the"],
}
ROWS = len(TOKENS["gpt2"])
MERGES = ["t h", "th e", "Ġ the"]

NUMBERS = [
    0, 1, 2, 3, 7, 64, 255, ROWS - 1, ROWS, ROWS + 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**53, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
]  # fmt: skip
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan]
STRINGS = ["", " ", "x", "llama", "gpt2", "t5", "bert", "default", "llama-bpe", "linear", "yarn",
           "none", "{% for %}", "\0", "日本", "🎉" * 40, "a" * 3000]  # fmt: skip
WORDS = [
    "", " ", "  ", "\n", "\0", "t", "th", "<s>", "</s>", "Ж", "🎉", "é", "\u2581", "\u2581\u2581",
    "Ġ", "ĠĠ", "<0x41>", "[PAD1]", "x" * 1500,
]  # fmt: skip
PAIRS = ["", " ", "  ", "t", "t ", " h", "t  h", "t h e", "z z", "th e", "Ġ the", "Ж Ж", "é é",
         "q\0 q", "<s> </s>", "t\u2581h", "🎉 🎉"]  # fmt: skip
TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]

Content = tuple[GGUFMetadata, dict[str, Tensor]]


def sound(architecture: str, kind: str) -> Content:
    """Metadata and tensors of a file that loads."""
    layers = 2
    metadata = GGUFMetadata({"general.architecture": architecture})
    for name, value in {
        "context_length": 64, "embedding_length": HIDDEN, "block_count": layers,
        "feed_forward_length": FEED_FORWARD, "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10_000.0, "attention.sliding_window": 8,
    }.items():  # fmt: skip
        metadata[f"{architecture}.{name}"] = value
    tokens = TOKENS[kind]
    metadata["tokenizer.ggml.model"] = kind
    metadata["tokenizer.ggml.pre"] = "default"
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = [3] * len(SPECIAL) + [1] * (ROWS - len(SPECIAL))
    if kind == "gpt2":
        metadata["tokenizer.ggml.merges"] = MERGES
    else:
        metadata["tokenizer.ggml.scores"] = [-float(n) for n in range(ROWS)]
    for token, name in enumerate(("padding", "bos", "eos", "unknown")):
        metadata[f"tokenizer.ggml.{name}_token_id"] = token
    metadata["tokenizer.ggml.add_bos_token"] = True

    tensors = {
        "token_embd.weight": torch.ones(ROWS, HIDDEN),
        "output_norm.weight": torch.ones(HIDDEN),
    }
    for stem in _ARCHITECTURES[architecture].names:
        for layer in range(layers) if "{}" in stem else ():
            name = stem.format(layer) + ".weight"
            if not stem.endswith("norm"):
                tensors[name] = torch.ones(HIDDEN, HIDDEN)
            else:
                tensors[name] = torch.ones(
                    HEAD_DIM if stem.endswith(("q_norm", "k_norm")) else HIDDEN
                )
            if architecture == "qwen2" and stem.endswith(("attn_q", "attn_k", "attn_v")):
                tensors[f"{stem.format(layer)}.bias"] = torch.zeros(HIDDEN)
    return metadata, tensors


# ---- what is broken ------------------------------------------------------------------------------


def set_number(metadata: GGUFMetadata, rng: random.Random, key: str, value: int) -> None:
    """Of any type that can hold it."""
    fitting = [
        name
        for name in TYPES
        if (-(2 ** (int(name.lstrip("uint")) - 1)) if name[0] == "i" else 0)
        <= value
        < 2 ** (int(name.lstrip("uint")) - (name[0] == "i"))
    ]
    metadata.set(key, value, rng.choice(fitting))


def anything(metadata: GGUFMetadata, rng: random.Random, key: str) -> None:
    """A value of any type."""
    match rng.randrange(9):
        case 0 | 1 | 2:
            set_number(metadata, rng, key, rng.choice(NUMBERS))
        case 3:
            metadata.set(key, rng.choice(FLOATS), "float64")
        case 4:
            metadata.set(key, rng.choice(STRINGS), "string")
        case 5:
            metadata.set(key, rng.random() < 0.5, "bool")
        case 6:
            metadata.set_array(key, rng.choices(WORDS + PAIRS, k=rng.randrange(4)), "string")
        case 7:
            kind = rng.choice(["uint8", "int32", "float32", "bool", "uint64"])
            item: Any = {"bool": True, "float32": math.nan}.get(kind, 3)
            metadata.set_array(key, [item] * rng.choice([0, 1, 2, ROWS, 5000]), kind)
        case 8:
            metadata.pop(key, None)


def any_key(metadata: GGUFMetadata, rng: random.Random) -> None:
    anything(metadata, rng, rng.choice(list(metadata)[1:]))


def hyperparameter(metadata: GGUFMetadata, rng: random.Random) -> None:
    prefix = metadata["general.architecture"]
    extra = [
        "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.dimension_count",
        "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.attn_factor", "rope.freq_base_swa",
        "attention.sliding_window_pattern", "final_logit_softcapping", "expert_count", "vocab_size",
    ]  # fmt: skip
    stored = [key for key in metadata if key.startswith(f"{prefix}.")]
    key = rng.choice([*stored, *(f"{prefix}.{name}" for name in extra)])
    if rng.random() < 0.7:
        set_number(metadata, rng, key, rng.choice(NUMBERS))
    else:
        anything(metadata, rng, key)


def yarn(metadata: GGUFMetadata, rng: random.Random) -> None:
    prefix = f"{metadata['general.architecture']}.rope."
    metadata[f"{prefix}scaling.type"] = rng.choice(["yarn", "linear"])
    names = ["scaling.factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
             "scaling.attn_factor", "freq_base"]  # fmt: skip
    for name in names:
        if rng.random() < 0.6:
            value = rng.choice([4.0, 1.0, 0.5, 1e-30, 1e30, *FLOATS])
            metadata.set(f"{prefix}{name}", value, "float64")
    set_number(
        metadata, rng, f"{prefix}scaling.original_context_length", rng.choice([8, 64, *NUMBERS])
    )


def token_id(metadata: GGUFMetadata, rng: random.Random) -> None:
    name = rng.choice(["bos", "eos", "eot", "eom", "unknown", "padding", "mask", "seperator"])
    set_number(metadata, rng, f"tokenizer.ggml.{name}_token_id", rng.choice(NUMBERS))


def broken_list(rng: random.Random, values: list[Any], pool: list[Any]) -> list[Any]:
    """Shorter, longer, or with elements of the pool."""
    values = list(values)
    match rng.randrange(5):
        case 0:
            return values[: rng.randrange(len(values) + 1)]
        case 1:
            return values + rng.choices(pool, k=rng.randrange(1, 5))
        case 2:
            return rng.choices(pool, k=len(values))
    for _ in range(rng.randrange(1, 6)):
        if values:
            values[rng.randrange(len(values))] = rng.choice(pool)
    return values


def tokens(metadata: GGUFMetadata, rng: random.Random) -> None:
    key = "tokenizer.ggml.tokens"
    stored = metadata.get(key)
    if isinstance(stored, list) and all(isinstance(word, str) for word in stored):
        metadata.set_array(key, broken_list(rng, stored, WORDS), "string")


def merges(metadata: GGUFMetadata, rng: random.Random) -> None:
    metadata.set_array("tokenizer.ggml.merges", broken_list(rng, MERGES, PAIRS), "string")


def scores(metadata: GGUFMetadata, rng: random.Random) -> None:
    pool = [*FLOATS, 3.4e38]
    kind = rng.choice(["float64", "float64", "int32"])
    pool = [1, 2, 3] if kind == "int32" else pool
    metadata.set_array("tokenizer.ggml.scores", broken_list(rng, [pool[2]] * ROWS, pool), kind)


def token_types(metadata: GGUFMetadata, rng: random.Random) -> None:
    pool = [0, 1, 2, 3, 4, 5, 6, 7, 100, -1, 2**31 - 1]
    kind = rng.choice(["int32", "int64", "int32"])
    values = broken_list(rng, [rng.choice(pool)] * ROWS, pool)
    metadata.set_array("tokenizer.ggml.token_type", values, kind)


def model_and_pre(metadata: GGUFMetadata, rng: random.Random) -> None:
    metadata["tokenizer.ggml.model"] = rng.choice(["gpt2", "llama", "t5", *STRINGS])
    metadata["tokenizer.ggml.pre"] = rng.choice(["llama-bpe", "qwen2", "tekken", *STRINGS])


TOKENIZER = [any_key, token_id, tokens, tokens, merges, merges, scores, token_types, model_and_pre]
ARCHITECTURE = [any_key, hyperparameter, hyperparameter, hyperparameter, yarn]


def broken_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    name = rng.choice(list(tensors))
    match rng.randrange(4):
        case 0:
            del tensors[name]
        case 1:
            shape = rng.choice([(), (1,), (HIDDEN, 1), (1, HIDDEN), (2, HIDDEN, HIDDEN), (64, 64)])
            tensors[name] = torch.ones(shape)
        case 2:
            tensors[rng.choice(["blk.", "blk.x.y", "blk.7.attn_q.weight", "output.weight"])] = (
                torch.ones(ROWS, HIDDEN)
            )
        case 3:
            tensors[name] = tensors[name].to(torch.int32)
    return tensors


def hostile(seed: int, changes: list[Callable[[GGUFMetadata, random.Random], None]]) -> Content:
    rng = random.Random(seed)
    architecture = rng.choice(list(_ARCHITECTURES))
    metadata, tensors = sound(architecture, rng.choice(["gpt2", "llama"]))
    for change in rng.choices(changes, k=rng.choice([1, 1, 1, 2, 3])):
        change(metadata, rng)
    if changes is ARCHITECTURE and rng.random() < 0.3:
        tensors = broken_tensors(tensors, rng)
    return metadata, tensors


# ---- the tests -----------------------------------------------------------------------------------


def outcome(path: Path) -> str | None:
    """The error's message; None where the file loads, and then what it gives works."""
    try:
        model, tokenizer = load_gguf_model(path, progress=False, pack=False)
    except ValueError as error:  # any other exception fails the test
        return str(error)
    ids = torch.tensor([[0, 1, ROWS - 1]])
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 3, ROWS)
    if tokenizer is not None:
        found = tokenizer("the they 日本 \n <s>").input_ids
        assert isinstance(tokenizer.decode(found), str)
    return None


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_the_sound_file_loads(tmp_path: Path, architecture: str, kind: str) -> None:
    metadata, tensors = sound(architecture, kind)
    save_gguf(tmp_path / "file.gguf", tensors, metadata)
    assert outcome(tmp_path / "file.gguf") is None


@pytest.mark.parametrize(
    ("start", "count"),
    [
        pytest.param(0, 120, id="short"),
        pytest.param(1000, 2500, id="long", marks=pytest.mark.fuzz),
    ],
)
@pytest.mark.parametrize("changes", [TOKENIZER, ARCHITECTURE], ids=["tokenizer", "architecture"])
def test_hostile_metadata(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changes: list[Callable[[GGUFMetadata, random.Random], None]],
    start: int,
    count: int,
) -> None:
    path = tmp_path / "file.gguf"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = 0
    for seed in range(start, start + count):
        metadata, tensors = hostile(seed, changes)
        save_gguf(path, tensors, metadata)
        began = time.process_time()
        try:
            message = outcome(path)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - began < 20, f"seed {seed}"
        loaded += message is None
        if message is not None:
            pattern = r"load_gguf(_model)?: .* must .*, got .* \(.*file\.gguf\)"
            assert re.fullmatch(pattern, message, re.DOTALL), f"seed {seed}: {message}"
            assert len(message) < 4000, f"seed {seed}"
    assert count // 20 < loaded < count * 19 // 20  # both outcomes are exercised
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 << 10  # KiB
    assert "panicked" not in capfd.readouterr().err  # what Rust cannot take is refused before
