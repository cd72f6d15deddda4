"""Builds torch_q4: hands torch's paths to CMake, which knows the sources."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake for the one library, ``torch_q4/_C.so``."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module, so no interpreter's suffix: torch.ops.load_library opens it.
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / "cmake"
        torch_dir = Path(torch.__file__).parent
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        configure = [
            f"-DTORCH_INCLUDE_DIR={torch_dir / 'include'}",
            f"-DTORCH_LIBRARY_DIR={torch_dir / 'lib'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", "-S", ROOT, "-B", build_dir, *configure], check=True)
        subprocess.run(["cmake", "--build", build_dir, "--parallel", jobs], check=True)


class PlainWheel(bdist_wheel):
    """Tags the wheel for every Python 3: the library uses torch's stable ABI and no Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if sys.platform != "linux":
    sys.exit(f"torch_q4 builds on Linux only, got {sys.platform}")

setup(
    ext_modules=[Extension("torch_q4._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlainWheel},
)
