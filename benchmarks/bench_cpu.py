"""Times ``torch_q4.linear`` on the CPU against ggml and against ``F.linear`` on a dense weight.

Every cell is one comparison: the contenders are called in turn, round after round, and ratios are
taken round by round, so that a machine whose speed drifts favours none. A turn begins when the
threads of the one before have stopped waiting actively, and with a call that is not counted, as in
the middle of a model; of the next few calls the quickest counts. Weights rotate over more memory
than the last-level cache holds ("cold"), as they do when a model with many layers decodes;
``--hot`` keeps one weight instead.

Rates count 2 M N K operations. The share of DRAM bandwidth counts the packed weight's bytes against
what ``torch.dot`` reads in the same rounds. ggml runs each cell with the quickest of its paths (see
``ggml.py``), chosen anew for every cell, which is more than an application can do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cpu_report
import ggml
import torch
import torch.nn.functional as F
from cpu_report import BFLOAT16, FLOAT32, GGML, OURS, READ, Cell
from random_weights import random_blocks
from torch import Tensor

import torch_q4
from torch_q4 import formats
from torch_q4.formats import Format

TURN_CALLS = 5  # counted calls of a turn, after one that is not counted
LONG_CALL_SECONDS = 10e-3  # a call that takes longer is a turn of its own


class Contender:
    """Something to time.

    Args:
        call: what to time; its argument counts the calls, so that it can rotate weights.
        run: calls its argument wherever ``call`` is to be called.
    """

    def __init__(
        self,
        call: Callable[[int], object],
        run: Callable[[Callable[[], float]], float] = lambda function: function(),
    ) -> None:
        self._call = call
        self._run = run
        self._count = 0
        run(self._once)
        self._short = run(self._once) < LONG_CALL_SECONDS

    def _once(self) -> float:
        start = time.perf_counter()
        self._call(self._count)
        self._count += 1
        return time.perf_counter() - start

    def turn(self) -> float:
        """Seconds of one call: the quickest of a few, the one that others disturbed least."""
        settle()
        return self._run(self._undisturbed if self._short else self._once)

    def _undisturbed(self) -> float:
        self._once()
        return min(self._once() for _ in range(TURN_CALLS))


def settle() -> None:
    """Waits until this process's threads are idle: OpenMP's spin for milliseconds after a call."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 3e-4:
            return


def last_level_cache_bytes() -> int:
    """The largest cache that the kernel reports, or 32 MB where it reports none."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().rstrip("K")) * 1024 for p in sizes), default=32 << 20)


def copies_to_fill(weight_bytes: int, hot: bool) -> int:
    return 1 if hot else max(2, -(-last_level_cache_bytes() // weight_bytes))


def example_blocks(fmt: Format, n: int, k: int) -> Tensor:
    """A weight; its rows repeat, to be made sooner."""
    some = random_blocks(fmt, min(n, 128), k)
    return some.repeat(-(-n // some.shape[0]), 1)[:n].contiguous()


class Dense:
    """What ``F.linear`` multiplies by, and what is read to know the bandwidth.

    Its values don't matter to its speed, so all formats share it.
    """

    def __init__(self, n: int, k: int, hot: bool) -> None:
        self.bytes = 4 * n * k
        copies = copies_to_fill(4 * n * k, hot)
        self.float32 = [torch.randn(n, k)]
        self.float32 += [self.float32[0].clone() for _ in range(copies - 1)]
        copies = copies_to_fill(2 * n * k, hot)
        self.bfloat16 = [self.float32[0].bfloat16() for _ in range(copies)]

    def contenders(self, x: Tensor, read: bool) -> dict[str, Contender]:
        """``F.linear`` in both types; if ``read``, also what only reads the float32 weight."""
        low = x.bfloat16()
        found = {
            FLOAT32: Contender(lambda i: F.linear(x, self.float32[i % len(self.float32)])),
            BFLOAT16: Contender(lambda i: F.linear(low, self.bfloat16[i % len(self.bfloat16)])),
        }
        if read:
            halves = [weight.flatten().tensor_split(2) for weight in self.float32]
            found[READ] = Contender(lambda i: torch.dot(*halves[i % len(halves)]))
        return found


class Packed:
    """One weight in one format: our copies of it, and ggml's for each path.

    Raises:
        ggml.GgmlError: ggml computes something else than the product with the dequantised weight.
    """

    def __init__(
        self, fmt: Format, n: int, k: int, library: ggml.Ggml | None, options: argparse.Namespace
    ) -> None:
        self.format = fmt
        blocks = example_blocks(fmt, n, k)
        self.bytes = blocks.numel()
        copies = copies_to_fill(self.bytes, options.hot)
        self._packed = not options.canonical
        make = functools.partial(torch_q4.pack, fmt=fmt) if self._packed else Tensor.clone
        self._weights = [make(blocks) for _ in range(copies)]
        self._library = library
        self._theirs: dict[str, ggml.Weights] = {}
        if library and fmt.type_id >= 0:
            for path in library.build.paths:
                with contextlib.suppress(ggml.UnsupportedError):
                    self._theirs[path] = ggml.Weights(library, fmt, blocks, path, copies)
            self._check(blocks, torch.randn(2, k))

    def _check(self, blocks: Tensor, x: Tensor) -> None:
        expected = F.linear(x, torch_q4.dequantize(blocks, self.format))
        for path, weights in self._theirs.items():
            with contextlib.closing(ggml.Product(weights, x)) as product:
                weights.ggml.run(functools.partial(product, 0))
                error = float((product.output() - expected).norm() / expected.norm())
            if not error < ggml.TOLERANCE:
                raise ggml.GgmlError(
                    f"ggml: {self.format.name} by {path} must be the product with the dequantised "
                    f"weight, got a relative error of {error:.3g}"
                )

    def ours(self, x: Tensor, compute: str) -> Contender:
        """``torch_q4.linear``."""
        weights = self._weights

        def call(index: int) -> Tensor:
            weight = weights[index % len(weights)]
            return torch_q4.linear(x, weight, self.format, compute=compute, packed=self._packed)

        return Contender(call)

    def theirs(self, x: Tensor, stack: contextlib.ExitStack) -> tuple[Contender, str] | None:
        """The quickest of ggml's paths with its name, usable until the stack is unwound."""
        if not self._theirs or not self._library:
            return None
        trials = {}
        for path, weights in self._theirs.items():
            product = stack.enter_context(contextlib.closing(ggml.Product(weights, x)))
            contender = Contender(product, self._library.run)
            trials[path] = (min(contender.turn() for _ in range(2)), contender)
        path = min(trials, key=lambda path: trials[path][0])
        return trials[path][1], path

    def close(self) -> None:
        """Frees ggml's copies."""
        for weights in self._theirs.values():
            weights.close()


def measure(packed: Packed, dense: Dense, n: int, k: int, m: int, rounds: int, hot: bool) -> Cell:
    x = torch.randn(m, k)
    with contextlib.ExitStack() as stack:
        contenders = dense.contenders(x, read=m <= 16 and not hot)
        theirs = packed.theirs(x, stack)
        if theirs:
            contenders[GGML] = theirs[0]
        contenders |= {compute: packed.ours(x, compute) for compute in OURS}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                seconds[name].append(contender.turn())
    return Cell(
        format=packed.format.name,
        n=n,
        k=k,
        m=m,
        threads=torch.get_num_threads(),
        hot=hot,
        weight_bytes=packed.bytes,
        read_bytes=dense.bytes,
        ggml_path=theirs[1] if theirs else None,
        seconds=seconds,
    )


def host_microseconds(rounds: int = 60, calls: int = 100) -> dict[str, dict[str, float]]:
    """What one call costs on a 32x32 weight, where the arithmetic takes next to no time.

    Returns:
        Microseconds by mode and function, the median of the rounds.
    """
    linear = torch.nn.Linear(32, 32, bias=False).requires_grad_(False)
    layers = {c: torch_q4.QuantLinear.from_linear(linear, "q8_0", compute=c) for c in OURS}
    blocks = torch_q4.quantize(linear.weight, "q8_0")
    x = torch.randn(1, 32)
    functions: dict[str, Callable[[], object]] = {
        "F.linear": lambda: F.linear(x, linear.weight),
        "nn.Linear": lambda: linear(x),
        "linear": lambda: torch_q4.linear(x, blocks, "q8_0"),
        "QuantLinear exact": lambda: layers["exact"](x),
        "QuantLinear int8": lambda: layers["int8"](x),
    }
    found: dict[str, dict[str, float]] = {}
    for mode, context in (
        ("inference mode", torch.inference_mode),
        ("grad mode", torch.enable_grad),
    ):
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        with context():
            for _ in range(rounds):
                for name, function in functions.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        function()
                    seconds[name].append((time.perf_counter() - start) / calls)
        found[mode] = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [fmt.name for fmt in formats.all()]
    threads = sorted({1, torch.get_num_threads()})
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="FORMAT")
    parser.add_argument("--threads", nargs="+", type=int, default=threads)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 512], help="M")
    parser.add_argument(
        "--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"], help="NxK"
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="counted rounds per cell; a third if M > 16"
    )
    parser.add_argument("--hot", action="store_true", help="one weight, which stays in the cache")
    parser.add_argument("--short", action="store_true", help="4096x4096 and 9 rounds")
    parser.add_argument(
        "--canonical", action="store_true", help="time linear on blocks as a GGUF file has them"
    )
    parser.add_argument(
        "--ggml",
        type=Path,
        metavar="DIR",
        help="where libggml-base.so and libggml-cpu.so are (default: llama-cpp-python's)",
    )
    parser.add_argument(
        "--ggml-paths", nargs="+", metavar="PATH", help="ggml's paths to use (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a plot of GFLOP/s")
    options = parser.parse_args()
    if options.short:
        options.shapes, options.rounds = ["4096x4096"], 9
    return options


def load_ggml(options: argparse.Namespace) -> ggml.Ggml | None:
    directory = options.ggml or ggml.find()
    if directory is None:
        print("ggml: not measured; install llama-cpp-python or give --ggml DIR")
        return None
    try:
        library = ggml.Ggml(directory, options.ggml_paths)
    except ggml.GgmlError as error:
        raise SystemExit(str(error)) from error
    print(library.build)
    return library if library.build.paths else None


@torch.inference_mode()
def measure_all(library: ggml.Ggml | None, options: argparse.Namespace) -> list[Cell]:
    cells = []
    for shape in options.shapes:
        n, k = (int(side) for side in shape.split("x"))
        temperature = "hot" if options.hot else "cold"
        print(f"\n{shape}, {temperature} weights, M rows of activations\n{cpu_report.heading()}")
        dense = Dense(n, k, options.hot)
        for name in options.formats:
            with contextlib.closing(Packed(formats.get(name), n, k, library, options)) as packed:
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    if library:
                        library.set_threads(threads)
                    for m in options.rows:
                        rounds = options.rounds if m <= 16 else max(3, options.rounds // 3)
                        cells.append(measure(packed, dense, n, k, m, rounds, options.hot))
                        print(cpu_report.row(cells[-1]), flush=True)
    return cells


def main() -> int:
    options = parse_options()
    if options.plot:
        cpu_report.require_matplotlib()  # rather than after minutes of measuring
    print(f"{cpu_name()}, torch {torch.__version__}, kernels: {torch_q4.cpu_isa()}")
    load = os.getloadavg()[0]
    print(f"load average before: {load:.1f}, with {os.cpu_count()} CPUs")
    library = load_ggml(options)
    cells = measure_all(library, options)
    torch.set_num_threads(1)
    host = host_microseconds()
    print("\nhost: microseconds of one call on a 32x32 weight, and times F.linear's")
    for mode, times in host.items():
        parts = (f"{name} {t:.1f} ({t / times['F.linear']:.1f}x)" for name, t in times.items())
        print(f"{mode:15} {', '.join(parts)}")
    print(f"\n{cpu_report.summary(cells)}")
    record = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "isa": torch_q4.cpu_isa(),
        "ggml": dataclasses.asdict(library.build) if library else None,
        "load_average": [load, os.getloadavg()[0]],
        "host_microseconds": host,
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        cpu_report.plot(cells, cpu_report.title_of(record), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
