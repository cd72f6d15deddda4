// The weights of a part: from its codes and scales to floats, or to pairs of 16-bit floats.
#pragma once

#include <type_traits>

#include "weights.h"

namespace TORCH_Q4_NAMESPACE {

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

  PairDecoder() = default;
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

}  // namespace TORCH_Q4_NAMESPACE
