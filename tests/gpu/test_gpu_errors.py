"""Bad arguments on the GPU: the words of the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, gpu_only, ops
from test_errors import BLOCKS, CASES, IDS, X, message_of

import torch_q4

pytestmark = pytest.mark.gpu


def moved(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value


@pytest.mark.parametrize(("op", "args", "kind", "words"), CASES, ids=IDS)
def test_same_words_as_on_the_cpu(op, args, kind, words) -> None:
    operator = getattr(ops, op).default
    there = [moved(value) for value in args]
    message = message_of(lambda: operator(*there), RuntimeError)
    assert message.startswith(words)
    assert message == message_of(lambda: operator(*args), RuntimeError)
    if op not in ("linear_transposed", "pack_"):  # these have no public function
        keywords = {"compute": args[4]} if op == "linear" and len(args) == 5 else {}
        assert message_of(lambda: getattr(torch_q4, op)(*there[:4], **keywords), kind) == message


@gpu_only
def test_tensors_on_cpu_and_gpu_are_refused() -> None:
    x, blocks, bias = moved(X), moved(BLOCKS), torch.zeros(5)
    index = torch.tensor([1])
    for call, words in (
        (lambda: torch_q4.linear(x, BLOCKS, "q4_0"), "linear: blocks must be on the device of x"),
        (lambda: torch_q4.linear(X, blocks, "q4_0"), "linear: blocks must be on the device of x"),
        (lambda: torch_q4.linear(x, blocks, "q4_0", bias),
         "linear: bias must be on the device of x"),
        (lambda: torch_q4.embedding(index, blocks, "q4_0"),
         "embedding: blocks must be on the device of indices"),
        (lambda: torch_q4.embedding(moved(index), BLOCKS, "q4_0"),
         "embedding: blocks must be on the device of indices"),
        (lambda: torch_q4.quantize(x, "q4_0", torch.ones(64)),
         "quantize: importance must be on the device of w"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    for call, words in (
        (lambda: ops.linear(x, BLOCKS, 2), "linear: blocks must be on the device of x"),
        (lambda: ops.linear(X, blocks, 2), "linear: blocks must be on the device of x"),
        (lambda: ops.linear(x, blocks, 2, bias), "linear: bias must be on the device of x"),
        (lambda: ops.linear_transposed(moved(torch.zeros(3, 5)), BLOCKS, 2),
         "linear_transposed: blocks must be on the device of grad"),
        (lambda: ops.embedding(moved(index), BLOCKS, 2, torch.float32),
         "embedding: blocks must be on the device of indices"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            call()


@gpu_only
def test_pack_in_place_wants_contiguous_blocks() -> None:
    with pytest.raises(RuntimeError, match="pack_: blocks must be contiguous"):
        ops.pack_(moved(torch.zeros(64, 18, dtype=torch.uint8))[::2], 2)


@gpu_only
def test_the_library_knows_that_it_works_here() -> None:
    assert ops.gpu_problem(torch.cuda.current_device()) == ""
    table = dict(line.partition(" ")[::2] for line in ops.gpu_table().splitlines())
    assert "libamdhip64" in table["driver"] or "libcuda" in table["driver"]
    assert table["hip" if torch.version.hip else "cuda"]
