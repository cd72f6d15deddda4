// Weights to values: whole matrices, and the rows that indices name.
#pragma once

#include "decode.h"

namespace TORCH_Q4_NAMESPACE {

// A segment's values, bit for bit ggml's.
template <class Format>
TORCH_Q4_DEVICE void dequantize_segment(const Bytes& codes, float scale, float shift,
                                        float (&values)[16]) {
  // First the code itself, exactly, then the product and the sum, each rounded as ggml does.
  decode_segment<Format, true>(codes, 1.0f, -Format::kOffset, [&](int i, float code) {
    const float product = signed_product(scale, code);
    values[i] = Format::kHasShift ? product + shift : product;
  });
}

// The part's values to out[index] and on.
template <class Format, class Row>
TORCH_Q4_DEVICE void dequantize_part(const Row& row, int part, void* out, int64_t index,
                                     gpu::DType dtype) {
  const PartCodes<Format, Row> codes(row, part);
  float scale[kPartScales<Format>], shift[kPartScales<Format>];
  Format::part_scales(row, part, scale, shift);
#pragma unroll
  for (int i = 0; i < kPartSegments<Format>; ++i) {
    const int which = kPartScales<Format> == 1 ? 0 : i;
    float values[16];
    dequantize_segment<Format>(codes.segment(i), scale[which], shift[which], values);
    store_segment(out, index + 16 * part_segment<Format>(part, i), values, dtype);
  }
}

// Part `part` of all the parts of row `row`.
template <class Format>
TORCH_Q4_DEVICE void dequantize_row_part(const uint8_t* blocks, int64_t n, int64_t k,
                                         int32_t packed, int64_t row, int part, void* out,
                                         int64_t out_row, gpu::DType dtype) {
  const int block = part / kBlockParts<Format>, in_block = part % kBlockParts<Format>;
  const int64_t index = out_row * k + static_cast<int64_t>(block) * Format::kBlockElems;
  if (row_is_packed(packed, n, row)) {
    const auto from =
        PackedRows<Format>(blocks, k, row / kTileRows * kTileRows, row % kTileRows).block(block);
    dequantize_part<Format>(from, in_block, out, index, dtype);
  } else {
    const auto from = CanonicalRows<Format>(blocks, k, row).block(block);
    dequantize_part<Format>(from, in_block, out, index, dtype);
  }
}

// kPanelColumns elements of 16 packed rows, 32 a thread. Threads with neighbouring rows read what
// lies side by side in the packed layout; results of 16 bits go through shared memory, so that
// neighbouring threads write what lies side by side in a row.
template <class Format>
TORCH_Q4_DEVICE void dequantize_panel(const gpu::DequantizeArgs& a, int64_t group, int64_t first) {
  constexpr int kLineElems = 8;  // of 16 bits, in 16 bytes
  constexpr int kLines = gpu::kPanelColumns / kLineElems;
  constexpr int kPieces = kBlockParts<Format> == 1 ? 1 : 2;  // threads that share a part
  __shared__ Words4 shared[kTileRows][kLines + 1];  // the odd one spreads rows over the banks
  const int place = threadIdx.x % kTileRows, slot = threadIdx.x / kTileRows;
  const int part_index = slot / kPieces, piece = slot % kPieces;
  const int block =
      static_cast<int>(first / Format::kBlockElems) + part_index / kBlockParts<Format>;
  const int part = part_index % kBlockParts<Format>;
  const int64_t out_row = group * kTileRows;
  if (block < a.k / Format::kBlockElems) {
    const auto row =
        PackedRows<Format>(a.blocks, a.k, a.row_begin + out_row, line_row(place)).block(block);
    float scale[kPartScales<Format>], shift[kPartScales<Format>];
    Format::part_scales(row, part, scale, shift);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      constexpr bool kOne = kPartScales<Format> == 1;
      // Of values, since a choice among places in an array would put that into memory.
      const float first_scale = scale[kOne ? 0 : i], second_scale = scale[kOne ? 0 : i + 2];
      const float first_shift = shift[kOne ? 0 : i], second_shift = shift[kOne ? 0 : i + 2];
      const int segment = part_segment<Format>(part, 2 * piece + i);
      float values[16];
      dequantize_segment<Format>(Format::packed_codes(row, segment),
                                 piece == 0 ? first_scale : second_scale,
                                 piece == 0 ? first_shift : second_shift, values);
      const int64_t element = static_cast<int64_t>(block) * Format::kBlockElems + 16 * segment;
      if (a.dtype == gpu::kFloat32) {
        store_segment(a.out, (out_row + line_row(place)) * a.k + element, values, a.dtype);
      } else {
        store_segment(shared[place], element - first, values, a.dtype);
      }
    }
  }
  if (a.dtype == gpu::kFloat32) return;
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTileRows * kLines; i += gpu::kBlockThreads) {
    const int from = i / kLines, line = i % kLines;
    if (first + kLineElems * line < a.k) {
      const int64_t index = (out_row + line_row(from)) * a.k + first + kLineElems * line;
      *reinterpret_cast<Words4*>(static_cast<uint16_t*>(a.out) + index) = shared[from][line];
    }
  }
}

template <class Format>
TORCH_Q4_DEVICE void dequantize(const gpu::DequantizeArgs& a) {
  const int64_t rows = a.row_end - a.row_begin;
  const int64_t groups = a.packed ? rows / kTileRows : 0;
  const int64_t panels = (a.k + gpu::kPanelColumns - 1) / gpu::kPanelColumns;
  const int64_t block = blockIdx.x;
  if (block < groups * panels) {
    const int64_t first = block % panels * gpu::kPanelColumns;
    return dequantize_panel<Format>(a, block / panels, first);
  }
  const int parts = static_cast<int>(a.k / kPartElems<Format>);
  const int64_t thread = (block - groups * panels) * gpu::kBlockThreads + threadIdx.x;
  const int64_t row = groups * kTileRows + thread / parts;
  if (row >= rows) return;
  dequantize_row_part<Format>(a.blocks, a.n, a.k, a.packed, a.row_begin + row,
                              static_cast<int>(thread % parts), a.out, row, a.dtype);
}

template <class Format>
TORCH_Q4_DEVICE void embedding(const gpu::EmbeddingArgs& a) {
  const int parts = static_cast<int>(a.k / kPartElems<Format>);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  if (thread >= a.count * parts) return;
  const int64_t item = thread / parts;
  const int64_t row = a.wide ? static_cast<const int64_t*>(a.indices)[item]
                             : static_cast<const int32_t*>(a.indices)[item];
  if (row < 0 || row >= a.n) return stop_with_error();
  dequantize_row_part<Format>(a.blocks, a.n, a.k, a.packed, row, static_cast<int>(thread % parts),
                              a.out, item, a.dtype);
}

}  // namespace TORCH_Q4_NAMESPACE
