"""Bad arguments: the same words from Python, from the registered operator and from its fake."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_q4
from torch_q4 import formats

ops = torch.ops.torch_q4
X = torch.zeros(3, 64)
BLOCKS = torch.zeros(5, 36, dtype=torch.uint8)  # five rows of 64 columns in q4_0
Q4_0 = 2

# operator, arguments, the error's type from Python, its words.
CASES: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("quantize", (X, 99), ValueError, "quantize: format must be one of q4_0, "),
    ("quantize", (X.double(), Q4_0), TypeError,
     "quantize: w must be float32, float16 or bfloat16, got torch.float64"),
    ("quantize", (torch.tensor(1.0), Q4_0), ValueError,
     "quantize: w must have at least 1 dimension, got shape ()"),
    ("quantize", (torch.zeros(2, 33), Q4_0), ValueError,
     "quantize: columns of w must be a multiple of 32 for q4_0, got 33"),
    ("quantize", (torch.zeros(2, 64), 12), ValueError,
     "quantize: columns of w must be a multiple of 256 for q4_k, got 64"),
    ("quantize", (X, Q4_0, torch.ones(63)), ValueError,
     "quantize: importance must have shape (64,), got (63,)"),
    ("quantize", (X, Q4_0, torch.ones(3, 64)), ValueError,
     "quantize: importance must have shape (64,), got (3, 64)"),
    ("quantize", (X, Q4_0, torch.ones(64).half()), TypeError,
     "quantize: importance must be float32, got torch.float16"),
    ("quantize", (X, Q4_0, torch.ones(64, device="meta")), ValueError,
     "quantize: importance must be on the device of w"),
    ("dequantize", (BLOCKS, 99, torch.float32), ValueError, "dequantize: format must be one of q4"),
    ("dequantize", (BLOCKS.int(), Q4_0, torch.float32), TypeError,
     "dequantize: blocks must be uint8, got torch.int32"),
    ("dequantize", (BLOCKS[:, :35], Q4_0, torch.float32), ValueError,
     "dequantize: bytes per row of blocks must be a multiple of 18 for q4_0, got 35"),
    ("dequantize", (torch.tensor(1, dtype=torch.uint8), Q4_0, torch.float32), ValueError,
     "dequantize: blocks must have at least 1 dimension, got shape ()"),
    ("dequantize", (BLOCKS, Q4_0, torch.float64), TypeError,
     "dequantize: dtype must be float32, float16 or bfloat16, got torch.float64"),
    ("linear", (X, BLOCKS, 99), ValueError, "linear: format must be one of q4_0"),
    ("linear", (X.double(), BLOCKS, Q4_0), TypeError,
     "linear: x must be float32, float16 or bfloat16, got torch.float64"),
    ("linear", (X.long(), BLOCKS, Q4_0), TypeError,
     "linear: x must be float32, float16 or bfloat16, got torch.int64"),
    ("linear", (torch.tensor(1.0), BLOCKS, Q4_0), ValueError,
     "linear: x must have at least 1 dimension, got shape ()"),
    ("linear", (torch.zeros(3, 63), BLOCKS, Q4_0), ValueError,
     "linear: columns of x must be a multiple of 32 for q4_0, got 63"),
    ("linear", (X, BLOCKS.float(), Q4_0), TypeError,
     "linear: blocks must be uint8, got torch.float32"),
    ("linear", (X, BLOCKS.flatten(), Q4_0), ValueError,
     "linear: blocks must have 2 dimensions, got shape (180,)"),
    ("linear", (X, BLOCKS[:, :35], Q4_0), ValueError,
     "linear: blocks must have 36 bytes per row for q4_0 with 64 columns, got 35"),
    ("linear", (X, BLOCKS, Q4_0, torch.zeros(4)), ValueError,
     "linear: bias must have shape (5,), got (4,)"),
    ("linear", (X, BLOCKS, Q4_0, torch.zeros(1, 5)), ValueError,
     "linear: bias must have shape (5,), got (1, 5)"),
    ("linear", (X, BLOCKS, Q4_0, torch.zeros(5).half()), TypeError,
     "linear: bias must have the dtype of x, torch.float32, got torch.float16"),
    ("linear", (X, BLOCKS, Q4_0, None, "fast"), ValueError,
     "linear: compute must be exact or int8, got fast"),
    ("linear", (X, BLOCKS.to("meta"), Q4_0), ValueError,
     "linear: blocks must be on the device of x"),
    ("linear", (X, BLOCKS, Q4_0, torch.zeros(5, device="meta")), ValueError,
     "linear: bias must be on the device of x"),
    ("linear_transposed", (torch.zeros(3, 4), BLOCKS, Q4_0), ValueError,
     "linear_transposed: grad must have 5 columns, one per row of blocks, got 4"),
    ("linear_transposed", (torch.zeros(3, 5).double(), BLOCKS, Q4_0), TypeError,
     "linear_transposed: grad must be float32, float16 or bfloat16, got torch.float64"),
    ("linear_transposed", (torch.zeros(3, 5), BLOCKS[:, :35], Q4_0), ValueError,
     "linear_transposed: bytes per row of blocks must be a multiple of 18 for q4_0, got 35"),
    ("linear_transposed", (torch.zeros(3, 5), BLOCKS[0], Q4_0), ValueError,
     "linear_transposed: blocks must have 2 dimensions, got shape (36,)"),
    ("embedding", (torch.tensor([0.5]), BLOCKS, Q4_0, torch.float32), TypeError,
     "embedding: indices must be int64 or int32, got torch.float32"),
    ("embedding", (torch.tensor([1]), BLOCKS[0], Q4_0, torch.float32), ValueError,
     "embedding: blocks must have 2 dimensions, got shape (36,)"),
    ("embedding", (torch.tensor([1]), BLOCKS[:, 1:], Q4_0, torch.float32), ValueError,
     "embedding: bytes per row of blocks must be a multiple of 18 for q4_0, got 35"),
    ("embedding", (torch.tensor([1]), BLOCKS, Q4_0, torch.int32), TypeError,
     "embedding: dtype must be float32, float16 or bfloat16, got torch.int32"),
    ("embedding", (torch.tensor([1]), BLOCKS, 99, torch.float32), ValueError,
     "embedding: format must be one of q4_0"),
    ("pack", (BLOCKS, 99), ValueError, "pack: format must be one of q4_0"),
    ("pack", (BLOCKS.int(), Q4_0), TypeError, "pack: blocks must be uint8, got torch.int32"),
    ("pack", (BLOCKS[0], Q4_0), ValueError, "pack: blocks must have 2 dimensions, got shape (36,)"),
    ("pack", (BLOCKS[:, 1:], Q4_0), ValueError,
     "pack: bytes per row of blocks must be a multiple of 18 for q4_0, got 35"),
    ("unpack", (BLOCKS[:, 1:], Q4_0), ValueError,
     "unpack: bytes per row of blocks must be a multiple of 18 for q4_0, got 35"),
    ("pack_", (BLOCKS[:, 1:], Q4_0), ValueError,
     "pack_: bytes per row of blocks must be a multiple of 18 for q4_0, got 35"),
]  # fmt: skip
IDS = [f"{case[0]}-{case[3].split(':')[1].strip()[:48]}" for case in CASES]


def message_of(call: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        call()
    assert error.type is kind
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize(("op", "args", "kind", "words"), CASES, ids=IDS)
def test_same_words_everywhere(op, args, kind, words) -> None:
    operator = getattr(ops, op).default
    registered = message_of(lambda: operator(*args), RuntimeError)
    assert registered.startswith(words)
    if op not in ("linear_transposed", "pack_"):  # these have no public function
        function = getattr(torch_q4, op)
        keywords = {"compute": args[4]} if op == "linear" and len(args) == 5 else {}
        python = message_of(lambda: function(*args[:4], **keywords), kind)
        assert python == registered
    if any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
        return  # torch itself refuses to mix devices before the fake runs
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        assert message_of(lambda: operator(*fakes), RuntimeError) == registered


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What each operator takes a tensor of any dtype for, and which dtypes are right there.
TENSORS: list[tuple[str, Callable[[torch.Tensor], tuple[Any, ...]], tuple[torch.dtype, ...]]] = [
    ("quantize", lambda t: (t, Q4_0), FLOATS),
    ("quantize", lambda t: (torch.zeros(3, 32), Q4_0, t[0]), (torch.float32,)),
    ("dequantize", lambda t: (t, Q4_0, torch.float32), (torch.uint8,)),
    ("linear", lambda t: (t, torch.zeros(5, 18, dtype=torch.uint8), Q4_0), FLOATS),
    ("linear", lambda t: (torch.zeros(3, 0), t, Q4_0), (torch.uint8,)),
    ("linear", lambda t: (X, torch.zeros(32, 36, dtype=torch.uint8), Q4_0, t[0]), FLOATS[:1]),
    ("linear_transposed", lambda t: (t, torch.zeros(32, 18, dtype=torch.uint8), Q4_0), FLOATS),
    ("embedding", lambda t: (t, BLOCKS, Q4_0, torch.float32), (torch.int64, torch.int32)),
    ("embedding", lambda t: (torch.tensor([0]), t, Q4_0, torch.float32), (torch.uint8,)),
    ("pack", lambda t: (t, Q4_0), (torch.uint8,)),
    ("unpack", lambda t: (t, Q4_0), (torch.uint8,)),
    ("pack_", lambda t: (t, Q4_0), (torch.uint8,)),
]


@pytest.mark.parametrize("any_dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_every_dtype_is_told_by_its_name(any_dtype) -> None:
    """Also those for which torch's stable ABI has no word."""
    try:
        tensor = torch.empty(2, 32, dtype=any_dtype)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch makes no such tensors")
    if tensor.is_quantized:
        pytest.skip("torch itself refuses quantised tensors, before it asks an operator")
    for op, arguments, right in TENSORS:
        if any_dtype in right:
            continue
        operator, given = getattr(ops, op).default, arguments(tensor)
        said = message_of(functools.partial(operator, *given), RuntimeError)
        assert said.endswith(f", got {any_dtype}"), said
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
            assert message_of(functools.partial(operator, *fakes), RuntimeError) == said


@pytest.mark.parametrize("any_dtype", [d for d in DTYPES if d not in FLOATS], ids=str)
def test_every_dtype_of_a_result_is_told_by_its_name(any_dtype) -> None:
    for op, tensors in (("dequantize", (BLOCKS,)), ("embedding", (torch.tensor([0]), BLOCKS))):
        words = f"{op}: dtype must be float32, float16 or bfloat16, got {any_dtype}"
        given = (*tensors, Q4_0, any_dtype)
        function, operator = getattr(torch_q4, op), getattr(ops, op).default
        assert message_of(functools.partial(function, *given), TypeError) == words
        said = message_of(functools.partial(operator, *given), RuntimeError)
        # Some have no word in torch's stable ABI, and then torch refuses to pass them on.
        assert said == words or "Not yet supported ScalarType" in said


def test_unknown_format_by_name() -> None:
    for call in (
        lambda: torch_q4.quantize(X, "q9_9"),
        lambda: torch_q4.dequantize(BLOCKS, "q9_9"),
        lambda: torch_q4.linear(X, BLOCKS, "q9_9"),
        lambda: torch_q4.embedding(torch.tensor([1]), BLOCKS, "q9_9"),
    ):
        with pytest.raises(ValueError, match=r"format must be one of .*q6_k.*got 'q9_9'"):
            call()
    with pytest.raises(TypeError, match="linear: format must be a name"):
        torch_q4.linear(X, BLOCKS, None)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((X, BLOCKS, 5, 63), "n_cols a multiple of 32, got 5, 63"),
        ((X, BLOCKS, -1, 64), "n_rows must be at least 0"),
        ((X[0], BLOCKS, 5, 64), r"x must have shape \(M, 64\), got \(64,\)"),
        ((X, BLOCKS, 5, 32), r"x must have shape \(M, 32\), got \(3, 64\)"),
        ((X, BLOCKS[:, :35], 5, 64), r"180 bytes \(float16 scales\) or 200 .* got 175"),
    ],
)
def test_matmul_q4_0(args, words) -> None:
    with pytest.raises(ValueError, match=f"matmul_q4_0: .*{words}"):
        torch_q4.matmul_q4_0(*args)
    with pytest.raises(TypeError, match="matmul_q4_0: blocks must be uint8"):
        torch_q4.matmul_q4_0(X, BLOCKS.int(), 5, 64)


def test_format_columns_errors_name_the_format() -> None:
    with pytest.raises(ValueError, match="q4_k: columns must be a multiple of 256, got 64"):
        formats.get("q4_k").row_bytes(64)


def test_out_of_memory_says_how_much() -> None:
    """Not in which line of which header of torch's the allocation failed.

    Each size is beyond what an address can reach, so no allocator and no setting of the kernel's
    can serve it. (A limit on the process's memory would stop a sanitizer's own allocations too.)
    """
    code = """
import torch, torch_q4
blocks = torch_q4.quantize(torch.randn(64, 256), "q4_0")
for call in (
    lambda: torch_q4.linear(torch.zeros(1, 256).expand(1 << 42, 256), blocks, "q4_0"),
    lambda: torch_q4.dequantize(blocks[:1].expand(1 << 42, 144), "q4_0"),
    lambda: torch_q4.embedding(torch.zeros(1, dtype=torch.int64).expand(1 << 48), blocks, "q4_0"),
    lambda: torch.ops.torch_q4.quantize(torch.zeros(1, 256).expand(1 << 42, 256), 2),
    lambda: torch_q4.embedding(torch.zeros(1, dtype=torch.int32).expand(1 << 60), blocks, "q4_0"),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 5, result.stderr[-2000:]
    words = r"out of memory: torch_q4 could not allocate \d{11,} bytes for a tensor of shape \(.+\)"
    assert all(re.fullmatch(words, line) for line in lines)
    assert "4503599627370496 bytes for a tensor of shape (4398046511104, 256)" in lines[0]
