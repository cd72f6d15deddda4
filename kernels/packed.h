// The packed layout: the same bytes as GGML's, in the order that kernels want to read them.
//
// GGML's blocks of 18, 22, 34, 84, 110 or 210 bytes follow each other row by row, so that nothing
// wider than 2 or 4 bytes is aligned and neighbouring rows lie far apart. Packed, 16 rows go
// together, one side of the 16x16x16 tile of matrix cores and one AVX-512 register of 32-bit lanes:
//
//     GGML: 16 rows of one block each       packed: chunk by chunk, 16 rows of each chunk
//
//     row 0   d qs0 qs1 ... qs15            qs of rows 0 4 8 12 1 5 9 13 ... 15   (16 x 16 bytes)
//     row 1   d qs0 qs1 ... qs15      ->    d  of rows 0 1 2 3 ... 15             (16 x 2 bytes)
//     ...
//     row 15  d qs0 qs1 ... qs15            then the same 16 rows' next block along K
//
// Each format cuts its block into chunks of 16, 4, 2 or 1 bytes (kChunks): first those of 16 bytes,
// then those `with_lines`, which follow each other in the block, too, then the others, wide ones
// first. Every chunk of 16 rows starts at a multiple of 16 bytes from its block's start, so that
// every load can be 16 bytes wide.
//
// 16-byte chunks hold their rows in the order 0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15: on a CPU, a
// 4x4 transposition of 32-bit words inside each 128-bit lane (the only one that is cheap) then
// leaves four consecutive bytes of rows 0, 1, 2, ... in lanes 0, 1, 2, ...; a matrix core does not
// care which of its 16 rows is which.
//
// Rows past the last multiple of 16 stay as GGML has them. So the packed form of N rows has exactly
// the bytes of the canonical one, 16 rows at a time, and packing works in place.
#pragma once

#include <utility>

#include "arch/arch.h"

namespace TORCH_Q4_NAMESPACE {

constexpr int kTileRows = 16;  // rows that are packed together

// A run of bytes of a block. Chunks of 16 bytes, and small ones that are used together with them
// byte by byte (`with_lines`), hold their rows in the order of line_row; others from 0 to 15.
struct Chunk {
  int offset, size;
  bool with_lines = false;
};

// The row whose 16-byte chunk lies at `place`, and the place of a row: the map is its own inverse.
TORCH_Q4_HOST_DEVICE constexpr int line_row(int place) { return place % 4 * 4 + place / 4; }

// Where row `row` of a chunk lies among the 16.
TORCH_Q4_HOST_DEVICE constexpr int chunk_place(const Chunk& chunk, int row) {
  return chunk.size == 16 || chunk.with_lines ? line_row(row) : row;
}

template <class Format>
constexpr int kChunkCount = sizeof(Format::kChunks) / sizeof(Chunk);

// Where chunk `index` of 16 rows starts in their packed block.
template <class Format>
TORCH_Q4_HOST_DEVICE constexpr int chunk_start(int index) {
  int start = 0;
  for (int i = 0; i < index; ++i) start += kTileRows * Format::kChunks[i].size;
  return start;
}

// Where the byte at `offset` of a run of chunks of one size, which begins with chunk kFirst, lies
// for row `row` in the packed block of its 16 rows.
template <class Format, int kFirst>
TORCH_Q4_HOST_DEVICE constexpr int packed_place(int offset, int row) {
  constexpr Chunk kChunk = Format::kChunks[kFirst];
  const auto at = static_cast<unsigned>(offset);
  const unsigned chunk = at / kChunk.size, rest = at % kChunk.size;
  return chunk_start<Format>(kFirst) + static_cast<int>(chunk * kTileRows * kChunk.size + rest) +
         kChunk.size * chunk_place(kChunk, row);
}

// Whether the chunks are of the sizes and in the order that readers know, and cover each byte of
// the block once.
template <class Format>
constexpr bool chunks_cover_block() {
  int covered = 0;
  for (int i = 0; i < kChunkCount<Format>; ++i) {
    const Chunk chunk = Format::kChunks[i];
    if (chunk.with_lines && i > 0) {
      const Chunk before = Format::kChunks[i - 1];
      const bool follows = before.with_lines && before.size == chunk.size &&
                           before.offset + chunk.size == chunk.offset;
      if (before.size != 16 && !follows) return false;
    }
    if (chunk.size != 16 && chunk.size != 4 && chunk.size != 2 && chunk.size != 1) return false;
    for (int j = 0; j < i; ++j) {
      const Chunk other = Format::kChunks[j];
      if (chunk.offset < other.offset + other.size && other.offset < chunk.offset + chunk.size) {
        return false;
      }
    }
    covered += chunk.size;
  }
  return covered == sizeof(typename Format::Block) &&
         chunk_start<Format>(kChunkCount<Format>) == kTileRows * covered;
}

namespace packed_detail {

template <class Format, int kIndex, bool kPack>
TORCH_Q4_HOST_DEVICE inline void move_chunk(uint8_t* rows, int64_t row_bytes, int count,
                                            uint8_t* packed) {
  constexpr Chunk kChunk = Format::kChunks[kIndex];
  constexpr int kStart = chunk_start<Format>(kIndex);
  for (int row = 0; row < count; ++row) {
    const int place = chunk_place(kChunk, row);
    uint8_t* canonical = rows + row * row_bytes + kChunk.offset;
    uint8_t* other = packed + kStart + place * kChunk.size;
    if (kPack) {
      std::memcpy(other, canonical, kChunk.size);
    } else {
      std::memcpy(canonical, other, kChunk.size);
    }
  }
}

template <class Format, bool kPack, int... kIndices>
TORCH_Q4_HOST_DEVICE inline void move_block(uint8_t* rows, int64_t row_bytes, int count,
                                            uint8_t* packed,
                                            std::integer_sequence<int, kIndices...>) {
  static_assert(chunks_cover_block<Format>());
  (move_chunk<Format, kIndices, kPack>(rows, row_bytes, count, packed), ...);
}

}  // namespace packed_detail

// One block of `count` <= 16 rows, `row_bytes` apart, to its packed form; places of rows past
// `count` are left alone.
template <class Format>
TORCH_Q4_HOST_DEVICE inline void pack_block(const uint8_t* rows, int64_t row_bytes, int count,
                                            uint8_t* packed) {
  packed_detail::move_block<Format, true>(const_cast<uint8_t*>(rows), row_bytes, count, packed,
                                          std::make_integer_sequence<int, kChunkCount<Format>>());
}

// The inverse, for rows [0, count).
template <class Format>
TORCH_Q4_HOST_DEVICE inline void unpack_block(const uint8_t* packed, int64_t row_bytes, int count,
                                              uint8_t* rows) {
  packed_detail::move_block<Format, false>(rows, row_bytes, count, const_cast<uint8_t*>(packed),
                                           std::make_integer_sequence<int, kChunkCount<Format>>());
}

// One row's block out of the packed block of its 16 rows.
template <class Format>
TORCH_Q4_HOST_DEVICE inline void unpack_row_block(const uint8_t* packed, int row, uint8_t* block) {
  int start = 0;
  for (int i = 0; i < kChunkCount<Format>; ++i) {
    const Chunk chunk = Format::kChunks[i];
    const int place = chunk_place(chunk, row);
    std::memcpy(block + chunk.offset, packed + start + place * chunk.size, chunk.size);
    start += kTileRows * chunk.size;
  }
}

}  // namespace TORCH_Q4_NAMESPACE
