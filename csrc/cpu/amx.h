// Exact products on AMX, for CPUs that multiply tiles of 16 by 64 bytes in one instruction.
//
// A tile instruction adds A times B to C in float32, where A and B are bfloat16. A float32 is the
// sum of three bfloat16 of eight bits each, high, middle and low, so that x w is the sum of nine
// products. The six that are not below the last bit of float32 are made:
//
//   x w = high high + high middle + middle high + high low + low high + middle middle
//
// which are six instructions where one would do for bfloat16, and still twice as quick as
// float32's own. Rows of W are dequantised, taken apart and laid out once for all columns of x. The
// parts of x are rounded, so that what is left out has either sign; those of W are truncated, which
// costs less. AMX takes subnormal numbers for zeros: each row of x is first scaled by a power of
// two that brings its largest element to [1, 2). x must be finite: the parts of an infinity would
// not add up to it.
//
// A's rows are columns of x, B's columns are rows of W, and of K a step of 32 elements goes into
// one instruction.
//
// Include only from kernels_impl.h.
#pragma once

namespace TORCH_Q4_NAMESPACE {
namespace {

// From so many columns of x on, taking W apart is worth its cost.
constexpr int64_t kLeastTileColumns = 16;

constexpr int kStep = 32;            // elements of K to an instruction
constexpr int kAmxTileBytes = 1024;  // of a tile of 16 by 64 bytes
constexpr int kParts = 3;
constexpr int kStepBytes = kParts * kAmxTileBytes;  // 16 rows of one step
// Groups of 16 rows of W that pass over x together, fewer of them for few columns, and steps for
// which the parts of both stay in the caches.
constexpr int64_t kPanelGroups = 16, kFewPanelGroups = 2, kFewColumns = 32;
constexpr int kRunSteps = 2;

// ---- tiles ----
// Not the compiler's intrinsics: GCC's do not say that they read memory.

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B. C and A have as many rows as there are columns of x.
constexpr int kTileA = 4, kTileB = 6;

inline void configure_tiles(int columns) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(tile < kTileB ? columns : 16);
    config.row_bytes[tile] = 64;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

// Otherwise the operating system saves 8 KB with each switch of threads.
inline void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// ---- x ----

// Floats of m rows of x by k elements: [16 columns][step][part][column][32 elements], then what
// undoes the scaling of each column.
inline int64_t tile_column_groups(int64_t m) { return (m + 15) / 16; }
inline int64_t tile_x_floats(int64_t m, int64_t k) {
  return tile_column_groups(m) * (k / kStep * (kStepBytes / 4) + 16);
}

inline const float* x_scales(const void* x, int64_t m, int64_t k) {
  return static_cast<const float*>(x) + tile_column_groups(m) * (k / kStep) * (kStepBytes / 4);
}

struct UpperHalves {
  alignas(64) uint16_t at[32] = {};
  constexpr UpperHalves() {
    for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(2 * i + 1);
  }
};
inline constexpr UpperHalves kUpperHalves;

// The nearest float32 whose lower 16 bits are zero; of two, the one away from zero.
inline __m512 round_to_upper(__m512 value) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, upper));
}

// Row m of x; false if not all of it is finite.
bool prepare_tiles(const float* x, int64_t k, int64_t m, int64_t m_total, void* out) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __m512i magnitude =
        _mm512_and_si512(_mm512_castps_si512(load(x + i)), _mm512_set1_epi32(0x7FFFFFFF));
    largest = _mm512_max_epu32(largest, magnitude);
  }
  const auto largest_exponent = static_cast<int>(_mm512_reduce_max_epu32(largest) >> 23);
  if (largest_exponent == 255) return false;
  const int wanted = 254 - largest_exponent;
  const int exponent = wanted < 1 ? 1 : wanted > 253 ? 253 : wanted;
  const VecF up = broadcast(bits_to_float(static_cast<uint32_t>(exponent) << 23));
  const_cast<float*>(x_scales(out, m_total, k))[m] =
      bits_to_float(static_cast<uint32_t>(254 - exponent) << 23);

  const __m512i upper_halves = _mm512_load_si512(kUpperHalves.at);
  auto* to = static_cast<uint8_t*>(out) + m / 16 * (k / kStep) * kStepBytes + m % 16 * 64;
  for (int64_t i = 0; i < k; i += kStep, to += kStepBytes) {
    __m512 first = mul(load(x + i), up), second = mul(load(x + i + 16), up);
    for (int part = 0; part < kParts; ++part) {
      const __m512 first_part = round_to_upper(first), second_part = round_to_upper(second);
      const __m512i both = _mm512_permutex2var_epi16(_mm512_castps_si512(first_part), upper_halves,
                                                     _mm512_castps_si512(second_part));
      _mm512_storeu_si512(to + part * kAmxTileBytes, both);
      first = _mm512_sub_ps(first, first_part);
      second = _mm512_sub_ps(second, second_part);
    }
  }
  return true;
}

// ---- W ----

// 16 rows of one step: [part][pair of elements][row][2].
inline void split_weights(const float (*weights)[16], uint8_t* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  for (int pair = 0; pair < kStep / 2; ++pair, out += 64) {
    __m512 even = load(weights[2 * pair]), odd = load(weights[2 * pair + 1]);
    for (int part = 0; part < kParts; ++part) {
      const __m512i even_bits = _mm512_castps_si512(even), odd_bits = _mm512_castps_si512(odd);
      // The upper halves of both: a bit of 0xFFFF0000 chooses between them (0xCA: a ? b : c).
      _mm512_storeu_si512(
          out + part * kAmxTileBytes,
          _mm512_ternarylogic_epi32(upper, odd_bits, _mm512_srli_epi32(even_bits, 16), 0xCA));
      even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_and_si512(even_bits, upper)));
      odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(odd_bits, upper)));
    }
  }
}

// ---- the products ----

template <int kPartA, int kColumnTiles, int kRowTiles>
inline void multiply_parts(const uint8_t* a, int64_t a_stride) {
  load_tile<kTileA>(a + kPartA * kAmxTileBytes, 64);
  multiply_tiles<0, kTileA, kTileB>();
  if constexpr (kRowTiles > 1) multiply_tiles<1, kTileA, kTileB + 1>();
  if constexpr (kColumnTiles > 1) {
    load_tile<kTileA + 1>(a + a_stride + kPartA * kAmxTileBytes, 64);
    multiply_tiles<2, kTileA + 1, kTileB>();
    if constexpr (kRowTiles > 1) multiply_tiles<3, kTileA + 1, kTileB + 1>();
  }
}

template <int kPartB, int kRowTiles>
inline void load_weights(const uint8_t* b, int64_t b_stride) {
  load_tile<kTileB>(b + kPartB * kAmxTileBytes, 64);
  if constexpr (kRowTiles > 1) load_tile<kTileB + 1>(b + b_stride + kPartB * kAmxTileBytes, 64);
}

// Adds the products of a few steps to 16 or 32 columns by 16 or 32 rows of `sums`. They are summed
// from zero first: two levels, so that the rounding error grows with the number of runs of steps
// and not with K.
template <int kColumnTiles, int kRowTiles>
void tile_products(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                   int steps, int columns, float* sums, int64_t stride) {
  constexpr int64_t kRowBytes = 128;
  alignas(64) float products[kColumnTiles * 16][32];
  zero_tile<0>();
  if constexpr (kRowTiles > 1) zero_tile<1>();
  if constexpr (kColumnTiles > 1) zero_tile<2>();
  if constexpr (kColumnTiles > 1 && kRowTiles > 1) zero_tile<3>();
  for (int step = 0; step < steps; ++step, a += kStepBytes, b += kStepBytes) {
    load_weights<2, kRowTiles>(b, b_stride);
    multiply_parts<0, kColumnTiles, kRowTiles>(a, a_stride);
    load_weights<1, kRowTiles>(b, b_stride);
    multiply_parts<1, kColumnTiles, kRowTiles>(a, a_stride);
    multiply_parts<0, kColumnTiles, kRowTiles>(a, a_stride);
    load_weights<0, kRowTiles>(b, b_stride);
    multiply_parts<2, kColumnTiles, kRowTiles>(a, a_stride);
    multiply_parts<1, kColumnTiles, kRowTiles>(a, a_stride);
    multiply_parts<0, kColumnTiles, kRowTiles>(a, a_stride);
  }
  store_tile<0>(products[0], kRowBytes);
  if constexpr (kRowTiles > 1) store_tile<1>(products[0] + 16, kRowBytes);
  if constexpr (kColumnTiles > 1) store_tile<2>(products[16], kRowBytes);
  if constexpr (kColumnTiles > 1 && kRowTiles > 1) store_tile<3>(products[16] + 16, kRowBytes);
  for (int column = 0; column < columns; ++column, sums += stride) {
    for (int row = 0; row < kRowTiles * 16; row += 16) {
      store(sums + row, add(load(sums + row), load(products[column] + row)));
    }
  }
}

inline int64_t panel_groups(int64_t m) { return m <= kFewColumns ? kFewPanelGroups : kPanelGroups; }

// One group more than there are, or the columns of x would all fall into the same sets of the
// cache.
inline int64_t sums_stride(int64_t m) { return 16 * (panel_groups(m) + 1); }

inline int64_t tile_scratch_floats(int64_t m) {
  const auto bytes = static_cast<int64_t>(sizeof(Panel)) + kRunSteps * kStepBytes;
  return 16 + panel_groups(m) * (bytes / 4) + tile_column_groups(m) * 16 * sums_stride(m);
}

template <class Format>
void linear_tiles(const LinearArgs& args, float* scratch) {
  const int64_t k_total = args.weight.k, column_groups = tile_column_groups(args.m);
  const int64_t most_groups = panel_groups(args.m), stride = sums_stride(args.m);
  const auto* x = static_cast<const uint8_t*>(args.x);
  const int64_t x_stride = k_total / kStep * kStepBytes;  // of 16 columns
  auto* panels = reinterpret_cast<Panel*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  auto* parts = reinterpret_cast<uint8_t*>(panels + most_groups);
  auto* sums = reinterpret_cast<float*>(parts + most_groups * kRunSteps * kStepBytes);
  alignas(64) uint8_t buffer[kTileBytes<Format>] = {};
  configure_tiles(static_cast<int>(min(args.m, 16)));

  for (int64_t row = args.row_begin; row < args.row_end; row += most_groups * kTileRows) {
    const int64_t rows = min(most_groups * kTileRows, args.row_end - row);
    const int64_t groups = (rows + kTileRows - 1) / kTileRows;
    if (rows % kTileRows != 0) std::memset(buffer, 0, sizeof(buffer));
    std::memset(sums, 0, column_groups * 16 * stride * sizeof(float));
    for (int64_t t = args.tile_begin; t < args.tile_end; ++t) {
      const int64_t k = t * kTileElems;
      const int elems = static_cast<int>(min(kTileElems, k_total - k)), steps = elems / kStep;
      for (int64_t group = 0; group < groups; ++group) {
        unpack_panel<Format>(packed_tile<Format>(args.weight, row + group * kTileRows, k, buffer),
                             elems / Format::kBlockElems, panels[group]);
      }
      for (int first = 0; first < steps; first += kRunSteps) {
        const int run = min_int(kRunSteps, steps - first);
        for (int64_t i = 0; i < groups * run; ++i) {
          const auto group = i / run, step = i % run;
          alignas(64) float weights[kStep][16];
          dequantize_panel<ExactShape<Format>>(
              panels[group], static_cast<int>(first + step) * kStep, kStep, weights[0], kTileRows);
          split_weights(weights, parts + (group * kRunSteps + step) * kStepBytes);
        }
        for (int64_t column = 0; column < column_groups; column += 2) {
          const uint8_t* a = x + column * x_stride + (k / kStep + first) * kStepBytes;
          for (int64_t group = 0; group < groups; group += 2) {
            const bool wide = column + 1 < column_groups, tall = group + 1 < groups;
            const auto products = wide ? (tall ? tile_products<2, 2> : tile_products<2, 1>)
                                       : (tall ? tile_products<1, 2> : tile_products<1, 1>);
            products(a, x_stride, parts + group * kRunSteps * kStepBytes, kRunSteps * kStepBytes,
                     run, static_cast<int>(min(32, args.m - column * 16)),
                     sums + column * 16 * stride + group * 16, stride);
          }
        }
      }
    }
    const float* scales = x_scales(args.x, args.m, k_total);
    for (int64_t m = 0; m < args.m; ++m) {
      float* out = args.out + m * args.weight.n + row;
      for (int64_t r = 0; r < rows; ++r) {
        const float product = sums[m * stride + r] * scales[m];
        out[r] = args.bias ? product + args.bias[row + r] : product;
      }
    }
  }
  release_tiles();
}

}  // namespace
}  // namespace TORCH_Q4_NAMESPACE
