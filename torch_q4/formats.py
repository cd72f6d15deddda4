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

from torch_q4 import _grids

__all__ = ["Format", "all", "get"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format.

    Attributes:
        name: lower-case name, such as ``"q4_k"``.
        type_id: ggml's type number; negative for a format that GGUF files cannot hold.
        block_elems: elements in a block.
        block_bytes: bytes in a block.
        quantize_error: mean squared error of quantising normally distributed weights, over their
            mean square, that the bits of the format allow; what is measured is 0.5 to 0.9 of it.
            None for a format without a quantiser, which is only read.
        weighs_importance: whether the quantiser asks for the importance of columns. Where ggml's
            does not, neither does this one.
        reference: ``reference(blocks)`` decodes uint8 ``(..., block_bytes)`` to float32
            ``(..., block_elems)``, bit for bit as ggml does.
    """

    name: str
    type_id: int
    block_elems: int
    block_bytes: int
    quantize_error: float | None = dataclasses.field(repr=False)
    weighs_importance: bool = dataclasses.field(repr=False)
    reference: Callable[[Tensor], Tensor] = dataclasses.field(repr=False, compare=False)

    @property
    def quantizes(self) -> bool:
        """Whether there is a quantiser for it."""
        return self.quantize_error is not None

    def check_quantizes(self, op: str) -> None:
        """Refuses a format without a quantiser, in the name of ``op``.

        Raises:
            ValueError: the format has none.
        """
        if not self.quantizes:
            raise ValueError(
                f"{op}: format must be one that torch_q4 quantises to; llama.cpp's llama-quantize "
                f"makes files of the others with an importance matrix; got {self.name}"
            )

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
    name: str,
    type_id: int,
    *,
    block_elems: int,
    block_bytes: int,
    error: float | None = None,
    weighs: bool = True,
) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    def decorate(reference: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        fmt = Format(name, type_id, block_elems, block_bytes, error, weighs, reference)
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


def _fields(packed: Tensor, width: int, count: int) -> Tensor:
    """The lowest ``count`` fields of ``width`` bits of each integer: ``(..., n * count)``."""
    shifts = torch.arange(count, dtype=packed.dtype, device=packed.device) * width
    return (packed[..., None] >> shifts & (1 << width) - 1).flatten(-2)


def _integers(packed: Tensor, size: int) -> Tensor:
    """Little-endian integers of ``size`` bytes each: ``(..., n)`` to int64 ``(..., n / size)``."""
    shifts = torch.arange(size, device=packed.device) * 8
    return (packed.unflatten(-1, (-1, size)).long() << shifts).sum(-1)


def _grouped(codes: Tensor, scales: Tensor, shifts: Tensor | None = None) -> Tensor:
    """``scale * code (+ shift)`` where each group of consecutive codes has its own scale."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    values = scales[..., None] * groups
    if shifts is not None:
        values = values + shifts[..., None]
    return values.flatten(-2)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit i of the 32-bit word at byte ``start`` is the fifth bit of element i: ``(..., 32)``."""
    return _fields(blocks[..., start : start + 4], 1, 8)


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit minimums of Q4_K and Q5_K from their 12 bytes."""
    low, mid, high = packed.split(4, dim=-1)
    scales = torch.cat([low & 63, (high & 0xF) | (low >> 6 << 4)], dim=-1)
    mins = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], dim=-1)
    return scales.float(), mins.float()


@_register("q4_0", 2, block_elems=32, block_bytes=18, error=1e-2)
def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:18]).float() - 8)


@_register("q4_1", 3, block_elems=32, block_bytes=20, error=9e-3)
def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:20]).float() + _half(blocks, 2)


@_register("q5_0", 6, block_elems=32, block_bytes=22, error=2.7e-3)
def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 6:22]) | (_fifth_bits(blocks, 2) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


@_register("q5_1", 7, block_elems=32, block_bytes=24, error=2.1e-3)
def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[..., 8:24]) | (_fifth_bits(blocks, 4) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


@_register("q8_0", 8, block_elems=32, block_bytes=34, error=4e-5, weighs=False)
def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[..., 2:34].contiguous().view(torch.int8).float()


@_register("q2_k", 10, block_elems=256, block_bytes=84, error=1.2e-1)
def _q2_k(blocks: Tensor) -> Tensor:
    scales, codes = blocks[..., :16], blocks[..., 16:80]
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    codes = _bits(codes.unflatten(-1, (2, 32)), 2).flatten(-2)
    return _grouped(codes, d * (scales & 0xF).float(), -(dmin * (scales >> 4).float()))


@_register("q3_k", 11, block_elems=256, block_bytes=110, error=3.5e-2)
def _q3_k(blocks: Tensor) -> Tensor:
    high, low, packed = blocks[..., :32], blocks[..., 32:96], blocks[..., 96:108]
    codes = _bits(low.unflatten(-1, (2, 32)), 2).flatten(-2) | (_bits(high, 1) << 2)
    # 16 six-bit scales: low nibbles of bytes 0-7, then their high nibbles; the top two bits of
    # each lie in bytes 8-11, four scales to a bit pair.
    scales = _nibbles(packed[..., :8]) | (_bits(packed[..., 8:], 2) << 4)
    return _grouped(codes.float() - 4, _half(blocks, 108) * (scales.float() - 32))


@_register("q4_k", 12, block_elems=256, block_bytes=144, error=7.5e-3)
def _q4_k(blocks: Tensor) -> Tensor:
    scales, mins = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:144].unflatten(-1, (4, 32))).flatten(-2)
    return _grouped(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * mins))


@_register("q5_k", 13, block_elems=256, block_bytes=176, error=2e-3)
def _q5_k(blocks: Tensor) -> Tensor:
    scales, mins = _six_bit_pairs(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 48:176].unflatten(-1, (4, 32))).flatten(-2)
    codes = codes | (_bits(blocks[..., 16:48], 1) << 4)
    return _grouped(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * mins))


@_register("q6_k", 14, block_elems=256, block_bytes=210, error=5e-4)
def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2)
    codes = (low | (high << 4)).flatten(-2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return _grouped(codes.float() - 32, _half(blocks, 208) * scales)


# Codebooks: ggml-common.h, kvalues_iq4nl and kvalues_mxfp4, the latter twice what E2M1 says.
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _look_up(indices: Tensor, values: tuple[int, ...]) -> Tensor:
    """Each index's value, as float32."""
    table = torch.tensor(values, dtype=torch.float32, device=indices.device)
    return table[indices.long()]


@_register("iq4_nl", 20, block_elems=32, block_bytes=18, error=8e-3)
def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _look_up(_nibbles(blocks[..., 2:18]), _IQ4_VALUES)


@_register("iq4_xs", 23, block_elems=256, block_bytes=136, error=8e-3)
def _iq4_xs(blocks: Tensor) -> Tensor:
    # Eight scales: the low four bits of each in bytes 4-7, the top two in bytes 2 and 3.
    low = torch.stack([blocks[..., 4:8] & 0xF, blocks[..., 4:8] >> 4], dim=-1).flatten(-2)
    high = torch.stack([blocks[..., 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    scales = _half(blocks, 0) * ((low | high << 4).float() - 32)
    indices = _nibbles(blocks[..., 8:136].unflatten(-1, (8, 16))).flatten(-2)
    return _grouped(_look_up(indices, _IQ4_VALUES), scales)


@_register("tq1_0", 34, block_elems=256, block_bytes=54, error=8e-1, weighs=False)
def _tq1_0(blocks: Tensor) -> Tensor:
    # Bytes are fractions of 256 with digits in base 3: times 3, one has its first above the point.
    parts = []
    for first, last, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        fractions = blocks[..., first:last].int()
        parts += [fractions * 3**digit % 256 * 3 >> 8 for digit in range(digits)]
    return _half(blocks, 52) * (torch.cat(parts, dim=-1).float() - 1)


@_register("tq2_0", 35, block_elems=256, block_bytes=66, error=8e-1, weighs=False)
def _tq2_0(blocks: Tensor) -> Tensor:
    codes = _bits(blocks[..., :64].unflatten(-1, (2, 32)), 2).flatten(-2)
    return _half(blocks, 64) * (codes.float() - 1)


@_register("mxfp4", 39, block_elems=32, block_bytes=17, error=2e-2, weighs=False)
def _mxfp4(blocks: Tensor) -> Tensor:
    # 2 ** (exponent - 128), whose two lowest are subnormal.
    exponent = blocks[..., :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32) * _look_up(_nibbles(blocks[..., 1:17]), _E2M1_VALUES)


@_register("nvfp4", 40, block_elems=64, block_bytes=36, error=1.3e-2, weighs=False)
def _nvfp4(blocks: Tensor) -> Tensor:
    # Four scales of four exponent and three mantissa bits, halved. 0x7F is zero.
    byte = blocks[..., :4].int()
    magnitude = byte & 0x7F
    normal = ((magnitude << 20) + (119 << 23)).view(torch.float32)
    scales = torch.where(magnitude < 8, magnitude * 2.0**-10, normal).masked_fill(byte == 0x7F, 0)
    indices = _nibbles(blocks[..., 4:36].unflatten(-1, (4, 8))).flatten(-2)
    return _grouped(_look_up(indices, _E2M1_VALUES), scales)


@_register("q1_0", 41, block_elems=128, block_bytes=18, error=5e-1, weighs=False)
def _q1_0(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[..., 2:18, None] >> shifts & 1).flatten(-2)
    return _half(blocks, 0) * (2 * bits.float() - 1)


@_register("q2_0", 42, block_elems=64, block_bytes=18, error=8e-1, weighs=False)
def _q2_0(blocks: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    codes = (blocks[..., 2:18, None] >> shifts & 3).flatten(-2)
    return _half(blocks, 0) * (codes.float() - 1)


@_register("q4_0_f32", -2, block_elems=32, block_bytes=20, error=1e-2)
def _q4_0_f32(blocks: Tensor) -> Tensor:
    scale = blocks[..., :4].contiguous().view(torch.float32)
    return scale * (_fields(blocks[..., 4:20], 4, 2).float() - 8)


def _signed_grid(name: str, indices: Tensor, negative: Tensor, scales: Tensor) -> Tensor:
    """The grid's rows at ``indices``, negative where a bit is set, times the groups' scales."""
    values = _grids.grid(name, indices.device)[indices.long()].flatten(-2)
    return _grouped(values * (1 - 2 * negative.float()), scales)


def _even_bits(fields: Tensor) -> Tensor:
    """Bits of seven-bit fields, each with an eighth that makes the sum even: ``(..., 8 n)``."""
    seven = _fields(fields, 1, 7).unflatten(-1, (-1, 7))
    return torch.cat([seven, seven.sum(-1, keepdim=True) & 1], dim=-1).flatten(-2)


@_register("iq2_xxs", type_id=16, block_elems=256, block_bytes=66)
def _iq2_xxs(blocks: Tensor) -> Tensor:
    # For 32 elements: four indices, then a word of four times seven signs and a scale.
    indices, words = blocks[..., 2:66].unflatten(-1, (8, 2, 4)).unbind(-2)
    words = _integers(words.flatten(-2), 4)
    scales = _half(blocks, 0) * (0.5 + (words >> 28).float()) * 0.25
    negative = _even_bits(_fields(words, 7, 4))
    return _signed_grid("iq2_xxs", indices.flatten(-2), negative, scales)


@_register("iq2_xs", type_id=17, block_elems=256, block_bytes=74)
def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _integers(blocks[..., 2:66], 2)
    scales = _half(blocks, 0) * (0.5 + _fields(blocks[..., 66:74], 4, 2).float()) * 0.25
    return _signed_grid("iq2_xs", words & 511, _even_bits(words >> 9), scales)


@_register("iq3_xxs", type_id=18, block_elems=256, block_bytes=98)
def _iq3_xxs(blocks: Tensor) -> Tensor:
    words = _integers(blocks[..., 66:98], 4)
    scales = _half(blocks, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _signed_grid("iq3_xxs", blocks[..., 2:66], _even_bits(_fields(words, 7, 4)), scales)


@_register("iq1_s", type_id=19, block_elems=256, block_bytes=50)
def _iq1_s(blocks: Tensor) -> Tensor:
    words = _integers(blocks[..., 34:50], 2)
    indices = blocks[..., 2:34] | _fields(words, 3, 4) << 8
    values = _grids.grid("iq1", blocks.device)[indices].flatten(-2).unflatten(-1, (8, 32))
    delta = 0.125 - 0.25 * (words >> 15).float()
    scales = _half(blocks, 0) * (2 * (words >> 12 & 7) + 1).float()
    return _grouped((values + delta[..., None]).flatten(-2), scales)


@_register("iq3_s", type_id=21, block_elems=256, block_bytes=110)
def _iq3_s(blocks: Tensor) -> Tensor:
    indices = blocks[..., 2:66] | _fields(blocks[..., 66:74], 1, 8).long() << 8
    scales = _half(blocks, 0) * (1 + 2 * _fields(blocks[..., 106:110], 4, 2).float())
    return _signed_grid("iq3_s", indices, _fields(blocks[..., 74:106], 1, 8), scales)


@_register("iq2_s", type_id=22, block_elems=256, block_bytes=82)
def _iq2_s(blocks: Tensor) -> Tensor:
    indices = blocks[..., 2:34] | _fields(blocks[..., 66:74], 2, 4).long() << 8
    scales = _half(blocks, 0) * (0.5 + _fields(blocks[..., 74:82], 4, 2).float()) * 0.25
    return _signed_grid("iq2_s", indices, _fields(blocks[..., 34:66], 1, 8), scales)


@_register("iq1_m", type_id=29, block_elems=256, block_bytes=56)
def _iq1_m(blocks: Tensor) -> Tensor:
    nibbles = _fields(blocks[..., 32:48], 4, 2)
    indices = blocks[..., :32] | (nibbles & 7).long() << 8
    delta = 0.125 - 0.25 * (nibbles >> 3).float()
    values = _grids.grid("iq1", blocks.device)[indices] + delta[..., None]
    # The four words of scales have a nibble of the block's own scale at the top of each.
    nibbles = blocks[..., 49:56:2] >> 4
    d = _half(nibbles[..., ::2] | nibbles[..., 1::2] << 4, 0)
    scales = _fields(_integers(blocks[..., 48:56], 2), 3, 4)
    return _grouped(values.flatten(-2), d * (2 * scales + 1).float())
