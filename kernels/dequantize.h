// Weights to values: whole matrices, and the rows that indices name.
#pragma once

#include "read/decode.h"
#include "read/values.h"

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

// ---- whole matrices
// ---------------------------------------------------------------------------------
//
// A block of threads brings what it decodes to shared memory first, 16 bytes a thread and load,
// however the weights' own blocks are aligned. From there 32 threads at a time decode 256 elements
// that follow each other, each thread as many of them as fill 16 bytes: every store is of whole
// lines of memory.

constexpr int kUnitElems = 256;
constexpr int kUnitThreads = 32;
constexpr int kUnitsAtOnce = gpu::kBlockThreads / kUnitThreads;

// Elements of T in 16 bytes.
template <class T>
constexpr int kPieceElems = 16 / kElementBytes<T>;

// Words from shared memory that is aligned to kAlign, of which 4 more bytes can be read.
template <int kWords, int kAlign>
TORCH_Q4_DEVICE ByteVector<kWords> load_codes(const uint8_t* from) {
  if constexpr (kWords == 2 && kAlign >= 8) {
    const Words2 words = *reinterpret_cast<const Words2*>(from);
    return {{words.w[0], words.w[1]}};
  } else if constexpr (kAlign >= 4) {
    return ByteVector<kWords>::map(
        [&](int i) { return *reinterpret_cast<const uint32_t*>(from + 4 * i); });
  } else {
    const uint32_t odd = reinterpret_cast<uintptr_t>(from) & (kAlign == 1 ? 3 : 2);
    const auto* words = reinterpret_cast<const uint32_t*>(from - odd);
    return ByteVector<kWords>::map(
        [&](int i) { return shift_words(words[i], words[i + 1], 8 * odd); });
  }
}

// A piece of a 16-byte chunk, read where it becomes codes: kWords words from byte `first` on, or
// half as many where each byte has two neighbouring elements.
template <int kWords, int kAlign>
struct Line {
  const uint8_t* chunk;
  int first;
  int shift = 0, mask = 0xFF;  // a code is byte >> shift & mask

  using Piece = ByteVector<kWords>;

  TORCH_Q4_DEVICE Line operator>>(int bits) const {
    return {chunk, first, shift + bits, mask >> bits & 0xFF >> (shift + bits)};
  }
  TORCH_Q4_DEVICE Line operator&(int bits) const { return {chunk, first, shift, mask & bits}; }
  TORCH_Q4_DEVICE operator Piece() const {
    const Piece bytes = load_codes<kWords, kAlign>(chunk + first);
    return Piece::map([&](int i) { return field(bytes.w[i]); });
  }
  TORCH_Q4_DEVICE friend Piece operator|(const Line& a, const Line& b) {
    return static_cast<Piece>(a) | static_cast<Piece>(b);
  }
  TORCH_Q4_DEVICE Piece operator^(int bits) const { return static_cast<Piece>(*this) ^ bits; }
  TORCH_Q4_DEVICE Piece operator<<(int bits) const { return static_cast<Piece>(*this) << bits; }
  TORCH_Q4_DEVICE friend Piece look_up(const Line& a, const Codebook& table) {
    return look_up(static_cast<Piece>(a), table);
  }
  TORCH_Q4_DEVICE friend Piece base_3(const Line& a, int digit) {
    return base_3(static_cast<Piece>(a), digit);
  }

  TORCH_Q4_DEVICE uint32_t field(uint32_t word) const { return word >> shift & in_each_byte(mask); }
  // Of a segment, elements 2 i in `low`, 2 i + 1 in `high`.
  TORCH_Q4_DEVICE friend Piece interleave(const Line& low, const Line& high, int half) {
    const uint8_t* from = low.chunk + 8 * half + low.first / 2;
    uint32_t word;
    if constexpr (kWords == 2) {
      word = load_codes<1, kAlign>(from).w[0];
    } else {
      word = *reinterpret_cast<const uint16_t*>(from);
    }
    const uint32_t a = low.field(word), b = high.field(word);
    return Piece::map([&](int i) {
      return i == 0 ? select_bytes<0, 4, 1, 5>(a, b) : select_bytes<2, 6, 3, 7>(a, b);
    });
  }
  TORCH_Q4_DEVICE friend Piece spread(const Line& a, int quarter) {
    const uint8_t* from = a.chunk + 4 * quarter + a.first / 4;
    return Piece::map([&](int i) { return spread_byte(a.field(from[i])); });
  }
  // Its first eight elements in `low`, the others in `high`.
  TORCH_Q4_DEVICE friend Piece join(const Line& low, const Line& high, int half) {
    const Line& which = low.first < 8 ? low : high;
    return Line{low.chunk + 8 * half, low.first % 8, which.shift, which.mask};
  }
};

// The fifth bits of a piece's elements, of which those of `bits` belong to 16 from element 0 on, or
// their digits, as expand_digits has them.
template <int kWords>
TORCH_Q4_DEVICE ByteVector<kWords> expand_piece(uint32_t bits, int first) {
  return ByteVector<kWords>::map(
      [&](int i) { return expand_4_bits(bits >> (first + 4 * i) & 0xFu); });
}
template <int kWords>
TORCH_Q4_DEVICE ByteVector<kWords> expand_digits(uint32_t word, int first) {
  return ByteVector<kWords>::map(
      [&](int i) { return base_3_word(word, power_of_3(first / 4 + i)); });
}

// The piece that begins with byte `first` of a segment's codes.
template <int kWords>
TORCH_Q4_DEVICE ByteVector<kWords> piece_of(const Bytes& codes, int first) {
  // Choices by bits: of words in memory AMD's compiler would choose the address.
  const uint32_t second = first & 8 ? ~0u : 0, odd = first & 4 ? ~0u : 0;
  const auto choose = [](uint32_t a, uint32_t b, uint32_t mask) {
    return (a & ~mask) | (b & mask);
  };
  const uint32_t low = choose(codes.w[0], codes.w[2], second);
  const uint32_t high = choose(codes.w[1], codes.w[3], second);
  if constexpr (kWords == 2) {
    return {{low, high}};
  } else {
    return {{choose(low, high, odd)}};
  }
}

// A piece of every segment of one row's block in GGML's layout, in shared memory.
template <class Format, int kWords>
struct CanonicalPiece {
  const uint8_t* block;
  int first;

  using Row = CanonicalRow<Format>;
  using Chunk = Line<kWords, Row::kAlign>;

  TORCH_Q4_DEVICE Chunk line(int index) const { return {block + Row::line_offset(index), first}; }
  TORCH_Q4_DEVICE ByteVector<kWords> fifth_bits(int index) const {
    const uint8_t* bits = block + Row::bits_offset(index);
    return expand_piece<kWords>(*reinterpret_cast<const uint16_t*>(bits), first);
  }
  TORCH_Q4_DEVICE ByteVector<kWords> digits(int index) const {
    return expand_digits<kWords>(Row::digits_word(block, index), first);
  }
  TORCH_Q4_DEVICE ByteVector<kWords> grid_codes(int segment) const {
    return piece_of<kWords>(Row(block).grid_codes(segment), first);
  }
};

// Where byte `offset` of packed blocks lies in shared memory: a gap after every 256 bytes puts the
// chunks of one row into different banks.
TORCH_Q4_DEVICE constexpr int gapped(int offset) { return offset + offset / 256 * 16; }

// The same of a packed block, which begins `start` bytes after the first.
template <class Format, int kWords>
struct PackedPiece : SmallChunks<Format, PackedPiece<Format, kWords>> {
  const uint8_t* blocks;
  int start, row, first;

  TORCH_Q4_DEVICE PackedPiece(const uint8_t* blocks, int start, int row, int first)
      : blocks(blocks), start(start), row(row), first(first) {}
  template <int kIndex>
  static constexpr int kSmallAlign = Format::kChunks[kIndex].size;

  using Chunk = Line<kWords, 16>;

  TORCH_Q4_DEVICE Chunk line(int index) const {
    // 256 bytes and their gap a line.
    return {blocks + gapped(start + 16 * line_row(row)) + 272 * index, first};
  }
  TORCH_Q4_DEVICE ByteVector<kWords> fifth_bits(int index) const {
    const int offset = 256 * kLineCount<Format> + 32 * (index - kLineCount<Format>);
    const uint8_t* bits = blocks + gapped(start + offset + 2 * line_row(row));
    return expand_piece<kWords>(*reinterpret_cast<const uint16_t*>(bits), first);
  }
  TORCH_Q4_DEVICE ByteVector<kWords> digits(int index) const {
    const int offset = 256 * kLineCount<Format> + 64 * (index - kLineCount<Format>);
    const uint8_t* word = blocks + gapped(start + offset + 4 * line_row(row));
    return expand_digits<kWords>(*reinterpret_cast<const uint32_t*>(word), first);
  }
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* small_chunk() const {
    return blocks +
           gapped(start + chunk_start<Format>(kIndex) + Format::kChunks[kIndex].size * row);
  }
  template <int kFirst>
  TORCH_Q4_DEVICE const uint8_t* place_of(int offset) const {
    return blocks + gapped(start + packed_place<Format, kFirst>(offset, row));
  }
  TORCH_Q4_DEVICE ByteVector<kWords> grid_codes(int segment) const {
    const Bytes codes = SmallChunks<Format, PackedPiece>::grid_codes(segment);
    return piece_of<kWords>(codes, first);
  }
};

// The values of a piece, bit for bit ggml's, rounded to T, as 16 bytes.
template <class Format, class T>
TORCH_Q4_DEVICE Words4 dequantize_piece(const ByteVector<kPieceElems<T> / 4>& codes, float scale,
                                        float shift) {
  constexpr int kElems = kPieceElems<T>, kBits = Format::kCodeBits;
  constexpr float kBias = kCodeBias<kBits> + Format::kOffset;
  float values[kElems];
  const auto value = [&](float code) {
    // What is multiplied has 22 bits together: the product is exact, and adding to it in the same
    // instruction changes nothing.
    if (Format::kHasShift) return fmaf(code - kBias, scale, shift);
    return signed_product(scale, code - kBias);
  };
#pragma unroll
  for (int i = 0; i < kElems; i += 4) {
    const uint32_t word = prepare_codes<kBits>(codes.w[i / 4]);
    values[i] = value(code_to_float<0, kBits>(word));
    values[i + 1] = value(code_to_float<1, kBits>(word));
    values[i + 2] = value(code_to_float<2, kBits>(word));
    values[i + 3] = value(code_to_float<3, kBits>(word));
  }
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIsFloat32<T>) {
      words.w[i] = float_to_bits(values[i]);
    } else {
      words.w[i] = round_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return words;
}

// What a block of threads has in shared memory.
template <class Format>
struct DequantizeShared {
  static constexpr int kBytes = sizeof(typename Format::Block);
  static constexpr int kBlockElems = Format::kBlockElems;
  // Canonical blocks, and packed ones of a row.
  static constexpr int kBlocks = gpu::kBlockThreads / kBlockParts<Format>;
  static constexpr int kPanelBlocks = gpu::kPanelElems / kBlockElems;
  static constexpr int kCanonicalBytes = kBlocks * kBytes + 16;
  static constexpr int kPackedBytes = kPanelBlocks * kTileRows * kBytes;
  static constexpr int kStagedBytes = kCanonicalBytes > gapped(kPackedBytes) ? kCanonicalBytes
                                                                             : gapped(kPackedBytes);
  // Of a block of 256 elements each segment's scale and shift, and a gap for the banks.
  static constexpr bool kKeepsScales = kPartScales<Format> > 1;
  static constexpr int kStride = kBlockElems / 16 + 1;
  static_assert(!kKeepsScales || kPanelBlocks * kTileRows <= kBlocks);

  struct Plain {
    float scale;
  };
  struct alignas(8) Shifted {
    float scale, shift;
  };
  using Scale = std::conditional_t<Format::kHasShift, Shifted, Plain>;

  alignas(16) uint8_t staged[(kStagedBytes + 4 + 15) / 16 * 16];  // 4: load_codes
  Scale scales[kKeepsScales ? kBlocks * kStride : 1];

  // Bytes that begin at a multiple of 16.
  template <int kMostBytes, bool kGaps>
  TORCH_Q4_DEVICE void stage(const uint8_t* from, int bytes) {
    constexpr int kLoads = (kMostBytes + 16 * gpu::kBlockThreads - 1) / (16 * gpu::kBlockThreads);
    Bytes lines[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = 16 * (static_cast<int>(threadIdx.x) + i * gpu::kBlockThreads);
      if (at + 16 <= bytes) lines[i] = load_line<16>(from + at);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = 16 * (static_cast<int>(threadIdx.x) + i * gpu::kBlockThreads);
      const uint32_t (&w)[4] = lines[i].w;
      auto* to = reinterpret_cast<Words4*>(staged + (kGaps ? gapped(at) : at));
      if (at + 16 <= bytes) *to = {{w[0], w[1], w[2], w[3]}};
    }
    // Only GGML's layout ends in between, and nothing may be read past its end.
    using Least = std::conditional_t<kBytes % 2 == 0, uint16_t, uint8_t>;
    constexpr int kLeast = sizeof(Least);
    const int rest = bytes % 16 / kLeast, thread = static_cast<int>(threadIdx.x);
    if (!kGaps && thread < rest) {
      const int at = bytes / 16 * 16 + kLeast * thread;
      *reinterpret_cast<Least*>(staged + at) = *reinterpret_cast<const Least*>(from + at);
    }
    __syncthreads();
  }

  // `part`'s scales of the block that is number `block` here.
  template <class Row>
  TORCH_Q4_DEVICE void keep_scales(const Row& row, int part, int block) {
    float scale[kPartScales<Format>], shift[kPartScales<Format>];
    Format::part_scales(row, part, scale, shift);
#pragma unroll
    for (int i = 0; i < kPartScales<Format>; ++i) {
      Scale& to = scales[block * kStride + part_segment<Format>(part, i)];
      to.scale = scale[i];
      if constexpr (Format::kHasShift) to.shift = shift[i];
    }
  }

  // Decodes what `piece` reads of a segment of the block that is number `block` here, and whose
  // scales `row` reads, to out[index].
  template <class T, class Piece, class Row>
  TORCH_Q4_DEVICE void decode(const Piece& piece, const Row& row, int segment, int block, void* out,
                              int64_t index) const {
    float scale, shift = 0;
    if constexpr (kKeepsScales) {
      const Scale& found = scales[block * kStride + segment];
      scale = found.scale;
      if constexpr (Format::kHasShift) shift = found.shift;
    } else {
      float scale_of[1], shift_of[1];
      Format::part_scales(row, 0, scale_of, shift_of);
      scale = scale_of[0];
      if (Format::kHasShift) shift = shift_of[0];
    }
    const ByteVector<kPieceElems<T> / 4> codes = Format::packed_codes(piece, segment);
    *reinterpret_cast<Words4*>(static_cast<uint8_t*>(out) + index * kElementBytes<T>) =
        dequantize_piece<Format, T>(codes, scale, shift);
  }
};

// Block `block` of those that decode the rows from `first` on, which are in GGML's layout and so
// one sequence of weight blocks.
template <class Format, class T>
TORCH_Q4_DEVICE void dequantize_canonical(const gpu::DequantizeArgs& a, int64_t first,
                                          int64_t block, DequantizeShared<Format>& shared) {
  using Shared = DequantizeShared<Format>;
  constexpr int kUnitBlocks = kUnitElems / Format::kBlockElems;
  const int64_t row_blocks = a.k / Format::kBlockElems;
  const int64_t begin = first * row_blocks + block * Shared::kBlocks;
  const int64_t left = a.row_end * row_blocks - begin;
  const int count = left < Shared::kBlocks ? static_cast<int>(left) : Shared::kBlocks;
  const int skew = static_cast<int>(begin * Shared::kBytes % 16);
  shared.template stage<Shared::kCanonicalBytes, false>(a.blocks + begin * Shared::kBytes - skew,
                                                        skew + count * Shared::kBytes);
  const uint8_t* blocks = shared.staged + skew;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kUnitThreads;
  if constexpr (Shared::kKeepsScales) {
    const int place = thread / kBlockParts<Format>;
    if (place < count) {
      shared.keep_scales(CanonicalRow<Format>(blocks + place * Shared::kBytes),
                         thread % kBlockParts<Format>, place);
    }
    __syncthreads();
  }
  const int64_t index = (begin - a.row_begin * row_blocks) * Format::kBlockElems;
#pragma unroll 1  // more would cost registers, and so threads that hide each other's waits
  for (int unit = thread / kUnitThreads; unit < Shared::kBlocks / kUnitBlocks;
       unit += kUnitsAtOnce) {
#pragma unroll
    for (int start = 0; start < kUnitElems; start += kUnitThreads * kPieceElems<T>) {
      const int element = start + lane * kPieceElems<T>;
      const int place = unit * kUnitBlocks + element / Format::kBlockElems;
      const int segment = element % Format::kBlockElems / 16;
      if (place >= count) continue;
      const uint8_t* from = blocks + place * Shared::kBytes;
      shared.template decode<T>(CanonicalPiece<Format, kPieceElems<T> / 4>{from, element % 16},
                                CanonicalRow<Format>(from), segment, place, a.out,
                                index + unit * kUnitElems + element);
    }
  }
}

// kPanelElems elements from `first` on of the 16 packed rows of `group`.
template <class Format, class T>
TORCH_Q4_DEVICE void dequantize_packed(const gpu::DequantizeArgs& a, int64_t group, int64_t first,
                                       DequantizeShared<Format>& shared) {
  using Shared = DequantizeShared<Format>;
  using Piece = PackedPiece<Format, kPieceElems<T> / 4>;
  constexpr int kBlockBytes = kTileRows * Shared::kBytes;
  constexpr int kUnits = gpu::kPanelElems / kUnitElems * kTileRows;
  const int64_t row_blocks = a.k / Format::kBlockElems;
  const int64_t left = (a.k - first) / Format::kBlockElems;
  const int count = left < Shared::kPanelBlocks ? static_cast<int>(left) : Shared::kPanelBlocks;
  const int64_t begin =
      (a.row_begin + group * kTileRows) * row_blocks + first / Format::kBlockElems * kTileRows;
  shared.template stage<Shared::kPackedBytes, true>(a.blocks + begin * Shared::kBytes,
                                                    count * kBlockBytes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kUnitThreads;
  if constexpr (Shared::kKeepsScales) {
    const int row = thread % kTileRows, part = thread / kTileRows % kBlockParts<Format>;
    const int place = thread / (kTileRows * kBlockParts<Format>);
    if (place < count) {
      shared.keep_scales(Piece(shared.staged, place * kBlockBytes, row, 0), part,
                         place * kTileRows + row);
    }
    __syncthreads();
  }
  const int64_t index = group * kTileRows * a.k + first;
#pragma unroll 1  // more would cost registers, and so threads that hide each other's waits
  for (int unit = thread / kUnitThreads; unit < kUnits; unit += kUnitsAtOnce) {
    const int row = unit % kTileRows, column = unit / kTileRows * kUnitElems;
#pragma unroll
    for (int start = 0; start < kUnitElems; start += kUnitThreads * kPieceElems<T>) {
      const int element = column + start + lane * kPieceElems<T>;
      const int place = element / Format::kBlockElems;
      const int segment = element % Format::kBlockElems / 16;
      if (place >= count) continue;
      const Piece piece(shared.staged, place * kBlockBytes, row, element % 16);
      shared.template decode<T>(piece, piece, segment, place * kTileRows + row, a.out,
                                index + row * a.k + element);
    }
  }
}

template <class Format, class T>
TORCH_Q4_DEVICE void dequantize_to(const gpu::DequantizeArgs& a, DequantizeShared<Format>& shared) {
  const int64_t groups = a.packed ? (a.row_end - a.row_begin) / kTileRows : 0;
  const int64_t panels = (a.k + gpu::kPanelElems - 1) / gpu::kPanelElems;
  // The last rows first: the first ones are then still in the cache when a matrix product begins to
  // read the panel.
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  if (block < groups * panels) {
    dequantize_packed<Format, T>(a, block / panels, block % panels * gpu::kPanelElems, shared);
  } else {
    dequantize_canonical<Format, T>(a, a.row_begin + groups * kTileRows, block - groups * panels,
                                    shared);
  }
}

template <class Format>
TORCH_Q4_DEVICE void dequantize(const gpu::DequantizeArgs& a) {
  __shared__ DequantizeShared<Format> shared;
  if (a.dtype == gpu::kFloat32) {
    dequantize_to<Format, Float32>(a, shared);
  } else if (a.dtype == gpu::kFloat16) {
    dequantize_to<Format, Float16>(a, shared);
  } else {
    dequantize_to<Format, BFloat16>(a, shared);
  }
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
