"""Whether arguments.py reads kernels/arguments.h as a C++ compiler does, and has its grids."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import arguments as args
import pytest
from weights import all_formats

# A grid function, its structure's type, and what else it takes: block_elems, or columns and of
# hopper_many_grid multiprocessors, too.
GRIDS: tuple[tuple[str, type[ctypes.Structure], tuple[tuple[int, ...], ...]], ...] = (
    ("dequantize_grid", args.DequantizeArgs, ((32,), (256,))),
    ("embedding_grid", args.EmbeddingArgs, ((32,), (256,))),
    ("reference_grid", args.LinearArgs, ((),)),
    ("rows_grid", args.LinearArgs, ((1,), (8,), (16,), (64,))),
    ("pipelined_grid", args.PipelinedArgs, ((16,), (64,), (128,))),
    ("arrange_lanes_grid", args.ArrangeArgs, ((),)),
    ("transposed_grid", args.TransposedArgs, ((),)),
    ("hopper_rows_grid", args.HopperRowsArgs, ((8,), (128,))),
    ("hopper_many_grid", args.HopperManyArgs, ((128, 1), (128, 7), (256, 2), (256, 132))),
    ("arrange_grid", args.ArrangeArgs, ((),)),
    ("sum_grid", args.SumArgs, ((),)),
    ("repack_grid", args.RepackArgs, ((32,), (256,))),
    ("quantize_grid", args.QuantizeArgs, ((32,), (256,))),
    ("activation_grid", args.ActivationArgs, ((),)),
)
# Small ones, odd ones, and ones whose products do not fit 32 bits.
NUMBERS = (
    {"m": 1, "n": 37, "k": 256, "row_begin": 16, "row_end": 37, "count": 512, "groups": 2,
     "x_rows": 16, "block_elems": 256},
    {"m": 70, "n": 4097, "k": 1280, "row_begin": 0, "row_end": 4097, "count": 9728, "groups": 3,
     "x_rows": 64, "block_elems": 32},
    {"m": 4097, "n": 1 << 20, "k": 14336, "row_begin": 32, "row_end": 1 << 20, "count": 1 << 30,
     "groups": 65536, "x_rows": 128, "block_elems": 64},
)  # fmt: skip


def run_cpp(statements: list[str], folder: Path) -> list[int]:
    """The numbers that C++ ``print`` statements give, with the header included."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = folder / "probe.cpp"
    source.write_text(
        f'#include "{args.HEADER}"\n#include <cstddef>\n#include <cstdio>\n'
        "using namespace torch_q4::gpu;\n"
        'static void print(unsigned long long value) { std::printf("%llu\\n", value); }\n'
        "int main() {\n" + "\n".join(statements) + "\n}\n"
    )
    command = [compiler, "-std=c++17", str(source), "-o", str(folder / "probe")]
    subprocess.run(command, check=True)
    result = subprocess.run([folder / "probe"], capture_output=True, text=True, check=True)
    return [int(line) for line in result.stdout.split()]


def test_every_structure_is_there() -> None:
    names = re.findall(r"^struct (\w+Args) \{", args.HEADER.read_text(), re.MULTILINE)
    assert list(args.STRUCTS) == names


def test_sizes_and_offsets(tmp_path: Path) -> None:
    statements, wanted, what = [], [], []
    for name, struct in args.STRUCTS.items():
        statements.append(f"print(sizeof({name}));")
        wanted.append(ctypes.sizeof(struct))
        what.append(name)
        for field, kind in struct._fields_:
            statements.append(f"print(offsetof({name}, {field}));")
            statements.append(f"print(sizeof(static_cast<{name}*>(nullptr)->{field}));")
            wanted += [getattr(struct, field).offset, ctypes.sizeof(kind)]
            what += [f"{name}.{field}", f"size of {name}.{field}"]
    got = run_cpp(statements, tmp_path)
    assert dict(zip(what, got, strict=True)) == dict(zip(what, wanted, strict=True))


def test_constants(tmp_path: Path) -> None:
    header = args.HEADER.read_text()
    declared = re.findall(r"^(?:constexpr int |enum .*)(k\w+)[^(]*?[;}]", header, re.MULTILINE)
    assert set(declared) <= set(args.CONSTANTS)
    statements: list[str] = []
    wanted: list[int] = []
    for name, value in args.CONSTANTS.items():
        is_list = isinstance(value, tuple)
        statements.append(f"for (int one : {name}) print(one);" if is_list else f"print({name});")
        wanted += value if is_list else [value]
    assert run_cpp(statements, tmp_path) == wanted


def fill(filled: Any, numbers: dict[str, int], prefix: str = "") -> dict[str, int]:
    """Sets the members that have a number; returns what was set, by the name in C++."""
    values = {}
    for field, kind in filled._fields_:
        if issubclass(kind, ctypes.Structure):
            values |= fill(getattr(filled, field), numbers, f"{prefix}{field}.")
            continue
        few = field == "splits" or (field == "groups" and "stages" in dict(filled._fields_))
        if few or field in numbers:
            values[prefix + field] = 3 if few else numbers[field]
            setattr(filled, field, values[prefix + field])
    return values


def test_hopper_rows_sizes(tmp_path: Path) -> None:
    statements, wanted = [], []
    for columns in args.HOPPER_ROWS_X_ROWS:
        statements.append(f"print(hopper_rows_threads({columns}));")
        wanted.append(args.hopper_rows_threads(columns))
        for fmt in all_formats().values():
            for groups, stages in ((1, 2), (3, 4), (8, 3)):
                sizes = f"{columns}, {fmt.block_elems}, {fmt.block_bytes}"
                statements.append(
                    f"{{ HopperRowsArgs a{{}}; a.groups = {groups}; a.stages = {stages}; "
                    f"print(hopper_rows_shared_bytes(a, {sizes})); }}"
                )
                a = args.HopperRowsArgs(groups=groups, stages=stages)
                wanted.append(
                    args.hopper_rows_shared_bytes(a, columns, fmt.block_elems, fmt.block_bytes)
                )
    assert run_cpp(statements, tmp_path) == wanted


def test_hopper_many_sizes(tmp_path: Path) -> None:
    statements, wanted = [], []
    for fmt in all_formats().values():
        sizes = fmt.block_elems, fmt.block_bytes
        statements.append(f"print(hopper_many_unit({fmt.block_elems}));")
        statements.append(f"print(hopper_many_weight_bytes({sizes[0]}, {sizes[1]}));")
        wanted += [args.hopper_many_unit(fmt.block_elems), args.hopper_many_weight_bytes(*sizes)]
        for columns in args.HOPPER_MANY_X_ROWS:
            for x_stages, weight_stages in ((2, 2), (5, 3), (3, 8)):
                statements.append(
                    f"{{ HopperManyArgs a{{}}; a.x_stages = {x_stages}; "
                    f"a.weight_stages = {weight_stages}; "
                    f"print(hopper_many_shared_bytes(a, {columns}, {sizes[0]}, {sizes[1]})); }}"
                )
                a = args.HopperManyArgs(x_stages=x_stages, weight_stages=weight_stages)
                wanted.append(args.hopper_many_shared_bytes(a, columns, *sizes))
    assert run_cpp(statements, tmp_path) == wanted


def test_hopper_many_counts(tmp_path: Path) -> None:
    statements, wanted = [], []
    # Rows that end in the first or the second block of a pair, or that fill both.
    ends = ({"m": 256, "row_begin": 16, "row_end": end} for end in (32, 144, 160, 272, 288))
    for columns in args.HOPPER_MANY_X_ROWS:
        statements.append(f"print(hopper_many_x_bytes({columns}));")
        wanted.append(args.hopper_many_x_bytes(columns))
        for m, k in ((1, 32), (128, 256), (129, 1312), (1 << 20, 1 << 16)):
            statements.append(f"print(arranged_bytes({m}, {k}, {columns}));")
            wanted.append(args.arranged_bytes(m, k, columns))
    for numbers in (*NUMBERS, *ends):
        filled = args.HopperManyArgs()
        values = fill(filled, numbers)
        assign = "".join(f"a.{key} = {value}LL; " for key, value in values.items())
        counts = "".join(
            f"print(hopper_many_count(a, {columns})); " for columns in args.HOPPER_MANY_X_ROWS
        )
        statements.append(
            f"{{ HopperManyArgs a{{}}; {assign}print(hopper_many_row_pairs(a.linear)); {counts}}}"
        )
        wanted.append(args.hopper_many_row_pairs(filled.linear))
        wanted += [args.hopper_many_count(filled, columns) for columns in args.HOPPER_MANY_X_ROWS]
    assert run_cpp(statements, tmp_path) == wanted


def test_grids(tmp_path: Path) -> None:
    statements: list[str] = []
    wanted: list[int] = []
    for name, struct, extra in GRIDS:
        for numbers in NUMBERS:
            filled: Any = struct()
            values = fill(filled, numbers)
            assign = "".join(f"a.{key} = {value}LL; " for key, value in values.items())
            for more in extra:
                call = ", ".join(["a", *map(str, more)])
                statements.append(
                    f"{{ {struct.__name__} a{{}}; {assign}"
                    f"Grid g = {name}({call}); print(g.x); print(g.y); }}"
                )
                wanted += getattr(args, name)(filled, *more)
    declared = re.findall(r"^inline Grid (\w+)\(", args.HEADER.read_text(), re.MULTILINE)
    assert [name for name, _, _ in GRIDS] == declared
    assert run_cpp(statements, tmp_path) == wanted
