"""Counting DRAM traffic: what is made of ncu's output, and what is done without ncu."""

from __future__ import annotations

import argparse
import importlib
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_q4 import formats

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
traffic: Any = importlib.import_module("traffic")

READ, WRITTEN, CACHE = traffic.METRICS

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def row(number: int, kernel: str, metric: str, value: str, unit: str = "byte") -> str:
    place = '"127.0.0.1"'
    return (
        f'"{number}","77","python3.12",{place},"{kernel}","1","7","(256, 1, 1)","(896, 1, 1)","0",'
        f'"9.0","Command line profiler metrics","{metric}","{unit}","{value}"'
    )


def rows(number: int, kernel: str, read: str, written: str, cache: str) -> list[str]:
    return [
        row(number, kernel, READ, read),
        row(number, kernel, WRITTEN, written),
        row(number, kernel, CACHE, cache),
    ]


# One call of each of two kernels, as the dequantising case has them.
DEQUANTIZE = "void dequantize<Q4_0, float>(Args)"
SAMPLE = "\n".join(
    [
        "==PROF== Connected to process 77 (/usr/bin/python3.12)",
        '==PROF== Profiling "dequantize" - 0: 0%....50%....100% - 2 passes',
        '==PROF== Profiling "gemv" - 1: 0%....50%....100% - 1 pass',
        "==PROF== Disconnected from process 77",
        HEADER,
        *rows(0, DEQUANTIZE, "33,030,144", "200,000,000", "270,000,000"),
        row(0, DEQUANTIZE, "sm__cycles_active.avg", "1,234.5", "cycle"),
        *rows(1, "gemv", "210,000,000.5", "1,024", "236,000,000"),
        "",
        "==PROF== done",
    ]
)


def test_csv_is_parsed_kernel_by_kernel() -> None:
    first, second = traffic.parse_csv(SAMPLE)
    assert first.name == "void dequantize<Q4_0, float>(Args)"  # with a comma, and quoted
    assert first.bytes == {READ: 33_030_144, WRITTEN: 200_000_000, CACHE: 270_000_000}
    assert second.name == "gemv"
    assert second.bytes == {READ: 210_000_000.5, WRITTEN: 1024, CACHE: 236_000_000}


def test_columns_may_stand_anywhere() -> None:
    lines = [
        '"ID","Metric Value","Metric Unit","Rule Name","Metric Name","Kernel Name"',
        *(f'"3","{i}","byte","","{metric}","k"' for i, metric in enumerate(traffic.METRICS)),
    ]
    (kernel,) = traffic.parse_csv("\n".join(lines))
    assert kernel.bytes == {READ: 0, WRITTEN: 1, CACHE: 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("==PROF== no kernels were profiled", "must have a table"),
        ("\n".join([HEADER, row(0, "k", READ, "33.03", "Mbyte")]), "must be byte, got 'Mbyte'"),
        ("\n".join([HEADER, row(0, "k", READ, "n/a")]), "k must be a number, got 'n/a'"),
        ("\n".join([HEADER, row(0, "k", READ, "1")]), f"k: ncu must count {WRITTEN}, {CACHE}"),
    ],
    ids=["no table", "unit", "number", "metric missing"],
)
def test_csv_that_says_too_little_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        traffic.parse_csv(text)


def test_passes() -> None:
    assert traffic.passes_of(SAMPLE) == 2
    assert traffic.passes_of('Profiling "k" - 0: Application replay pass 3\n') == 3
    assert traffic.passes_of("nothing") == 0


def kernel(name: str, read: float, written: float = 0.0) -> Any:
    return traffic.Kernel(name, {READ: read, WRITTEN: written, CACHE: 1.0})


def test_calls_are_summed_apart() -> None:
    kernels = [kernel("a", 10, 1), kernel("b", 20, 2), kernel("a", 14, 1), kernel("b", 24, 2)]
    found = traffic.sum_calls("packed", kernels, 2)
    assert found.kernels == ["a", "b"]
    assert found.bytes == {READ: 34, WRITTEN: 3, CACHE: 2}
    assert (found.least[READ], found.most[READ]) == (30, 38)
    assert found.moved == 37


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "b"], []])
def test_calls_must_launch_the_same_kernels(names: list[str]) -> None:
    with pytest.raises(ValueError, match="2 calls must launch the same kernels each"):
        traffic.sum_calls("packed", [kernel(name, 1) for name in names], 2)


def test_report() -> None:
    packed = traffic.sum_calls("packed", [kernel("m", 33e6, 1e6)], 1)
    dense = traffic.sum_calls("dequantised", [kernel("d", 33e6, 204e6), kernel("g", 231e6)], 1)
    dense.replay, dense.passes = "kernel", 2
    lines = traffic.report([packed, dense], 33_000_000).splitlines()
    assert lines[1].split() == ["packed", "33.00", "1.00", "34.00", "0.00", "1.03", "0.00", "1"]
    assert lines[2].split()[:4] == ["dequantised", "264.00", "204.00", "468.00"]
    assert lines[4] == "dequantised over packed: read 8.00, moved 13.76"
    assert "kernels were run 2 times" in lines[5]
    assert len(traffic.report([packed], 33_000_000).splitlines()) == 3


# ---- ncu, with a script in its place -------------------------------------------------------------


def fake_ncu(folder: Path, body: str) -> str:
    """A program that is called as ncu is, with its log file in $log and its mode in $mode."""
    script = folder / "ncu"
    script.write_text(
        "#!/bin/sh\nfor word; do\n  case $before in --log-file) log=$word;; --replay-mode) "
        f"mode=$word;; esac\n  before=$word\ndone\n{body}\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def options(*arguments: str) -> argparse.Namespace:
    return traffic.parse_options([*arguments])


def test_command_leaves_the_caches_alone(tmp_path: Path) -> None:
    command = traffic.ncu_command("ncu", "kernel", tmp_path / "log", ["python", "x.py"])
    for pair in (["--cache-control", "none"], ["--profile-from-start", "off"]):
        place = command.index(pair[0])
        assert command[place : place + 2] == pair
    assert command[-2:] == ["python", "x.py"]
    assert READ in command[command.index("--metrics") + 1].split(",")


def test_counting_falls_back_to_running_kernels_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = tmp_path / "sample"
    sample.write_text(SAMPLE)
    ncu = fake_ncu(
        tmp_path,
        '[ $mode = kernel ] || { echo "no such mode"; exit 9; }\n'
        f"cp {sample} $log\n"
        """echo '{"error": 0.25, "weight_bytes": 8}'""",
    )
    found, about = traffic.count(ncu, "dequantised", options("--calls", "1"))
    assert (found.replay, found.passes) == ("kernel", 2)
    assert found.bytes[READ] == 33_030_144 + 210_000_000.5
    assert about == {"error": 0.25, "weight_bytes": 8}
    assert "no such mode" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="2 calls must launch the same kernels"):
        traffic.count(ncu, "dequantised", options("--calls", "2"))


def test_counters_that_are_not_permitted(tmp_path: Path) -> None:
    ncu = fake_ncu(tmp_path, 'echo "==ERROR== ERR_NVGPUCTRPERM - no permission" > $log; exit 1')
    with pytest.raises(traffic.NotPermittedError, match="may not read the GPU's counters"):
        traffic.count(ncu, "packed", options())


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpu_machine")
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo ERR_NVGPUCTRPERM; exit 1", "may not read the GPU's counters"),
        (None, "must be on PATH or named by --ncu"),
    ],
)
def test_exit_status_2_without_a_profiler(
    body: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ncu = fake_ncu(tmp_path, body) if body else str(tmp_path / "missing")
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--ncu", ncu])
    with pytest.raises(SystemExit) as refusal:
        traffic.main()
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("gpu_machine")
def test_other_failures_exit_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--ncu", fake_ncu(tmp_path, "exit 3")])
    assert traffic.main() == 1


# ---- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["packed", "dequantised"])
def test_products_are_right(case: str) -> None:
    fmt = formats.get("q4_0")
    blocks = traffic.bench_gpu.tile("q4_0", 256)
    x = torch.randn(2, 256).half().float()
    call, tolerance = traffic.product(case, fmt, blocks, x)
    expected = x.double() @ traffic.torch_q4.dequantize(blocks, fmt).double().T
    assert (call().double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    "arguments",
    [["--rows", "0"], ["--shape", "4096"], ["--format", "q9"], ["--shape", "64x48"]],
)
def test_options_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        traffic.parse_options(arguments)
    assert refusal.value.code == 2


def test_quick_counts_one_call() -> None:
    assert options("--quick").calls == 1
    assert options("--quick", "--calls", "4").calls == 4
    assert options().shape == (14336, 4096)
