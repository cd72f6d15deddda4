"""Runs fuzz cases in a process of their own, so that a case that crashes or hangs has a name.

A fuzzer is a function ``(rng, folder) -> outcome``: it makes one case out of a random generator,
tries it, and returns one word for what came of it. Whatever it raises is a failure. A case is a
fuzzer, a seed and a number, and the same everywhere::

    python tests/fuzz/harness.py readers gguf 0 17    # case 17 once more, in this process
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import os
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SANITIZED = "san" in os.environ.get("LD_PRELOAD", "")
SLOWNESS = 20 if SANITIZED else 1
CASE_SECONDS = 2.0 * SLOWNESS  # of this process's time, whatever else the machine does
CASE_BYTES = 256 << 20
HANG_SECONDS = 60.0 * SLOWNESS  # of the clock, without a word
MEMORY_LIMIT = 12 << 30  # of address space: a case must not take the machine with it
MOST_FAILURES = 20  # of different kinds
MOST_CRASHES = 50  # each takes a new process


@dataclasses.dataclass
class Report:
    """What came of some cases: how often which outcome, and the failures in full."""

    outcomes: collections.Counter[str]
    kinds: dict[str, list[str]]  # of failures, by their last line
    seconds: float

    @property
    def failures(self) -> list[str]:
        """The first of each kind, in full, and the names of some others."""
        found = []
        for told in self.kinds.values():
            names = ", ".join(failure.partition(":")[0] for failure in told[:9])
            found.append(f"{told[0]}\n({len(told)} such cases: {names})")
        return found

    def add(self, failure: str) -> None:
        last = failure.strip().rpartition("\n")[2]
        self.kinds.setdefault(re.sub(r"[\d.e+-]+|\(.*\)|/\S+|'.*?'", "", last)[:60], []).append(
            failure
        )

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        failed = sum(len(told) for told in self.kinds.values())
        return f"{counts}, {failed} failed, {self.seconds:.0f} s"


# ---- the process that watches --------------------------------------------------------------------


class _Worker:
    """A process at work on cases from a number on."""

    def __init__(
        self, case: list[str], number: int, stop: int, environment: dict[str, str]
    ) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        # Threads that wait do not keep a CPU busy that others want.
        environment = {**os.environ, "GOMP_SPINCOUNT": "0", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__, *case, str(number), str(stop)],
            stdout=subprocess.PIPE, stderr=self.errors, env=environment,
        )  # fmt: skip
        self.rest = b""

    def line(self) -> str | None:
        """The next line that it prints; None where none comes, since it ended or hangs."""
        assert self.process.stdout is not None
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], HANG_SECONDS)
            more = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not more:
                return None
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode()

    def end(self) -> str:
        """How it ended, and the last that it said; it is stopped if it runs still."""
        try:
            status = f"exit status {self.process.wait(5)}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = f"no result within {HANG_SECONDS:.0f} s"
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        self.errors.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        start = max(text.find("ERROR: AddressSanitizer"), text.find("runtime error"), 0)
        return f"{status}\n{text[start : start + 4000] if start else text[-4000:]}"


def run(
    module: str, fuzzer: str, count: int, *, seed: int = 0, start: int = 0,
    environment: dict[str, str] | None = None, seconds: float | None = None,
) -> Report:  # fmt: skip
    """Tries ``count`` cases from number ``start`` on, or as many as fit into ``seconds``."""
    case = [module, fuzzer, str(seed)]
    began = time.monotonic()
    report = Report(collections.Counter(), {}, 0.0)
    number, stop = start, start + count
    over, crashes = False, 0
    while number < stop and not over and crashes < MOST_CRASHES:
        worker = _Worker(case, number, stop, environment or {})
        while (line := worker.line()) is not None:
            kind, _, words = line.partition(" ")
            if kind == "case":
                number = int(words) + 1
            elif kind == "outcome":
                report.outcomes[words] += 1
            elif kind == "failure":
                report.add(words.replace("\0", "\n"))
            over = len(report.kinds) >= MOST_FAILURES or (
                seconds is not None and time.monotonic() - began > seconds
            )
            if kind == "done" or over:
                break
        if line is None:
            told = " ".join([*case, str(number - 1)])
            report.add(f"{told}: the process ended: {worker.end()}")
            crashes += 1
        else:
            worker.process.kill()
            worker.end()
            if line == "done":
                break
    report.seconds = time.monotonic() - began
    return report


def expect(report: Report, least: dict[str, float]) -> None:
    """Asserts that nothing failed and that each outcome has its share of the cases."""
    print(report)
    assert not report.failures, "\n\n".join([str(report), *report.failures])
    total = sum(report.outcomes.values())
    for outcome, share in least.items():
        assert report.outcomes[outcome] >= share * total, f"{report}: too few {outcome!r}"


# ---- the process that works ----------------------------------------------------------------------


class Generator(random.Random):
    """A case's random numbers; ``number`` is the case's own."""

    number: int


def generator(module: str, fuzzer: str, seed: int, number: int) -> Generator:
    rng = Generator(f"{module} {fuzzer} {seed} {number}")
    rng.number = number
    return rng


def _case(module: str, fuzzer: str, seed: int, number: int, folder: Path) -> str:
    function = importlib.import_module(module).FUZZERS[fuzzer]
    return function(generator(module, fuzzer, seed, number), folder)


def _peak() -> int:
    """The most memory that this process has had. (getrusage begins with its parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _measured(case: Callable[[], str]) -> str:
    """The case's outcome, if it takes no more than it may.

    Not at the second time: at first it may have loaded what all others only use.
    """
    for last in (False, True):
        peak, began = _peak(), time.process_time()
        outcome = case()
        spent = time.process_time() - began
        grown = 0 if SANITIZED else _peak() - peak  # sanitizers keep what is freed
        if spent <= CASE_SECONDS and grown <= CASE_BYTES:
            break
        assert not last or spent <= CASE_SECONDS, f"took {spent:.1f} s of the CPU's time"
        assert not last or grown <= CASE_BYTES, f"took {grown >> 20} MB"
    return outcome


def _work(module: str, fuzzer: str, seed: int, start: int, stop: int) -> None:
    if not SANITIZED:  # which reserve terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    case = module, fuzzer, seed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(start, stop):
            print(f"case {number}", flush=True)
            told = f"{module} {fuzzer} {seed} {number}"
            try:
                outcome = _measured(functools.partial(_case, *case, number, folder))
            except BaseException:
                text = traceback.format_exc(limit=-6)
                print(f"failure {told}: {text[-3000:]}".replace("\n", "\0"), flush=True)
            else:
                print(f"outcome {outcome}", flush=True)
    print("done", flush=True)


def _main(arguments: list[str]) -> None:
    module, fuzzer, seed, number, *stop = arguments
    sys.path[:0] = [str(HERE), str(HERE.parent)]  # conftest is there
    if stop:
        return _work(module, fuzzer, int(seed), int(number), int(stop[0]))
    folder = Path(tempfile.mkdtemp())
    print(f"files are left in {folder}")
    print(_case(module, fuzzer, int(seed), int(number), folder))


if __name__ == "__main__":
    _main(sys.argv[1:])
