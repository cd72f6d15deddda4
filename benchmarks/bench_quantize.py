"""Quantising, timed against ggml's own quantiser on the same threads.

ggml is any ``libggml-base.so``, that of ``llama-cpp-python`` if none is named. The two take turns,
and the best of several rounds counts. Prints how many weights each does per second, and how many
rows differ: none, unless the library was compiled with fused multiply-adds.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import torch_q4
from torch_q4 import formats


def default_library() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("no ggml: name a libggml-base.so with --ggml, or pip install llama-cpp-python")
    return Path(spec.origin).parent / "lib" / "libggml-base.so"


def ggml_quantizer(
    library: ctypes.CDLL, fmt: formats.Format, x: Tensor, importance: Tensor | None, threads: int
) -> Callable[[], Tensor]:
    """The quantiser of a ggml library, on equal shares of the rows."""
    function = getattr(library, f"quantize_{fmt.name.replace('_k', '_K')}")
    function.restype = ctypes.c_size_t
    pool = ThreadPoolExecutor(threads)  # ctypes lets go of the interpreter's lock
    rows, columns = x.shape
    blocks = torch.empty(rows, fmt.row_bytes(columns), dtype=torch.uint8)
    bounds = [rows * part // threads for part in range(threads + 1)]
    weights = ctypes.c_void_p(importance.data_ptr() if importance is not None else None)

    def share(part: int) -> None:
        start, stop = bounds[part], bounds[part + 1]
        function(
            ctypes.c_void_p(x[start:].data_ptr()), ctypes.c_void_p(blocks[start:].data_ptr()),
            ctypes.c_int64(stop - start), ctypes.c_int64(columns), weights,
        )  # fmt: skip

    def run() -> Tensor:
        list(pool.map(share, range(threads)))
        return blocks

    return run


def main() -> None:
    names = [fmt.name for fmt in formats.all() if fmt.type_id >= 0]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="FORMAT")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ggml", type=Path, metavar="LIBRARY")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = ctypes.CDLL(str(options.ggml or default_library()))
    torch.manual_seed(0)
    x, importance = torch.randn(1024, 1024), torch.rand(1024) + 0.1

    print(f"{options.threads} threads, million weights a second, kernels {torch_q4.cpu_isa()}")
    print(
        f"{'format':8} {'importance':10} {'here':>8} {'ggml':>8} {'ratio':>6} {'rows differ':>12}"
    )
    for name in options.formats:
        fmt = formats.get(name)
        for weights in (None, importance):
            theirs = ggml_quantizer(library, fmt, x, weights, options.threads)
            best = [float("inf"), float("inf")]
            found: list[Tensor] = [x, x]
            for _ in range(options.rounds):
                for index in range(2):
                    began = time.perf_counter()
                    found[index] = torch_q4.quantize(x, fmt, weights) if index == 0 else theirs()
                    best[index] = min(best[index], time.perf_counter() - began)
            differ = int((found[0] != found[1]).any(1).sum())
            ours, other = (x.numel() / seconds / 1e6 for seconds in best)
            kind = "no" if weights is None else "yes"
            print(f"{name:8} {kind:10} {ours:8.1f} {other:8.1f} {ours / other:6.2f} {differ:12}")


if __name__ == "__main__":
    main()
