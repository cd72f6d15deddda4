"""Files to files: quantise, dequantise, compare, describe, tensor by tensor.

Every tensor goes through memory in panels of rows, and pages of the mapped source are given back as
soon as they were used, so files may be larger than memory. Sources are GGUF files, safetensors
files, packed or not, and folders of a Hugging Face model; targets are GGUF or safetensors files, by
their suffix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_q4 import recipes
from torch_q4._files import require_file
from torch_q4._tensors import TensorInfo, info_of, release
from torch_q4.checkpoint import (
    _TIES,
    SafetensorsFile,
    SafetensorsWriter,
    _files_of,
    load_safetensors,
)
from torch_q4.formats import Format
from torch_q4.gguf import GGUFFile, GGUFOpaque, GGUFTensor, _format_of, load_gguf
from torch_q4.gguf_write import GGUFMetadata, GGUFWriter
from torch_q4.importance import Importance, for_tensor
from torch_q4.ops import dequantize, find_not_finite

__all__ = [
    "BytesError",
    "Comparison",
    "Conversion",
    "TensorError",
    "compare_files",
    "dequantize_file",
    "open_file",
    "quantize_file",
]

# Elements in memory at once: 16 MiB of float32, and enough rows for all cores.
_PANEL = 1 << 22
_QUANTIZATION_VERSION = 2  # ggml's: of the K formats' scales
_quantize = torch.ops.torch_q4.quantize.default  # what is not finite was looked for already
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}

Source = GGUFFile | SafetensorsFile


def open_file(path: str | os.PathLike[str]) -> Source:
    """Opens a GGUF file, a safetensors file, or a folder with safetensors, whichever it is.

    Of a split GGUF file any part opens all of it.

    Raises:
        OSError: the file cannot be opened, or is a device or a FIFO, which cannot be mapped.
        ValueError: it is neither, or damaged.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        return load_safetensors(name)
    require_file(name, "open_file")
    with open(name, "rb") as file:
        magic = file.read(4)
    return load_gguf(name) if magic == b"GGUF" else load_safetensors(name)


_ALLOCATION = re.compile(
    r"(allocate|not enough|out of|lack of|no) memory|memory must|bad_alloc", re.IGNORECASE
)


def lack_of_memory(error: BaseException) -> str | None:
    """What there was no memory for, as far as an error says so; None for an error of another kind.

    torch's allocators raise RuntimeError, with the place in their sources; numpy raises
    MemoryError; maps raise OSError.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _ALLOCATION.search(text):
        count = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        return f"got none for {count[1]}" if count else text.splitlines()[0]
    if isinstance(error, MemoryError):
        return text or "got none, of how much is not known"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return f"got none to map {error.filename}" if error.filename else "got none for a map"
    return None


@contextlib.contextmanager
def _enough_memory(op: str, info: TensorInfo) -> Iterator[None]:
    """Says which tensor there was no memory for."""
    try:
        yield
    except Exception as error:
        lack = lack_of_memory(error)
        if lack is None:
            raise
        raise MemoryError(
            f"{op}: memory must hold a part of tensor {info.name!r} of {info.nbytes} bytes, {lack}"
        ) from error


# ---- conversion ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Item:
    """One tensor of the target, and how it comes from the source's.

    Attributes:
        info: the target's entry.
        source: the source's tensor.
        order: the source's row for each of the target's, or None for the same.
        offset: what is added to the values.
        importance: ``(matrices, K)`` float32, or None.
    """

    info: TensorInfo
    source: GGUFTensor
    order: Tensor | None = None
    offset: float = 0.0
    importance: Tensor | None = None

    @property
    def copied(self) -> bool:
        """Whether the bytes stay, apart from the order of rows."""
        same = self.info.format == self.source.format and self.info.dtype == self.source.dtype
        return same and not self.offset

    def panels(self, found: Callable[[float, tuple[int, ...]], None]) -> Iterator[Tensor]:
        """The target's rows, a panel at a time: contiguous, in the target's dtype or its blocks.

        Args:
            found: called with a value to quantise that is not finite and its place in the source,
                the first of a panel.
        """
        info = self.info
        stored = self.source.data
        if isinstance(info.format, GGUFOpaque):  # which has no rows that are known
            for part in stored.split(_PANEL):
                yield part
                release(part)
            return
        rows = stored.reshape(info.rows, -1)
        height = max(1, _PANEL // max(info.columns, 1))
        matrix = info.shape[-2] if len(info.shape) > 1 else 1  # rows with one importance
        start = 0
        while start < info.rows:
            stop = min(start + height, info.rows)
            weights = None
            if self.importance is not None:
                which = start // matrix
                stop = min(stop, (which + 1) * matrix)
                weights = self.importance[which]
            panel = rows[start:stop] if self.order is None else rows[self.order[start:stop]]
            if self.copied:
                yield panel.contiguous()
            elif info.format is None:
                yield self.values(panel).to(info.dtype).contiguous()
            else:
                values = self.values(panel)
                if values.dtype == torch.float64:
                    values = values.float()
                place = find_not_finite(values)
                if place is not None:
                    row = start + place[0]
                    if self.order is not None:
                        row = int(self.order[row])
                    found(float(values[place]), self.place_in_source(row, place[1]))
                yield _quantize(values, info.format.type_id, weights)
            if self.order is None:
                release(rows[start:stop])
            start = stop
        release(stored)

    def values(self, panel: Tensor) -> Tensor:
        """Rows of the source as numbers."""
        packed = _format_of("convert", self.source)
        values = panel if packed is None else dequantize(panel, packed)
        return values.float() + self.offset if self.offset else values

    def place_in_source(self, row: int, column: int) -> tuple[int, ...]:
        """The index of an element by its row of all rows."""
        index = [column]
        for size in reversed(self.source.shape[:-1]):
            row, rest = divmod(row, size)
            index.insert(0, rest)
        return tuple(index)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A target: its tensors in order, and its metadata."""

    items: list[_Item]
    metadata: GGUFMetadata | dict[str, str]
    to_gguf: bool
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did, or would do.

    Attributes:
        source: the source's path.
        target: the target's path.
        tensors: for each tensor its name, shape, type before and after, and bytes before and after.
        bytes_before: bytes of all tensors before.
        bytes_after: bytes of all tensors after.
        elements: elements of all tensors.
        seconds: how long it took; 0 for a dry run.
        notes: what a user should know about it.
    """

    source: str
    target: str
    tensors: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int
    elements: int
    seconds: float
    notes: list[str]

    @property
    def bits_per_weight(self) -> float:
        """Bits per element after the conversion."""
        return 8 * self.bytes_after / max(self.elements, 1)


def quantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    *,
    importance: Importance | Mapping[str, Tensor] | None = None,
    importance_path: str | None = None,
    pure: bool = False,
    overrides: Sequence[tuple[str, Format | str]] = (),
    allow_requantize: bool = False,
    allow_nonfinite: bool = False,
    like: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Conversion:
    """Quantises a file's matrices, each to the format that a mix gives it.

    A tensor of a type that there is no format for is copied where the mix quantises it not, into a
    GGUF file, and else refused before anything is written.

    Args:
        source: a GGUF file, a safetensors file, or a folder of a Hugging Face model. Of a split
            GGUF file any part stands for all of it; what is written is one file.
        target: a ``.gguf`` or ``.safetensors`` file. A safetensors source becomes a GGUF file only
            with its ``config.json`` beside it, since names, rows and metadata follow from that.
        type: the mix, see :mod:`torch_q4.recipes`.
        importance: each tensor's importance by GGUF's names, see :func:`load_importance`.
        importance_path: what to note in the target's metadata as the importance's file.
        pure: give every matrix the mix's base format.
        overrides: ``(pattern, format)`` for tensors that shall have another format.
        allow_requantize: quantise what is quantised already, which adds one error to another.
        allow_nonfinite: quantise what holds NaN or infinities, which spoil the other values of
            their blocks.
        like: a GGUF file whose metadata, tokenizer included, a safetensors source shall get.
        dry_run: only find out what would be done.
        progress: show a bar on stderr; None: if that is a terminal.

    Raises:
        ValueError: an unknown type or architecture; a source that is quantised already, not finite,
            or of a type that there is no format for; an importance that does not fit, is negative
            or not finite; or a damaged file.
        OSError: a file cannot be read or written.
        MemoryError: there is not enough of it.
    """
    recipe = recipes.get(type)

    def choose(
        infos: list[TensorInfo], facts: recipes.ModelFacts | None
    ) -> dict[str, recipes.Type]:
        return recipes.choose(
            recipe,
            infos,
            facts,
            has_importance=importance is not None,
            pure=pure,
            overrides=overrides,
        )

    plan = _planned("quantize", source, target, choose, importance, like, importance_path)
    again = [
        item.info.name
        for item in plan.items
        if not item.copied and item.source.format is not None and item.info.format is not None
    ]
    if again and not allow_requantize:
        raise ValueError(
            f"quantize: the source must not be quantised already (requantising loses quality, "
            f"--allow-requantize does it all the same), got {len(again)} such tensors, the first "
            f"{again[0]!r}"
        )
    if again:
        plan.notes.append(f"{len(again)} tensors were quantised already and are quantised again")
    if isinstance(plan.metadata, GGUFMetadata):
        plan.metadata.set("general.quantization_version", _QUANTIZATION_VERSION, "uint32")
        plan.metadata.set("general.file_type", recipe.file_type, "uint32")
        if importance is not None:
            _note_importance(plan.metadata, importance, importance_path)
    if importance is not None:
        used = sum(item.importance is not None for item in plan.items)
        wanted = [
            item.info.name
            for item in plan.items
            if item.importance is None
            and item.info.format is not None
            and not item.copied
            and item.info.name not in ("token_embd.weight", "output.weight")
        ]
        if not used:
            raise ValueError(
                "quantize: the importance matrix must have entries for tensors of the model, "
                f"got none of {len(importance)}"
            )
        if wanted:
            plan.notes.append(f"{len(wanted)} tensors have no importance, the first {wanted[0]!r}")
    return _carried_out("quantize", plan, source, target, dry_run, progress, allow_nonfinite)


def dequantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    like: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Conversion:
    """Writes a file's packed tensors as plain numbers; the others stay as they are.

    A tensor of a type that there is no format for is refused before anything is written.

    Args:
        source: as of :func:`quantize_file`.
        target: a ``.gguf`` or ``.safetensors`` file.
        dtype: float32, float16 or bfloat16.
        like: as of :func:`quantize_file`.
        dry_run: only find out what would be done.
        progress: show a bar on stderr; None: if that is a terminal.

    Raises:
        ValueError: another dtype, a tensor of a type that there is no format for, or a damaged
            file.
        OSError: a file cannot be read or written.
        MemoryError: there is not enough of it.
    """
    if dtype not in _FILE_TYPES:
        raise ValueError(f"dequantize: dtype must be float32, float16 or bfloat16, got {dtype}")

    def choose(
        infos: list[TensorInfo], facts: recipes.ModelFacts | None
    ) -> dict[str, recipes.Type]:
        return {info.name: dtype if info.format is not None else info.dtype for info in infos}

    plan = _planned("dequantize", source, target, choose, None, like)
    if isinstance(plan.metadata, GGUFMetadata):
        plan.metadata.set("general.file_type", _FILE_TYPES[dtype], "uint32")
    return _carried_out("dequantize", plan, source, target, dry_run, progress)


def _note_importance(
    metadata: GGUFMetadata, importance: Mapping[str, Tensor], path: str | None
) -> None:
    """The keys by which llama.cpp's tool notes an importance matrix."""
    if path:
        metadata.set("quantize.imatrix.file", path, "string")
    if isinstance(importance, Importance):
        if importance.datasets:
            metadata.set("quantize.imatrix.dataset", importance.datasets[0], "string")
        metadata.set("quantize.imatrix.chunks_count", importance.chunks, "uint32")
    metadata.set("quantize.imatrix.entries_count", len(importance), "uint32")


Chooser = Callable[[list[TensorInfo], recipes.ModelFacts | None], dict[str, recipes.Type]]


def _planned(
    op: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    choose: Chooser,
    importance: Mapping[str, Tensor] | None,
    like: str | os.PathLike[str] | None,
    importance_path: str | None = None,
) -> _Plan:
    suffix = os.path.splitext(os.fspath(target))[1].lower()
    if suffix not in (".gguf", ".safetensors"):
        raise ValueError(
            f"{op}: the target must end in .gguf or .safetensors, got {os.fspath(target)!r}"
        )
    to_gguf = suffix == ".gguf"
    file = open_file(source)
    sources = files_of(file)
    others = [os.fspath(path) for path in (like, importance_path) if path is not None]
    for path in [*sources, *others] if os.path.exists(target) else []:
        if os.path.exists(path) and os.path.samefile(path, target):
            what = "the source" if path in sources else "those that it is made from"
            raise ValueError(
                f"{op}: the target must be another file than {what}, got {os.fspath(target)!r}"
            )
    notes: list[str] = []
    if isinstance(file, GGUFFile):
        if like is not None:
            raise ValueError(f"{op}: like must go with a safetensors source, got a GGUF file")
        infos = [info_of(tensor) for tensor in file.tensors.values()]
        facts = (
            recipes.ModelFacts.from_metadata(file.metadata)
            if file.architecture in recipes.ARCHITECTURES
            else recipes.ModelFacts(str(file.architecture), 0, 0, 0)
        )
        types = choose(infos, facts)
        items = [
            _Item(
                _retyped(info, types[info.name], info.name),
                file.tensors[info.name],
                importance=_importance_of(importance, info, types[info.name]),
            )
            for info in infos
        ]
        for item in items:
            if not (item.copied and to_gguf):
                _format_of(op, item.source, file.path)
        metadata: GGUFMetadata | dict[str, str] = GGUFMetadata(file) if to_gguf else {}
        return _Plan(items, metadata, to_gguf, notes)

    config = _config_beside(file)
    if config is None:
        if to_gguf:
            raise ValueError(
                f"{op}: a GGUF target must have the config.json of its safetensors source beside "
                f"that, got none ({file.path})"
            )
        infos = [info_of(tensor) for tensor in file.tensors.values()]
        types = choose(infos, None)
        items = [
            _Item(
                _retyped(info, types[info.name], info.name),
                file.tensors[info.name],
                importance=_importance_of(importance, info, types[info.name]),
            )
            for info in infos
        ]
        return _Plan(items, _kept_metadata(file, file.ties), False, notes)
    return _from_hugging_face(op, file, config, to_gguf, choose, importance, like, notes)


def _from_hugging_face(
    op: str,
    file: SafetensorsFile,
    config: str,
    to_gguf: bool,
    choose: Chooser,
    importance: Mapping[str, Tensor] | None,
    like: str | os.PathLike[str] | None,
    notes: list[str],
) -> _Plan:
    """The plan for a Hugging Face model: GGUF's names decide, whatever the target is."""
    from torch_q4.integrations.gguf_export import Export

    export = Export.from_folder(os.path.dirname(config), len(file.tensors), like)
    names = {
        name: export.tensor_name(name) for name in file.tensors if not export.is_left_out(name)
    }
    infos = [
        dataclasses.replace(info_of(file.tensors[name]), name=gguf_name)
        for name, gguf_name in names.items()
    ]
    types = choose(infos, export.facts)
    items = []
    for info, name in zip(infos, names, strict=True):
        chosen = types[info.name]
        if to_gguf and (len(info.shape) < 2 or "_norm.weight" in info.name):
            chosen = torch.float32  # as llama.cpp's converter has it, and its kernels need it
        items.append(
            _Item(
                _retyped(info, chosen, info.name if to_gguf else name),
                file.tensors[name],
                order=export.row_order(name, info.rows) if to_gguf else None,
                offset=export.offset(name) if to_gguf else 0.0,
                importance=_importance_of(importance, info, chosen),
            )
        )
    if not to_gguf:
        ties = {name: source for name, source in file.ties.items() if source in names}
        return _Plan(items, _kept_metadata(file, ties | export.ties(names)), False, notes)
    for name, values in export.extra_tensors().items():
        tensor = GGUFTensor(name, None, tuple(values.shape), values)
        items.append(_Item(info_of(tensor), tensor))
    items = export.in_order(items, lambda item: item.info.name)
    metadata = export.metadata()
    notes += export.notes
    return _Plan(items, metadata, True, notes)


def _kept_metadata(file: SafetensorsFile, ties: Mapping[str, str]) -> dict[str, str]:
    """A safetensors file's notes, without those that the writer makes anew."""
    kept = {key: value for key, value in file.metadata.items() if not key.startswith("torch_q4.")}
    return kept | ({_TIES: json.dumps(ties)} if ties else {})


def _config_beside(file: SafetensorsFile) -> str | None:
    folder = file.path if os.path.isdir(file.path) else os.path.dirname(file.path)
    path = os.path.join(folder, "config.json")
    return path if os.path.isfile(path) else None


def _retyped(info: TensorInfo, type: recipes.Type, name: str) -> TensorInfo:
    if isinstance(type, (Format, GGUFOpaque)):
        return TensorInfo(name, type, info.shape)
    return TensorInfo(name, None, info.shape, type)


def _importance_of(
    importance: Mapping[str, Tensor] | None, info: TensorInfo, type: recipes.Type
) -> Tensor | None:
    return for_tensor(importance, info.name, info.shape) if isinstance(type, Format) else None


def _carried_out(
    op: str,
    plan: _Plan,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dry_run: bool,
    progress: bool | None,
    allow_nonfinite: bool = False,
) -> Conversion:
    before = [info_of(item.source) for item in plan.items]
    rows = [
        {
            "name": item.info.name,
            "shape": list(item.info.shape),
            "from": old.type_name,
            "to": item.info.type_name,
            "bytes_before": old.nbytes,
            "bytes_after": item.info.nbytes,
        }
        for item, old in zip(plan.items, before, strict=True)
    ]
    began = time.perf_counter()
    if not dry_run:
        _write(op, plan, target, progress, allow_nonfinite)
    return Conversion(
        os.fspath(source),
        os.fspath(target),
        rows,
        sum(info.nbytes for info in before),
        sum(item.info.nbytes for item in plan.items),
        sum(item.info.elements for item in plan.items),
        0.0 if dry_run else time.perf_counter() - began,
        plan.notes,
    )


def _write(
    op: str,
    plan: _Plan,
    target: str | os.PathLike[str],
    progress: bool | None,
    allow_nonfinite: bool,
) -> None:
    writer: GGUFWriter | SafetensorsWriter
    infos = [item.info for item in plan.items]
    if plan.to_gguf:
        writer = GGUFWriter(target, plan.metadata, infos)
    else:
        assert isinstance(plan.metadata, dict)
        writer = SafetensorsWriter(target, infos, plan.metadata)
    items = {item.info.name: item for item in plan.items}
    spoiled: dict[str, None] = {}  # in order

    def found(name: str, value: float, place: tuple[int, ...]) -> None:
        if not allow_nonfinite:
            raise ValueError(
                f"{op}: tensor {name!r} must be finite (--allow-nonfinite quantises it all the "
                f"same), got {value} at {place}"
            )
        spoiled[name] = None

    total = sum(info_of(item.source).nbytes for item in plan.items)
    with writer, progress_bar(op, total, progress) as bar:
        for done, info in enumerate(writer.infos, start=1):
            item = items[info.name]
            share = info_of(item.source).nbytes / info.nbytes if info.nbytes else 0
            with _enough_memory(op, info):
                for panel in item.panels(functools.partial(found, item.source.name)):
                    bar.update(writer.write(panel) * share)
            bar.set_postfix_str(f"{done}/{len(infos)} tensors", refresh=False)
    if spoiled:
        plan.notes.append(
            f"{len(spoiled)} tensors are not finite, and blocks of theirs are spoiled, the first "
            f"{next(iter(spoiled))!r}"
        )


class _NoBar:
    """Stands in for a progress bar where tqdm is not installed."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, count: float) -> None:
        """Does nothing."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Does nothing."""


def progress_bar(op: str, total: int, progress: bool | None) -> Any:
    """A bar on stderr over bytes, with their rate and the time left.

    Args:
        op: what is done.
        total: bytes.
        progress: whether to show it; None: if stderr is a terminal.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    disable = None if progress is None else not progress
    return tqdm(total=total, desc=op, unit="B", unit_scale=True, disable=disable)


# ---- comparison ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorError:
    """How far a tensor of one file is from that of another.

    Attributes:
        name: the tensor.
        shape: its shape.
        type_a: its type in the first file, the reference.
        type_b: its type in the second.
        nmse: ``sum (a - b)**2 / sum a**2``; 0 if both are zero, infinite if only a is.
        max_error: ``max |a - b|``.
        cosine: the cosine of the angle between a and b as vectors; 1 if both are zero.
        nonfinite: places where a or b is NaN or infinite and the other is not the same. If there
            are any, ``nmse`` and ``max_error`` are infinite and ``cosine`` is NaN. Places where
            both are NaN, or the same infinity, count as equal.
    """

    name: str
    shape: tuple[int, ...]
    type_a: str
    type_b: str
    nmse: float
    max_error: float
    cosine: float
    nonfinite: int = 0


@dataclasses.dataclass(frozen=True)
class BytesError:
    """How far a tensor that has no values here, at least in one file, is from that of another.

    Attributes:
        name: the tensor.
        shape: its shape.
        type_a: its type in the first file.
        type_b: its type in the second.
        nbytes: its bytes in the first file.
        different: how many bytes differ; None where the types do, so that the bytes tell nothing.
    """

    name: str
    shape: tuple[int, ...]
    type_a: str
    type_b: str
    nbytes: int
    different: int | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two files differ.

    Attributes:
        tensors: the tensors that both have, in the first file's order.
        opaque: those of a type that there is no format for, whose bytes are compared.
        only_a: names that only the first file has.
        only_b: names that only the second file has.
        shapes_differ: names whose shapes differ, which are not compared further.
    """

    tensors: list[TensorError]
    opaque: list[BytesError]
    only_a: list[str]
    only_b: list[str]
    shapes_differ: list[str]


def compare_files(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: bool | None = None
) -> Comparison:
    """Compares the values of two files' tensors, name by name, in float64.

    Of tensors of types that there is no format for, the bytes are compared.

    Args:
        a: the reference: a GGUF file, any part of a split one, a safetensors file, or a folder of
            such.
        b: what is compared with it.
        progress: show a bar on stderr; None: if that is a terminal.

    Raises:
        ValueError: no tensor in common, or a damaged file.
        OSError: a file cannot be read.
        MemoryError: there is not enough of it.
    """
    first, second = open_file(a), open_file(b)
    common = [name for name in first.tensors if name in second.tensors]
    if not common:
        raise ValueError(
            f"compare: the files must have tensors of the same names, got none in common "
            f"({first.path}, {second.path})"
        )
    differ = [n for n in common if first.tensors[n].shape != second.tensors[n].shape]
    same = [name for name in common if name not in differ]
    total = sum(first.tensors[name].nbytes for name in same)
    errors: list[TensorError] = []
    opaque: list[BytesError] = []
    with progress_bar("compare", total, progress) as bar:
        for done, name in enumerate(same, start=1):
            x, y = first.tensors[name], second.tensors[name]
            with _enough_memory("compare", info_of(x)):
                if isinstance(x.format, GGUFOpaque) or isinstance(y.format, GGUFOpaque):
                    opaque.append(_bytes_error(x, y, bar.update))
                else:
                    errors.append(_error(x, y, bar.update))
            bar.set_postfix_str(f"{done}/{len(same)} tensors", refresh=False)
    return Comparison(
        errors,
        opaque,
        [name for name in first.tensors if name not in second.tensors],
        [name for name in second.tensors if name not in first.tensors],
        differ,
    )


def _bytes_error(a: GGUFTensor, b: GGUFTensor, update: Callable[[float], Any]) -> BytesError:
    info, other = info_of(a), info_of(b)
    different = None
    if info.type_name == other.type_name:
        common = min(a.nbytes, b.nbytes)  # of a type of unknown size either may have padding
        different = max(a.nbytes, b.nbytes) - common
        for start in range(0, common, _PANEL):
            stop = min(start + _PANEL, common)
            part_a, part_b = a.data[start:stop], b.data[start:stop]
            different += int((part_a != part_b).sum())
            release(part_a)
            release(part_b)
    update(a.nbytes)
    return BytesError(a.name, a.shape, info.type_name, other.type_name, a.nbytes, different)


def _error(a: GGUFTensor, b: GGUFTensor, update: Callable[[float], Any]) -> TensorError:
    info, other = info_of(a), info_of(b)
    format_a, format_b = _format_of("compare", a), _format_of("compare", b)
    rows_a, rows_b = (t.data.reshape(info.rows, -1) for t in (a, b))
    height = max(1, _PANEL // 8 // max(info.columns, 1))  # float64, and several of them
    squares_a = squares_b = product = error = largest = 0.0
    nonfinite = 0
    for start in range(0, info.rows, height):
        part_a, part_b = rows_a[start : start + height], rows_b[start : start + height]
        x, y = _doubles(part_a, format_a), _doubles(part_b, format_b)
        if find_not_finite(x) is not None or find_not_finite(y) is not None:
            finite = x.isfinite() & y.isfinite()
            same = (x == y) | (x.isnan() & y.isnan())
            nonfinite += int((~finite & ~same).sum())
            x, y = x.where(finite, 0.0), y.where(finite, 0.0)
        product += float(x @ y)
        squares_a += float(x @ x)
        squares_b += float(y @ y)
        y -= x
        if a.dtype == b.dtype == torch.int64:  # of which float64 holds 53 bits
            y = torch.where(y == 0, (part_b - part_a).flatten().double(), y)
        error += float(y @ y)
        if y.numel():
            largest = max(largest, float(y.max()), -float(y.min()))
        release(part_a)
        release(part_b)
        update(part_a.nbytes)
    release(a.data)
    release(b.data)
    nmse = error / squares_a if squares_a else (0.0 if error == 0 else math.inf)
    lengths = squares_a**0.5 * squares_b**0.5
    cosine = product / lengths if lengths else (1.0 if squares_a == squares_b else 0.0)
    if nonfinite:
        nmse = largest = math.inf
        cosine = math.nan
    return TensorError(
        a.name, a.shape, info.type_name, other.type_name, nmse, largest,
        cosine if math.isnan(cosine) else min(cosine, 1.0), nonfinite,
    )  # fmt: skip


def _doubles(rows: Tensor, fmt: Format | None) -> Tensor:
    values = rows if fmt is None else dequantize(rows, fmt)
    return values.to(torch.float64).flatten()


def files_of(file: Source) -> list[str]:
    """The paths of the files that were read."""
    return list(file.parts) if isinstance(file, GGUFFile) else _files_of(file.path)


def architecture_of(file: Source) -> str | None:
    """What a file says it is: GGUF's architecture, or transformers' type of the model."""
    if isinstance(file, GGUFFile):
        return file.architecture
    config = _config_beside(file)
    if config is None:
        return None
    with open(config, encoding="utf-8") as stream:
        try:
            value = json.load(stream).get("model_type")
        except (ValueError, AttributeError, RecursionError):
            return None
    return value if isinstance(value, str) else None
