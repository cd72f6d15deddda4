// The product with the transposed weight, for gradients: grad (m, n) times W (n, k).
//
// A block of threads takes 256 elements of k, kTransposedRows rows of grad and the rows of W of one
// split. Thread i has segment i % 16 of the 16 and the rows i / 16, i / 16 + 16, ...; what the 16
// threads of a segment have is added up at the end.
#pragma once

#include "read/decode.h"
#include "read/values.h"

namespace TORCH_Q4_NAMESPACE {

template <class Format, class Row>
TORCH_Q4_DEVICE void add_transposed(const Row& row, int segment,
                                    const float (&grad)[gpu::kTransposedRows],
                                    float (&sums)[gpu::kTransposedRows][16]) {
  // The inverse of part_segment.
  const int part = kBlockParts<Format> == 1 ? 0 : segment / 8 * 2 + segment % 2;
  const int which =
      kPartScales<Format> == 1 ? 0 : (kBlockParts<Format> == 1 ? segment : segment / 2) % 4;
  const PartScales<Format, true> scales(row, part);
  float scale = scales.scale[0], start = scales.start[0];
#pragma unroll
  for (int i = 1; i < kPartScales<Format>; ++i) {
    scale = which == i ? scales.scale[i] : scale;
    start = which == i ? scales.start[i] : start;
  }
  const Bytes codes = Format::packed_codes(row, segment);
  decode_segment<Format, true>(codes, scale, start, [&](int j, float weight) {
#pragma unroll
    for (int m = 0; m < gpu::kTransposedRows; ++m) sums[m][j] = fmaf(grad[m], weight, sums[m][j]);
  });
}

template <class Format>
TORCH_Q4_DEVICE void transposed(const gpu::TransposedArgs& a) {
  constexpr int kRows = gpu::kTransposedRows;
  const int columns = static_cast<int>((a.k + 255) / 256);
  const int split = blockIdx.x / columns;
  const int64_t first_k = static_cast<int64_t>(blockIdx.x % columns) * 256;
  const int64_t first_m = static_cast<int64_t>(blockIdx.y) * kRows;
  const int segment = threadIdx.x % 16, in_group = threadIdx.x / 16;
  const int64_t at = first_k + 16 * segment;
  const int64_t groups = (a.n + kTileRows - 1) / kTileRows;
  const int64_t begin = groups * split / a.splits, end = groups * (split + 1) / a.splits;

  float sums[kRows][16] = {};
  if (at < a.k) {
    const auto block = static_cast<int>(at / Format::kBlockElems);
    const auto in_block = static_cast<int>(at % Format::kBlockElems / 16);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * kTileRows + in_group;
      if (row >= a.n) break;
      float grad[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        grad[m] = first_m + m < a.m ? load_value(a.grad, (first_m + m) * a.n + row, a.dtype) : 0;
      }
      if (row_is_packed(a.packed, a.n, row)) {
        const auto from =
            PackedRows<Format>(a.blocks, a.k, group * kTileRows, in_group).block(block);
        add_transposed<Format>(from, in_block, grad, sums);
      } else {
        const auto from = CanonicalRows<Format>(a.blocks, a.k, row).block(block);
        add_transposed<Format>(from, in_block, grad, sums);
      }
    }
  }

  __shared__ float shared[16 * 256];
  const int64_t element = first_k + threadIdx.x % 16 * 16 + threadIdx.x / 16;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int j = 0; j < 16; ++j) shared[in_group * 256 + 16 * j + segment] = sums[m][j];
    __syncthreads();
    if (first_m + m < a.m && element < a.k) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) sum += shared[i * 256 + threadIdx.x];
      a.partial[(split * a.m + first_m + m) * a.k + element] = sum;
    }
  }
}

}  // namespace TORCH_Q4_NAMESPACE
