// The CPU kernels, written once over the format traits (kernels/formats/registry.h) and the vector
// operations (simd.h). kernels_generic.cpp, kernels_avx2.cpp and their like each include this file
// under compiler flags of their own.
//
// `linear` works on 16 weight rows by 256 elements at a time: a tile in the packed layout. It takes
// the tile apart once into a panel in L1, in which a vector's lanes are the 16 rows, and passes all
// columns of x over it. A weight in canonical bytes has its tile packed on the way, so that both
// layouts meet the same arithmetic.
//
// No standard containers or algorithms here: their weak symbols would be shared between
// translation units that are compiled for different CPUs.
#pragma once

#include "../../kernels/packed.h"
#include "kernels.h"
#include "simd.h"

namespace TORCH_Q4_NAMESPACE {

using torch_q4::cpu::FormatKernels;
using torch_q4::cpu::Kernels;
using torch_q4::cpu::kExactSums;
using torch_q4::cpu::kExactWords;
using torch_q4::cpu::kInt8Scales;
using torch_q4::cpu::kInt8Starts;
using torch_q4::cpu::kInt8Sums;
using torch_q4::cpu::kInt8Words;
using torch_q4::cpu::kTileElems;
using torch_q4::cpu::LinearArgs;
using torch_q4::cpu::Weight;

namespace {

// Columns of x that a kernel passes over a panel at once: as many as leave their sums in registers.
#if defined(__AVX512VNNI__)
constexpr int kInt8Columns = 12, kExactColumns = 24;
#elif defined(__AVX2__)
constexpr int kInt8Columns = 4, kExactColumns = 6;
#else
constexpr int kInt8Columns = 2, kExactColumns = 2;
#endif
// Loops over columns say "unroll": past 16 the compiler would not, and accumulators would be
// memory.

// Up to so many columns, exact products are cheaper on codes, with one scale a group, than on
// dequantised weights.
constexpr int kGroupedColumns = 4;

// How far ahead of what it reads a kernel asks for bytes: into L1 what comes next, and into L2 what
// lies past the end of a 4 KB page, where the CPU's own prefetching stops. A few lines at a time,
// since a burst of them would fill the buffers that loads wait for too.
constexpr int64_t kNearBytes = 1024, kFarBytes = 4608;

constexpr int min_int(int a, int b) { return a < b ? a : b; }

template <class Format>
constexpr int kBlockBytes = sizeof(typename Format::Block);
template <class Format>
constexpr int kTileBlocks = kTileElems / Format::kBlockElems;
template <class Format>
constexpr int kTileBytes = kTileRows * kTileBlocks<Format> * kBlockBytes<Format>;

inline int64_t row_bytes(int64_t k, int block_elems, int block_bytes) {
  return k / block_elems * block_bytes;
}

template <class Format>
inline int64_t row_bytes(int64_t k) {
  return row_bytes(k, Format::kBlockElems, kBlockBytes<Format>);
}

// ---- one row at a time: decoding, and the transposed product
// -------------------------------------

template <class Format>
void dequantize(const void* blocks, int64_t elems, float* out) {
  constexpr int kGroups = Format::kBlockElems / Format::kGroupElems;
  const auto* bytes = static_cast<const uint8_t*>(blocks);
  alignas(64) uint8_t codes[Format::kBlockElems];
  float scales[kGroups], shifts[kGroups];
  for (int64_t k = 0; k < elems; k += Format::kBlockElems, bytes += kBlockBytes<Format>) {
    typename Format::Block block;
    std::memcpy(&block, bytes, sizeof(block));  // canonical blocks lie at odd addresses too
    Format::unpack(block, codes, scales, shifts);
    for (int i = 0; i < Format::kBlockElems; i += 16) {
      const VecF scale = broadcast(scales[i / Format::kGroupElems]);
      float values[16];
      for (int j = 0; j < 16; ++j) values[j] = static_cast<float>(codes[i + j] - Format::kOffset);
      for (int j = 0; j < 16; j += kLanes) {
        // The product and the sum round separately, as ggml's do: this is what makes it bit-exact.
        VecF weight = mul(scale, load(values + j));
        if constexpr (Format::kHasShift) {
          weight = add(weight, broadcast(shifts[i / Format::kGroupElems]));
        }
        store(out + k + i + j, weight);
      }
    }
  }
}

template <class Format>
inline bool in_packed_group(const Weight& weight, int64_t row) {
  return weight.packed && row < weight.n / kTileRows * kTileRows;
}

// Elements [k, k + elems) of a row, whole blocks, to float32.
template <class Format>
void dequantize_part(const Weight& weight, int64_t row, int64_t k, int64_t elems, float* out) {
  const int64_t bytes = row_bytes<Format>(weight.k);
  if (!in_packed_group<Format>(weight, row)) {
    return dequantize<Format>(weight.blocks + row * bytes + row_bytes<Format>(k), elems, out);
  }
  const uint8_t* block = weight.blocks + row / kTileRows * kTileRows * bytes;
  block += kTileRows * row_bytes<Format>(k);
  uint8_t canonical[kBlockBytes<Format>];
  for (int64_t i = 0; i < elems; i += Format::kBlockElems) {
    unpack_row_block<Format>(block, static_cast<int>(row % kTileRows), canonical);
    dequantize<Format>(canonical, Format::kBlockElems, out + i);
    block += kTileRows * kBlockBytes<Format>;
  }
}

template <class Format>
void dequantize_row(const Weight& weight, int64_t row, float* out) {
  dequantize_part<Format>(weight, row, 0, weight.k, out);
}

// Sums over a panel's rows stay in registers and are added to the result once a panel: faster, and
// the rounding error grows with the number of panels, not of rows.
template <class Format>
void linear_transposed(const float* grad, const Weight& weight, int64_t m_begin, int64_t m_end,
                       int64_t k_begin, int64_t k_end, float* grad_x) {
  constexpr int64_t kPanelRows = 16;
  constexpr int kVectors = 4;
  alignas(64) float panel[kPanelRows * kTileElems];
  for (int64_t m = m_begin; m < m_end; ++m) {
    std::memset(grad_x + m * weight.k + k_begin, 0, (k_end - k_begin) * sizeof(float));
  }
  for (int64_t k = k_begin; k < k_end; k += kTileElems) {
    const int64_t depth = min(kTileElems, k_end - k);
    for (int64_t n = 0; n < weight.n; n += kPanelRows) {
      const int64_t rows = min(kPanelRows, weight.n - n);
      for (int64_t r = 0; r < rows; ++r) {
        dequantize_part<Format>(weight, n + r, k, depth, panel + r * kTileElems);
      }
      for (int64_t m = m_begin; m < m_end; ++m) {
        const float* scale = grad + m * weight.n + n;
        float* out = grad_x + m * weight.k + k;
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

// ---- the packed layout
// ---------------------------------------------------------------------------

// Packed and canonical bytes of a group overlap all over: the group is copied out, then written
// back.
template <class Format, bool kPack>
void repack(uint8_t* blocks, int64_t groups, int64_t k, uint8_t* scratch) {
  const int64_t bytes = row_bytes<Format>(k), group_bytes = kTileRows * bytes;
  for (int64_t group = 0; group < groups; ++group, blocks += group_bytes) {
    std::memcpy(scratch, blocks, group_bytes);
    for (int64_t b = 0; b < k / Format::kBlockElems; ++b) {
      const int64_t canonical = b * kBlockBytes<Format>, packed = kTileRows * canonical;
      if (kPack) {
        pack_block<Format>(scratch + canonical, bytes, kTileRows, blocks + packed);
      } else {
        unpack_block<Format>(scratch + packed, bytes, kTileRows, blocks + canonical);
      }
    }
  }
}

struct Words {
  uint32_t of_row[16];
  uint32_t operator[](int row) const { return of_row[row]; }
};

template <class Format>
struct ChunkStarts {
  int at[kChunkCount<Format>] = {};
  constexpr ChunkStarts() {
    for (int i = 0; i < kChunkCount<Format>; ++i) at[i] = chunk_start<Format>(i);
  }
};

// What formats read their packed blocks through; see registry.h.
template <class Format>
struct PackedRows {
  const uint8_t* block;
  int part;  // which kLineRows of the 16 rows line(), fifth_bits() and digits() give

  static constexpr ChunkStarts<Format> kStarts{};

  const uint8_t* chunk(int index) const { return block + kStarts.at[index]; }
  Bytes line(int index) const { return load_bytes(chunk(index) + 16 * kLineRows * part); }
  Bytes fifth_bits(int index) const { return bits_to_16(chunk(index) + 2 * kLineRows * part); }
  Bytes digits(int index) const { return first_digits(chunk(index) + 4 * kLineRows * part); }
  void halves(int index, float* out) const {
    const auto* from = reinterpret_cast<const uint16_t*>(chunk(index));
    for (int r = 0; r < 16; r += kLanes) store(out + r, load_half(from + r));
  }
  void floats(int index, float* out) const { std::memcpy(out, chunk(index), 64); }
  Words words(int index) const { return integers<uint32_t>(index); }
  Words halfwords(int index) const { return integers<uint16_t>(index); }
  Words bytes(int index) const { return integers<uint8_t>(index); }

 private:
  template <class Integer>
  Words integers(int index) const {
    Integer of_row[16];
    std::memcpy(of_row, chunk(index), sizeof(of_row));
    Words words;
    for (int r = 0; r < 16; ++r) words.of_row[r] = of_row[r];
    return words;
  }
};

// 16 rows by 256 elements taken apart: four consecutive codes of a row to a lane.
struct alignas(64) Panel {
  uint8_t codes[kTileElems / 4][64];
  float scales[16][16];  // [group][row]
  float shifts[16][16];
};

// The blocks of kLanes of the 16 packed rows, a row to a lane, as formats with a grid read them
// (tables.h). `lines` holds the 16-byte chunks, whose words are in the order of rows there.
template <class Format>
struct RowLanes {
  const uint8_t* block;
  const uint8_t (*lines)[64];
  int vector;

  struct Place {
    const uint8_t* word_of_rows;
    int offset;

    VecW word() const { return load_lanes(word_of_rows); }
    VecW halfword() const { return word() >> 8 * (offset & 2) & 0xFFFFu; }
    VecW byte() const { return word() >> 8 * (offset & 3) & 0xFFu; }
  };
  struct HalfPlace {
    const uint8_t* from;
    VecW halfword() const { return load_half_lanes(from); }
  };

  template <int kFirst>
  auto at(int offset) const {
    constexpr int kSize = Format::kChunks[kFirst].size;
    if constexpr (kSize == 16) {
      return Place{lines[4 * kFirst + offset / 4] + 4 * kLanes * vector, offset};
    } else if constexpr (kSize == 4) {
      const uint8_t* from = block + chunk_start<Format>(kFirst) + 64 * (offset / 4);
      return Place{from + 4 * kLanes * vector, offset};
    } else {
      static_assert(kSize == 2);
      return HalfPlace{block + chunk_start<Format>(kFirst) + 2 * kLanes * vector};
    }
  }
};

// A block of 16 rows of a format with a grid, taken apart.
template <class Format>
void unpack_grid_panel(const uint8_t* tile, Panel& panel) {
  constexpr int kGroups = Format::kBlockElems / Format::kGroupElems;
  constexpr int kLines = [] {
    int count = 0;
    while (Format::kChunks[count].size == 16) ++count;
    return count;
  }();
  alignas(64) uint8_t words[4 * kLines][64];
  for (int i = 0; i < kLines; ++i) {
    Bytes lines[16 / kLineRows];
    for (int part = 0; part < 16 / kLineRows; ++part) {
      lines[part] = load_bytes(tile + 256 * i + 16 * kLineRows * part);
    }
    transpose_words(lines, words[4 * i]);
  }
#pragma GCC unroll 2
  for (int segment = 0; segment < 16; ++segment) {
    for (int v = 0; v < kRowVectors; ++v) {
      VecW codes[4];
      Format::segment(RowLanes<Format>{tile, words, v}, segment, codes);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(panel.codes[4 * segment + i] + 4 * kLanes * v, &codes[i], sizeof(VecW));
      }
    }
  }
  for (int v = 0; v < kRowVectors; ++v) {
    const RowLanes<Format> rows = {tile, words, v};
    const VecW block_scales = Format::block_scale_bits(rows);
    float d[kLanes];
    for (int r = 0; r < kLanes; ++r) d[r] = half_to_float(static_cast<uint16_t>(block_scales[r]));
    for (int g = 0; g < kGroups; ++g) {
      const VecW bits = Format::scale_bits(rows, g);
      float* scales = panel.scales[g] + kLanes * v;
      for (int r = 0; r < kLanes; ++r) scales[r] = Format::scale(d[r], bits[r]);
    }
  }
}

template <class Format>
void unpack_block_panels(const uint8_t* tile, int blocks, Panel& panel) {
  constexpr int kSegments = Format::kBlockElems / 16;
  constexpr int kGroups = Format::kBlockElems / Format::kGroupElems;
  for (int b = 0; b < blocks; ++b, tile += kTileRows * kBlockBytes<Format>) {
#pragma GCC unroll 16
    for (int segment = 0; segment < kSegments; ++segment) {
      constexpr int kBytes = kTileRows * kBlockBytes<Format>;
      for (int line = kBytes * segment / kSegments / 64;
           line < kBytes * (segment + 1) / kSegments / 64; ++line) {
        __builtin_prefetch(tile + kNearBytes + 64 * line, 0, 3);
        __builtin_prefetch(tile + kFarBytes + 64 * line, 0, 2);
      }
      Bytes lines[16 / kLineRows];
      for (int part = 0; part < 16 / kLineRows; ++part) {
        lines[part] = Format::packed_codes(PackedRows<Format>{tile, part}, segment);
      }
      transpose_words(lines, panel.codes[(b * kSegments + segment) * 4]);
    }
    Format::packed_scales(PackedRows<Format>{tile, 0}, panel.scales + b * kGroups,
                          panel.shifts + b * kGroups);
  }
}

template <class Format>
void unpack_panel(const uint8_t* tile, int blocks, Panel& panel) {
  if constexpr (kHasGrid<Format>) {
    for (int at = 0; at < kTileBytes<Format>; at += 64) {
      __builtin_prefetch(tile + kNearBytes + at, 0, 3);
      __builtin_prefetch(tile + kFarBytes + at, 0, 2);
    }
    return unpack_grid_panel<Format>(tile, panel);
  } else {
    unpack_block_panels<Format>(tile, blocks, panel);
  }
}

// A tile of 16 rows from `row` on at element k, packed: in place, or made in `buffer`, zeroed
// before the first use where there are fewer rows.
template <class Format>
inline const uint8_t* packed_tile(const Weight& weight, int64_t row, int64_t k, uint8_t* buffer) {
  const int64_t bytes = row_bytes<Format>(weight.k);
  const uint8_t* group = weight.blocks + row * bytes;
  if (in_packed_group<Format>(weight, row)) {
    return group + kTileRows * row_bytes<Format>(k);
  }
  const int rows = static_cast<int>(min(kTileRows, weight.n - row));
  const int64_t blocks = min(kTileElems, weight.k - k) / Format::kBlockElems;
  for (int64_t b = 0; b < blocks; ++b) {
    pack_block<Format>(group + row_bytes<Format>(k) + b * kBlockBytes<Format>, bytes, rows,
                       buffer + b * kTileRows * kBlockBytes<Format>);
  }
  return buffer;
}

// ---- linear
// --------------------------------------------------------------------------------------

// Columns go in blocks of equal width, as far as that is possible: 16 of them are two blocks of 8,
// not one of 12 and one of 4.
inline int block_width(int64_t m_total, int widest) {
  const int64_t blocks = (m_total + widest - 1) / widest;
  return static_cast<int>((m_total + blocks - 1) / blocks);
}

// The block that column m is in: where it starts, how wide it is.
struct ColumnBlock {
  int64_t first;
  int width;
};

inline ColumnBlock column_block(int64_t m, int64_t m_total, int widest) {
  const int width = block_width(m_total, widest);
  const int64_t first = m / width * width;
  return {first, static_cast<int>(min(width, m_total - first))};
}

inline int64_t tiles_of(int64_t k) { return (k + kTileElems - 1) / kTileElems; }

// As many columns of x, and as much of K, are worked on together as stay in L2 while all weight
// rows pass by.
constexpr int64_t kResidentColumns = 192, kResidentBytes = 3 << 19;

// Runs over 16 weight rows at a time. begin_tile(packed tile, elements) prepares a tile, and
// columns(x of the block's tile, its width, elements, sums) adds the tile's products to `sums`,
// [column][row].
template <class Format, class BeginTile, class Columns>
inline void for_each_tile(const LinearArgs& args, int words, int widest, float* sums,
                          const BeginTile& begin_tile, const Columns& columns) {
  const auto* x = static_cast<const uint32_t*>(args.x);
  const int64_t k_total = args.weight.k, tiles = tiles_of(k_total);
  const int full_width = block_width(args.m, widest);
  const int64_t resident = kResidentColumns / full_width * full_width;
  const int64_t tile_bytes = min(args.m, resident) * words * 4;
  const int64_t parts = tiles * tile_bytes / kResidentBytes + 1;
  const int64_t resident_tiles = tiles / parts + 1;
  alignas(64) uint8_t buffer[kTileBytes<Format>] = {};
  for (int64_t first = 0; first < args.m; first += resident) {
    const int64_t last = min(args.m, first + resident);
    int64_t begin = args.tile_begin, end;
    do {  // once, for the bias, where there is nothing of K
      end = min(args.tile_end, begin + resident_tiles);
      const bool last_of_k = end == args.tile_end;
      for (int64_t row = args.row_begin; row < args.row_end; row += kTileRows) {
        const int rows = static_cast<int>(min(kTileRows, args.row_end - row));
        if (rows < kTileRows) std::memset(buffer, 0, sizeof(buffer));
        for (int64_t m = first; m < last; ++m) {
          float* sum = sums + (m - first) * kTileRows;
          for (int r = 0; r < kTileRows; ++r) sum[r] = 0.0f;
          if (begin > args.tile_begin) {
            std::memcpy(sum, args.out + m * args.weight.n + row, rows * sizeof(float));
          }
        }
        for (int64_t t = begin; t < end; ++t) {
          const int64_t k = t * kTileElems;
          const int elems = static_cast<int>(min(kTileElems, k_total - k));
          begin_tile(packed_tile<Format>(args.weight, row, k, buffer), elems);
          for (int64_t m = first; m < last; m += full_width) {
            const int width = static_cast<int>(min(full_width, last - m));
            columns(x + (m * tiles + t * width) * words, width, elems,
                    sums + (m - first) * kTileRows);
          }
        }
        for (int64_t m = first; m < last; ++m) {
          float* sum = sums + (m - first) * kTileRows;
          if (last_of_k && args.bias) {
            for (int r = 0; r < rows; ++r) sum[r] += args.bias[row + r];
          }
          std::memcpy(args.out + m * args.weight.n + row, sum, rows * sizeof(float));
        }
      }
      begin = end;
    } while (begin < args.tile_end);
  }
}

// Calls body with the width as a compile-time constant, 1 to kMax.
template <int kMax, class Body>
inline void with_width(int width, const Body& body) {
  if constexpr (kMax > 1) {
    if (width < kMax) return with_width<kMax - 1>(width, body);
  }
  body(std::integral_constant<int, kMax>());
}

// Whether x is finite and has an element of 2^100 or more. 32 of those below, times codes and sums
// of codes below 2^13, stay below float32's limit of 2^128.
inline bool is_huge(const float* x, int64_t k) {
  // The magnitudes' order is that of their bits, and integers are what a compiler may compare in
  // any order.
  constexpr int32_t kLimit = (100 + 127) << 23, kInfinity = 0x7F800000;
  int32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const auto bits = static_cast<int32_t>(float_to_bits(x[i]) & 0x7FFFFFFFu);
    largest = bits > largest ? bits : largest;
  }
  return largest >= kLimit && largest < kInfinity;
}

// ---- exact ----

template <class Format>
constexpr int exact_center() {
  return Format::kHasShift ? 1 << (Format::kCodeBits - 1) : Format::kOffset;
}

template <class Format>
bool prepare_exact(const float* x, int64_t k, int64_t m, int64_t m_total, void* out) {
  const ColumnBlock block = column_block(m, m_total, kExactColumns);
  const int64_t tiles = tiles_of(k);
  float* to = static_cast<float*>(out) + block.first * tiles * kExactWords + (m - block.first);
  for (int64_t t = 0; t < tiles; ++t, to += kExactWords * block.width) {
    const float* from = x + t * kTileElems;
    const int elems = static_cast<int>(min(kTileElems, k - t * kTileElems));
    for (int i = 0; i < elems; ++i) to[i * block.width] = from[i];
    for (int group = 0; group < elems / Format::kGroupElems; ++group) {
      float sum = 0;
      for (int i = 0; i < Format::kGroupElems; ++i) sum += from[group * Format::kGroupElems + i];
      to[(kExactSums + group) * block.width] = sum;
    }
  }
  return !is_huge(x, k);
}

// What of a format the products below depend on: formats alike in it share their code.
template <int kGroupElemsOf, bool kHasShiftOf, int kCodeBitsOf, int kOffsetOf>
struct Shape {
  static constexpr int kGroupElems = kGroupElemsOf;
  static constexpr bool kHasShift = kHasShiftOf;
  static constexpr int kCodeBits = kCodeBitsOf;
  static constexpr int kOffset = kOffsetOf;
};
template <class Format>
using ExactShape =
    Shape<Format::kGroupElems, Format::kHasShift, Format::kCodeBits, Format::kOffset>;

// With w = s (q - c) + (t + c s) in a group, sum x w = s sum x (q - c) + (t + c s) sum x: codes are
// multiplied as they are, and scales come in once for 16 elements. The sum of 16 elements starts
// from zero, and so does the sum of a tile: three levels, whose rounding error is that of a dot
// product over vectors. The center c keeps the sums small.
template <class Format, int kWidth>
void grouped_columns(const Panel& panel, const float* x, int elems, float* sums) {
  constexpr int kCenter = exact_center<Format>();
  constexpr int kRuns = Format::kGroupElems / 16, kWords = 4;
  VecF acc[kWidth][kRowVectors];
#pragma GCC unroll 24
  for (int c = 0; c < kWidth; ++c) {
    for (int r = 0; r < kRowVectors; ++r) acc[c][r] = zero();
  }
  for (int run = 0; run < elems / 16; ++run) {
    const int group = run / kRuns;
    VecF partial[kWidth][kRowVectors];
#pragma GCC unroll 24
    for (int c = 0; c < kWidth; ++c) {
      for (int r = 0; r < kRowVectors; ++r) partial[c][r] = zero();
    }
#pragma GCC unroll 8
    for (int word = 0; word < kWords; ++word) {
      const uint8_t* codes = panel.codes[run * kWords + word];
      const float* from = x + (run * kWords + word) * 4 * kWidth;
      const auto accumulate = [&](auto index) {
        constexpr int kByte = decltype(index)::value;
        for (int r = 0; r < kRowVectors; ++r) {
          const VecF code =
              byte_to_float<kByte, kCenter, Format::kCodeBits>(load_words(codes + 4 * kLanes * r));
#pragma GCC unroll 24
          for (int c = 0; c < kWidth; ++c) {
            partial[c][r] = fma(code, broadcast(from[kByte * kWidth + c]), partial[c][r]);
          }
        }
      };
      accumulate(std::integral_constant<int, 0>());
      accumulate(std::integral_constant<int, 1>());
      accumulate(std::integral_constant<int, 2>());
      accumulate(std::integral_constant<int, 3>());
    }
    for (int r = 0; r < kRowVectors; ++r) {
      const VecF scale = load(panel.scales[group] + r * kLanes);
#pragma GCC unroll 24
      for (int c = 0; c < kWidth; ++c) acc[c][r] = fma(scale, partial[c][r], acc[c][r]);
      if (Format::kHasShift && run % kRuns == 0) {
        const VecF shift =
            fma(scale, broadcast(float{kCenter}), load(panel.shifts[group] + r * kLanes));
#pragma GCC unroll 24
        for (int c = 0; c < kWidth; ++c) {
          const VecF sum = broadcast(x[(kExactSums + group) * kWidth + c]);
          acc[c][r] = fma(shift, sum, acc[c][r]);
        }
      }
    }
  }
#pragma GCC unroll 24
  for (int c = 0; c < kWidth; ++c) {
    for (int r = 0; r < kRowVectors; ++r) {
      float* sum = sums + c * 16 + r * kLanes;
      store(sum, add(load(sum), acc[c][r]));
    }
  }
}

// A panel's dequantised weights from element `first` on, [element][row], elements `stride` floats
// apart.
template <class Format>
void dequantize_panel(const Panel& panel, int first, int elems, float* weights, int64_t stride) {
  for (int word = first / 4; word < (first + elems) / 4; ++word, weights += 4 * stride) {
    const int group = word * 4 / Format::kGroupElems;
    for (int r = 0; r < kRowVectors; ++r) {
      const VecI codes = load_words(panel.codes[word] + 4 * kLanes * r);
      const VecF scale = load(panel.scales[group] + r * kLanes);
      const auto put = [&](auto index) {
        constexpr int kByte = decltype(index)::value;
        VecF weight = mul(scale, byte_to_float<kByte, Format::kOffset, Format::kCodeBits>(codes));
        if constexpr (Format::kHasShift) {
          weight = add(weight, load(panel.shifts[group] + r * kLanes));
        }
        store(weights + kByte * stride + r * kLanes, weight);
      };
      put(std::integral_constant<int, 0>());
      put(std::integral_constant<int, 1>());
      put(std::integral_constant<int, 2>());
      put(std::integral_constant<int, 3>());
    }
  }
}

// The transpose of 4 by 4 floats: in[i], 16 floats apart, to out[i], `stride` floats apart.
inline void transpose_4(const float* in, float* out, int64_t stride) {
  using Four = float __attribute__((vector_size(16)));
  Four rows[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&rows[i], in + i * kTileRows, sizeof(Four));
  const Four low01 = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Four low23 = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Four high23 = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  const Four columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                           __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                           __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                           __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &columns[i], sizeof(Four));
}

// The weights of rows [row_begin, row_end), row_begin a multiple of 16, one row after the other.
template <class Format>
void dequantize_rows(const Weight& weight, int64_t row_begin, int64_t row_end, float* out) {
  Panel panel;
  alignas(64) uint8_t buffer[kTileBytes<Format>] = {};
  alignas(64) float values[kTileElems * kTileRows];
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const int64_t rows = min(kTileRows, row_end - row);
    if (rows < kTileRows) std::memset(buffer, 0, sizeof(buffer));
    for (int64_t k = 0; k < weight.k; k += kTileElems) {
      const int elems = static_cast<int>(min(kTileElems, weight.k - k));
      unpack_panel<Format>(packed_tile<Format>(weight, row, k, buffer), elems / Format::kBlockElems,
                           panel);
      dequantize_panel<ExactShape<Format>>(panel, 0, elems, values, kTileRows);
      for (int64_t r = 0; r < rows; r += 4) {
        float* to = out + (row - row_begin + r) * weight.k + k;
        if (rows - r >= 4) {
          for (int i = 0; i < elems; i += 4) {
            transpose_4(values + i * kTileRows + r, to + i, weight.k);
          }
        } else {
          for (int64_t left = 0; left < rows - r; ++left, to += weight.k) {
            for (int i = 0; i < elems; ++i) to[i] = values[i * kTileRows + r + left];
          }
        }
      }
    }
  }
}

// The sum of a run of elements starts from zero, and so does that of a tile: three levels, so that
// the rounding error grows with the run, with the runs of a tile and with the tiles, not with K.
// Where few columns leave registers free, a run is several chains of sums, as of a dot product over
// vectors: F.linear is one there.
template <int kWidth>
void dense_columns(const float* weights, const float* x, int elems, float* sums) {
  constexpr int kFree = kExactColumns / kWidth;
  constexpr int kChains = kFree >= 4 ? 4 : kFree >= 2 ? 2 : 1;
  constexpr int kRun = kChains == 4 ? 64 : 32;
  static_assert(32 % kChains == 0);  // elems is a multiple of 32
  alignas(64) float tile[kWidth * 16];
  for (int i = 0; i < kWidth * 16; i += kLanes) store(tile + i, zero());
  for (int start = 0; start < elems; start += kRun) {
    const int end = min_int(start + kRun, elems);
    VecF acc[kChains][kWidth][kRowVectors];
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 24
      for (int c = 0; c < kWidth; ++c) {
        for (int r = 0; r < kRowVectors; ++r) acc[chain][c][r] = zero();
      }
    }
    for (int i = start; i < end; i += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        VecF weight[kRowVectors];
        for (int r = 0; r < kRowVectors; ++r) {
          weight[r] = load(weights + (i + chain) * 16 + r * kLanes);
        }
#pragma GCC unroll 24
        for (int c = 0; c < kWidth; ++c) {
          const VecF value = broadcast(x[(i + chain) * kWidth + c]);
          for (int r = 0; r < kRowVectors; ++r) {
            acc[chain][c][r] = fma(weight[r], value, acc[chain][c][r]);
          }
        }
      }
    }
#pragma GCC unroll 24
    for (int c = 0; c < kWidth; ++c) {
      for (int r = 0; r < kRowVectors; ++r) {
        VecF total = acc[0][c][r];
        if constexpr (kChains >= 2) total = add(total, acc[1][c][r]);
        if constexpr (kChains == 4) total = add(total, add(acc[2][c][r], acc[3][c][r]));
        float* sum = tile + c * 16 + r * kLanes;
        store(sum, add(load(sum), total));
      }
    }
  }
  for (int i = 0; i < kWidth * 16; i += kLanes)
    store(sums + i, add(load(sums + i), load(tile + i)));
}

template <class Format>
void linear_exact(const LinearArgs& args, float* sums) {
  Panel panel;
  if (args.m <= kGroupedColumns && !args.huge) {
    for_each_tile<Format>(
        args, kExactWords, kExactColumns, sums,
        [&](const uint8_t* tile, int elems) {
          unpack_panel<Format>(tile, elems / Format::kBlockElems, panel);
        },
        [&](const uint32_t* x, int width, int elems, float* to) {
          with_width<min_int(kGroupedColumns, kExactColumns)>(width, [&](auto constant) {
            grouped_columns<ExactShape<Format>, decltype(constant)::value>(
                panel, reinterpret_cast<const float*>(x), elems, to);
          });
        });
    return;
  }
  alignas(64) float weights[kTileElems * kTileRows];
  for_each_tile<Format>(
      args, kExactWords, kExactColumns, sums,
      [&](const uint8_t* tile, int elems) {
        unpack_panel<Format>(tile, elems / Format::kBlockElems, panel);
        dequantize_panel<ExactShape<Format>>(panel, 0, elems, weights, kTileRows);
      },
      [&](const uint32_t* x, int width, int elems, float* to) {
        with_width<kExactColumns>(width, [&](auto constant) {
          dense_columns<decltype(constant)::value>(weights, reinterpret_cast<const float*>(x),
                                                   elems, to);
        });
      });
}

// ---- int8 ----

// Codes that dot4 cannot take as they are have their offset taken off inside the product.
template <class Format>
constexpr bool kSignedProducts = Format::kCodeBits == 8 && !kWideProducts;

// 32 elements to codes, round(x * 127 / max|x|), ties to even; the scale is returned.
inline float quantize_32(const float* from, int32_t* codes) {
  // The magnitudes' order is that of their bits, and integers are what a compiler may compare in
  // any order.
  int32_t largest_bits = 0;
  for (int i = 0; i < 32; ++i) {
    const auto bits = static_cast<int32_t>(float_to_bits(from[i]) & 0x7FFFFFFFu);
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  // An infinity or a NaN makes the group's scale NaN, so that it reaches the result.
  const bool finite = largest_bits < 0x7F800000;
  const float largest = bits_to_float(static_cast<uint32_t>(largest_bits));
  const float scale = finite ? largest / 127.0f : __builtin_nanf("");
  // A subnormal scale has no finite inverse; such a group is zero to within 1e-38.
  const float inverse = finite && scale > 1.2e-38f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < 32; ++i) codes[i] = 0;
  if (inverse != 0.0f) {
    for (int i = 0; i < 32; ++i) {
      // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the float.
      const float shifted = from[i] * inverse + 12582912.0f;
      codes[i] = static_cast<int32_t>(float_to_bits(shifted)) - 0x4B400000;
    }
  }
  return scale;
}

template <class Format>
bool prepare_int8(const float* x, int64_t k, int64_t m, int64_t m_total, void* out) {
  constexpr int kOffset = kSignedProducts<Format> ? 0 : Format::kOffset;
  const ColumnBlock block = column_block(m, m_total, kInt8Columns);
  const int64_t tiles = tiles_of(k);
  auto* to = static_cast<uint32_t*>(out) + block.first * tiles * kInt8Words + (m - block.first);
  for (int64_t t = 0; t < tiles; ++t, to += kInt8Words * block.width) {
    const int elems = static_cast<int>(min(kTileElems, k - t * kTileElems));
    for (int start = 0; start < elems; start += 32) {
      int32_t wide[32];
      int8_t codes[32];
      const float scale = quantize_32(x + t * kTileElems + start, wide);
      for (int i = 0; i < 32; ++i) codes[i] = static_cast<int8_t>(wide[i]);
      for (int i = 0; i < 8; ++i) {
        std::memcpy(to + (start / 4 + i) * block.width, codes + 4 * i, 4);
      }
      to[(kInt8Scales + start / 32) * block.width] = float_to_bits(scale);
      for (int i = 0; i < 32; i += Format::kGroupElems) {
        int32_t sum = 0;
        for (int j = 0; j < Format::kGroupElems; ++j) sum += wide[i + j];
        const int group = (start + i) / Format::kGroupElems;
        to[(kInt8Starts + group) * block.width] = static_cast<uint32_t>(-kOffset * sum);
        to[(kInt8Sums + group) * block.width] = float_to_bits(scale * static_cast<float>(sum));
      }
    }
  }
  return !is_huge(x, k);
}

// With x = xs a and w = s (q - o) + t in a group,
//   sum x w = (xs s) (sum a q - o sum a) + t (xs sum a):
// an integer product whose sum starts at -o sum a, and for formats with a shift one more term.
// dot4_signed serves formats whose codes have 8 bits, where dot4 cannot: Shape's kCodeBits says.
template <class Format>
using Int8Shape = Shape<Format::kGroupElems, Format::kHasShift, kSignedProducts<Format> ? 8 : 0, 0>;

template <class Format, int kWidth>
void int8_columns(const Panel& panel, const uint32_t* x, int elems, float* sums) {
  constexpr int kWords = Format::kGroupElems / 4;
  VecF acc[kWidth][kRowVectors];
#pragma GCC unroll 24
  for (int c = 0; c < kWidth; ++c) {
    for (int r = 0; r < kRowVectors; ++r) acc[c][r] = load(sums + c * 16 + r * kLanes);
  }
  for (int group = 0; group < elems / Format::kGroupElems; ++group) {
    VecI partial[kWidth][kRowVectors];
#pragma GCC unroll 24
    for (int c = 0; c < kWidth; ++c) {
      const VecI start = broadcast_word(x[(kInt8Starts + group) * kWidth + c]);
      for (int r = 0; r < kRowVectors; ++r) partial[c][r] = start;
    }
#pragma GCC unroll 8
    for (int word = 0; word < kWords; ++word) {
      const uint8_t* codes = panel.codes[group * kWords + word];
      const uint32_t* from = x + (group * kWords + word) * kWidth;
      VecI code[kRowVectors];
      for (int r = 0; r < kRowVectors; ++r) code[r] = load_words(codes + 4 * kLanes * r);
#pragma GCC unroll 24
      for (int c = 0; c < kWidth; ++c) {
        for (int r = 0; r < kRowVectors; ++r) {
          if constexpr (Format::kCodeBits == 8) {
            const VecI value = broadcast_word(static_cast<int32_t>(from[c]));
            partial[c][r] = dot4_signed(partial[c][r], code[r], value);
          } else {
            partial[c][r] = dot4_word(partial[c][r], code[r], from + c);
          }
        }
      }
    }
#pragma GCC unroll 24
    for (int c = 0; c < kWidth; ++c) {
      const VecF x_scale = broadcast(
          bits_to_float(x[(kInt8Scales + group * Format::kGroupElems / 32) * kWidth + c]));
      for (int r = 0; r < kRowVectors; ++r) {
        const VecF scale = mul(load(panel.scales[group] + r * kLanes), x_scale);
        acc[c][r] = fma(scale, to_float(partial[c][r]), acc[c][r]);
      }
      if constexpr (Format::kHasShift) {
        const VecF sum = broadcast(bits_to_float(x[(kInt8Sums + group) * kWidth + c]));
        for (int r = 0; r < kRowVectors; ++r) {
          acc[c][r] = fma(load(panel.shifts[group] + r * kLanes), sum, acc[c][r]);
        }
      }
    }
  }
#pragma GCC unroll 24
  for (int c = 0; c < kWidth; ++c) {
    for (int r = 0; r < kRowVectors; ++r) store(sums + c * 16 + r * kLanes, acc[c][r]);
  }
}

template <class Format>
void linear_int8(const LinearArgs& args, float* sums) {
  Panel panel;
  for_each_tile<Format>(
      args, kInt8Words, kInt8Columns, sums,
      [&](const uint8_t* tile, int elems) {
        unpack_panel<Format>(tile, elems / Format::kBlockElems, panel);
      },
      [&](const uint32_t* x, int width, int elems, float* to) {
        with_width<kInt8Columns>(width, [&](auto constant) {
          int8_columns<Int8Shape<Format>, decltype(constant)::value>(panel, x, elems, to);
        });
      });
}

// ---- conversions
// ---------------------------------------------------------------------------------

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

}  // namespace
}  // namespace TORCH_Q4_NAMESPACE

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace TORCH_Q4_NAMESPACE {
namespace {

template <class Format>
constexpr FormatKernels format_kernels() {
  return {dequantize<Format>,       dequantize_row<Format>,  repack<Format, true>,
          repack<Format, false>,    dequantize_rows<Format>, prepare_exact<Format>,
          prepare_int8<Format>,     linear_exact<Format>,    linear_int8<Format>,
          linear_transposed<Format>};
}

#if defined(__AVX512VNNI__)
constexpr const torch_q4::cpu::Quantizers* kQuantizers = &torch_q4::cpu::kAvx512Quantizers;
#elif defined(__AVX2__)
constexpr const torch_q4::cpu::Quantizers* kQuantizers = &torch_q4::cpu::kAvx2Quantizers;
#else
constexpr const torch_q4::cpu::Quantizers* kQuantizers = nullptr;
#endif

constexpr Kernels kernel_table(const char* isa) {
#define TORCH_Q4_ENTRY(Format) format_kernels<Format>(),
  Kernels kernels = {isa,
                     {TORCH_Q4_FORMATS(TORCH_Q4_ENTRY)},
                     kQuantizers,
                     {},
                     half_to_float_array,
                     float_to_half_array,
                     bfloat16_to_float_array,
                     float_to_bfloat16_array};
#undef TORCH_Q4_ENTRY
#if defined(__AMX_BF16__)
#define TORCH_Q4_ENTRY(Format) linear_tiles<Format>,
  kernels.tiles = {kLeastTileColumns,
                   prepare_tiles,
                   tile_x_floats,
                   {TORCH_Q4_FORMATS(TORCH_Q4_ENTRY)},
                   tile_scratch_floats};
#undef TORCH_Q4_ENTRY
#endif
  return kernels;
}

}  // namespace
}  // namespace TORCH_Q4_NAMESPACE
