"""What a call costs the host: `linear` and `QuantLinear` beside `F.linear` and `nn.Linear`.

Products of one row with small weights, so that the arithmetic is the least of it; `F.linear` has a
weight that is not quantised. The columns are modes of autograd: `x` and `bias` say what requires a
gradient, `step` is a forward and its backward. All callables take turns and the median round
counts, in microseconds a call. `--before DIRECTORY` times another checkout's torch_q4 as well, in
a process of its own that takes turns with this one's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import torch_q4

MODES = ("inference", "no_grad", "nothing", "x", "bias", "x step", "bias step")


def callables(size: int, mode: str, name: str) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    dense = torch.nn.Linear(size, size).requires_grad_(False)
    packed = torch_q4.QuantLinear.from_linear(dense, name)
    packed.bias = torch.nn.Parameter(dense.bias.clone(), requires_grad=False)
    x = torch.randn(1, size, requires_grad=mode.startswith("x"))
    for layer in (dense, packed):
        layer.bias.requires_grad_(mode.startswith("bias"))
    weight, blocks, fmt = dense.weight, packed.blocks, packed.format
    found: dict[str, Callable[[], torch.Tensor]] = {
        "nn.Linear": lambda: dense(x),
        "QuantLinear": lambda: packed(x),
        "F.linear": lambda: F.linear(x, weight, dense.bias),
        "linear": lambda: torch_q4.linear(x, blocks, fmt, packed.bias, packed=True),
    }
    if not mode.endswith("step"):
        return dict(found)
    upstream = torch.ones(1, size)

    def step(call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: call().backward(upstream)

    return {key: step(call) for key, call in found.items()}


def context(mode: str) -> contextlib.AbstractContextManager[Any]:
    if mode == "inference":
        return torch.inference_mode()
    return torch.set_grad_enabled(mode != "no_grad")


def one_round(size: int, name: str, calls: int) -> dict[str, float]:
    """Microseconds a call, by "MODE/CALLABLE"."""
    times = {}
    for mode in MODES:
        with context(mode):
            for key, call in callables(size, mode, name).items():
                for _ in range(calls // 10):
                    call()
                began = time.perf_counter()
                for _ in range(calls):
                    call()
                times[f"{mode}/{key}"] = (time.perf_counter() - began) / calls * 1e6
    return times


def serve() -> None:
    """A round for every line that comes in: SIZE FORMAT CALLS."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        size, name, calls = line.split()
        print(json.dumps(one_round(int(size), name, int(calls))), flush=True)


class Side:
    """A process that imports torch_q4 from ``directory``, or as this one does."""

    def __init__(self, directory: str | None) -> None:
        environment = dict(os.environ)
        if directory is not None:
            environment["PYTHONPATH"] = directory
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def round(self, size: int, name: str, calls: int) -> dict[str, float]:
        """See :func:`one_round`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(size, name, calls, file=self._process.stdin, flush=True)
        times: dict[str, float] = json.loads(self._process.stdout.readline())
        return times

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 256])
    parser.add_argument("--format", default="q4_0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--before", metavar="DIRECTORY")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    sides = {"": Side(None)}
    if options.before is not None:
        sides[" before"] = Side(options.before)
    print(f"torch {torch.__version__}, {options.format}, 1 row, 1 thread, us a call")
    for size in options.sizes:
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, process in sides.items():
                rounds[side].append(process.round(size, options.format, options.calls))
        print(f"\n{f'{size}x{size}':20}" + "".join(f"{mode:>11}" for mode in MODES))
        for key in ("nn.Linear", "QuantLinear", "F.linear", "linear"):
            for side, times in rounds.items():
                medians = (
                    statistics.median(one[f"{mode}/{key}"] for one in times) for mode in MODES
                )
                print(f"{key + side:20}" + "".join(f"{median:11.2f}" for median in medians))
    for process in sides.values():
        process.close()


if __name__ == "__main__":
    main()
