// How a GPU's thread reads weights: a part of one row's block at a time. Here are the readers of
// both layouts in memory; linear/hopper_rows.h and dequantize.h have those of shared memory.
//
// A part (formats/registry.h) is 64 elements of a block, or all of a smaller one: four or two
// segments of 16 elements. Threads with neighbouring places read neighbouring 16 bytes of a packed
// weight, and those of different parts the other lines of the same block.
#pragma once

#include "../arguments.h"
#include "../formats/registry.h"
#include "bytes.h"

namespace TORCH_Q4_NAMESPACE {

template <class Format>
constexpr int kPartElems = gpu::part_elems(Format::kBlockElems);
template <class Format>
constexpr int kBlockParts = Format::kBlockElems / kPartElems<Format>;
template <class Format>
constexpr int kPartSegments = kPartElems<Format> / 16;
template <class Format>
constexpr int kPartScales = kPartSegments<Format> == 4 ? 4 : 1;

// Segment i of a part, as its number within the block.
template <class Format>
TORCH_Q4_DEVICE int part_segment(int part, int i) {
  // With bitwise operators the compiler sees that i alone decides by how much codes are shifted.
  return kBlockParts<Format> == 1 ? i : (part >> 1) << 3 | (part & 1) | i << 1;
}

// The largest power of two that divides what kOffsets is the bitwise or of.
template <int kOffsets>
constexpr int kAlignment = kOffsets & -kOffsets;

// 16-byte chunks come first in kChunks, and then those that go with them.
template <class Format>
constexpr int line_count() {
  int count = 0;
  while (Format::kChunks[count].size == 16) ++count;
  return count;
}
template <class Format>
constexpr int kLineCount = line_count<Format>();

// How one row's chunks of four, two and one byte are read, by their number: what the readers below
// have in common. Row says where a chunk of its own lies, and to how many bytes it is aligned.
template <class Format, class Row>
struct SmallChunks {
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t word() const {
    return load_word<Row::template kSmallAlign<kIndex>>(chunk<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t halfword() const {
    static_assert(Row::template kSmallAlign<kIndex> >= 2);
    return *reinterpret_cast<const uint16_t*>(chunk<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t byte() const {
    return *chunk<kIndex>();
  }
  template <int kIndex>
  TORCH_Q4_DEVICE float half() const {
    return half_to_float(static_cast<uint16_t>(halfword<kIndex>()));
  }

  // For formats with a grid (formats/tables.h), whose words, halfwords and bytes are read where
  // they are used. Row says where a byte of a run of chunks lies.
  template <int kAlign>
  struct Place {
    const uint8_t* from;

    TORCH_Q4_DEVICE uint32_t word() const { return load_word<kAlign>(from); }
    TORCH_Q4_DEVICE uint32_t halfword() const {
      static_assert(kAlign >= 2);
      return *reinterpret_cast<const uint16_t*>(from);
    }
    TORCH_Q4_DEVICE uint32_t byte() const { return *from; }
  };
  template <int kFirst>
  TORCH_Q4_DEVICE auto at(int offset) const {
    constexpr int kAlign = Row::template kSmallAlign<kFirst>;
    return Place<kAlign>{static_cast<const Row*>(this)->template place_of<kFirst>(offset)};
  }
  TORCH_Q4_DEVICE Bytes grid_codes(int segment) const {
    Bytes codes;
    Format::segment(static_cast<const Row&>(*this), segment, codes.w);
    return codes;
  }

 private:
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* chunk() const {
    // Such a chunk has its rows in another order, which fifth_bits and digits know.
    static_assert(!Format::kChunks[kIndex].with_lines);
    return static_cast<const Row*>(this)->template small_chunk<kIndex>();
  }
};

// One row's block in the packed layout (packed.h). What is the same for a whole block of threads
// stays a pointer by itself: AMD's loads add an offset of 32 bits to that without an instruction.
template <class Format>
struct PackedRow : SmallChunks<Format, PackedRow<Format>> {
  const uint8_t* group;  // the first block of its 16 rows
  uint32_t start;        // of its own block from there
  int row;               // among the 16

  TORCH_Q4_DEVICE PackedRow(const uint8_t* group, uint32_t start, int row)
      : group(group), start(start), row(row) {}
  template <int kIndex>
  static constexpr int kSmallAlign = Format::kChunks[kIndex].size;

  // A place in the group: what differs between threads, and what is known when this is compiled.
  struct Offset {
    uint32_t thread;
    int fixed;
  };
  TORCH_Q4_DEVICE const uint8_t* at_offset(const Offset& offset) const {
    return group + offset.thread + offset.fixed;
  }
  TORCH_Q4_DEVICE Offset chunk(int offset, int size, int place) const {
    return {start + static_cast<uint32_t>(size * place), offset};
  }
  // Chunk `index`, which goes with lines.
  template <int kSize>
  TORCH_Q4_DEVICE Offset chunk_with_lines(int index) const {
    const int before = index - kLineCount<Format>;
    return chunk(256 * kLineCount<Format> + kTileRows * kSize * before, kSize, line_row(row));
  }
  template <int kIndex>
  TORCH_Q4_DEVICE Offset small_offset() const {
    return chunk(chunk_start<Format>(kIndex), Format::kChunks[kIndex].size, row);
  }
  template <int kFirst>
  TORCH_Q4_DEVICE Offset offset_of(int offset) const {
    return {start + static_cast<uint32_t>(packed_place<Format, kFirst>(offset, row)), 0};
  }

  TORCH_Q4_DEVICE Bytes line(int index) const {
    return load_line<16>(at_offset(chunk(256 * index, 16, line_row(row))));
  }
  TORCH_Q4_DEVICE Bytes fifth_bits(int index) const {
    return expand_bits(*reinterpret_cast<const uint16_t*>(at_offset(chunk_with_lines<2>(index))));
  }
  TORCH_Q4_DEVICE Bytes digits(int index) const {
    return expand_digits(*reinterpret_cast<const uint32_t*>(at_offset(chunk_with_lines<4>(index))));
  }
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* small_chunk() const {
    return at_offset(small_offset<kIndex>());
  }
  template <int kFirst>
  TORCH_Q4_DEVICE const uint8_t* place_of(int offset) const {
    return at_offset(offset_of<kFirst>(offset));
  }
};

// One row's block in GGML's own layout, which is aligned to no more than its size is.
template <class Format>
struct CanonicalRow : SmallChunks<Format, CanonicalRow<Format>> {
  const uint8_t* block;

  TORCH_Q4_DEVICE explicit CanonicalRow(const uint8_t* block) : block(block) {}

  static constexpr int kLines = kLineCount<Format>;
  static constexpr int kFirst = Format::kChunks[0].offset;

  // Lines follow each other, except that they may start again elsewhere, once.
  static constexpr int restart() {
    int index = 0;
    while (index < kLines && Format::kChunks[index].offset == kFirst + 16 * index) ++index;
    return index;
  }
  static constexpr int jump() {
    return restart() == kLines ? 0 : Format::kChunks[restart()].offset - kFirst - 16 * restart();
  }
  static constexpr bool lines_follow() {
    for (int i = 0; i < kLines; ++i) {
      const int offset = kFirst + 16 * i + (i >= restart() ? jump() : 0);
      if (Format::kChunks[i].offset != offset) return false;
    }
    return true;
  }
  static constexpr int kBytes = sizeof(typename Format::Block);
  static constexpr int kAlign = kAlignment<kBytes | kFirst | jump() | 16>;
  template <int kIndex>
  static constexpr int kSmallAlign = kAlignment<kBytes | Format::kChunks[kIndex].offset | 4>;
  static constexpr int kRestart = restart(), kJump = jump();
  static constexpr bool kLinesFollow = lines_follow();

  TORCH_Q4_DEVICE static int line_offset(int index) {
    static_assert(kLinesFollow);
    return kFirst + 16 * index + (index >= kRestart ? kJump : 0);
  }
  // Of those that go with lines, the first.
  static constexpr int kBits = Format::kChunks[kLines < kChunkCount<Format> ? kLines : 0].offset;

  TORCH_Q4_DEVICE static int bits_offset(int index) { return kBits + 2 * (index - kLines); }
  TORCH_Q4_DEVICE static uint32_t digits_word(const uint8_t* block, int index) {
    return load_word<kAlignment<kBytes | kBits | 4>>(block + kBits + 4 * (index - kLines));
  }
  TORCH_Q4_DEVICE Bytes line(int index) const {
    return load_line<kAlign>(block + line_offset(index));
  }
  TORCH_Q4_DEVICE Bytes fifth_bits(int index) const {
    return expand_bits(*reinterpret_cast<const uint16_t*>(block + bits_offset(index)));
  }
  TORCH_Q4_DEVICE Bytes digits(int index) const { return expand_digits(digits_word(block, index)); }
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* small_chunk() const {
    return block + Format::kChunks[kIndex].offset;
  }
  template <int kFirst>
  TORCH_Q4_DEVICE const uint8_t* place_of(int offset) const {
    return block + Format::kChunks[kFirst].offset + offset;
  }
};

// All blocks of one row: `row` of the group of 16 that begins with row `first`.
template <class Format>
struct PackedRows {
  const uint8_t* group;
  int row;

  TORCH_Q4_DEVICE PackedRows(const uint8_t* blocks, int64_t k, int64_t first, int row)
      : group(blocks + first * (k / Format::kBlockElems) *
                           static_cast<int64_t>(sizeof(typename Format::Block))),
        row(row) {}
  TORCH_Q4_DEVICE PackedRow<Format> block(int index) const {
    constexpr uint32_t kBytes = kTileRows * sizeof(typename Format::Block);
    return PackedRow<Format>(group, static_cast<uint32_t>(index) * kBytes, row);
  }
};

template <class Format>
struct CanonicalRows {
  const uint8_t* first;

  TORCH_Q4_DEVICE CanonicalRows(const uint8_t* blocks, int64_t k, int64_t row)
      : first(blocks + row * (k / Format::kBlockElems) *
                           static_cast<int64_t>(sizeof(typename Format::Block))) {}
  TORCH_Q4_DEVICE CanonicalRow<Format> block(int index) const {
    return CanonicalRow<Format>(first +
                                index * static_cast<int64_t>(sizeof(typename Format::Block)));
  }
};

// Whether row `row` of a weight is in the packed layout.
TORCH_Q4_DEVICE bool row_is_packed(int32_t packed, int64_t n, int64_t row) {
  return packed != 0 && row < n / kTileRows * kTileRows;
}

}  // namespace TORCH_Q4_NAMESPACE
