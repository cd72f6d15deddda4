#!/usr/bin/env python3
"""Compiles the device code for every AMD architecture and checks what the compiler made of it.

No GPU is needed, only HIP's compiler: that of a root made by ``ci/hip_root.sh``, named by
``--hip-root`` or ``HIP_ROOT``, or else ``hipcc`` and LLVM's tools from the ``PATH``.

What every kernel must fulfil is the table ``RULES`` below. Violations are listed in full and make
the exit status 1; a compilation that fails, or a rule that met no kernel, makes it 2.

It also counts the instructions that a product spends on a weight, and sets beside them how many a
device can issue while the weight's bytes arrive (``DEVICES``, ``budget``). A kernel over its budget
is listed, and is no violation: it is bound by instructions and not by memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
KERNELS = SOURCE / "kernels"

ARCHS = (
    "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030",
    "gfx1100", "gfx1101", "gfx1102", "gfx1151", "gfx1200", "gfx1201",
)  # fmt: skip

# With --thin all architectures meet a simple format and one that needs many registers; the other
# formats meet one architecture each, by turns.
THIN_UNITS = ("Q4_0", "Q3_K", "common")

# The same optimisation and arithmetic as the build: what is checked must be what ships.
FLAGS = (
    "-x", "hip", "--offload-device-only", "--no-gpu-bundle-output", "-O3", "-std=c++17",
    "-ffp-contract=off", "-fno-slp-vectorize", "-Wno-unused-command-line-argument",
    "-Rpass-analysis=kernel-resource-usage",
)  # fmt: skip

# ---- what is asked of the code -------------------------------------------------------------------

CDNA = ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx9-4-generic")
CDNA_1 = ("gfx906", "gfx908")
CDNA_2 = ("gfx90a", "gfx942", "gfx950", "gfx9-4-generic")
RDNA_WITH_WMMA = ("gfx11*", "gfx12*")
WITHOUT_MATRIX = ("gfx906", "gfx1030", "gfx10-3-generic")
EVERY = ("*",)
# Formats whose codes are looked up in tables of memory: such a load must be waited for.
WITHOUT_GRID = ("[!I]*", "IQ4_*")

# Vector registers of architectures that share them out between VGPRs and AGPRs.
UNIFIED_REGISTERS = CDNA_2


@dataclasses.dataclass(frozen=True)
class Rule:
    """Bounds on a figure of the kernels whose names match, on the architectures that match.

    ``figure`` is one of ``Kernel``'s numbers or a key of its ``counts``. ``units`` are the formats
    that are meant.
    """

    kernels: str
    archs: tuple[str, ...]
    figure: str
    least: int = 0
    most: int | None = None
    why: str = ""
    units: tuple[str, ...] = EVERY

    def covers(self, kernel: str, arch: str, unit: str = "Q4_0") -> bool:
        """Whether the rule speaks of this kernel of the format on this architecture."""
        return (
            fnmatch.fnmatchcase(kernel, self.kernels)
            and matches(arch, self.archs)
            and matches(unit, self.units)
        )


RULES = (
    Rule("*", EVERY, "vgpr_spills", most=0, why="registers spill to memory"),
    Rule("*", EVERY, "sgpr_spills", most=0, why="registers spill to memory"),
    Rule("*", EVERY, "scratch", most=0, why="bytes of scratch memory a lane"),
    Rule("rows_*", EVERY, "load_16", least=1, why="no load of 16 bytes at a time"),
    Rule("pipelined_*", EVERY, "load_16", least=1, why="no load of 16 bytes at a time"),
    Rule("rows_*", EVERY, "flat", most=0, why="loads or stores whose address space is unknown"),
    Rule(
        "pipelined_*", EVERY, "flat", most=0, why="loads or stores whose address space is unknown"
    ),
    Rule("rows_*", EVERY, "registers", most=128, why="too few waves hide memory's latency"),
    Rule("rows_*", CDNA_2, "occupancy", least=4, why="too few waves hide memory's latency"),
    # Their SIMD units have half the registers: four waves of 64.
    Rule("rows_*", CDNA_1, "occupancy", least=2, why="too few waves hide memory's latency"),
    Rule(
        "pipelined_*",
        (*CDNA, *RDNA_WITH_WMMA),
        "in_flight",
        least=1,
        units=WITHOUT_GRID,
        why="a wait in the loop is for all loads",
    ),
    Rule("rows_f16_*", EVERY, "dot2_f16", least=1, why="no v_dot2_f32_f16"),
    Rule("rows_int8_*", EVERY, "dot4", least=1, why="no v_dot4"),
    Rule("pipelined_f16_*", CDNA, "mfma", least=1, why="no v_mfma"),
    Rule("pipelined_bf16_*", CDNA, "mfma", least=1, why="no v_mfma"),
    Rule("pipelined_f16_*", RDNA_WITH_WMMA, "wmma", least=1, why="no v_wmma"),
    Rule("pipelined_bf16_*", RDNA_WITH_WMMA, "wmma", least=1, why="no v_wmma"),
    Rule("pipelined_f16_*", WITHOUT_MATRIX, "dot2_f16", least=1, why="no v_dot2_f32_f16"),
)

# Instructions that are counted, by the beginning of an operation's name. gfx11 and later may put
# two operations into one instruction (v_dual_...).
COUNTED = {
    "mfma": r"v_s?mfma",
    "wmma": r"v_s?wmmac?_",
    "dot2_f16": r"v_(dot2c?|dot2acc|dual_dot2acc)_f32_f16",
    "dot2_bf16": r"v_(dot2c?|dot2acc|dual_dot2acc)_f32_bf16",
    "dot4": r"v_dot4c?_i32_i(8|u8)",
    "load_16": r"global_load_(dwordx4|b128)",
    "load_narrow": r"global_load_(?!dwordx4|b128)",
    "lds_accesses": r"ds_",
    "flat": r"flat_",
    "wait": r"s_(waitcnt|wait_)",
}
MULTIPLY_ADD = r"v_(dual_|pk_)?(fma|fmac|mac|mad|fmamk|fmaak)_(f32|mix)"

# A wait until no more than so many loads are under way.
LOAD_WAIT = re.compile(r"s_waitcnt.* vmcnt\((\d+)\)|s_wait_loadcnt (\w+)")

MOST_IN_FLIGHT = 63  # that a wait can name

# Instructions that tell the processor about others and take no time of their own.
HINTS = ("s_delay_alu", "s_clause")

# Products of two numbers that a lane adds up in one instruction. A matrix instruction of 16x16x16
# does 4096 in the lanes of a wave: 64 where there is mfma, 32 where there is wmma.
DOT_PRODUCTS = {"dot2_f16": 2, "dot2_bf16": 2, "dot4": 4}
MATRIX_LANES = {"mfma": 64, "wmma": 32}

# What an instruction of a loop is counted as, the first that matches; the rest is scalar.
KINDS = {
    "matrix": rf"{COUNTED['mfma']}|{COUNTED['wmma']}",
    "dot": "|".join(COUNTED[key] for key in DOT_PRODUCTS),
    "vector": r"v_",
    "memory": r"(global|flat|buffer|scratch|ds)_",
    "scalar": r"",
}

# Bytes that a lane gets from one load of global memory: the first whose pattern is in its name.
LOAD = r"(global|flat|buffer)_load_"
LOAD_BYTES = {
    16: r"dwordx4|b128",
    12: r"dwordx3|b96",
    8: r"dwordx2|b64",
    4: r"dword|b32",
    2: r"short|[biu]16",
    1: r"byte|[biu]8",
}

# Elements of a block that one lane of linear/rows.h reads in a turn: all, but no more than this
# (part_elems of arguments.h).
MOST_PART_ELEMS = 64

# ---- what a device can do ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """A device whose budget is counted. The figures are those of the vendor's data sheet.

    Attributes:
        units: compute units.
        clock: the highest, in Hz.
        bandwidth: of memory, in bytes a second.
        matrix_products: products of float16 that a compute unit's matrix instructions do in a
            clock: the peak rate / (2 x units x clock).
        matrix_unit: whether these have a unit of their own. Without one they keep the vector lanes
            busy for as long as they take.
    """

    name: str
    arch: str
    units: int
    clock: float
    bandwidth: float
    matrix_products: int
    matrix_unit: bool


DEVICES = (
    Device("MI300X", "gfx942", 304, 2.1e9, 5.3e12, matrix_products=1024, matrix_unit=True),
    Device("7900 XTX", "gfx1100", 96, 2.5e9, 0.96e12, matrix_products=256, matrix_unit=False),
    Device("Strix Halo", "gfx1151", 40, 2.9e9, 0.256e12, matrix_products=256, matrix_unit=False),
)

# Lanes whose vector instruction a compute unit begins in a clock: CDNA has 4 SIMDs of 16 lanes,
# RDNA3 2 of 32. RDNA3's dual instructions are one instruction here as they are in the counts, and
# CDNA's packed float32 arithmetic is not twice as many.
VECTOR_LANES = 64


def budget(device: Device, bytes_per_weight: float) -> float:
    """Lane-instructions for each weight that the device can issue while its bytes arrive.

    That is vector lanes per compute unit and clock x compute units x clock, over the weights that
    arrive in a second, bandwidth / bytes per weight. A kernel that needs more for a weight is
    slower than memory. One that needs less is not sure to be as quick: its waves must also hide
    latency.
    """
    return VECTOR_LANES * device.units * device.clock / (device.bandwidth / bytes_per_weight)


# Kernels of the Markdown table, and those that --mca asks llvm-mca about.
TABLE_KERNELS = (
    "rows_f16_1", "rows_f16_4", "rows_int8_1", "pipelined_f16_16", "pipelined_f16_64",
    "hopper_rows_f16_*",
)  # fmt: skip
MCA_KERNELS = ("rows_f16_1", "pipelined_f16_16")

# Clocks in a cycle of LLVM's model: that of gfx9 counts an instruction's four turns as one.
MCA_CLOCKS = {"gfx942": 4, "gfx1100": 1}

# ---- what the compiler says ----------------------------------------------------------------------


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` matches one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: its address, text and, of a branch, the address it goes to."""

    address: int
    text: str
    target: int | None = None

    def operations(self) -> list[str]:
        """The names of what it does: one, or two of a dual instruction."""
        return [part.split(None, 1)[0] for part in self.text.split(" :: ")]


@dataclasses.dataclass(frozen=True)
class Loop:
    """The innermost loop that does the kernel's products.

    Attributes:
        instructions: how many its body has.
        products: how many products of two numbers a lane of it does in one turn, on average over
            the wave; 0 where they are plain multiply-adds, which decoding has too.
        counts: occurrences of each of ``COUNTED``.
        kinds: the instructions by ``KINDS``; hints are none.
        loaded: bytes that a lane loads in one turn, activations among them.
        body: the instructions' texts, without branches.
    """

    instructions: int
    products: int
    counts: dict[str, int]
    kinds: dict[str, int]
    loaded: int
    body: tuple[str, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of one kernel of one source for one architecture."""

    unit: str
    arch: str
    name: str
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int
    occupancy: int
    instructions: int
    counts: dict[str, int]
    loop: Loop | None

    @property
    def registers(self) -> int:
        """Vector registers that decide how many waves fit."""
        both = matches(self.arch, UNIFIED_REGISTERS)
        return self.vgprs + self.agprs if both else max(self.vgprs, self.agprs)

    @property
    def in_flight(self) -> int:
        """Loads that the waits of the hot loop leave under way: the fewest of all."""
        body = self.loop.body if self.loop else ()
        found = [match for text in body if (match := LOAD_WAIT.search(text))]
        waits = [int(match[1] or match[2], 0) for match in found]
        return min(waits, default=MOST_IN_FLIGHT)

    @property
    def columns(self) -> int | None:
        """Columns that a block multiplies with, the last part of the name."""
        match = re.fullmatch(r"\w+_(?:f32|f16|bf16|int8)_(\d+)", self.name)
        return int(match[1]) if match else None

    @property
    def weights(self) -> float | None:
        """Weights that a lane takes in one turn of the hot loop, on average over the wave.

        Lanes that hold the same weight share it: this is what the wave's bytes in memory hold.
        """
        if self.loop is None or self.columns is None:
            return None
        if self.loop.products:
            return self.loop.products / self.columns
        if self.name.startswith("rows_") and self.unit in format_blocks():
            return min(format_blocks()[self.unit].elems, MOST_PART_ELEMS)
        return None

    def per_weight(self, number: int) -> float | None:
        """A figure of the hot loop, for each weight that a lane multiplies with all columns."""
        return number / self.weights if self.weights else None

    @property
    def instructions_per_weight(self) -> float | None:
        """Instructions of the hot loop for each weight that a lane multiplies with all columns."""
        return self.per_weight(self.loop.instructions) if self.loop else None

    @property
    def vector_per_weight(self) -> float | None:
        """Those of them that take a turn of the vector lanes, but for matrix instructions."""
        if self.loop is None:
            return None
        return self.per_weight(self.loop.kinds["vector"] + self.loop.kinds["dot"])

    @property
    def loaded_per_weight(self) -> float | None:
        """Bytes that the lanes load for each weight, of which most come from caches."""
        return self.per_weight(self.loop.loaded) if self.loop else None

    @property
    def bytes_per_weight(self) -> float | None:
        """Bytes of memory that the format has for a weight."""
        block = format_blocks().get(self.unit)
        return block.size / block.elems if block else None

    def figure(self, name: str) -> int:
        """A number by the name that rules give it."""
        value = self.counts[name] if name in self.counts else getattr(self, name)
        assert isinstance(value, int), name
        return value


# The compiler's names of the fields of Kernel.
RESOURCES = {
    "VGPRs": "vgprs",
    "AGPRs": "agprs",
    "TotalSGPRs": "sgprs",
    "SGPRs": "sgprs",
    "VGPRs Spill": "vgpr_spills",
    "SGPRs Spill": "sgpr_spills",
    "ScratchSize [bytes/lane]": "scratch",
    "LDS Size [bytes/block]": "lds",
    "Occupancy [waves/SIMD]": "occupancy",
}


def parse_resources(remarks: str) -> dict[str, dict[str, int]]:
    """Each kernel's resources from the output of ``-Rpass-analysis=kernel-resource-usage``."""
    kernels: dict[str, dict[str, int]] = {}
    for line in remarks.splitlines():
        match = re.search(r" remark: +([^:]+): +(\S+) \[-Rpass-analysis=kernel-resource", line)
        if match is None:
            continue
        field, value = match[1], match[2]
        if field == "Function Name":
            current = kernels[value] = dict.fromkeys(RESOURCES.values(), 0)
        elif field in RESOURCES:
            current[RESOURCES[field]] = int(value)
    return kernels


def parse_disassembly(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each symbol in the output of ``llvm-objdump --disassemble``."""
    symbols: dict[str, list[Instruction]] = {}
    starts: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"([0-9a-f]+) <(.+)>:", line):
            starts[match[2]] = int(match[1], 16)
            current = symbols[match[2]] = []
        elif match := re.match(r"\s+([a-z]\S*(?: .*?)?)\s*// ([0-9A-F]+):.*?(?:<(.+)>)?$", line):
            operation = match[1].split(None, 1)[0]
            target = None
            if match[3] and operation.startswith(("s_branch", "s_cbranch")):
                symbol, _, offset = match[3].partition("+")
                target = starts[symbol] + int(offset or "0", 16)
            current.append(Instruction(int(match[2], 16), match[1].rstrip(), target))
    for instructions in symbols.values():
        while instructions and instructions[-1].text.startswith(("s_nop", "s_code_end")):
            instructions.pop()  # padding behind the end
    return {name: instructions for name, instructions in symbols.items() if instructions}


def size(instructions: Sequence[Instruction]) -> int:
    """How many instructions there are, but for the hints among them."""
    return sum(not instruction.text.startswith(HINTS) for instruction in instructions)


def operations(instructions: Sequence[Instruction]) -> Counter[str]:
    """How often each operation occurs."""
    return Counter(name for instruction in instructions for name in instruction.operations())


def count(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How often each of ``COUNTED`` occurs."""
    names = operations(instructions)
    return {
        key: sum(number for name, number in names.items() if re.match(pattern, name))
        for key, pattern in COUNTED.items()
    }


def kind(instruction: Instruction) -> str:
    """Which of ``KINDS`` the instruction is; a dual one, the first of those its halves are."""
    names = instruction.operations()
    return next(
        kind for kind, pattern in KINDS.items() if any(re.match(pattern, name) for name in names)
    )


def kinds(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions there are of each kind, hints left out."""
    found = Counter(kind(each) for each in instructions if not each.text.startswith(HINTS))
    return {kind: found[kind] for kind in KINDS}


def loaded(instructions: Sequence[Instruction]) -> int:
    """Bytes that a lane loads from global memory."""

    def size(operation: str) -> int:
        if not re.match(LOAD, operation):
            return 0
        return next(size for size, pattern in LOAD_BYTES.items() if re.search(pattern, operation))

    return sum(number * size(name) for name, number in operations(instructions).items())


def products(operation: str) -> int:
    """Products that a lane does in one dot or matrix instruction; of others 0."""
    for key, number in DOT_PRODUCTS.items():
        if re.match(COUNTED[key], operation):
            return number
    for key, lanes in MATRIX_LANES.items():
        if re.match(COUNTED[key], operation):
            size = re.search(r"_(\d+)x(\d+)x(\d+)", operation)
            assert size is not None, operation
            return int(size[1]) * int(size[2]) * int(size[3]) // lanes
    return 0


def loops(instructions: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The bodies of loops: from the target of each backward branch to the branch."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    bodies = []
    for end, instruction in enumerate(instructions):
        if instruction.target is not None and instruction.target <= instruction.address:
            bodies.append(instructions[index[instruction.target] : end + 1])
    return bodies


def hot_loop(instructions: Sequence[Instruction]) -> Loop | None:
    """The innermost loop with dot or matrix instructions.

    A kernel that has none of those in a loop does its products in plain multiply-adds. One that
    unpacks in a loop of its own is counted without that loop. Of several loops with about as many
    products, those of the packed and the canonical layout, the packed one's is meant: it has fewer
    instructions. So has a loop beside what only looks like one, code that goes back to where a loop
    ends.
    """

    def total(body: Sequence[Instruction], of: Callable[[str], int]) -> int:
        return sum(number * of(name) for name, number in operations(body).items())

    def is_multiply_add(operation: str) -> int:
        return re.match(MULTIPLY_ADD, operation) is not None

    bodies = loops(instructions)
    for work in (products, is_multiply_add):
        working = [body for body in bodies if total(body, work) > 0]
        innermost = [body for body in working if not any(inside(it, body) for it in working)]
        if innermost:
            most = max(total(body, work) for body in innermost)
            main = [body for body in innermost if 2 * total(body, work) > most]
            body = max(main, key=lambda it: total(it, work) / size(it))
            straight = (each.text for each in body if each.target is None)
            return Loop(size(body), total(body, products), count(body), kinds(body), loaded(body),
                        tuple(straight))  # fmt: skip
    return None


def inside(inner: Sequence[Instruction], outer: Sequence[Instruction]) -> bool:
    """Whether a loop's body lies within another's."""
    return (
        len(inner) < len(outer)
        and outer[0].address <= inner[0].address
        and inner[-1].address <= outer[-1].address
    )


def parse_kernels(unit: str, arch: str, remarks: str, disassembly: str) -> list[Kernel]:
    """All kernels of one code object.

    Raises:
        ValueError: a kernel is in one of the two texts only, or there is none.
    """
    resources = parse_resources(remarks)
    code = parse_disassembly(disassembly)
    missing = sorted(resources.keys() - code.keys())
    if missing or not resources:
        raise ValueError(
            f"{unit} {arch}: every kernel's code must be disassembled, got none of "
            f"{missing or 'any kernel'}"
        )
    return [
        Kernel(unit, arch, name, instructions=size(code[name]), counts=count(code[name]),
               loop=hot_loop(code[name]), **resource)
        for name, resource in resources.items()
    ]  # fmt: skip


# ---- the verdict ---------------------------------------------------------------------------------


def violations(kernel: Kernel, rules: Sequence[Rule] = RULES) -> list[str]:
    """What the kernel violates, one sentence each."""
    found = []
    for rule in rules:
        if not rule.covers(kernel.name, kernel.arch, kernel.unit):
            continue
        value = kernel.figure(rule.figure)
        where = f"{kernel.unit} {kernel.name} {kernel.arch}"
        if value < rule.least:
            found.append(
                f"{where}: {rule.figure} must be at least {rule.least}, got {value} ({rule.why})"
            )
        if rule.most is not None and value > rule.most:
            found.append(
                f"{where}: {rule.figure} must be at most {rule.most}, got {value} ({rule.why})"
            )
    return found


def idle_rules(
    kernels: Iterable[Kernel], archs: Sequence[str], rules: Sequence[Rule] = RULES
) -> list[Rule]:
    """Rules that met no kernel though an architecture of theirs was compiled.

    A renamed kernel would otherwise escape its rules in silence.
    """
    names = {(kernel.name, kernel.arch, kernel.unit) for kernel in kernels}
    return [
        rule
        for rule in rules
        if any(matches(arch, rule.archs) for arch in archs)
        and not any(rule.covers(*name) for name in names)
    ]


# ---- the budget ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spending:
    """What a kernel spends on each weight on a device, and what the device has to spend.

    Attributes:
        instructions: all of the loop's.
        vector: those that take a turn of the vector lanes, but for matrix instructions.
        matrix: turns of the vector lanes that pass while a weight's matrix instructions run.
        budget: turns that pass while the weight's bytes arrive.
        matrix_unit: whether the matrix instructions run beside the vector lanes.
    """

    instructions: float
    vector: float
    matrix: float
    budget: float
    matrix_unit: bool

    @property
    def busy(self) -> float:
        """Turns of the vector lanes or of the matrix unit, whichever is longer busy."""
        if self.matrix_unit:
            return max(self.vector, self.matrix)
        return self.vector + self.matrix

    @property
    def exceeds(self) -> bool:
        """Whether there are more instructions than turns."""
        return self.instructions > self.budget

    @property
    def surely_exceeds(self) -> bool:
        """Whether that is so though memory and scalar instructions are issued beside the others."""
        return self.busy > self.budget


def device_of(arch: str) -> Device | None:
    """The device of ``DEVICES`` that the architecture stands for."""
    return next((device for device in DEVICES if device.arch == arch), None)


def spending(kernel: Kernel) -> Spending | None:
    """What the kernel spends, where its architecture has a device and its weights are known."""
    device = device_of(kernel.arch)
    total, vector = kernel.instructions_per_weight, kernel.vector_per_weight
    if device is None or total is None or vector is None or kernel.bytes_per_weight is None:
        return None
    assert kernel.loop is not None
    has_matrix = kernel.loop.kinds["matrix"] > 0
    # Of a weight's products with all columns the unit does so many in one turn of the lanes.
    matrix = (kernel.columns or 0) * VECTOR_LANES / device.matrix_products if has_matrix else 0
    return Spending(
        total, vector, matrix, budget(device, kernel.bytes_per_weight), device.matrix_unit
    )


OVER_BUDGET = """\
Over the budget, which is no violation. By weight: instructions / turns of the busiest unit, of the
budget; ! where already the turns exceed it."""


def over_budget(kernels: Iterable[Kernel]) -> list[str]:
    """A line for each kernel and device with formats over the budget, the surest first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kernel in kernels:
        spent, device = spending(kernel), device_of(kernel.arch)
        if spent is None or device is None or not spent.exceeds | spent.surely_exceeds:
            continue
        mark = "!" if spent.surely_exceeds else ""
        text = f"{kernel.unit.lower()}{mark} {spent.instructions:.1f}/{spent.busy:.1f} of "
        text += f"{spent.budget:.1f}"
        groups.setdefault((device.name, kernel.name), []).append(text)
    return [
        f"{device:10} {name:15} {', '.join(sorted(texts))}"
        for (device, name), texts in sorted(groups.items(), key=lambda it: natural_parts(it[0]))
    ]


def natural_parts(names: Iterable[str]) -> list[list[tuple[int, str]]]:
    """A key that sorts numbers in names by their values."""
    return [[natural(part) for part in re.findall(r"\d+|\D+", name)] for name in names]


def cell(kernel: Kernel | None) -> str:
    """A kernel's field in the Markdown table."""
    spent = spending(kernel) if kernel else None
    if kernel is None or spent is None:
        return "-"
    matrix = f" + {spent.matrix:.0f}" if spent.matrix else ""
    mark = "**" if spent.surely_exceeds else "_" if spent.exceeds else ""
    return f"{mark}{spent.instructions:.1f}{mark} ({spent.vector:.1f}{matrix}) {kernel.occupancy}w"


def markdown(kernels: Iterable[Kernel]) -> str:
    """The tables of ``TABLE_KERNELS``, one for each device that was compiled for."""
    found = {(each.arch, each.unit, each.name): each for each in kernels}
    names = sorted({name for *_, name in found}, key=lambda name: natural_parts([name]))
    columns = [name for pattern in TABLE_KERNELS for name in fnmatch.filter(names, pattern)]
    tables = []
    for device in DEVICES:
        lines = [
            f"| {device.name} | budget | {' | '.join(columns)} |",
            "|---|---|" + "---|" * len(columns),
        ]
        for unit, block in format_blocks().items():
            cells = [cell(found.get((device.arch, unit, name))) for name in columns]
            if any(text != "-" for text in cells):
                limit = budget(device, block.size / block.elems)
                lines.append(f"| {unit.lower()} | {limit:.1f} | {' | '.join(cells)} |")
        if len(lines) > 2:
            tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


# ---- the table -----------------------------------------------------------------------------------

HEADER = (
    f"{'kernel':24} {'arch':8} {'VGPR':>4} {'AGPR':>4} {'SGPR':>4} {'LDS':>6} {'waves':>5} "
    f"{'16-byte':>7} {'instructions':>24} {'loop':>5} {'a weight':>8} {'& column':>8} "
    f"{'vector':>6} {'dot':>6} {'matrix':>6} {'memory':>6} {'bytes':>6} {'budget':>6}"
)
LEGEND = """\
loop: instructions in a turn of the inner loop. By weight: all of them, those divided by columns,
the vector, dot, matrix and memory ones, bytes loaded (also of x), what the device can issue."""


def row(label: str, kernels: Sequence[Kernel]) -> str:
    """One line: of several kernels the worst of each figure."""
    first = kernels[0]
    kinds = ("mfma", "wmma", "dot2_f16", "dot2_bf16", "dot4")
    lowest = {kind: min(kernel.counts[kind] for kernel in kernels) for kind in kinds}
    found = " ".join(f"{kind}:{number}" for kind, number in lowest.items() if number)
    sizes = [kernel.loop.instructions for kernel in kernels if kernel.loop]

    def most(figure: str) -> int:
        return max(kernel.figure(figure) for kernel in kernels)

    def each(figure: Callable[[Kernel], float | None], pick: Callable[..., float] = max) -> str:
        values = [value for kernel in kernels if (value := figure(kernel)) is not None]
        return f"{pick(values):.2f}" if values else "-"

    def of_kind(kind: str) -> str:
        return each(lambda it: it.per_weight(it.loop.kinds[kind]) if it.loop else None)

    def a_column(kernel: Kernel) -> float | None:
        whole = kernel.instructions_per_weight
        return whole / kernel.columns if whole and kernel.columns else None

    def limit(kernel: Kernel) -> float | None:
        spent = spending(kernel)
        return spent.budget if spent else None

    return (
        f"{label:24} {first.arch:8} {most('vgprs'):4} {most('agprs'):4} {most('sgprs'):4} "
        f"{most('lds'):6} {min(kernel.occupancy for kernel in kernels):5} "
        f"{min(kernel.counts['load_16'] for kernel in kernels):7} {found or '-':>24} "
        f"{max(sizes) if sizes else '-':>5} {each(lambda it: it.instructions_per_weight):>8} "
        f"{each(a_column):>8} {of_kind('vector'):>6} {of_kind('dot'):>6} "
        f"{of_kind('matrix'):>6} {of_kind('memory'):>6} "
        f"{each(lambda it: it.loaded_per_weight):>6} {each(limit, min):>6}"
    )


def table(kernels: Iterable[Kernel], verbose: bool) -> list[str]:
    """The table's lines: the worst over formats for each kernel and architecture, or every one."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        label = f"{kernel.name} {kernel.unit}" if verbose else kernel.name
        groups.setdefault((label, kernel.arch), []).append(kernel)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], natural(item[0][1])))
    return [HEADER, *(row(label, group) for (label, _), group in ordered)]


def natural(arch: str) -> tuple[int, str]:
    """A key that sorts gfx1030 behind gfx950."""
    return len(arch), arch


def as_json(kernel: Kernel) -> dict[str, object]:
    """A kernel's figures, the derived ones too."""
    spent = spending(kernel)
    derived = {
        "registers": kernel.registers,
        "weights": kernel.weights,
        "instructions_per_weight": kernel.instructions_per_weight,
        "budget": spent.budget if spent else None,
    }
    figures = dataclasses.asdict(kernel) | derived
    if kernel.loop:
        del figures["loop"]["body"]
    return figures


# ---- compiling -----------------------------------------------------------------------------------


def format_names() -> list[str]:
    """The names in TORCH_Q4_FORMATS."""
    text = (KERNELS / "formats" / "registry.h").read_text()
    match = re.search(r"#define TORCH_Q4_FORMATS\(X\)((?:.*\\\n)*.*)", text)
    names = re.findall(r"X\((\w+)\)", match[1]) if match else []
    if not names:
        raise SystemExit("rocm_check: kernels/formats/registry.h must define TORCH_Q4_FORMATS")
    return names


@dataclasses.dataclass(frozen=True)
class Block:
    """A format's block: its bytes and elements."""

    size: int
    elems: int


@functools.cache
def format_blocks() -> dict[str, Block]:
    """Each format's block, as its header has it."""
    blocks = {}
    for name in format_names():
        text = (KERNELS / "formats" / f"{name.lower()}.h").read_text()
        size = re.search(r"static_assert\(sizeof\(Block\) == (\d+)\)", text)
        elems = re.search(r"\bkBlockElems = (\d+);", text)
        if size is None or elems is None:
            raise SystemExit(f"rocm_check: {name.lower()}.h must have Block's size and kBlockElems")
        blocks[name] = Block(int(size[1]), int(elems[1]))
    return blocks


class CompileError(RuntimeError):
    """A command that failed, with what it printed."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Runs hipcc and LLVM's tools, inside ``root`` where there is one."""

    root: Path | None

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command; raises ``CompileError`` with its output where it fails."""
        prefix = [str(SOURCE / "ci" / "hip_run.sh"), str(self.root)] if self.root else []
        try:
            result = subprocess.run([*prefix, *command], capture_output=True, text=True, cwd=SOURCE)
        except OSError as error:
            raise CompileError(
                f"{command[0]} must be on the PATH where --hip-root is not given, got: {error}"
            ) from error
        if result.returncode != 0:
            # A template's error comes with pages of context; the first few say what is wrong.
            errors = [line for line in result.stderr.splitlines() if "error:" in line]
            summary = "\n".join(errors[:5] or result.stderr.splitlines()[-5:])
            raise CompileError(f"{shlex.join(command)}\n{summary}")
        return result

    def version(self) -> str:
        """What hipcc says of itself."""
        return self.run("hipcc", "--version").stdout.partition("\nTarget")[0]

    def kernels(self, unit: str, arch: str, directory: Path) -> list[Kernel]:
        """Compiles format.hip for a format, or common.hip, and reads the result."""
        is_format = unit != "common"
        source = KERNELS / ("format.hip" if is_format else "common.hip")
        define = [f"-DTORCH_Q4_FORMAT={unit}"] if is_format else []
        code_object = directory / f"{unit}.{arch}.hsaco"
        remarks = self.run(
            "hipcc", *FLAGS, *define, f"--offload-arch={arch}", str(source), "-o", str(code_object)
        ).stderr
        disassembly = self.run("llvm-objdump", "--disassemble", str(code_object)).stdout
        code_object.unlink()
        return parse_kernels(unit, arch, remarks, disassembly)

    def cycles(self, arch: str, body: Sequence[str], directory: Path) -> float:
        """Cycles that llvm-mca's model of a wave alone takes for one turn of a loop."""
        source = directory / "body.s"
        source.write_text("\n".join(body) + "\n")
        return parse_cycles(self.run(
            "llvm-mca", "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-iterations=100",
            "-instruction-info=0", "-resource-pressure=0", str(source),
        ).stdout)  # fmt: skip


def parse_cycles(text: str) -> float:
    """Cycles of one iteration in llvm-mca's output."""
    found = {key: re.search(rf"{key}: +(\d+)", text) for key in ("Iterations", "Total Cycles")}
    iterations, cycles = (int(match[1]) if match else 0 for match in found.values())
    if not iterations or not cycles:
        raise CompileError(f"llvm-mca: must state iterations and cycles, got {text[:200]!r}")
    return cycles / iterations


def modelled(toolchain: Toolchain, kernels: Iterable[Kernel]) -> tuple[list[str], list[str]]:
    """A line for each of ``MCA_KERNELS`` on the architectures of ``MCA_CLOCKS``, and the errors.

    The model lets a wave wait 320 clocks for each load, as if it came from a cache, and knows
    nothing of other waves: the clocks over those of issuing say how many waves hide the waiting.
    """
    lines: list[str] = []
    errors: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for kernel in sorted(kernels, key=lambda it: (it.name, natural(it.arch), it.unit)):
            clocks = MCA_CLOCKS.get(kernel.arch)
            if kernel.loop is None or kernel.name not in MCA_KERNELS or clocks is None:
                continue
            if kernel.loop.counts["wmma"]:
                # It begins one a clock; the data sheet's peak rate says one in 32.
                outcome = "not modelled: LLVM takes v_wmma for an ordinary instruction"
            else:
                try:
                    cycles = toolchain.cycles(kernel.arch, kernel.loop.body, Path(name))
                except CompileError as error:
                    errors.append(f"{kernel.unit} {kernel.name} {kernel.arch}: {error}")
                    continue
                outcome = (
                    f"{cycles * clocks:5.0f} clocks a turn, {kernel.loop.instructions * clocks:4} "
                    f"of them issuing, {kernel.weights:g} weights a lane"
                )
            lines.append(f"{kernel.name:15} {kernel.arch:8} {kernel.unit.lower():8} {outcome}")
    return lines, errors


def compile_all(
    toolchain: Toolchain, units: Sequence[str], archs: Sequence[str], jobs: int, *, thin: bool
) -> tuple[list[Kernel], list[str]]:
    """All kernels of all units, and the messages of the compilations that failed.

    With ``thin`` one architecture for each unit, by turns, and all of them for ``THIN_UNITS``.
    """
    pairs = [
        (unit, arch)
        for turn, unit in enumerate(units)
        for arch in (archs if not thin or unit in THIN_UNITS else [archs[turn % len(archs)]])
    ]
    kernels: list[Kernel] = []
    errors: list[str] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:

        def one(unit: str, arch: str) -> tuple[list[Kernel], float]:
            start = time.monotonic()
            return toolchain.kernels(unit, arch, Path(name)), time.monotonic() - start

        waiting = {pool.submit(one, unit, arch): (unit, arch) for unit, arch in pairs}
        for done, future in enumerate(as_completed(waiting), 1):
            unit, arch = waiting[future]
            try:
                found, seconds = future.result()
            except (CompileError, ValueError) as error:
                errors.append(f"{unit} {arch}: {error}")
                outcome = "FAILED"
            else:
                kernels += found
                outcome = f"{len(found)} kernels in {seconds:.1f} s"
            print(f"[{done}/{len(waiting)}] {arch} {unit}: {outcome}", file=sys.stderr, flush=True)
    return kernels, errors


def absolute(path: str) -> Path:
    """The path as it is from any directory."""
    return Path(path).resolve()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Compile the device code for every AMD architecture and check the result: "
        "registers, spills, widths of loads, matrix and dot instructions. Needs hipcc, no GPU.",
        epilog="Exit status: 0 all rules hold, 1 violations, 2 a compilation failed or a rule met "
        "no kernel.",
    )
    known = [*format_names(), "common"]
    parser.add_argument("--arch", nargs="+", default=ARCHS, metavar="GFX",
                        help=f"architectures (default: {' '.join(ARCHS)})")  # fmt: skip
    parser.add_argument("--format", nargs="+", default=known, choices=known, metavar="NAME",
                        help=f"what to compile (default: {' '.join(known)})")  # fmt: skip
    parser.add_argument("--thin", action="store_true",
                        help="one architecture for each format, by turns, and all for "
                        f"{', '.join(THIN_UNITS)}")  # fmt: skip
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="compilations at a time (default: one a CPU)")  # fmt: skip
    parser.add_argument("--hip-root", type=absolute, default=os.environ.get("HIP_ROOT"),
                        metavar="DIR", help="a root made by ci/hip_root.sh (default: $HIP_ROOT, "
                        "else hipcc and llvm-objdump must be on the PATH)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--table", type=Path, metavar="FILE",
                        help="write instructions per weight, in Markdown, to FILE")  # fmt: skip
    parser.add_argument("--mca", action="store_true",
                        help="print what llvm-mca says of some inner loops")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true",
                        help="a line for each format, not the worst of all")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    options = parse_arguments(arguments)
    start = time.monotonic()
    toolchain = Toolchain(options.hip_root)
    try:
        print(toolchain.version(), file=sys.stderr)
    except CompileError as error:
        print(f"ERROR {error}")
        return 2
    kernels, errors = compile_all(
        toolchain, options.format, options.arch, options.jobs, thin=options.thin
    )

    print("\n".join(table(kernels, options.verbose)))
    if not options.verbose:
        print("Of several formats each column shows the worst.")
    print(LEGEND)
    if options.json:
        options.json.write_text(json.dumps([as_json(kernel) for kernel in kernels], indent=1))
    if options.table:
        options.table.write_text(markdown(kernels))
    if options.mca:
        lines, failures = modelled(toolchain, kernels)
        print("", "llvm-mca, of one wave alone:", *lines, sep="\n")
        errors += failures
    if over := over_budget(kernels):
        print("", OVER_BUDGET, *over, "", sep="\n")

    found = [text for kernel in kernels for text in violations(kernel)]
    # A selection need not have every kind of kernel.
    if set(options.format) >= {*format_names(), "common"} and not errors:
        errors += [f"no kernel is covered by {rule}" for rule in idle_rules(kernels, options.arch)]
    for text in found:
        print(f"VIOLATION {text}")
    for text in errors:
        print(f"ERROR {text}")
    print(
        f"{len(options.format)} sources for {len(options.arch)} architectures: {len(kernels)} "
        f"kernels, {len(found)} violations, {len(errors)} errors, {time.monotonic() - start:.0f} s"
    )
    return 2 if errors else 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
