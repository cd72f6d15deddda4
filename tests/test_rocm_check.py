"""ci/rocm_check.py: what it reads out of the compiler's output, and that it misses no violation.

And ci/hip_run.sh, in a root of a few programs. The compilers' outputs are those of hipcc 7.2 and
its llvm-objdump for two toy kernels, shortened; no compiler is needed here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "ci" / "rocm_check.py"
spec = importlib.util.spec_from_file_location("rocm_check", PATH)
assert spec is not None
assert spec.loader is not None
rocm_check = importlib.util.module_from_spec(spec)
sys.modules["rocm_check"] = rocm_check  # dataclasses look their module up
spec.loader.exec_module(rocm_check)

Kernel, Rule = rocm_check.Kernel, rocm_check.Rule

REMARKS = """\
toy.hip:5:1: remark: Function Name: rows_f16_1 [-Rpass-analysis=kernel-resource-usage]
    5 | extern "C" __global__ void __launch_bounds__(64) rows_f16_1(const uint4* w, int n) {
      | ^
toy.hip:5:1: remark:     TotalSGPRs: 15 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     VGPRs: 14 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     AGPRs: 4 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     ScratchSize [bytes/lane]: 16 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     Dynamic Stack: False [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     Occupancy [waves/SIMD]: 8 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     SGPRs Spill: 2 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     VGPRs Spill: 3 [-Rpass-analysis=kernel-resource-usage]
toy.hip:5:1: remark:     LDS Size [bytes/block]: 1024 [-Rpass-analysis=kernel-resource-usage]
toy.hip:15:1: remark: Function Name: pipelined_f16_16 [-Rpass-analysis=kernel-resource-usage]
toy.hip:15:1: remark:     TotalSGPRs: 11 [-Rpass-analysis=kernel-resource-usage]
toy.hip:15:1: remark:     VGPRs: 18 [-Rpass-analysis=kernel-resource-usage]
toy.hip:15:1: remark:     Occupancy [waves/SIMD]: 16 [-Rpass-analysis=kernel-resource-usage]
"""

# A loop that begins with a hint, a dual instruction, and a comment that touches the instruction.
ROWS_GFX1100 = """
toy.hsaco:	file format elf64-amdgpu

Disassembly of section .text:

0000000000001700 <rows_f16_1>:
	s_cbranch_execz 58                                         // 000000001740: BFA5003A <rows_f16_1+0x12c>
	v_dual_mov_b32 v1, 0 :: v_dual_mov_b32 v8, v0              // 00000000174C: CA100080 01080100
	s_clause 0x1                                               // 0000000017BC: BF850001
	global_load_b128 v[9:12], v[2:3], off                      // 0000000017C0: DC5E0000 097C0002
	global_load_b64 v[13:14], v[4:5], off offset:-4            // 0000000017C8: DC561FFC 0B7C0004
	s_delay_alu instid0(VALU_DEP_1) | instskip(SKIP_1) | instid1(VALU_DEP_4)// 0000000017E0: BF870221
	s_waitcnt vmcnt(0)                                         // 00000000180C: BF8903F7
	v_dual_dot2acc_f32_f16 v6, v9, v11 :: v_dual_dot2acc_f32_f16 v7, v10, v12// 000000001810: CB181709 0606190A
	s_and_not1_b32 exec_lo, exec_lo, s4                        // 000000001818: 917E047E
	s_cbranch_execnz 65512                                     // 00000000181C: BFA6FFE8 <rows_f16_1+0xbc>
	s_endpgm                                                   // 000000001854: BFB00000
	s_code_end                                                 // 000000001858: BF9F0000
"""  # noqa: E501

PIPELINED_GFX942 = """
0000000000001b00 <pipelined_f16_16>:
	s_cbranch_scc1 33                                          // 000000001B24: BF850021 <pipelined_f16_16+0xac>
	global_load_dwordx4 v[10:13], v[8:9], off offset:-8        // 000000001B58: DC5C9FF8 0A7F0008
	s_add_i32 s8, s8, -1                                       // 000000001B68: 8108C108
	s_waitcnt vmcnt(0)                                         // 000000001B80: BF8C0F70
	v_mfma_f32_16x16x16_f16 v[2:5], v[10:11], v[14:15], v[2:5] // 000000001B84: D3CD0002 040A1D0A
	v_mfma_f32_16x16x16_f16 v[2:5], v[12:13], v[16:17], v[2:5] // 000000001B8C: D3CD0002 040A210C
	s_cbranch_scc0 65520                                       // 000000001B94: BF84FFF0 <pipelined_f16_16+0x58>
	global_store_dwordx4 v0, v[2:5], s[2:3]                    // 000000001BA0: DC7C8000 00020200
	s_endpgm                                                   // 000000001BA8: BF810000
	s_nop 0                                                    // 000000001BC8: BF800000
	s_nop 0                                                    // 000000001BCC: BF800000
"""  # noqa: E501


def kernel(name: str, arch: str = "gfx1100", **changes: object) -> object:
    """A kernel that keeps all rules, but for the changes; those of counts by their names."""
    counts = dict.fromkeys(rocm_check.COUNTED, 1) | {"flat": 0}
    counts |= {key: changes.pop(key) for key in list(changes) if key in counts}
    values = dict.fromkeys((field.name for field in dataclasses.fields(Kernel)), 0)
    values |= {"unit": "Q4_0", "arch": arch, "name": name, "vgprs": 64, "occupancy": 8}
    return Kernel(**values | {"counts": counts, "loop": None} | changes)


def test_resources() -> None:
    resources = rocm_check.parse_resources(REMARKS)
    assert list(resources) == ["rows_f16_1", "pipelined_f16_16"]
    assert resources["rows_f16_1"] == {
        "vgprs": 14, "agprs": 4, "sgprs": 15, "vgpr_spills": 3, "sgpr_spills": 2, "scratch": 16,
        "lds": 1024, "occupancy": 8,
    }  # fmt: skip
    assert resources["pipelined_f16_16"]["agprs"] == 0


def test_disassembly() -> None:
    code = rocm_check.parse_disassembly(ROWS_GFX1100 + PIPELINED_GFX942)
    assert list(code) == ["rows_f16_1", "pipelined_f16_16"]
    rows, matmul = code.values()
    assert [each.target for each in rows if each.target] == [0x182C, 0x17BC]
    assert rows[7].operations() == ["v_dual_dot2acc_f32_f16", "v_dual_dot2acc_f32_f16"]
    assert [each[-1].text for each in code.values()] == ["s_endpgm", "s_endpgm"]
    counts = rocm_check.count(rows)
    expected = {"dot2_f16": 2, "load_16": 1, "load_narrow": 1, "wait": 1}
    assert {key: number for key, number in counts.items() if number} == expected
    assert rocm_check.count(matmul)["mfma"] == 2


def test_hot_loop() -> None:
    code = rocm_check.parse_disassembly(ROWS_GFX1100 + PIPELINED_GFX942)
    rows = rocm_check.hot_loop(code["rows_f16_1"])
    assert (rows.instructions, rows.products) == (6, 4)
    matmul = rocm_check.hot_loop(code["pipelined_f16_16"])
    assert (matmul.instructions, matmul.products) == (6, 2 * 16 * 16 * 16 // 64)
    assert rocm_check.hot_loop(code["pipelined_f16_16"][:6]) is None


def body(*operations: str) -> list[object]:
    """Instructions 4 bytes apart; "<N" branches back to the Nth."""
    return [
        rocm_check.Instruction(4 * i, "s_branch", 4 * int(text[1:]))
        if text.startswith("<")
        else rocm_check.Instruction(4 * i, text)
        for i, text in enumerate(operations)
    ]


def test_hot_loop_is_the_innermost_with_fewest_narrow_loads() -> None:
    dot, narrow = "v_dot4c_i32_i8_e32 v1", "global_load_ushort v1"
    loop = rocm_check.hot_loop(
        body("s_nop", dot, "<1", "s_add", "<0", dot, narrow, narrow, "<5", "v_fmac_f32 v0", "<9")
    )
    assert (loop.instructions, loop.counts["load_narrow"]) == (2, 0)


def test_hot_loop_of_plain_multiply_adds() -> None:
    loop = rocm_check.hot_loop(body("v_dual_fmac_f32 v1 :: v_dual_fmac_f32 v2", "<0"))
    assert (loop.instructions, loop.products) == (2, 0)


@pytest.mark.parametrize(
    ("operation", "products"),
    [
        ("v_mfma_f32_16x16x16_f16", 64),
        ("v_mfma_f32_16x16x16f16", 64),
        ("v_mfma_f32_16x16x8bf16", 32),
        ("v_mfma_f32_16x16x32_bf16", 128),
        ("v_wmma_f32_16x16x16_f16", 128),
        ("v_dot2_f32_f16", 2),
        ("v_dot2c_f32_f16_e32", 2),
        ("v_dual_dot2acc_f32_f16", 2),
        ("v_dot2_f32_bf16", 2),
        ("v_dot4_i32_iu8", 4),
        ("v_dot4_i32_i8", 4),
        ("v_dot4c_i32_i8_dpp", 4),
        ("v_dot4_u32_u8", 0),
        ("v_fmac_f32_e32", 0),
    ],
)
def test_products(operation: str, products: int) -> None:
    assert rocm_check.products(operation) == products


def test_instructions_per_weight() -> None:
    """A lane's 4 products are 4 weights with one column, 2 weights with two."""
    (rows,) = rocm_check.parse_kernels(
        "Q4_0", "gfx1100", REMARKS.partition("toy.hip:15")[0], ROWS_GFX1100
    )
    assert rows.instructions_per_weight == 6 / 4
    assert dataclasses.replace(rows, name="rows_f16_2").instructions_per_weight == 6 / 2
    assert dataclasses.replace(rows, name="reference_f16").instructions_per_weight is None
    assert json.loads(json.dumps(rocm_check.as_json(rows)))["registers"] == 14


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("rows_f16_1", 1),
        ("rows_int8_8", 8),
        ("hopper_rows_bf16_128", 128),
        ("pipelined_f16_wide", None),
        ("transposed", None),
        ("x86_64", None),
    ],
)
def test_columns(name: str, columns: int | None) -> None:
    assert kernel(name).columns == columns


def test_parse_kernels_wants_the_code_of_each_kernel() -> None:
    with pytest.raises(ValueError, match=r"Q4_0 gfx1100: .*got none of \['pipelined_f16_16'\]"):
        rocm_check.parse_kernels("Q4_0", "gfx1100", REMARKS, ROWS_GFX1100)
    with pytest.raises(ValueError, match="got none of any kernel"):
        rocm_check.parse_kernels("Q4_0", "gfx1100", "", ROWS_GFX1100)


def test_agprs_count_where_registers_are_shared() -> None:
    assert kernel("rows_f16_1", "gfx90a", vgprs=100, agprs=40).registers == 140
    assert kernel("rows_f16_1", "gfx908", vgprs=100, agprs=40).registers == 100


PLANTED = [
    ("dequantize", "gfx1201", {"vgpr_spills": 1}),
    ("pack", "gfx906", {"sgpr_spills": 1}),
    ("embedding", "gfx950", {"scratch": 4}),
    ("rows_f32_1", "gfx1030", {"load_16": 0}),
    ("pipelined_bf16_64", "gfx90a", {"load_16": 0}),
    ("rows_int8_1", "gfx908", {"flat": 2}),
    ("pipelined_f16_64", "gfx1201", {"flat": 1}),
    ("rows_bf16_8", "gfx1100", {"vgprs": 129}),
    ("rows_f32_8", "gfx942", {"vgprs": 100, "agprs": 29}),
    ("rows_f32_8", "gfx90a", {"occupancy": 3}),
    ("rows_f32_8", "gfx906", {"occupancy": 1}),
    ("rows_f16_4", "gfx1151", {"dot2_f16": 0}),
    ("rows_int8_8", "gfx1200", {"dot4": 0}),
    ("pipelined_f16_16", "gfx908", {"mfma": 0}),
    ("pipelined_bf16_64", "gfx950", {"mfma": 0}),
    ("pipelined_f16_64", "gfx1102", {"wmma": 0}),
    ("pipelined_bf16_16", "gfx1201", {"wmma": 0}),
    ("pipelined_f16_16", "gfx906", {"dot2_f16": 0}),
    ("pipelined_f16_64", "gfx1030", {"dot2_f16": 0}),
    ("pipelined_f16_64", "gfx942", {"loop": "s_waitcnt vmcnt(0)"}),
]


@pytest.mark.parametrize(("name", "arch", "fault"), PLANTED)
def test_planted_violation(name: str, arch: str, fault: dict[str, object]) -> None:
    assert rocm_check.violations(kernel(name, arch)) == []
    if "loop" in fault:
        fault = {"loop": dataclasses.replace(loop(32), body=(fault["loop"],))}
    (text,) = rocm_check.violations(kernel(name, arch, **fault))
    assert text.startswith(f"Q4_0 {name} {arch}: ")
    assert "got" in text


def test_every_rule_has_a_planted_violation() -> None:
    for rule in rocm_check.RULES:
        made_of = {"registers": "vgprs", "in_flight": "loop"}
        names = {rule.figure, made_of.get(rule.figure, rule.figure)}
        assert any(rule.covers(name, arch) and names & set(fault) for name, arch, fault in PLANTED)


def test_rules_are_for_the_kernels_they_name() -> None:
    assert rocm_check.violations(kernel("transposed", load_16=0, dot2_f16=0, vgprs=200)) == []
    assert rocm_check.violations(kernel("pipelined_f16_16", "gfx1100", mfma=0, dot2_f16=0)) == []
    assert rocm_check.violations(kernel("pipelined_bf16_16", "gfx906", dot2_f16=0)) == []


@pytest.mark.parametrize(
    ("waits", "fewest"),
    [
        ((), 63),
        (("s_waitcnt vmcnt(11)", "s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(9) lgkmcnt(0)"), 9),
        (("s_wait_loadcnt 0xc", "s_wait_loadcnt 0x8", "s_wait_alu depctr_va_vcc(0)"), 8),
        (("s_waitcnt lgkmcnt(0) vmcnt(2)",), 2),
    ],
)
def test_loads_in_flight(waits: tuple[str, ...], fewest: int) -> None:
    turn = dataclasses.replace(loop(32), body=("v_mov_b32 v1, v2", *waits))
    assert kernel("pipelined_f16_16", loop=turn).in_flight == fewest
    assert kernel("pipelined_f16_16").in_flight == 63


def test_a_grid_is_waited_for() -> None:
    turn = dataclasses.replace(loop(32), body=("s_waitcnt vmcnt(0)",))
    assert rocm_check.violations(kernel("pipelined_f16_16", unit="IQ3_S", loop=turn)) == []
    for unit in ("IQ4_XS", "Q4_K", "MXFP4"):
        (text,) = rocm_check.violations(kernel("pipelined_f16_16", unit=unit, loop=turn))
        assert "in_flight must be at least 1, got 0" in text


def test_idle_rules() -> None:
    rules = [Rule("rows_*", ("gfx9*",), "scratch"), Rule("pipelined_*", ("gfx12*",), "scratch")]
    kernels = [kernel("rows_f16_1", "gfx906")]
    assert rocm_check.idle_rules(kernels, ["gfx906"], rules) == []
    assert rocm_check.idle_rules(kernels, ["gfx906", "gfx1200"], rules) == [rules[1]]
    assert rocm_check.idle_rules([kernel("rows_f16_1", "gfx1200")], ["gfx906"], rules) == [rules[0]]


def test_every_default_architecture_has_a_matrix_or_dot_rule() -> None:
    """A new architecture must be put into one of the groups that the rules go by."""
    for arch in rocm_check.ARCHS:
        figures = {
            rule.figure for rule in rocm_check.RULES if rule.covers("pipelined_f16_16", arch)
        }
        assert len(figures & {"mfma", "wmma", "dot2_f16"}) == 1, arch


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("v_mfma_f32_16x16x16_f16 v[2:5], v[16:17]", "matrix"),
        ("v_wmma_f32_16x16x16_f16 v[1:8], v[22:29]", "matrix"),
        ("v_dual_mov_b32 v1, 0 :: v_dual_dot2acc_f32_f16 v7, v10, v12", "dot"),
        ("v_dot4_i32_iu8 v1, v2, v3, v1", "dot"),
        ("v_dual_mov_b32 v1, 0 :: v_dual_mov_b32 v8, v0", "vector"),
        ("v_cvt_f32_ubyte0_e32 v1, v2", "vector"),
        ("global_load_b128 v[9:12], v[2:3], off", "memory"),
        ("ds_read_b128 v[1:4], v5", "memory"),
        ("s_waitcnt vmcnt(0)", "scalar"),
        ("s_load_dwordx2 s[0:1], s[2:3], 0x0", "scalar"),
    ],
)
def test_kind(text: str, kind: str) -> None:
    assert rocm_check.kind(rocm_check.Instruction(0, text)) == kind


def test_kinds_of_a_loop_add_up_to_its_instructions() -> None:
    code = rocm_check.parse_disassembly(ROWS_GFX1100 + PIPELINED_GFX942)
    rows = rocm_check.hot_loop(code["rows_f16_1"])
    assert rows.kinds == {"matrix": 0, "dot": 1, "vector": 0, "memory": 2, "scalar": 3}
    assert sum(rows.kinds.values()) == rows.instructions
    assert rows.loaded == 16 + 8
    assert rows.body[0] == "s_clause 0x1"
    assert not any(text.startswith("s_cbranch") for text in rows.body)
    assert "body" not in rocm_check.as_json(kernel("rows_f16_1", loop=rows))["loop"]


@pytest.mark.parametrize(
    ("operation", "loaded"),
    [
        ("global_load_dwordx4", 16),
        ("global_load_b128", 16),
        ("global_load_dwordx3", 12),
        ("buffer_load_dwordx2", 8),
        ("global_load_dword", 4),
        ("flat_load_b32", 4),
        ("global_load_ushort", 2),
        ("global_load_d16_hi_b16", 2),
        ("global_load_short_d16_hi", 2),
        ("global_load_u8", 1),
        ("global_load_sbyte", 1),
        ("global_store_dwordx4", 0),
        ("ds_read_b128", 0),
        ("s_load_dwordx4", 0),
    ],
)
def test_loaded(operation: str, loaded: int) -> None:
    assert rocm_check.loaded([rocm_check.Instruction(0, f"{operation} v1, v2")] * 3) == 3 * loaded


def test_format_blocks() -> None:
    blocks = rocm_check.format_blocks()
    assert list(blocks) == rocm_check.format_names()
    assert dataclasses.astuple(blocks["Q4_0"]) == (18, 32)
    assert dataclasses.astuple(blocks["Q2_K"]) == (84, 256)
    assert dataclasses.astuple(blocks["Q6_K"]) == (210, 256)
    assert {block.elems for block in blocks.values()} >= {32, 256}


def test_budget() -> None:
    """64 lanes x 10 units x 2 a second; 40 bytes a second are 80 weights of half a byte."""
    device = rocm_check.Device("toy", "gfx0", 10, 2.0, 40.0, 256, True)
    assert rocm_check.budget(device, 0.5) == 64 * 10 * 2 / 80
    assert rocm_check.budget(device, 1.0) == 2 * rocm_check.budget(device, 0.5)


@pytest.mark.parametrize(
    ("arch", "lanes", "peak"), [("gfx942", 4.34, 1307.4e12), ("gfx1100", 9.0, 122.8e12),
                                ("gfx1151", 16.3, 59.4e12)]
)  # fmt: skip
def test_devices(arch: str, lanes: float, peak: float) -> None:
    """The budgets of q4_0, and the peak rates of float16 that the data sheets name."""
    device = rocm_check.device_of(arch)
    assert rocm_check.budget(device, 18 / 32) == pytest.approx(lanes, rel=0.005)
    products = device.matrix_products * device.units * device.clock
    assert 2 * products == pytest.approx(peak, rel=0.005)


def loop(products: int, **kinds: int) -> object:
    """A loop of so many instructions of each kind."""
    every = dict.fromkeys(rocm_check.KINDS, 0) | kinds
    counts = dict.fromkeys(rocm_check.COUNTED, 0)
    return rocm_check.Loop(sum(every.values()), products, counts, every, 0, ())


def test_weights() -> None:
    turn = loop(256, vector=10)
    assert kernel("pipelined_f16_16", loop=turn).weights == 16
    assert kernel("rows_f16_2", loop=turn).weights == 128
    assert kernel("reference_f16", loop=turn).weights is None
    assert kernel("rows_f16_1").weights is None
    # Plain multiply-adds: a part of the block, which only rows is known to take.
    assert kernel("rows_f32_8", loop=loop(0, vector=10)).weights == 32
    assert kernel("rows_f32_8", unit="Q6_K", loop=loop(0, vector=10)).weights == 64
    assert kernel("rows_f32_8", unit="common", loop=loop(0, vector=10)).weights is None
    assert kernel("pipelined_bf16_16", loop=loop(0, vector=10)).weights is None


def test_spending() -> None:
    """Of 16 weights with 16 columns: a matrix unit is busy by itself, or the vector lanes are."""
    turn = loop(256, vector=32, dot=16, matrix=2, memory=6, scalar=8)
    beside = rocm_check.spending(kernel("pipelined_f16_16", "gfx942", loop=turn))
    assert (beside.instructions, beside.vector, beside.matrix, beside.busy) == (4, 3, 1, 3)
    assert beside.budget == pytest.approx(4.34, rel=0.005)
    within = rocm_check.spending(kernel("pipelined_f16_16", "gfx1100", loop=turn))
    assert (within.instructions, within.matrix, within.busy) == (4, 4, 7)
    no_matrix = loop(256, vector=32)
    assert rocm_check.spending(kernel("pipelined_f16_16", "gfx942", loop=no_matrix)).matrix == 0
    assert rocm_check.spending(kernel("pipelined_f16_16", "gfx906", loop=turn)) is None
    assert rocm_check.spending(kernel("pipelined_f16_16", "gfx942")) is None
    assert rocm_check.spending(kernel("reference_f16", "gfx942", loop=turn)) is None


def test_exceeds() -> None:
    """The budget of q4_0 on MI300X is 4.3 a weight."""
    less = rocm_check.spending(kernel("rows_f16_1", "gfx942", loop=loop(32, vector=120)))
    assert (less.exceeds, less.surely_exceeds) == (False, False)
    some = rocm_check.spending(kernel("rows_f16_1", "gfx942", loop=loop(32, vector=120, scalar=40)))
    assert (some.exceeds, some.surely_exceeds) == (True, False)
    more = rocm_check.spending(kernel("rows_f16_1", "gfx942", loop=loop(32, vector=160)))
    assert (more.exceeds, more.surely_exceeds) == (True, True)
    # 64 columns: few instructions, but each keeps the matrix unit busy.
    matrix = rocm_check.spending(kernel("pipelined_f16_64", "gfx1100", loop=loop(1024, matrix=8)))
    assert (matrix.exceeds, matrix.surely_exceeds) == (False, True)


def test_over_budget() -> None:
    within, over = loop(32, vector=120), loop(32, vector=160)
    assert rocm_check.over_budget([kernel("rows_f16_1", "gfx942", loop=within)]) == []
    lines = rocm_check.over_budget([
        kernel("rows_f16_8", "gfx942", loop=loop(32 * 8, vector=160)),
        kernel("rows_f16_1", "gfx942", unit="Q8_0", loop=within),
        kernel("rows_f16_1", "gfx942", unit="Q4_1", loop=over),
        kernel("rows_f16_1", "gfx942", loop=over),
        kernel("rows_f16_1", "gfx906", loop=over),
        kernel("rows_f16_16", "gfx942", loop=loop(32 * 16, vector=120, scalar=40)),
        kernel("pipelined_f16_64", "gfx1100", loop=loop(1024, vector=16, matrix=8)),
    ])  # fmt: skip
    assert [line.split(None, 1)[1] for line in lines] == [
        "rows_f16_1      q4_0! 5.0/5.0 of 4.3, q4_1! 5.0/5.0 of 4.8",
        "rows_f16_8      q4_0! 5.0/5.0 of 4.3",
        "rows_f16_16     q4_0 5.0/3.8 of 4.3",
        "XTX   pipelined_f16_64 q4_0! 1.5/17.0 of 9.0",
    ]


def test_markdown() -> None:
    kernels = [
        kernel("rows_f16_1", "gfx942", loop=loop(32, vector=64, dot=16, scalar=16)),
        kernel("rows_f16_4", "gfx942", loop=loop(128, vector=120, scalar=40)),
        kernel("rows_f16_1", "gfx942", unit="Q6_K", loop=loop(64, vector=640)),
        kernel("hopper_rows_f16_32", "gfx942", loop=loop(1024, vector=64, matrix=8)),
        kernel("hopper_rows_f16_16", "gfx942"),
        kernel("rows_f16_1", "gfx1151", occupancy=16, loop=loop(32, vector=64)),
        kernel("rows_f16_1", "gfx906", loop=loop(32, vector=64)),
        kernel("reference_f16", "gfx942", loop=loop(32, vector=64)),
    ]
    mi300x, strix = rocm_check.markdown(kernels).split("\n\n")
    assert mi300x.splitlines() == [
        "| MI300X | budget | rows_f16_1 | rows_f16_4 | hopper_rows_f16_16 | hopper_rows_f16_32 |",
        "|---|---|---|---|---|---|",
        "| q4_0 | 4.3 | 3.0 (2.5) 8w | _5.0_ (3.8) 8w | - | 2.2 (2.0 + 2) 8w |",
        "| q6_k | 6.3 | **10.0** (10.0) 8w | - | - | - |",
    ]
    assert strix.splitlines()[2:] == ["| q4_0 | 16.3 | 2.0 (2.0) 16w | - | - | - |"]
    assert rocm_check.markdown([]) == ""


MCA = """\
Iterations:        100
Instructions:      9700
Total Cycles:      16501
Total uOps:        9700
"""


def test_cycles() -> None:
    assert rocm_check.parse_cycles(MCA) == 165.01
    with pytest.raises(rocm_check.CompileError, match="must state iterations"):
        rocm_check.parse_cycles(MCA.replace("Total Cycles", "Cycles"))


def test_modelled() -> None:
    class Model:
        def cycles(self, arch: str, body: list[str], directory: Path) -> float:
            assert directory.is_dir()
            if "planted" in body:
                raise rocm_check.CompileError("llvm-mca\nplanted")
            return 100 if arch == "gfx942" else 300

    turn = loop(32, vector=64)
    wmma = dataclasses.replace(turn, counts=turn.counts | {"wmma": 2})
    broken = dataclasses.replace(turn, body=("planted",))
    lines, errors = rocm_check.modelled(Model(), [
        kernel("rows_f16_1", "gfx1100", loop=turn),
        kernel("rows_f16_1", "gfx1100", unit="Q8_0", loop=broken),
        kernel("rows_f16_1", "gfx942", loop=turn),
        kernel("pipelined_f16_16", "gfx1100", loop=wmma),
        kernel("rows_f16_1", "gfx906", loop=turn),
        kernel("rows_f16_2", "gfx942", loop=turn),
        kernel("pipelined_f16_16", "gfx942"),
    ])  # fmt: skip
    assert [" ".join(line.split()) for line in lines] == [
        "pipelined_f16_16 gfx1100 q4_0 not modelled: LLVM takes v_wmma for an ordinary instruction",
        "rows_f16_1 gfx942 q4_0 400 clocks a turn, 256 of them issuing, 32 weights a lane",
        "rows_f16_1 gfx1100 q4_0 300 clocks a turn, 64 of them issuing, 32 weights a lane",
    ]
    assert errors == ["Q8_0 rows_f16_1 gfx1100: llvm-mca\nplanted"]


def test_table_has_the_figures_by_weight() -> None:
    turn = loop(128, vector=64, dot=32, memory=16, scalar=16)
    turn = dataclasses.replace(turn, loaded=48)
    quick = kernel("rows_f16_4", "gfx942", loop=turn)
    slow = kernel("rows_f16_4", "gfx942", unit="Q8_0",
                  loop=dataclasses.replace(turn, loaded=96))  # fmt: skip
    header, *lines = rocm_check.table([quick, slow], verbose=True)
    names = header.replace("a weight", "weight").replace("& column", "column").split()
    values = [dict(zip(reversed(names), reversed(line.split()), strict=False)) for line in lines]
    expected = {"loop": "128", "weight": "4.00", "column": "1.00", "vector": "2.00"}
    expected |= {"dot": "1.00", "matrix": "0.00", "memory": "0.50", "bytes": "1.50"}
    expected |= {"budget": "4.34"}
    assert expected.items() <= values[0].items()
    assert (values[1]["bytes"], values[1]["budget"]) == ("3.00", "8.19")
    # Of several formats the most that is spent and the least that there is.
    _, worst = rocm_check.table([quick, slow], verbose=False)
    assert worst.split()[-2:] == ["3.00", "4.34"]


def test_table_shows_the_worst_format() -> None:
    good = kernel("rows_f16_1", vgprs=20, occupancy=16, load_16=9)
    bad = dataclasses.replace(kernel("rows_f16_1", vgprs=99, occupancy=4, load_16=2), unit="Q6_K")
    header, line = rocm_check.table([good, bad], verbose=False)
    columns = dict(zip(header.split(), line.split(), strict=False))
    assert (columns["VGPR"], columns["waves"], columns["16-byte"]) == ("99", "4", "2")
    assert len(rocm_check.table([good, bad], verbose=True)) == 3


def test_formats_come_from_the_registry() -> None:
    names = rocm_check.format_names()
    assert {"Q4_0", "Q6_K", "Q4_0_F32"} <= set(names)
    assert "X" not in names


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        rocm_check.main(["--help"])
    assert stopped.value.code == 0
    assert "--arch" in capsys.readouterr().out


class FakeToolchain:
    """Has rows_f16_1 of any source for any architecture, without 16-byte loads for Q6_K."""

    def version(self) -> str:
        return "planted"

    def kernels(self, unit: str, arch: str, directory: Path) -> list[object]:
        if unit == "Q5_K":
            raise rocm_check.CompileError("hipcc\nerror: planted")
        return [kernel("rows_f16_1", arch, load_16=int(unit != "Q6_K"))]


@pytest.mark.parametrize(
    ("formats", "status", "words"),
    [
        (["Q4_0", "Q4_1"], 0, "2 kernels, 0 violations, 0 errors"),
        (["Q4_0", "Q6_K"], 1, "VIOLATION Q4_0 rows_f16_1 gfx906: load_16"),
        (["Q5_K"], 2, "ERROR Q5_K gfx906: hipcc\nerror: planted"),
    ],
)
def test_exit_status(monkeypatch, capsys, tmp_path, formats, status, words) -> None:
    monkeypatch.setattr(rocm_check, "Toolchain", lambda root: FakeToolchain())
    report, markdown = tmp_path / "report.json", tmp_path / "table.md"
    arguments = ["--format", *formats, "--arch", "gfx906", "--json", str(report)]
    arguments += ["--table", str(markdown), "--mca"]
    assert rocm_check.main(arguments) == status
    assert words in capsys.readouterr().out
    assert len(json.loads(report.read_text())) == len(set(formats) - {"Q5_K"})
    assert markdown.read_text() == ""  # gfx906 stands for none of the devices


def test_thin_takes_turns(monkeypatch, capsys) -> None:
    """Every format and every architecture, but not every pair."""
    monkeypatch.setattr(rocm_check, "Toolchain", lambda root: FakeToolchain())
    archs = ["gfx1100", "gfx90a"]
    assert rocm_check.main(["--thin", "--format", "Q4_1", "Q8_0", "Q4_K", "--arch", *archs]) == 0
    done = [line.split()[1:3] for line in capsys.readouterr().err.splitlines() if "[" in line]
    assert sorted(done) == [["gfx1100", "Q4_1:"], ["gfx1100", "Q4_K:"], ["gfx90a", "Q8_0:"]]
    assert rocm_check.main(["--thin", "--format", "Q4_0", "--arch", *archs]) == 0
    assert "2 kernels" in capsys.readouterr().out
    assert {"Q4_0", "common"} <= set(rocm_check.THIN_UNITS) < {*rocm_check.format_names(), "common"}


def test_tools_that_fail_are_errors_and_no_tracebacks(monkeypatch, capsys, tmp_path) -> None:
    """hipcc that is not there, a root that cannot be used, and an llvm-mca that fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HIP_ROOT", raising=False)
    assert rocm_check.main(["--format", "Q4_0", "--arch", "gfx942"]) == 2
    assert "ERROR hipcc must be on the PATH where --hip-root is not given" in (
        capsys.readouterr().out
    )
    monkeypatch.undo()
    assert rocm_check.main(["--arch", "gfx942", "--hip-root", str(tmp_path)]) == 2
    assert f"hip_run: {tmp_path} is no finished root" in capsys.readouterr().out

    class NoModel(FakeToolchain):
        def kernels(self, unit: str, arch: str, directory: Path) -> list[object]:
            return [kernel("rows_f16_1", arch, loop=loop(32, vector=64))]

        def cycles(self, arch: str, body: object, directory: Path) -> float:
            raise rocm_check.CompileError("llvm-mca\nplanted")

    monkeypatch.setattr(rocm_check, "Toolchain", lambda root: NoModel())
    assert rocm_check.main(["--format", "Q4_0", "--arch", "gfx942", "--mca"]) == 2
    assert "ERROR Q4_0 rows_f16_1 gfx942: llvm-mca\nplanted" in capsys.readouterr().out


# ---- ci/hip_run.sh -------------------------------------------------------------------------------

HIP_RUN = PATH.with_name("hip_run.sh")


@pytest.fixture(scope="module")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root like those of ci/hip_root.sh, with a shell and what it is linked against."""
    root = tmp_path_factory.mktemp("hip") / "root"
    for folder in ("dev", "home", "mnt", "proc", "tmp", "usr/bin", "usr/lib"):
        (root / folder).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    for program in ("env", "sh", "cat"):
        path = shutil.which(program)
        assert path is not None
        shutil.copy(path, root / "usr/bin" / program)
        listing = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+)", listing):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    (root / ".hip-root-ready").write_text("planted")
    options = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    mount = ["unshare", *options, "mount", "-t", "tmpfs", "none", str(root / "mnt")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no mount namespaces here")
    return root


def run_inside(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HIP_RUN), str(root), *command], capture_output=True, text=True,
                          cwd=HIP_RUN.parent, env={**os.environ, **environment})  # fmt: skip


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_hip_run_leaves_the_root_as_it_was(small_root, tmp_path) -> None:
    """Temporary directories within each other, in any order, and one with what a run left there."""
    before = names(small_root)
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, outer, inner, tmp_path):
        (folder / "note").write_text(str(folder))
        script = f"cat {folder}/note && cat {PATH} >/dev/null && echo made >{folder}/made && pwd"
        result = run_inside(small_root, "sh", "-c", script, TMPDIR=str(folder))
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{folder}{HIP_RUN.parent}\n"
        assert (folder / "made").read_text() == "made\n"
    assert run_inside(small_root, "sh", "-c", "exit 7").returncode == 7
    assert names(small_root) == before


def test_hip_run_shows_directories_in_each_other(small_root, tmp_path) -> None:
    """The temporary directory within the source tree, and one where the root has directories."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "note").write_text("found")
    left_over = small_root / "usr" / "share" / "left" / "over"
    left_over.mkdir(parents=True)
    result = run_inside(small_root, "sh", "-c", f"cat {inner}/note && echo /usr/share/*",
                        TMPDIR=str(inner), HIP_BIND=f"{tmp_path}:/usr/share")  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("found/usr/share/")
    assert str(left_over.parent.relative_to(small_root)) not in result.stdout


def test_hip_run_refuses_to_hide_the_root_s_own_files(small_root) -> None:
    result = run_inside(small_root, "env", HIP_BIND="/usr/bin")
    assert result.returncode == 125
    assert "/usr/bin cannot be seen inside: the root has files of its own there" in result.stderr


def test_a_kernel_over_the_budget_is_no_violation(monkeypatch, capsys, tmp_path) -> None:
    class Spendthrift(FakeToolchain):
        def kernels(self, unit: str, arch: str, directory: Path) -> list[object]:
            return [kernel("rows_f16_1", arch, loop=loop(32, vector=160))]

    monkeypatch.setattr(rocm_check, "Toolchain", lambda root: Spendthrift())
    markdown = tmp_path / "table.md"
    arguments = ["--format", "Q4_0", "--arch", "gfx942", "--table", str(markdown)]
    assert rocm_check.main(arguments) == 0
    out = capsys.readouterr().out
    assert "Over the budget" in out
    assert "MI300X     rows_f16_1      q4_0! 5.0/5.0 of 4.3" in out
    assert "**5.0**" in markdown.read_text()


def test_a_rule_without_kernels_is_an_error(monkeypatch, capsys) -> None:
    class OneKernel(FakeToolchain):
        def kernels(self, unit: str, arch: str, directory: Path) -> list[object]:
            return [kernel("rows_f16_1", arch)]

    monkeypatch.setattr(rocm_check, "Toolchain", lambda root: OneKernel())
    assert rocm_check.main(["--arch", "gfx942"]) == 2
    assert "ERROR no kernel is covered by Rule(kernels='pipelined_f16_*'" in capsys.readouterr().out
