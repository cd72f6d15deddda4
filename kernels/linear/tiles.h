// linear on NVIDIA's matrix cores: packed weights, float16 or bfloat16 activations. A block takes
// 16 rows of W and kXRows of x; its waves share out k. Each weight is decoded once for all of the
// block's rows of x, straight into the registers that the matrix instruction reads, and rounded to
// x's dtype once, as dequantising it to that dtype would.
#pragma once

#include "rows.h"

namespace TORCH_Q4_NAMESPACE {

// The product with kTiles times 16 rows of x from first_x_row on.
template <class Format, class T, int kTiles>
TORCH_Q4_DEVICE void multiply_tiles(const gpu::LinearArgs& a, int64_t first_row,
                                    int64_t first_x_row) {
  using Tile = Tile<T>;
  constexpr int kWaves = gpu::kBlockThreads / kWaveLanes;
  const int lane = threadIdx.x % kWaveLanes, wave = same_in_wave(threadIdx.x / kWaveLanes);
  const int parts = static_cast<int>(a.k / kPartElems<Format>);
  const auto k = static_cast<uint32_t>(a.k);

  float sums[kTiles][Tile::kXRowSlots][Tile::kSums] = {};
  // A step takes kKLanes parts, one a lane. In the last one there may be fewer: a lane without
  // takes the last part again and multiplies it with zeros, since matrix instructions take all
  // lanes.
  const auto step = [&](int base, auto all) {
    const int wanted = base + Tile::k_lane(lane);
    const bool is_part = all.value || wanted < parts;
    const int index = is_part ? wanted : parts - 1;
    const int block = index / kBlockParts<Format>, part = index % kBlockParts<Format>;
    const uint32_t first = block * Format::kBlockElems;

    const auto block_of = [&](int slot) {
      const int row = line_row(Tile::place(lane, slot));
      return PackedRows<Format>(a.blocks, a.k, first_row, row).block(block);
    };
    // Two row slots at most: where there is one, the second entry is the same again.
    const PartCodes<Format, PackedRow<Format>> codes[] = {{block_of(0), part},
                                                          {block_of(Tile::kRowSlots - 1), part}};
    const PairDecoder<Format, T> scales[] = {{block_of(0), part},
                                             {block_of(Tile::kRowSlots - 1), part}};
#pragma unroll
    for (int i = 0; i < kPartSegments<Format>; ++i) {
      uint32_t weights[Tile::kRowSlots][8];
#pragma unroll
      for (int slot = 0; slot < Tile::kRowSlots; ++slot) {
        scales[slot].decode(codes[slot].segment(i), i, weights[slot]);
        if (!is_part) {
#pragma unroll
          for (int j = 0; j < 8; ++j) weights[slot][j] = 0;
        }
      }
      const uint32_t at = first + 16 * part_segment<Format>(part, i);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        // A row of x past the last reads that, and is not stored.
        const int64_t base = first_x_row + 16 * tile;
        const int64_t rest = Tile::kXRowSlots > 2 ? recomputed(a.m) - base : a.m - base;
        const int last = rest > 0 ? static_cast<int>(rest < 16 ? rest : 16) - 1 : 0;
        const uint8_t* x_rows = row_of<T>(a.x, clamped_row(base, a.m), a.k);
#pragma unroll
        for (int slot = 0; slot < Tile::kXRowSlots; ++slot) {
          const int x_row = Tile::x_row(lane, slot);
          Activations<T> x;
          x.load(x_rows, static_cast<uint32_t>(x_row < last ? x_row : last) * k + at);
          if (!is_part) {
#pragma unroll
            for (int j = 0; j < 8; ++j) x.w[j] = 0;
          }
          uint32_t halves[2][4];
          __builtin_memcpy(halves, x.w, sizeof(halves));
          Tile::multiply(weights, 0, halves[0], sums[tile][slot]);
          Tile::multiply(weights, 1, halves[1], sums[tile][slot]);
          if (slot % 4 == 3) schedule_fence();
        }
        schedule_fence();
      }
    }
  };
  // Whether no step has too few parts, or lanes need not work together.
  constexpr bool kAlone = kBlockParts<Format> >= Tile::kKLanes || Tile::kPartialSums;
  int base = wave * Tile::kKLanes;
  const int ahead = Tile::kPartialSums ? Tile::k_lane(lane) : kAlone ? 0 : Tile::kKLanes - 1;
#pragma unroll 1
  for (; base + ahead < parts; base += kWaves * Tile::kKLanes) step(base, std::true_type());
  if constexpr (!kAlone) {
    if (base < parts) step(base, std::false_type());
  }

  // A tile at a time, every wave (and k_lane, where its sums are partial) leaves its 256 sums in a
  // slice of their own, and each thread adds up one element of the result.
  constexpr int kSlices = kWaves * (Tile::kPartialSums ? Tile::kKLanes : 1);
  constexpr int kStride = 16 + 1;  // between rows of x: the odd one keeps rows in different banks
  __shared__ float shared[kSlices * 16 * kStride];
  const int slice = Tile::kPartialSums ? wave * Tile::kKLanes + Tile::k_lane(lane) : wave;
  const int place = threadIdx.x % 16, x_row = threadIdx.x / 16;
  const int64_t row = first_row + line_row(place);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile > 0) __syncthreads();
#pragma unroll
    for (int slot = 0; slot < Tile::kXRowSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) {
        const int at = Tile::sum_x_row(lane, slot, i) * kStride + Tile::sum_place(lane, i);
        shared[slice * 16 * kStride + at] = sums[tile][slot][i];
      }
    }
    __syncthreads();
    const int64_t m = first_x_row + 16 * tile + x_row;
    if (m < a.m) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) sum += shared[(i * 16 + x_row) * kStride + place];
      if (a.bias != nullptr) sum += load_value(a.bias, row, a.dtype);
      store_value(a.out, m * a.n + row, sum, a.dtype);
    }
  }
}

template <class Format, class T, int kXRows>
TORCH_Q4_DEVICE void linear_tiles(const gpu::LinearArgs& a) {
  constexpr int kTiles = kXRows / 16 < Tile<T>::kMaxTiles ? kXRows / 16 : Tile<T>::kMaxTiles;
  const int64_t first_row = a.row_begin + static_cast<int64_t>(blockIdx.x) * kTileRows;
#pragma unroll 1
  for (int pass = 0; pass < kXRows / 16; pass += kTiles) {
    const int64_t first_x_row = static_cast<int64_t>(blockIdx.y) * kXRows + 16 * pass;
    if (first_x_row >= a.m) return;
    if (pass > 0) __syncthreads();
    multiply_tiles<Format, T, kTiles>(a, first_row, first_x_row);
  }
}

}  // namespace TORCH_Q4_NAMESPACE
