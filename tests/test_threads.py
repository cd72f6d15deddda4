"""Products on a machine that other processes use as well: they wait for no thread without need."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from conftest import random_blocks

import torch_q4
from torch_q4 import formats


@contextlib.contextmanager
def busy_cpus() -> Iterator[None]:
    """A process on each CPU of this one that computes all the time."""
    code = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(cpu)]) for cpu in os.sched_getaffinity(0)
    ]
    try:
        time.sleep(0.3)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("size", [256, 1024])
def test_a_small_product_waits_for_no_thread(size) -> None:
    """256: too little work for two threads. 1024: enough, but not on a busy machine."""
    fmt = formats.get("q4_k")
    blocks, x = torch_q4.pack(random_blocks(fmt, size, size), fmt), torch.randn(1, size)
    threads = torch.get_num_threads()
    times: dict[int, list[float]] = {1: [], 2: []}
    try:
        with busy_cpus():
            for _ in range(20):  # in turn, so that both meet the same machine
                for count in times:
                    torch.set_num_threads(count)
                    for _ in range(20):
                        start = time.perf_counter()
                        torch_q4.linear(x, blocks, fmt, packed=True)
                        times[count].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    one, two = (statistics.median(times[count]) for count in (1, 2))
    assert two < 3 * one, f"{two * 1e6:.0f} us with two threads, {one * 1e6:.0f} us with one"


def test_load_changes_speed_and_not_results(fmt) -> None:
    """Whether a loop runs on threads depends on the machine; what it computes does not."""
    blocks, x = random_blocks(fmt, 530, 1024), torch.randn(7, 1024)
    narrow, long = random_blocks(fmt, 20, 8192), torch.randn(3, 8192)
    first = torch_q4.linear(x, blocks, fmt), torch_q4.linear(long, narrow, fmt)
    for _ in range(50):
        assert torch.equal(torch_q4.linear(x, blocks, fmt), first[0])
        assert torch.equal(torch_q4.linear(long, narrow, fmt), first[1])
