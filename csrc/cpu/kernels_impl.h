// The CPU kernels, written once over the format traits (kernels/formats/registry.h) and the vector
// operations (simd.h). kernels_generic.cpp, kernels_avx2.cpp and kernels_avx512.cpp each include
// this file under compiler flags of their own.
//
// Weight rows are read in GGML's canonical bytes. A row is worked through in tiles of 256 elements:
// unpack() leaves a tile's codes, scales and shifts in L1, and whatever follows reads those. A
// layout with rows interleaved replaces unpack_tile() and nothing else of the arithmetic.
//
// No standard containers or algorithms here: their weak symbols would be shared between
// translation units that are compiled for different CPUs.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace TORCH_Q4_NAMESPACE {

using torch_q4::cpu::FormatKernels;
using torch_q4::cpu::Int8Rows;
using torch_q4::cpu::Kernels;
using torch_q4::cpu::kInt8Rows;
using torch_q4::cpu::LinearArgs;
using torch_q4::cpu::Tile;

namespace {

constexpr int64_t kPrefetchBytes = 3072;  // far enough to cover DRAM latency at 10-15 GB/s

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Format>
constexpr int kGroups = kTileElems / Format::kGroupElems;
template <class Format>
constexpr int kTileBlocks = kTileElems / Format::kBlockElems;
template <class Format>
constexpr int64_t kTileBytes = kTileBlocks<Format> * sizeof(typename Format::Block);

template <class Format>
inline const typename Format::Block* row_blocks(const void* blocks, int64_t row, int64_t k) {
  return static_cast<const typename Format::Block*>(blocks) + row * (k / Format::kBlockElems);
}

template <class Format>
inline void unpack_blocks(const typename Format::Block* blocks, int count, uint8_t* codes,
                          float* scales, float* shifts) {
  constexpr int kBlockGroups = Format::kBlockElems / Format::kGroupElems;
  for (int b = 0; b < count; ++b) {
    Format::unpack(blocks[b], codes + b * Format::kBlockElems, scales + b * kBlockGroups,
                   shifts + b * kBlockGroups);
  }
}

// Unpacks min(kTileElems, elems) elements and asks for the bytes that the next tiles will need.
template <class Format>
inline void unpack_tile(const typename Format::Block* blocks, int64_t elems, Tile& tile) {
  const char* ahead = reinterpret_cast<const char*>(blocks) + kPrefetchBytes;
  for (int64_t line = 0; line < kTileBytes<Format>; line += 64) __builtin_prefetch(ahead + line);
  if (elems >= kTileElems) {
    unpack_blocks<Format>(blocks, kTileBlocks<Format>, tile.codes, tile.scales, tile.shifts);
  } else {
    unpack_blocks<Format>(blocks, static_cast<int>(elems / Format::kBlockElems), tile.codes,
                          tile.scales, tile.shifts);
  }
}

// Calls body(first element, its weights, parity) for each vector of a tile's first `elems`
// elements, parity being 0 and 1 in turn. The product and the sum round separately, as ggml's do:
// this is what makes dequantize bit-exact.
template <class Format, class Body>
inline void for_each_vector(const Tile& tile, int64_t elems, const Body& body) {
  const auto weights = [&](int element) {
    const int group = element / Format::kGroupElems;
    VecF weight =
        mul(broadcast(tile.scales[group]), load_codes<Format::kOffset>(tile.codes + element));
    if constexpr (Format::kHasShift) weight = add(weight, broadcast(tile.shifts[group]));
    return weight;
  };
  const int count = elems < kTileElems ? static_cast<int>(elems) : kTileElems;
  // A block is at least 32 elements, so vectors come in pairs.
  for (int element = 0; element < count; element += 2 * kLanes) {
    body(element, weights(element), 0);
    body(element + kLanes, weights(element + kLanes), 1);
  }
}

template <class Format>
void dequantize(const void* blocks, int64_t elems, float* out) {
  const auto* block = static_cast<const typename Format::Block*>(blocks);
  Tile tile;
  for (int64_t k = 0; k < elems; k += kTileElems, block += kTileBlocks<Format>) {
    unpack_tile<Format>(block, elems - k, tile);
    for_each_vector<Format>(tile, elems - k,
                            [&](int i, VecF weight, int) { store(out + k + i, weight); });
  }
}

// ---- linear, exact -----------------------------------------------------------------------------

// Few rows of x: weights go from the tile through registers into kRows dot products.
template <class Format, int kRows>
void exact_few_rows(const LinearArgs& args, const float* x, int64_t m) {
  for (int64_t n = args.row_begin; n < args.row_end; ++n) {
    const auto* block = row_blocks<Format>(args.blocks, n, args.k);
    // Two sums a row of x hide the latency of the fused multiply-add.
    VecF acc[kRows][2];
    for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
    Tile tile;
    for (int64_t k = 0; k < args.k; k += kTileElems, block += kTileBlocks<Format>) {
      unpack_tile<Format>(block, args.k - k, tile);
      for_each_vector<Format>(tile, args.k - k, [&](int i, VecF weight, int half) {
        for (int r = 0; r < kRows; ++r) {
          acc[r][half] = fma(weight, load(x + (m + r) * args.k + k + i), acc[r][half]);
        }
      });
    }
    for (int r = 0; r < kRows; ++r) {
      const float bias = args.bias ? args.bias[n] : 0.0f;
      args.out[(m + r) * args.n_total + n] = bias + reduce(add(acc[r][0], acc[r][1]));
    }
  }
}

// out[r, c] += x_r . w_c for a block of kRows by kColumns, over `depth` elements.
template <int kRows, int kColumns>
inline void micro_kernel(const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                         int64_t depth, float* out, int64_t out_stride) {
  VecF acc[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) acc[r][c] = zero();
  }
  for (int64_t k = 0; k < depth; k += kLanes) {
    VecF row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = load(x + r * x_stride + k);
    for (int c = 0; c < kColumns; ++c) {
      const VecF column = load(w + c * w_stride + k);
      for (int r = 0; r < kRows; ++r) acc[r][c] = fma(row[r], column, acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) out[r * out_stride + c] += reduce(acc[r][c]);
  }
}

template <int kRows>
inline void micro_row(const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                      int64_t columns, int64_t depth, float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + kMicroColumns <= columns; c += kMicroColumns) {
    micro_kernel<kRows, kMicroColumns>(x, x_stride, w + c * w_stride, w_stride, depth, out + c,
                                       out_stride);
  }
  for (; c < columns; ++c) {
    micro_kernel<kRows, 1>(x, x_stride, w + c * w_stride, w_stride, depth, out + c, out_stride);
  }
}

// Many rows of x: 24 weight rows by 512 elements are unpacked once (48 KB, in L2), and every row
// of x passes over them. Elements are the outer loop so that x's slice stays in L2 as well.
template <class Format>
void exact_many_rows(const LinearArgs& args, const float* x) {
  constexpr int64_t kPanelRows = 24, kPanelDepth = 512;
  alignas(64) float panel[kPanelRows * kPanelDepth];
  for (int64_t m = 0; m < args.m; ++m) {
    for (int64_t n = args.row_begin; n < args.row_end; ++n) {
      args.out[m * args.n_total + n] = args.bias ? args.bias[n] : 0.0f;
    }
  }
  for (int64_t k = 0; k < args.k; k += kPanelDepth) {
    const int64_t depth = min(kPanelDepth, args.k - k);
    for (int64_t n = args.row_begin; n < args.row_end; n += kPanelRows) {
      const int64_t rows = min(kPanelRows, args.row_end - n);
      for (int64_t r = 0; r < rows; ++r) {
        dequantize<Format>(row_blocks<Format>(args.blocks, n + r, args.k) + k / Format::kBlockElems,
                           depth, panel + r * kPanelDepth);
      }
      int64_t m = 0;
      for (; m + kMicroRows <= args.m; m += kMicroRows) {
        micro_row<kMicroRows>(x + m * args.k + k, args.k, panel, kPanelDepth, rows, depth,
                              args.out + m * args.n_total + n, args.n_total);
      }
      for (; m < args.m; ++m) {
        micro_row<1>(x + m * args.k + k, args.k, panel, kPanelDepth, rows, depth,
                     args.out + m * args.n_total + n, args.n_total);
      }
    }
  }
}

template <class Format>
void linear_exact(const LinearArgs& args, const float* x) {
  switch (args.m) {
    case 1:
      return exact_few_rows<Format, 1>(args, x, 0);
    case 2:
      return exact_few_rows<Format, 2>(args, x, 0);
    case 3:
      return exact_few_rows<Format, 3>(args, x, 0);
    case 4:
      return exact_few_rows<Format, 4>(args, x, 0);
    default:
      return exact_many_rows<Format>(args, x);
  }
}

// ---- linear, int8 ------------------------------------------------------------------------------

// code = round(x * 127 / max|x|) of each 32 elements, ties to even.
void quantize_int8(const float* x, int64_t k, int64_t row, const Int8Rows& out) {
  int8_t* codes = out.codes + row * out.padded;
  float* scales = out.scales + row * (out.padded / 32);
  float* sums16 = out.sums16 + row * (out.padded / 16);
  float* sums32 = out.sums32 + row * (out.padded / 32);
  for (int64_t group = 0; group < out.padded / 32; ++group) {
    if (group * 32 >= k) {  // padding: zeros that no weight can turn into anything else
      for (int i = 0; i < 32; ++i) codes[group * 32 + i] = 0;
      scales[group] = sums32[group] = sums16[2 * group] = sums16[2 * group + 1] = 0.0f;
      continue;
    }
    const float* from = x + group * 32;
    float largest = 0.0f;
    bool finite = true;
    for (int i = 0; i < 32; ++i) {
      const float magnitude = __builtin_fabsf(from[i]);
      largest = magnitude > largest ? magnitude : largest;
      finite &= magnitude <= 3.402823466e+38f;
    }
    // An infinity or a NaN makes the group's scale NaN, so that it reaches the result.
    const float scale = finite ? largest / 127.0f : __builtin_nanf("");
    // A subnormal scale has no finite inverse; such a group is zero to within 1e-38.
    const float inverse = finite && scale > 1.2e-38f ? 1.0f / scale : 0.0f;
    int sum[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) {
        // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the float.
        const float product = finite ? from[16 * half + i] * inverse : 0.0f;
        const int32_t code =
            static_cast<int32_t>(float_to_bits(product + 12582912.0f)) - 0x4B400000;
        codes[group * 32 + 16 * half + i] = static_cast<int8_t>(code);
        sum[half] += code;
      }
    }
    scales[group] = scale;
    sums16[2 * group] = scale * static_cast<float>(sum[0]);
    sums16[2 * group + 1] = scale * static_cast<float>(sum[1]);
    sums32[group] = scale * static_cast<float>(sum[0] + sum[1]);
  }
}

// With x = xs * c and w = s * (q - o) + t in a group,
//   sum x w = (xs s) sum(c q) + (t - o s) xs sum(c):
// an integer dot product, and a correction that needs only each group's sum of x.
// unpack_row leaves t - o s in the tiles' shifts.
template <class Format>
inline void unpack_row(const LinearArgs& args, int64_t row, Tile* tiles) {
  const auto* block = row_blocks<Format>(args.blocks, row, args.k);
  for (int64_t k = 0; k < args.k; k += kTileElems, block += kTileBlocks<Format>, ++tiles) {
    const int64_t elems = args.k - k;
    if (elems < kTileElems) *tiles = Tile{};
    unpack_tile<Format>(block, elems, *tiles);
    for (int group = 0; group < kGroups<Format>; ++group) {
      const float shift = Format::kHasShift ? tiles->shifts[group] : 0.0f;
      tiles->shifts[group] = shift - Format::kOffset * tiles->scales[group];
    }
  }
}

template <class Format, int kRows>
void int8_rows(const LinearArgs& args, const Int8Rows& x, int64_t n, Tile* tiles) {
  const int64_t tile_count = x.padded / kTileElems;
  for (int r = 0; r < kRows; ++r) unpack_row<Format>(args, n + r, tiles + r * tile_count);
  const float* sums = Format::kGroupElems == 16 ? x.sums16 : x.sums32;
  for (int64_t m = 0; m < args.m; ++m) {
    const int8_t* codes = x.codes + m * x.padded;
    const float* x_scales = x.scales + m * (x.padded / 32);
    const float* x_sums = sums + m * (x.padded / Format::kGroupElems);
    VecF acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = zero();
    for (int64_t t = 0; t < tile_count; ++t) {
      for (int r = 0; r < kRows; ++r) {
        const Tile& tile = tiles[r * tile_count + t];
        acc[r] = dot_tile<Format::kGroupElems>(tile.codes, codes + t * kTileElems, tile.scales,
                                               x_scales + t * (kTileElems / 32), acc[r]);
        for (int group = 0; group < kGroups<Format>; group += kLanes) {
          acc[r] = fma(load_groups<kGroups<Format>>(tile.shifts + group),
                       load_groups<kGroups<Format>>(x_sums + t * kGroups<Format> + group), acc[r]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const float bias = args.bias ? args.bias[n + r] : 0.0f;
      args.out[m * args.n_total + n + r] = bias + reduce(acc[r]);
    }
  }
}

template <class Format>
void linear_int8(const LinearArgs& args, const Int8Rows& x, Tile* tiles) {
  int64_t n = args.row_begin;
  for (; n + kInt8Rows <= args.row_end; n += kInt8Rows) {
    int8_rows<Format, kInt8Rows>(args, x, n, tiles);
  }
  for (; n < args.row_end; ++n) int8_rows<Format, 1>(args, x, n, tiles);
}

// ---- the transposed product --------------------------------------------------------------------

// Sums over a panel's rows stay in registers and are added to the result once a panel: faster, and
// the rounding error grows with the number of panels, not of rows.
template <class Format>
void linear_transposed(const float* grad, const void* blocks, int64_t n_total, int64_t k_total,
                       int64_t m_begin, int64_t m_end, int64_t k_begin, int64_t k_end,
                       float* grad_x) {
  constexpr int64_t kPanelRows = 16;
  constexpr int kVectors = 4;  // accumulators that stay in registers over a panel's rows
  alignas(64) float panel[kPanelRows * kTileElems];
  for (int64_t m = m_begin; m < m_end; ++m) {
    std::memset(grad_x + m * k_total + k_begin, 0, (k_end - k_begin) * sizeof(float));
  }
  for (int64_t k = k_begin; k < k_end; k += kTileElems) {
    const int64_t depth = min(kTileElems, k_end - k);
    for (int64_t n = 0; n < n_total; n += kPanelRows) {
      const int64_t rows = min(kPanelRows, n_total - n);
      for (int64_t r = 0; r < rows; ++r) {
        dequantize<Format>(row_blocks<Format>(blocks, n + r, k_total) + k / Format::kBlockElems,
                           depth, panel + r * kTileElems);
      }
      for (int64_t m = m_begin; m < m_end; ++m) {
        const float* scale = grad + m * n_total + n;
        float* out = grad_x + m * k_total + k;
        int64_t i = 0;
        for (; i + kVectors * kLanes <= depth; i += kVectors * kLanes) {
          VecF acc[kVectors];
          for (int v = 0; v < kVectors; ++v) acc[v] = zero();
          for (int64_t r = 0; r < rows; ++r) {
            const VecF factor = broadcast(scale[r]);
            for (int v = 0; v < kVectors; ++v) {
              acc[v] = fma(factor, load(panel + r * kTileElems + i + v * kLanes), acc[v]);
            }
          }
          for (int v = 0; v < kVectors; ++v) {
            store(out + i + v * kLanes, add(load(out + i + v * kLanes), acc[v]));
          }
        }
        for (; i < depth; i += kLanes) {
          VecF acc = zero();
          for (int64_t r = 0; r < rows; ++r) {
            acc = fma(broadcast(scale[r]), load(panel + r * kTileElems + i), acc);
          }
          store(out + i, add(load(out + i), acc));
        }
      }
    }
  }
}

// ---- conversions -------------------------------------------------------------------------------

void half_to_float_array(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_half(from + i));
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

void float_to_half_array(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_half(to + i, load(from + i));
  for (; i < count; ++i) to[i] = float_to_half(from[i]);
}

void bfloat16_to_float_array(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bits_to_float(static_cast<uint32_t>(from[i]) << 16);
}

// Rounds to nearest even; a NaN stays one.
void float_to_bfloat16_array(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_to_bits(from[i]);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    to[i] = static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
  }
}

template <class Format>
constexpr FormatKernels format_kernels() {
  return {dequantize<Format>, linear_exact<Format>, linear_int8<Format>, linear_transposed<Format>};
}

constexpr Kernels kernel_table(const char* isa) {
#define TORCH_Q4_ENTRY(Format) format_kernels<Format>(),
  return {isa,
          {TORCH_Q4_FORMATS(TORCH_Q4_ENTRY)},
          quantize_int8,
          half_to_float_array,
          float_to_half_array,
          bfloat16_to_float_array,
          float_to_bfloat16_array};
#undef TORCH_Q4_ENTRY
}

}  // namespace

}  // namespace TORCH_Q4_NAMESPACE
