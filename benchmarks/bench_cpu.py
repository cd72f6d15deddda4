"""Times ``torch_q4.linear`` on the CPU against ``F.linear`` on the dequantised weight.

Every cell is one comparison: the two are called in turn on the same activations, and the ratio is
taken round by round, so that a machine whose speed drifts does not favour either. Weights rotate
over more memory than the last-level cache holds ("cold"), as they do when a model with many layers
decodes; ``--hot`` keeps one weight instead. Rates count 2 M N K operations; GB/s counts the
packed weight's bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import torch_q4
from torch_q4 import formats


@dataclasses.dataclass
class Cell:
    """One comparison; times in seconds, the ratio is F.linear's time over ours."""

    format: str
    compute: str
    threads: int
    n: int
    k: int
    m: int
    hot: bool
    seconds: float
    reference_seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float
    gflops: float
    gigabytes_per_second: float


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copies_to_fill(weight_bytes: int, cache_bytes: int, hot: bool) -> int:
    return 1 if hot else max(2, -(-cache_bytes // weight_bytes))


def last_level_cache_bytes() -> int:
    """The largest cache that the kernel reports, or 32 MB where it reports none."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().rstrip("K")) * 1024 for p in sizes), default=32 << 20)


def compare(
    fmt: formats.Format, compute: str, n: int, k: int, rows: list[int], options: argparse.Namespace
) -> list[Cell]:
    cache = last_level_cache_bytes()
    dense = torch.randn(n, k)
    blocks = torch_q4.quantize(dense, fmt)
    dense = torch_q4.dequantize(blocks, fmt)
    denses = [dense] + [
        dense.clone() for _ in range(copies_to_fill(4 * n * k, cache, options.hot) - 1)
    ]
    packed = [blocks] + [
        blocks.clone() for _ in range(copies_to_fill(blocks.numel(), cache, options.hot) - 1)
    ]
    cells = []
    for m in rows:
        x = torch.randn(m, k)
        ours, theirs = [], []
        for round_ in range(options.rounds + 1):
            w, b = denses[round_ % len(denses)], packed[round_ % len(packed)]
            theirs.append(seconds_of(functools.partial(F.linear, x, w)))
            ours.append(seconds_of(functools.partial(torch_q4.linear, x, b, fmt, compute=compute)))
        ours, theirs = ours[1:], theirs[1:]  # the first round warms caches and thread pools up
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        seconds = statistics.median(ours)
        cells.append(
            Cell(
                format=fmt.name,
                compute=compute,
                threads=torch.get_num_threads(),
                n=n,
                k=k,
                m=m,
                hot=options.hot,
                seconds=seconds,
                reference_seconds=statistics.median(theirs),
                ratio=statistics.median(ratios),
                ratio_min=min(ratios),
                ratio_max=max(ratios),
                gflops=2e-9 * m * n * k / seconds,
                gigabytes_per_second=1e-9 * blocks.numel() / seconds,
            )
        )
    return cells


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [fmt.name for fmt in formats.all()]
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="FORMAT")
    parser.add_argument(
        "--compute", nargs="+", choices=["exact", "int8"], default=["exact", "int8"]
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 512], help="M")
    parser.add_argument(
        "--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"], help="NxK"
    )
    parser.add_argument("--rounds", type=int, default=30, help="counted rounds per cell")
    parser.add_argument("--hot", action="store_true", help="one weight, which stays in the cache")
    parser.add_argument("--short", action="store_true", help="4096x4096 and 9 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args()
    if options.short:
        options.shapes, options.rounds = ["4096x4096"], 9

    print(f"{cpu_name()}, torch {torch.__version__}, kernels: {torch_q4.cpu_isa()}")
    print("ratio: time of F.linear in float32 over ours, median (min-max) of the rounds")
    cells: list[Cell] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in options.shapes:
            n, k = (int(side) for side in shape.split("x"))
            heading = "".join(f"{f'M={m}':>26}" for m in options.rows)
            temperature = "hot" if options.hot else "cold"
            print(f"\n{n}x{k}, {threads} thread(s), {temperature} weights\n{'':16}{heading}")
            for name in options.formats:
                for compute in options.compute:
                    row = compare(formats.get(name), compute, n, k, options.rows, options)
                    cells += row
                    text = "".join(
                        f"{cell.gflops:6.0f} GF "
                        f"{f'{cell.ratio:.2f} ({cell.ratio_min:.2f}-{cell.ratio_max:.2f})':>16}"
                        for cell in row
                    )
                    print(f"{name:9} {compute:6}{text}", flush=True)
    if options.json:
        record = {
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "isa": torch_q4.cpu_isa(),
            "cells": [dataclasses.asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    slower = [cell for cell in cells if cell.ratio < 1 and cell.m == 1]
    print(f"\ncells at M=1 slower than F.linear: {len(slower)} of {sum(c.m == 1 for c in cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
