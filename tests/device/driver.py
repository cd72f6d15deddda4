"""The few driver calls that a kernel's test needs, through ctypes: HIP's or CUDA's, by the library.

No toolkit, no torch: the library is the one that every program on such a machine uses,
``libamdhip64.so`` or ``libcuda.so.1``.
"""

from __future__ import annotations

import abc
import ctypes
from pathlib import Path

import numpy as np
from arguments import BLOCK_THREADS, Grid


class DriverError(RuntimeError):
    """A driver call that failed, with the driver's own words."""


class NotFoundError(DriverError):
    """What was asked for is not there."""


_NOT_FOUND = 500  # hipErrorNotFound and CUDA_ERROR_NOT_FOUND


class Driver(abc.ABC):
    """Device 0 of one driver library. Addresses are integers; every call is checked."""

    extensions: tuple[str, ...]  # of code objects, those for several architectures first

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def call(self, name: str, *args: object) -> None:
        code = getattr(self.library, name)(*args)
        if code != 0:
            kind = NotFoundError if code == _NOT_FOUND else DriverError
            raise kind(f"{name}: must succeed, got {code} ({self._error(code)})")

    @abc.abstractmethod
    def _error(self, code: int) -> str: ...

    @abc.abstractmethod
    def describe(self) -> str:
        """The device, in words."""

    @abc.abstractmethod
    def allocate(self, size: int) -> int: ...

    @abc.abstractmethod
    def free(self, address: int) -> None: ...

    @abc.abstractmethod
    def upload(self, address: int, data: np.ndarray) -> None: ...

    @abc.abstractmethod
    def download(self, data: np.ndarray, address: int) -> None: ...

    @abc.abstractmethod
    def load(self, image: bytes) -> int:
        """A module from a code object in memory."""

    @abc.abstractmethod
    def function(self, module: int, name: str) -> int:
        """A kernel; NotFoundError where the module's code for this device has none."""

    @abc.abstractmethod
    def launch(
        self,
        function: int,
        grid: Grid,
        args: ctypes.Structure,
        threads: int = BLOCK_THREADS,
        shared_bytes: int = 0,
    ) -> None:
        """Runs a kernel on the default stream with its one argument by value."""

    @abc.abstractmethod
    def synchronize(self) -> None: ...


def _data(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _parameters(args: ctypes.Structure) -> ctypes.Array[ctypes.c_void_p]:
    # An array of pointers to the arguments, of which there is one.
    return (ctypes.c_void_p * 1)(ctypes.addressof(args))


class HipDriver(Driver):
    extensions = ("hipfb", "hsaco")

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.call("hipInit", ctypes.c_uint(0))
        self.call("hipSetDevice", ctypes.c_int(0))

    def _error(self, code: int) -> str:
        self.library.hipGetErrorString.restype = ctypes.c_char_p
        return str(self.library.hipGetErrorString(ctypes.c_int(code)), "utf-8")

    def describe(self) -> str:
        name = ctypes.create_string_buffer(256)
        self.call("hipDeviceGetName", name, ctypes.c_int(len(name)), ctypes.c_int(0))
        version = ctypes.c_int()
        self.call("hipRuntimeGetVersion", ctypes.byref(version))
        return f"{name.value.decode()}, HIP {version.value}"

    def allocate(self, size: int) -> int:
        address = ctypes.c_void_p()
        self.call("hipMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value or 0

    def free(self, address: int) -> None:
        self.call("hipFree", ctypes.c_void_p(address))

    def upload(self, address: int, data: np.ndarray) -> None:
        self._copy(ctypes.c_void_p(address), _data(data), data.nbytes, 1)

    def download(self, data: np.ndarray, address: int) -> None:
        self._copy(_data(data), ctypes.c_void_p(address), data.nbytes, 2)

    def _copy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, size: int, kind: int) -> None:
        self.call("hipMemcpy", to, source, ctypes.c_size_t(size), ctypes.c_int(kind))

    def load(self, image: bytes) -> int:
        module = ctypes.c_void_p()
        self.call("hipModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        function = ctypes.c_void_p()
        self.call("hipModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module),
                  ctypes.c_char_p(name.encode()))  # fmt: skip
        return function.value or 0

    def launch(
        self,
        function: int,
        grid: Grid,
        args: ctypes.Structure,
        threads: int = BLOCK_THREADS,
        shared_bytes: int = 0,
    ) -> None:
        sizes = [ctypes.c_uint(size) for size in (*grid, 1, threads, 1, 1, shared_bytes)]
        self.call("hipModuleLaunchKernel", ctypes.c_void_p(function), *sizes, ctypes.c_void_p(),
                  _parameters(args), ctypes.c_void_p())  # fmt: skip

    def synchronize(self) -> None:
        self.call("hipDeviceSynchronize")


_FREE_SHARED_BYTES = 48 << 10  # a kernel that has more must be said to
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CudaDriver(Driver):
    extensions = ("fatbin", "cubin")

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.call("cuInit", ctypes.c_uint(0))
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self.device = device
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def _error(self, code: int) -> str:
        words = ctypes.c_char_p()
        self.library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(words))
        return str(words.value or b"no such error", "utf-8")

    def describe(self) -> str:
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, ctypes.c_int(len(name)), self.device)
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return f"{name.value.decode()}, CUDA {version.value}"

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, data: np.ndarray) -> None:
        size = ctypes.c_size_t(data.nbytes)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _data(data), size)

    def download(self, data: np.ndarray, address: int) -> None:
        size = ctypes.c_size_t(data.nbytes)
        self.call("cuMemcpyDtoH_v2", _data(data), ctypes.c_uint64(address), size)

    def load(self, image: bytes) -> int:
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module),
                  ctypes.c_char_p(name.encode()))  # fmt: skip
        return function.value or 0

    def launch(
        self,
        function: int,
        grid: Grid,
        args: ctypes.Structure,
        threads: int = BLOCK_THREADS,
        shared_bytes: int = 0,
    ) -> None:
        if shared_bytes > _FREE_SHARED_BYTES:
            attribute = ctypes.c_int(_MAX_DYNAMIC_SHARED_BYTES), ctypes.c_int(shared_bytes)
            self.call("cuFuncSetAttribute", ctypes.c_void_p(function), *attribute)
        sizes = [ctypes.c_uint(size) for size in (*grid, 1, threads, 1, 1, shared_bytes)]
        self.call("cuLaunchKernel", ctypes.c_void_p(function), *sizes, ctypes.c_void_p(),
                  _parameters(args), ctypes.c_void_p())  # fmt: skip

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")


def open_driver(path: str | Path) -> Driver:
    """The driver in the library at ``path``.

    Raises:
        DriverError: no such library, one that is neither HIP's nor CUDA's, or no device.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise DriverError(f"driver: must be a library that loads, got {path} ({error})") from None
    if hasattr(library, "hipInit"):
        return HipDriver(library)
    if hasattr(library, "cuInit"):
        return CudaDriver(library)
    raise DriverError(f"driver: must be libamdhip64.so or libcuda.so.1, got {path}")
