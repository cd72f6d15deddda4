// A CPU, for which instruction set the compiler's own macros say. Every CPU with AVX2 has F16C.
#pragma once

#include "arch.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace TORCH_Q4_NAMESPACE {

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinity or NaN: widen the exponent to all ones
    return bits_to_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  if (magnitude >= 0x0400u) {  // normal: rebias the exponent from 15 to 127
    return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  }
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;  // exact
  return bits_to_float(sign | float_to_bits(subnormal));
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);   // NaN
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {
    // Below 2^-14 halves are multiples of 2^-24. Adding 0.5 lines the value up so that float32's
    // own rounding drops exactly the bits that a half lacks.
    const uint32_t aligned = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (aligned - float_to_bits(0.5f)));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t rounded = magnitude - 0x38000000u + 0x0FFFu + odd;
  return static_cast<uint16_t>(sign | (rounded >> 13));
#endif
}

inline uint32_t choose_word(bool first, uint32_t a, uint32_t b) { return first ? a : b; }

inline void expand_to_16(uint32_t bits, uint8_t* out) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_maskz_set1_epi8(bits, 16));
#elif defined(__F16C__)
  // Byte i of the vector gets the byte of `bits` that holds bit i, and tests that bit.
  const __m256i byte_of = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                             0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_and_si256(set, _mm256_set1_epi8(16)));
#else
  for (int i = 0; i < 8; ++i) {
    const uint32_t four = expand_4_bits(bits >> 4 * i & 0xFu);
    std::memcpy(out + 4 * i, &four, 4);
  }
#endif
}

inline float byte_to_float(uint32_t word, int index) {
  return static_cast<float>(word >> 8 * index & 0xFFu);
}

}  // namespace TORCH_Q4_NAMESPACE
