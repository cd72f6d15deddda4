"""Reads GGUF files: memory-mapped, every tensor a zero-copy view.

Why not the ``gguf`` package's reader: it trusts the file. It loops over whatever array length the
header claims, so that one damaged count never returns; other damage surfaces as numpy's IndexError
or a failed reshape, naming neither tensor nor file; and since it makes several numpy objects of
each string, a vocabulary of 262 144 tokens costs it several seconds and about 700 MB. The parser
below checks the whole structure against the file's size before it builds any value, and leaves
arrays as the bytes that they are: a file costs about as much memory as its metadata have bytes, and
time in proportion, whatever it holds.

What llama.cpp refuses (``gguf_init_from_file`` in ``ggml/src/gguf.cpp``) is refused here, too:
tensors that overlap or leave gaps, arrays of arrays, names of 64 bytes and more. Not so types: a
tensor of a type that this library has no format for is there as its bytes, :class:`GGUFOpaque`.

The layout is that of ``docs/gguf.md`` in ggml's repository, versions 2 and 3, little-endian::

    magic "GGUF" | version u32 | tensor count u64 | key count u64
    key count    x  key string | value type u32 | value
    tensor count x  name string | dimension count u32 | dimensions u64... | type u32 | offset u64
    padding to ``general.alignment`` | tensor data

A string is its length as u64, then UTF-8. An array is its element type u32, its length u64, then
the elements. The data of a tensor begin where those of the tensor before it end, padded to the
alignment. A model may be split into several such files, ``NAME-00001-of-00003.gguf`` and so on.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import reprlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from torch_q4 import formats
from torch_q4._files import require_file
from torch_q4.formats import Format
from torch_q4.ops import dequantize

__all__ = ["GGUFArray", "GGUFError", "GGUFFile", "GGUFOpaque", "GGUFTensor", "load_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 had 32-bit counts; none of its files are around
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less the byte that ends a string in C
_HEADER_BYTES = 24

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
_TYPE_NAMES = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6,
    "bool": 7, "string": _STRING, "array": _ARRAY, "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip
_NAMES_OF_TYPE = {kind: name for name, kind in _TYPE_NAMES.items()}
# The fewest bytes that each kind of entry takes: what bounds the counts a file may claim.
_MIN_ELEMENT_BYTES = {kind: code.size for kind, code in _SCALARS.items()} | {_STRING: 8}
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
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
# ggml's types of blocks: name, elements and bytes of a block. Those that the registry of formats
# has are tensors with a format; of the others this says how many bytes they take.
_BLOCKS = {
    2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136),
    29: ("iq1_m", 256, 56), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}  # fmt: skip

# The parts of a model that is split, as llama.cpp names and numbers them.
_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_SPLIT_KEYS = _SPLIT_NO, _SPLIT_COUNT, _SPLIT_TENSORS = (
    "split.no", "split.count", "split.tensors.count",
)  # fmt: skip
_MOST_PARTS = (1 << 16) - 1  # split.count is a uint16

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


class GGUFError(ValueError):
    """A file that is not a GGUF file, is damaged, or holds what this library cannot read."""


class _ArrayPlace(NamedTuple):
    """Where a file has an array: its elements' type, start and number; of strings, their ends."""

    kind: int
    start: int
    length: int
    ends: array[int] | None


class GGUFArray(Sequence[Any]):
    """An array of a file's metadata: a read-only sequence over the bytes of the file.

    Elements become Python's str, int, float or bool when they are asked for, so that an array costs
    the bytes that it has in the file, not several times as many. It equals a list or a tuple of the
    same values; a slice is a list. ``numpy.asarray(array)`` of numbers is a read-only view, without
    a copy.

    Attributes:
        type: the name of the elements' type: ``"uint8"`` ... ``"float64"``, ``"bool"`` or
            ``"string"``.
    """

    __slots__ = ("_count", "_ends", "_keys", "_kind", "_start")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, keys: bytes, place: _ArrayPlace) -> None:
        self._keys = keys  # the file up to the end of its keys, which all of its arrays share
        self._kind, self._start, self._count, self._ends = place

    @property
    def type(self) -> str:
        """The name of the elements' type."""
        return _NAMES_OF_TYPE[self._kind]

    def __len__(self) -> int:
        """How many elements there are."""
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """An element, or a list of those in a slice."""
        if isinstance(index, slice):
            if self._ends is None:
                return self._numbers()[index].tolist()
            return [self._string(place) for place in range(self._count)[index]]
        try:
            place = range(self._count)[index]
        except IndexError:
            raise IndexError(
                f"GGUFArray: an index must be below {self._count}, got {index}"
            ) from None
        return self._numbers()[place].item() if self._ends is None else self._string(place)

    def __iter__(self) -> Iterator[Any]:
        """The elements, in order."""
        if self._ends is None:
            numbers = self._numbers()
            for start in range(0, self._count, 4096):
                yield from numbers[start : start + 4096].tolist()
            return
        start = self._start
        for end in self._ends:
            yield str(self._keys[start + 8 : end], "utf-8")
            start = end

    def __eq__(self, other: object) -> bool:
        """Whether the elements are those of another array, list or tuple."""
        if not isinstance(other, (GGUFArray, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        """The first elements: a vocabulary has hundreds of thousands."""
        more = ", ..." if self._count > 4 else ""
        shown = ", ".join(map(_shown, self[:4]))
        return f"GGUFArray({self.type}, {self._count} elements: [{shown}{more}])"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Numbers as a read-only view; strings as an array of objects."""
        found = np.array(list(self), dtype=object) if self._ends is not None else self._numbers()
        if copy is False and (
            self._ends is not None or (dtype is not None and np.dtype(dtype) != found.dtype)
        ):
            raise ValueError(
                f"GGUFArray: copy must not be False for {self.type} as {dtype}, got False"
            )
        return found.astype(dtype if dtype is not None else found.dtype, copy=bool(copy))

    def tolist(self) -> list[Any]:
        """The elements as a list."""
        return list(self)

    def _numbers(self) -> np.ndarray[Any, Any]:
        code = _SCALARS[self._kind].format
        # A bool may be any byte in the file, and numpy takes the byte for the bool as it is.
        stored = np.dtype("u1" if code == "<?" else code)
        found = np.frombuffer(self._keys, stored, self._count, self._start)
        if code != "<?":
            return found
        if self._count and found.max() > 1:
            found = (found != 0).view("u1")
            found.flags.writeable = False
        return found.view(np.bool_)

    def _string(self, place: int) -> str:
        assert self._ends is not None
        start = self._ends[place - 1] if place else self._start
        return str(self._keys[start + 8 : self._ends[place]], "utf-8")

    def _encoded(self) -> bytes:
        """The bytes by which the file holds the array: element type, length, elements."""
        if self._ends is None:
            end = self._start + self._count * _SCALARS[self._kind].size
        else:
            end = self._ends[-1] if self._count else self._start
        return struct.pack("<IQ", self._kind, self._count) + self._keys[self._start : end]


@dataclasses.dataclass(frozen=True)
class GGUFOpaque:
    """In place of a tensor's format: a type that this library has no format for.

    The tensor is its bytes. Copying and comparing them works; its values cannot be had.

    Attributes:
        type_id: the type's number in the file.
        nbytes: bytes of the tensor. Where :attr:`sized` is false these are all bytes up to the next
            tensor or the end of the file, so padding may be among them.
    """

    type_id: int
    nbytes: int

    @property
    def name(self) -> str:
        """Name of the type, ggml's in lower case, such as ``"iq1_m"``, or ``"type 999"``."""
        return _BLOCKS[self.type_id][0] if self.sized else f"type {self.type_id}"

    @property
    def sized(self) -> bool:
        """Whether the type is one of ggml's, of which the size is known."""
        return self.type_id in _BLOCKS

    def __str__(self) -> str:
        """The type's name and number."""
        return f"{self.name} (type {self.type_id})" if self.sized else self.name


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: the tensor's name in the file.
        format: its block format; None where it holds plain numbers; a :class:`GGUFOpaque` where
            its type is one that this library has no format for.
        shape: its logical shape in torch's order: ``(out_features, in_features)`` for a weight.
        data: a zero-copy view of the mapped file. With a format, uint8
            ``(*shape[:-1], bytes_per_row)``; plain numbers, ``shape`` in the stored dtype; of an
            opaque type, all of its bytes, uint8 ``(nbytes,)``.
    """

    name: str
    format: Format | GGUFOpaque | None
    shape: tuple[int, ...]
    data: Tensor = dataclasses.field(repr=False)

    @property
    def blocks(self) -> Tensor:
        """The packed blocks, uint8 ``(*shape[:-1], bytes_per_row)``, as a view of the file.

        Raises:
            ValueError: the tensor holds plain numbers, which are in :attr:`data`; or it is of a
                type that there is no format for.
        """
        if _format_of("GGUFTensor.blocks", self) is None:
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

        Raises:
            GGUFError: the tensor is of a type that there is no format for.
        """
        fmt = _format_of("GGUFTensor.dequantize", self)
        return self.data.to(dtype) if fmt is None else dequantize(self.data, fmt, dtype)


def _format_of(op: str, tensor: GGUFTensor, path: str = "") -> Format | None:
    """The format by which a tensor's values are read; None for plain numbers.

    Raises:
        GGUFError: the tensor is of a type that there is no format for.
    """
    if not isinstance(tensor.format, GGUFOpaque):
        return tensor.format
    known = [str(dtype).removeprefix("torch.") for dtype in _PLAIN.values()]
    known += [fmt.name for fmt in formats.all() if fmt.type_id >= 0]
    where = f" ({path})" if path else ""
    raise GGUFError(
        f"{op}: tensor {tensor.name!r} must be one of {', '.join(known)}, got {tensor.format}"
        f"{where}"
    )


@dataclasses.dataclass(frozen=True, repr=False)
class GGUFFile:
    """A memory-mapped GGUF file.

    There is no ``close``: the map lives as long as any tensor that views it, so none can dangle.
    It is copy-on-write, so writing to a tensor changes neither the file nor other readers of it.
    Truncating the file while it is mapped makes later reads fail with SIGBUS, as for any map.

    Attributes:
        path: where it was read from; of a split file the first part.
        version: GGUF version.
        alignment: bytes to which tensor data is aligned.
        architecture: ``general.architecture``, or None where the file does not say.
        metadata: key to str, int, float, bool or a :class:`GGUFArray` of these, in file order. They
            are the process's own: what becomes of the path does not change them.
        tensors: name to :class:`GGUFTensor`, in file order; of a split file, those of all parts.
        parts: the paths of all parts of a split file, whose metadata are those of its first part
            without the keys that tell of the split; of any other file, its path.
    """

    path: str
    version: int
    alignment: int
    architecture: str | None
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    parts: tuple[str, ...]
    # The file up to the end of its keys, as it was read: what a copy of the file gets.
    _keys: bytes

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
        path: a ``.gguf`` file. Any part of a split file, ``NAME-00001-of-00003.gguf``, opens all of
            it; the other parts must lie beside it.

    Returns:
        The file's metadata, and its tensors as views of the map. Tensors of any type are there; of
        those that there is no format for, values cannot be had (:class:`GGUFOpaque`). Such a tensor
        takes the bytes that ggml's table of types says; of a type that is not in the table, all
        bytes up to the next tensor's, which must come later, or to the end of the file.

    Raises:
        OSError: the file cannot be opened or mapped, or is a device, a FIFO or a folder.
        GGUFError: the file is not GGUF, is damaged or truncated, breaks a rule that llama.cpp
            holds files to, or is a part of a split file whose other parts are missing or do not
            belong to it. A ``ValueError``; the message has the rule that does not hold, the value
            and the path.
    """
    file = _mapped(os.fsdecode(path))
    count = file.metadata.get(_SPLIT_COUNT, 0)
    if type(count) is not int or not 0 <= count <= _MOST_PARTS:
        rule = f"{_SPLIT_COUNT} must be an integer of 0 to {_MOST_PARTS}"
        raise GGUFError(f"load_gguf: {rule}, got {_shown(count)} ({file.path})")
    return _joined(file, count) if count > 1 else file


def _joined(file: GGUFFile, count: int) -> GGUFFile:
    """The whole of which a file is one of ``count`` parts."""

    def fail(path: str, rule: str, value: object) -> NoReturn:
        raise GGUFError(f"load_gguf: {rule}, got {value} ({path})")

    match = _PART.fullmatch(file.path)
    stem = match[1] if match else ""
    paths = [f"{stem}-{place:05}-of-{count:05}.gguf" for place in range(1, count + 1)]
    if file.path not in paths:
        ends = f"-00001-of-{count:05}.gguf to -{count:05}-of-{count:05}.gguf"
        rule = f"the name of one of {count} parts must end in {ends}"
        fail(file.path, rule, _shown(os.path.basename(file.path)))
    parts: list[GGUFFile] = []
    tensors: dict[str, GGUFTensor] = {}
    for place, path in enumerate(paths):
        if not os.path.exists(path):
            rule = f"all {count} parts of a split file must be there"
            fail(file.path, rule, f"no {_shown(os.path.basename(path))}")
        part = file if path == file.path else _mapped(path)
        for key, value in ((_SPLIT_NO, place), (_SPLIT_COUNT, count)):
            found = part.metadata.get(key)
            if type(found) is not int or found != value:
                fail(path, f"{key} of part {place + 1} of {count} must be {value}", _shown(found))
        parts.append(part)
        twice = part.tensors.keys() & tensors.keys()
        if twice:
            fail(path, "a tensor must be in one part", f"{_shown(min(twice))} again")
        tensors.update(part.tensors)
    first = parts[0]
    for part in parts:
        # Most writers give the architecture to the first part only.
        if part.architecture not in (None, first.architecture):
            rule = f"general.architecture must be that of the first part, {first.architecture!r}"
            fail(part.path, rule, _shown(part.architecture))
        total = part.metadata.get(_SPLIT_TENSORS, None if part is first else len(tensors))
        if type(total) is not int or total != len(tensors):
            rule = f"{_SPLIT_TENSORS} must be {len(tensors)}, as the parts have"
            fail(part.path, rule, _shown(total))
    metadata = {key: value for key, value in first.metadata.items() if key not in _SPLIT_KEYS}
    return dataclasses.replace(first, metadata=metadata, tensors=tensors, parts=tuple(paths))


def _mapped(name: str) -> GGUFFile:
    """One file, be it a whole or a part."""
    require_file(name, "load_gguf")
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _HEADER_BYTES:
            raise GGUFError(
                f"load_gguf: a file must have at least {_HEADER_BYTES} bytes, got {size} ({name})"
            )
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
    """A cursor over a file's bytes that never passes their end."""

    def __init__(self, data: mmap.mmap | bytes, path: str) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.pos = 0
        # What is being read, which errors have in the place of "{}". Its words are put together
        # only when there is an error, since a file can have a million keys.
        self.subject: tuple[str, object] = ("the header", None)

    def fail(self, rule: str, value: object) -> NoReturn:
        words, name = self.subject
        rule = rule.replace("{}", words if name is None else f"{words} {_shown(name)}")
        raise GGUFError(f"load_gguf: {rule}, got {value} ({self.path})")

    def take(self, count: int) -> int:
        """Moves past ``count`` bytes and returns where they start."""
        start = self.pos
        if count > self.size - start:
            self.fail(f"{{}} must end within the file, at byte {self.size}", start + count)
        self.pos = start + count
        return start

    def number(self, code: struct.Struct) -> Any:
        start = self.pos
        self.pos = end = start + code.size
        if end > self.size:
            self.pos = start
            self.take(code.size)
        return code.unpack_from(self.data, start)[0]

    def string(self, longest: int | None = None) -> str:
        length = self.number(_U64)
        if longest is not None and length > longest:
            self.fail(f"{{}} must have at most {longest} bytes", length)
        raw = self.data[self.take(length) : self.pos]
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            self.fail("{} must be UTF-8", f"{raw[error.start : error.start + 8]!r}")

    def count(self, each: int, what: str) -> int:
        """A count of entries, of at least ``each`` bytes: more than fit are refused at once."""
        count: int = self.number(_U64)
        limit = (self.size - self.pos) // each
        if count > limit:
            self.fail(f"{what} must be at most the {limit} that fit into the file", count)
        return count

    def value(self) -> tuple[int, Any]:
        """A metadata value's type and the value; of an array only the place."""
        kind = self.number(_U32)
        if kind in _SCALARS:
            return kind, self.number(_SCALARS[kind])
        if kind == _STRING:
            return kind, self.string()
        if kind != _ARRAY:
            self.fail("{} must have a value type of 0 to 12", kind)
        element = self.number(_U32)
        if element == _ARRAY:
            self.fail("{} must have elements that are no arrays", "an array of arrays")
        if element not in _MIN_ELEMENT_BYTES:
            self.fail("{} must have an element type of 0 to 12", element)
        count = self.count(_MIN_ELEMENT_BYTES[element], "the length of {}")
        if element == _STRING:
            start = self.pos
            return kind, _ArrayPlace(element, start, count, self.ends(count))
        start = self.take(count * _SCALARS[element].size)
        return kind, _ArrayPlace(element, start, count, None)

    def ends(self, count: int) -> array[int]:
        """Where each of ``count`` strings ends; a loop with nothing to spare for vocabularies."""
        data, pos, size, unpack = self.data, self.pos, self.size, _U64.unpack_from
        ends = array("q")
        for _ in range(count):
            start = pos
            try:
                pos += 8 + unpack(data, pos)[0]
                if pos > size:
                    raise IndexError
                str(data[start + 8 : pos], "utf-8")
            except (struct.error, IndexError, UnicodeDecodeError):
                self.pos = start
                self.string()  # says what is wrong
            ends.append(pos)
        self.pos = pos
        return ends

    def parse(self) -> GGUFFile:
        version, tensor_count, key_count = self.header()
        metadata: dict[str, Any] = {}
        for key, kind, value, _ in self.keys(key_count):
            if key in metadata:
                self.fail("a metadata key must occur once", f"{_shown(key)} again")
            metadata[key] = value
            if key == "general.alignment" and not _is_alignment(kind, value):
                shown = "" if kind == _ARRAY else f"{_shown(value)}, "
                got = f"{shown}{_NAMES_OF_TYPE[kind]}"
                self.fail("general.alignment must be a power of two of type uint32", got)
        end_of_keys = self.pos
        infos = self.tensor_infos(tensor_count)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        places = self.locate(infos, self.pos + -self.pos % alignment, alignment)
        # Not before here: a wrong length leads to nonsense a few entries later, and is found before
        # anything as long as it says is made. A copy, so that whoever overwrites the file in place
        # does not change what was read.
        keys = self.data[:end_of_keys]
        for key, value in metadata.items():
            if isinstance(value, _ArrayPlace):
                metadata[key] = GGUFArray(keys, value)
        architecture = metadata.get("general.architecture")
        if architecture is not None and not isinstance(architecture, str):
            self.fail("general.architecture must be a string", _shown(architecture))
        # numpy holds the map, the tensors hold numpy's array: the map goes when the last one does.
        base = torch.from_numpy(np.frombuffer(self.data, dtype=np.uint8))
        tensors = {
            info.name: _view(base, info, start, end)
            for info, (start, end) in zip(infos, places, strict=True)
        }
        paths = (self.path,)
        return GGUFFile(self.path, version, alignment, architecture, metadata, tensors, paths, keys)

    def header(self) -> tuple[int, int, int]:
        """Version, tensor count, key count."""
        magic = self.data[self.take(4) : self.pos]
        if magic != _MAGIC:
            self.fail(f"a file must start with {_MAGIC!r}", repr(magic))
        version = self.number(_U32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in (1, *_VERSIONS):
                self.fail("a file must be little-endian", f"big-endian version {swapped}")
            self.fail(f"the version must be one of {_VERSIONS}", version)
        tensor_count = self.count(_MIN_TENSOR_BYTES, "the tensor count")
        key_count = self.count(_MIN_KEY_BYTES, "the metadata key count")
        return version, tensor_count, key_count

    def keys(self, count: int) -> Iterator[tuple[str, int, Any, int]]:
        """Key, type, value, and where the value starts."""
        for index in range(count):
            self.subject = ("metadata key", index)
            key = self.string()
            self.subject = ("metadata", key)
            if not key:
                self.fail("a metadata key must not be empty", "''")
            start = self.pos + _U32.size
            yield key, *self.value(), start

    def tensor_infos(self, count: int) -> list[_TensorInfo]:
        infos: dict[str, _TensorInfo] = {}
        for index in range(count):
            self.subject = ("the name of tensor", index)
            name = self.string(_MAX_NAME_BYTES)
            self.subject = ("tensor", name)
            if name in infos:
                self.fail("a tensor name must occur once", f"{name!r} again")
            n_dims = self.number(_U32)
            if n_dims > _MAX_DIMS:
                self.fail(f"{{}} must have at most {_MAX_DIMS} dimensions", n_dims)
            dims = tuple(self.number(_U64) for _ in range(n_dims))
            kind = self.number(_U32)
            infos[name] = _TensorInfo(name, dims, kind, self.number(_U64))
        return list(infos.values())

    def locate(
        self, infos: list[_TensorInfo], data_start: int, alignment: int
    ) -> list[tuple[int, int]]:
        """The bytes of the file that hold each tensor: from, to."""
        places = []
        offset = 0
        for place, info in enumerate(infos):
            self.subject = ("tensor", info.name)
            item, nbytes = self.sizes(info)
            if info.offset != offset:
                self.fail(f"{{}} must have offset {offset}, where its data are due", info.offset)
            start = data_start + offset
            if nbytes is None:  # all that there is before the next tensor
                last = place + 1 == len(infos)
                end = self.size if last else data_start + infos[place + 1].offset
                nbytes = end - start
                if nbytes <= 0:
                    self.fail(f"{{}} must end above byte {start}", end)
                if not last and nbytes % alignment:
                    self.fail(f"{{}} must be padded to {alignment} bytes", nbytes)
            if start + nbytes > self.size:
                rule = f"{{}} must lie within the file's {self.size} bytes"
                self.fail(rule, f"bytes {start} to {start + nbytes}")
            if start % item:  # possible only where the file sets an alignment below the default
                self.fail(f"{{}} must start at a multiple of {item} bytes", start)
            places.append((start, start + nbytes))
            offset += nbytes + -nbytes % alignment
        return places

    def sizes(self, info: _TensorInfo) -> tuple[int, int | None]:
        """Bytes of one number (1 for blocks), and of the tensor: None where not known."""
        elements = 1
        for dim in info.dims:
            elements *= dim
        if not 0 < elements < 1 << 63:
            self.fail("{} must have 1 to 2**63 - 1 elements", f"dimensions {info.dims}")
        if info.kind in _PLAIN:
            item = _PLAIN[info.kind].itemsize
            return item, elements * item
        fmt = _registered(info.kind)
        known = (fmt.name, fmt.block_elems, fmt.block_bytes) if fmt else _BLOCKS.get(info.kind)
        if known is None:
            return 1, None
        name, block_elems, block_bytes = known
        columns = info.dims[0] if info.dims else 1
        if columns % block_elems:
            self.fail(f"{{}} must have a multiple of {block_elems} columns for {name}", columns)
        return 1, elements // block_elems * block_bytes


def _stored(file: GGUFFile) -> Iterator[tuple[str, int, Any, bytes]]:
    """Key, type, value and the value's bytes of all that a file was read with."""
    parser = _Parser(file._keys, file.path)
    parser.pos = _HEADER_BYTES - _U64.size
    for key, kind, value, start in parser.keys(parser.number(_U64)):
        if len(file.parts) > 1 and key in _SPLIT_KEYS:
            continue
        if isinstance(value, _ArrayPlace):
            value = GGUFArray(file._keys, value)
        yield key, kind, value, file._keys[start : parser.pos]


def _is_alignment(kind: int, value: Any) -> bool:
    """Whether llama.cpp takes a value of this type for ``general.alignment``."""
    # A power of two has one bit set.
    return kind == _TYPE_NAMES["uint32"] and value > 0 and not value & (value - 1)


def _shown(value: Any) -> str:
    """A value for an error: its beginning and its end where it is long."""
    return _SHORT.repr(value)


def _registered(kind: int) -> Format | None:
    """The format that files have under a type's number, if there is one."""
    try:
        return formats.get(kind)
    except ValueError:
        return None


def _view(base: Tensor, info: _TensorInfo, start: int, end: int) -> GGUFTensor:
    shape = info.dims[::-1]
    data = base[start:end]
    if info.kind in _PLAIN:
        return GGUFTensor(info.name, None, shape, data.view(_PLAIN[info.kind]).view(shape))
    fmt = _registered(info.kind)
    if fmt is None:
        return GGUFTensor(info.name, GGUFOpaque(info.kind, end - start), shape, data)
    return GGUFTensor(info.name, fmt, shape, data.view(*shape[:-1], fmt.row_bytes(shape[-1])))
