"""Times ``torch_q4.linear`` on a GPU against ``F.linear`` and against a kernel that only reads.

Every cell is one comparison. Each contender's calls are captured in a CUDA (or HIP) graph, so that
no host time is in the figures; the graphs are replayed in turn, round after round, and ratios are
taken round by round. The calls of a graph go over copies of the weight that together exceed the
last-level cache several times ("cold"), as they do when a model with many layers decodes. A call
that takes milliseconds is timed once, without a graph.

``F.linear`` multiplies by the dequantised weight in the dtype of the activations, with copies of
its own. The kernel that only reads the packed bytes is ``read_bytes.hip``, compiled when this runs,
by nvcc or hipcc; without either, its column is left out. Each contender's product is first compared
with float64: what is wrong is not timed.

The weight's rows are those of a small quantised matrix in random order, the activations normally
distributed. Besides, ``dequantize`` is timed against a device-to-device copy that moves as many
bytes, and with ``--host`` a call's cost for the host.

    python benchmarks/bench_gpu.py --short
    python benchmarks/bench_gpu.py --shapes 14336x4096 --formats q4_0 q4_k --kernels --json out.json
    python benchmarks/bench_gpu.py --shapes --host
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_report
import torch
import torch.nn.functional as F
from gpu_report import COPY, DENSE, DEQUANTIZE, INT8, LINEAR, READ, Cell, Decoding
from random_weights import random_blocks
from torch import Tensor

import torch_q4
from torch_q4 import _timing, formats
from torch_q4._timing import (
    Call,
    GraphTimer,
    calls_in_graph,
    copies_to_fill,
    time_in_turn,
)
from torch_q4.formats import Format

ROOT = Path(__file__).parent.parent
READ_SOURCE = Path(__file__).with_name("read_bytes.hip")

SHAPES = ("14336x4096", "4096x14336", "4096x4096")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
SHORT_ROWS = (1, 4, 16, 64, 512)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KERNELS = (
    "reference", "rows", "tiles_16", "tiles_64", "pipelined_16", "pipelined_64", "pipelined_128",
    "hopper_rows", "hopper_many", "blas", INT8,
)  # fmt: skip
# Relative error in norm: several times the rounding of inputs and outputs to the dtype.
TOLERANCE = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 1e-4}
INT8_TOLERANCE = 2e-2

TILE_ROWS = 64


# ---- what is decided without a device ------------------------------------------------------------


def parse_shape(text: str) -> tuple[int, int]:
    """``NxK``; the error's words are argparse's."""
    n, separator, k = text.partition("x")
    if not (separator and n.isdecimal() and k.isdecimal() and int(n) > 0 and int(k) > 0):
        raise argparse.ArgumentTypeError(f"must be NxK, got {text}")
    return int(n), int(k)


def kernels_for(names: Sequence[str], dtype: str) -> list[str]:
    """Those that take activations of this dtype: matrix cores are for 16 bits."""
    matrix = ("tiles", "pipelined", "hopper_rows", "hopper_many")
    return [name for name in names if dtype != "float32" or not name.startswith(matrix)]


# ---- the device ----------------------------------------------------------------------------------


class Gpu(GraphTimer):
    """torch's current GPU: captures calls in graphs, and times them.

    Everything runs on one stream of its own, since the default stream cannot be captured.
    """

    def __init__(self) -> None:
        torch.cuda.set_stream(torch.cuda.Stream())
        super().__init__()
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.multiprocessors: int = properties.multi_processor_count
        self.hip = torch.version.hip is not None
        self.architecture: str = (
            properties.gcnArchName if self.hip else f"sm_{properties.major}{properties.minor}"
        )

    def workspace(self, call: Callable[[], Tensor]) -> int:
        """Bytes that a call allocates beside its output, at its peak."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        return torch.cuda.max_memory_allocated() - before - out.nbytes

    def synchronize(self) -> None:
        """Waits for everything; raises what went wrong in it."""
        torch.cuda.synchronize()


class ReadArgs(ctypes.Structure):
    """``read_bytes.hip``'s."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("sink", ctypes.c_void_p),
        ("match", ctypes.c_uint32),
    ]


@dataclasses.dataclass(frozen=True)
class ReadVariant:
    """A kernel of ``read_bytes.hip`` and its grid.

    Attributes:
        loads: 16-byte loads that each thread has under way.
        blocks: per multiprocessor; None for one block per portion, without a loop.
    """

    loads: int
    blocks: int | None

    def grid(self, count: int, multiprocessors: int) -> int:
        """Blocks to read ``count`` times 16 bytes."""
        portions = max(1, -(-count // (BLOCK_THREADS * self.loads)))
        return portions if self.blocks is None else min(portions, self.blocks * multiprocessors)


BLOCK_THREADS = 256
READ_VARIANTS = tuple(ReadVariant(loads, blocks) for loads in (2, 4, 8) for blocks in (None, 4, 8))


class Reader:
    """The kernels of ``read_bytes.hip``, on torch's current stream.

    Args:
        driver: a ``Driver`` of ``tests/device/driver.py``.
        image: the code object.
        gpu: where.
    """

    # Random words are this once in four billion; then `sink` is written, which is not read.
    _MATCH = 0x9E3779B9

    def __init__(self, driver: Any, image: bytes, gpu: Gpu) -> None:
        self._driver, self._gpu = driver, gpu
        hip = hasattr(driver.library, "hipModuleLaunchKernel")
        self._launch_name = "hipModuleLaunchKernel" if hip else "cuLaunchKernel"
        module = driver.load(image)
        self._functions = {
            name: driver.function(module, name)
            for name in ("nothing", *(f"read_{variant.loads}" for variant in READ_VARIANTS))
        }
        self._sink = torch.zeros(1, dtype=torch.int32, device=gpu.device)

    def _launch(self, name: str, blocks: int, args: ReadArgs) -> None:
        sizes = [ctypes.c_uint(size) for size in (blocks, 1, 1, BLOCK_THREADS, 1, 1, 0)]
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = ctypes.c_void_p(self._functions[name])
        self._driver.call(self._launch_name, function, *sizes, stream, parameters, None)

    def nothing(self) -> None:
        """Launches a kernel that does nothing."""
        self._launch("nothing", 1, ReadArgs())

    def read(self, data: Tensor, variant: ReadVariant) -> None:
        """Reads all of ``data`` but for what is beyond a multiple of 16 bytes."""
        count = data.nbytes // 16
        args = ReadArgs(data.data_ptr(), count, self._sink.data_ptr(), self._MATCH)
        blocks = variant.grid(count, self._gpu.multiprocessors)
        self._launch(f"read_{variant.loads}", blocks, args)

    def check(self) -> None:
        """Whether every variant reads the first word, the last, and some in between.

        Raises:
            RuntimeError: one does not.
        """
        data = torch.zeros(4 * 1_000_003, dtype=torch.int32, device=self._gpu.device)
        match = ctypes.c_int32(self._MATCH).value
        for variant in READ_VARIANTS:
            for place in (0, 12_345, 2_000_001, data.numel() - 1):
                data[place] = match
                self._sink.zero_()
                self.read(data, variant)
                if int(self._sink) != match:
                    raise RuntimeError(f"read_bytes.hip: {variant} must read word {place}")
                data[place] = 0

    def quickest(self, weights: Sequence[Tensor]) -> ReadVariant:
        """The variant that reads these in the least time."""
        count = calls_in_graph(len(weights), 5.0)

        def capture(variant: ReadVariant) -> Callable[[], None]:
            return self._gpu.capture(lambda i: self.read(weights[i % len(weights)], variant), count)

        graphs = [capture(variant) for variant in READ_VARIANTS]
        rounds = [self._gpu.times(graphs) for _ in range(5)]
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        return READ_VARIANTS[medians.index(min(medians))]


def compile_command(architecture: str, hip: bool, output: Path) -> list[str] | None:
    """How to compile ``read_bytes.hip`` for a device; None where there is no compiler."""
    name, variables, usual = (
        ("hipcc", ("ROCM_PATH", "ROCM_HOME"), "/opt/rocm")
        if hip
        else ("nvcc", ("CUDA_HOME", "CUDA_PATH"), "/usr/local/cuda")
    )
    roots = [*(os.environ[v] for v in variables if v in os.environ), usual]
    places = os.pathsep.join(str(Path(root) / "bin") for root in roots)
    compiler = shutil.which(name) or shutil.which(name, path=places)
    if compiler is None:
        return None
    target = (
        ["-x", "hip", "--genco", f"--offload-arch={architecture}"]
        if hip
        else ["-x", "cu", "-cubin", f"-arch={architecture}"]
    )
    return [compiler, *target, "-O3", "-std=c++17", "-o", str(output), str(READ_SOURCE)]


def open_driver() -> Any:
    """The driver that torch uses, as ``tests/device/driver.py`` knows it."""
    table = dict(line.partition(" ")[::2] for line in torch.ops.torch_q4.gpu_table().splitlines())
    sys.path.append(str(ROOT / "tests" / "device"))
    return importlib.import_module("driver").open_driver(table["driver"])


def open_reader(gpu: Gpu, driver: Any) -> Reader | None:
    """The kernels that only read; None, and a word on stderr, where they cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "read_bytes"
        command = compile_command(gpu.architecture, gpu.hip, output)
        if command is None:
            say("read: not measured; neither nvcc nor hipcc is there to compile read_bytes.hip")
            return None
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            say(f"read: not measured; {shlex.join(command)} failed:\n{done.stderr}")
            return None
        reader = Reader(driver, output.read_bytes(), gpu)
    reader.check()
    return reader


# ---- measuring -----------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Contender(_timing.Contender):
    """Something to time.

    Attributes:
        tolerance: of its product's relative error.
    """

    tolerance: float = 0.0


@functools.cache
def tile(format_name: str, k: int) -> Tensor:
    """A few rows of a weight, on the CPU."""
    return random_blocks(format_name, TILE_ROWS, k, torch.Generator().manual_seed(k))


class Weight:
    """One weight in one format: cold copies, canonical until :meth:`pack`, and dense ones."""

    def __init__(self, gpu: Gpu, fmt: Format, n: int, k: int, dtype: str) -> None:
        self.gpu, self.format, self.n, self.k, self.dtype = gpu, fmt, n, k, dtype
        some = tile(fmt.name, k)
        self._rows = torch.randint(TILE_ROWS, (n,), device=gpu.device)
        self._values = torch_q4.dequantize(some, fmt).double().to(gpu.device)
        first = some.to(gpu.device)[self._rows]
        self.bytes = first.nbytes
        copies = copies_to_fill(self.bytes, gpu.cold_bytes)
        self.blocks = [first, *(first.clone() for _ in range(copies - 1))]
        dense = torch_q4.dequantize(first, fmt, DTYPES[dtype])
        copies = copies_to_fill(dense.nbytes, gpu.cold_bytes)
        self.dense = [dense, *(dense.clone() for _ in range(copies - 1))]

    def values(self) -> Tensor:
        """float64 ``(n, k)``, decoded on the CPU."""
        return self._values[self._rows]

    def expected(self, x: Tensor) -> Tensor:
        """The product in float64."""
        return (x.double() @ self._values.T)[:, self._rows]

    def pack(self) -> None:
        """Puts the copies into the packed layout."""
        for blocks in self.blocks:
            torch.ops.torch_q4.pack_.default(blocks, self.format.type_id)

    def contenders(
        self, x: Tensor, reader: tuple[Reader, ReadVariant] | None, kernels: Sequence[str]
    ) -> dict[str, Contender]:
        """All of a cell's."""
        tolerance = TOLERANCE[self.dtype]
        packed, dense, fmt = self.blocks, self.dense, self.format
        count = len(packed)
        ours = functools.partial(torch_q4.linear, x, packed=True)
        found = {
            LINEAR: Contender(lambda i: ours(packed[i % count], fmt), count, tolerance),
            DENSE: Contender(lambda i: F.linear(x, dense[i % len(dense)]), len(dense), tolerance),
        }
        for name in kernels_for(kernels, self.dtype):
            found[name] = (
                Contender(
                    lambda i: ours(packed[i % count], fmt, compute="int8"), count, INT8_TOLERANCE
                )
                if name == INT8
                else Contender(functools.partial(self._with, x, name), count, tolerance)
            )
        if reader:
            read, variant = reader
            found[READ] = Contender(lambda i: read.read(packed[i % count], variant), count)
        return found

    def _with(self, x: Tensor, kernel: str, index: int) -> Tensor:
        blocks = self.blocks[index % len(self.blocks)]
        return torch.ops.torch_q4._linear_with.default(
            x, blocks, self.format.type_id, None, "exact", True, kernel
        )


def why_wrong(
    gpu: Gpu, call: Callable[[], Tensor], expected: Tensor, tolerance: float, dtype: str
) -> str | None:
    """What is wrong with a product; None if nothing is."""
    # torch hands this memory out again: what a kernel does not write is seen.
    poison = torch.full(expected.shape, torch.nan, dtype=DTYPES[dtype], device=expected.device)
    del poison
    try:
        out = call()
    except RuntimeError as refusal:
        gpu.synchronize()  # an error of the device itself is one for all that follows
        return str(refusal).splitlines()[0][:200]
    error = float((out.double() - expected).norm() / expected.norm())
    return None if error <= tolerance else f"relative error {error:.3g}, over {tolerance:g}"


def measure(
    weight: Weight,
    m: int,
    reader: tuple[Reader, ReadVariant] | None,
    options: argparse.Namespace,
) -> Cell:
    gpu = weight.gpu
    cell = Cell(weight.format.name, weight.dtype, weight.n, weight.k, m, weight.bytes)
    x = torch.randn(m, weight.k, device=gpu.device, dtype=DTYPES[weight.dtype])
    contenders = weight.contenders(x, reader, options.kernels)
    expected = weight.expected(x)
    for name, contender in list(contenders.items()):
        call = functools.partial(contender.call, 0)
        if name == READ:
            call()
        elif why := why_wrong(gpu, call, expected, contender.tolerance, weight.dtype):
            cell.wrong[name] = why
            del contenders[name]
            say(f"WRONG: {cell.shape} {cell.dtype} {cell.format} M={m} {name}: {why}")
    del expected
    if LINEAR in contenders:
        cell.workspace_bytes = gpu.workspace(functools.partial(contenders[LINEAR].call, 0))
    cell.microseconds = time_in_turn(gpu, contenders, options.rounds)
    return cell


def measure_decoding(weight: Weight, rounds: int) -> Decoding:
    """``dequantize`` on canonical blocks, and a copy that reads and writes as many bytes."""
    gpu, fmt, blocks = weight.gpu, weight.format, weight.blocks
    dtype = DTYPES[weight.dtype]
    dense_bytes = weight.dense[0].nbytes
    moved = weight.bytes + dense_bytes
    found = Decoding(fmt.name, weight.dtype, weight.n, weight.k, moved)
    expected = weight.values()
    wrong = why_wrong(
        gpu,
        lambda: torch_q4.dequantize(blocks[0], fmt, dtype),
        expected,
        TOLERANCE[weight.dtype],
        weight.dtype,
    )
    del expected
    # As many outputs live at a time as do not fit into the cache.
    outputs: list[Tensor | None] = [None] * copies_to_fill(dense_bytes, gpu.cold_bytes)

    def dequantize(index: int) -> None:
        outputs[index % len(outputs)] = None
        blocks_here = blocks[index % len(blocks)]
        outputs[index % len(outputs)] = torch_q4.dequantize(blocks_here, fmt, dtype)

    pairs = copies_to_fill(moved, gpu.cold_bytes)
    half = moved // 1024 * 512  # every buffer is aligned
    buffers = torch.empty(2, pairs, half, dtype=torch.uint8, device=gpu.device).random_()
    contenders = {
        DEQUANTIZE: Contender(dequantize, len(blocks)),
        COPY: Contender(lambda i: buffers[1][i % pairs].copy_(buffers[0][i % pairs]), pairs),
    }
    if wrong:
        found.wrong[DEQUANTIZE] = wrong
        del contenders[DEQUANTIZE]
        say(f"WRONG: {found.shape} {found.dtype} {found.format} dequantize: {wrong}")
    found.microseconds = time_in_turn(gpu, contenders, rounds)
    return found


def empty_node_microseconds(gpu: Gpu, reader: Reader | None) -> float:
    """What a node takes that does nothing; without a reader, one that fills one element."""
    something = torch.ones(1, device=gpu.device)
    call: Call = (lambda _: reader.nothing()) if reader else (lambda _: something.fill_(1))
    call(0)
    graph = gpu.capture(call, 1000)
    return statistics.median(gpu.times([graph])[0] / 1000 for _ in range(5))


def host_microseconds(
    gpu: Gpu, rows: Sequence[int] = (1, 16, 512), rounds: int = 20, calls: int = 100
) -> dict[str, dict[str, dict[str, float]]]:
    """What a call costs the host, on a 64x256 weight that takes the device next to no time.

    The device is idle when a round begins, and a round's launches all fit into its queue: the host
    never waits for it.

    Returns:
        Microseconds by mode, M and function, the median of the rounds.
    """
    n, k = 64, 256
    dense = torch.nn.Linear(k, n, bias=False, dtype=torch.float16).to(gpu.device)
    dense.requires_grad_(False)
    fmt = formats.get("q4_k")
    blocks = torch_q4.pack(torch_q4.quantize(dense.weight, fmt), fmt)
    layer = torch_q4.QuantLinear.from_blocks(blocks, fmt, packed=True)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for mode, context in (
        ("inference mode", torch.inference_mode),
        ("grad mode", torch.enable_grad),
    ):
        found[mode] = {}
        for m in rows:
            x = torch.randn(m, k, device=gpu.device, dtype=torch.float16)
            functions: dict[str, Callable[[Tensor], Tensor]] = {
                DENSE: lambda x: F.linear(x, dense.weight),
                "nn.Linear": dense,
                LINEAR: lambda x: torch_q4.linear(x, blocks, fmt, packed=True),
                "QuantLinear": layer,
            }
            seconds: dict[str, list[float]] = {name: [] for name in functions}
            with context():
                for _ in range(rounds + 1):
                    for name, function in functions.items():
                        gpu.synchronize()
                        start = time.perf_counter()
                        for _ in range(calls):
                            function(x)
                        seconds[name].append((time.perf_counter() - start) / calls)
            gpu.synchronize()
            # The first round loads kernels.
            medians = {name: 1e6 * statistics.median(s[1:]) for name, s in seconds.items()}
            found[mode][str(m)] = medians
    return found


@torch.inference_mode()
def measure_all(gpu: Gpu, reader: Reader | None, record: dict[str, Any], options: Any) -> None:
    """Fills the record, and prints each table when it is complete."""
    variants: dict[int, ReadVariant] = {}  # by bytes of the weight
    for (n, k), dtype in itertools.product(options.shapes, options.dtypes):
        cells: list[Cell] = []
        decodings: list[Decoding] = []
        for name in options.formats:
            start = time.monotonic()
            fmt = formats.get(name)
            if k % fmt.block_elems:
                say(f"{n}x{k} {name}: not measured; K must be a multiple of {fmt.block_elems}")
                continue
            weight = Weight(gpu, fmt, n, k, dtype)
            if not options.no_dequantize:
                decodings.append(measure_decoding(weight, options.rounds))
                record["decodings"].append(dataclasses.asdict(decodings[-1]))
            weight.pack()
            found = None
            if reader:
                if weight.bytes not in variants:
                    variants[weight.bytes] = reader.quickest(weight.blocks)
                found = reader, variants[weight.bytes]
            for m in options.rows:
                cells.append(measure(weight, m, found, options))
                record["cells"].append(dataclasses.asdict(cells[-1]))
            variant = f", {found[1]}" if found else ""
            say(f"{n}x{k} {dtype} {name}: {time.monotonic() - start:.1f} s{variant}")
        print(f"\n{gpu_report.place_report(cells, decodings, gpu.name)}", flush=True)
        save(record, options)


def save(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").rpartition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [fmt.name for fmt in formats.all()]
    shapes = [parse_shape(shape) for shape in SHAPES]
    parser.add_argument(
        "--shapes", nargs="*", type=parse_shape, default=shapes, metavar="NxK",
        help=f"default: {' '.join(SHAPES)}; without any: only what else is asked for",
    )  # fmt: skip
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="FORMAT")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float16"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M")
    parser.add_argument(
        "--kernels", nargs="*", default=[], metavar="KERNEL",
        help=f"also time these kernels of linear; without names all: {' '.join(KERNELS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="replays of each graph")
    parser.add_argument("--no-dequantize", action="store_true", help="leave dequantize out")
    parser.add_argument("--host", action="store_true", help="also time the host's part of a call")
    parser.add_argument(
        "--short", action="store_true",
        help=f"{SHAPES[0]}, M of {' '.join(map(str, SHORT_ROWS))} and 7 rounds, unless given",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time against M")
    given = sys.argv[1:] if arguments is None else arguments
    if "--short" in given:
        parser.set_defaults(shapes=shapes[:1], rows=list(SHORT_ROWS), rounds=7)
    options = parser.parse_args(given)
    if "--kernels" in given and not options.kernels:
        options.kernels = list(KERNELS)
    if options.rounds < 1 or min(options.rows) < 1:
        parser.error(
            f"--rounds and --rows must be at least 1, got {options.rounds}, {options.rows}"
        )
    return options


def main() -> int:
    options = parse_options()
    if options.plot:
        gpu_report.require_matplotlib()  # rather than after minutes of measuring
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: needs a GPU that torch can use, got none")
    # F.linear's float32 is to be float32, whatever the environment says of TF32.
    torch.set_float32_matmul_precision("highest")
    start = time.monotonic()
    gpu = Gpu()
    problem = torch.ops.torch_q4.gpu_problem(gpu.device.index)
    if problem:
        raise SystemExit(problem)
    driver = open_driver()
    reader = open_reader(gpu, driver)
    gpu.warm_up()
    record: dict[str, Any] = {
        "device": gpu.name,
        "architecture": gpu.architecture,
        "driver": driver.describe().removeprefix(f"{gpu.name}, "),
        "torch": torch.__version__,
        "torch_q4": torch_q4.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["benchmarks/bench_gpu.py", *sys.argv[1:]]),
        "cold_bytes": gpu.cold_bytes,
        "empty_node_us": empty_node_microseconds(gpu, reader),
        "host_us": {},
        "cells": [],
        "decodings": [],
    }
    save(record, options)  # a file that cannot be written is better known now
    print(gpu_report.title_of(record))
    print(f"an empty node of a graph: {record['empty_node_us']:.2f} us")
    with contextlib.ExitStack() as stack:
        stack.callback(save, record, options)  # also what there is when something fails
        if options.host:
            record["host_us"] = host_microseconds(gpu)
            print(f"\n{gpu_report.host_table(record['host_us'])}", flush=True)
        measure_all(gpu, reader, record, options)
    cells = [Cell(**cell) for cell in record["cells"]]
    if cells:
        print(f"\n{gpu_report.summary(cells)}")
    if options.plot and cells:
        gpu_report.plot(cells, gpu_report.title_of(record), options.plot)
    say(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
