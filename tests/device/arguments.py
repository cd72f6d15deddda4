"""``kernels/arguments.h`` in ctypes: what each kernel is given, and over which grid it runs.

Nothing keeps the two from drifting apart but ``test_arguments.py``, which asks a C++ compiler.
"""

from __future__ import annotations

import ctypes

BLOCK_THREADS = 256
GROUP_ROWS = 16
MATVEC_COLUMNS = (1, 2, 4, 8)
MATMUL_COLUMNS = (16, 64)
TRANSPOSED_ROWS = 4
PANEL_COLUMNS = 1024
STAGED_COLUMNS = (8, 16, 32, 64, 128)
STAGED_UNIT = 256
STAGED_MOST_GROUPS = 8
STAGED_PRODUCERS = 128
STAGED_MOST_STAGES = 6
STAGED_BARRIER_BYTES = 128
STAGED_SUM_STRIDE = 20
PAIRED_COLUMNS = (128, 256)
PAIRED_ROWS = 128
PAIRED_MOST_STAGES = 8
PAIRED_THREADS = 384
PAIRED_BARRIER_BYTES = 4 * 8 * PAIRED_MOST_STAGES
PAIRED_STORE_BYTES = 1024
ARRANGE_ROWS = 16

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2

Grid = tuple[int, int]

_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64
_Int = ctypes.c_int32


class LinearArgs(ctypes.Structure):
    _fields_ = [
        ("x", _Pointer),
        ("scales", _Pointer),
        ("sums", _Pointer),
        ("blocks", _Pointer),
        ("bias", _Pointer),
        ("out", _Pointer),
        ("m", _Size),
        ("n", _Size),
        ("k", _Size),
        ("row_begin", _Size),
        ("row_end", _Size),
        ("packed", _Int),
        ("dtype", _Int),
    ]


class StagedArgs(ctypes.Structure):
    _fields_ = [
        ("linear", LinearArgs),
        ("partial", _Pointer),
        ("groups", _Int),
        ("stages", _Int),
        ("splits", _Int),
    ]


class PairedArgs(ctypes.Structure):
    _fields_ = [
        ("linear", LinearArgs),
        ("arranged", _Pointer),
        ("partial", _Pointer),
        ("x_stages", _Int),
        ("weight_stages", _Int),
        ("splits", _Int),
    ]


class ArrangeArgs(ctypes.Structure):
    _fields_ = [
        ("x", _Pointer),
        ("out", _Pointer),
        ("m", _Size),
        ("k", _Size),
        ("columns", _Int),
        ("block_elems", _Int),
    ]


class DequantizeArgs(ctypes.Structure):
    _fields_ = [
        ("blocks", _Pointer),
        ("out", _Pointer),
        ("n", _Size),
        ("k", _Size),
        ("row_begin", _Size),
        ("row_end", _Size),
        ("packed", _Int),
        ("dtype", _Int),
    ]


class EmbeddingArgs(ctypes.Structure):
    _fields_ = [
        ("indices", _Pointer),
        ("blocks", _Pointer),
        ("out", _Pointer),
        ("count", _Size),
        ("n", _Size),
        ("k", _Size),
        ("wide", _Int),
        ("packed", _Int),
        ("dtype", _Int),
    ]


class TransposedArgs(ctypes.Structure):
    _fields_ = [
        ("grad", _Pointer),
        ("blocks", _Pointer),
        ("partial", _Pointer),
        ("m", _Size),
        ("n", _Size),
        ("k", _Size),
        ("splits", _Int),
        ("packed", _Int),
        ("dtype", _Int),
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [
        ("partial", _Pointer),
        ("bias", _Pointer),
        ("out", _Pointer),
        ("count", _Size),
        ("rows", _Size),
        ("n", _Size),
        ("splits", _Int),
        ("dtype", _Int),
    ]


class RepackArgs(ctypes.Structure):
    _fields_ = [
        ("from", _Pointer),
        ("to", _Pointer),
        ("groups", _Size),
        ("k", _Size),
    ]


class QuantizeArgs(ctypes.Structure):
    _fields_ = [
        ("w", _Pointer),
        ("blocks", _Pointer),
        ("count", _Size),
        ("dtype", _Int),
    ]


class ActivationArgs(ctypes.Structure):
    _fields_ = [
        ("x", _Pointer),
        ("codes", _Pointer),
        ("scales", _Pointer),
        ("sums", _Pointer),
        ("count", _Size),
        ("dtype", _Int),
    ]


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    LinearArgs,
    StagedArgs,
    PairedArgs,
    ArrangeArgs,
    DequantizeArgs,
    EmbeddingArgs,
    TransposedArgs,
    SumArgs,
    RepackArgs,
    QuantizeArgs,
    ActivationArgs,
)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def part_elems(block_elems: int) -> int:
    return 64 if block_elems == 256 else 32


def dequantize_grid(a: DequantizeArgs, block_elems: int) -> Grid:
    rows = a.row_end - a.row_begin
    groups = rows // GROUP_ROWS if a.packed else 0
    others = (rows - groups * GROUP_ROWS) * (a.k // part_elems(block_elems))
    return groups * ceil_div(a.k, PANEL_COLUMNS) + ceil_div(others, BLOCK_THREADS), 1


def embedding_grid(a: EmbeddingArgs, block_elems: int) -> Grid:
    return ceil_div(a.count * (a.k // part_elems(block_elems)), BLOCK_THREADS), 1


def element_grid(a: LinearArgs) -> Grid:
    return ceil_div(a.m * (a.row_end - a.row_begin), BLOCK_THREADS), 1


def rows_grid(a: LinearArgs, columns: int) -> Grid:
    return ceil_div(a.row_end - a.row_begin, GROUP_ROWS), ceil_div(a.m, columns)


def transposed_grid(a: TransposedArgs) -> Grid:
    return ceil_div(a.k, 256) * a.splits, ceil_div(a.m, TRANSPOSED_ROWS)


def staged_share(columns: int) -> int:
    return 1 if columns > 32 else 2


def staged_threads(columns: int) -> int:
    return 32 * STAGED_MOST_GROUPS * staged_share(columns) + STAGED_PRODUCERS


def staged_offset(block_elems: int, offset: int) -> int:
    return offset + offset // (1024 if block_elems == 256 else 8192) * 64


def staged_block_bytes(block_elems: int, block_bytes: int) -> int:
    return ceil_div(staged_offset(block_elems, GROUP_ROWS * block_bytes - 16) + 16, 32) * 32


def staged_shared_bytes(a: StagedArgs, columns: int, block_elems: int, block_bytes: int) -> int:
    x = STAGED_UNIT // 16 * (columns * 16 * 2 + 16)
    weights = STAGED_UNIT // block_elems * staged_block_bytes(block_elems, block_bytes)
    sums = staged_share(columns) * STAGED_MOST_GROUPS * columns * STAGED_SUM_STRIDE * 4
    return STAGED_BARRIER_BYTES + max(a.stages * (x + a.groups * weights), sums)


def staged_grid(a: StagedArgs, columns: int) -> Grid:
    groups = (a.linear.row_end - a.linear.row_begin) // GROUP_ROWS
    return ceil_div(groups, a.groups) * a.splits, ceil_div(a.linear.m, columns)


def paired_unit(block_elems: int) -> int:
    return STAGED_UNIT if block_elems == 256 else STAGED_UNIT // 2


def paired_x_bytes(columns: int) -> int:
    return columns * 64 * 2


def paired_weight_bytes(block_elems: int, block_bytes: int) -> int:
    blocks = paired_unit(block_elems) // block_elems
    return blocks * staged_block_bytes(block_elems, block_bytes)


def paired_shared_bytes(a: PairedArgs, columns: int, block_elems: int, block_bytes: int) -> int:
    x = a.x_stages * paired_x_bytes(columns)
    weights = a.weight_stages * paired_weight_bytes(block_elems, block_bytes)
    groups = PAIRED_ROWS // GROUP_ROWS
    return PAIRED_BARRIER_BYTES + x + groups * (weights + PAIRED_STORE_BYTES)


def paired_row_pairs(a: LinearArgs) -> int:
    return ceil_div(a.row_end - a.row_begin, 2 * PAIRED_ROWS)


def paired_count(a: PairedArgs, columns: int) -> int:
    return paired_row_pairs(a.linear) * ceil_div(a.linear.m, columns) * a.splits


def paired_grid(a: PairedArgs, columns: int, multiprocessors: int) -> Grid:
    return 2 * min(paired_count(a, columns), max(1, multiprocessors // 2)), 1


def arranged_bytes(m: int, k: int, columns: int) -> int:
    return ceil_div(m, columns) * columns * ceil_div(k, STAGED_UNIT) * STAGED_UNIT * 2


def arrange_grid(a: ArrangeArgs) -> Grid:
    return ceil_div(a.k, STAGED_UNIT), ceil_div(a.m, ARRANGE_ROWS)


def sum_grid(a: SumArgs) -> Grid:
    return ceil_div(a.count, BLOCK_THREADS), 1


def repack_grid(a: RepackArgs, block_elems: int) -> Grid:
    return ceil_div(a.groups * GROUP_ROWS * (a.k // block_elems), BLOCK_THREADS), 1


def quantize_grid(a: QuantizeArgs, block_elems: int) -> Grid:
    return ceil_div(a.count // block_elems, BLOCK_THREADS), 1


def activation_grid(a: ActivationArgs) -> Grid:
    return ceil_div(a.count // 32, BLOCK_THREADS), 1
