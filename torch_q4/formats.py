"""The quantised block formats: one row per format, each with a pure-torch reference.

A *block* is GGML's own bytes for a run of consecutive elements of one row. A weight of shape
``(N, K)`` is a uint8 tensor of shape ``(N, K // block_elems * block_bytes)``.

The references decode blocks with torch operators only. They are slow, work on any device, and are
what the tests hold the kernels against. Layouts: ``ggml-common.h`` of ggml 0.21.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Format", "all", "get"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format.

    Attributes:
        name: lower-case name, such as ``"q4_k"``.
        type_id: ggml's type number; negative for a format that GGUF files cannot hold.
        block_elems: elements in a block.
        block_bytes: bytes in a block.
        reference: ``reference(blocks)`` decodes uint8 ``(..., block_bytes)`` to float32
            ``(..., block_elems)``, bit for bit as ggml does.
    """

    name: str
    type_id: int
    block_elems: int
    block_bytes: int
    reference: Callable[[Tensor], Tensor] = dataclasses.field(repr=False, compare=False)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales included."""
        return 8 * self.block_bytes / self.block_elems

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` elements.

        Raises:
            ValueError: ``columns`` is not a whole number of blocks.
        """
        if columns < 0 or columns % self.block_elems:
            raise ValueError(
                f"{self.name}: columns must be a multiple of {self.block_elems}, got {columns}"
            )
        return columns // self.block_elems * self.block_bytes

    def columns(self, row_bytes: int) -> int:
        """Elements of one row of ``row_bytes`` bytes.

        Raises:
            ValueError: ``row_bytes`` is not a whole number of blocks.
        """
        if row_bytes % self.block_bytes:
            raise ValueError(
                f"{self.name}: bytes per row must be a multiple of {self.block_bytes}, "
                f"got {row_bytes}"
            )
        return row_bytes // self.block_bytes * self.block_elems


_FORMATS: dict[str, Format] = {}
_LOOKUP: dict[str | int, Format] = {}


def _register(
    name: str, type_id: int, block_elems: int, block_bytes: int
) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    def decorate(reference: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        fmt = Format(name, type_id, block_elems, block_bytes, reference)
        _FORMATS[name] = _LOOKUP[name] = _LOOKUP[type_id] = fmt
        return reference

    return decorate


def all() -> list[Format]:
    """Every known format, in order of registration."""
    return list(_FORMATS.values())


def get(fmt: Format | str | int) -> Format:
    """Finds a format.

    Args:
        fmt: a name in any case (``"q4_k"``, ``"Q4_K"``), ggml's type number, a member of
            ``gguf.GGMLQuantizationType``, or a :class:`Format`.

    Raises:
        ValueError: no such format; the message lists the known ones.
        TypeError: ``fmt`` is none of these types.
    """
    if isinstance(fmt, Format):
        return fmt
    if isinstance(fmt, str):
        found = _LOOKUP.get(fmt) or _LOOKUP.get(fmt.lower())
    elif isinstance(fmt, int) and not isinstance(fmt, bool):  # IntEnum members are ints
        found = _LOOKUP.get(int(fmt))
    else:
        raise TypeError(f"format must be a name, a ggml type or its number, got {fmt!r}")
    if found is None:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {fmt!r}")
    return found


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte ``start`` of each block, as float32 ``(..., 1)``."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """All low nibbles, then all high ones: ``(..., n)`` to ``(..., 2 n)``."""
    return torch.cat([packed & 0xF, packed >> 4], dim=-1)


def _bits(packed: Tensor, width: int) -> Tensor:
    """Fields of ``width`` bits: the lowest of every byte, then the next: ``(..., n * 8/width)``."""
    mask = (1 << width) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-1)


def _grouped(codes: Tensor, scales: Tensor, shifts: Tensor | None = None) -> Tensor:
    """``scale * code (+ shift)`` where each group of consecutive codes has its own scale."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    values = scales[..., None] * groups
    if shifts is not None:
        values = values + shifts[..., None]
    return values.flatten(-2)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit i of the 32-bit word at byte ``start`` is the fifth bit of element i: ``(..., 32)``."""
    word = blocks[..., start : start + 4]
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((word[..., None] >> shifts) & 1).flatten(-2)


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit minimums of Q4_K and Q5_K from their 12 bytes."""
    low, mid, high = packed.split(4, dim=-1)
    scales = torch.cat([low & 63, (high & 0xF) | (low >> 6 << 4)], dim=-1)
    mins = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], dim=-1)
    return scales.float(), mins.float()


@_register("q4_0", type_id=2, block_elems=32, block_bytes=18)
def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:18]).float() - 8)


@_register("q4_1", type_id=3, block_elems=32, block_bytes=20)
def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:20]).float() + _half(blocks, 2)


@_register("q5_0", type_id=6, block_elems=32, block_bytes=22)
def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 6:22]) | (_fifth_bits(blocks, 2) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


@_register("q5_1", type_id=7, block_elems=32, block_bytes=24)
def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 8:24]) | (_fifth_bits(blocks, 4) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


@_register("q8_0", type_id=8, block_elems=32, block_bytes=34)
def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[..., 2:34].contiguous().view(torch.int8).float()


@_register("q2_k", type_id=10, block_elems=256, block_bytes=84)
def _q2_k(blocks: Tensor) -> Tensor:
    scales, codes = blocks[..., :16], blocks[..., 16:80]
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    codes = _bits(codes.unflatten(-1, (2, 32)), 2).flatten(-2)
    return _grouped(codes, d * (scales & 0xF).float(), -(dmin * (scales >> 4).float()))


@_register("q3_k", type_id=11, block_elems=256, block_bytes=110)
def _q3_k(blocks: Tensor) -> Tensor:
    high, low, packed = blocks[..., :32], blocks[..., 32:96], blocks[..., 96:108]
    codes = _bits(low.unflatten(-1, (2, 32)), 2).flatten(-2) | (_bits(high, 1) << 2)
    # 16 six-bit scales: low nibbles of bytes 0-7, then their high nibbles; the top two bits of
    # each lie in bytes 8-11, four scales to a bit pair.
    scales = _nibbles(packed[..., :8]) | (_bits(packed[..., 8:], 2) << 4)
    return _grouped(codes.float() - 4, _half(blocks, 108) * (scales.float() - 32))


@_register("q4_k", type_id=12, block_elems=256, block_bytes=144)
def _q4_k(blocks: Tensor) -> Tensor:
    scales, mins = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:144].unflatten(-1, (4, 32))).flatten(-2)
    return _grouped(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * mins))


@_register("q5_k", type_id=13, block_elems=256, block_bytes=176)
def _q5_k(blocks: Tensor) -> Tensor:
    scales, mins = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 48:176].unflatten(-1, (4, 32))).flatten(-2)
    codes = codes | (_bits(blocks[..., 16:48], 1) << 4)
    return _grouped(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * mins))


@_register("q6_k", type_id=14, block_elems=256, block_bytes=210)
def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2)
    codes = (low | (high << 4)).flatten(-2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return _grouped(codes.float() - 32, _half(blocks, 208) * scales)


@_register("q4_0_f32", type_id=-2, block_elems=32, block_bytes=20)
def _q4_0_f32(blocks: Tensor) -> Tensor:
    scale = blocks[..., :4].contiguous().view(torch.float32)
    packed = blocks[..., 4:20]
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return scale * (codes.float() - 8)
