"""Writes GGUF files: streaming, and so that what is passed through stays as it is.

Why not the ``gguf`` package's writer: passing a file through must not change it, and that writer
refuses or drops empty arrays and empty strings, which real files hold; it opens the final name at
once, so that an interruption or a full disk leaves a broken file there in place of the old one; and
it does not flush to the disk. Also the values that its reader gives do not come back as they were
without their types, which this module keeps as the bytes that they were. What remains of the
format, a table of keys and a table of tensors, is not much.

The layout is in :mod:`torch_q4.gguf`.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from torch_q4._files import AtomicFile
from torch_q4._tensors import TensorInfo, TensorLike, described
from torch_q4.gguf import (
    _ARRAY,
    _DEFAULT_ALIGNMENT,
    _MAGIC,
    _MAX_DIMS,
    _MAX_NAME_BYTES,
    _NAMES_OF_TYPE,
    _PLAIN,
    _SCALARS,
    _STRING,
    _TYPE_NAMES,
    GGUFArray,
    GGUFFile,
    GGUFOpaque,
    _is_alignment,
    _shown,
    _stored,
)

__all__ = ["GGUFMetadata", "GGUFWriter", "save_gguf"]

_OP = "save_gguf"
_VERSION = 3
_TYPE_OF_PLAIN = {dtype: kind for kind, dtype in _PLAIN.items()}
_ZEROS = bytes(1 << 16)


# ---- metadata ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A value, and the type number and bytes by which a file holds it."""

    kind: int
    raw: bytes
    value: Any


class GGUFMetadata(MutableMapping[str, Any]):
    """The keys of a GGUF file, in order, with the very bytes of their values.

    A mapping like ``GGUFFile.metadata``, except that each value keeps its type: what is not set
    anew is written as it was read. A new int becomes uint32, or int32 if negative, or the 64-bit
    type where it does not fit; a float becomes float32, a list an array, and a :class:`GGUFArray`
    stays what it is. Setting a key that exists keeps its type where the value allows; :meth:`set`
    chooses one.

    Args:
        source: a :class:`GGUFFile`, another metadata object, or a plain mapping. Of a split file
            the keys that tell of the split are left out.

    Raises:
        TypeError: a value of a type that GGUF has none for.
        ValueError: a number outside its type's range, a list of mixed types or of lists, or an
            empty key.
    """

    def __init__(self, source: GGUFFile | Mapping[str, Any] | None = None) -> None:
        self._entries: dict[str, _Entry] = {}
        if isinstance(source, GGUFFile):
            for key, kind, value, raw in _stored(source):
                self._entries[key] = _Entry(kind, raw, value)
        elif isinstance(source, GGUFMetadata):
            self._entries.update(source._entries)
        elif source is not None:
            self.update(source)

    def __getitem__(self, key: str) -> Any:
        """The value, as ``GGUFFile.metadata`` has it."""
        return self._entries[key].value

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets a value, with the type that the key had where it can hold the value."""
        old = self._entries.get(key)
        if old is not None:
            if old.kind == _ARRAY and isinstance(value, (list, tuple, GGUFArray)):
                element = int.from_bytes(old.raw[:4], "little")
                try:
                    self._set(key, value, _ARRAY, element)
                    return
                except (TypeError, ValueError):
                    pass
            elif old.kind != _ARRAY:
                try:
                    self.set(key, value, _NAMES_OF_TYPE[old.kind])
                    return
                except (TypeError, ValueError):
                    pass
        self._set(key, value, _natural_type(key, value))

    def _set(self, key: str, value: Any, kind: int, element: int | None = None) -> None:
        if not isinstance(key, str):
            raise TypeError(f"GGUFMetadata: a key must be a string, got {key!r}")
        if not key:
            raise ValueError("GGUFMetadata: a key must not be empty, got ''")
        raw = _encode(key, value, kind) if element is None else _encode_array(key, value, element)
        self._entries[key] = _Entry(kind, raw, _plain(value))

    def set(self, key: str, value: Any, type: str) -> None:
        """Sets a value with a type: ``"uint8"`` ... ``"float64"``, ``"bool"`` or ``"string"``.

        Raises:
            ValueError: no such type, or a number outside its range.
            TypeError: a value of another kind.
        """
        kind = _TYPE_NAMES.get(type)
        if kind is None:
            raise ValueError(
                f"GGUFMetadata: type must be one of {', '.join(_TYPE_NAMES)}, got {type!r}"
            )
        self._set(key, value, kind)

    def set_array(self, key: str, values: Sequence[Any], type: str) -> None:
        """Sets an array whose elements have a type, also an empty one.

        Raises:
            ValueError: no such type, or a number outside its range.
            TypeError: an element of another kind.
        """
        element = _TYPE_NAMES.get(type)
        if element is None or element == _ARRAY:
            known = ", ".join(name for name in _TYPE_NAMES if name != "array")
            raise ValueError(f"GGUFMetadata: type must be one of {known}, got {type!r}")
        self._set(key, values, _ARRAY, element)

    def type(self, key: str) -> str:
        """The name of a key's type, such as ``"uint32"``."""
        return _NAMES_OF_TYPE[self._entries[key].kind]

    def __delitem__(self, key: str) -> None:
        """Removes a key."""
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        """The keys, in file order."""
        return iter(self._entries)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._entries)

    def __repr__(self) -> str:
        """Counts, not contents."""
        return f"GGUFMetadata({len(self)} keys)"

    @property
    def alignment(self) -> int:
        """The alignment of tensor data that these keys ask for.

        Raises:
            ValueError: it is no power of two, or not of type uint32.
        """
        entry = self._entries.get("general.alignment")
        if entry is None:
            return _DEFAULT_ALIGNMENT
        if not _is_alignment(entry.kind, entry.value):
            raise ValueError(
                f"{_OP}: general.alignment must be a power of two of type uint32, got "
                f"{_shown(entry.value)}, {_NAMES_OF_TYPE[entry.kind]}"
            )
        return int(entry.value)

    def encode(self) -> bytes:
        """The file's table of keys."""
        parts = []
        for key, entry in self._entries.items():
            parts += [_string(key), struct.pack("<I", entry.kind), entry.raw]
        return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _natural_type(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return _TYPE_NAMES["bool"]
    if isinstance(value, int):
        for name, low, high in (
            ("uint32", 0, 2**32 - 1),
            ("int32", -(2**31), -1),
            ("int64", -(2**63), 2**63 - 1),
            ("uint64", 0, 2**64 - 1),
        ):
            if low <= value <= high:
                return _TYPE_NAMES[name]
        raise ValueError(f"GGUFMetadata: {key!r} must fit into 64 bits, got {value}")
    if isinstance(value, float):
        return _TYPE_NAMES["float32"]
    if isinstance(value, str):
        return _STRING
    if isinstance(value, (list, tuple, GGUFArray)):
        return _ARRAY
    raise TypeError(
        f"GGUFMetadata: {key!r} must be a str, int, float, bool or a list of these, "
        f"got {_shown(value)}"
    )


def _encode(key: str, value: Any, kind: int) -> bytes:
    if kind == _STRING:
        if not isinstance(value, str):
            raise TypeError(f"GGUFMetadata: {key!r} must be a string, got {value!r}")
        return _string(value)
    if kind == _ARRAY:
        return _encode_array(key, value, None)
    name = _NAMES_OF_TYPE[kind]
    if name == "bool":
        suits = isinstance(value, bool)
    elif name.startswith("float"):
        suits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        suits = isinstance(value, int) and not isinstance(value, bool)
    if not suits:
        raise TypeError(f"GGUFMetadata: {key!r} must be of type {name}, got {value!r}")
    try:
        return _SCALARS[kind].pack(value)
    except (struct.error, OverflowError):
        raise ValueError(f"GGUFMetadata: {key!r} must fit into {name}, got {value!r}") from None


def _encode_array(key: str, values: Sequence[Any], element: int | None) -> bytes:
    """An array's bytes; the element type is the widest that the values call for if not given."""
    if isinstance(values, GGUFArray) and element in (None, _TYPE_NAMES[values.type]):
        return values._encoded()
    if element is None:
        # An empty array has no values to tell a type from; the type then has no effect either.
        kinds = {_natural_type(key, value) for value in values} or {_TYPE_NAMES["int32"]}
        if _ARRAY in kinds:  # GGUF has room for them, and llama.cpp refuses the whole file
            raise ValueError(f"GGUFMetadata: {key!r} must not be a list of lists, got one")
        if len(kinds) > 1:
            if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
                raise ValueError(
                    f"GGUFMetadata: the elements of {key!r} must have one type, got "
                    f"{', '.join(sorted(_NAMES_OF_TYPE[kind] for kind in kinds))}"
                )
            small = max(values) < 2**31 and min(values) >= -(2**31)
            kinds = {_TYPE_NAMES["int32" if small else "int64"]}
        elif kinds == {_TYPE_NAMES["uint32"]} and max(values) < 2**31:
            kinds = {_TYPE_NAMES["int32"]}  # what llama.cpp reads its arrays of integers as
        element = kinds.pop()
    head = struct.pack("<IQ", element, len(values))
    if element in _SCALARS and element != _TYPE_NAMES["bool"]:
        try:  # one call for the whole array
            return head + struct.pack(f"<{len(values)}{_SCALARS[element].format[1:]}", *values)
        except (struct.error, OverflowError):
            pass  # below, which names the element
    return head + b"".join(_encode(key, value, element) for value in values)


# ---- tensors -------------------------------------------------------------------------------------


def _check_info(info: TensorInfo) -> None:
    """Refuses what a GGUF file cannot hold."""
    what = f"{_OP}: tensor {info.name!r}"
    name_bytes = len(info.name.encode())
    if name_bytes > _MAX_NAME_BYTES:
        raise ValueError(
            f"{what} must have a name of at most {_MAX_NAME_BYTES} bytes, got {name_bytes}"
        )
    if len(info.shape) > _MAX_DIMS:
        raise ValueError(f"{what} must have at most {_MAX_DIMS} dimensions, got shape {info.shape}")
    if 0 in info.shape:
        raise ValueError(f"{what} must have at least 1 element, got shape {info.shape}")
    if info.format is not None and info.format.type_id < 0:
        raise ValueError(f"{what} must have a format of ggml's, got {info.format.name}")
    if info.format is None and info.dtype not in _TYPE_OF_PLAIN:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPE_OF_PLAIN)
        raise TypeError(f"{what} must be one of {known}, or have a format, got {info.dtype}")


def _type_id(info: TensorInfo) -> int:
    return info.format.type_id if info.format is not None else _TYPE_OF_PLAIN[info.dtype]


class GGUFWriter:
    """Writes a GGUF file in pieces: first all of its structure, then each tensor's bytes.

    A context manager; the file appears under its name when the ``with`` block ends, and only if it
    ends without an exception and every tensor was written.

    Args:
        path: the file.
        metadata: its keys.
        infos: its tensors, in the order in which they will be written.

    Raises:
        ValueError: two tensors of one name.
        OSError: the file cannot be made or there is no room for all of it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: GGUFFile | Mapping[str, Any] | None,
        infos: Iterable[TensorInfo],
    ) -> None:
        self.metadata = metadata if isinstance(metadata, GGUFMetadata) else GGUFMetadata(metadata)
        self.infos = list(infos)
        self._alignment = self.metadata.alignment
        header = self._header()
        # The end of a file without tensors needs no padding, and other writers add none.
        start = self._padded(len(header)) if self.infos else len(header)
        size = start + sum(
            info.nbytes + self._padding(place) for place, info in enumerate(self.infos)
        )
        self._file = AtomicFile(path, size, _OP)
        self._head = header
        self._head_padding = start - len(header)
        self._remaining = 0  # bytes that the current tensor still lacks
        self._next = 0

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._file.size

    def _padded(self, count: int) -> int:
        return count + -count % self._alignment

    def _padding(self, place: int) -> int:
        """Bytes of padding after a tensor: none where they would be read as the tensor's own."""
        info = self.infos[place]
        is_last = place + 1 == len(self.infos)
        if is_last and isinstance(info.format, GGUFOpaque) and not info.format.sized:
            return 0
        return -info.nbytes % self._alignment

    def _header(self) -> bytes:
        parts = [
            _MAGIC,
            struct.pack("<IQQ", _VERSION, len(self.infos), len(self.metadata)),
            self.metadata.encode(),
        ]
        names: set[str] = set()
        offset = 0
        for info in self.infos:
            _check_info(info)
            if info.name in names:
                raise ValueError(f"{_OP}: a tensor name must occur once, got {info.name!r} again")
            names.add(info.name)
            dims = info.shape[::-1]
            parts.append(_string(info.name))
            parts.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            parts.append(struct.pack("<IQ", _type_id(info), offset))
            offset += self._padded(info.nbytes)
        return b"".join(parts)

    def __enter__(self) -> GGUFWriter:
        """Opens the file and writes its structure."""
        self._file.__enter__()
        try:
            self._file.write(self._head)
            self._pad(self._head_padding)
        except BaseException as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the file its name, or removes it after an exception."""
        self._file.__exit__(kind, error, trace)

    def write(self, data: Tensor | bytes) -> int:
        """Appends bytes of the tensor that is due.

        Args:
            data: a whole tensor or some of its rows: a contiguous CPU tensor, or its bytes.

        Returns:
            How many bytes that were.

        Raises:
            ValueError: more bytes than the tensor has.
            OSError: no room.
        """
        if self._remaining == 0:
            if self._next == len(self.infos):
                raise ValueError(f"{_OP}: {len(self.infos)} tensors must be written, got more")
            self._remaining = self.infos[self._next].nbytes
            self._next += 1
        info = self.infos[self._next - 1]
        count = data.nbytes if isinstance(data, Tensor) else len(data)
        if count > self._remaining:
            raise ValueError(
                f"{_OP}: tensor {info.name!r} must have {info.nbytes} bytes, got "
                f"{info.nbytes - self._remaining + count}"
            )
        self._file.write(data)
        self._remaining -= count
        if self._remaining == 0:
            self._pad(self._padding(self._next - 1))
        return count

    def _pad(self, count: int) -> None:
        while count:  # in pieces: an alignment can be 2 GiB
            count -= self._file.write(_ZEROS[:count])


def save_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorLike],
    metadata: GGUFFile | Mapping[str, Any] | None = None,
    *,
    on_written: Callable[[str, int], None] | None = None,
) -> None:
    """Writes a GGUF file, atomically.

    At any moment the path holds either what it held before or the whole new file. Where the file
    system can, the file has no name until all of it is on the disk, so that not even a process that
    is killed leaves a part of it; elsewhere it has one like ``.torch_q4.*.tmp`` in the same folder.
    ``save_gguf(copy, file.tensors, file)`` gives the bytes of a file that llama.cpp or the ``gguf``
    package wrote.

    Args:
        path: the file.
        tensors: name to tensor, in the order of the file: a :class:`GGUFTensor`, of whichever type;
            a plain tensor of float32, float16, bfloat16, float64 or int8 to int64; or ``(blocks,
            format)`` with uint8 ``(..., bytes_per_row)``. Any device.
        metadata: the file's keys. A :class:`GGUFFile` passes its own on, types and order kept, but
            for those that tell of a split, since one file is written; of a plain mapping the types
            are chosen, see :class:`GGUFMetadata`. ``general.alignment``
            aligns the data, to 32 bytes if absent.
        on_written: called with each tensor's name and bytes, for progress.

    Raises:
        ValueError: a shape, name or value that GGUF cannot hold.
        TypeError: a dtype or a value of a type that GGUF has none for.
        OSError: the file cannot be made, or there is no room for all of it; what the path held
            before is untouched.
    """
    infos, data = [], []
    for name, tensor in tensors.items():
        info, values = described(_OP, name, tensor)
        infos.append(info)
        data.append(values)
    with GGUFWriter(path, metadata, infos) as writer:
        for info, values in zip(infos, data, strict=True):
            writer.write(values.detach().cpu().contiguous())
            if on_written is not None:
                on_written(info.name, info.nbytes)
