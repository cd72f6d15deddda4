"""Tensors of files: what they are called, how large they are, and how to work through them."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import torch
from torch import Tensor

from torch_q4 import formats
from torch_q4.formats import Format
from torch_q4.gguf import GGUFOpaque, GGUFTensor

TensorLike = Tensor | GGUFTensor | tuple[Tensor, Format | str | int]

_MADV_DONTNEED = 4


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file's table says of a tensor.

    Attributes:
        name: its name.
        format: its block format, or None for plain numbers; a :class:`GGUFOpaque` for a type that
            there is no format for.
        shape: its logical shape in torch's order.
        dtype: of plain numbers; ``torch.uint8`` with a format.

    Raises:
        ValueError: a shape that is not made of whole blocks of the format.
    """

    name: str
    format: Format | GGUFOpaque | None
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            return
        columns = self.shape[-1] if self.shape else 1
        if columns % self.format.block_elems:
            raise ValueError(
                f"tensor {self.name!r} must have a multiple of {self.format.block_elems} columns "
                f"for {self.format.name}, got shape {self.shape}"
            )

    @property
    def columns(self) -> int:
        """Elements of one row, that is of the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; blocks of an opaque type have none that are known."""
        assert not isinstance(self.format, GGUFOpaque)
        if self.format is not None:
            return self.format.row_bytes(self.columns)
        return self.columns * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """How many rows there are: the product of all dimensions but the last."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def elements(self) -> int:
        """How many elements there are."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        if isinstance(self.format, GGUFOpaque):
            return self.format.nbytes
        return self.rows * self.row_bytes

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor: with a format ``(..., bytes_per_row)``."""
        return (*self.shape[:-1], self.row_bytes) if self.format is not None else self.shape

    @property
    def type_name(self) -> str:
        """The format's or opaque type's name, or ``f32``, ``f16``, ``bf16``, ``i32`` and so on."""
        if self.format is not None:
            return self.format.name
        name = str(self.dtype).removeprefix("torch.")
        return name.replace("bfloat", "bf").replace("float", "f").replace("int", "i")


def described(op: str, name: str, tensor: TensorLike) -> tuple[TensorInfo, Tensor]:
    """A tensor's entry in a file's table, and its data.

    Raises:
        TypeError: blocks that are not uint8.
        ValueError: blocks that are not whole.
    """
    if isinstance(tensor, GGUFTensor):
        return info_of(tensor, name), tensor.data
    if isinstance(tensor, Tensor):
        return TensorInfo(name, None, tuple(tensor.shape), tensor.dtype), tensor
    blocks, fmt = tensor
    found = formats.get(fmt)
    if blocks.dtype != torch.uint8 or blocks.dim() < 1:
        raise TypeError(
            f"{op}: the blocks of {name!r} must be uint8 (..., bytes_per_row), got "
            f"{blocks.dtype} {tuple(blocks.shape)}"
        )
    shape = (*blocks.shape[:-1], found.columns(blocks.shape[-1]))
    return TensorInfo(name, found, shape), blocks


def info_of(tensor: GGUFTensor, name: str | None = None) -> TensorInfo:
    """The entry of a tensor that was read from a file."""
    return TensorInfo(name or tensor.name, tensor.format, tensor.shape, tensor.dtype)


def release(data: Tensor) -> None:
    """Gives the memory of a mapped tensor's pages back; they are read again if used again.

    Only for a view of a private map to which nothing was written: what was, would be lost. Without
    it, a process that works through a file larger than memory appears to need all of it.
    """
    page = mmap.PAGESIZE
    start = -(-data.data_ptr() // page) * page  # pages shared with neighbours stay
    end = (data.data_ptr() + data.nbytes) // page * page
    if end > start:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
