"""Streams, CUDA graphs, threads and several devices; and first uses in the middle of these."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_support import DEVICE, check_script, gpu_only, ops, randn, weight

import torch_q4
from torch_q4 import formats

pytestmark = [pytest.mark.gpu, gpu_only]

ROWS = (1, 5, 16, 64, 300)
A_WHILE = 2_000_000  # cycles: about 1 ms, longer than it takes to launch what follows


def calls(fmt, m: int):
    """Each kind of work on a weight, as functions of the input that they read."""
    canonical, packed, _ = weight(fmt, 37, 768)

    def linear(x, **options):
        return torch_q4.linear(x.half(), packed, fmt, packed=True, **options)

    return [
        linear,
        lambda x: linear(x, compute="int8"),
        lambda x: torch_q4.linear(x, canonical, fmt),
        lambda x: ops.linear_transposed(x[:, :37].contiguous(), packed, fmt.type_id, True),
        lambda x: ops.embedding(x[:, 0].long() % 37, packed, fmt.type_id, torch.float32, True),
        lambda x: torch_q4.pack(x.view(torch.uint8)[:, : fmt.row_bytes(256)], fmt),
    ]


def alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal, but for what torch's own product may do otherwise on another stream."""
    if torch.equal(got, wanted):
        return True
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm()
    return got.is_floating_point() and bool(difference < 1e-3)


def test_side_stream(fmt) -> None:
    """The input is only there after a long kernel on the same stream: no other one may be used."""
    for m in ROWS:
        for call in calls(fmt, m):
            late = 40 * randn(m, 768)
            wanted = call(late)
            x = torch.zeros_like(late)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(A_WHILE)
                x.copy_(late)
                got = call(x)
            torch.cuda.current_stream().wait_stream(stream)
            assert alike(got, wanted)


def test_two_streams_at_once(fmt) -> None:
    """Nothing is shared between calls, such as memory for partial sums."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    for m in (1, 5, 300):
        inputs = [40 * randn(m, 768) for _ in streams]
        for call in calls(fmt, m):
            wanted = [call(x) for x in inputs]
            torch.cuda.synchronize()
            results: list[list[torch.Tensor]] = [[], []]
            for _ in range(10):
                for stream, x, result in zip(streams, inputs, results, strict=True):
                    with torch.cuda.stream(stream):
                        result.append(call(x))
            torch.cuda.synchronize()
            for result, one in zip(results, wanted, strict=True):
                assert all(alike(got, one) for got in result)


def test_cuda_graph_with_changed_inputs(fmt) -> None:
    for m in ROWS:
        functions = calls(fmt, m)
        x = randn(m, 768)
        for call in functions:
            call(x)  # torch's own product makes its workspace before a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call(x) for call in functions]
        for _ in range(2):
            x.copy_(40 * randn(m, 768))
            graph.replay()
            for call, output in zip(functions, outputs, strict=True):
                assert alike(output, call(x))


def test_first_use_inside_a_capture() -> None:
    """Kernels are loaded at first use, which a capture must survive."""
    check_script("""
import torch, torch_q4
from torch_q4 import formats

ops = torch.ops.torch_q4
for number, fmt in enumerate([fmt for fmt in formats.all() if fmt.quantizes]):
    blocks = torch_q4.quantize(torch.randn(37, 768), fmt)
    packed, w = torch_q4.pack(blocks, fmt).cuda(), torch_q4.dequantize(blocks, fmt).double()
    m = (1, 5, 40)[number % 3]
    x = torch.randn(m, 768).half().cuda()
    grad = torch.randn(2, 37).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exact = torch_q4.linear(x, packed, fmt, packed=True)
        int8 = torch_q4.linear(x[:3], packed, fmt, packed=True, compute="int8")
        back = ops.linear_transposed(grad, packed, fmt.type_id, True)
    for step in range(2):
        x.copy_(torch.randn(m, 768))
        graph.replay()
        wanted = x.cpu().double() @ w.T
        for got, right, bound in (
            (exact, wanted, 2e-3), (int8, wanted[:3], 2e-2), (back, grad.cpu().double() @ w, 1e-5)
        ):
            error = (got.cpu().double() - right).norm() / right.norm()
            assert error < bound, (fmt.name, step, float(error))
""")


def test_first_use_by_several_threads() -> None:
    check_script("""
import threading
import torch, torch_q4
from torch_q4 import formats

threads = 8
weights = []
for fmt in [fmt for fmt in formats.all() if fmt.quantizes]:
    blocks = torch_q4.quantize(torch.randn(37, 768), fmt)
    weights.append((fmt, blocks.cuda(), torch_q4.dequantize(blocks, fmt)))
x = torch.randn(3, 768)
there = x.cuda()
barrier = threading.Barrier(threads)
failures = []

def work(start):
    try:
        barrier.wait()
        for fmt, blocks, w in weights[start % 2:] + weights[:start % 2]:
            got = torch_q4.linear(there, blocks, fmt)
            torch.testing.assert_close(got.cpu(), x @ w.T, rtol=1e-4, atol=1e-3)
            assert torch.equal(torch_q4.dequantize(blocks, fmt).cpu(), w)
    except BaseException as error:
        failures.append(error)

pool = [threading.Thread(target=work, args=(start,)) for start in range(threads)]
for thread in pool: thread.start()
for thread in pool: thread.join()
assert not failures, failures
""")


def test_threads_with_streams_of_their_own(fmt) -> None:
    functions = calls(fmt, 5)
    inputs = [40 * randn(5, 768) for _ in range(4)]
    wanted = [[call(x) for call in functions] for x in inputs]
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    for call, one in zip(functions, wanted[number], strict=True):
                        if not alike(call(inputs[number]), one):
                            wrong.append(number)
        except RuntimeError as error:
            wrong.append(error)

    pool = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(fmt, dtype) -> None:
    """Work goes to the device of its tensors, whichever is current."""
    other = torch.device("cuda", 1)
    for m in ROWS:
        canonical, packed, _ = weight(fmt, 37, 768)
        x = randn(m, 768, dtype=dtype)
        for blocks, is_packed in ((canonical, False), (packed, True)):
            for compute in ("exact", "int8"):
                options = {"compute": compute, "packed": is_packed}
                wanted = torch_q4.linear(x, blocks, fmt, **options)
                got = torch_q4.linear(x.to(other), blocks.to(other), fmt, **options)
                assert got.device == other
                assert torch.equal(got.to(DEVICE), wanted)
    got = torch_q4.dequantize(canonical.to(other), fmt, dtype)
    assert torch.equal(got.to(DEVICE), torch_q4.dequantize(canonical, fmt, dtype))
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_two_gpus_are_refused() -> None:
    fmt = formats.get("q4_0")
    blocks, _, _ = weight(fmt, 16, 64)
    x = randn(3, 64)
    with pytest.raises(ValueError, match="linear: blocks must be on the device of x"):
        torch_q4.linear(x.to("cuda:1"), blocks, fmt)
    with pytest.raises(ValueError, match="linear: bias must be on the device of x"):
        torch_q4.linear(x, blocks, fmt, torch.zeros(16, device="cuda:1"))
    with pytest.raises(RuntimeError, match="linear: blocks must be on the device of x"):
        ops.linear(x.to("cuda:1"), blocks, fmt.type_id)
