"""ggml's CPU matrix product through ctypes, as a contender for the benchmarks.

The library is the one that ``llama-cpp-python`` ships, or any shared build of ggml
(``libggml-base.so`` and ``libggml-cpu.so``). A product is a graph of one ``mul_mat`` node that is
built once and computed many times on ggml's CPU backend, with a thread pool that lives on between
calls, as in llama.cpp.

ggml has several ways to multiply by the same weight, called paths here after its buffer types:

- ``plain``: the blocks as a GGUF file has them;
- ``CPU_REPACK``: several rows interleaved when the weight is loaded;
- ``AMX``: tiles for Intel's matrix unit, rearranged when the weight is loaded.

Each path is first tried in a process of its own, because a path that the build has may still crash
on this machine: the header of GCC 12 declares 8 of the 64 bytes that ``ldtilecfg`` reads, so that
optimised builds load a tile configuration that was never written.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from random_weights import random_blocks
from torch import Tensor

import torch_q4
from torch_q4 import formats
from torch_q4.formats import Format

_Result = TypeVar("_Result")
_POINTER = ctypes.c_void_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_TYPE_F32 = 0
_GRAPH_NODES = 8  # of the one that is needed, leaving room for its two operands
PLAIN = "plain"
# ggml rounds activations to 8 bits in groups of 32 or 256; for normally distributed ones that is an
# error of 0.4 to 0.7 %.
TOLERANCE = 0.02


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", _POINTER),
        ("no_alloc", ctypes.c_bool),
    ]


class _Feature(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


# What is called: name, result, arguments. From ggml.h, ggml-backend.h and ggml-cpu.h of ggml 0.25.
_BASE: list[tuple[str, Any, list[Any]]] = [
    ("ggml_version", ctypes.c_char_p, []),
    ("ggml_init", _POINTER, [_InitParams]),
    ("ggml_free", None, [_POINTER]),
    (
        "ggml_new_tensor_2d",
        _POINTER,
        [_POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64],
    ),
    ("ggml_mul_mat", _POINTER, [_POINTER, _POINTER, _POINTER]),
    ("ggml_new_graph_custom", _POINTER, [_POINTER, ctypes.c_size_t, ctypes.c_bool]),
    ("ggml_build_forward_expand", None, [_POINTER, _POINTER]),
    ("ggml_backend_reg_get_proc_address", _POINTER, [_POINTER, ctypes.c_char_p]),
    ("ggml_backend_reg_dev_get", _POINTER, [_POINTER, ctypes.c_size_t]),
    ("ggml_backend_buft_name", ctypes.c_char_p, [_POINTER]),
    ("ggml_backend_buft_get_alloc_size", ctypes.c_size_t, [_POINTER, _POINTER]),
    ("ggml_backend_buft_alloc_buffer", _POINTER, [_POINTER, ctypes.c_size_t]),
    ("ggml_backend_buffer_get_base", _POINTER, [_POINTER]),
    ("ggml_backend_buffer_free", None, [_POINTER]),
    ("ggml_backend_tensor_alloc", ctypes.c_int, [_POINTER, _POINTER, _POINTER]),
    (
        "ggml_backend_tensor_set",
        None,
        [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t],
    ),
    (
        "ggml_backend_tensor_get",
        None,
        [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t],
    ),
    ("ggml_backend_cpu_buffer_type", _POINTER, []),
    ("ggml_backend_supports_op", ctypes.c_bool, [_POINTER, _POINTER]),
    ("ggml_backend_graph_compute", ctypes.c_int, [_POINTER, _POINTER]),
    ("ggml_threadpool_params_init", None, [_POINTER, ctypes.c_int]),
    ("ggml_log_set", None, [_LOG, _POINTER]),
    ("ggml_tensor_overhead", ctypes.c_size_t, []),
    ("ggml_graph_overhead_custom", ctypes.c_size_t, [ctypes.c_size_t, ctypes.c_bool]),
]
_CPU: list[tuple[str, Any, list[Any]]] = [
    ("ggml_backend_cpu_reg", _POINTER, []),
    ("ggml_backend_cpu_init", _POINTER, []),
    ("ggml_backend_cpu_set_n_threads", None, [_POINTER, ctypes.c_int]),
    ("ggml_backend_cpu_set_threadpool", None, [_POINTER, _POINTER]),
    ("ggml_threadpool_new", _POINTER, [_POINTER]),
    ("ggml_threadpool_free", None, [_POINTER]),
    ("ggml_threadpool_pause", None, [_POINTER]),
    ("ggml_threadpool_resume", None, [_POINTER]),
]


class GgmlError(RuntimeError):
    """ggml is not installed, lacks a function, or does not compute what it should."""


class UnsupportedError(GgmlError):
    """A path has no product for a format and shape."""


def find() -> Path | None:
    """The directory of the libraries that ``llama-cpp-python`` ships, if it is installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "lib"
    return directory if (directory / "libggml-cpu.so").exists() else None


@dataclasses.dataclass(frozen=True)
class Build:
    """Which ggml is measured.

    Attributes:
        version: ggml's version, and the package's where a package has brought it.
        compiler: the compiler's own name for itself in the library, or "an unknown compiler".
        features: the instruction sets and options that the CPU backend was built with.
        paths: the paths that work on this machine.
        broken: the others that the build has, and what became of them.
    """

    version: str
    compiler: str
    features: list[str]
    paths: list[str]
    broken: dict[str, str]

    def __str__(self) -> str:
        """One line for a heading."""
        text = f"ggml {self.version}, {self.compiler}, {' '.join(self.features)}"
        text += f"; paths: {', '.join(self.paths)}"
        for path, reason in self.broken.items():
            text += f"; {path} is left out: {reason}"
        return text


class Ggml:
    """A loaded ggml with one CPU backend.

    Args:
        directory: where ``libggml-base.so`` and ``libggml-cpu.so`` are.
        paths: the paths to try, or None for every one that the build has.

    Raises:
        GgmlError: a library is not there or lacks a function.
    """

    def __init__(self, directory: Path, paths: list[str] | None = None) -> None:
        libraries = [directory / "libggml-base.so", directory / "libggml-cpu.so"]
        self._call: dict[str, Callable[..., Any]] = {}
        try:
            for library, functions in zip(libraries, (_BASE, _CPU), strict=True):
                loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
                for name, result, arguments in functions:
                    function = getattr(loaded, name)
                    function.restype, function.argtypes = result, arguments
                    self._call[name] = function
        except (OSError, AttributeError) as error:
            raise GgmlError(f"ggml: {directory} must hold a shared ggml, got: {error}") from error
        self._silence = _LOG(lambda level, text, data: None)  # ggml keeps a pointer to it
        self("ggml_log_set", self._silence, None)
        self.backend = self("ggml_backend_cpu_init")
        self._registry = self("ggml_backend_cpu_reg")
        self._pool: int | None = None
        self._thread = ThreadPoolExecutor(1)
        self.buffer_types = {PLAIN: self("ggml_backend_cpu_buffer_type")} | self._extra()
        self.set_threads(1)
        candidates = [path for path in self.buffer_types if paths is None or path in paths]
        broken = {path: reason for path in candidates if (reason := _try_path(directory, path))}
        package = ""
        if directory == find():
            package = f" of llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
        self.build = Build(
            version=self("ggml_version").decode() + package,
            compiler=_compiler(libraries[1]),
            features=self._features(),
            paths=[path for path in candidates if path not in broken],
            broken=broken,
        )

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the library by its name."""
        return self._call[name](*arguments)

    def _procedure(self, name: bytes, result: Any, *arguments: Any) -> Callable[..., Any] | None:
        address = self("ggml_backend_reg_get_proc_address", self._registry, name)
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def _extra(self) -> dict[str, int]:
        """The buffer types that rearrange weights, by name."""
        function = self._procedure(b"ggml_backend_dev_get_extra_bufts", _POINTER, _POINTER)
        if function is None:
            return {}
        device = self("ggml_backend_reg_dev_get", self._registry, 0)
        listed = ctypes.cast(function(device), ctypes.POINTER(_POINTER))
        found: dict[str, int] = {}
        while listed and (kind := listed[len(found)]):
            found[self("ggml_backend_buft_name", kind).decode()] = kind
        return found

    def _features(self) -> list[str]:
        function = self._procedure(b"ggml_backend_get_features", _POINTER, _POINTER)
        if function is None:
            return []
        listed = ctypes.cast(function(self._registry), ctypes.POINTER(_Feature))
        names: list[str] = []
        while listed and (name := listed[len(names)].name):
            names.append(name.decode())
        return names

    def set_threads(self, count: int) -> None:
        """Computes with ``count`` threads from now on, kept alive (and paused) between calls."""
        # The parameters' size depends on the build, whose own function fills them in.
        params = ctypes.create_string_buffer(16384)
        self("ggml_threadpool_params_init", params, count)
        pool = self("ggml_threadpool_new", params)
        self("ggml_backend_cpu_set_threadpool", self.backend, pool)
        self("ggml_backend_cpu_set_n_threads", self.backend, count)
        if self._pool:
            self("ggml_threadpool_free", self._pool)
        self._pool = pool
        self("ggml_threadpool_pause", pool)

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Calls ``function`` on ggml's own thread, its pool waiting actively meanwhile.

        Everything that computes belongs here: ggml configures AMX once per thread, and PyTorch
        leaves it otherwise on the threads that it computes on.
        """
        self("ggml_threadpool_resume", self._pool)
        try:
            return self._thread.submit(function).result()
        finally:
            self("ggml_threadpool_pause", self._pool)

    def compute(self, graph: int) -> None:
        """Computes a graph, inside :meth:`run`.

        Raises:
            GgmlError: ggml reports a failure.
        """
        status = self("ggml_backend_graph_compute", self.backend, graph)
        if status:
            raise GgmlError(f"ggml: a graph must compute, got status {status}")


class _Arena:
    """A context for tensors and graphs, and the buffers that hold the tensors' data."""

    def __init__(self, ggml: Ggml, tensors: int, graphs: int = 0) -> None:
        self._ggml = ggml
        self._buffers: list[int] = []
        # The arena holds descriptions only; `tensors` more are the nodes of the graphs.
        size = 2 * tensors * ggml("ggml_tensor_overhead") + 4096
        size += graphs * ggml("ggml_graph_overhead_custom", _GRAPH_NODES, False)
        self.context: int | None = ggml("ggml_init", _InitParams(size, None, True))

    def tensor(self, kind: int, rows: int, columns: int) -> int:
        return int(self._ggml("ggml_new_tensor_2d", self.context, kind, columns, rows))

    def allocate(self, path: str, *tensors: int) -> tuple[int, int]:
        """One memory for tensors that are alike. Returns its address and size."""
        ggml = self._ggml
        kind = ggml.buffer_types[path]
        size = ggml("ggml_backend_buft_get_alloc_size", kind, tensors[0])
        buffer = ggml("ggml_backend_buft_alloc_buffer", kind, size)
        if not buffer:
            raise GgmlError(f"ggml: memory for a tensor ({path}), got none for {size} bytes")
        self._buffers.append(buffer)
        base = ggml("ggml_backend_buffer_get_base", buffer)
        for tensor in tensors:
            ggml("ggml_backend_tensor_alloc", buffer, tensor, base)
        return base, size

    def write(self, tensor: int, data: Tensor) -> None:
        data = data.contiguous()
        self._ggml("ggml_backend_tensor_set", tensor, data.data_ptr(), 0, data.nbytes)

    def close(self) -> None:
        for buffer in self._buffers:
            self._ggml("ggml_backend_buffer_free", buffer)
        self._ggml("ggml_free", self.context)
        self._buffers, self.context = [], None


class Weights:
    """Copies of one packed weight in one of ggml's layouts.

    Args:
        ggml: the library.
        fmt: the weight's format.
        blocks: uint8 ``(N, bytes of a row)``.
        path: the name of one of the library's paths.
        copies: how many copies to keep, each in memory of its own.

    Raises:
        UnsupportedError: the path has no product for this format and shape.
        GgmlError: memory ran out.
    """

    def __init__(self, ggml: Ggml, fmt: Format, blocks: Tensor, path: str, copies: int = 1) -> None:
        self.ggml = ggml
        self.shape = (blocks.shape[0], fmt.columns(blocks.shape[1]))
        self._arena = _Arena(ggml, tensors=copies)
        try:
            self.tensors = [self._arena.tensor(fmt.type_id, *self.shape) for _ in range(copies)]
            places = [self._arena.allocate(path, tensor) for tensor in self.tensors]
            with contextlib.closing(Product(self, torch.zeros(1, self.shape[1]))) as product:
                if not product.supported:
                    raise UnsupportedError(
                        f"ggml: {path} must have {fmt.name} for {self.shape}, got none"
                    )
            self._arena.write(self.tensors[0], blocks)
            # Copying what the path has made of the blocks is quicker than making it again.
            first, size = places[0]
            for place, _ in places[1:]:
                ctypes.memmove(place, first, size)
        except GgmlError:
            self.close()
            raise

    def close(self) -> None:
        """Frees the copies; products with them must not be used after."""
        self._arena.close()


class Product:
    """``x @ weight.T`` with every copy of a weight: a graph of one node each.

    Args:
        weights: the weight's copies.
        x: float32 ``(M, K)``.
    """

    def __init__(self, weights: Weights, x: Tensor) -> None:
        self._ggml = weights.ggml
        self._shape = (x.shape[0], weights.shape[0])
        copies = len(weights.tensors)
        self._arena = _Arena(weights.ggml, tensors=copies + 1, graphs=copies)
        ggml, context = self._ggml, self._arena.context
        activations = self._arena.tensor(_TYPE_F32, *x.shape)
        self._arena.allocate(PLAIN, activations)
        self._arena.write(activations, x)
        self._nodes = [
            ggml("ggml_mul_mat", context, tensor, activations) for tensor in weights.tensors
        ]
        self._arena.allocate(PLAIN, *self._nodes)  # one output in turn, as in a model
        self.supported = bool(ggml("ggml_backend_supports_op", ggml.backend, self._nodes[0]))
        self._graphs = []
        for node in self._nodes:
            graph = ggml("ggml_new_graph_custom", context, _GRAPH_NODES, False)
            ggml("ggml_build_forward_expand", graph, node)
            self._graphs.append(graph)

    def __call__(self, index: int) -> None:
        """Computes the product with a copy, by ``index`` modulo their number.

        To be called inside :meth:`Ggml.run`.
        """
        self._ggml.compute(self._graphs[index % len(self._graphs)])

    def output(self) -> Tensor:
        """The latest result, float32 ``(M, N)``."""
        result = torch.empty(self._shape)
        self._ggml("ggml_backend_tensor_get", self._nodes[0], result.data_ptr(), 0, result.nbytes)
        return result

    def close(self) -> None:
        """Frees the activations and the graphs."""
        self._arena.close()


def relative_error(ggml: Ggml, fmt: Format, blocks: Tensor, path: str, x: Tensor) -> float:
    """How far ggml's product is from the one with the dequantised weight.

    Returns:
        ``||a - b|| / ||b||`` with the reference ``b`` computed in float64.

    Raises:
        UnsupportedError: the path has no product for this format and shape.
    """
    reference = x.double() @ torch_q4.dequantize(blocks, fmt).double().T
    with (
        contextlib.closing(Weights(ggml, fmt, blocks, path)) as weights,
        contextlib.closing(Product(weights, x)) as product,
    ):
        ggml.run(lambda: product(0))
        return float((product.output().double() - reference).norm() / reference.norm())


def _compiler(library: Path) -> str:
    """The compiler's name for itself, which it leaves in the ELF section ``.comment``."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes())
    return found.group().decode() if found else "an unknown compiler"


def _try_path(directory: Path, path: str) -> str | None:
    """Computes with a path in a process of its own.

    Returns:
        None if all went well, otherwise what went wrong.
    """
    command = [sys.executable, __file__, str(directory), path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        return f"it crashes here ({signal.Signals(-done.returncode).name})"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it fails here"])[-1]
    return None


def main() -> int:
    """Computes small products of every format with one path, as ``ggml.py DIRECTORY PATH``."""
    directory, path = Path(sys.argv[1]), sys.argv[2]
    ggml = Ggml(directory, paths=[])
    torch.manual_seed(0)
    for fmt in formats.all():
        if fmt.type_id < 0:
            continue
        blocks = random_blocks(fmt, 64, 1024)
        for threads in (1, 2):
            ggml.set_threads(threads)
            for rows in (1, 5, 64):
                try:
                    error = relative_error(ggml, fmt, blocks, path, torch.randn(rows, 1024))
                except UnsupportedError:
                    break  # the path lacks the format
                if not error < TOLERANCE:
                    print(f"{fmt.name}, M={rows}: its error is {error:.3f}", file=sys.stderr)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
