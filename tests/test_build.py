"""The built library: what it needs of torch, and what the wheel is called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import torch_q4
from torch_q4 import formats

ROOT = Path(__file__).parent.parent
LIBRARY = Path(torch_q4.__file__).parent / "_C.so"


def undefined_symbols() -> list[str]:
    nm = shutil.which("nm")
    assert nm, "nm comes with the compiler"
    command = [nm, "--dynamic", "--undefined-only", "--format=just-symbols", str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_only_stable_symbols_of_torch() -> None:
    symbols = undefined_symbols()
    torch_cpp = [s for s in symbols if re.match(r"_Z.*(2at|3c10|5torch)\d", s)]
    assert torch_cpp == []
    assert any(s.startswith("aoti_torch_") for s in symbols), "the check must see torch's symbols"


def test_no_python_symbols() -> None:
    assert [s for s in undefined_symbols() if s.startswith(("Py", "_Py"))] == []


def test_needs_no_torch_library_but_libtorch() -> None:
    command = ["readelf", "--dynamic", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", text)
    assert [n for n in needed if "torch" in n or "c10" in n] == ["libtorch.so"]
    assert "RUNPATH" not in text
    assert "RPATH" not in text


@pytest.mark.parametrize(("backend", "suffix"), [("hip", "hipfb"), ("cuda", "fatbin")])
def test_code_objects_are_all_there_or_none(backend, suffix) -> None:
    """What the library says it was built for, and the files beside it."""
    table = dict(line.partition(" ")[::2] for line in torch.ops.torch_q4.gpu_table().splitlines())
    found = {path.name for path in (LIBRARY.parent / "kernels").glob(f"*.{suffix}")}
    names = [*(fmt.name for fmt in formats.all()), "common"]
    assert found == ({f"{name}.{suffix}" for name in names} if table[backend] else set())


@pytest.mark.slow
def test_wheel(tmp_path) -> None:
    """One wheel for every Python, with the library and the type marker inside, that works."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"
    # A copy without what builds made: the checkout's own build directory stays as it is.
    made = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "*.so", "*.hipfb", "*.fatbin", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=made)
    build = [*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    # GPU kernels take minutes to compile, and so does code that is to be fast.
    quick = {"TORCH_Q4_GPU": "off", "CMAKE_BUILD_TYPE": "Debug"}
    subprocess.run(build, cwd=source, check=True, env={**os.environ, **quick})
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"torch_q4-[\d.]+-py3-none-linux_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"torch_q4/_C.so", "torch_q4/py.typed", "torch_q4/integrations/__init__.py"} <= members
    code = (
        "import torch, torch_q4; print(torch_q4.__file__);"
        "print(torch_q4.dequantize(torch.zeros(2, 18, dtype=torch.uint8), 'q4_0').sum().item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=tmp_path / "site", env={"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert result.stdout.split() == [str(tmp_path / "site/torch_q4/__init__.py"), "0.0"]
