"""Which kernel computes a product fastest on this GPU: measured, followed and remembered.

``linear`` chooses its kernel by a table for each family of GPUs. :func:`tune` measures one weight's
shape on the GPU at hand and makes a plan, which stands above the table from then on; plans are
looked up in C++ (``csrc/gpu/plans.h``). They are saved in a file, and the first product on a GPU
brings back those that were measured on the same kind of GPU by the same version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_q4._files import AtomicFile, require_file
from torch_q4._text import printable
from torch_q4._timing import Contender, GraphTimer, copies_to_fill, time_in_turn
from torch_q4.formats import Format
from torch_q4.nn import QuantLinear
from torch_q4.ops import FormatLike, _check_columns, _check_float, _format, quantize

__all__ = ["TuneReport", "tune", "tune_model"]

_ops = torch.ops.torch_q4

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_ROUNDS = 9
_GAIN = 1.03  # a kernel must be so many times as fast as the table's, to be stable under noise
_TILE_ROWS = 64
_MOST_COPIES = 512  # so that graphs stay small; weights under some 400 kB stay in the cache in part
_NOT_TIMED = ("reference",)  # what the others are compared with in tests

# (most rows, kernel), rows rising: the first that has enough rows is taken.
Plan = tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class TuneReport:
    """What :func:`tune` found; ``str()`` of it is a table.

    Attributes:
        device: the GPU's name.
        architecture: as in ``"sm_90"`` and ``"gfx942"``.
        format: the weight's format.
        n: the weight's rows, ``out_features``.
        k: the weight's columns, ``in_features``.
        dtype: that of the activations.
        packed: whether the weight is in the packed layout.
        plan: pairs (most rows of x, kernel): the first that has enough rows is taken, beyond the
            last one the built-in table decides.
        table: the built-in table's kernel by rows of x.
        microseconds: medians by kernel and rows of x.
    """

    device: str
    architecture: str
    format: str
    n: int
    k: int
    dtype: torch.dtype
    packed: bool
    plan: Plan
    table: dict[int, str]
    microseconds: dict[str, dict[int, float]]

    def __str__(self) -> str:
        """Microseconds by rows of x and kernel, and which kernel `linear` takes."""
        kernels = list(self.microseconds)
        lines = [["M", *kernels, "plan"]]
        for m, of_table in self.table.items():
            chosen = _step_of(self.plan, m)
            times = {kernel: self.microseconds[kernel][m] for kernel in kernels}
            gain = times[of_table] / times[chosen]
            note = "" if chosen == of_table else f", {gain:.2f}x as fast as {of_table}"
            lines.append([str(m), *(f"{times[kernel]:.1f}" for kernel in kernels), chosen + note])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head = (
            f"{self.n}x{self.k} {self.format}{'' if self.packed else ' not packed'}, "
            f"{_dtype_name(self.dtype)}, on {self.device} ({self.architecture}): microseconds"
        )
        table = [
            "  ".join(
                cell if place == len(kernels) + 1 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([head, *table])


def tune(
    n: int,
    k: int,
    fmt: FormatLike,
    *,
    dtype: torch.dtype = torch.float16,
    rows: Sequence[int] = ROWS,
    packed: bool = True,
    device: torch.device | str | int | None = None,
    save: bool = True,
) -> TuneReport:
    """Measures which kernel of ``linear`` is the fastest for a weight, and makes it the one.

    Every kernel that suits is timed at every number of rows, on random weights that together exceed
    the cache. The fastest is planned, but the built-in table's where no other is more than 3 %
    faster. From then on ``linear`` and ``QuantLinear`` follow the plan in this process, for weights
    of this shape, format and layout and activations of this dtype, with ``compute="exact"``; CUDA
    graphs that were captured before keep their kernels. Results may change by rounding.

    The plan is saved in ``tune.json`` in the folder ``TORCH_Q4_CACHE``, by default
    ``$XDG_CACHE_HOME/torch_q4`` or ``~/.cache/torch_q4``, under the GPU's name and architecture and
    this library's version. Later processes load it at their first product on such a GPU. Several
    processes may tune at once. A file that cannot be read or written is warned of, and no more.

    Takes seconds, and memory for copies of the weight: four times the L2 cache, or two copies.

    Args:
        n: the weight's rows, ``out_features``.
        k: the weight's columns, ``in_features``, a whole number of blocks.
        fmt: the format, by name or ggml type.
        dtype: that of the activations: float32, float16 or bfloat16.
        rows: rows of x to measure at. Any other number goes by the next larger one; beyond the
            largest the built-in table decides.
        packed: the weight's layout. ``QuantLinear`` packs, see :func:`torch_q4.pack`.
        device: the GPU; by default torch's current one.
        save: whether later processes are to know.

    Returns:
        The plan and the times.

    Raises:
        ValueError: unknown format, or a shape, rows or a device that do not fit.
        TypeError: another dtype.
        RuntimeError: torch sees no GPU, or one that has no kernels in this build.
    """
    found = _format("tune", fmt)
    _check_float("tune", "dtype", dtype)
    if n < 1 or k < 1:
        raise ValueError(f"tune: n and k must be at least 1, got {n}, {k}")
    _check_columns("tune", "x", k, found)
    if not rows or min(rows) < 1:
        raise ValueError(f"tune: rows must be numbers of at least 1, got {tuple(rows)}")
    gpu = _gpu(device)
    name, architecture = _identity(gpu.index)
    wanted = sorted(set(rows))
    table = {m: _choice_of_table(gpu.index, found, dtype, packed, m, n, k) for m in wanted}
    kernels = [
        kernel
        for kernel in _kernels_of_device(gpu.index, dtype, packed)
        if kernel not in _NOT_TIMED
    ]
    times = _measure(gpu, found, n, k, dtype, packed, wanted, kernels)
    plan = _merged(
        (m, _quickest({name: times[name][m] for name in times}, table[m])) for m in table
    )
    saved = _Saved(
        name, architecture, _version(), found.name, _dtype_name(dtype), packed, n, k, plan
    )
    saved.follow(gpu.index)
    if save:
        _save(saved)
    return TuneReport(name, architecture, found.name, n, k, dtype, packed, plan, table, times)


def tune_model(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float16,
    rows: Sequence[int] = ROWS,
    save: bool = True,
) -> list[TuneReport]:
    """:func:`tune` for every kind of weight in the linear layers of a model that is on a GPU.

    Layers whose ``compute`` is ``"int8"`` are left out: plans are for exact products.

    Args:
        model: any module that holds ``QuantLinear`` layers.
        dtype: that of the activations.
        rows: see :func:`tune`.
        save: see :func:`tune`.

    Returns:
        A report for each kind of weight, in the order of the layers.

    Raises:
        ValueError: a layer that is not on a GPU; besides, as :func:`tune`.
        TypeError: another dtype.
        RuntimeError: torch sees no GPU, or one that has no kernels in this build.
    """
    kinds = dict.fromkeys(
        (layer.out_features, layer.in_features, layer.format, layer.packed, layer.blocks.device)
        for layer in model.modules()
        if isinstance(layer, QuantLinear) and layer.compute == "exact"
    )
    return [
        tune(n, k, fmt, dtype=dtype, rows=rows, packed=packed, device=device, save=save)
        for n, k, fmt, packed, device in kinds
    ]


# ---- the choice ----------------------------------------------------------------------------------


def _quickest(times: dict[str, float], of_table: str) -> str:
    """The kernel of the least time; the table's, unless that is clearly slower."""
    best = min(times, key=lambda kernel: times[kernel])
    return best if times[of_table] > _GAIN * times[best] else of_table


def _merged(steps: Iterable[tuple[int, str]]) -> Plan:
    """Steps with rising rows, without those that the next one makes superfluous."""
    plan: list[tuple[int, str]] = []
    for m, kernel in steps:
        if plan and plan[-1][1] == kernel:
            plan.pop()
        plan.append((m, kernel))
    return tuple(plan)


def _step_of(plan: Plan, m: int) -> str:
    return next(kernel for most_rows, kernel in plan if m <= most_rows)


# ---- measuring -----------------------------------------------------------------------------------


def _gpu(device: torch.device | str | int | None) -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError("tune: torch must see a GPU, got none")
    found = (
        torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    )
    if found.type != "cuda":
        raise ValueError(f"tune: device must be a GPU, got {found}")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"tune: device must be one of {torch.cuda.device_count()} GPUs, got {found}"
        )
    return torch.device("cuda", index)


def architecture_of_gpu(properties: Any) -> str:
    """As in ``"sm_90"`` and ``"gfx942"``."""
    # CUDA builds have gcnArchName, too, and the device's name in it.
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


def _identity(index: int) -> tuple[str, str]:
    """A GPU's name and architecture: plans hold for all that have both in common."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, architecture_of_gpu(properties)


def _choice_of_table(
    index: int, fmt: Format, dtype: torch.dtype, packed: bool, m: int, n: int, k: int
) -> str:
    return str(_ops._linear_choice.default(index, fmt.type_id, dtype, packed, m, n, k, True))


def _kernels_of_device(index: int, dtype: torch.dtype, packed: bool) -> list[str]:
    return str(_ops._linear_kernels.default(dtype, packed, index)).split()


def _product(x: Tensor, blocks: Tensor, fmt: Format, packed: bool, kernel: str) -> Tensor:
    return _ops._linear_with.default(x, blocks, fmt.type_id, None, "exact", packed, kernel)


def _weights(
    fmt: Format, n: int, k: int, packed: bool, device: torch.device, total_bytes: int
) -> list[Tensor]:
    """Copies of a random weight that have so many bytes together.

    Its rows are those of a small weight in random order: quantising takes its time. A format
    without a quantiser has random bytes, whose products are as fast.
    """
    generator = torch.Generator().manual_seed(0)
    some = min(n, _TILE_ROWS)
    order = torch.randint(some, (n,), generator=generator, device="cpu")
    if fmt.quantizes:
        small = quantize(torch.randn(some, k, generator=generator, device="cpu"), fmt)
    else:
        shape = (some, fmt.row_bytes(k))
        small = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")
    blocks = small.to(device)[order.to(device)]
    if packed:
        _ops.pack_.default(blocks, fmt.type_id)
    # A weight that fills the cache by itself pushes its own beginning out.
    copies = 1 if blocks.nbytes >= total_bytes else copies_to_fill(blocks.nbytes, total_bytes)
    copies = min(copies, _MOST_COPIES)
    return [blocks, *(blocks.clone() for _ in range(copies - 1))]


@contextlib.contextmanager
def _on_own_stream(device: torch.device) -> Iterator[GraphTimer]:
    """A timer on a stream of its own; graphs cannot be captured on the default one."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            timer = GraphTimer()
            timer.warm_up()
            yield timer
        torch.cuda.synchronize()


def _measure(
    device: torch.device,
    fmt: Format,
    n: int,
    k: int,
    dtype: torch.dtype,
    packed: bool,
    rows: Sequence[int],
    kernels: Sequence[str],
) -> dict[str, dict[int, float]]:
    """Median microseconds by kernel and rows."""
    times: dict[str, dict[int, float]] = {kernel: {} for kernel in kernels}
    # Autocast would take a hand in what dequantises first.
    with torch.no_grad(), torch.autocast("cuda", enabled=False), _on_own_stream(device) as timer:
        weights = _weights(fmt, n, k, packed, device, timer.cold_bytes)
        generator = torch.Generator(device).manual_seed(0)
        for m in rows:
            x = torch.randn(m, k, generator=generator, device=device, dtype=dtype)

            def call(kernel: str, index: int, x: Tensor = x) -> None:
                _product(x, weights[index % len(weights)], fmt, packed, kernel)

            contenders = {
                kernel: Contender(functools.partial(call, kernel), len(weights))
                for kernel in kernels
            }
            for contender in contenders.values():
                contender.call(0)  # what the first call does must not be captured
            for kernel, found in time_in_turn(timer, contenders, _ROUNDS).items():
                times[kernel][m] = statistics.median(found)
    return times


# ---- what was measured before --------------------------------------------------------------------

# The file: {"torch_q4_plans": 1, "plans": [a dictionary of _Saved's fields, ...]}
_FILE_VERSION = 1
_warned: set[str] = set()


def _version() -> str:
    from torch_q4 import __version__

    return __version__


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A plan as the file has it, and what it holds for."""

    device: str
    architecture: str
    torch_q4: str
    format: str
    dtype: str
    packed: bool
    n: int
    k: int
    plan: Plan

    @classmethod
    def from_json(cls, value: Any) -> _Saved:
        """Checks one entry of the file; ValueError, TypeError or KeyError if it is none."""
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        plan = tuple((m, kernel) for m, kernel in value["plan"])
        found = cls(**{**value, "plan": plan})
        for name, kind in types.items():
            if name != "plan" and type(getattr(found, name)).__name__ != kind:
                raise ValueError(f"{name} must be {kind}, got {getattr(found, name)!r}")
        if not all(type(m) is int and type(kernel) is str for m, kernel in plan):
            raise ValueError(f"plan must be of rows and kernels, got {plan}")
        return found

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything but the plan."""
        return dataclasses.astuple(self)[:-1]

    def follow(self, index: int) -> None:
        """Makes ``linear`` follow the plan on a GPU."""
        text = "".join(f"{m} {kernel}\n" for m, kernel in self.plan)
        fmt, dtype = _format("tune", self.format), getattr(torch, self.dtype)
        shape = self.n, self.k
        _ops._set_linear_plan.default(index, fmt.type_id, dtype, self.packed, *shape, text)


def _cache_file() -> Path:
    """Where plans are saved; RuntimeError where there is no home."""
    if folder := os.environ.get("TORCH_Q4_CACHE"):
        return Path(folder) / "tune.json"
    # A relative path there is to be ignored: the XDG Base Directory Specification.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".cache"
    return base / "torch_q4" / "tune.json"


def _read(path: Path) -> list[_Saved]:
    """The plans in the file, none if there is no file; an exception of some kind if it is bad."""
    try:
        require_file(path, "tune")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    value = json.loads(text)
    if not isinstance(value, dict) or value.get("torch_q4_plans") != _FILE_VERSION:
        raise ValueError(
            f'the file must have "torch_q4_plans": {_FILE_VERSION}, got something else'
        )
    return [_Saved.from_json(entry) for entry in value["plans"]]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else writes the file meanwhile, where the file system has locks."""
    # Neither waited for, should it be a FIFO, nor emptied, should it be a link to something else.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK
    with open(os.open(path.with_name(path.name + ".lock"), flags, 0o666), "wb") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, plan: _Saved) -> None:
    """Adds a plan to those in the file, or replaces the one that it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        # A file that is no list of plans is left as it is: it may be somebody else's.
        plans = {saved.key: saved for saved in _read(path)} | {plan.key: plan}
        value = {
            "torch_q4_plans": _FILE_VERSION,
            "plans": [dataclasses.asdict(saved) for saved in plans.values()],
        }
        data = (json.dumps(value, indent=1) + "\n").encode()
        with AtomicFile(path, len(data), "tune") as file:
            file.write(data)


def _described(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


def _save(plan: _Saved) -> None:
    path: Path | str = "tune.json"
    try:
        path = _cache_file()
        _write(path, plan)
    except Exception as error:  # the plan is in use already, saved or not
        warnings.warn(
            f"tune: the plan could not be saved in {path}, which is left as it was: "
            f"{_described(error)}",
            stacklevel=3,
        )


def _load_linear_plans(index: int) -> None:
    """Brings back a GPU's plans, at its first product; nothing in the file can break that one."""
    path: Path | str = "tune.json"
    failures: list[Exception] = []
    followed = 0
    try:
        path = _cache_file()
        if plans := _read(path):
            where = (*_identity(index), _version())
            for plan in plans:
                if (plan.device, plan.architecture, plan.torch_q4) == where:
                    try:
                        plan.follow(index)
                        followed += 1
                    except Exception as error:  # such as a kernel that this build is without
                        failures.append(error)
    except Exception as error:
        failures.append(error)
    if failures and str(path) not in _warned:
        _warned.add(str(path))
        warnings.warn(
            f"tune: {path} could not be used{' as a whole' if followed else ''}, delete it if it "
            "is damaged; linear goes by its built-in tables"
            f"{' for the rest' if followed else ''}: {_described(failures[0])}",
            stacklevel=2,
        )


_library = torch.library.Library("torch_q4", "IMPL")
_library.impl("_load_linear_plans", _load_linear_plans, "CompositeExplicitAutograd")
_ops._use_saved_plans.default()
