"""What each kernel is given, and over which grid it runs, as ``kernels/arguments.h`` says.

Structures and constants are read from the header. The grids are computed here once more;
``test_arguments.py`` asks a C++ compiler whether all of it is so.
"""

from __future__ import annotations

import ast
import ctypes
import re
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parents[2] / "kernels" / "arguments.h"

Grid = tuple[int, int]


def _read_constants(code: str) -> dict[str, Any]:
    """Every ``constexpr int`` and list of them, and every enumerator, by name."""
    found: dict[str, Any] = {}
    for names in re.findall(r"^constexpr int ([^;(]+);", code, re.MULTILINE):
        for name, value in re.findall(r"(\w+)(?:\[\])? = (\{[^}]*\}|[^,{]+)", names):
            value = re.sub(r"k[A-Z]\w+", lambda known: str(found[known[0]]), value)
            if value.startswith("{"):
                found[name] = ast.literal_eval(f"({value[1:-1]},)")
            else:  # products of numbers
                found[name] = 1
                for factor in value.split("*"):
                    found[name] *= int(factor)
    for names in re.findall(r"^enum [^{]*\{([^}]*)\}", code, re.MULTILINE):
        found |= {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", names)}
    return found


def _read_structures(code: str) -> dict[str, type[ctypes.Structure]]:
    """Every structure of arguments, by name, in order."""
    types: dict[str, Any] = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
    types["DType"] = ctypes.c_int32
    structures: dict[str, type[ctypes.Structure]] = {}
    for struct, body in re.findall(
        r"^struct (\w+Args) \{(.*?)^\};", code, re.MULTILINE | re.DOTALL
    ):
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"((?:const )?\w+\*?) ([\w, ]+)", declaration).groups()  # type: ignore[union-attr]
            ctype = ctypes.c_void_p if kind.endswith("*") else (types | structures)[kind]
            fields += [(name, ctype) for name in names.split(", ")]
        structures[struct] = type(struct, (ctypes.Structure,), {"_fields_": fields})
    return structures


_CODE = re.sub(r" *//.*", "", HEADER.read_text())
CONSTANTS = _read_constants(_CODE)
STRUCTS = _read_structures(_CODE)

BLOCK_THREADS = CONSTANTS["kBlockThreads"]
GROUP_ROWS = CONSTANTS["kGroupRows"]
MATVEC_COLUMNS = CONSTANTS["kMatvecColumns"]
MATMUL_COLUMNS = CONSTANTS["kMatmulColumns"]
TRANSPOSED_ROWS = CONSTANTS["kTransposedRows"]
PANEL_COLUMNS = CONSTANTS["kPanelColumns"]
STAGED_COLUMNS = CONSTANTS["kStagedColumns"]
STAGED_UNIT = CONSTANTS["kStagedUnit"]
STAGED_MOST_GROUPS = CONSTANTS["kStagedMostGroups"]
STAGED_PRODUCERS = CONSTANTS["kStagedProducers"]
STAGED_MOST_STAGES = CONSTANTS["kStagedMostStages"]
STAGED_BARRIER_BYTES = CONSTANTS["kStagedBarrierBytes"]
STAGED_SUM_STRIDE = CONSTANTS["kStagedSumStride"]
PAIRED_COLUMNS = CONSTANTS["kPairedColumns"]
PAIRED_ROWS = CONSTANTS["kPairedRows"]
PAIRED_MOST_STAGES = CONSTANTS["kPairedMostStages"]
PAIRED_THREADS = CONSTANTS["kPairedThreads"]
PAIRED_BARRIER_BYTES = CONSTANTS["kPairedBarrierBytes"]
PAIRED_STORE_BYTES = CONSTANTS["kPairedStoreBytes"]
ARRANGE_ROWS = CONSTANTS["kArrangeRows"]
FLOAT32, FLOAT16, BFLOAT16 = (CONSTANTS[name] for name in ("kFloat32", "kFloat16", "kBFloat16"))

LinearArgs = STRUCTS["LinearArgs"]
StagedArgs = STRUCTS["StagedArgs"]
PairedArgs = STRUCTS["PairedArgs"]
ArrangeArgs = STRUCTS["ArrangeArgs"]
DequantizeArgs = STRUCTS["DequantizeArgs"]
EmbeddingArgs = STRUCTS["EmbeddingArgs"]
TransposedArgs = STRUCTS["TransposedArgs"]
SumArgs = STRUCTS["SumArgs"]
RepackArgs = STRUCTS["RepackArgs"]
QuantizeArgs = STRUCTS["QuantizeArgs"]
ActivationArgs = STRUCTS["ActivationArgs"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def part_elems(block_elems: int) -> int:
    return min(block_elems, 64)


def dequantize_grid(a: Any, block_elems: int) -> Grid:
    rows = a.row_end - a.row_begin
    groups = rows // GROUP_ROWS if a.packed else 0
    others = (rows - groups * GROUP_ROWS) * (a.k // part_elems(block_elems))
    return groups * ceil_div(a.k, PANEL_COLUMNS) + ceil_div(others, BLOCK_THREADS), 1


def embedding_grid(a: Any, block_elems: int) -> Grid:
    return ceil_div(a.count * (a.k // part_elems(block_elems)), BLOCK_THREADS), 1


def element_grid(a: Any) -> Grid:
    return ceil_div(a.m * (a.row_end - a.row_begin), BLOCK_THREADS), 1


def rows_grid(a: Any, columns: int) -> Grid:
    return ceil_div(a.row_end - a.row_begin, GROUP_ROWS), ceil_div(a.m, columns)


def transposed_grid(a: Any) -> Grid:
    return ceil_div(a.k, 256) * a.splits, ceil_div(a.m, TRANSPOSED_ROWS)


def staged_share(columns: int) -> int:
    return 1 if columns > 32 else 2


def staged_threads(columns: int) -> int:
    return 32 * STAGED_MOST_GROUPS * staged_share(columns) + STAGED_PRODUCERS


def staged_offset(block_elems: int, offset: int) -> int:
    return offset + offset // (1024 if block_elems == STAGED_UNIT else 8192) * 64


def staged_block_bytes(block_elems: int, block_bytes: int) -> int:
    return staged_offset(block_elems, GROUP_ROWS * block_bytes - 16) + 16


def staged_shared_bytes(a: Any, columns: int, block_elems: int, block_bytes: int) -> int:
    x = STAGED_UNIT // 16 * (columns * 16 * 2 + 16)
    weights = STAGED_UNIT // block_elems * staged_block_bytes(block_elems, block_bytes)
    sums = staged_share(columns) * STAGED_MOST_GROUPS * columns * STAGED_SUM_STRIDE * 4
    return STAGED_BARRIER_BYTES + max(a.stages * (x + a.groups * weights), sums)


def staged_grid(a: Any, columns: int) -> Grid:
    groups = (a.linear.row_end - a.linear.row_begin) // GROUP_ROWS
    return ceil_div(groups, a.groups) * a.splits, ceil_div(a.linear.m, columns)


def paired_unit(block_elems: int) -> int:
    return STAGED_UNIT if part_elems(block_elems) == 64 else STAGED_UNIT // 2


def paired_x_bytes(columns: int) -> int:
    return columns * 64 * 2


def paired_weight_bytes(block_elems: int, block_bytes: int) -> int:
    blocks = paired_unit(block_elems) // block_elems
    return blocks * staged_block_bytes(block_elems, block_bytes)


def paired_shared_bytes(a: Any, columns: int, block_elems: int, block_bytes: int) -> int:
    x = a.x_stages * paired_x_bytes(columns)
    weights = a.weight_stages * paired_weight_bytes(block_elems, block_bytes)
    groups = PAIRED_ROWS // GROUP_ROWS
    return PAIRED_BARRIER_BYTES + x + groups * (weights + PAIRED_STORE_BYTES)


def paired_row_pairs(a: Any) -> int:
    return ceil_div(a.row_end - a.row_begin, 2 * PAIRED_ROWS)


def paired_count(a: Any, columns: int) -> int:
    return paired_row_pairs(a.linear) * ceil_div(a.linear.m, columns) * a.splits


def paired_grid(a: Any, columns: int, multiprocessors: int) -> Grid:
    return 2 * min(paired_count(a, columns), max(1, multiprocessors // 2)), 1


def arranged_bytes(m: int, k: int, columns: int) -> int:
    return ceil_div(m, columns) * columns * ceil_div(k, STAGED_UNIT) * STAGED_UNIT * 2


def arrange_grid(a: Any) -> Grid:
    return ceil_div(a.k, STAGED_UNIT), ceil_div(a.m, ARRANGE_ROWS)


def sum_grid(a: Any) -> Grid:
    return ceil_div(a.count, BLOCK_THREADS), 1


def repack_grid(a: Any, block_elems: int) -> Grid:
    return ceil_div(a.groups * GROUP_ROWS * (a.k // block_elems), BLOCK_THREADS), 1


def quantize_grid(a: Any, block_elems: int) -> Grid:
    return ceil_div(a.count // block_elems, BLOCK_THREADS), 1


def activation_grid(a: Any) -> Grid:
    return ceil_div(a.count // 32, BLOCK_THREADS), 1
