"""Timing calls on a GPU: what ``torch_q4.tune`` and ``benchmarks/bench_gpu.py`` share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

GRAPH_MICROSECONDS = 1000.0  # that a graph takes at least, so that starting it does not count
LONG_MICROSECONDS = 5000.0  # a call that takes longer is timed once
AHEAD_CYCLES = 500_000  # of the device's clock, while the host queues up a round
CACHE_MULTIPLE = 4  # bytes of all copies over the last-level cache's
# ROCm reports the L2 cache; behind it, at most 256 MB of Infinity Cache that nothing reports.
HIP_COLD_BYTES = 2 * 256 << 20

Call = Callable[[int], Any]  # its argument counts the calls, so that it can rotate weights


def cold_bytes(l2_bytes: int, hip: bool) -> int:
    """Memory that has to be read before a weight's copy is read again."""
    return max(CACHE_MULTIPLE * l2_bytes, HIP_COLD_BYTES if hip else 0)


def copies_to_fill(item_bytes: int, total_bytes: int) -> int:
    """Copies of something that together have so many bytes, two at least."""
    return max(2, -(-total_bytes // item_bytes))


def calls_in_graph(copies: int, call_microseconds: float) -> int:
    """Each copy as often as any other, and the graph long enough."""
    cycle = copies * max(call_microseconds, 0.5)
    return copies * max(1, -(-int(GRAPH_MICROSECONDS) // max(1, int(cycle))))


class GraphTimer:
    """Captures calls in graphs, and times them, on torch's current device and stream.

    The stream must not be the default one, which cannot be captured.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.cold_bytes = cold_bytes(properties.L2_cache_size, torch.version.hip is not None)
        # All graphs share their memory, which lasts as long as one of them does.
        self._pool = torch.cuda.graph_pool_handle()
        something = torch.ones(1, device=self.device)
        self._anchor = self.capture(lambda _: something.fill_(1), 1)

    def capture(self, call: Call, count: int) -> Callable[[], None]:
        """A graph of ``count`` calls, as a function that starts it; run once already."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is no business of this graph.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            for index in range(count):
                call(index)
        finally:
            graph.capture_end()
        graph.replay()
        return graph.replay

    def times(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        """Microseconds of each, one after another and without waiting in between."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        torch.cuda._sleep(AHEAD_CYCLES)
        events[0].record()
        for run, event in zip(runs, events[1:], strict=True):
            run()
            event.record()
        torch.cuda.synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    def warm_up(self) -> None:
        """Works for half a second, so that clocks have risen."""
        generator = torch.Generator(self.device).manual_seed(0)  # not the user's
        a = torch.randn(4096, 4096, generator=generator, device=self.device).half()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()


class Timer(Protocol):
    """What :func:`time_in_turn` needs of a :class:`GraphTimer`."""

    def capture(self, call: Call, count: int) -> Callable[[], None]:
        """See :meth:`GraphTimer.capture`."""

    def times(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        """See :meth:`GraphTimer.times`."""


@dataclasses.dataclass
class Contender:
    """Something to time.

    Attributes:
        call: what to time.
        copies: how many weights it rotates over.
    """

    call: Call
    copies: int


def time_in_turn(
    gpu: Timer, contenders: Mapping[str, Contender], rounds: int
) -> dict[str, list[float]]:
    """Microseconds of one call, by contender and round. Each has been called before."""
    found: dict[str, list[float]] = {}
    graphs: dict[str, tuple[Callable[[], None], int]] = {}
    for name, contender in contenders.items():
        (once,) = gpu.times([functools.partial(contender.call, 0)])
        if once > LONG_MICROSECONDS:
            found[name] = [round(once, 4)]
            continue
        count = calls_in_graph(contender.copies, once)
        graphs[name] = gpu.capture(contender.call, count), count
    for _ in range(rounds if graphs else 0):
        times = gpu.times([replay for replay, _ in graphs.values()])
        for (name, (_, count)), microseconds in zip(graphs.items(), times, strict=True):
            found.setdefault(name, []).append(round(microseconds / count, 4))
    return {name: found[name] for name in contenders}
