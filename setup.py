"""Builds torch_q4: hands torch's paths to CMake, which knows the sources.

Environment variables, all optional:

    MAX_JOBS             compilers that run side by side
    TORCH_Q4_GPU         off: no GPU kernels; auto, the default: by hipcc and nvcc, if present
    TORCH_Q4_ROCM_ARCH   AMD architectures, as in "gfx90a;gfx1100", or none;
                         else PYTORCH_ROCM_ARCH; else those that users have
    TORCH_Q4_CUDA_ARCH   NVIDIA architectures, as in "80;90+PTX", or none
    TORCH_Q4_HIPCC, TORCH_Q4_NVCC   the compilers, where they are not on PATH

The kernels are compiled whichever torch is installed: one wheel serves CPU, ROCm and CUDA builds.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def gpu_settings() -> dict[str, str]:
    """What CMake must know to compile the GPU kernels.

    All of it is passed each time, since CMake would remember an earlier build's.
    """
    env = os.environ
    return {
        "TORCH_Q4_GPU": env.get("TORCH_Q4_GPU") or "auto",
        "TORCH_Q4_ROCM_ARCH": env.get("TORCH_Q4_ROCM_ARCH") or env.get("PYTORCH_ROCM_ARCH", ""),
        "TORCH_Q4_CUDA_ARCH": env.get("TORCH_Q4_CUDA_ARCH", ""),
        "TORCH_Q4_HIPCC": env.get("TORCH_Q4_HIPCC", ""),
        "TORCH_Q4_NVCC": env.get("TORCH_Q4_NVCC", ""),
        "TORCH_Q4_FAST_COMPILE": env.get("TORCH_Q4_FAST_COMPILE") or "0",
        "TORCH_Q4_TORCH": "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu",
    }


class CMakeBuild(build_ext):
    """Runs CMake for ``torch_q4/_C.so`` and the code objects in ``torch_q4/kernels``."""

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
            *(f"-D{name}={value}" for name, value in gpu_settings().items()),
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", "-S", ROOT, "-B", build_dir, *configure], check=True)
        subprocess.run(["cmake", "--build", build_dir, "--parallel", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        # For in-place and editable builds. setuptools knows of the library only.
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "torch_q4" / "kernels"
        in_source = ROOT / "torch_q4" / "kernels"
        shutil.rmtree(in_source, ignore_errors=True)
        if built.is_dir():
            shutil.copytree(built, in_source)


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
