"""Compiles the GPU kernels for this CPU and runs them there, with the cases of ``run.py``.

    HIP_ROOT=build/hip-root python tests/device/emulate.py --format q4_0

Without a GPU the sources of the kernels are executed as they are: the same C++, by clang of a root
made by ``ci/hip_root.sh`` (GCC 12 lacks its vectors of float16), against ``emulator/hip`` in the
place of HIP's header. A block's threads run one after the other. What a compiler makes of the
sources for a GPU is not seen here, nor are Hopper's kernels. Exits as ``run.py`` does, with 2 where
a compilation fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import run
from cases import COMMON
from weights import ROOT, all_formats

HERE = Path(__file__).parent
EMULATOR = HERE / "emulator"
FLAGS = (
    "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-mf16c", "-mfma",
    "-fvisibility=hidden", "-D__HIPCC__", f"-I{EMULATOR}", "-include", "hip/hip_runtime.h",
)  # fmt: skip

# What HIP's compiler defines for an architecture, of what the sources ask for.
DEFINES = {
    "gfx906": ("__GFX9__", "__gfx906__"), "gfx908": ("__GFX9__", "__gfx908__"),
    "gfx942": ("__GFX9__", "__gfx942__"), "gfx950": ("__GFX9__", "__gfx950__"),
    "gfx1030": ("__GFX10__",), "gfx1100": ("__GFX11__",), "gfx1201": ("__GFX12__",),
}  # fmt: skip


def compile_driver(folder: Path) -> Path:
    """The library that stands for HIP's driver."""
    library = folder / "libamdhip64.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC",
         EMULATOR / "driver.cpp", "-o", library, "-ldl"],
        check=True,
    )  # fmt: skip
    return library


def compile_kernels(name: str, arch: str, folder: Path, root: Path) -> None:
    """The kernels of a format, or those of none, and the file that names their library."""
    library = folder / f"{name}.{arch}.so"
    source = ROOT / "kernels" / ("common.hip" if name == COMMON else "format.hip")
    clang = sorted((root / "usr/bin").glob("clang++-[0-9]*"))[-1].name
    subprocess.run(
        [ROOT / "ci" / "hip_run.sh", root, clang, *FLAGS, f"-DTORCH_Q4_FORMAT={name.upper()}",
         *(f"-D{define}" for define in DEFINES[arch]), source, "-o", library],
        check=True,
        cwd=folder,
    )  # fmt: skip
    (folder / f"{name}.{arch}.hsaco").write_text(str(library))


def main() -> int:
    names = (COMMON, *all_formats())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hip-root", type=Path, default=os.environ.get("HIP_ROOT"), metavar="DIR",
                        help="a root made by ci/hip_root.sh (default: $HIP_ROOT)")  # fmt: skip
    parser.add_argument("--format", action="append", choices=names, metavar="NAME",
                        help=f"only this one, of {', '.join(names)}; may be given again; what "
                        "else run.py takes is handed on")  # fmt: skip
    parser.add_argument("--arch", choices=DEFINES, default="gfx942", metavar="GFX",
                        help=f"the GPU that the CPU stands for, of {', '.join(DEFINES)} "
                        "(default: gfx942)")  # fmt: skip
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="compilations at a time (default: one a CPU)")  # fmt: skip
    options, rest = parser.parse_known_args()
    if options.hip_root is None:
        parser.error("--hip-root or HIP_ROOT must name a root made by ci/hip_root.sh, got neither")
    root = Path(options.hip_root).resolve()
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.format or list(names)
    try:
        driver = compile_driver(folder)
        with ThreadPoolExecutor(options.jobs) as pool:
            # A format's products use those of none, too.
            compiled = dict.fromkeys([COMMON, *wanted])
            list(pool.map(lambda name: compile_kernels(name, options.arch, folder, root), compiled))
    except (subprocess.CalledProcessError, OSError, IndexError) as error:
        print(f"emulate: {error}", file=sys.stderr)
        return 2
    chosen = [argument for name in wanted for argument in ("--format", name)]
    kernels = ["--kernels", str(folder), "--arch", options.arch]
    return run.main(["--driver", str(driver), *kernels, *chosen, *rest])


if __name__ == "__main__":
    sys.exit(main())
