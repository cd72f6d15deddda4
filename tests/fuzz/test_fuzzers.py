"""Readers, operators and products against what a fuzzer makes up.

Each test has a short form, some seconds of the same cases every time, and a long one of other
cases, ``pytest -m fuzz``. A failure names its case, and ``tests/fuzz/harness.py`` how to run it
alone.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
from harness import Report, expect, run

ISAS = ("generic", "avx2", "avxvnni", "avx512", "amx")
LONG = [pytest.param(False, id=""), pytest.param(True, id="long", marks=pytest.mark.fuzz)]
long_too = pytest.mark.parametrize("long", LONG)


def fuzz(module: str, fuzzer: str, short: int, long: int, *, is_long: bool, **options) -> Report:
    count, start = (long, short) if is_long else (short, 0)
    return run(module, fuzzer, count, start=start, **options)


# Cases of the short and the long form, and the least share of each outcome: a fuzzer whose files
# are all refused for the same reason tries nothing.
@long_too
@pytest.mark.parametrize(
    ("reader", "short", "count", "shares"),
    [
        ("gguf", 600, 20_000, {"loaded": 0.2, "refused": 0.4}),
        ("split", 200, 3000, {"loaded": 0.25, "refused": 0.25}),
        ("imatrix_gguf", 100, 3000, {"loaded": 0.1, "refused": 0.4}),
        ("imatrix_dat", 100, 3000, {"loaded": 0.2, "refused": 0.3}),
        ("safetensors", 150, 3000, {"loaded": 0.2, "refused": 0.4}),
        ("shards", 80, 3000, {"loaded": 0.2, "refused": 0.3}),
        ("checkpoint", 100, 3000, {"loaded": 0.15, "refused": 0.4}),
        ("tune", 100, 3000, {"loaded": 0.1, "refused": 0.4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_readers(reader, short, count, shares, long) -> None:
    expect(fuzz("readers", reader, short, count, is_long=long), shares)


@long_too
def test_pretrained(long) -> None:
    pytest.importorskip("transformers")
    expect(fuzz("readers", "pretrained", 25, 3000, is_long=long), {"loaded": 0.2, "refused": 0.1})


@long_too
def test_operators(long) -> None:
    report = fuzz("operators", "tensors", 800, 20_000, is_long=long)
    expect(report, {"computed": 0.2, "refused": 0.4})


@long_too
def test_operators_without_tensors(long) -> None:
    report = fuzz("operators", "others", 150, 3000, is_long=long)
    expect(report, {"computed": 0.2, "refused": 0.2})


@functools.cache
def has(isa: str) -> bool:
    """Whether this CPU has an instruction set."""
    code = "import torch_q4; print(torch_q4.cpu_isa())"
    environment = {**os.environ, "TORCH_Q4_CPU_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert found.stdout.strip() == isa or "this CPU must have the instruction set" in found.stderr
    return found.returncode == 0


@long_too
@pytest.mark.parametrize("isa", ISAS)
def test_products(isa, long) -> None:
    if not has(isa):
        pytest.skip(f"this CPU lacks {isa}")
    # 20 000 in all on a CPU with three of them.
    report = fuzz("products", "product", 100, 7000, is_long=long,
                  environment={"TORCH_Q4_CPU_ISA": isa})  # fmt: skip
    expect(report, {"exact": 0.4, "int8": 0.2})


# ---- the harness itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fuzzer", "words"),
    [
        ("crashes", "planted 0 3: the process ended: exit status -11"),
        ("raises", "KeyError: 'planted'"),
        ("is slow", "s of the CPU's time"),
        ("is large", "AssertionError: took "),
        ("hangs", "planted 0 3: the process ended: no result within 2 s"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path, monkeypatch, fuzzer, words) -> None:
    """A planted fault at case 3 of 6; the others are tried all the same."""
    (tmp_path / "planted.py").write_text(
        "import ctypes, time\n"
        "def fuzzer(rng, folder):\n"
        "    if rng.number == 3:\n"
        f"        bad({fuzzer!r})\n"
        "    return 'right'\n"
        "def bad(kind):\n"
        "    if kind == 'crashes':\n"
        "        ctypes.string_at(0)\n"
        "    if kind == 'raises':\n"
        "        raise KeyError('planted')\n"
        "    if kind == 'is slow':\n"
        "        end = time.process_time() + 2.5\n"
        "        while time.process_time() < end:\n"
        "            pass\n"
        "    if kind == 'is large':\n"
        "        kept.append(b'x' * (400 << 20))\n"
        "    if kind == 'hangs':\n"
        "        time.sleep(100)\n"
        "kept = []\n"
        "FUZZERS = {'it': fuzzer}\n"
    )
    monkeypatch.setattr("harness.HANG_SECONDS", 2 if fuzzer == "hangs" else 60)
    report = run("planted", "it", 6, environment={"PYTHONPATH": str(tmp_path)})
    assert report.outcomes == {"right": 5}
    (failure,) = report.failures
    assert failure.startswith("planted it 0 3: ")
    assert words.replace("planted 0 3", "planted it 0 3") in failure
    with pytest.raises(AssertionError, match="planted it 0 3"):
        expect(report, {})
