"""Runs the GPU kernels without torch, through the driver alone, and compares them with numpy.

    python tests/device/run.py --driver libcuda.so.1 --kernels torch_q4/kernels
    python tests/device/run.py --format q4_k --kernel 'pipelined_*'

Prints a line for each kernel: the largest error as a part of what is allowed, and for a kernel that
is wrong the first place where it is. Those of kernels/linear/hopper_*.h are skipped where the
device's code has none. Exits with 1 if any is wrong or missing, with 2 if nothing could
be run. Needs numpy and the driver's library; no toolkit and no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from cases import COMMON, Case, all_cases
from driver import DriverError, NotFoundError, open_driver
from session import MismatchError, Session
from weights import ROOT, all_formats


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one case."""

    case: Case
    failure: str | None
    worst: float
    launches: int
    seconds: float
    skipped: bool = False

    def __str__(self) -> str:
        name = f"{self.case.code_object:<9} {self.case.kernel:<21}"
        cost = f"{self.launches:4} launches {self.seconds:7.2f} s"
        if self.skipped:
            return f"SKIP {name} not in the code for this device"
        if self.failure is None:
            return f"PASS {name} {cost}   error {self.worst:.2f} of the bound"
        return f"FAIL {name} {cost}   {self.failure}"


def run_case(session: Session, case: Case, size: int, seed: int) -> Result:
    """Runs a case, with numbers that depend on nothing but its name and the seed."""
    session.worst, session.launches = 0.0, 0
    rng = np.random.default_rng([seed, zlib.crc32(f"{case.code_object} {case.kernel}".encode())])
    failure, skipped = None, False
    start = time.perf_counter()
    try:
        try:
            function = session.kernel(case.code_object, case.kernel)
        except NotFoundError:
            if not case.optional:
                raise
            skipped = True
        else:
            case.run(session, function, rng, size)
    except (MismatchError, FileNotFoundError, DriverError) as error:
        failure = str(error)
    session.abandon()
    seconds = time.perf_counter() - start
    return Result(case, failure, session.worst, session.launches, seconds, skipped)


def select(formats: Iterable[str], kernels: Iterable[str]) -> list[Case]:
    """The cases of these formats (``common`` is one) whose kernels match one of the patterns."""
    formats, kernels = list(formats), list(kernels)
    return [
        case
        for case in all_cases()
        if (not formats or case.code_object in formats)
        and (not kernels or any(fnmatch.fnmatch(case.kernel, pattern) for pattern in kernels))
    ]


def run_all(session: Session, cases: list[Case], size: int, seed: int) -> Iterator[Result]:
    """Runs cases until all are done, or until one leaves the device unusable."""
    for case in cases:
        result = run_case(session, case, size, seed)
        yield result
        if result.failure is not None and not session.usable():
            return


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--driver",
        metavar="LIBRARY",
        default=environment("TORCH_Q4_DRIVER"),
        help="libamdhip64.so or libcuda.so.1 (default: $TORCH_Q4_DRIVER)",
    )
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        default=environment("TORCH_Q4_ARCH"),
        help="prefer code objects of this architecture, q4_0.ARCH.hsaco (default: $TORCH_Q4_ARCH)",
    )
    parser.add_argument(
        "--kernels",
        metavar="FOLDER",
        type=Path,
        default=environment("TORCH_Q4_KERNELS", str(ROOT / "torch_q4" / "kernels")),
        help="where the code objects are (default: $TORCH_Q4_KERNELS, or torch_q4/kernels)",
    )
    names = (COMMON, *all_formats())
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=names,
        metavar="NAME",
        help=f"only this one, of {', '.join(names)}; may be given again",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only kernels whose names match, such as 'rows_f16_*'; may be given again",
    )
    parser.add_argument(
        "--size", type=int, default=1, metavar="N", help="multiplies K and some N (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--list", action="store_true", help="print the kernels and stop")
    options = parser.parse_args(argv)
    if options.size < 1:
        parser.error(f"--size must be at least 1, got {options.size}")
    if not options.driver and not options.list:
        parser.error("--driver or TORCH_Q4_DRIVER must name the driver's library, got neither")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    cases = select(options.format, options.kernel)
    if not cases:
        print(f"run.py: --kernel must match a kernel, got {options.kernel}", file=sys.stderr)
        return 2
    if options.list:
        for case in cases:
            print(f"{case.code_object} {case.kernel}")
        return 0
    try:
        driver = open_driver(options.driver)
        print(f"device: {driver.describe()}", flush=True)
    except DriverError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    session = Session(driver, options.kernels, options.arch)
    start = time.perf_counter()
    results = []
    for result in run_all(session, cases, options.size, options.seed):
        print(result, flush=True)
        results.append(result)
    failed = sum(result.failure is not None for result in results)
    skipped = sum(result.skipped for result in results)
    left = len(cases) - len(results)
    if left:
        print(f"the device can no longer be used: {left} kernels were not run")
    seconds = time.perf_counter() - start
    print(f"{len(results)} kernels, {failed} failed, {skipped} skipped, {seconds:.1f} s")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
