// pack and unpack: a thread moves the chunks of one row's block (packed.h).
#pragma once

#include "read/weights.h"

namespace TORCH_Q4_NAMESPACE {

template <class Format, int kIndex, bool kPack>
TORCH_Q4_DEVICE void move_chunk(const uint8_t* from, uint8_t* to, int row) {
  constexpr Chunk kChunk = Format::kChunks[kIndex];
  constexpr int kStart = chunk_start<Format>(kIndex);
  const bool with_lines = kChunk.size == 16 || kChunk.with_lines;
  const int packed = kStart + kChunk.size * (with_lines ? line_row(row) : row);
  // A block of an odd size has its neighbours at odd addresses.
  constexpr bool kIsOdd = sizeof(typename Format::Block) % 2 != 0;
  using Least = std::conditional_t<kIsOdd, uint8_t, uint16_t>;
  const auto* source = reinterpret_cast<const Least*>(from + (kPack ? kChunk.offset : packed));
  auto* target = reinterpret_cast<Least*>(to + (kPack ? packed : kChunk.offset));
#pragma unroll
  for (int i = 0; i < kChunk.size / static_cast<int>(sizeof(Least)); ++i) target[i] = source[i];
}

template <class Format, bool kPack, int... kIndices>
TORCH_Q4_DEVICE void move_chunks(const uint8_t* from, uint8_t* to, int row,
                                 std::integer_sequence<int, kIndices...>) {
  (move_chunk<Format, kIndices, kPack>(from, to, row), ...);
}

template <class Format, bool kPack>
TORCH_Q4_DEVICE void repack(const gpu::RepackArgs& a) {
  constexpr int64_t kBytes = sizeof(typename Format::Block);
  const int64_t blocks = a.k / Format::kBlockElems;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  if (thread >= a.groups * kTileRows * blocks) return;
  const int64_t unit = thread / kTileRows;
  const int row = static_cast<int>(thread % kTileRows);
  const int64_t group = unit / blocks, block = unit % blocks;
  const int64_t packed = unit * kTileRows * kBytes;
  const int64_t canonical = ((group * kTileRows + row) * blocks + block) * kBytes;
  move_chunks<Format, kPack>(a.from + (kPack ? canonical : packed),
                             a.to + (kPack ? packed : canonical), row,
                             std::make_integer_sequence<int, kChunkCount<Format>>());
}

}  // namespace TORCH_Q4_NAMESPACE
