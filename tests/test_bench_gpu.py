"""The GPU benchmark's pure parts: statistics, goals, tables, and what it times how often."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_q4

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
bench: Any = importlib.import_module("bench_gpu")
report: Any = importlib.import_module("gpu_report")

Cell, Decoding, Spread = report.Cell, report.Decoding, report.Spread
LINEAR, DENSE, READ = report.LINEAR, report.DENSE, report.READ


def cell(fmt: str = "q4_0", m: int = 1, shape: str = "14336x4096", **times: Any) -> Any:
    """A cell; times by contender, ``dense`` for F.linear, one number or a list."""
    n, k = (int(side) for side in shape.split("x"))
    names = {"linear": LINEAR, "dense": DENSE, "read": READ}
    found = {
        names.get(name, name): value if isinstance(value, list) else [value] * 3
        for name, value in times.items()
    }
    return Cell(fmt, "float16", n, k, m, 1000, microseconds=found)


# ---- statistics ----------------------------------------------------------------------------------


def test_spread_is_median_and_percentiles() -> None:
    assert Spread.of(float(i) for i in range(11)) == (5.0, 1.0, 9.0)
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0)
    assert Spread.of([4.0, 1.0]) == pytest.approx((2.5, 1.3, 3.7))


def test_ratio_is_taken_round_by_round() -> None:
    # Both slow down together: the ratio does not move.
    assert report.time_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == (0.5, 0.5, 0.5)
    # A contender that was timed once is compared by medians.
    assert report.time_ratio([10.0], [1.0, 2.0, 3.0]) == (5.0, 5.0, 5.0)


def test_cell_without_a_contender_has_no_ratio() -> None:
    assert cell(linear=1.0).ratio(LINEAR, READ) is None
    assert cell(linear=1.0).time(READ) is None


def test_unsteady_is_told_by_percentiles() -> None:
    assert cell(linear=[1.0, 1.0, 2.0]).unsteady(LINEAR)
    assert not cell(linear=[1.0, 1.05, 1.0]).unsteady(LINEAR)


# ---- goals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "shape", "times", "met"),
    [
        (1, "14336x4096", {"linear": 11.4, "read": 10.0}, True),
        (1, "14336x4096", {"linear": 11.6, "read": 10.0}, False),
        (1, "4096x14336", {"linear": 11.6, "read": 10.0}, False),
        (1, "4096x4096", {"linear": 12.9, "read": 10.0}, True),
        (1, "4096x4096", {"linear": 13.1, "read": 10.0}, False),
        (32, "14336x4096", {"linear": 10.0, "dense": 20.1}, True),
        (32, "14336x4096", {"linear": 10.0, "dense": 19.9}, False),
        (64, "4096x4096", {"linear": 10.0, "dense": 15.1}, True),
        (64, "4096x4096", {"linear": 10.0, "dense": 14.9}, False),
        (128, "4096x4096", {"linear": 10.0, "dense": 9.9}, False),
        (512, "4096x4096", {"linear": 10.0, "dense": 6.6}, True),
        (512, "4096x4096", {"linear": 10.0, "dense": 6.4}, False),
        (2048, "4096x4096", {"linear": 10.0, "dense": 8.9}, True),
        (2048, "4096x4096", {"linear": 10.0, "dense": 8.7}, False),
    ],
)
def test_goal(m: int, shape: str, times: dict[str, float], met: bool) -> None:
    (outcome,) = report.outcomes([cell("q4_0", m, shape, **times)])
    assert outcome.met is met


@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_few_rows_are_held_to_one_row_and_to_the_dense_product(m: int) -> None:
    one = cell(m=1, linear=10.0)
    flat, fast = report.outcomes([one, cell(m=m, linear=11.0, dense=21.0)])
    assert flat.goal.against == report.ONE_ROW
    assert flat.met
    assert not fast.met
    assert flat.ratio == pytest.approx((1.1, 1.1, 1.1))
    assert fast.figure == f"q4_0 M={m} 1.91x"
    # Of other formats only flatness is asked; without M = 1, or of another shape, nothing.
    eight_bit = cell("q8_0", m, linear=11.0, dense=11.0)
    assert len(report.outcomes([cell("q8_0", linear=10.0), eight_bit])) == 1
    assert report.outcomes([cell("q8_0", shape="4096x4096", linear=10.0), eight_bit]) == []


def test_nothing_is_asked_of_other_formats_dtypes_and_rows() -> None:
    times = {"linear": 99.0, "read": 1.0, "dense": 1.0}
    assert report.outcomes([cell("q4_1", 1, **times), cell("q4_0", 96, **times)]) == []
    assert report.outcomes([dataclasses.replace(cell(**times), dtype="float32")]) == []
    assert report.outcomes([cell("q6_k", 32, **times)]) == []


def test_wrong_product_misses_its_goals() -> None:
    wrong = dataclasses.replace(cell(dense=9.0, read=1.0), wrong={LINEAR: "relative error nan"})
    (outcome,) = report.outcomes([wrong])
    assert not outcome.met
    text = report.summary([wrong])
    assert "goals: 0 of 1 reached" in text
    assert "missed: q4_0 M=1 WRONG" in text
    assert "WRONG: 14336x4096 float16 q4_0 linear: at M=1; first: relative error nan" in text


def test_summary_says_what_is_missed_by_how_much() -> None:
    cells = [cell("q4_0", 1, linear=11.0, read=10.0), cell("q4_k", 1, linear=13.0, read=10.0)]
    lines = report.summary(cells).splitlines()
    assert lines[0] == "goals: 1 of 2 reached"
    assert lines[2] == (
        "  M=1: at most 1.15 of the read-only kernel's time: 1 of 2; missed: q4_k M=1 1.30"
    )
    assert lines[3] == "  workspace at most 256 MB: reached, 0 MB"


def test_summary_holds_the_workspace() -> None:
    big = dataclasses.replace(cell(linear=1.0), workspace_bytes=300 << 20)
    assert "MISSED, 300 MB" in report.summary([big])


def test_goal_sentences() -> None:
    sentences = [goal.sentence for goal in report.GOALS]
    assert sentences[0] == "M=1: at most 1.15 of the read-only kernel's time"
    assert sentences[2] == "M=2/4/8/16: at most 1.15 of the time at M=1"
    assert sentences[-2:] == [
        "M=512: at least 0.65x as fast as F.linear",
        "M=2048: at least 0.88x as fast as F.linear",
    ]


# ---- tables --------------------------------------------------------------------------------------


def test_tables() -> None:
    cells = [
        cell("q4_0", 1, linear=12.0, dense=42.0, read=11.0),
        cell("q4_0", 512, linear=[140.0, 100.0, 180.0], dense=92.0, read=11.0),
        dataclasses.replace(cell("q4_k", 1, dense=44.0, read=11.0), wrong={LINEAR: "relative"}),
    ]
    assert report.tables(cells) == "\n".join(
        [
            "14336x4096 float16: microseconds of linear, packed cold weights",
            "format      M=1  M=512",
            "q4_0       12.0   140~",
            "q4_k      WRONG      -",
            "F.linear   43.0   92.0",
            "",
            "speed against F.linear on the dequantised weight",
            "format    M=1  M=512",
            "q4_0     3.50   0.66",
            "q4_k    WRONG      -",
            "",
            "share of the speed of a kernel that only reads the packed weight",
            "format  read us    M=1  M=512",
            "q4_0       11.0    92%     8%",
            "q4_k       11.0  WRONG      -",
        ]
    )


def test_table_without_a_reader_has_no_share() -> None:
    assert "only reads" not in report.tables([cell(linear=1.0, dense=2.0)])


def test_kernel_table_marks_the_quickest() -> None:
    one = cell(linear=12.0, dense=42.0, rows=12.5, blas=80.0, int8=9.0)
    other = cell(m=64, linear=50.0, dense=42.0, rows=90.0, int8=95.0)
    other.wrong["blas"] = "relative error 1"
    lines = report.tables([one, other]).splitlines()
    assert lines[-5:] == [
        "format kernel    M=1   M=64",
        "q4_0 rows      *12.5  *90.0",
        "q4_0 blas       80.0  WRONG",
        "q4_0 int8        9.0   95.0",
        "q4_0 linear     12.0   50.0",
    ]
    assert report.quickest(cell(linear=1.0, dense=1.0, read=1.0)) is None


def test_decoding_table() -> None:
    done = Decoding("q4_0", "float16", 14336, 4096, 150_000_000)
    done.microseconds = {report.DEQUANTIZE: [60.0], report.COPY: [54.0]}
    wrong = Decoding("q4_k", "float16", 14336, 4096, 1, wrong={report.DEQUANTIZE: "nan"})
    assert report.decoding_table([done, wrong]).splitlines()[1:] == [
        "format     us  GB/s  of copy",
        "q4_0     60.0  2500      90%",
        "q4_k    WRONG     -        -",
    ]


def test_host_table() -> None:
    times = {DENSE: 5.0, LINEAR: 12.0}
    assert report.host_table({"inference mode": {"1": times}}).endswith("F.linear: reached")
    slow = {"grad mode": {"1": times, "16": {**times, LINEAR: 14.0}}}
    assert report.host_table(slow).endswith("missed: grad mode M=16 9.0")


def test_reference_is_for_what_it_was_measured_on() -> None:
    rows = [1, 16, 96]
    text = report.reference_table("14336x4096", "float16", "NVIDIA H100 80GB HBM3", rows)
    assert "ANOTHER run" in text
    assert text.splitlines()[1].split() == ["format", "M=1", "M=16"]
    assert text.splitlines()[2].split() == ["q4_0", "2.61", "1.02"]
    assert report.reference_table("4096x4096", "float16", "NVIDIA H100", rows) is None
    assert report.reference_table("14336x4096", "float16", "Radeon", rows) is None
    for times in (report.REFERENCE_DENSE, *report.REFERENCE.values()):
        assert len(times) == len(report.REFERENCE_ROWS)


def record_of(cells: list[Any], **changes: Any) -> dict[str, Any]:
    return {
        "device": "NVIDIA H100",
        "driver": "CUDA 13000",
        "torch": "2.11",
        "date": "2026-11-22",
        "empty_node_us": 1.0,
        "host_us": {},
        "cells": [dataclasses.asdict(one) for one in cells],
        "decodings": [],
        **changes,
    }


def test_report_from_json() -> None:
    cells = [cell(linear=11.0, read=10.0, dense=40.0), cell("q4_k", linear=9.0, dense=40.0)]
    text = report.report(json.loads(json.dumps(record_of(cells))))
    assert text.startswith("NVIDIA H100, CUDA 13000, torch 2.11, 2026-11-22")
    assert report.tables(cells) in text
    assert report.summary(cells) in text


def test_merged_keeps_the_last_measurement() -> None:
    host = {"grad mode": {"1": {DENSE: 1.0, LINEAR: 2.0}}}
    old = record_of([cell(linear=1.0), cell("q4_k", linear=2.0)], host_us=host)
    new = record_of([cell(linear=3.0)])
    both = report.merged([old, new])
    assert [one["microseconds"][LINEAR][0] for one in both["cells"]] == [3.0, 2.0]
    assert both["host_us"] == host
    with pytest.raises(SystemExit, match=r"torch: must be 2\.11 in all files, got 2\.12"):
        report.merged([old, record_of([], torch="2.12")])


# ---- what is decided without a device ------------------------------------------------------------


def test_reading_grid_covers_all() -> None:
    for variant in bench.READ_VARIANTS:
        portion = bench.BLOCK_THREADS * variant.loads
        grid = variant.grid(10 * portion + 1, multiprocessors=2)
        assert grid == (11 if variant.blocks is None else min(11, 2 * variant.blocks))
        assert variant.grid(0, multiprocessors=2) == 1


@pytest.mark.parametrize("hip", [True, False])
def test_reader_launches_on_the_current_stream(hip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = "hipModuleLaunchKernel" if hip else "cuLaunchKernel"
    launched = []

    class Driver:
        library = types.SimpleNamespace(**{launch: None})

        def load(self, image: bytes) -> int:
            assert image == b"image"
            return 3

        def function(self, module: int, name: str) -> int:
            assert module == 3
            return ["nothing", "read_2", "read_4", "read_8"].index(name) + 100

        def call(self, name: str, function: Any, *rest: Any) -> None:
            sizes, (stream, parameters, extra) = rest[:7], rest[7:]
            assert (name, extra) == (launch, None)
            args = bench.ReadArgs.from_address(parameters[0])
            launched.append(
                (function.value, [one.value for one in sizes], stream.value, args.count)
            )
            if function.value != 100:
                assert args.data == data.data_ptr()

    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    gpu = types.SimpleNamespace(device=torch.device("cpu"), multiprocessors=2)
    reader = bench.Reader(Driver(), b"image", gpu)
    data = torch.zeros(16 * 256 * 40 + 7, dtype=torch.uint8)
    reader.nothing()
    reader.read(data, bench.ReadVariant(4, None))
    reader.read(data, bench.ReadVariant(2, 4))
    assert launched == [
        (100, [1, 1, 1, 256, 1, 1, 0], 77, 0),
        (102, [10, 1, 1, 256, 1, 1, 0], 77, 256 * 40),
        (101, [8, 1, 1, 256, 1, 1, 0], 77, 256 * 40),
    ]


def test_kernels_for_a_dtype() -> None:
    names = ["rows", "tiles_16", "hopper_rows", "blas"]
    assert bench.kernels_for(names, "bfloat16") == names
    assert bench.kernels_for(names, "float32") == ["rows", "blas"]


def test_shape() -> None:
    assert bench.parse_shape("14336x4096") == (14336, 4096)
    for text in ("14336", "0x32", "ax32", "32x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be NxK, got {text}"):
            bench.parse_shape(text)


def test_options() -> None:
    options = bench.parse_options([])
    assert options.shapes == [(14336, 4096), (4096, 14336), (4096, 4096)]
    assert (options.dtypes, options.kernels, options.host) == (["float16"], [], False)
    short = bench.parse_options(["--short", "--rounds", "3"])
    assert short.shapes == [(14336, 4096)]
    assert (short.rounds, short.rows) == (3, [1, 4, 16, 64, 512])
    assert bench.parse_options([]).rounds == 15
    assert bench.parse_options(["--kernels"]).kernels == list(bench.KERNELS)
    assert bench.parse_options(["--kernels", "blas"]).kernels == ["blas"]
    assert bench.parse_options(["--shapes", "--host"]).shapes == []


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--shapes", "4096"], ["--formats", "q9"]])
def test_options_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        bench.parse_options(arguments)
    assert refusal.value.code == 2


@pytest.mark.parametrize(("hip", "name"), [(True, "hipcc"), (False, "nvcc")])
def test_compiler_is_found(
    hip: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "bin" / name
    compiler.parent.mkdir()
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ROCM_PATH" if hip else "CUDA_HOME", str(tmp_path))
    architecture = "gfx942" if hip else "sm_90"
    command = bench.compile_command(architecture, hip, tmp_path / "out")
    assert command[0] == str(compiler)
    assert any(word.endswith(f"arch={architecture}") for word in command)
    assert command[-1] == str(BENCHMARKS / "read_bytes.hip")


# ---- what is measured, with a CPU in the GPU's place ---------------------------------------------


class Rehearsal:
    """Runs everything on the CPU; a call takes as long as it says."""

    device = torch.device("cpu")
    name = "a CPU"
    cold_bytes = 1 << 16

    def __init__(self) -> None:
        self.calls = 0

    def capture(self, call: Any, count: int) -> Any:
        def run() -> None:
            for index in range(count):
                call(index)
            self.calls = count

        return run

    def times(self, runs: list[Any]) -> list[float]:
        found = []
        for run in runs:
            self.calls = 1
            run()
            found.append(400.0 * self.calls)
        return found

    def workspace(self, call: Any) -> int:
        return call().nbytes

    def synchronize(self) -> None:
        pass


def options(**changes: Any) -> argparse.Namespace:
    found = bench.parse_options([])
    vars(found).update(
        {"shapes": [(96, 256)], "formats": ["q4_k"], "rows": [1, 3], "rounds": 4, **changes}
    )
    return found


def test_measuring_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    record = record_of([])
    bench.measure_all(Rehearsal(), None, record, options(kernels=["int8", "bad"], json=file))
    assert [one["m"] for one in record["cells"]] == [1, 3]
    for one in record["cells"]:
        assert one["microseconds"] == {name: [400.0] * 4 for name in (LINEAR, DENSE, "int8")}
        assert list(one["wrong"]) == ["bad"]
        assert one["workspace_bytes"] == 2 * 96 * one["m"]
        assert one["weight_bytes"] == 96 * 144
    (decoding,) = record["decodings"]
    assert decoding["moved_bytes"] == 96 * (144 + 512)
    assert not decoding["wrong"]
    assert json.loads(file.read_text())["cells"] == record["cells"]
    assert "96x256 float16: microseconds of linear" in capsys.readouterr().out


def test_wrong_products_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_q4.linear

    def mixed_up(*args: Any, **kwargs: Any) -> torch.Tensor:
        return right(*args, **kwargs).roll(1, -1)

    monkeypatch.setattr(torch_q4, "linear", mixed_up)
    record = record_of([])
    bench.measure_all(Rehearsal(), None, record, options())
    for one in record["cells"]:
        assert list(one["microseconds"]) == [DENSE]
        assert one["wrong"][LINEAR].startswith("relative error 1.")


def test_slow_calls_are_timed_once() -> None:
    gpu = Rehearsal()
    calls: list[int] = []

    def times(runs: list[Any]) -> list[float]:
        for run in runs:
            run()
        return [6000.0] * len(runs)

    gpu.times = times  # type: ignore[method-assign]
    contenders = {"slow": bench.Contender(calls.append, 3)}
    assert bench.time_in_turn(gpu, contenders, 5) == {"slow": [6000.0]}
    assert calls == [0]


def test_shape_of_a_wrong_width_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of([])
    bench.measure_all(Rehearsal(), None, record, options(shapes=[(64, 128)], rows=[1]))
    assert record["cells"] == []
    assert "128 q4_k: not measured; K must be a multiple of 256" in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [cell(m=m, linear=[10.0 * m, 12.0 * m], dense=40.0) for m in (1, 4)]
    file = tmp_path / "out.png"
    report.plot([*cells, cell("q4_k", 1, "4096x4096", linear=5.0)], "title", file)
    assert file.read_bytes().startswith(b"\x89PNG")
