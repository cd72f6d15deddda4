"""Reads GGUF files: memory-mapped, every tensor a zero-copy view.

Why not the ``gguf`` package's reader: it trusts the file. It loops over whatever array length the
header claims, so that one damaged count never returns; other damage surfaces as numpy's IndexError
or a failed reshape, naming neither tensor nor file; and since it makes several numpy objects of
each string, a vocabulary of 262 144 tokens costs it several seconds and about 700 MB. The parser
below checks the whole structure against the file's size before it builds any value, and reads the
same file in a few tenths of a second and 50 MB.

The layout is that of ``docs/gguf.md`` in ggml's repository, versions 2 and 3, little-endian::

    magic "GGUF" | version u32 | tensor count u64 | key count u64
    key count    x  key string | value type u32 | value
    tensor count x  name string | dimension count u32 | dimensions u64... | type u32 | offset u64
    padding to ``general.alignment`` | tensor data

A string is its length as u64, then UTF-8. An array is its element type u32, its length u64, then
the elements.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from torch_q4 import formats
from torch_q4.formats import Format
from torch_q4.ops import dequantize

__all__ = ["GGUFError", "GGUFFile", "GGUFTensor", "load_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 had 32-bit counts; none of its files are around
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NESTING = 4  # arrays of arrays are legal, but no writer makes them: this bounds recursion

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# Value types of fixed size, as struct codes.
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
# The fewest bytes that each kind of entry takes: what bounds the counts a file may claim.
_MIN_VALUE_BYTES = {kind: code.size for kind, code in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

# ggml's types that are plain numbers.
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# Names of every type that ggml gives a number, so that an error can name what it refuses.
_GGML_TYPE_NAMES = {
    **dict(enumerate(["F32", "F16", "Q4_0", "Q4_1"])),
    **dict(enumerate(["Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K"], start=6)),
    **dict(enumerate(["Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S"], start=14)),
    **dict(enumerate(["IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32"], start=20)),
    **dict(enumerate(["I64", "F64", "IQ1_M", "BF16"], start=27)),
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}


class GGUFError(ValueError):
    """A file that is not a GGUF file, is damaged, or holds what this library cannot read."""


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: the tensor's name in the file.
        format: its block format, or None where it holds plain numbers.
        shape: its logical shape in torch's order: ``(out_features, in_features)`` for a weight.
        data: a zero-copy view of the mapped file. With a format, uint8
            ``(*shape[:-1], bytes_per_row)``; else ``shape`` in the stored dtype.
    """

    name: str
    format: Format | None
    shape: tuple[int, ...]
    data: Tensor = dataclasses.field(repr=False)

    @property
    def blocks(self) -> Tensor:
        """The packed blocks, uint8 ``(*shape[:-1], bytes_per_row)``, as a view of the file.

        Raises:
            ValueError: the tensor holds plain numbers; they are in :attr:`data`.
        """
        if self.format is None:
            raise ValueError(
                f"GGUFTensor.blocks: {self.name!r} must have a block format, got {self.dtype}"
            )
        return self.data

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of :attr:`data`: ``torch.uint8`` for packed blocks."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.data.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as ``dtype``, of shape :attr:`shape`.

        Returns:
            A new tensor; for plain numbers that are stored as ``dtype``, the view itself.
        """
        if self.format is None:
            return self.data.to(dtype)
        return dequantize(self.data, self.format, dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class GGUFFile:
    """A memory-mapped GGUF file.

    There is no ``close``: the map lives as long as any tensor that views it, so none can dangle.
    It is copy-on-write, so writing to a tensor changes neither the file nor other readers of it.
    Truncating the file while it is mapped makes later reads fail with SIGBUS, as for any map.

    Attributes:
        path: where it was read from.
        version: GGUF version.
        alignment: bytes to which tensor data is aligned.
        architecture: ``general.architecture``, or None where the file does not say.
        metadata: key to str, int, float, bool or a list of these, in file order.
        tensors: name to :class:`GGUFTensor`, in file order.
    """

    path: str
    version: int
    alignment: int
    architecture: str | None
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __repr__(self) -> str:
        """Counts, not contents: a vocabulary has hundreds of thousands of entries."""
        return (
            f"GGUFFile({self.path!r}, architecture={self.architecture!r}, "
            f"{len(self.metadata)} keys, {len(self.tensors)} tensors, "
            f"{sum(tensor.nbytes for tensor in self.tensors.values())} tensor bytes)"
        )


def load_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Maps a GGUF file and reads its metadata; tensor data stays on disk until it is used.

    Args:
        path: a ``.gguf`` file.

    Returns:
        The file's metadata, and its tensors as views of the map.

    Raises:
        OSError: the file cannot be opened or mapped.
        GGUFError: the file is not GGUF, is damaged or truncated, or holds a tensor of an unknown
            type. A ``ValueError``; the message has the rule that does not hold, the value and the
            path.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise GGUFError(f"load_gguf: a file must have at least 24 bytes, got {size} ({name})")
        data = mmap.mmap(
            file.fileno(),
            size,
            # Private and writable is copy-on-write. Without NORESERVE the kernel would count the
            # whole file against memory and refuse to map one larger than that.
            flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000),
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    return _Parser(data, name).parse()


@dataclasses.dataclass(frozen=True)
class _TensorInfo:
    """An entry of the tensor table: dimensions in file order, the offset from the data's start."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


class _Parser:
    """A cursor over the map that never passes the file's end."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.pos = 0

    def fail(self, rule: str, value: object) -> NoReturn:
        raise GGUFError(f"load_gguf: {rule}, got {value} ({self.path})")

    def take(self, count: int, what: str) -> int:
        """Moves past ``count`` bytes and returns where they start."""
        start = self.pos
        if start + count > self.size:
            self.fail(f"{what} must end within the file, at byte {self.size}", start + count)
        self.pos = start + count
        return start

    def number(self, code: struct.Struct, what: str) -> Any:
        return code.unpack_from(self.data, self.take(code.size, what))[0]

    def string(self, what: str) -> str:
        length = self.number(_U64, what)
        start = self.take(length, what)
        return self.decode(start, self.pos, what)

    def decode(self, start: int, end: int, what: str) -> str:
        raw = self.data[start:end]
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} must be UTF-8", f"{raw[error.start : error.start + 8]!r}")

    def count(self, each: int, what: str) -> int:
        """A count of entries, of at least ``each`` bytes: more than fit are refused at once."""
        count: int = self.number(_U64, what)
        limit = (self.size - self.pos) // each
        if count > limit:
            self.fail(f"{what} must be at most the {limit} that fit into the file", count)
        return count

    def value(self, kind: int, what: str, build: bool, depth: int = 0) -> Any:
        """A metadata value of type ``kind``; if not ``build``, only moves past it."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.strings(1, what, build)[0]
        if kind != _ARRAY:
            self.fail(f"{what} must have a value type of 0 to 12", kind)
        if depth == _MAX_NESTING:
            self.fail(f"{what} must nest at most {_MAX_NESTING} arrays", "more")
        element = self.number(_U32, what)
        if element not in _MIN_VALUE_BYTES:
            self.fail(f"{what} must have an element type of 0 to 12", element)
        count = self.count(_MIN_VALUE_BYTES[element], f"the length of {what}")
        if element in _SCALARS:
            code = _SCALARS[element]
            start = self.take(count * code.size, what)
            # "<3f": one call for the whole array.
            return (
                list(struct.unpack_from(f"<{count}{code.format[1:]}", self.data, start))
                if build
                else None
            )
        if element == _STRING:
            return self.strings(count, what, build)
        values = [self.value(_ARRAY, what, build, depth + 1) for _ in range(count)]
        return values if build else None

    def strings(self, count: int, what: str, build: bool) -> list[str]:
        """``count`` strings; a loop with nothing to spare, since vocabularies are large."""
        data, pos, size, unpack = self.data, self.pos, self.size, _U64.unpack_from
        values: list[str] = []
        for _ in range(count):
            start = pos + 8
            if start <= size:
                pos = start + unpack(data, pos)[0]
            if max(start, pos) > size:
                self.fail(f"{what} must end within the file, at byte {size}", max(start, pos))
            if build:
                try:
                    values.append(str(data[start:pos], "utf-8"))
                except UnicodeDecodeError:
                    self.decode(start, pos, what)
        self.pos = pos
        return values if build else [""]

    def parse(self) -> GGUFFile:
        version, tensor_count, key_count = self.header()
        # First all of the structure, then the values: a wrong length leads to nonsense a few
        # entries later, and is found before lists as long as it says are made.
        places = dict(self.keys(key_count))
        infos = self.tensor_infos(tensor_count)
        data_start = self.pos

        metadata = {}
        for key, (kind, place) in places.items():
            self.pos = place
            metadata[key] = self.value(kind, f"metadata {key!r}", build=True)

        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        # A power of two has one bit set. (A bool is an int, hence `type`.)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail("general.alignment must be a power of two", repr(alignment))
        architecture = metadata.get("general.architecture")
        if architecture is not None and not isinstance(architecture, str):
            self.fail("general.architecture must be a string", repr(architecture))

        data_start += -data_start % alignment
        places_of_data = [self.locate(info, data_start, alignment) for info in infos]
        # numpy holds the map, the tensors hold numpy's array: the map goes when the last one does.
        base = torch.from_numpy(np.frombuffer(self.data, dtype=np.uint8))
        tensors = {
            info.name: _view(base, info, start, end)
            for info, (start, end) in zip(infos, places_of_data, strict=True)
        }
        return GGUFFile(self.path, version, alignment, architecture, metadata, tensors)

    def header(self) -> tuple[int, int, int]:
        """Version, tensor count, key count."""
        magic = self.data[self.take(4, "the magic") : self.pos]
        if magic != _MAGIC:
            self.fail(f"a file must start with {_MAGIC!r}", repr(magic))
        version = self.number(_U32, "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in (1, *_VERSIONS):
                self.fail("a file must be little-endian", f"big-endian version {swapped}")
            self.fail(f"the version must be one of {_VERSIONS}", version)
        tensor_count = self.count(_MIN_TENSOR_BYTES, "the tensor count")
        key_count = self.count(_MIN_KEY_BYTES, "the metadata key count")
        return version, tensor_count, key_count

    def keys(self, count: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """Key, and the type and place of its value."""
        seen = set()
        for index in range(count):
            key = self.string(f"metadata key {index}")
            what = f"metadata {key!r}"
            if key in seen:
                self.fail("a metadata key must occur once", f"{key!r} again")
            seen.add(key)
            kind = self.number(_U32, what)
            place = self.pos
            self.value(kind, what, build=False)
            yield key, (kind, place)

    def tensor_infos(self, count: int) -> list[_TensorInfo]:
        infos: dict[str, _TensorInfo] = {}
        for index in range(count):
            name = self.string(f"the name of tensor {index}")
            what = f"tensor {name!r}"
            if name in infos:
                self.fail("a tensor name must occur once", f"{name!r} again")
            n_dims = self.number(_U32, what)
            if n_dims > _MAX_DIMS:
                self.fail(f"{what} must have at most {_MAX_DIMS} dimensions", n_dims)
            dims = tuple(self.number(_U64, what) for _ in range(n_dims))
            kind = self.number(_U32, what)
            infos[name] = _TensorInfo(name, dims, kind, self.number(_U64, what))
        return list(infos.values())

    def locate(self, info: _TensorInfo, data_start: int, alignment: int) -> tuple[int, int]:
        """The bytes of the file that hold a tensor: from, to."""
        what = f"tensor {info.name!r}"
        elements = 1
        for dim in info.dims:
            elements *= dim
        if not 0 < elements < 1 << 63:
            self.fail(f"{what} must have 1 to 2**63 - 1 elements", f"dimensions {info.dims}")
        if info.kind in _PLAIN:
            item = _PLAIN[info.kind].itemsize
            nbytes = elements * item
        else:
            item = 1
            try:
                fmt = formats.get(info.kind)
            except ValueError:
                known = [str(dtype).removeprefix("torch.") for dtype in _PLAIN.values()]
                known += [fmt.name for fmt in formats.all() if fmt.type_id >= 0]
                name = _GGML_TYPE_NAMES.get(info.kind, "no type of ggml's")
                self.fail(f"{what} must be one of {', '.join(known)}", f"{info.kind} ({name})")
            columns = info.dims[0] if info.dims else 1
            if columns % fmt.block_elems:
                rule = f"{what} must have a multiple of {fmt.block_elems} columns for {fmt.name}"
                self.fail(rule, columns)
            nbytes = elements // columns * fmt.row_bytes(columns)
        if info.offset % alignment:
            self.fail(f"{what} must have an offset that is a multiple of {alignment}", info.offset)
        start = data_start + info.offset
        if start + nbytes > self.size:
            rule = f"{what} must lie within the file's {self.size} bytes"
            self.fail(rule, f"bytes {start} to {start + nbytes}")
        if start % item:  # possible only where the file sets an alignment below the default
            self.fail(f"{what} must start at a multiple of {item} bytes", start)
        return start, start + nbytes


def _view(base: Tensor, info: _TensorInfo, start: int, end: int) -> GGUFTensor:
    shape = info.dims[::-1]
    data = base[start:end]
    if info.kind in _PLAIN:
        return GGUFTensor(info.name, None, shape, data.view(_PLAIN[info.kind]).view(shape))
    fmt = formats.get(info.kind)
    return GGUFTensor(info.name, fmt, shape, data.view(*shape[:-1], fmt.row_bytes(shape[-1])))
