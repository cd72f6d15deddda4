// How a GPU's thread reads weights: a part of one row's block at a time, in registers.
//
// A part (formats/registry.h) is 64 elements of a block, or all of a smaller one: four or two
// segments of 16 elements. Threads with neighbouring places read neighbouring 16 bytes of a packed
// weight, and those of different parts the other lines of the same block.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "formats/registry.h"

namespace TORCH_Q4_NAMESPACE {

template <class Format>
constexpr int kPartElems = gpu::part_elems(Format::kBlockElems);
template <class Format>
constexpr int kBlockParts = Format::kBlockElems / kPartElems<Format>;
template <class Format>
constexpr int kPartSegments = kPartElems<Format> / 16;
template <class Format>
constexpr int kPartScales = kPartSegments<Format> == 4 ? 4 : 1;

// Segment i of a part, as its number within the block.
template <class Format>
TORCH_Q4_DEVICE int part_segment(int part, int i) {
  // With bitwise operators the compiler sees that i alone decides by how much codes are shifted.
  return kBlockParts<Format> == 1 ? i : (part >> 1) << 3 | (part & 1) | i << 1;
}

// 16 bytes, the codes of a segment, four in a word.
struct Bytes {
  uint32_t w[4];
};

TORCH_Q4_DEVICE constexpr uint32_t in_each_byte(int value) {
  return static_cast<uint32_t>(value & 0xFF) * 0x01010101u;
}
template <class Word>
TORCH_Q4_DEVICE Bytes map_words(const Word& word) {
  Bytes out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.w[i] = word(i);
  return out;
}
TORCH_Q4_DEVICE Bytes operator&(const Bytes& a, int mask) {
  return map_words([&](int i) { return a.w[i] & in_each_byte(mask); });
}
TORCH_Q4_DEVICE Bytes operator^(const Bytes& a, int mask) {
  return map_words([&](int i) { return a.w[i] ^ in_each_byte(mask); });
}
TORCH_Q4_DEVICE Bytes operator|(const Bytes& a, const Bytes& b) {
  return map_words([&](int i) { return a.w[i] | b.w[i]; });
}
// Shifts are of words: the mask takes off what came over from the neighbouring byte.
TORCH_Q4_DEVICE Bytes operator>>(const Bytes& a, int bits) {
  return map_words([&](int i) { return a.w[i] >> bits & in_each_byte(0xFF >> bits); });
}
TORCH_Q4_DEVICE Bytes operator<<(const Bytes& a, int bits) {
  return map_words([&](int i) { return a.w[i] << bits & in_each_byte(0xFF << bits); });
}

// 16 codes of which each is part of a byte, still in their place: masks and shifts, which a format
// writes as it does for Bytes, are kept for whoever takes the codes out.
struct Fields {
  Bytes bytes;
  int shift = 0, mask = 0xFF;  // a code is byte >> shift & mask

  TORCH_Q4_DEVICE Fields operator>>(int bits) const {
    return {bytes, shift + bits, mask >> bits & 0xFF >> (shift + bits)};
  }
  TORCH_Q4_DEVICE Fields operator&(int bits) const { return {bytes, shift, mask & bits}; }
  TORCH_Q4_DEVICE Bytes codes() const {
    return map_words([&](int i) { return bytes.w[i] >> shift & in_each_byte(mask); });
  }
  TORCH_Q4_DEVICE operator Bytes() const { return codes(); }
  TORCH_Q4_DEVICE Bytes operator^(int bits) const { return codes() ^ bits; }
  TORCH_Q4_DEVICE Bytes operator|(const Bytes& other) const { return codes() | other; }
  TORCH_Q4_DEVICE Bytes operator<<(int bits) const { return codes() << bits; }
};

// Reads a word from bytes that are aligned to kAlign.
template <int kAlign>
TORCH_Q4_DEVICE uint32_t load_word(const uint8_t* from) {
  if constexpr (kAlign >= 4) {
    return *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kAlign == 2) {
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  } else {
    return from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24;
  }
}

template <int kAlign>
TORCH_Q4_DEVICE Bytes load_line(const uint8_t* from) {
  if constexpr (kAlign >= 16) {
    const Words4 line = *reinterpret_cast<const Words4*>(from);
    return {{line.w[0], line.w[1], line.w[2], line.w[3]}};
  } else {
    return map_words([&](int i) { return load_word<kAlign>(from + 4 * i); });
  }
}

// Each code's entry in a table of 16 bytes (formats/tables.h).
TORCH_Q4_DEVICE Bytes look_up(const Bytes& codes, const Codebook& table) {
  return map_words([&](int i) { return look_up_4(codes.w[i], table); });
}
TORCH_Q4_DEVICE Bytes look_up(const Fields& fields, const Codebook& table) {
  return look_up(fields.codes(), table);
}

// 16 codes of two bits, from word `quarter` of the four: those of each byte follow each other, the
// lowest first.
TORCH_Q4_DEVICE Bytes spread(const Bytes& a, int quarter) {
  const uint32_t low = quarter % 2 == 0 ? a.w[0] : a.w[1];
  const uint32_t high = quarter % 2 == 0 ? a.w[2] : a.w[3];
  const uint32_t word = quarter < 2 ? low : high;
  return map_words([&](int i) { return spread_byte(word >> 8 * i & 0xFFu); });
}
TORCH_Q4_DEVICE Bytes spread(const Fields& a, int quarter) { return spread(a.codes(), quarter); }

// Digit `digit` in base 3 of each byte (base_3_word), and of a word's four bytes the first digits,
// then the second, third and fourth ones.
TORCH_Q4_DEVICE Bytes base_3(const Bytes& a, int digit) {
  return map_words([&](int i) { return base_3_word(a.w[i], power_of_3(digit)); });
}
TORCH_Q4_DEVICE Bytes base_3(const Fields& a, int digit) { return base_3(a.codes(), digit); }
TORCH_Q4_DEVICE Bytes expand_digits(uint32_t word) {
  return map_words([&](int i) { return base_3_word(word, power_of_3(i)); });
}

TORCH_Q4_DEVICE Bytes choose(bool first, const Bytes& a, const Bytes& b) {
  return map_words([&](int i) { return first ? a.w[i] : b.w[i]; });
}

// 16 bytes with 16 where one of 16 bits is set.
TORCH_Q4_DEVICE Bytes expand_bits(uint32_t bits) {
  return map_words([&](int i) { return expand_4_bits(bits >> 4 * i & 0xFu); });
}

// Half 0 or 1 of the 16 bytes of `low` and those of `high`: byte by byte in turns, or the one after
// the other.
TORCH_Q4_DEVICE Bytes interleave(const Bytes& low, const Bytes& high, int half) {
  Bytes out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t a = half == 0 ? low.w[i] : low.w[i + 2];
    const uint32_t b = half == 0 ? high.w[i] : high.w[i + 2];
    out.w[2 * i] = select_bytes<0, 4, 1, 5>(a, b);
    out.w[2 * i + 1] = select_bytes<2, 6, 3, 7>(a, b);
  }
  return out;
}
TORCH_Q4_DEVICE Bytes join(const Bytes& low, const Bytes& high, int half) {
  // A choice by bits: of two words in memory AMD's compiler would choose the address.
  const uint32_t second = half == 0 ? 0 : ~0u;
  const auto choose = [&](uint32_t a, uint32_t b) { return (a & ~second) | (b & second); };
  return {{choose(low.w[0], low.w[2]), choose(low.w[1], low.w[3]), choose(high.w[0], high.w[2]),
           choose(high.w[1], high.w[3])}};
}

// The largest power of two that divides what kOffsets is the bitwise or of.
template <int kOffsets>
constexpr int kAlignment = kOffsets & -kOffsets;

// 16-byte chunks come first in kChunks, and then those that go with them.
template <class Format>
constexpr int line_count() {
  int count = 0;
  while (Format::kChunks[count].size == 16) ++count;
  return count;
}
template <class Format>
constexpr int kLineCount = line_count<Format>();

// How one row's chunks of four, two and one byte are read, by their number: what the readers below
// have in common. Row says where a chunk of its own lies, and to how many bytes it is aligned.
template <class Format, class Row>
struct SmallChunks {
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t word() const {
    return load_word<Row::template kSmallAlign<kIndex>>(chunk<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t halfword() const {
    static_assert(Row::template kSmallAlign<kIndex> >= 2);
    return *reinterpret_cast<const uint16_t*>(chunk<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t byte() const {
    return *chunk<kIndex>();
  }
  template <int kIndex>
  TORCH_Q4_DEVICE float half() const {
    return half_to_float(static_cast<uint16_t>(halfword<kIndex>()));
  }

 private:
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* chunk() const {
    // Such a chunk has its rows in another order, which fifth_bits and digits know.
    static_assert(!Format::kChunks[kIndex].with_lines);
    return static_cast<const Row*>(this)->template small_chunk<kIndex>();
  }
};

// One row's block in the packed layout (packed.h). What is the same for a whole block of threads
// stays a pointer by itself: AMD's loads add an offset of 32 bits to that without an instruction.
template <class Format>
struct PackedRow : SmallChunks<Format, PackedRow<Format>> {
  const uint8_t* group;  // the first block of its 16 rows
  uint32_t start;        // of its own block from there
  int row;               // among the 16

  TORCH_Q4_DEVICE PackedRow(const uint8_t* group, uint32_t start, int row)
      : group(group), start(start), row(row) {}
  template <int kIndex>
  static constexpr int kSmallAlign = Format::kChunks[kIndex].size;

  TORCH_Q4_DEVICE const uint8_t* chunk(int offset, int size, int place) const {
    return group + (start + static_cast<uint32_t>(size * place)) + offset;
  }
  TORCH_Q4_DEVICE Bytes line(int index) const {
    return load_line<16>(chunk(256 * index, 16, line_row(row)));
  }
  TORCH_Q4_DEVICE Bytes fifth_bits(int index) const {
    const int offset = 256 * kLineCount<Format> + 32 * (index - kLineCount<Format>);
    return expand_bits(*reinterpret_cast<const uint16_t*>(chunk(offset, 2, line_row(row))));
  }
  TORCH_Q4_DEVICE Bytes digits(int index) const {
    const int offset = 256 * kLineCount<Format> + 64 * (index - kLineCount<Format>);
    return expand_digits(*reinterpret_cast<const uint32_t*>(chunk(offset, 4, line_row(row))));
  }
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* small_chunk() const {
    return chunk(chunk_start<Format>(kIndex), Format::kChunks[kIndex].size, row);
  }
};

// One row's block in GGML's own layout, which is aligned to no more than its size is.
template <class Format>
struct CanonicalRow : SmallChunks<Format, CanonicalRow<Format>> {
  const uint8_t* block;

  TORCH_Q4_DEVICE explicit CanonicalRow(const uint8_t* block) : block(block) {}

  static constexpr int kLines = kLineCount<Format>;
  static constexpr int kFirst = Format::kChunks[0].offset;

  // Lines follow each other, except that they may start again elsewhere, once.
  static constexpr int restart() {
    int index = 0;
    while (index < kLines && Format::kChunks[index].offset == kFirst + 16 * index) ++index;
    return index;
  }
  static constexpr int jump() {
    return restart() == kLines ? 0 : Format::kChunks[restart()].offset - kFirst - 16 * restart();
  }
  static constexpr bool lines_follow() {
    for (int i = 0; i < kLines; ++i) {
      const int offset = kFirst + 16 * i + (i >= restart() ? jump() : 0);
      if (Format::kChunks[i].offset != offset) return false;
    }
    return true;
  }
  static constexpr int kBytes = sizeof(typename Format::Block);
  static constexpr int kAlign = kAlignment<kBytes | kFirst | jump() | 16>;
  template <int kIndex>
  static constexpr int kSmallAlign = kAlignment<kBytes | Format::kChunks[kIndex].offset | 4>;
  static constexpr int kRestart = restart(), kJump = jump();
  static constexpr bool kLinesFollow = lines_follow();

  TORCH_Q4_DEVICE static int line_offset(int index) {
    static_assert(kLinesFollow);
    return kFirst + 16 * index + (index >= kRestart ? kJump : 0);
  }
  // Of those that go with lines, the first.
  static constexpr int kBits = Format::kChunks[kLines < kChunkCount<Format> ? kLines : 0].offset;

  TORCH_Q4_DEVICE static int bits_offset(int index) { return kBits + 2 * (index - kLines); }
  TORCH_Q4_DEVICE static uint32_t digits_word(const uint8_t* block, int index) {
    return load_word<kAlignment<kBytes | kBits | 4>>(block + kBits + 4 * (index - kLines));
  }
  TORCH_Q4_DEVICE Bytes line(int index) const {
    return load_line<kAlign>(block + line_offset(index));
  }
  TORCH_Q4_DEVICE Bytes fifth_bits(int index) const {
    return expand_bits(*reinterpret_cast<const uint16_t*>(block + bits_offset(index)));
  }
  TORCH_Q4_DEVICE Bytes digits(int index) const { return expand_digits(digits_word(block, index)); }
  template <int kIndex>
  TORCH_Q4_DEVICE const uint8_t* small_chunk() const {
    return block + Format::kChunks[kIndex].offset;
  }
};

// All blocks of one row: `row` of the group of 16 that begins with row `first`.
template <class Format>
struct PackedRows {
  const uint8_t* group;
  int row;

  TORCH_Q4_DEVICE PackedRows(const uint8_t* blocks, int64_t k, int64_t first, int row)
      : group(blocks + first * (k / Format::kBlockElems) *
                           static_cast<int64_t>(sizeof(typename Format::Block))),
        row(row) {}
  TORCH_Q4_DEVICE PackedRow<Format> block(int index) const {
    constexpr uint32_t kBytes = kTileRows * sizeof(typename Format::Block);
    return PackedRow<Format>(group, static_cast<uint32_t>(index) * kBytes, row);
  }
};

template <class Format>
struct CanonicalRows {
  const uint8_t* first;

  TORCH_Q4_DEVICE CanonicalRows(const uint8_t* blocks, int64_t k, int64_t row)
      : first(blocks + row * (k / Format::kBlockElems) *
                           static_cast<int64_t>(sizeof(typename Format::Block))) {}
  TORCH_Q4_DEVICE CanonicalRow<Format> block(int index) const {
    return CanonicalRow<Format>(first +
                                index * static_cast<int64_t>(sizeof(typename Format::Block)));
  }
};

// Whether row `row` of a weight is in the packed layout.
TORCH_Q4_DEVICE bool row_is_packed(int32_t packed, int64_t n, int64_t row) {
  return packed != 0 && row < n / kTileRows * kTileRows;
}

// The weights of a part are code_to_float * scale + start. Where x has 24 bits the weights must
// have them as well: there the code's bias is taken off first (kExact), not by `start`, which would
// round what it does to weights that are nearly zero.
template <class Format, bool kExact>
struct PartScales {
  float scale[kPartScales<Format>], start[kPartScales<Format>];

  template <class Row>
  TORCH_Q4_DEVICE PartScales(const Row& row, int part) {
    float shift[kPartScales<Format>];
    Format::part_scales(row, part, scale, shift);
    constexpr float kBias = Format::kOffset + (kExact ? 0 : kCodeBias<Format::kCodeBits>);
#pragma unroll
    for (int i = 0; i < kPartScales<Format>; ++i) {
      start[i] = Format::kHasShift ? fmaf(-kBias, scale[i], shift[i]) : -kBias * scale[i];
    }
  }
};

// The codes of a part, a segment each. Read before anything else, so that all loads are under way,
// unless there is no room for them (kLate).
template <class Format, class Row, bool kLate = false>
struct PartCodes {
  Row row;
  int part;
  Bytes segments[kPartSegments<Format>];

  TORCH_Q4_DEVICE PartCodes(const Row& row, int part) : row(row), part(part) {
#pragma unroll
    for (int i = 0; i < kPartSegments<Format>; ++i) {
      if (!kLate) segments[i] = Format::packed_codes(row, part_segment<Format>(part, i));
    }
  }
  TORCH_Q4_DEVICE Bytes segment(int i) const {
    return kLate ? Format::packed_codes(row, part_segment<Format>(part, i)) : segments[i];
  }
};

// Calls use(index, value) for the 16 weights of a segment.
template <class Format, bool kExact, class Use>
TORCH_Q4_DEVICE void decode_segment(const Bytes& codes, float scale, float start, const Use& use) {
  constexpr int kBits = Format::kCodeBits;
  constexpr float kBias = kExact ? kCodeBias<kBits> : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = prepare_codes<kBits>(codes.w[i]);
    use(4 * i, fmaf(code_to_float<0, kBits>(word) - kBias, scale, start));
    use(4 * i + 1, fmaf(code_to_float<1, kBits>(word) - kBias, scale, start));
    use(4 * i + 2, fmaf(code_to_float<2, kBits>(word) - kBias, scale, start));
    use(4 * i + 3, fmaf(code_to_float<3, kBits>(word) - kBias, scale, start));
  }
}

// Weights as pairs of T, for matrix instructions and dot2. Where the GPU computes with pairs, a
// code becomes one by a byte put over it, which makes it the last bits of a T between two powers of
// two:
//
//     float16     0x4C00 | code is 16 + code / 64
//     bfloat16    0x4300 | code is 128 + code, for codes of up to 7 bits
//
// What is too much comes off exactly, and one multiply-add in T gives the weight. Its scale is thus
// rounded to T, and so is a shift, the value of the middle code, so that what is rounded is small:
// that makes the whole product's error up to 1.4 times what it is with weights that are rounded
// once, for half the instructions. Taking float16's codes by 64ths and its scales 64 times as large
// keeps scales from 2^-20 to 2^9 within its range. All else is computed in float32 and rounded
// once.
template <class Format, class T>
struct PairDecoder {
  static constexpr int kBits = Format::kCodeBits;
  static constexpr bool kIsHalf = std::is_same_v<T, Float16>;
  static constexpr bool kInPairs = kHasPairMath<T> && (kIsHalf || kBits < 8);
  static constexpr int kMiddle = Format::kHasShift ? 1 << (kBits - 1) : Format::kOffset;

  uint32_t scale[kPartScales<Format>], start[kPartScales<Format>];

  template <class Row>
  TORCH_Q4_DEVICE PairDecoder(const Row& row, int part) {
    if constexpr (kInPairs) {
      float in_float[kPartScales<Format>], shift[kPartScales<Format>];
      Format::part_scales(row, part, in_float, shift);
#pragma unroll
      for (int i = 0; i < kPartScales<Format>; ++i) {
        const float factor = kIsHalf ? 64 * in_float[i] : in_float[i];
        const float middle = Format::kHasShift ? fmaf(kMiddle, in_float[i], shift[i]) : 0.0f;
        scale[i] = round_pair<T>(factor, factor);
        start[i] = round_pair<T>(middle, middle);
      }
    } else {
      const PartScales<Format, false> in_float(row, part);
#pragma unroll
      for (int i = 0; i < kPartScales<Format>; ++i) {
        scale[i] = float_to_bits(plain_nan<T>(in_float.scale[i]));
        start[i] = float_to_bits(plain_nan<T>(in_float.start[i]));
      }
    }
  }

  // The 16 weights of segment i.
  TORCH_Q4_DEVICE void decode(const Bytes& codes, int i, uint32_t (&pairs)[8]) const {
    const uint32_t by = scale[kPartScales<Format> == 1 ? 0 : i];
    const uint32_t from = start[kPartScales<Format> == 1 ? 0 : i];
    if constexpr (kInPairs) {
      constexpr uint32_t kOver = kIsHalf ? 0x4Cu : 0x43u;
      constexpr float kExcess = kIsHalf ? -16 - kMiddle / 64.0f : -128 - kMiddle;
      const uint32_t excess = round_pair<T>(kExcess, kExcess);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = select_bytes<0, 4, 1, 4>(codes.w[j], kOver);
        const uint32_t high = select_bytes<2, 4, 3, 4>(codes.w[j], kOver);
        pairs[2 * j] = fma_pairs<T>(add_pairs<T>(low, excess), by, from);
        pairs[2 * j + 1] = fma_pairs<T>(add_pairs<T>(high, excess), by, from);
      }
    } else {
      float values[16];
      decode_segment<Format, false>(codes, bits_to_float(by), bits_to_float(from),
                                    [&](int index, float value) { values[index] = value; });
#pragma unroll
      for (int j = 0; j < 8; ++j) pairs[j] = round_plain_pair<T>(values[2 * j], values[2 * j + 1]);
    }
  }

  // The same with every four weights as pairs of the first and third, the second and fourth: which
  // codes that do not fill their bytes become with an instruction less.
  TORCH_Q4_DEVICE void decode_apart(const Bytes& codes, int i, uint32_t (&pairs)[8]) const {
    decode_apart(Fields{codes}, i, pairs);
  }
  TORCH_Q4_DEVICE void decode_apart(const Fields& codes, int i, uint32_t (&pairs)[8]) const {
    const uint32_t by = scale[kPartScales<Format> == 1 ? 0 : i];
    const uint32_t from = start[kPartScales<Format> == 1 ? 0 : i];
    if constexpr (kInPairs) {
      // Where there is room for it, a code stays where it is and the power of two is a smaller one.
      constexpr int kMantissa = kIsHalf ? 10 : 7, kExponent = kIsHalf ? 4 : 7;
      const int shift = codes.shift + kBits <= kMantissa ? codes.shift : 0;
      const int exponent = kExponent - shift;
      const uint32_t over = (kIsHalf ? 15 + exponent : 127 + exponent) << kMantissa;
      const uint32_t mask = static_cast<uint32_t>(codes.mask) << shift;
      const float power = bits_to_float((127 + exponent) << 23);
      const float excess = -power - (kIsHalf ? kMiddle / 64.0f : kMiddle);
      const uint32_t less = round_pair<T>(excess, excess);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t word = codes.bytes.w[j] >> (codes.shift - shift);
        const uint32_t even = and_or(word, mask * 0x10001u, over * 0x10001u);
        const uint32_t odd = and_or(word >> 8, mask * 0x10001u, over * 0x10001u);
        pairs[2 * j] = fma_pairs<T>(add_pairs<T>(even, less), by, from);
        pairs[2 * j + 1] = fma_pairs<T>(add_pairs<T>(odd, less), by, from);
      }
    } else {
      float values[16];
      decode_segment<Format, false>(codes, bits_to_float(by), bits_to_float(from),
                                    [&](int index, float value) { values[index] = value; });
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[2 * j] = round_plain_pair<T>(values[4 * j], values[4 * j + 2]);
        pairs[2 * j + 1] = round_plain_pair<T>(values[4 * j + 1], values[4 * j + 3]);
      }
    }
  }
};

// ---- activations
// ---------------------------------------------------------------------------------

template <class T>
constexpr int kElementBytes = 2;
template <>
constexpr int kElementBytes<Float32> = 4;

template <class T>
constexpr bool kIsFloat32 = kElementBytes<T> == 4;

// 16 elements of x as words: eight of two elements, or 16 of one.
template <class T>
struct Activations {
  uint32_t w[4 * kElementBytes<T>];

  // From element `index` of those that begin at `first`, the same for a whole block of threads.
  TORCH_Q4_DEVICE void load(const uint8_t* first, uint32_t index) {
    const auto* from = reinterpret_cast<const Words4*>(first + index * kElementBytes<T>);
#pragma unroll
    for (int i = 0; i < kElementBytes<T>; ++i) {
      const Words4 words = from[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[4 * i + j] = words.w[j];
    }
  }
  TORCH_Q4_DEVICE float at(int index) const {
    if constexpr (kElementBytes<T> == 4) {
      return bits_to_float(w[index]);
    } else {
      const uint32_t pair = w[index / 2];
      return index % 2 == 0 ? low_of_pair<T>(pair) : high_of_pair<T>(pair);
    }
  }
};

// Where row m of x begins.
template <class T>
TORCH_Q4_DEVICE const uint8_t* row_of(const void* x, int64_t m, int64_t k) {
  return static_cast<const uint8_t*>(x) + m * k * kElementBytes<T>;
}

TORCH_Q4_DEVICE float load_value(const void* from, int64_t index, gpu::DType dtype) {
  if (dtype == gpu::kFloat32) return static_cast<const float*>(from)[index];
  const uint32_t bits = static_cast<const uint16_t*>(from)[index];
  return dtype == gpu::kFloat16 ? low_of_pair<Float16>(bits) : low_of_pair<BFloat16>(bits);
}

TORCH_Q4_DEVICE void store_value(void* to, int64_t index, float value, gpu::DType dtype) {
  if (dtype == gpu::kFloat32) {
    static_cast<float*>(to)[index] = value;
  } else {
    const uint32_t pair =
        dtype == gpu::kFloat16 ? round_pair<Float16>(value, 0) : round_pair<BFloat16>(value, 0);
    static_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(pair);
  }
}

// 16 values to out[index], a multiple of 16.
TORCH_Q4_DEVICE void store_segment(void* out, int64_t index, const float (&values)[16],
                                   gpu::DType dtype) {
  if (dtype == gpu::kFloat32) {
    auto* to = reinterpret_cast<Words4*>(static_cast<float*>(out) + index);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = {{float_to_bits(values[4 * i]), float_to_bits(values[4 * i + 1]),
                float_to_bits(values[4 * i + 2]), float_to_bits(values[4 * i + 3])}};
    }
    return;
  }
  auto* to = reinterpret_cast<Words4*>(static_cast<uint16_t*>(out) + index);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Words4 words;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float low = values[8 * i + 2 * j], high = values[8 * i + 2 * j + 1];
      words.w[j] =
          dtype == gpu::kFloat16 ? round_pair<Float16>(low, high) : round_pair<BFloat16>(low, high);
    }
    to[i] = words;
  }
}

}  // namespace TORCH_Q4_NAMESPACE
