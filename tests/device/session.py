"""One run on a device: memory, code objects, launches, and the comparison of what came out."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from arguments import BLOCK_THREADS, Grid
from driver import Driver, DriverError

_GUARD = 256  # bytes around each output; a multiple of the alignment that kernels rely on
_GUARD_BYTE = 0xA5


class MismatchError(AssertionError):
    """A kernel's output that is not what it must be; the message says where."""


class Output:
    """Memory that a kernel writes to, between two guards.

    It is poisoned with bytes 0xFF, a NaN in every dtype, so that what is not written is seen.
    """

    def __init__(self, session: Session, shape: tuple[int, ...], dtype: Any) -> None:
        self._session = session
        self._shape, self._dtype = shape, np.dtype(dtype)
        size = int(np.prod(shape)) * self._dtype.itemsize
        self._bytes = np.full(size + 2 * _GUARD, _GUARD_BYTE, np.uint8)
        self._bytes[_GUARD : _GUARD + size] = 0xFF
        self._base = session.upload(self._bytes)
        self.address = self._base + _GUARD

    def read(self) -> np.ndarray:
        """What lies there now.

        Raises:
            MismatchError: something was written outside.
        """
        self._session.driver.download(self._bytes, self._base)
        inside = self._bytes[_GUARD:-_GUARD]
        for side, guard in (("before", self._bytes[:_GUARD]), ("after", self._bytes[-_GUARD:])):
            touched = np.flatnonzero(guard != _GUARD_BYTE)
            if touched.size:
                distance = _GUARD - touched[-1] if side == "before" else touched[0] + 1
                raise MismatchError(f"wrote {distance} bytes {side} the output")
        return inside.view(self._dtype).reshape(self._shape).copy()


class Session:
    """A driver, the folder of code objects, and what one case has allocated and seen."""

    def __init__(self, driver: Driver, folder: Path, architecture: str | None) -> None:
        self.driver = driver
        self.folder, self.architecture = folder, architecture
        self._modules: dict[str, int] = {}
        self._images: list[bytes] = []  # a driver may read a code object again later
        self._addresses: list[int] = []
        self.worst = 0.0  # the largest error so far, as a part of what is allowed
        self.launches = 0

    def code_object(self, name: str) -> Path:
        """The file with the kernels of a format, or with the common ones.

        Raises:
            FileNotFoundError: there is none of the names that it may have.
        """
        architecture = [f"{name}.{self.architecture}"] if self.architecture else []
        stems = [*architecture, name]
        files = [f"{stem}.{ending}" for stem in stems for ending in self.driver.extensions]
        for file in files:
            if (self.folder / file).exists():
                return self.folder / file
        raise FileNotFoundError(f"{self.folder} must have one of {', '.join(files)}, got none")

    def kernel(self, code_object: str, name: str) -> int:
        """A function of a code object, which is loaded at its first use."""
        if code_object not in self._modules:
            self._images.append(self.code_object(code_object).read_bytes())
            self._modules[code_object] = self.driver.load(self._images[-1])
        return self.driver.function(self._modules[code_object], name)

    def upload(self, data: np.ndarray) -> int:
        """A copy on the device, no byte longer: a memory checker then sees what reads past it."""
        data = np.ascontiguousarray(data)
        address = self.driver.allocate(max(data.nbytes, 1))
        self._addresses.append(address)
        if data.nbytes:
            self.driver.upload(address, data)
        return address

    def output(self, shape: tuple[int, ...], dtype: Any) -> Output:
        return Output(self, shape, dtype)

    def launch(
        self,
        function: int,
        grid: Grid,
        args: ctypes.Structure,
        threads: int = BLOCK_THREADS,
        shared_bytes: int = 0,
    ) -> None:
        self.driver.launch(function, grid, args, threads, shared_bytes)
        self.driver.synchronize()
        self.launches += 1

    def release(self) -> None:
        """Frees what was allocated since the last call."""
        while self._addresses:
            self.driver.free(self._addresses.pop())

    def abandon(self) -> None:
        """After a failure: frees what a driver that may have seen a fault still frees."""
        try:
            self.release()
        except DriverError:
            self._addresses.clear()

    def usable(self) -> bool:
        """Whether the device still runs anything: after a fault every call fails."""
        try:
            self.driver.synchronize()
        except DriverError:
            return False
        return True

    def check_bits(self, got: np.ndarray, wanted: np.ndarray, where: str) -> None:
        """Equal, bit for bit."""
        self._check(got != wanted, got, wanted, where)

    def check_floats(self, got: np.ndarray, wanted: np.ndarray, where: str) -> None:
        """Equal values and signs of zero, any NaN counting as any other."""
        same = (got == wanted) & (np.signbit(got) == np.signbit(wanted))
        self._check(~(same | (np.isnan(got) & np.isnan(wanted))), got, wanted, where)

    def check_close(
        self, got: np.ndarray, wanted: np.ndarray, bound: np.ndarray, where: str
    ) -> None:
        """Within ``bound`` of what is wanted. An unwritten output is NaN, and so never is."""
        error = np.abs(got - wanted)
        self._check(~(error <= bound), got, wanted, where)
        if error.size:
            parts = np.divide(error, bound, out=np.zeros_like(error), where=bound > 0)
            self.worst = max(self.worst, float(parts.max()))

    def check_untouched(self, got: np.ndarray, where: str) -> None:
        """Still the poison."""
        raw = np.ascontiguousarray(got).view(np.uint8)
        self._check(raw != 0xFF, raw, np.full_like(raw, 0xFF), f"{where}, not to be written")

    def _check(self, bad: np.ndarray, got: np.ndarray, wanted: np.ndarray, where: str) -> None:
        if not bad.any():
            return
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        name = "row, column" if len(place) == 2 else "at"
        raise MismatchError(
            f"{where}: {name} {', '.join(map(str, place))}: got {got[place]}, "
            f"wanted {wanted[place]}; {int(bad.sum())} of {bad.size} are wrong"
        )
