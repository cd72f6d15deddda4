"""Counts what a product of packed weights moves through DRAM, with NVIDIA's profiler ``ncu``.

Two ways to the same product, with weights that are in no cache when it begins:

- ``packed``: ``torch_q4.linear`` on packed weights, activations in float16;
- ``dequantised``: ``torch_q4.dequantize`` to float32, then ``F.linear`` in float32.

Each runs in a process of its own under ncu, which counts between ``cudaProfilerStart`` and
``cudaProfilerStop`` only. Counted bytes are those of all kernels of a call, the mean over the
calls:

- ``dram__bytes_read.sum`` and ``dram__bytes_write.sum``: between the L2 cache and DRAM;
- ``lts__t_bytes.sum``: all that the L2 cache was asked for.

How it is kept honest:

- Caches are left alone by ncu (``--cache-control none``). By default it would empty them before
  each kernel, and ``F.linear`` could not find in the cache what ``dequantize`` has just left there.
- Before each call, not counted, a buffer of many times the L2 cache's size is read. Read and not
  written: after a memset the cache would be full of lines that are not in DRAM yet, and the counted
  kernels would be charged with writing them.
- What a call has written and DRAM does not have when its last kernel ends is not counted, at most
  the L2 cache's size. It spares ``dequantised`` some of its writes.
- ncu runs the whole program again for each pass that its counters need (``--replay-mode
  application``). Were kernels run again, each pass but the first would find the cache warm. Where
  ncu cannot, kernels are run again; the report says so, and how many passes there were.
- Clocks are left alone (``--clock-control none``): they do not change how many bytes move.

Each product is first compared with float64. The exit status is 2 where ncu is missing or is not
permitted to read counters, 1 where anything else fails.

    python benchmarks/traffic.py --json traffic.json
    python benchmarks/traffic.py --format q4_k --shape 4096x14336 --rows 16
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import bench_gpu
import torch
import torch.nn.functional as F
from bench_gpu import say
from torch import Tensor

import torch_q4
from torch_q4 import formats
from torch_q4.formats import Format

PACKED, DEQUANTISED = "packed", "dequantised"
CASES = (PACKED, DEQUANTISED)
READ, WRITTEN, CACHE = "dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum"
METRICS = (READ, WRITTEN, CACHE)
REPLAYS = ("application", "kernel")
NCU_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
FLUSH_MULTIPLE = 8  # bytes read to empty the L2 cache, over its size
NOT_PERMITTED = "ERR_NVGPUCTRPERM"
SECONDS = 100  # that one process under ncu may take


class NotPermittedError(RuntimeError):
    """The driver lets only administrators read counters."""


# ---- what ncu says -------------------------------------------------------------------------------


@dataclasses.dataclass
class Kernel:
    """One kernel that ncu counted.

    Attributes:
        name: as ncu writes it.
        bytes: by metric.
    """

    name: str
    bytes: dict[str, float] = dataclasses.field(default_factory=dict)


def parse_csv(text: str) -> list[Kernel]:
    """The kernels in ``ncu --csv``'s output, in order.

    A row is one metric of one kernel; the columns that are read are ``ID``, ``Kernel Name``,
    ``Metric Name``, ``Metric Unit`` and ``Metric Value``, wherever they stand. Other lines, which
    begin with ``==``, may surround the table.

    Raises:
        ValueError: no table, a unit that is not bytes, a value that is no number, or a kernel that
            lacks one of the metrics.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        raise ValueError("ncu's output must have a table, got none")
    table = [line for line in lines[starts[0] :] if line.startswith('"')]
    kernels: dict[str, Kernel] = {}
    for row in csv.DictReader(table):
        metric = row["Metric Name"]
        if metric not in METRICS:
            continue
        if row["Metric Unit"] != "byte":
            raise ValueError(f"{metric}: the unit must be byte, got {row['Metric Unit']!r}")
        kernel = kernels.setdefault(row["ID"], Kernel(row["Kernel Name"]))
        value = row["Metric Value"].replace(",", "")
        try:
            kernel.bytes[metric] = float(value)
        except ValueError:
            raise ValueError(f"{metric} of {kernel.name} must be a number, got {value!r}") from None
    for kernel in kernels.values():
        missing = [metric for metric in METRICS if metric not in kernel.bytes]
        if missing:
            raise ValueError(f"{kernel.name}: ncu must count {', '.join(missing)}, got nothing")
    return list(kernels.values())


def passes_of(text: str) -> int:
    """The most passes that ncu says a kernel took; 0 where it does not say."""
    # Kernels run again: "... 100% - 2 passes"; the program run again: "Application replay pass 2".
    found = re.findall(r"- (\d+) pass|replay pass (\d+)", text)
    return max((int(one or other) for one, other in found), default=0)


@dataclasses.dataclass
class Traffic:
    """What one call of a case moves.

    Attributes:
        case: one of ``CASES``.
        kernels: that it launches, by name, in order.
        bytes: by metric, the mean over the calls.
        least: by metric, of a call.
        most: by metric, of a call.
        replay: ncu's replay mode.
        passes: of ncu over the program or over each kernel; 0 if not known.
    """

    case: str
    kernels: list[str]
    bytes: dict[str, float]
    least: dict[str, float]
    most: dict[str, float]
    replay: str = ""
    passes: int = 0

    @property
    def moved(self) -> float:
        """Bytes read from DRAM and written to it."""
        return self.bytes[READ] + self.bytes[WRITTEN]


def sum_calls(case: str, kernels: Sequence[Kernel], calls: int) -> Traffic:
    """The sums over the kernels of each call, which all launch the same ones.

    Raises:
        ValueError: kernels that are not so many calls' of the same.
    """
    count, rest = divmod(len(kernels), calls)
    parts = [kernels[i * count : (i + 1) * count] for i in range(calls)]
    names = [[kernel.name for kernel in part] for part in parts]
    if rest or not count or any(one != names[0] for one in names):
        raise ValueError(
            f"{case}: {calls} calls must launch the same kernels each, "
            f"got {[kernel.name for kernel in kernels]}"
        )
    sums = {m: [sum(kernel.bytes[m] for kernel in part) for part in parts] for m in METRICS}
    return Traffic(
        case,
        names[0],
        {metric: sum(found) / calls for metric, found in sums.items()},
        {metric: min(found) for metric, found in sums.items()},
        {metric: max(found) for metric, found in sums.items()},
    )


# ---- the process that is counted -----------------------------------------------------------------


def product(
    case: str, fmt: Format, blocks: Tensor, x: Tensor
) -> tuple[Callable[[], Tensor], float]:
    """The call to count, and the relative error that it may have."""
    if case == PACKED:
        packed, x16 = torch_q4.pack(blocks, fmt), x.half()
        call = functools.partial(torch_q4.linear, x16, packed, fmt, packed=True)
        return call, bench_gpu.TOLERANCE["float16"]
    return (
        lambda: F.linear(x, torch_q4.dequantize(blocks, fmt, torch.float32)),
        bench_gpu.TOLERANCE["float32"],
    )


@torch.inference_mode()
def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """What happens under ncu; see the module's docstring.

    Returns:
        What the report needs to know of the device and the weight.

    Raises:
        RuntimeError: a wrong product.
    """
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda", torch.cuda.current_device())
    problem = torch.ops.torch_q4.gpu_problem(device.index)
    if problem:
        raise RuntimeError(problem)
    properties = torch.cuda.get_device_properties(device)
    (n, k), fmt = options.shape, formats.get(options.format)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(bench_gpu.TILE_ROWS, (n,), generator=generator)
    some = bench_gpu.tile(fmt.name, k)
    blocks = some[rows].to(device)
    x = torch.randn(options.rows, k, generator=generator).half().float().to(device)
    call, tolerance = product(options.case, fmt, blocks, x)
    values = torch_q4.dequantize(some, fmt).double().to(device)
    expected = (x.double() @ values.T)[:, rows.to(device)]
    error = float((call().double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise RuntimeError(f"{options.case}: relative error must be at most {tolerance:g}, "
                           f"got {error:.3g}")  # fmt: skip
    flush = torch.zeros(FLUSH_MULTIPLE * properties.L2_cache_size // 4, device=device)
    for _ in range(2):  # what is loaded and allocated at first is not part of a call
        flush.sum()
        call()
    for _ in range(options.calls):
        flush.sum()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return {
        "device": properties.name,
        "cache_bytes": properties.L2_cache_size,
        "weight_bytes": blocks.nbytes,
        "error": error,
    }


# ---- running ncu ---------------------------------------------------------------------------------


def find_ncu() -> str | None:
    """Where ncu is: on PATH, in the toolkit, or where its own installer puts it."""
    places = [
        os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    for place in [*places, *NCU_PLACES]:
        folder = Path(place)
        places += [str(found) for found in sorted(folder.parent.glob(folder.name), reverse=True)]
    return shutil.which("ncu") or shutil.which("ncu", path=os.pathsep.join(places))


def ncu_command(ncu: str, replay: str, log: Path, command: Sequence[str]) -> list[str]:
    """The command line of ncu around a program's."""
    return [
        ncu,
        *("--metrics", ",".join(METRICS)),
        *("--profile-from-start", "off"),
        *("--cache-control", "none"),
        *("--clock-control", "none"),
        *("--replay-mode", replay),
        *("--target-processes", "application-only"),
        *("--print-units", "base"),
        *("--csv", "--page", "details"),
        *("--log-file", str(log)),
        *command,
    ]


def run_ncu(command: Sequence[str], log: Path) -> tuple[str, str]:
    """Runs ncu.

    Returns:
        Its log and the program's standard output.

    Raises:
        NotPermittedError: it may not read counters.
        RuntimeError: it failed, with the end of what it said, or took too long.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the program that ncu started, too
        process.communicate()
        raise RuntimeError(f"{shlex.join(command)} took more than {SECONDS} s") from None
    text = log.read_text(errors="replace") if log.exists() else ""
    everything = "\n".join((out, errors, text))
    if NOT_PERMITTED in everything:
        raise NotPermittedError(
            f"ncu may not read the GPU's counters ({NOT_PERMITTED}): run it as root, or have the "
            "driver's module loaded with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if process.returncode != 0:
        raise RuntimeError(
            f"{shlex.join(command)} exited with {process.returncode}:\n{everything[-3000:]}"
        )
    return text, out


def count(ncu: str, case: str, options: argparse.Namespace) -> tuple[Traffic, dict[str, Any]]:
    """Counts one case, in the first replay mode that works.

    Returns:
        What was counted, and what the program said of itself.

    Raises:
        NotPermittedError: see :func:`run_ncu`.
        RuntimeError: no mode works; the last one's words.
    """
    n, k = options.shape
    program = [
        *(sys.executable, str(Path(__file__).resolve()), "--case", case),
        *("--format", options.format, "--shape", f"{n}x{k}"),
        *("--rows", str(options.rows), "--calls", str(options.calls)),
    ]
    failure: Exception | None = None
    for replay in options.replay:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "ncu.csv"
            start = time.monotonic()
            try:
                text = ""
                text, output = run_ncu(ncu_command(ncu, replay, log, program), log)
                found = sum_calls(case, parse_csv(text), options.calls)
                about = json.loads([line for line in output.splitlines() if line[:1] == "{"][-1])
            except NotPermittedError:
                raise
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                say(f"{case}: ncu --replay-mode {replay} failed: {error}\n{text[:3000]}")
                failure = error
                continue
        found.replay, found.passes = replay, passes_of(text + output)
        say(f"{case}: {time.monotonic() - start:.0f} s, {found.passes or '?'} passes")
        return found, about
    raise RuntimeError(f"{case}: not counted; {failure}")


# ---- reporting -----------------------------------------------------------------------------------


def report(found: Sequence[Traffic], weight_bytes: int) -> str:
    """The table, in MB, and how many times as much the last case moves as the first."""
    lines = [
        f"{'MB of a call':14} {'read':>8} {'written':>8} {'moved':>8} {'spread':>7} "
        f"{'weight x':>9} {'L2':>8}  kernels"
    ]
    for one in found:
        least, most = (sum(side[m] for m in (READ, WRITTEN)) for side in (one.least, one.most))
        lines.append(
            f"{one.case:14} {one.bytes[READ] / 1e6:8.2f} {one.bytes[WRITTEN] / 1e6:8.2f} "
            f"{one.moved / 1e6:8.2f} {(most - least) / 1e6:7.2f} "
            f"{one.moved / weight_bytes:9.2f} {one.bytes[CACHE] / 1e6:8.2f}  {len(one.kernels)}"
        )
    lines.append(f"the packed weight itself: {weight_bytes / 1e6:.2f} MB")
    first, last = found[0], found[-1]
    if first is not last:
        lines.append(
            f"{last.case} over {first.case}: read {last.bytes[READ] / first.bytes[READ]:.2f}, "
            f"moved {last.moved / first.moved:.2f}"
        )
    for one in found:
        if one.replay == "kernel" and one.passes != 1:
            lines.append(
                f"{one.case}: kernels were run {one.passes or 'more than once?'} times; all but "
                "the first may have found the cache warm"
            )
    return "\n".join(lines)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").rpartition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [fmt.name for fmt in formats.all()]
    parser.add_argument("--format", choices=names, default="q4_0", metavar="FORMAT")
    parser.add_argument("--shape", type=bench_gpu.parse_shape, default=(14336, 4096), metavar="NxK")
    parser.add_argument("--rows", type=int, default=1, metavar="M", help="of the activations")
    parser.add_argument("--calls", type=int, default=3, metavar="N", help="that are counted")
    parser.add_argument("--quick", action="store_true", help="count one call, unless given")
    parser.add_argument(
        "--replay", nargs="+", choices=REPLAYS, default=list(REPLAYS),
        help="ncu's replay modes, the first one that works is taken (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--ncu", metavar="FILE", help="the profiler (default: the one installed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    # Runs this case and counts nothing: what ncu is started on.
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--quick" in given:
        parser.set_defaults(calls=1)
    options = parser.parse_args(given)
    if min(options.rows, options.calls) < 1:
        parser.error(f"--rows and --calls must be at least 1, got {options.rows}, {options.calls}")
    fmt, k = formats.get(options.format), options.shape[1]
    if k % fmt.block_elems:
        parser.error(f"--shape: K must be a multiple of {fmt.block_elems} for {fmt.name}, got {k}")
    return options


def refuse(text: str) -> NoReturn:
    say(f"traffic: {text}")
    raise SystemExit(2)


def main() -> int:
    options = parse_options()
    if torch.version.hip is not None:
        refuse("ncu counts on NVIDIA GPUs only, and this torch is ROCm's")
    if not torch.cuda.is_available():
        refuse("needs a GPU that torch can use, got none")
    if options.case:
        print(json.dumps(run_case(options)), flush=True)
        return 0
    ncu = options.ncu or find_ncu()
    if ncu is None or shutil.which(ncu) is None:
        refuse(f"ncu (Nsight Compute) must be on PATH or named by --ncu, got {ncu}")
    n, k = options.shape
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_q4": torch_q4.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["benchmarks/traffic.py", *sys.argv[1:]]),
        "format": options.format,
        "n": n,
        "k": k,
        "m": options.rows,
        "calls": options.calls,
        "cases": [],
    }
    found = []
    for case in CASES:
        try:
            traffic, about = count(ncu, case, options)
        except NotPermittedError as error:
            refuse(str(error))
        except RuntimeError as error:
            say(f"traffic: {error}")
            continue
        found.append(traffic)
        errors = record.get("errors", {}) | {case: about.pop("error")}
        record |= about | {"errors": errors}
        record["cases"].append(dataclasses.asdict(traffic))
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    if found:
        print(f"{record['device']}, torch {record['torch']}: {options.format} {n}x{k}, "
              f"{options.rows} rows, {options.calls} calls")  # fmt: skip
        print(report(found, record["weight_bytes"]))
    return 0 if len(found) == len(CASES) else 1


if __name__ == "__main__":
    sys.exit(main())
