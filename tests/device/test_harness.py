"""The harness itself, on a machine without a GPU.

Its weights and its layout are held against the library's own. Then its cases run on a pretended
driver that computes with the CPU operators in host memory: all must pass, and none may pass once
the pretended kernels make a mistake.
"""

from __future__ import annotations

import ctypes
import fnmatch
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arguments as args
import numpy as np
import pytest
import run
import torch
import weights
from cases import HOPPER_SHARED_BYTES
from conftest import dense64, golden
from driver import Driver, DriverError, NotFoundError, open_driver
from session import Session
from torch import Tensor
from weights import BF16, F16, F32, all_formats

import torch_q4
from torch_q4 import formats

DTYPES = {args.FLOAT32: torch.float32, args.FLOAT16: torch.float16, args.BFLOAT16: torch.bfloat16}


# ---- what the harness knows ----------------------------------------------------------------------


def test_formats_are_the_librarys() -> None:
    ours = [(fmt.name, fmt.block_elems, fmt.block_bytes) for fmt in all_formats().values()]
    theirs = [(fmt.name, fmt.block_elems, fmt.block_bytes) for fmt in formats.all()]
    assert sorted(ours) == sorted(theirs)


def test_packing_is_the_librarys(fmt) -> None:
    ours = all_formats()[fmt.name]
    for rows in (5, 16, 50):
        blocks = torch.randint(0, 256, (rows, fmt.row_bytes(768)), dtype=torch.uint8)
        packed = weights.pack(blocks.numpy(), ours)
        assert np.array_equal(packed, torch_q4.pack(blocks, fmt).numpy())


@pytest.mark.parametrize("tame", [True, False])
def test_known_values_are_those_of_the_blocks(fmt, tame) -> None:
    blocks, values = weights.known_blocks(fmt.name, tame=tame)
    assert len(blocks) >= (12 if tame else 30)
    wanted = dense64(torch.from_numpy(blocks), fmt).numpy()
    assert np.array_equal(values.astype(np.float64), wanted, equal_nan=True)


def test_rounding_is_torchs() -> None:
    values = torch.cat([
        torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32).view(torch.float32),
        torch.randn(1000),
        torch.tensor([0.0, -0.0, float("inf"), float("nan"), 65519.9, 65520.0, 2.0**-25, 1e-45]),
    ])  # fmt: skip
    for ours, theirs in zip((F32, F16, BF16), DTYPES.values(), strict=True):
        got = torch.from_numpy(ours.round(values.numpy()))
        torch.testing.assert_close(got, values.to(theirs).double(), rtol=0, atol=0, equal_nan=True)
        info = torch.finfo(theirs)
        assert (ours.eps, ours.tiny) == (info.eps, info.smallest_normal * info.eps)


@pytest.mark.parametrize("name", weights.QUANTIZERS)
def test_quantizers_make_golden_bytes(name: str) -> None:
    got = weights.QUANTIZERS[name](golden()["x"].reshape(-1, 32))
    assert np.array_equal(got, golden()[f"{name}_blocks"].reshape(got.shape))


def test_activations() -> None:
    x = np.random.default_rng(0).standard_normal((4, 96)).astype(np.float32)
    x[1, :32] = 0
    x[2, 40] = np.inf
    found = weights.quantize_activations(x)
    near = np.abs(found.values - x) <= 0.5001 * np.repeat(found.scales, 32, axis=1)
    assert near[[0, 1, 3]].all()
    assert np.isnan(found.scales[2, 1])
    assert np.isfinite(found.scales).sum() == 11
    assert np.array_equal(found.sums, found.codes.reshape(4, 6, 16).sum(axis=2))


# ---- the harness on a pretended driver -----------------------------------------------------------


class FakeDriver(Driver):
    """Host memory for the device's, the CPU operators for kernels. A module's handle is its name.

    ``mistake`` may change what a kernel was asked to do, or say that it has done it all itself.
    """

    extensions = ("fake",)

    def __init__(
        self, mistake: Callable[[str, Any], bool] | None = None, without: str = ""
    ) -> None:
        self._without = without
        self._memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._names: list[str] = []
        self._mistake = mistake

    def _error(self, code: int) -> str:
        return str(code)

    def describe(self) -> str:
        return "pretended"

    def allocate(self, size: int) -> int:
        memory = ctypes.create_string_buffer(size)
        self._memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        del self._memory[address]

    def upload(self, address: int, data: np.ndarray) -> None:
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, data: np.ndarray, address: int) -> None:
        ctypes.memmove(data.ctypes.data, address, data.nbytes)

    def load(self, image: bytes) -> int:
        self._names.append(image.decode())
        return len(self._names)

    def function(self, module: int, name: str) -> int:
        if self._without and fnmatch.fnmatch(name, self._without):
            raise NotFoundError(f"{name}: must be there, got none")
        self._names.append(f"{self._names[module - 1]} {name}")
        return len(self._names)

    def launch(
        self,
        function: int,
        grid: args.Grid,
        arguments: ctypes.Structure,
        threads: int = args.BLOCK_THREADS,
        shared_bytes: int = 0,
    ) -> None:
        code_object, name = self._names[function - 1].split()
        if name.startswith("hopper_rows_"):
            assert threads == args.hopper_rows_threads(int(name.split("_")[-1]))
            assert 0 < shared_bytes <= HOPPER_SHARED_BYTES
            assert arguments.groups <= args.HOPPER_ROWS_MOST_GROUPS
            assert 2 <= arguments.stages <= args.HOPPER_ROWS_MOST_STAGES
        elif name.startswith("hopper_many_"):
            assert threads == args.HOPPER_MANY_THREADS
            assert 0 < shared_bytes <= HOPPER_SHARED_BYTES
            assert 2 <= arguments.x_stages <= args.HOPPER_MANY_MOST_STAGES
            assert 2 <= arguments.weight_stages <= args.HOPPER_MANY_MOST_STAGES
            assert grid[0] % 2 == 0
            unit = args.hopper_many_unit(all_formats()[code_object].block_elems)
            assert 1 <= arguments.splits <= args.ceil_div(arguments.linear.k, unit)
        else:
            assert (threads, shared_bytes) == (args.BLOCK_THREADS, 0)
        copy = type(arguments).from_buffer_copy(arguments)
        if self._mistake is not None and self._mistake(name, copy):
            return
        kernel = next(run for pattern, run in FAKES.items() if fnmatch.fnmatch(name, pattern))
        kernel(code_object, name, copy)

    def synchronize(self) -> None:
        pass


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = int(np.prod(shape))
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def dense(a: Any, fmt_name: str) -> Tensor:
    """The weight that the arguments name, float32 (n, k)."""
    fmt = formats.get(fmt_name)
    blocks = tensor_at(a.blocks, (a.n, fmt.row_bytes(a.k)), torch.uint8)
    return torch_q4.dequantize(torch_q4.unpack(blocks, fmt) if a.packed else blocks, fmt)


def fake_dequantize(fmt_name: str, name: str, a: Any) -> None:
    rows = dense(a, fmt_name)[a.row_begin : a.row_end].to(DTYPES[a.dtype])
    tensor_at(a.out, tuple(rows.shape), rows.dtype).copy_(rows)


def fake_embedding(fmt_name: str, name: str, a: Any) -> None:
    indices = tensor_at(a.indices, (a.count,), torch.int64 if a.wide else torch.int32)
    rows = dense(a, fmt_name)[indices.long()].to(DTYPES[a.dtype])
    tensor_at(a.out, tuple(rows.shape), rows.dtype).copy_(rows)


def fake_repack(fmt_name: str, name: str, a: Any) -> None:
    fmt = formats.get(fmt_name)
    shape = (a.groups * 16, fmt.row_bytes(a.k))
    source = tensor_at(getattr(a, "from"), shape, torch.uint8)
    moved = torch_q4.pack(source, fmt) if name == "pack" else torch_q4.unpack(source, fmt)
    tensor_at(a.to, shape, torch.uint8).copy_(moved)


def fake_quantize(fmt_name: str, name: str, a: Any) -> None:
    blocks = torch_q4.quantize(tensor_at(a.w, (a.count,), DTYPES[a.dtype]), fmt_name)
    tensor_at(a.blocks, tuple(blocks.shape), torch.uint8).copy_(blocks)


def fake_linear(fmt_name: str, name: str, a: Any) -> None:
    dtype = DTYPES[a.dtype]
    if "int8" in name:
        scales = tensor_at(a.scales, (a.m, a.k // 32), torch.float32)
        x = tensor_at(a.x, (a.m, a.k), torch.int8) * scales.repeat_interleave(32, dim=1)
        w = dense(a, fmt_name)
    else:
        x = tensor_at(a.x, (a.m, a.k), dtype).float()
        w = dense(a, fmt_name).to(dtype).float()
    y = (x.double() @ w.double().T).float()
    if a.bias:
        y += tensor_at(a.bias, (a.n,), dtype).float()
    part = slice(a.row_begin, a.row_end)
    tensor_at(a.out, (a.m, a.n), dtype)[:, part] = y[:, part].to(dtype)


def fake_hopper_rows(fmt_name: str, name: str, a: Any) -> None:
    if a.splits == 1:
        return fake_linear(fmt_name, name, a.linear)
    product = a.linear
    x = tensor_at(product.x, (product.m, product.k), DTYPES[product.dtype]).double()
    split_product(fmt_name, a, x, 256)


def split_product(fmt_name: str, a: Any, x: Tensor, unit: int) -> None:
    """Each split's sum. Where x is wider than the weight, the weight's elements there are zero."""
    product, dtype = a.linear, DTYPES[a.linear.dtype]
    rows = slice(product.row_begin, product.row_end)
    w = dense(product, fmt_name).to(dtype).double()[rows]
    w = torch.nn.functional.pad(w, (0, x.shape[1] - product.k))
    partial = tensor_at(a.partial, (a.splits, product.m, len(w)), torch.float32)
    units = args.ceil_div(product.k, unit)
    for split in range(a.splits):
        part = slice(*(units * s // a.splits * unit for s in (split, split + 1)))
        partial[split] = (x[:, part] @ w[:, part].T).float()


def arranged_elements(k: int, block_elems: int) -> Tensor:
    """Which elements of a column lie where, (units * 32, 8): see ``cases._arranged``."""
    shape = (args.ceil_div(k, args.STAGE_UNIT), 4, 4, 2, 4, 2)
    unit, quarter, step, half, lane, pair = np.indices(shape)
    if block_elems == 32:
        segment = quarter % 2 + lane * 2 + quarter // 2 * 8
    elif block_elems == 64:
        segment = quarter + lane * 4
    else:
        segment = quarter * 2 + lane % 2 + lane // 2 * 8
    element = unit * args.STAGE_UNIT + segment * 16 + step * 4 + pair * 2 + half
    return torch.from_numpy(element.reshape(-1, 8))


def arranged_at(address: int, m: int, k: int, columns: int) -> Tensor:
    """The memory of arranged elements, (columns / C, units * 32, C, 8)."""
    units, blocks = args.ceil_div(k, args.STAGE_UNIT), args.ceil_div(m, columns)
    return tensor_at(address, (blocks, units * 32, columns, 8), torch.int16)


def fake_arrange(fmt_name: str, name: str, a: Any) -> None:
    elements = arranged_elements(a.k, a.block_elems)
    x = torch.nn.functional.pad(
        tensor_at(a.x, (a.m, a.k), torch.int16), (0, elements.numel() - a.k)
    )
    out = arranged_at(a.out, a.m, a.k, a.x_rows)
    for block, some in zip(out, x.split(a.x_rows), strict=True):
        block[:, : len(some)] = some[:, elements].transpose(0, 1)


def arranged_lanes_at(address: int, m: int, k: int, columns: int) -> Tensor:
    """As for a lane that has all of K: (columns / C, k / 8, C, 8)."""
    blocks = args.ceil_div(m, columns)
    return tensor_at(address, (blocks, k // 8, columns, 8), torch.int16)


def part_elements(k: int, block_elems: int) -> Tensor:
    """Elements of K in the order of parts and their segments (part_segment of read/weights.h)."""
    order = torch.arange(k).view(-1, block_elems // 16, 16)
    if block_elems > args.part_elems(block_elems):
        halves = order.view(len(order), -1, 4, 2, 16)  # of 128 elements, the even and odd segments
        order = halves.transpose(2, 3)
    return order.flatten()


def fake_arrange_lanes(fmt_name: str, name: str, a: Any) -> None:
    rows = args.ceil_div(a.m, a.x_rows) * a.x_rows
    x = torch.zeros(rows, a.k, dtype=torch.int16)
    x[: a.m] = tensor_at(a.x, (a.m, a.k), torch.int16)
    x = x[:, part_elements(a.k, a.block_elems)]
    out = arranged_lanes_at(a.out, a.m, a.k, a.x_rows)
    out.copy_(x.view(-1, a.x_rows, a.k // 8, 8).transpose(1, 2))


def fake_pipelined(fmt_name: str, name: str, a: Any) -> None:
    product, dtype = a.linear, DTYPES[a.linear.dtype]
    block_elems, columns = formats.get(fmt_name).block_elems, int(name.split("_")[-1])
    arranged = arranged_lanes_at(a.arranged, product.m, product.k, columns)
    x = torch.empty(len(arranged) * columns, product.k, dtype=torch.int16)
    x[:, part_elements(product.k, block_elems)] = arranged.transpose(1, 2).reshape(x.shape)
    finish_product(fmt_name, a, x[: product.m].view(dtype).double(), 32)


def fake_hopper_many(fmt_name: str, name: str, a: Any) -> None:
    """Puts x in order again, with what the last unit holds past K, which is multiplied by zero."""
    product, dtype = a.linear, DTYPES[a.linear.dtype]
    block_elems, columns = formats.get(fmt_name).block_elems, int(name.split("_")[-1])
    elements = arranged_elements(product.k, block_elems)
    x = torch.empty(product.m, elements.numel(), dtype=torch.int16)
    arranged = arranged_at(a.arranged, product.m, product.k, columns)
    for block, some in zip(arranged, x.split(columns), strict=True):
        some[:, elements.flatten()] = block[:, : len(some)].transpose(0, 1).flatten(1)
    unit = args.hopper_many_unit(block_elems)
    x = x[:, : args.ceil_div(product.k, unit) * unit].view(dtype).double()
    finish_product(fmt_name, a, x, unit)


def finish_product(fmt_name: str, a: Any, x: Tensor, unit: int) -> None:
    """Each split's sums, or the product itself where there is one split."""
    product, dtype = a.linear, DTYPES[a.linear.dtype]
    if a.splits > 1:
        return split_product(fmt_name, a, x, unit)
    sums = torch.empty(1, product.m, product.row_end - product.row_begin)
    a.partial = sums.data_ptr()
    split_product(fmt_name, a, x, unit)
    rows = slice(product.row_begin, product.row_end)
    if product.bias:
        sums += tensor_at(product.bias, (product.n,), dtype)[rows]
    tensor_at(product.out, (product.m, product.n), dtype)[:, rows] = sums[0].to(dtype)


def fake_transposed(fmt_name: str, name: str, a: Any) -> None:
    grad, w = tensor_at(a.grad, (a.m, a.n), DTYPES[a.dtype]).float(), dense(a, fmt_name)
    partial = tensor_at(a.partial, (a.splits, a.m, a.k), torch.float32)
    groups = -(-a.n // 16)
    for split in range(a.splits):
        rows = slice(*(groups * s // a.splits * 16 for s in (split, split + 1)))
        partial[split] = grad[:, rows] @ w[rows]


def fake_sum(fmt_name: str, name: str, a: Any) -> None:
    m, dtype = a.count // a.rows, DTYPES[a.dtype]
    total = torch.zeros(m, a.rows)
    for one in tensor_at(a.partial, (a.splits, m, a.rows), torch.float32):
        total += one
    if a.bias:
        total += tensor_at(a.bias, (a.rows,), dtype)
    # The rows of a part of out end before those of the whole.
    for row, sums in enumerate(total):
        tensor_at(a.out + row * a.n * dtype.itemsize, (a.rows,), dtype).copy_(sums)


def fake_activations(fmt_name: str, name: str, a: Any) -> None:
    x = tensor_at(a.x, (1, a.count), DTYPES[a.dtype]).float().numpy()
    found = weights.quantize_activations(x)
    tensor_at(a.codes, (1, a.count), torch.int8).copy_(torch.from_numpy(found.codes))
    tensor_at(a.scales, (1, a.count // 32), torch.float32).copy_(torch.from_numpy(found.scales))
    tensor_at(a.sums, (1, a.count // 16), torch.int32).copy_(torch.from_numpy(found.sums))


FAKES: dict[str, Callable[[str, str, Any], None]] = {
    "dequantize": fake_dequantize,
    "embedding": fake_embedding,
    "*pack": fake_repack,
    "quantize": fake_quantize,
    "quantize_activations": fake_activations,
    "sum_splits": fake_sum,
    "pipelined_*": fake_pipelined,
    "arrange_lanes": fake_arrange_lanes,
    "hopper_rows_*": fake_hopper_rows,
    "arrange": fake_arrange,
    "hopper_many_*": fake_hopper_many,
    "transposed": fake_transposed,
    "*": fake_linear,
}


def fake_session(
    tmp_path: Path, mistake: Callable[[str, Any], bool] | None = None, without: str = ""
) -> Session:
    for name in ("common", *all_formats()):
        (tmp_path / f"{name}.fake").write_text(name)
    return Session(FakeDriver(mistake, without), tmp_path, None)


# One of each kind: small blocks, large ones, and the one without golden vectors of its own.
@pytest.mark.parametrize("code_object", ["common", "q4_0", "q5_k", "q4_0_f32"])
def test_every_case_passes(tmp_path: Path, code_object: str) -> None:
    session = fake_session(tmp_path)
    results = list(run.run_all(session, run.select([code_object], []), 1, 0))
    assert not [str(result) for result in results if result.failure is not None]
    assert all(result.launches for result in results)


def swap_rows(name: str, a: Any) -> bool:
    """Rows 1 and 2 of each weight take each other's place."""
    a = getattr(a, "linear", a)
    rows = tensor_at(a.blocks, (a.n, formats.get("q4_k").row_bytes(a.k)), torch.uint8)
    rows[:3] = rows[[0, 2, 1]]
    return False


def one_row_less(name: str, a: Any) -> bool:
    a.row_end -= 1
    return False


def write_before(name: str, a: Any) -> bool:
    ctypes.memset(a.out - 3, 0, 1)
    return False


def skip(name: str, a: Any) -> bool:
    return True


def other_bias(name: str, a: Any) -> bool:
    getattr(a, "linear", a).bias = None
    return False


def next_rows_bias(name: str, a: Any) -> bool:
    a = getattr(a, "linear", a)
    if a.bias:
        bias = tensor_at(a.bias, (a.n,), torch.int16)
        bias.copy_(bias.roll(-1))
    return False


def one_split_less(name: str, a: Any) -> bool:
    a.splits -= a.splits > 1
    return False


def no_last_columns(name: str, a: Any) -> bool:
    """The last block of columns is left out where there are several."""
    columns = int(name.split("_")[-1])
    if a.splits == 1 and a.linear.m > columns:
        a.linear.m = (a.linear.m - 1) // columns * columns
    return False


MISTAKES: list[tuple[str, Callable[[str, Any], bool], str]] = [
    ("reference_f32", swap_rows, "row, column 0, 1: got"),
    ("rows_f16_2", one_row_less, "got nan"),
    ("rows_int8_1", write_before, "wrote 3 bytes before the output"),
    ("tiles_bf16_16", swap_rows, "of 16 are wrong"),
    ("tiles_f16_64", other_bias, "bias=True: row, column"),
    ("pipelined_bf16_16", swap_rows, "row, column"),
    ("pipelined_f16_64", other_bias, "bias=True: row, column"),
    ("pipelined_f16_128", one_split_less, "got nan"),
    ("hopper_rows_bf16_16", swap_rows, "of 32 are wrong"),
    ("hopper_rows_f16_64", other_bias, "bias=True: row, column"),
    ("hopper_rows_f16_8", one_split_less, "got"),
    ("hopper_rows_f16_128", skip, "got nan"),
    ("hopper_many_bf16_256", swap_rows, "row, column"),
    ("hopper_many_f16_128", other_bias, "bias=True: row, column"),
    ("hopper_many_f16_256", next_rows_bias, "bias=True: row, column"),
    ("hopper_many_bf16_128", one_split_less, "got nan"),
    ("hopper_many_f16_128", no_last_columns, "row, column 256, 0: got nan"),
    ("hopper_many_f16_256", no_last_columns, "row, column 512, 0: got nan"),
    ("hopper_many_bf16_128", skip, "got nan"),
    ("dequantize", skip, "got nan"),
    ("embedding", write_before, "wrote 3 bytes before the output"),
    ("pack", skip, "got 255"),
    ("transposed", skip, "got nan"),
]


@pytest.mark.parametrize(("kernel", "mistake", "words"), MISTAKES)
def test_mistakes_are_seen(tmp_path: Path, kernel: str, mistake: Any, words: str) -> None:
    session = fake_session(tmp_path, lambda name, a: name == kernel and mistake(name, a))
    (result,) = run.run_all(session, run.select(["q4_k"], [kernel]), 1, 0)
    assert result.failure is not None
    assert words in result.failure
    assert str(result).startswith(f"FAIL q4_k      {kernel} ")


def swap_elements(name: str, a: Any) -> bool:
    """The first and the third element of x's first row take each other's place."""
    fake_arrange("common", name, a)
    first = arranged_at(a.out, a.m, a.k, a.x_rows)[0, 0, 0]
    first[:2] = first[[1, 0]]
    return True


def leave_rest(name: str, a: Any) -> bool:
    """Nothing is written past K."""
    fake_arrange("common", name, a)
    line, place = torch.nonzero(arranged_elements(a.k, a.block_elems) >= a.k, as_tuple=True)
    arranged_at(a.out, a.m, a.k, a.x_rows)[:, line, :, place] = -1
    return True


def write_columns_past_m(name: str, a: Any) -> bool:
    fake_arrange("common", name, a)
    arranged_at(a.out, a.m, a.k, a.x_rows)[-1, :, (a.m - 1) % a.x_rows + 1 :] = 0
    return True


def other_blocks(name: str, a: Any) -> bool:
    """The order for blocks of the other size."""
    a.block_elems = 288 - a.block_elems
    return False


# Arrange by itself, and products that read what it leaves.
ARRANGE_MISTAKES: list[tuple[str, str, Callable[[str, Any], bool], str]] = [
    ("common", "arrange", swap_elements, "m=1 k=32: row, column 0, 0: got"),
    ("common", "arrange", leave_rest, "m=1 k=32: row, column 0, 2: got 65535, wanted 0"),
    ("common", "arrange", write_columns_past_m, "row, column 0, 8: got 0, wanted 65535"),
    ("common", "arrange", other_blocks, "block_elems=32 m=1 k=32: row, column"),
    ("common", "arrange", skip, "got 65535"),
    ("common", "arrange", write_before, "wrote 3 bytes before the output"),
    ("q4_0", "hopper_many_f16_128", swap_elements, "row, column"),
    ("q4_k", "hopper_many_bf16_256", swap_elements, "the whole error must be at most"),
    ("q4_0", "hopper_many_bf16_128", leave_rest, "got nan"),
    ("q4_0", "hopper_many_bf16_256", other_blocks, "row, column"),
    ("q4_k", "hopper_many_f16_128", other_blocks, "row, column"),
    ("q4_k", "hopper_many_f16_256", skip, "got nan"),
    ("q4_k", "hopper_many_f16_256", write_before, "wrote 3 bytes before the output"),
]


@pytest.mark.parametrize(("code_object", "kernel", "mistake", "words"), ARRANGE_MISTAKES)
def test_mistakes_of_arrange_are_seen(
    tmp_path: Path, code_object: str, kernel: str, mistake: Any, words: str
) -> None:
    session = fake_session(tmp_path, lambda name, a: name == "arrange" and mistake(name, a))
    (result,) = run.run_all(session, run.select([code_object], [kernel]), 1, 0)
    assert result.failure is not None
    assert words in result.failure


ONE_HOT_KERNELS = [
    "tiles_f16_16", "tiles_bf16_64", "pipelined_f16_16", "pipelined_bf16_128",
    "hopper_rows_f16_32", "hopper_many_bf16_128",
]  # fmt: skip


@pytest.mark.parametrize("kernel", ONE_HOT_KERNELS)
def test_one_wrong_code_is_seen(tmp_path: Path, kernel: str) -> None:
    """One element of one row of a weight, off by one code, in nothing but the one-hot product."""

    def mistake(name: str, a: Any) -> bool:
        a = getattr(a, "linear", a)
        if name == kernel and a.m >= 16 * a.k:
            bytes_of_row = tensor_at(a.blocks, (16, 144), torch.uint8)
            bytes_of_row[3, 60] ^= 1
        return False

    session = fake_session(tmp_path, mistake)
    (result,) = run.run_all(session, run.select(["q4_k"], [kernel]), 1, 0)
    assert result.failure is not None
    assert "one-hot" in result.failure


def test_kernels_that_the_device_lacks_are_skipped(tmp_path: Path) -> None:
    session = fake_session(tmp_path, without="hopper_rows_*_16")
    results = list(run.run_all(session, run.select(["q4_0"], ["hopper_rows_f16_*"]), 1, 0))
    assert [result.skipped for result in results] == [False, True, False, False, False]
    assert not [str(result) for result in results if result.failure is not None]
    assert str(results[1]).split(None, 3) == [
        "SKIP", "q4_0", "hopper_rows_f16_16", "not in the code for this device"]  # fmt: skip
    session = fake_session(tmp_path, without="hopper_many_*")
    results = list(run.run_all(session, run.select(["q4_0"], ["hopper_many_*"]), 1, 0))
    assert [result.skipped for result in results] == [True] * 4
    session = fake_session(tmp_path, without="arrange")
    results = list(run.run_all(session, run.select([], ["arrange", "hopper_many_f16_128"]), 1, 0))
    assert results[0].skipped
    assert {result.failure for result in results[1:]} == {"arrange: must be there, got none"}
    session = fake_session(tmp_path, without="rows_*")
    (result,) = run.run_all(session, run.select(["q4_0"], ["rows_f16_1"]), 1, 0)
    assert (result.skipped, result.failure) == (
        False, "rows_f16_1: must be there, got none")  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


def test_missing_code_objects_are_named(tmp_path: Path) -> None:
    session = Session(FakeDriver(), tmp_path, "gfx942")
    (result,) = run.run_all(session, run.select(["q4_0"], ["pack"]), 1, 0)
    assert result.failure == (
        f"{tmp_path} must have one of q4_0.gfx942.fake, q4_0.fake, got none"
    )  # fmt: skip


def test_needs_no_torch() -> None:
    script = Path(run.__file__)
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv.pop(0)); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(script.parent), str(script), "--list"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(run.select([], []))


def test_drivers_that_are_none(tmp_path: Path, capsys) -> None:
    with pytest.raises(DriverError, match="must be a library that loads, got nowhere"):
        open_driver("nowhere")
    with pytest.raises(DriverError, match=r"must be libamdhip64\.so or libcuda\.so\.1, got libc"):
        open_driver("libc.so.6")
    assert run.main(["--driver", "nowhere"]) == 2
    assert "must be a library that loads" in capsys.readouterr().err


def test_command_line(monkeypatch, capsys) -> None:
    monkeypatch.delenv("TORCH_Q4_DRIVER", raising=False)
    assert run.main(["--list", "--format", "q8_0", "--kernel", "tiles_*"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "q8_0 tiles_f16_16"
    with pytest.raises(SystemExit):
        run.main([])
    assert "--driver or TORCH_Q4_DRIVER" in capsys.readouterr().err
    assert run.main(["--driver", "nowhere", "--kernel", "nothing"]) == 2
