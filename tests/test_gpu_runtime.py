"""The loading and launching of GPU kernels, against a stub of the driver: needs no GPU.

The stub (``gpu_runtime/stub_driver.c``) exports the driver's functions and records what arrives.
Each test gets copies of it and of the runtime, so that nothing is loaded yet.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from torch_q4 import formats

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "gpu_runtime"
BUILT_FOR_HIP = "gfx906 gfx90a gfx11-generic"
BUILT_FOR_CUDA = "sm_80 sm_90 compute_80"
F32, F16, BF16 = range(3)
NVIDIA, AMD_MATRIX, AMD_NO_MATRIX = range(3)


class LinearArgs(ctypes.Structure):
    """As in kernels/arguments.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "scales", "sums", "blocks", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "row_begin", "row_end")),
        ("packed", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Record(ctypes.Structure):
    """What the stub records and what it is told."""

    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "loads", "lookups", "launches", "loads_under_capture", "function_loads")),
        ("image", ctypes.c_char * 64),
        ("kernel", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("args", ctypes.c_ubyte * 256),
        ("args_bytes", ctypes.c_int),
        *((name, ctypes.c_int) for name in ("fail_load", "fail_lookup", "fail_launch")),
        ("architecture", ctypes.c_char * 64),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]  # fmt: skip


@dataclass
class Runtime:
    """A runtime with its stub, and the directory where they and the code objects lie."""

    library: Any
    stub: Record
    folder: Path

    def error(self, function: str, *arguments: Any) -> str:
        return getattr(self.library, function)(*arguments).decode()


def run_all(commands: list[list[Any]]) -> None:
    processes = [(command, subprocess.Popen(command)) for command in commands]
    for command, process in processes:
        assert process.wait() == 0, command


def compile_all(folder: Path) -> None:
    flags = ["-fPIC", "-O0", "-Wall", "-Wextra", "-Werror"]
    drivers = {
        "libamdhip64.so": [],
        "libcuda.so.1": ["-DSTUB_CUDA"],
        "incomplete.so": ["-DSTUB_WITHOUT_PROPERTIES"],
    }
    gpu = ROOT / "csrc/gpu"
    built = [f'-DTORCH_Q4_BUILT_FOR_{name}="{architectures}"' for name, architectures in (
        ("HIP", BUILT_FOR_HIP), ("CUDA", BUILT_FOR_CUDA))]  # fmt: skip
    objects: dict[str, list[Any]] = {
        "harness.o": [HERE / "harness.cpp"],
        "driver.o": [gpu / "driver.cpp"],
        "runtime.o": [gpu / "runtime.cpp", *built],
        "empty.o": [gpu / "runtime.cpp"],
    }
    run_all([
        *(["c++", "-std=c++17", *flags, "-c", "-o", folder / name, *source]
          for name, source in objects.items()),
        *(["cc", "-shared", "-pthread", *flags, *defines, "-o", folder / name,
           HERE / "stub_driver.c"] for name, defines in drivers.items()),
    ])  # fmt: skip
    shared = [folder / "harness.o", folder / "driver.o"]
    run_all([
        ["c++", "-shared", "-pthread", "-o", folder / f"{name}.so", *shared, folder / f"{name}.o",
         "-ldl"] for name in ("runtime", "empty")
    ])  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_all(folder)
    return folder


def lay_out(compiled: Path, folder: Path, runtime: str, driver: str) -> None:
    """A library with code objects beside it, as in the package."""
    shutil.copy(compiled / runtime, folder / "_C.so")
    shutil.copy(compiled / driver, folder / driver)
    (folder / "kernels").mkdir()
    for name in [*(fmt.name for fmt in formats.all()), "common"]:
        for suffix in ("hipfb", "fatbin"):
            (folder / "kernels" / f"{name}.{suffix}").write_bytes(f"{name} {suffix}\0".encode())


def open_runtime(folder: Path) -> Any:
    library = ctypes.CDLL(str(folder / "_C.so"))
    for name in ("name_of_kernel", "launch_linear", "find_in", "launch_in_new_thread",
                 "path_of_driver"):  # fmt: skip
        getattr(library, name).restype = ctypes.c_char_p
    library.choose.argtypes = [ctypes.c_int] * 3 + [ctypes.c_int64, ctypes.c_int]
    library.splits.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int]
    return library


@pytest.fixture
def start(compiled, tmp_path, monkeypatch):
    def start(runtime: str = "runtime.so", driver: str = "libamdhip64.so") -> Runtime:
        lay_out(compiled, tmp_path, runtime, driver)
        monkeypatch.setenv("TORCH_Q4_GPU_DRIVER", str(tmp_path / driver))
        stub = Record.in_dll(ctypes.CDLL(str(tmp_path / driver)), "stub")
        return Runtime(open_runtime(tmp_path), stub, tmp_path)

    return start


@pytest.fixture
def hip(start) -> Runtime:
    return start()


@pytest.fixture
def cuda(start) -> Runtime:
    return start(driver="libcuda.so.1")


def linear_args(**values: int) -> LinearArgs:
    given = {"x": 0x10, "scales": 0x20, "sums": 0x30, "blocks": 0x40, "bias": 0x50, "out": 0x60,
             "m": 5, "n": 1000, "k": 64, "row_begin": 0, "row_end": 1000, "packed": 1,
             "dtype": BF16}  # fmt: skip
    return LinearArgs(**{**given, **values})


# ---- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hip", "cuda"])
def test_a_launch_arrives(which, request) -> None:
    runtime = request.getfixturevalue(which)
    stub, library = runtime.stub, runtime.library
    stub.args_bytes = ctypes.sizeof(LinearArgs)
    args = linear_args()
    kernel = library.matvec_number(BF16, 2)
    assert runtime.error("launch_linear", kernel, 0, 4, ctypes.byref(args)) == ""
    suffix = b"hipfb" if which == "hip" else b"fatbin"
    assert (stub.image, stub.kernel) == (b"q4_0 " + suffix, b"matvec_bf16_4")
    assert list(stub.grid) == [63, 2, 1]  # 16 rows and 4 columns a block
    assert list(stub.block) == [256, 1, 1]
    assert (stub.shared, stub.stream) == (0, 0x1234)
    assert bytes(stub.args[: stub.args_bytes]) == bytes(args)


@pytest.mark.parametrize("empty", [{"m": 0}, {"row_end": 0}])
def test_an_empty_grid_is_no_launch(hip, empty) -> None:
    args = linear_args(**empty)
    assert hip.error("launch_linear", 0, 0, 4, ctypes.byref(args)) == ""
    assert (hip.stub.loads, hip.stub.launches) == (0, 0)


def test_kernels_are_looked_up_once(hip) -> None:
    args = linear_args()
    for _ in range(3):
        for kernel in (hip.library.matvec_number(F16, 0), hip.library.matmul_number(F16, 1)):
            assert hip.error("launch_linear", kernel, 0, 1, ctypes.byref(args)) == ""
    assert (hip.stub.loads, hip.stub.lookups, hip.stub.launches) == (1, 2, 6)
    assert hip.stub.kernel == b"matmul_f16_64"


def test_every_device_and_file_is_loaded_once_under_threads(hip) -> None:
    for device in range(3):
        assert hip.library.find_in_threads(8, device) == 8
        assert (hip.stub.loads, hip.stub.lookups) == (device + 1, 2 * (device + 1))
    assert hip.stub.loads_under_capture == 0, "a load must be allowed while a stream is captured"


def test_every_kernel_has_its_file_and_name(hip) -> None:
    """The names are those of kernels/arguments.h, written out here once more."""
    suffixes = ("f32", "f16", "bf16")
    names = ["dequantize", "embedding", "pack", "unpack", "quantize"]
    names += [f"{what}_{t}" for what in ("element", "transposed") for t in suffixes]
    names += [f"matvec_{t}_{columns}" for t in suffixes for columns in (1, 2, 4, 8)]
    names += [f"matvec_int8_{columns}" for columns in (1, 2, 4, 8)]
    names += [f"matmul_{t}_{columns}" for t in suffixes[1:] for columns in (16, 64)]
    names += ["quantize_activations", "sum_splits"]
    count = hip.library.kernel_count()
    assert [hip.error("name_of_kernel", kernel) for kernel in range(count)] == names
    for position, name in enumerate([*(fmt.name for fmt in formats.all()), "common"]):
        assert hip.error("find_in", position, 0, 0) == ""
        assert hip.stub.image == f"{name} hipfb".encode()


def test_a_thread_without_a_context_gets_one(cuda) -> None:
    """Before torch has done anything in a thread, CUDA's driver refuses to launch there."""
    args = linear_args()
    for _ in range(2):  # with the kernel still to be loaded, and with it loaded
        assert cuda.error("launch_in_new_thread", 0, ctypes.byref(args)) == ""
    assert (cuda.stub.loads, cuda.stub.launches, cuda.stub.function_loads) == (1, 2, 1)


# ---- the driver's library ------------------------------------------------------------------------


def in_new_process(folder: Path, code: str) -> str:
    """Without torch, whose GPU builds bring drivers along."""
    prologue = (
        f"import ctypes; library = ctypes.CDLL({str(folder / '_C.so')!r})\n"
        "library.path_of_driver.restype = ctypes.c_char_p\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_Q4_GPU_DRIVER"}
    command = [sys.executable, "-c", prologue + code + "\nprint(library.path_of_driver().decode())"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


@pytest.mark.parametrize("driver", ["libamdhip64.so", "libcuda.so.1"])
def test_the_loaded_driver_is_found(compiled, tmp_path, driver) -> None:
    lay_out(compiled, tmp_path, "runtime.so", driver)
    path = str(tmp_path / driver)
    assert in_new_process(tmp_path, f"ctypes.CDLL({path!r})") == path


def test_no_driver(compiled, tmp_path) -> None:
    lay_out(compiled, tmp_path, "runtime.so", "libamdhip64.so")
    assert in_new_process(tmp_path, "") == (
        "linear: libamdhip64.so (ROCm) or libcuda.so.1 (CUDA) must be loaded, which torch does "
        "when it uses a GPU, got neither"
    )


def test_a_named_driver_that_does_not_load(hip, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_Q4_GPU_DRIVER", "/nowhere/libamdhip64.so")
    assert hip.error("find_in", 0, 0, 0).startswith(
        "linear: TORCH_Q4_GPU_DRIVER must name a library that loads, got /nowhere/libamdhip64.so"
    )


def test_a_driver_that_lacks_a_function(start) -> None:
    runtime = start(driver="incomplete.so")
    path = runtime.folder / "incomplete.so"
    assert runtime.error("find_in", 0, 0, 0) == (
        f"linear: {path} must export hipGetDevicePropertiesR0600, got no such symbol"
    )


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [-1, 64])
def test_device_out_of_range(hip, device) -> None:
    assert hip.error("find_in", 0, 0, device) == f"linear: device must be in [0, 64), got {device}"


def test_the_module_does_not_load(hip) -> None:
    hip.stub.fail_load = 209
    path = hip.folder / "kernels/q4_0.hipfb"
    assert hip.error("find_in", 0, 0, 1) == (
        f"linear: the driver must load {path} on device 1, gfx90a, got ErrorNoBinaryForGpu "
        "(what it means)"
    )
    hip.stub.fail_load = 0
    assert hip.error("find_in", 0, 0, 1) == "", "a failure must not be remembered"


def test_the_function_is_missing(hip) -> None:
    hip.stub.fail_lookup = 500
    path = hip.folder / "kernels/q4_0.hipfb"
    kernel = hip.library.matmul_number(BF16, 0)
    assert hip.error("find_in", 0, kernel, 0) == (
        f"linear: {path} must hold the kernel matmul_bf16_16 for gfx90a, got ErrorNotFound "
        "(what it means)"
    )


def test_the_launch_fails(hip) -> None:
    hip.stub.fail_launch = 1
    args = linear_args()
    kernel = hip.library.matvec_number(F32, 3)
    assert hip.error("launch_linear", kernel, 2, 8, ctypes.byref(args)) == (
        "linear: the launch of q4_0's matvec_f32_8 must succeed, with a grid of 63 x 1 on device "
        "2, gfx90a, got ErrorOther (what it means)"
    )


def test_the_file_is_missing(hip) -> None:
    path = hip.folder / "kernels/q4_0.hipfb"
    path.unlink()
    assert hip.error("find_in", 0, 0, 0) == (
        f"linear: torch_q4 must have the GPU kernels {path}, got no such file; this installation "
        "is not complete"
    )


@pytest.mark.parametrize(
    ("driver", "architecture", "built", "compiler", "command"),
    [
        ("libamdhip64.so", "gfx1201", BUILT_FOR_HIP, "hipcc", "TORCH_Q4_ROCM_ARCH=gfx1201"),
        ("libcuda.so.1", "sm_75", BUILT_FOR_CUDA, "nvcc", "TORCH_Q4_CUDA_ARCH=75"),
    ],
)
def test_an_architecture_that_was_not_built(
    start, driver, architecture, built, compiler, command
) -> None:
    runtime = start(driver=driver)
    runtime.stub.architecture = architecture.encode()
    runtime.stub.major, runtime.stub.minor = 7, 5
    assert runtime.error("find_in", 0, 0, 0) == (
        "linear: the GPU must be one that the kernels were built for, "
        f"{built.replace(' ', ', ')}, got {architecture}; with {compiler} installed, run in the "
        f"source: {command} pip install --no-build-isolation ."
    )
    assert runtime.stub.loads == 0


@pytest.mark.parametrize(
    ("driver", "maker", "architecture", "compiler", "command"),
    [
        ("libamdhip64.so", "AMD", "gfx90a", "hipcc", "TORCH_Q4_ROCM_ARCH=gfx90a"),
        ("libcuda.so.1", "NVIDIA", "sm_90", "nvcc", "TORCH_Q4_CUDA_ARCH=90"),
    ],
)
def test_a_build_without_kernels(start, driver, maker, architecture, compiler, command) -> None:
    runtime = start("empty.so", driver)
    assert runtime.error("find_in", 0, 0, 0) == (
        f"linear: torch_q4 must be built with GPU kernels for {maker} to run on {architecture}, "
        f"got a build without; with {compiler} installed, run in its source: "
        f"{command} pip install --no-build-isolation ."
    )


def test_an_architecture_that_is_no_name(hip) -> None:
    hip.stub.architecture = b"unexpected"
    assert hip.error("find_in", 0, 0, 0) == (
        "linear: the architecture of device 0 must begin with gfx, got 'unexpected'"
    )


@pytest.mark.parametrize(
    ("built", "architecture", "served"),
    [
        ("gfx906 gfx90a", "gfx90a", True),
        ("gfx906 gfx90a", "gfx90", False),
        ("gfx90a:xnack-", "gfx90a", True),
        ("gfx11-generic", "gfx1103", True),
        ("gfx11-generic", "gfx1201", False),
        ("gfx9-4-generic", "gfx950", True),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("sm_90a", "sm_90", True),
        ("sm_100", "sm_103", True),
        ("sm_100", "sm_120", False),
        ("compute_80", "sm_120", True),
        ("compute_80", "sm_75", False),
        ("", "gfx906", False),
    ],
)
def test_what_serves_an_architecture(hip, built, architecture, served) -> None:
    assert hip.library.built_serves(built.encode(), architecture.encode()) == served


# ---- the choice of a kernel ----------------------------------------------------------------------

ELEMENT, MATVEC, MATVEC_INT8, MATMUL_16, MATMUL_64, BLAS = range(6)


@pytest.mark.parametrize(
    ("number", "int8", "packed", "family", "by_rows"),
    [
        (F32, 0, 1, NVIDIA, {1: MATVEC, 8: MATVEC, 9: BLAS, 10**9: BLAS}),
        (F16, 0, 0, NVIDIA, {1: MATVEC, 8: MATVEC, 9: BLAS}),
        (F16, 0, 1, NVIDIA, {1: MATMUL_16, 48: MATMUL_16, 49: MATMUL_64, 96: MATMUL_64, 97: BLAS}),
        (F16, 1, 1, NVIDIA, {1: MATMUL_16, 97: BLAS}),
        (F32, 1, 1, NVIDIA, {8: MATVEC_INT8, 9: BLAS}),
        (BF16, 1, 0, NVIDIA, {8: MATVEC_INT8, 9: BLAS}),
        (BF16, 0, 1, AMD_MATRIX, {2: MATVEC, 3: MATMUL_16, 49: MATMUL_64, 129: BLAS}),
        (F16, 1, 1, AMD_MATRIX, {2: MATVEC_INT8, 3: MATMUL_16}),
        (F32, 1, 0, AMD_MATRIX, {8: MATVEC_INT8, 9: BLAS}),
        (BF16, 0, 1, AMD_NO_MATRIX, {8: MATVEC, 9: MATMUL_16, 33: BLAS}),
        (F16, 0, 0, AMD_NO_MATRIX, {8: MATVEC, 9: BLAS}),
        (F32, 1, 0, AMD_NO_MATRIX, {1: MATVEC_INT8, 8: MATVEC_INT8, 9: BLAS}),
    ],
)
def test_choice_of_kernel(hip, number, int8, packed, family, by_rows) -> None:
    chosen = {m: hip.library.choose(number, int8, packed, m, family) for m in by_rows}
    assert chosen == by_rows


def test_splits_fill_the_device(hip) -> None:
    """About four blocks for each of 100 multiprocessors, never more splits than groups of rows."""
    splits = hip.library.splits
    assert splits(1, 4096, 4096, 100) == 25  # 16 blocks of 256 columns each
    assert splits(8, 4096, 4096, 100) == 13  # and two of four rows of grad
    assert splits(1, 17, 256, 100) == 2
    assert splits(1, 4096, 10**6, 100) == 1
    assert hip.library.multiprocessors_of(0) == 60


def test_the_arguments_mirror_the_header() -> None:
    header = (ROOT / "kernels/arguments.h").read_text()
    body = re.search(r"struct LinearArgs \{(.*?)\n\};", header, re.S)
    assert body
    code = re.sub(r"//.*", "", body.group(1))
    names = [name for line in code.split(";") for name in re.findall(r"[*\s](\w+)(?=,|\s*$)", line)]
    assert names == [field[0] for field in LinearArgs._fields_]
