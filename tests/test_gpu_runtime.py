"""The loading and launching of GPU kernels, against a stub of the driver: needs no GPU.

The stub (``gpu_runtime/stub_driver.c``) exports the driver's functions and records what arrives.
Each test gets copies of it and of the runtime, so that nothing is loaded yet.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from torch_q4 import formats

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "gpu_runtime"
sys.path.append(str(Path(__file__).parent / "device"))
launch: Any = importlib.import_module("arguments")
BUILT_FOR_HIP = "gfx906 gfx90a gfx11-generic"
BUILT_FOR_CUDA = "sm_80 sm_90 compute_80"
BUILT_FOR_HOPPER = "sm_80 sm_90a compute_80"
SHARED_BYTES = 232448  # an H100's
F32, F16, BF16 = launch.FLOAT32, launch.FLOAT16, launch.BFLOAT16
NVIDIA, AMD_MATRIX, AMD_NO_MATRIX, HOPPER = range(4)


class Record(ctypes.Structure):
    """What the stub records and what it is told."""

    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "loads", "lookups", "launches", "loads_under_capture", "function_loads", "attributes",
            "shared_allowed")),
        ("image", ctypes.c_char * 64),
        ("kernel", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("overlaps", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("args", ctypes.c_ubyte * 256),
        ("args_bytes", ctypes.c_int),
        *((name, ctypes.c_int) for name in (
            "fail_load", "fail_lookup", "fail_launch", "fail_attribute")),
        ("architecture", ctypes.c_char * 64),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    ]  # fmt: skip


Loader = ctypes.CFUNCTYPE(None, ctypes.c_int)


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
        "old/libcuda.so.1": ["-DSTUB_CUDA", "-DSTUB_WITHOUT_ATTRIBUTES"],
        "incomplete.so": ["-DSTUB_WITHOUT_PROPERTIES"],
    }
    (folder / "old").mkdir()
    gpu = ROOT / "csrc/gpu"
    built_for_hip = f'-DTORCH_Q4_BUILT_FOR_HIP="{BUILT_FOR_HIP}"'
    built_for_cuda = f'-DTORCH_Q4_BUILT_FOR_CUDA="{BUILT_FOR_CUDA}"'
    built_for_hopper = f'-DTORCH_Q4_BUILT_FOR_CUDA="{BUILT_FOR_HOPPER}"'
    objects: dict[str, list[Any]] = {
        "harness.o": [HERE / "harness.cpp"],
        "driver.o": [gpu / "driver.cpp"],
        "plans.o": [gpu / "plans.cpp"],
        "runtime.o": [gpu / "runtime.cpp", built_for_hip, built_for_cuda],
        "hopper.o": [gpu / "runtime.cpp", built_for_hip, built_for_hopper],
        "empty.o": [gpu / "runtime.cpp"],
    }
    run_all([
        *(["c++", "-std=c++17", *flags, "-c", "-o", folder / name, *source]
          for name, source in objects.items()),
        *(["cc", "-shared", "-pthread", *flags, *defines, "-o", folder / name,
           HERE / "stub_driver.c"] for name, defines in drivers.items()),
    ])  # fmt: skip
    shared = [folder / name for name in ("harness.o", "driver.o", "plans.o")]
    run_all([
        ["c++", "-shared", "-pthread", "-o", folder / f"{name}.so", *shared, folder / f"{name}.o",
         "-ldl"] for name in ("runtime", "hopper", "empty")
    ])  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_all(folder)
    return folder


def lay_out(compiled: Path, folder: Path, runtime: str, driver: str) -> None:
    """A library with code objects beside it, as in the package."""
    shutil.copy(compiled / runtime, folder / "_C.so")
    shutil.copy(compiled / driver, folder / Path(driver).name)
    (folder / "kernels").mkdir()
    for name in [*(fmt.name for fmt in formats.all()), "common"]:
        for suffix in ("hipfb", "fatbin"):
            (folder / "kernels" / f"{name}.{suffix}").write_bytes(f"{name} {suffix}\0".encode())


def open_runtime(folder: Path) -> Any:
    library = ctypes.CDLL(str(folder / "_C.so"))
    for name in ("name_of_kernel", "launch_linear", "find_in", "launch_in_new_thread",
                 "path_of_driver", "set_plan", "plan_of", "names_of_kernels",
                 "name_of_choice", "launch_hopper_rows", "launch_hopper_many",
                 "check_runs_on"):  # fmt: skip
        getattr(library, name).restype = ctypes.c_char_p
    library.choose.argtypes = [ctypes.c_int] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    library.hopper_many_is_quicker.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
    for name in ("plan_of_hopper_rows", "plan_of_hopper_many"):
        getattr(library, name).argtypes = (
            [ctypes.c_int64] * 3 + [ctypes.c_int] * 4 + [ctypes.POINTER(ctypes.c_int64)]
        )
    weight = [ctypes.c_int64, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.set_plan.argtypes = [*weight, ctypes.c_char_p]
    library.plan_of.argtypes = weight
    library.planned.argtypes = [*[ctypes.c_int] * 5, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.set_loader.argtypes = [Loader]
    library.splits.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int]
    library.splits_of_pipelined.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
    return library


@pytest.fixture
def start(compiled, tmp_path, monkeypatch):
    def start(runtime: str = "runtime.so", driver: str = "libamdhip64.so") -> Runtime:
        lay_out(compiled, tmp_path, runtime, driver)
        path = str(tmp_path / Path(driver).name)
        monkeypatch.setenv("TORCH_Q4_GPU_DRIVER", path)
        stub = Record.in_dll(ctypes.CDLL(path), "stub")
        return Runtime(open_runtime(tmp_path), stub, tmp_path)

    return start


@pytest.fixture
def hip(start) -> Runtime:
    return start()


@pytest.fixture
def cuda(start) -> Runtime:
    return start(driver="libcuda.so.1")


@pytest.fixture
def hopper(start) -> Runtime:
    """CUDA's driver, an sm_90, and a build that has code for sm_90a."""
    return start("hopper.so", "libcuda.so.1")


def linear_args(**values: int) -> Any:
    given = {"x": 0x10, "scales": 0x20, "sums": 0x30, "blocks": 0x40, "bias": 0x50, "out": 0x60,
             "m": 5, "n": 1000, "k": 64, "row_begin": 0, "row_end": 1000, "packed": 1,
             "dtype": BF16}  # fmt: skip
    return launch.LinearArgs(**{**given, **values})


# ---- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hip", "cuda"])
def test_a_launch_arrives(which, request) -> None:
    runtime = request.getfixturevalue(which)
    stub, library = runtime.stub, runtime.library
    stub.args_bytes = ctypes.sizeof(launch.LinearArgs)
    args = linear_args()
    kernel = library.rows_number(BF16, 2)
    assert runtime.error("launch_linear", kernel, 0, 4, ctypes.byref(args)) == ""
    suffix = b"hipfb" if which == "hip" else b"fatbin"
    assert (stub.image, stub.kernel) == (b"q4_0 " + suffix, b"rows_bf16_4")
    assert list(stub.grid) == [63, 2, 1]  # 16 rows and 4 columns a block
    assert list(stub.block) == [256, 1, 1]
    assert (stub.shared, stub.stream) == (0, 0x1234)
    assert bytes(stub.args[: stub.args_bytes]) == bytes(args)


def test_a_hopper_rows_launch_arrives(hopper) -> None:
    """With its own threads and shared memory, which each function is allowed once."""
    stub, library = hopper.stub, hopper.library
    stub.args_bytes = ctypes.sizeof(launch.HopperRowsArgs)
    assert library.shared_bytes_of(0) == SHARED_BYTES
    args = launch.HopperRowsArgs(linear_args(m=9, row_end=992), 0x70, groups=3, stages=4, splits=2)
    for width, columns in enumerate((8, 16, 32, 64, 128)):
        for _ in range(3):
            assert hopper.error("launch_hopper_rows", width, 0, ctypes.byref(args)) == ""
            assert stub.kernel == f"hopper_rows_bf16_{columns}".encode()
            assert list(stub.grid) == [21 * 2, -(-9 // columns), 1]
            assert list(stub.block) == [library.threads_of_hopper_rows(width), 1, 1]
            assert stub.shared == library.bytes_of_hopper_rows(width, ctypes.byref(args)) > 0
            assert bytes(stub.args[: stub.args_bytes]) == bytes(args)
        assert (stub.attributes, stub.shared_allowed) == (width + 1, SHARED_BYTES)
    assert hopper.error("launch_linear", 0, 0, 1, ctypes.byref(linear_args())) == ""
    assert (stub.attributes, stub.shared) == (5, 0), "no other kernel needs to be allowed any"
    assert (stub.launches, stub.lookups) == (16, 6)


@pytest.mark.parametrize("driver", ["libcuda.so.1", "old/libcuda.so.1"])
def test_a_hopper_many_launch_arrives(start, driver) -> None:
    """It may begin before the kernel before it has ended, where the driver knows of that."""
    hopper = start("hopper.so", driver)
    stub, library = hopper.stub, hopper.library
    stub.args_bytes = ctypes.sizeof(launch.HopperManyArgs)
    args = launch.HopperManyArgs(linear_args(m=300, row_end=992), 0x70, 0x80, 4, 3, 2)
    for width, (columns, blocks) in enumerate(((128, 3), (256, 2))):
        assert hopper.error("launch_hopper_many", width, 0, ctypes.byref(args)) == ""
        assert stub.kernel == f"hopper_many_bf16_{columns}".encode()
        assert list(stub.grid) == [2 * 4 * blocks * 2, 1, 1]  # 4 pairs of 128 rows, 2 splits
        assert list(stub.block) == [384, 1, 1]
        assert stub.shared == library.bytes_of_hopper_many(width, ctypes.byref(args)) > 0
        assert stub.stream == 0x1234
        assert bytes(stub.args[: stub.args_bytes]) == bytes(args)
        assert stub.overlaps == (driver == "libcuda.so.1")
        assert (stub.attributes, stub.shared_allowed) == (width + 1, SHARED_BYTES)
    assert hopper.error("launch_linear", 0, 0, 1, ctypes.byref(linear_args())) == ""
    assert not stub.overlaps


def test_an_overlapping_launch_in_a_new_thread(hopper) -> None:
    """A thread without a context gets one here, too."""
    args = launch.HopperManyArgs(linear_args(m=300, row_end=992), 0x70, 0x80, 4, 3, 2)
    errors: list[str] = []
    for _ in range(2):  # with the kernel still to be loaded, and with it loaded
        thread = threading.Thread(
            target=lambda: errors.append(
                hopper.error("launch_hopper_many", 0, 0, ctypes.byref(args))
            )
        )
        thread.start()
        thread.join()
    assert errors == ["", ""]
    assert (hopper.stub.loads, hopper.stub.launches) == (1, 2)


def test_shared_memory_that_is_not_allowed(hopper) -> None:
    hopper.stub.fail_attribute = 1
    kernel = hopper.library.hopper_rows_number(F16, 3)
    assert hopper.error("find_in", 0, kernel, 0) == (
        f"linear: hopper_rows_f16_64 must be allowed {SHARED_BYTES} bytes of shared memory on "
        "sm_90, got ErrorOther (what it means)"
    )
    hopper.stub.fail_attribute = 0
    assert hopper.error("find_in", 0, kernel, 0) == "", "a failure must not be remembered"


@pytest.mark.parametrize("empty", [{"m": 0}, {"row_end": 0}])
def test_an_empty_grid_is_no_launch(hip, empty) -> None:
    args = linear_args(**empty)
    assert hip.error("launch_linear", 0, 0, 4, ctypes.byref(args)) == ""
    assert (hip.stub.loads, hip.stub.launches) == (0, 0)


def test_kernels_are_looked_up_once(hip) -> None:
    args = linear_args()
    for _ in range(3):
        for kernel in (hip.library.rows_number(F16, 0), hip.library.tiles_number(F16, 1)):
            assert hip.error("launch_linear", kernel, 0, 1, ctypes.byref(args)) == ""
    assert (hip.stub.loads, hip.stub.lookups, hip.stub.launches) == (1, 2, 6)
    assert hip.stub.kernel == b"tiles_f16_64"


def test_every_device_and_file_is_loaded_once_under_threads(hip) -> None:
    for device in range(3):
        assert hip.library.find_in_threads(8, device) == 8
        assert (hip.stub.loads, hip.stub.lookups) == (device + 1, 2 * (device + 1))
    assert hip.stub.loads_under_capture == 0, "a load must be allowed while a stream is captured"


def test_every_kernel_has_its_file_and_name(hip) -> None:
    """The names are those of kernels/arguments.h, written out here once more."""
    suffixes = ("f32", "f16", "bf16")
    names = ["dequantize", "embedding", "pack", "unpack", "quantize", "transposed"]
    names += [f"reference_{t}" for t in suffixes]
    names += [f"rows_{t}_{columns}" for t in suffixes for columns in (1, 2, 4, 8)]
    names += [f"rows_int8_{columns}" for columns in (1, 2, 4, 8)]
    names += [f"tiles_{t}_{columns}" for t in suffixes[1:] for columns in (16, 64)]
    names += [f"pipelined_{t}_{columns}" for t in suffixes[1:] for columns in (16, 64, 128)]
    names += [
        f"hopper_rows_{t}_{columns}" for t in suffixes[1:] for columns in (8, 16, 32, 64, 128)
    ]
    names += [f"hopper_many_{t}_{columns}" for t in suffixes[1:] for columns in (128, 256)]
    names += ["quantize_activations", "sum_splits", "arrange_lanes", "arrange"]
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
    kernel = hip.library.tiles_number(BF16, 0)
    assert hip.error("find_in", 0, kernel, 0) == (
        f"linear: {path} must hold the kernel tiles_bf16_16 for gfx90a, got ErrorNotFound "
        "(what it means)"
    )


def test_the_launch_fails(hip) -> None:
    hip.stub.fail_launch = 1
    args = linear_args()
    kernel = hip.library.rows_number(F32, 3)
    assert hip.error("launch_linear", kernel, 2, 8, ctypes.byref(args)) == (
        "linear: the launch of q4_0's rows_f32_8 must succeed, with a grid of 63 x 1 on device "
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
        ("libcuda.so.1", "NVIDIA", "sm_90", "nvcc", "TORCH_Q4_CUDA_ARCH=90a"),
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
        ("sm_90a", "sm_100", False),
        ("compute_90a", "sm_90", True),
        ("compute_90a", "sm_100", False),
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

(
    REFERENCE, ROWS, ROWS_INT8, TILES_16, TILES_64, PIPELINED_16, PIPELINED_64, PIPELINED_128,
    HOPPER_ROWS, HOPPER_MANY, BLAS,
) = range(11)  # fmt: skip


@pytest.mark.parametrize(
    ("number", "int8", "packed", "family", "by_rows"),
    [
        (F32, 0, 1, NVIDIA, {1: ROWS, 8: ROWS, 9: BLAS, 10**9: BLAS}),
        (F16, 0, 0, NVIDIA, {1: ROWS, 8: ROWS, 9: BLAS}),
        (F16, 0, 1, NVIDIA, {1: TILES_16, 48: TILES_16, 49: TILES_64, 96: TILES_64, 97: BLAS}),
        (F16, 1, 1, NVIDIA, {1: TILES_16, 97: BLAS}),
        (F32, 1, 1, NVIDIA, {8: ROWS_INT8, 9: BLAS}),
        (BF16, 1, 0, NVIDIA, {8: ROWS_INT8, 9: BLAS}),
        (
            BF16,
            0,
            1,
            AMD_MATRIX,
            {2: ROWS, 3: PIPELINED_16, 17: PIPELINED_64, 65: PIPELINED_128, 257: BLAS},
        ),
        (F16, 1, 1, AMD_MATRIX, {2: ROWS_INT8, 3: PIPELINED_16}),
        (F32, 1, 0, AMD_MATRIX, {8: ROWS_INT8, 9: BLAS}),
        (BF16, 0, 1, AMD_NO_MATRIX, {8: ROWS, 9: PIPELINED_16, 33: BLAS}),
        (F16, 0, 0, AMD_NO_MATRIX, {8: ROWS, 9: BLAS}),
        (F32, 1, 0, AMD_NO_MATRIX, {1: ROWS_INT8, 8: ROWS_INT8, 9: BLAS}),
    ],
)
def test_choice_of_kernel(hip, number, int8, packed, family, by_rows) -> None:
    chosen = {m: hip.library.choose(number, int8, packed, m, 4096, family) for m in by_rows}
    assert chosen == by_rows


@pytest.mark.parametrize(
    ("number", "int8", "packed", "n", "by_rows"),
    [
        (
            F16,
            0,
            1,
            4096,
            {1: TILES_16, 16: TILES_16, 17: HOPPER_ROWS, 256: HOPPER_ROWS, 512: HOPPER_MANY},
        ),
        (
            F16,
            0,
            1,
            8192,
            {1: TILES_16, 4: TILES_16, 5: HOPPER_ROWS, 64: HOPPER_ROWS, 65: HOPPER_MANY},
        ),
        (
            BF16,
            1,
            1,
            14336,
            {1: HOPPER_ROWS, 16: HOPPER_ROWS, 64: HOPPER_ROWS, 65: HOPPER_MANY, 2048: HOPPER_MANY},
        ),
        (F16, 0, 1, 4096, {257: BLAS, 384: HOPPER_MANY, 1024: HOPPER_MANY}),
        (F16, 0, 1, 1024, {256: HOPPER_ROWS, 257: BLAS, 512: BLAS, 2048: BLAS}),
        (F16, 0, 1, 5120, {5: HOPPER_ROWS, 128: HOPPER_ROWS, 129: HOPPER_MANY}),
        (BF16, 0, 1, 14336, {2048: HOPPER_MANY, 2049: BLAS, 16384: BLAS}),
        (F16, 0, 0, 14336, {1: ROWS, 8: ROWS, 9: BLAS}),
        (BF16, 1, 0, 4096, {8: ROWS_INT8, 9: BLAS}),
        (F32, 0, 1, 14336, {1: ROWS, 8: ROWS, 9: BLAS}),
    ],
)
def test_choice_of_kernel_on_hopper(hip, number, int8, packed, n, by_rows) -> None:
    chosen = {m: hip.library.choose(number, int8, packed, m, n, HOPPER) for m in by_rows}
    assert chosen == by_rows


@pytest.mark.parametrize(
    ("runtime", "capability", "family"),
    [
        ("hopper.so", (9, 0), HOPPER),
        ("hopper.so", (8, 0), NVIDIA),
        ("hopper.so", (10, 0), NVIDIA),
        ("runtime.so", (9, 0), NVIDIA),  # has code for sm_90, in which those kernels are not
        ("empty.so", (9, 0), NVIDIA),
    ],
)
def test_hopper_is_a_family_of_its_own_where_the_build_has_code_for_it(
    start, runtime, capability, family
) -> None:
    cuda = start(runtime, "libcuda.so.1")
    cuda.stub.major, cuda.stub.minor = capability
    assert cuda.library.family_of(0) == family


def test_kernels_for_hopper_only(start) -> None:
    runtime = start("runtime.so", "libcuda.so.1")
    words = "the GPU must be sm_90, with kernels built for sm_90a, for hopper_rows, got"
    missing = f"{words} sm_90 with kernels for {BUILT_FOR_CUDA}"
    assert runtime.error("check_runs_on", b"hopper_rows", 0) == f"linear: {missing}"
    assert runtime.error("check_runs_on", b"tiles_16", 0) == ""
    assert set_plan(runtime, "8 hopper_rows") == f"set: {missing}"
    words_amd = "the GPU must be AMD's for pipelined_16, got sm_90"
    assert runtime.error("check_runs_on", b"pipelined_16", 0) == f"linear: {words_amd}"
    runtime.stub.major = 8
    assert set_plan(runtime, "8 hopper_rows", device=1) == f"set: {words} sm_80"
    assert plan_of(runtime) == plan_of(runtime, device=1) == ""


def test_kernels_for_hopper_only_on_hopper(hopper) -> None:
    assert hopper.error("check_runs_on", b"hopper_rows", 0) == ""
    assert set_plan(hopper, "8 hopper_rows") == ""
    assert planned(hopper, 8) == "hopper_rows"


# ---- plans, which stand above the table ----------------------------------------------------------


def set_plan(runtime: Runtime, plan: str, **weight: int) -> str:
    device, fmt, dtype, packed, n = weight_of(weight)
    return runtime.error("set_plan", device, fmt, dtype, packed, n, plan.encode())


def plan_of(runtime: Runtime, **weight: int) -> str:
    return runtime.error("plan_of", *weight_of(weight))


def weight_of(given: dict[str, int]) -> tuple[int, ...]:
    full = {"device": 0, "format": 3, "dtype": F16, "packed": 1, "n": 4096, **given}
    assert len(full) == 5, given
    return tuple(full.values())


def planned(runtime: Runtime, m: int, **weight: int) -> str:
    """The name of the kernel that a product gets."""
    device, fmt, dtype, packed, n = weight_of(weight)
    kernel = runtime.library.planned(device, fmt, dtype, 0, packed, m, n, NVIDIA)
    return runtime.error("name_of_choice", kernel)


def by_table(runtime: Runtime, m: int, dtype: int = F16, packed: int = 1) -> str:
    kernel = runtime.library.choose(dtype, 0, packed, m, 4096, NVIDIA)
    return runtime.error("name_of_choice", kernel)


def test_a_plan_decides_up_to_its_last_step(hip) -> None:
    rows = (1, 2, 3, 100, 101)
    table = {m: by_table(hip, m) for m in rows}
    assert {m: planned(hip, m) for m in rows} == table
    assert "reference" not in table.values()
    assert set_plan(hip, "2 reference\n100 rows\n") == ""
    assert {m: planned(hip, m) for m in rows} == {
        1: "reference", 2: "reference", 3: "rows", 100: "rows", 101: table[101]}  # fmt: skip
    assert plan_of(hip) == "2 reference\n100 rows\n"
    assert set_plan(hip, "7 reference") == ""
    assert [planned(hip, m) for m in (7, 8)] == ["reference", by_table(hip, 8)]
    assert set_plan(hip, "") == ""
    assert plan_of(hip) == ""
    assert {m: planned(hip, m) for m in rows} == table
    assert set_plan(hip, "") == "", "what is not there can be removed"


def test_a_plan_is_of_one_weight_dtype_layout_and_device(hip) -> None:
    assert set_plan(hip, "8 reference") == ""
    assert planned(hip, 4) == "reference"
    for other in ({"device": 1}, {"format": 2}, {"dtype": BF16}, {"packed": 0}, {"n": 4095}):
        assert planned(hip, 4, **other) != "reference"
        assert plan_of(hip, **other) == ""


def test_int8_has_the_table(hip) -> None:
    assert set_plan(hip, "8 reference", dtype=F32) == ""
    weight = (0, 3, F32)
    of_plan, of_table = (hip.library.planned(*weight, int8, 1, 4, 4096, NVIDIA) for int8 in (0, 1))
    assert (of_plan, of_table) == (REFERENCE, hip.library.choose(F32, 1, 1, 4, 4096, NVIDIA))


def test_many_plans_are_found(hip) -> None:
    sizes = [(7919 * i) % 1009 + 1 for i in range(100)]
    for i, n in enumerate(sizes):
        assert set_plan(hip, f"{i + 1} reference", n=n, format=i % 3) == ""
    for i, n in enumerate(sizes):
        assert plan_of(hip, n=n, format=i % 3) == f"{i + 1} reference\n"
        assert plan_of(hip, n=n, format=3) == ""
        assert planned(hip, i + 1, n=n, format=i % 3) == "reference"


@pytest.mark.parametrize(
    ("plan", "weight", "words"),
    [
        ("8 fast", {}, r"kernel must be one of reference, rows, .*, got fast"),
        ("8 pipelined_16", {"packed": 0}, "packed must be true for pipelined_16, got false"),
        ("8 pipelined_64", {"dtype": F32},
         "dtype must be float16 or bfloat16 for pipelined_64, got float32"),
        ("8 tiles_16", {}, "the GPU must be NVIDIA's for tiles_16, got gfx90a"),
        ("8 rows\n8 blas", {}, "rows of plan must rise, got 8 after 8"),
        ("0 rows", {}, "rows of plan must rise, got 0 after 0"),
        ("rows 8", {}, "a line of plan must be MOST_ROWS KERNEL, got rows 8"),
        ("8 rows blas", {}, "a line of plan must be MOST_ROWS KERNEL, got 8 rows blas"),
        ("99999999999999999999 blas", {},
         "a line of plan must be MOST_ROWS KERNEL, got 99999999999999999999 blas"),
        ("8 rows", {"n": 0}, "n and k must be at least 1, got 0, 4096"),
        ("8 rows", {"device": 64}, r"device must be in \[0, 64\), got 64"),
        ("8 rows", {"device": -1}, r"device must be in \[0, 64\), got -1"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be(hip, plan, weight, words) -> None:
    on_device = "device" not in weight
    if on_device and "n" not in weight:
        assert set_plan(hip, "5 reference", **weight) == ""
    before = plan_of(hip, **weight)
    assert re.fullmatch(f"set: {words}", set_plan(hip, plan, **weight))
    assert plan_of(hip, **weight) == before, "what is refused changes nothing"


@pytest.mark.parametrize(
    ("which", "family"), [("hip", AMD_MATRIX), ("cuda", NVIDIA), ("hopper", HOPPER)]
)
def test_every_kernel_that_suits_can_be_planned(which, family, request) -> None:
    runtime = request.getfixturevalue(which)

    def names(dtype: int, packed: int, family: int = family) -> set[str]:
        return set(runtime.error("names_of_kernels", dtype, packed, family).split())

    everything = names(F16, 1, -1)
    assert everything == names(BF16, 1, -1) == names(F16, 1, HOPPER) | names(F16, 1, AMD_MATRIX)
    for name in ("hopper_rows", "hopper_many"):
        assert (name in names(F16, 1)) == (family == HOPPER)
    own = "pipelined_16" if family == AMD_MATRIX else "tiles_16"
    assert everything >= {"reference", "rows", "tiles_16", "tiles_64", "pipelined_128", "blas"}
    for dtype, packed in ((F16, 1), (F32, 1), (F16, 0), (F32, 0)):
        suiting = names(dtype, packed)
        assert suiting >= {"reference", "rows", "blas"}
        assert (own in suiting) == ((dtype, packed) == (F16, 1))
        assert not {"pipelined_16", "tiles_16"} - {own} <= suiting
        for name in everything:
            error = set_plan(runtime, f"1 {name}", dtype=dtype, packed=packed)
            assert (error == "") == (name in suiting)
            if name in suiting:
                assert planned(runtime, 1, dtype=dtype, packed=packed) == name


def test_saved_plans_are_loaded_once_at_the_first_product(hip) -> None:
    asked: list[int] = []
    table = by_table(hip, 4)

    def load(device: int) -> None:
        asked.append(device)
        meanwhile.append(planned(hip, 4, device=device))
        set_plan(hip, "8 reference", device=device)
        set_plan(hip, "8 reference", device=device, n=64)

    meanwhile: list[str] = []
    loader = Loader(load)
    assert planned(hip, 4, device=2) == table, "nobody to ask yet, which must not be remembered"
    hip.library.set_loader(loader)
    assert not asked
    assert [planned(hip, 4, device=2) for _ in range(3)] == ["reference"] * 3
    assert (asked, meanwhile) == ([2], [table])
    # A plan that is set first does not keep the saved ones away, and stands above them.
    assert set_plan(hip, "8 blas") == ""
    assert asked == [2, 0]
    assert (planned(hip, 4), planned(hip, 4, n=64)) == ("blas", "reference")
    assert plan_of(hip, device=1) == "8 reference\n"
    assert asked == [2, 0, 1]


def test_a_loader_that_brings_nothing_is_not_asked_again(hip) -> None:
    asked: list[int] = []
    loader = Loader(asked.append)
    hip.library.set_loader(loader)
    assert [planned(hip, 4) for _ in range(3)] == [by_table(hip, 4)] * 3
    assert asked == [0]


def test_plans_can_be_set_while_others_read_them(hip) -> None:
    assert hip.library.choose_while_setting(3) == 0


# ---- sizes ---------------------------------------------------------------------------------------


def test_splits_fill_the_device(hip) -> None:
    """About four blocks for each of 100 multiprocessors, never more splits than groups of rows."""
    splits = hip.library.splits
    assert splits(1, 4096, 4096, 100) == 25  # 16 blocks of 256 columns each
    assert splits(8, 4096, 4096, 100) == 13  # and two of four rows of grad
    assert splits(1, 17, 256, 100) == 2
    assert splits(1, 4096, 10**6, 100) == 1
    assert hip.library.multiprocessors_of(0) == 60


@dataclass
class HopperRowsPlan:
    columns: int
    groups: int
    stages: int
    splits: int
    shared_bytes: int
    blocks: int  # of all rows of W and splits
    x_row_blocks: int


def hopper_rows_plan(
    runtime: Runtime,
    m: int,
    n: int,
    k: int,
    fmt: formats.Format,
    multiprocessors: int = 132,
    shared_bytes: int = SHARED_BYTES,
) -> HopperRowsPlan:
    found = (ctypes.c_int64 * 7)()
    runtime.library.plan_of_hopper_rows(
        m, n, k, fmt.block_elems, fmt.block_bytes, multiprocessors, shared_bytes, found
    )
    return HopperRowsPlan(*found)


def test_pipelined_splits(hip) -> None:
    """The device is filled, and no block has less of K than its waves can share out."""
    splits = hip.library.splits_of_pipelined
    assert splits(16, 14336, 4096, 16, 304) == 2, "448 blocks for 304 multiprocessors"
    assert splits(16, 4096, 4096, 16, 304) == 7, "128 blocks"
    assert splits(16, 1024, 4096, 16, 304) == 8, "32 blocks, and 512 of K each"
    assert splits(128, 4096, 14336, 128, 304) == 14
    assert splits(64, 1024, 14336, 64, 304) == 16, "no more than 16"
    assert splits(256, 14336, 4096, 128, 96) == 1, "448 blocks for 96"
    assert splits(16, 4096, 256, 16, 304) == splits(16, 5, 4096, 16, 304) == 1
    for m in (1, 17, 128, 1000):
        for n in (5, 16, 1000, 128256):
            for k in (32, 1000, 4096, 14336):
                for x_rows in (16, 64, 128):
                    for multiprocessors in (1, 48, 304):
                        found = splits(m, n, k, x_rows, multiprocessors)
                        what = (m, n, k, x_rows, multiprocessors, found)
                        assert 1 <= found <= 16, what
                        assert found == 1 or k // found >= 512, what
                        rows = 64 if x_rows > 16 else 32
                        blocks = -(-(n // 16 * 16) // rows) * -(-m // x_rows)
                        assert found == 1 or blocks * found <= 3 * multiprocessors, what


@pytest.mark.parametrize("shared_bytes", [SHARED_BYTES, 101376])
def test_every_hopper_rows_plan_fits(hip, fmt, shared_bytes) -> None:
    for m in (1, 8, 9, 33, 64, 65, 128, 129, 1000, 100_000):
        for n in (5, 16, 100, 4096, 11008, 128256):
            for k in (fmt.block_elems, 768, 4352, 14336):
                for multiprocessors in (1, 114, 132):
                    plan = hopper_rows_plan(hip, m, n, k, fmt, multiprocessors, shared_bytes)
                    units = -(-k // 256)
                    what = (m, n, k, multiprocessors, plan)
                    assert plan.shared_bytes <= shared_bytes, what
                    assert 1 <= plan.groups <= 8, what
                    assert 2 <= plan.stages <= 4, what
                    assert plan.splits == 1 or 2 * plan.splits <= units, what
                    assert plan.columns * plan.x_row_blocks >= m, what
                    # More than a wave only where the largest blocks are too many as well.
                    if plan.blocks * plan.x_row_blocks > multiprocessors:
                        assert (plan.groups, plan.splits) == (8, 1), what


def test_hopper_rows_plans(hip) -> None:
    def plan(m: int, n: int, k: int, fmt: str = "q4_0", **device: int) -> tuple[int, ...]:
        found = hopper_rows_plan(hip, m, n, k, formats.get(fmt), **device)
        return found.columns, found.groups, found.splits, found.blocks

    assert plan(1, 14336, 4096) == (8, 7, 1, 128)
    assert plan(64, 14336, 4096) == (64, 7, 1, 128)
    assert plan(9, 4096, 4096) == (16, 8, 4, 128)
    assert plan(1, 4096, 14336) == (8, 8, 4, 128)
    assert plan(1, 128256, 4096) == (8, 8, 1, 1002), "more than one wave"
    assert plan(1, 16, 32) == (8, 1, 1, 1)
    assert plan(1, 5, 32) == (8, 1, 1, 0), "no whole group: nothing to launch"
    assert plan(1, 4096, 256) == (8, 2, 1, 128), "a unit of K is not split"
    assert plan(1, 4096, 1024) == (8, 4, 2, 128), "nor are two"
    assert plan(200, 4096, 4096) == (128, 8, 2, 64), "by two blocks of columns"
    assert plan(10_000, 4096, 4096) == (128, 8, 1, 32)
    assert plan(128, 14336, 4096, "q8_0", shared_bytes=101376)[0] < 128


@dataclass
class HopperManyPlan:
    columns: int
    x_stages: int
    weight_stages: int
    splits: int
    shared_bytes: int
    blocks: int


def hopper_many_plan(
    runtime: Runtime, m: int, n: int, k: int, fmt: formats.Format, multiprocessors: int = 132
) -> HopperManyPlan:
    found = (ctypes.c_int64 * 6)()
    runtime.library.plan_of_hopper_many(
        m, n, k, fmt.block_elems, fmt.block_bytes, multiprocessors, SHARED_BYTES, found
    )
    return HopperManyPlan(*found)


def test_every_hopper_many_plan_fits(hip, fmt) -> None:
    for m in (1, 127, 128, 129, 256, 300, 512, 1000, 2048, 100_000):
        for n in (5, 16, 48, 100, 1024, 4096, 11008, 14336, 128256):
            for k in (fmt.block_elems, 256, 768, 4096, 4352, 14336):
                for multiprocessors in (1, 2, 78, 132):
                    plan = hopper_many_plan(hip, m, n, k, fmt, multiprocessors)
                    what = (m, n, k, multiprocessors, plan)
                    assert plan.shared_bytes <= SHARED_BYTES, what
                    # Fewer stages of x keep the matrix cores waiting.
                    assert (4 if plan.columns == 256 else 8) <= plan.x_stages <= 8, what
                    assert 2 <= plan.weight_stages <= 8, what
                    # Parts of K of two units of the larger size or more.
                    assert plan.splits == 1 or 512 * plan.splits <= -(-k // 128) * 128, what
                    assert 1 <= plan.splits <= 8, what
                    assert plan.blocks % 2 == 0, what
                    assert plan.blocks <= max(multiprocessors, 2), what
                    assert (plan.blocks == 0) == (n < 16), what


def test_hopper_many_plans(hip) -> None:
    """Those that were the quickest on an H100."""

    def plan(m: int, n: int, k: int, fmt: str = "q4_0") -> tuple[int, int]:
        found = hopper_many_plan(hip, m, n, k, formats.get(fmt))
        return found.columns, found.splits

    for fmt in ("q4_0", "q4_k"):
        assert plan(128, 14336, 4096, fmt) == (128, 1)
        assert plan(256, 14336, 4096, fmt) == (256, 1)
        assert plan(512, 14336, 4096, fmt) == (256, 1)
        assert plan(512, 4096, 4096, fmt) == (128, 1)
        assert plan(2048, 4096, 4096, fmt) == (256, 1)
        assert plan(128, 4096, 14336, fmt) == (128, 4)
    assert plan(256, 66 * 256, 4096) == (256, 1), "one round that is just full"
    assert plan(1, 16, 256) == (128, 1), "too little of K to share out"


def test_where_hopper_many_is_quicker_than_blas(hip, fmt) -> None:
    """As on an H100, where one of them took at least a twentieth less."""

    def rows(n: int, k: int) -> list[int]:
        quicker, sizes = hip.library.hopper_many_is_quicker, (fmt.block_elems, fmt.block_bytes)
        return [m for m in (256, 512, 1024, 2048) if quicker(m, n, k, *sizes)]

    assert rows(14336, 4096) == [256, 512, 1024, 2048]
    assert {256, 512, 1024} <= set(rows(8192, 8192))
    assert {256, 512, 1024} <= set(rows(28672, 4096))
    assert {256, 512, 1024} <= set(rows(4096, 14336))
    assert {512, 1024} <= set(rows(4096, 4096))
    assert 256 in rows(5120, 5120)
    assert 1024 not in rows(5120, 5120), "14 of 66 pairs of blocks in the second round"
    assert rows(2048, 2048) == rows(1024, 4096) == []
    assert rows(15, 8192) == [], "no whole group of rows: rows would have to do it all"
    if fmt.name in ("q5_k", "q6_k"):
        assert 2048 not in rows(4096, 4096) + rows(4096, 14336)
