"""Quantising, timed, and against ggml's own quantiser on as many threads where ggml is installed.

ggml is any ``libggml-base.so``, that of ``llama-cpp-python`` if none is named. The two take turns.
Prints how many weights each does per second in its best round, the median of the rounds' ratios,
the minutes that 8 billion weights take here at that rate, and how many rows differ: none, unless
ggml was compiled with fused multiply-adds.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import torch_q4
from torch_q4 import formats


def default_library() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
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


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown CPU"


def measure(
    quantizers: list[Callable[[], Tensor]], rounds: int
) -> tuple[list[list[float]], list[Tensor]]:
    """Each one's seconds in each round, and its latest result."""
    seconds: list[list[float]] = [[] for _ in quantizers]
    results = [quantizer() for quantizer in quantizers]
    for _ in range(rounds):
        for index, quantizer in enumerate(quantizers):
            began = time.perf_counter()
            results[index] = quantizer()
            seconds[index].append(time.perf_counter() - began)
    return seconds, results


def main() -> None:
    names = [fmt.name for fmt in formats.all() if fmt.quantizes]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="FORMAT")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ggml", type=Path, metavar="LIBRARY")
    options = parser.parse_args()
    path = options.ggml or default_library()
    library = ctypes.CDLL(str(path)) if path else None
    torch.manual_seed(0)
    x, importance = torch.randn(options.rows, options.columns), torch.rand(options.columns) + 0.1

    print(f"{cpu_name()}, kernels {torch_q4.cpu_isa()}; million weights a second")
    print(
        f"{'threads':>7} {'format':8} {'importance':10} {'here':>8} {'ggml':>8} {'ratio':>6} "
        f"{'rows differ':>12} {'minutes for 8e9':>16}"
    )
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for name in options.formats:
            fmt = formats.get(name)
            for weights in (None, importance):
                quantizers: list[Callable[[], Tensor]] = [
                    functools.partial(torch_q4.quantize, x, fmt, weights)
                ]
                if library and fmt.type_id >= 0:
                    quantizers.append(ggml_quantizer(library, fmt, x, weights, threads))
                seconds, results = measure(quantizers, options.rounds)
                rates = [x.numel() / min(each) for each in seconds]
                theirs = f"{'-':>8} {'-':>6} {'-':>12}"
                if len(rates) == 2:
                    pairs = zip(seconds[0], seconds[1], strict=True)
                    ratio = statistics.median(other / own for own, other in pairs)
                    differ = int((results[0] != results[1]).any(1).sum())
                    theirs = f"{rates[1] / 1e6:8.1f} {ratio:6.2f} {differ:12}"
                kind = "no" if weights is None else "yes"
                print(
                    f"{threads:7} {name:8} {kind:10} {rates[0] / 1e6:8.1f} {theirs} "
                    f"{8e9 / rates[0] / 60:16.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
