// linear for a few rows of x. A block of threads takes 16 rows of W and kXRows rows of x; thread i
// has row line_row(i % 16) and every 16th part from i / 16 on, so that the threads of 16 rows read
// 256 bytes side by side, and a block all of a row's parts at once.
#pragma once

#include "../read/decode.h"
#include "../read/values.h"

namespace TORCH_Q4_NAMESPACE {

// Adds up the 16 threads of each row of W and of x, always in the same order, and stores the
// result.
template <int kXRows>
TORCH_Q4_DEVICE void store_sums(const gpu::LinearArgs& a, const float (&sums)[kXRows],
                                int64_t first_row, int64_t first_x_row) {
  constexpr int kSlices = gpu::kBlockThreads / kTileRows;
  __shared__ float shared[kXRows * gpu::kBlockThreads];
  const int thread = threadIdx.x;
#pragma unroll
  for (int c = 0; c < kXRows; ++c) shared[c * gpu::kBlockThreads + thread] = sums[c];
  __syncthreads();
  if (thread >= kXRows * kTileRows) return;
  const int x_row = thread / kTileRows, place = thread % kTileRows;
  const int64_t row = first_row + line_row(place), m = first_x_row + x_row;
  if (row >= a.row_end || m >= a.m) return;
  float sum = 0;
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    sum += shared[x_row * gpu::kBlockThreads + slice * kTileRows + place];
  }
  if (a.bias != nullptr) sum += load_value(a.bias, row, a.dtype);
  store_value(a.out, m * a.n + row, sum, a.dtype);
}

// A row of x past the last one reads the last: its sums are not stored.
TORCH_Q4_DEVICE int64_t clamped_row(int64_t m, int64_t rows) { return m < rows ? m : rows - 1; }

template <class Format, class T, int kXRows, class Rows>
TORCH_Q4_DEVICE void add_products(const Rows& rows, const gpu::LinearArgs& a, int64_t first_x_row,
                                  float (&sums)[kXRows]) {
  constexpr bool kDot2 = kHasDot2<T> && kXRows >= kFewestDot2XRows<T>;
  constexpr int kBatch = kDot2 ? 4 : 2;  // rows of x that are read at once
  const int parts = static_cast<int>(a.k / kPartElems<Format>);
#pragma unroll 1
  for (int index = threadIdx.x / kTileRows; index < parts;
       index += gpu::kBlockThreads / kTileRows) {
    const auto block = rows.block(index / kBlockParts<Format>);
    const int part = index % kBlockParts<Format>;
    const PartCodes<Format, decltype(rows.block(0)), kFewRegisters> codes(block, part);
    const std::conditional_t<kDot2, PairDecoder<Format, T>, PartScales<Format, kIsFloat32<T>>>
        scales(block, part);
    const uint32_t first = index / kBlockParts<Format> * Format::kBlockElems;
#pragma unroll
    for (int i = 0; i < kPartSegments<Format>; ++i) {
      const int which = kPartScales<Format> == 1 ? 0 : i;
      const uint32_t at = first + 16 * part_segment<Format>(part, i);
      if constexpr (kDot2) {
        uint32_t weights[8];
        scales.decode(codes.segment(i), i, weights);
#pragma unroll
        for (int c = 0; c < kXRows; ++c) {
          Activations<T> x;
          x.load(row_of<T>(a.x, clamped_row(first_x_row + c, a.m), a.k), at);
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[c] = dot2<T>(weights[j], x.w[j], sums[c]);
          if (c % kBatch == kBatch - 1) schedule_fence();
        }
      } else {
        float weights[16];
        decode_segment<Format, kIsFloat32<T>>(codes.segment(i), scales.scale[which],
                                              scales.start[which],
                                              [&](int j, float weight) { weights[j] = weight; });
#pragma unroll
        for (int c = 0; c < kXRows; ++c) {
          Activations<T> x;
          x.load(row_of<T>(a.x, clamped_row(first_x_row + c, a.m), a.k), at);
          // A sum of sums: an error grows with the additions that one value goes through.
          float sum = 0;
#pragma unroll
          for (int j = 0; j < 16; ++j) sum = fmaf(weights[j], x.at(j), sum);
          sums[c] += sum;
          if (c % kBatch == kBatch - 1) schedule_fence();
        }
      }
      if (kXRows > 1 || !kDot2 || kFewRegisters) schedule_fence();
    }
  }
}

// Calls use(rows) for the row of this thread in its block's 16; past the last row, for the last.
template <class Format, class Use>
TORCH_Q4_DEVICE void with_rows(const gpu::LinearArgs& a, int64_t first_row, const Use& use) {
  if (row_is_packed(a.packed, a.n, first_row)) {
    use(PackedRows<Format>(a.blocks, a.k, first_row, line_row(threadIdx.x % kTileRows)));
  } else {
    const int64_t row = first_row + line_row(threadIdx.x % kTileRows);
    use(CanonicalRows<Format>(a.blocks, a.k, clamped_row(row, a.n)));
  }
}

template <class Format, class T, int kXRows>
TORCH_Q4_DEVICE void linear_rows(const gpu::LinearArgs& a) {
  const int64_t first_row = a.row_begin + static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int64_t first_x_row = static_cast<int64_t>(blockIdx.y) * kXRows;
  float sums[kXRows] = {};
  with_rows<Format>(a, first_row, [&](const auto& rows) {
    add_products<Format, T, kXRows>(rows, a, first_x_row, sums);
  });
  store_sums<kXRows>(a, sums, first_row, first_x_row);
}

// The same with int8 activations: of each group, sum over k of scale * (code - offset) + shift
// times x_scale * x_code is x_scale * (scale * sum(code * x_code)
//                                     + (shift - scale * offset) * sum(x_code)).
template <class Format, int kXRows, class Rows>
TORCH_Q4_DEVICE void add_int8_products(const Rows& rows, const gpu::LinearArgs& a,
                                       int64_t first_x_row, float (&sums)[kXRows]) {
  // dot4 takes signed bytes: codes of eight bits have their offset taken off first.
  constexpr bool kWide = Format::kCodeBits == 8;
  static_assert(!kWide || Format::kOffset == 128);
  constexpr float kOffset = kWide ? 0 : Format::kOffset;
  const int parts = static_cast<int>(a.k / kPartElems<Format>);
#pragma unroll 1
  for (int index = threadIdx.x / kTileRows; index < parts;
       index += gpu::kBlockThreads / kTileRows) {
    const auto block = rows.block(index / kBlockParts<Format>);
    const int part = index % kBlockParts<Format>;
    const PartCodes<Format, decltype(rows.block(0)), kFewRegisters> codes(block, part);
    float scale[kPartScales<Format>], shift[kPartScales<Format>];
    Format::part_scales(block, part, scale, shift);
    const uint32_t first = index / kBlockParts<Format> * Format::kBlockElems;
#pragma unroll
    for (int i = 0; i < kPartSegments<Format>; ++i) {
      const int which = kPartScales<Format> == 1 ? 0 : i;
      const float start =
          Format::kHasShift ? fmaf(-kOffset, scale[which], shift[which]) : -kOffset * scale[which];
      const uint32_t at = first + 16 * part_segment<Format>(part, i);
      const Bytes bytes = kWide ? codes.segment(i) ^ 0x80 : codes.segment(i);
#pragma unroll
      for (int c = 0; c < kXRows; ++c) {
        const int64_t row = clamped_row(first_x_row + c, a.m);
        const Bytes x = load_line<16>(static_cast<const uint8_t*>(a.x) + row * a.k + at);
        int32_t product = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) product = dot4(bytes.w[j], x.w[j], product);
        const float x_scale = (a.scales + row * (a.k / 32))[at / 32];
        const auto x_sum = static_cast<float>((a.sums + row * (a.k / 16))[at / 16]);
        const float group = fmaf(scale[which], static_cast<float>(product), start * x_sum);
        sums[c] = fmaf(x_scale, group, sums[c]);
        if (c % 2 == 1) schedule_fence();
      }
    }
  }
}

template <class Format, int kXRows>
TORCH_Q4_DEVICE void rows_int8(const gpu::LinearArgs& a) {
  const int64_t first_row = a.row_begin + static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int64_t first_x_row = static_cast<int64_t>(blockIdx.y) * kXRows;
  float sums[kXRows] = {};
  with_rows<Format>(a, first_row, [&](const auto& rows) {
    add_int8_products<Format, kXRows>(rows, a, first_x_row, sums);
  });
  store_sums<kXRows>(a, sums, first_row, first_x_row);
}

}  // namespace TORCH_Q4_NAMESPACE
