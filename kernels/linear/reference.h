// linear in its plainest form, a thread for each element of the result: the one to read, and the
// one that tests hold the others against.
#pragma once

#include "../read/decode.h"
#include "../read/values.h"

namespace TORCH_Q4_NAMESPACE {

// x[m] . W[row] for the row whose blocks `rows` reads.
template <class Format, class T, class Rows>
TORCH_Q4_DEVICE float row_product(const Rows& rows, const void* x, int64_t m, int64_t k) {
  float sum = 0;
  const int blocks = static_cast<int>(k / Format::kBlockElems);
#pragma unroll 1
  for (int index = 0; index < blocks; ++index) {
    const auto block = rows.block(index);
#pragma unroll 1
    for (int part = 0; part < kBlockParts<Format>; ++part) {
      const PartCodes<Format, decltype(rows.block(0))> codes(block, part);
      const PartScales<Format, true> scales(block, part);
#pragma unroll
      for (int i = 0; i < kPartSegments<Format>; ++i) {
        const int which = kPartScales<Format> == 1 ? 0 : i;
        // Sums of sums: an error grows with the number of additions that one value goes through.
        float part_sum = 0;
        Activations<T> elements;
        elements.load(row_of<T>(x, m, k),
                      index * Format::kBlockElems + 16 * part_segment<Format>(part, i));
        decode_segment<Format, true>(
            codes.segment(i), scales.scale[which], scales.start[which],
            [&](int j, float weight) { part_sum = fmaf(weight, elements.at(j), part_sum); });
        sum += part_sum;
        schedule_fence();
      }
    }
  }
  return sum;
}

template <class Format, class T>
TORCH_Q4_DEVICE void linear_reference(const gpu::LinearArgs& a) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  const int64_t rows = a.row_end - a.row_begin;
  if (thread >= a.m * rows) return;
  const int64_t m = thread / rows, row = a.row_begin + thread % rows;
  const float sum =
      row_is_packed(a.packed, a.n, row)
          ? row_product<Format, T>(
                PackedRows<Format>(a.blocks, a.k, row / kTileRows * kTileRows, row % kTileRows),
                a.x, m, a.k)
          : row_product<Format, T>(CanonicalRows<Format>(a.blocks, a.k, row), a.x, m, a.k);
  const float bias = a.bias == nullptr ? 0 : load_value(a.bias, row, a.dtype);
  store_value(a.out, m * a.n + row, sum + bias, a.dtype);
}

}  // namespace TORCH_Q4_NAMESPACE
