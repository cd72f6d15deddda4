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
        for name, value in re.findall(r"(\w+)(?:\[\])? =\s+(\{[^}]*\}|[^,{]+)", names):
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


class _Arguments(ctypes.Structure):
    """A structure that refuses names which are no fields: ctypes would keep them beside it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in dict(self._fields_):
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        super().__setattr__(name, value)


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
        structures[struct] = type(struct, (_Arguments,), {"_fields_": fields})
    return structures


_CODE = re.sub(r" *//.*", "", HEADER.read_text())
CONSTANTS = _read_constants(_CODE)
STRUCTS = _read_structures(_CODE)

BLOCK_THREADS = CONSTANTS["kBlockThreads"]
GROUP_ROWS = CONSTANTS["kGroupRows"]
ROWS_X_ROWS = CONSTANTS["kRowsXRows"]
TILES_X_ROWS = CONSTANTS["kTilesXRows"]
PIPELINED_X_ROWS = CONSTANTS["kPipelinedXRows"]
TRANSPOSED_ROWS = CONSTANTS["kTransposedRows"]
PANEL_ELEMS = CONSTANTS["kPanelElems"]
HOPPER_ROWS_X_ROWS = CONSTANTS["kHopperRowsXRows"]
STAGE_UNIT = CONSTANTS["kStageUnit"]
HOPPER_ROWS_MOST_GROUPS = CONSTANTS["kHopperRowsMostGroups"]
HOPPER_ROWS_PRODUCERS = CONSTANTS["kHopperRowsProducers"]
HOPPER_ROWS_MOST_STAGES = CONSTANTS["kHopperRowsMostStages"]
HOPPER_ROWS_BARRIER_BYTES = CONSTANTS["kHopperRowsBarrierBytes"]
HOPPER_ROWS_SUM_STRIDE = CONSTANTS["kHopperRowsSumStride"]
HOPPER_MANY_X_ROWS = CONSTANTS["kHopperManyXRows"]
HOPPER_MANY_ROWS = CONSTANTS["kHopperManyRows"]
HOPPER_MANY_MOST_STAGES = CONSTANTS["kHopperManyMostStages"]
HOPPER_MANY_THREADS = CONSTANTS["kHopperManyThreads"]
HOPPER_MANY_BARRIER_BYTES = CONSTANTS["kHopperManyBarrierBytes"]
HOPPER_MANY_STORE_BYTES = CONSTANTS["kHopperManyStoreBytes"]
ARRANGE_ROWS = CONSTANTS["kArrangeRows"]
FLOAT32, FLOAT16, BFLOAT16 = (CONSTANTS[name] for name in ("kFloat32", "kFloat16", "kBFloat16"))

LinearArgs = STRUCTS["LinearArgs"]
PipelinedArgs = STRUCTS["PipelinedArgs"]
HopperRowsArgs = STRUCTS["HopperRowsArgs"]
HopperManyArgs = STRUCTS["HopperManyArgs"]
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
    return groups * ceil_div(a.k, PANEL_ELEMS) + ceil_div(others, BLOCK_THREADS), 1


def embedding_grid(a: Any, block_elems: int) -> Grid:
    return ceil_div(a.count * (a.k // part_elems(block_elems)), BLOCK_THREADS), 1


def reference_grid(a: Any) -> Grid:
    return ceil_div(a.m * (a.row_end - a.row_begin), BLOCK_THREADS), 1


def rows_grid(a: Any, columns: int) -> Grid:
    return ceil_div(a.row_end - a.row_begin, GROUP_ROWS), ceil_div(a.m, columns)


def transposed_grid(a: Any) -> Grid:
    return ceil_div(a.k, 256) * a.splits, ceil_div(a.m, TRANSPOSED_ROWS)


def hopper_rows_share(columns: int) -> int:
    return 1 if columns > 32 else 2


def hopper_rows_threads(columns: int) -> int:
    return 32 * HOPPER_ROWS_MOST_GROUPS * hopper_rows_share(columns) + HOPPER_ROWS_PRODUCERS


def stage_offset(block_elems: int, offset: int) -> int:
    return offset + offset // (1024 if block_elems == STAGE_UNIT else 8192) * 64


def stage_block_bytes(block_elems: int, block_bytes: int) -> int:
    return stage_offset(block_elems, GROUP_ROWS * block_bytes - 16) + 16


def hopper_rows_shared_bytes(a: Any, columns: int, block_elems: int, block_bytes: int) -> int:
    x = STAGE_UNIT // 16 * (columns * 16 * 2 + 16)
    weights = STAGE_UNIT // block_elems * stage_block_bytes(block_elems, block_bytes)
    sums = (
        hopper_rows_share(columns) * HOPPER_ROWS_MOST_GROUPS * columns * HOPPER_ROWS_SUM_STRIDE * 4
    )
    return HOPPER_ROWS_BARRIER_BYTES + max(a.stages * (x + a.groups * weights), sums)


def hopper_rows_grid(a: Any, columns: int) -> Grid:
    groups = (a.linear.row_end - a.linear.row_begin) // GROUP_ROWS
    return ceil_div(groups, a.groups) * a.splits, ceil_div(a.linear.m, columns)


def hopper_many_unit(block_elems: int) -> int:
    return STAGE_UNIT if part_elems(block_elems) == 64 else STAGE_UNIT // 2


def hopper_many_x_bytes(columns: int) -> int:
    return columns * 64 * 2


def hopper_many_weight_bytes(block_elems: int, block_bytes: int) -> int:
    blocks = hopper_many_unit(block_elems) // block_elems
    return blocks * stage_block_bytes(block_elems, block_bytes)


def hopper_many_shared_bytes(a: Any, columns: int, block_elems: int, block_bytes: int) -> int:
    x = a.x_stages * hopper_many_x_bytes(columns)
    weights = a.weight_stages * hopper_many_weight_bytes(block_elems, block_bytes)
    groups = HOPPER_MANY_ROWS // GROUP_ROWS
    return HOPPER_MANY_BARRIER_BYTES + x + groups * (weights + HOPPER_MANY_STORE_BYTES)


def hopper_many_row_pairs(a: Any) -> int:
    return ceil_div(a.row_end - a.row_begin, 2 * HOPPER_MANY_ROWS)


def hopper_many_count(a: Any, columns: int) -> int:
    return hopper_many_row_pairs(a.linear) * ceil_div(a.linear.m, columns) * a.splits


def hopper_many_grid(a: Any, columns: int, multiprocessors: int) -> Grid:
    return 2 * min(hopper_many_count(a, columns), max(1, multiprocessors // 2)), 1


def pipelined_groups(columns: int) -> int:
    return 4 if columns > 16 else 2


def pipelined_grid(a: Any, columns: int) -> Grid:
    groups = (a.linear.row_end - a.linear.row_begin) // GROUP_ROWS
    return ceil_div(groups, pipelined_groups(columns)) * a.splits, ceil_div(a.linear.m, columns)


def arranged_lanes_bytes(m: int, k: int, columns: int, block_elems: int) -> int:
    step = 4 * part_elems(block_elems)
    return ceil_div(m, columns) * columns * ceil_div(k, step) * step * 2


def arrange_lanes_grid(a: Any) -> Grid:
    size = arranged_lanes_bytes(a.m, a.k, a.x_rows, a.block_elems)
    return ceil_div(size // 16, BLOCK_THREADS), 1


def arranged_bytes(m: int, k: int, columns: int) -> int:
    return ceil_div(m, columns) * columns * ceil_div(k, STAGE_UNIT) * STAGE_UNIT * 2


def arrange_grid(a: Any) -> Grid:
    return ceil_div(a.k, STAGE_UNIT), ceil_div(a.m, ARRANGE_ROWS)


def sum_grid(a: Any) -> Grid:
    return ceil_div(a.count, BLOCK_THREADS), 1


def repack_grid(a: Any, block_elems: int) -> Grid:
    return ceil_div(a.groups * GROUP_ROWS * (a.k // block_elems), BLOCK_THREADS), 1


def quantize_grid(a: Any, block_elems: int) -> Grid:
    return ceil_div(a.count // block_elems, BLOCK_THREADS), 1


def activation_grid(a: Any) -> Grid:
    return ceil_div(a.count // 32, BLOCK_THREADS), 1
