"""NVIDIA's compute-sanitizer over the kernels, without torch, which would take it minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_support import ROOT, gpu_only

import torch_q4

pytestmark = [pytest.mark.gpu, pytest.mark.slow, gpu_only]

RUN = [sys.executable, str(ROOT / "tests" / "device" / "run.py")]
# One of each kind of format, since a sanitizer makes a kernel a hundred times slower.
FORMATS = ("q4_0", "q5_1", "q3_k", "q4_k")
KERNELS = (
    ("dequantize", "embedding", "*pack", "quantize"),
    ("reference_f32", "rows_f32_1", "rows_bf16_4", "rows_int8_8"),
    ("tiles_f16_16", "tiles_bf16_64", "transposed"),
    # Where the device has them:
    ("hopper_rows_f16_8", "hopper_rows_bf16_32", "hopper_rows_f16_64"),
    ("hopper_many_f16_128", "hopper_many_bf16_256"),
)


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if found is None or torch.version.hip:
        pytest.skip("compute-sanitizer is missing")
    return found


def run(tool: str, selection: list[str]) -> subprocess.CompletedProcess[str]:
    environment = dict(
        os.environ,
        TORCH_Q4_DRIVER="libcuda.so.1",
        TORCH_Q4_KERNELS=str(Path(torch_q4.__file__).parent / "kernels"),
    )
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "99", *RUN, *selection]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", autouse=True)
def _sanitizer_works_here() -> None:
    """Under some virtual machines it refuses the device; that says nothing of the kernels."""
    result = run("memcheck", ["--format", "common", "--kernel", "sum_splits"])
    text = result.stdout + result.stderr
    if "not supported" in text.lower():
        pytest.skip("compute-sanitizer does not support this device or driver")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels[0])
def test_no_errors(tool: str, kernels: tuple[str, ...]) -> None:
    if tool == "racecheck" and kernels[0].startswith(("hopper_rows", "hopper_many")):
        pytest.skip(
            "racecheck takes a bulk copy for a write of the thread that starts it, and does not "
            "see that a barrier in shared memory counts the bytes"
        )
    selection = [f"--format={name}" for name in FORMATS]
    selection += [f"--kernel={pattern}" for pattern in kernels]
    result = run(tool, selection)
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-4000:]
    assert "0 errors" in text or "0 hazards" in text, text[-4000:]


def test_no_errors_in_common_kernels() -> None:
    for tool in ("memcheck", "racecheck", "initcheck"):
        result = run(tool, ["--format=common"])
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
