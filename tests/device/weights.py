"""Weights to test with, in every format, and what numpy knows of the formats and the layout.

There is no decoder here: blocks are those of the golden vectors, whose values ggml itself computed,
shuffled to the shape that is wanted. Of a format that ggml lacks, the reference of
torch_q4/formats.py computes them, which wants torch. How a block is cut up for packing is read from
the formats' own headers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
from arguments import BFLOAT16, FLOAT16, FLOAT32, GROUP_ROWS

ROOT = Path(__file__).parents[2]
FORMATS = ROOT / "kernels" / "formats"
GOLDEN = ROOT / "tests" / "golden" / "ggml_golden.npz"

# Where each of 16 rows lies among the lines of 16 bytes: kernels/packed.h, line_row.
LINE_PLACES = [row % 4 * 4 + row // 4 for row in range(GROUP_ROWS)]


# ---- the three dtypes ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Float:
    """A dtype of tensors on the device: numpy has no bfloat16, so all are kept as their bits."""

    name: str
    code: int
    bits: type[np.unsignedinteger]
    eps: float
    tiny: float  # the smallest positive number

    def encode(self, values: np.ndarray) -> np.ndarray:
        """float32 values to bits, to nearest even."""
        values = np.asarray(values, np.float32)
        if self.code == FLOAT32:
            return values.view(np.uint32)
        if self.code == FLOAT16:
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        wide = values.view(np.uint32).astype(np.uint64)
        rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def decode(self, bits: np.ndarray) -> np.ndarray:
        """Bits to float64 values."""
        if self.code == FLOAT32:
            narrow = bits.view(np.float32)
        elif self.code == FLOAT16:
            narrow = bits.view(np.float16)
        else:
            narrow = (bits.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # of signalling NaN
            return narrow.astype(np.float64)

    def round(self, values: np.ndarray) -> np.ndarray:
        """Float values to the nearest that the dtype has, as float64."""
        return self.decode(self.encode(values))


F32 = Float("f32", FLOAT32, np.uint32, 2.0**-23, 2.0**-149)
F16 = Float("f16", FLOAT16, np.uint16, 2.0**-10, 2.0**-24)
BF16 = Float("bf16", BFLOAT16, np.uint16, 2.0**-7, 2.0**-133)
FLOATS = (F32, F16, BF16)


# ---- formats -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunk:
    """``Chunk`` of kernels/packed.h: a run of bytes of a block."""

    offset: int
    size: int
    with_lines: bool

    @property
    def places(self) -> list[int]:
        """Where each of 16 rows lies."""
        return LINE_PLACES if self.size == 16 or self.with_lines else list(range(GROUP_ROWS))


@dataclasses.dataclass(frozen=True)
class Format:
    """A format as its header describes it."""

    name: str
    block_elems: int
    chunks: tuple[Chunk, ...]
    has_wide_scale: bool  # one of 16 or 32 bits, which may be NaN

    @property
    def block_bytes(self) -> int:
        return sum(chunk.size for chunk in self.chunks)

    def row_bytes(self, k: int) -> int:
        return k // self.block_elems * self.block_bytes


def parse_format(header: str) -> Format:
    """A format from the text of its header.

    Raises:
        ValueError: a header that does not say what is needed.
    """

    def find(pattern: str) -> str:
        found = re.search(pattern, header, re.DOTALL)
        if found is None:
            raise ValueError(f"a format's header must match {pattern!r}, got none that does")
        return found[1]

    chunks = []
    for entry in re.findall(r"\{([^{}]*)\}", find(r"kChunks\[\] = \{(.*?)\};")):
        offset, size, *rest = (part.strip() for part in entry.split(","))
        chunks.append(Chunk(int(offset), int(size), rest == ["true"]))
    wide = re.search(r"^\s*(uint16_t|float) \w+;", find(r"struct Block \{(.*?)\};"), re.MULTILINE)
    return Format(
        find(r'kName = "(\w+)"'), int(find(r"kBlockElems = (\d+)")), tuple(chunks), wide is not None
    )


@functools.cache
def all_formats() -> dict[str, Format]:
    """Every format of kernels/formats/registry.h, by name."""
    names = re.findall(r"^\s*X\((\w+)\)", (FORMATS / "registry.h").read_text(), re.MULTILINE)
    formats = [parse_format((FORMATS / f"{name.lower()}.h").read_text()) for name in names]
    return {fmt.name: fmt for fmt in formats}


def pack(blocks: np.ndarray, fmt: Format) -> np.ndarray:
    """uint8 (n, bytes per row) in the packed layout, as kernels/packed.h draws it."""
    n, row_bytes = blocks.shape
    whole = n // GROUP_ROWS * GROUP_ROWS
    count = row_bytes // fmt.block_bytes
    grouped = blocks[:whole].reshape(-1, GROUP_ROWS, count, fmt.block_bytes)
    pieces = []
    for chunk in fmt.chunks:
        rows = grouped[..., chunk.offset : chunk.offset + chunk.size]
        piece = np.empty_like(rows)
        piece[:, chunk.places] = rows
        pieces.append(piece.transpose(0, 2, 1, 3).reshape(-1, count, GROUP_ROWS * chunk.size))
    packed = blocks.copy()
    if whole:
        packed[:whole] = np.concatenate(pieces, axis=2).reshape(whole, row_bytes)
    return packed


# ---- blocks whose values are known ---------------------------------------------------------------


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as data:
        return {name.lower(): data[name] for name in data.files}


def _golden_blocks(name: str, kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All golden blocks of a format, (count, bytes), and their values, (count, elements)."""
    fmt = all_formats()[name]
    data = golden()
    kinds = tuple(kind for kind in kinds if f"{name}_{kind}blocks" in data)
    blocks = [data[f"{name}_{kind}blocks"].reshape(-1, fmt.block_bytes) for kind in kinds]
    values = [data[f"{name}_{kind}values"].reshape(-1, fmt.block_elems) for kind in kinds]
    return np.concatenate(blocks), np.concatenate(values)


def _widened(kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """q4_0_f32, which ggml lacks: q4_0's blocks, scales widened, nibbles in the other order."""
    blocks, values = _golden_blocks("q4_0", kinds)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    nibbles = codes[:, 0::2] | codes[:, 1::2] << 4
    return np.concatenate([scales.view(np.uint8), nibbles], axis=1), values


def _by_reference(name: str, tame: bool) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a format without golden vectors, random ones or a quantiser's."""
    import torch

    import torch_q4

    fmt = torch_q4.formats.get(name)
    generator = torch.Generator().manual_seed(0)
    if tame and fmt.quantizes:
        w = torch.randn(256, 4 * fmt.block_elems, generator=generator)
        blocks = torch_q4.quantize(w, fmt).reshape(-1, fmt.block_bytes)
    else:
        shape = (1 << 14, fmt.block_bytes)
        blocks = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return blocks.numpy(), fmt.reference(blocks).numpy()


@functools.cache
def known_blocks(name: str, *, tame: bool) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and their float32 values.

    Args:
        name: the format.
        tame: only finite weights of ordinary size, as a product wants them; else random bytes too,
            whose values may be huge, NaN or infinite.
    """
    kinds = ("", "imatrix_") if tame else ("", "imatrix_", "raw_")
    if name == "q4_0_f32":
        blocks, values = _widened(kinds)
    elif f"{name}_blocks" in golden() or f"{name}_raw_blocks" in golden():
        blocks, values = _golden_blocks(name, kinds)
    else:
        blocks, values = _by_reference(name, tame)
    if tame:
        largest = np.abs(values).max(axis=1)
        keep = (largest > 1e-2) & (largest < 20)
        blocks, values = blocks[keep], values[keep]
    return blocks, values


def may_be_nan(fmt: Format) -> bool:
    """Whether products with a block of bits that are all set are NaN.

    A scale of 16 or 32 bits is NaN then. One of eight bits may have no NaN, and no infinity either,
    which golden blocks tell.
    """
    return fmt.has_wide_scale or not np.isfinite(known_blocks(fmt.name, tame=False)[1]).all()


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight whose values are known."""

    fmt: Format
    blocks: np.ndarray  # uint8 (n, bytes per row)
    values: np.ndarray  # float32 (n, k)

    @property
    def n(self) -> int:
        return self.values.shape[0]

    @property
    def k(self) -> int:
        return self.values.shape[1]

    def stored(self, packed: bool) -> np.ndarray:
        """The bytes in either layout."""
        return pack(self.blocks, self.fmt) if packed else self.blocks


def make_weight(
    fmt: Format, n: int, k: int, rng: np.random.Generator, *, tame: bool = True
) -> Weight:
    """A weight of known blocks in random order."""
    blocks, values = known_blocks(fmt.name, tame=tame)
    chosen = rng.integers(0, len(blocks), (n, k // fmt.block_elems))
    return Weight(fmt, blocks[chosen].reshape(n, -1), values[chosen].reshape(n, k))


# ---- what kernels compute from activations and weights -------------------------------------------


def quantize_q4_0(w: np.ndarray) -> np.ndarray:
    """float32 (count, 32) to ggml's q4_0 blocks (quantize_row_q4_0_ref)."""
    extreme = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], axis=1)
    d = extreme / np.float32(-8)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    codes = np.minimum(15, (w * inverse + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    nibbles = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([d.astype(np.float16).view(np.uint8), nibbles], axis=1)


def quantize_q8_0(w: np.ndarray) -> np.ndarray:
    """float32 (count, 32) to ggml's q8_0 blocks (quantize_row_q8_0_ref)."""
    d = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    scaled = w * inverse
    # roundf: halves away from zero. Exact in float64, where the sum does not round.
    codes = np.trunc(scaled.astype(np.float64) + np.copysign(0.5, scaled)).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), codes.view(np.uint8)], axis=1)


QUANTIZERS = {"q4_0": quantize_q4_0, "q8_0": quantize_q8_0}


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations as ``compute="int8"`` sees them."""

    codes: np.ndarray  # int8 (m, k)
    scales: np.ndarray  # float32 (m, k / 32)
    sums: np.ndarray  # int32 (m, k / 16)

    @property
    def values(self) -> np.ndarray:
        """float64 (m, k)."""
        return self.codes * np.repeat(self.scales.astype(np.float64), 32, axis=1)


def quantize_activations(x: np.ndarray) -> Activations:
    """float32 (m, k): a group with an infinity or a NaN has codes 0 and the scale NaN."""
    m, k = x.shape
    groups = x.reshape(m, k // 32, 32)
    largest = np.abs(groups).max(axis=2)
    finite = np.isfinite(largest)
    scales = np.where(finite, largest, 0) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 1.2e-38)
    scaled = np.where(finite[..., None], groups, 0) * inverse[..., None]
    codes = np.rint(scaled).astype(np.int8).reshape(m, k)
    sums = codes.reshape(m, k // 16, 16).sum(axis=2, dtype=np.int32)
    return Activations(codes, np.where(finite, scales, np.float32(np.nan)), sums)
