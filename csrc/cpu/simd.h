// The vector operations that the CPU kernels are written in, for whichever instruction set this
// translation unit is compiled for. Everything above this file is the same for all of them.
//
// Include only from kernels_impl.h: its includer puts all of this into a namespace of its own, so
// that the linker can never merge an AVX-512 copy of an inline function into baseline code.
//
//   VecF, VecI          kLanes floats, kLanes 32-bit integers; 16 rows are kRowVectors of them
//   Bytes               one 16-byte chunk of kLineRows rows
//   dot4_word(acc, a, b)  acc + four products a lane, a unsigned bytes, b one word of signed ones
//   dot4_signed         the same with codes that have 128 added, taken off: for q8_0 (see there)
#pragma once

#include <cstdint>

#include "../../kernels/arch/arch.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace TORCH_Q4_NAMESPACE {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512VNNI__)

constexpr int kLanes = 16;
using VecF = __m512;
using VecI = __m512i;

inline VecF zero() { return _mm512_setzero_ps(); }
inline VecF broadcast(float value) { return _mm512_set1_ps(value); }
inline VecF load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, VecF value) { _mm512_storeu_ps(to, value); }
inline VecF add(VecF a, VecF b) { return _mm512_add_ps(a, b); }
inline VecF mul(VecF a, VecF b) { return _mm512_mul_ps(a, b); }
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
inline VecF load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store_half(uint16_t* to, VecF value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline VecI load_words(const void* from) { return _mm512_load_si512(from); }
inline VecI broadcast_word(int32_t word) { return _mm512_set1_epi32(word); }
inline VecF to_float(VecI value) { return _mm512_cvtepi32_ps(value); }
// dot4 with one word of x for all lanes, straight from memory. GCC loads the word into a register
// first, which costs an instruction for every product.
inline VecI dot4_word(VecI acc, VecI a, const uint32_t* word) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*word));
  return acc;
}
constexpr bool kWideProducts = true;  // dot4 is exact for all bytes

// Byte kIndex of each word, a code of kBits bits, less kOffset, as a float. Codes of up to five
// bits are looked up: a permutation reads just that many bits of each word, so nothing masks the
// rest.
template <int kIndex, int kOffset, int kBits>
inline VecF byte_to_float(VecI words) {
  __m512i value = kIndex == 0 ? words : _mm512_srli_epi32(words, 8 * kIndex);
  if constexpr (kBits <= 5) {
    const __m512 first =
        _mm512_setr_ps(0 - kOffset, 1 - kOffset, 2 - kOffset, 3 - kOffset, 4 - kOffset, 5 - kOffset,
                       6 - kOffset, 7 - kOffset, 8 - kOffset, 9 - kOffset, 10 - kOffset,
                       11 - kOffset, 12 - kOffset, 13 - kOffset, 14 - kOffset, 15 - kOffset);
    if constexpr (kBits <= 4) return _mm512_permutexvar_ps(value, first);
    const __m512 second = _mm512_add_ps(first, _mm512_set1_ps(16.0f));
    return _mm512_permutex2var_ps(first, value, second);
  }
  if constexpr (kIndex < 3) value = _mm512_and_si512(value, _mm512_set1_epi32(0xFF));
  if constexpr (kOffset != 0) value = _mm512_sub_epi32(value, _mm512_set1_epi32(kOffset));
  return _mm512_cvtepi32_ps(value);
}

struct Bytes {
  __m512i v;
};
constexpr int kLineRows = 4;
inline Bytes load_bytes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline Bytes operator&(Bytes a, int mask) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Bytes operator^(Bytes a, int mask) {
  return {_mm512_xor_si512(a.v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
// Shifts are of 16-bit words: the mask takes off what came over from the neighbouring byte.
inline Bytes operator>>(Bytes a, int bits) {
  return Bytes{_mm512_srli_epi16(a.v, static_cast<unsigned>(bits))} & (0xFF >> bits);
}
inline Bytes operator<<(Bytes a, int bits) {
  return Bytes{_mm512_slli_epi16(a.v, static_cast<unsigned>(bits))} & (0xFF << bits & 0xFF);
}
// Each byte's entry in the table; bytes are below 16.
inline Bytes look_up(Bytes codes, const Codebook& table) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.w));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), codes.v)};
}
// Half 0 or 1 of each row's 16 bytes of a and of b: byte by byte in turns, or the one after the
// other.
inline Bytes interleave(Bytes a, Bytes b, int half) {
  return {half == 0 ? _mm512_unpacklo_epi8(a.v, b.v) : _mm512_unpackhi_epi8(a.v, b.v)};
}
inline Bytes join(Bytes a, Bytes b, int half) {
  return {half == 0 ? _mm512_unpacklo_epi64(a.v, b.v) : _mm512_unpackhi_epi64(a.v, b.v)};
}

// Of four bytes of each row's 16, those of word `quarter`, the two lowest bits, then the next two,
// and so on: each byte is brought to a word, and then as in spread_byte.
inline Bytes spread(Bytes a, int quarter) {
  const __m512i bytes = _mm512_set4_epi32(~0x7F7F7FFC, ~0x7F7F7FFD, ~0x7F7F7FFE, ~0x7F7F7FFF);
  const __m512i places = _mm512_add_epi32(bytes, _mm512_set1_epi32(4 * quarter));
  const __m512i word = _mm512_shuffle_epi8(a.v, places);
  const __m512i twice = _mm512_or_si512(word, _mm512_slli_epi32(word, 6));
  const __m512i all = _mm512_or_si512(twice, _mm512_slli_epi32(twice, 12));
  return {_mm512_and_si512(all, _mm512_set1_epi8(3))};
}
// base_3_word of all bytes, those of each 16-bit word times its own power of 3. The product of one
// byte, brought to the word's upper half, keeps there what is below the point.
inline Bytes base_3_digits(__m512i bytes, __m512i powers) {
  const __m512i upper = _mm512_set1_epi16(static_cast<int16_t>(0xFF00));
  const __m512i even = _mm512_mullo_epi16(bytes, _mm512_slli_epi16(powers, 8));
  const __m512i odd = _mm512_mullo_epi16(_mm512_and_si512(bytes, upper), powers);
  const __m512i even_digits = _mm512_mulhi_epu16(even, _mm512_set1_epi16(3));
  const __m512i odd_digits = _mm512_mulhi_epu16(odd, _mm512_set1_epi16(3 << 8));
  return {_mm512_or_si512(even_digits, _mm512_and_si512(odd_digits, upper))};
}
// Digit `digit` in base 3 of each byte.
inline Bytes base_3(Bytes a, int digit) {
  return base_3_digits(a.v, _mm512_set1_epi16(static_cast<int16_t>(power_of_3(digit))));
}
// Of four bytes a row their first digits, then the second, third and fourth ones.
inline Bytes first_digits(const uint8_t* from) {
  const __m512i row_of = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m512i bytes = _mm512_permutexvar_epi32(row_of, _mm512_castsi128_si512(rows));
  return base_3_digits(bytes, _mm512_set4_epi32(0x1B001B, 0x90009, 0x30003, 0x10001));
}

// 16 in each byte whose bit is set: 16 bits, two bytes, a row.
inline Bytes bits_to_16(const uint8_t* bits) {
  uint64_t mask;
  std::memcpy(&mask, bits, sizeof(mask));
  return {_mm512_maskz_set1_epi8(mask, 16)};
}

// 16 rows of 16 bytes to four vectors of 16 rows by four bytes: word q of row r to out[64 q + 4 r].
inline void transpose_words(const Bytes* in, uint8_t* out) {
  const __m512i low01 = _mm512_unpacklo_epi32(in[0].v, in[1].v);
  const __m512i high01 = _mm512_unpackhi_epi32(in[0].v, in[1].v);
  const __m512i low23 = _mm512_unpacklo_epi32(in[2].v, in[3].v);
  const __m512i high23 = _mm512_unpackhi_epi32(in[2].v, in[3].v);
  _mm512_store_si512(out, _mm512_unpacklo_epi64(low01, low23));
  _mm512_store_si512(out + 64, _mm512_unpackhi_epi64(low01, low23));
  _mm512_store_si512(out + 128, _mm512_unpacklo_epi64(high01, high23));
  _mm512_store_si512(out + 192, _mm512_unpackhi_epi64(high01, high23));
}

// ---- for the quantisers (quantizers.h)

using Mask = __mmask16;
inline bool any(Mask mask) { return mask != 0; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask less_equal(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Mask equal(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask not_equal(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
inline VecF select(Mask mask, VecF a, VecF b) { return _mm512_mask_blend_ps(mask, b, a); }
inline VecF lesser(VecF a, VecF b) { return _mm512_min_ps(a, b); }
inline VecF greater(VecF a, VecF b) { return _mm512_max_ps(a, b); }
inline VecF square_root(VecF a) { return _mm512_sqrt_ps(a); }
inline VecF magnitude(VecF a) { return _mm512_abs_ps(a); }
inline VecF with_sign_of(VecF a, VecF sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(bit, a), _mm512_and_ps(bit, sign));
}
inline VecI truncate(VecF a) { return _mm512_cvttps_epi32(a); }
inline VecF with_fraction_bits_of(VecF a, VecF b) {
  constexpr int kChoice = 0xCA;  // of three bits: the second where the first is set, else the third
  const __m512i fraction = _mm512_set1_epi32(0x7FFFFF);
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(fraction, _mm512_castps_si512(b), _mm512_castps_si512(a), kChoice));
}
inline VecI low_bytes(VecI a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xFF)); }
inline VecI signed_low_bytes(VecI a) { return _mm512_srai_epi32(_mm512_slli_epi32(a, 24), 24); }
inline VecI bytes_to_words(VecI a, VecI b, VecI c, VecI d) {
  const __m512i low = _mm512_or_si512(low_bytes(a), _mm512_slli_epi32(low_bytes(b), 8));
  const __m512i high =
      _mm512_or_si512(_mm512_slli_epi32(low_bytes(c), 16), _mm512_slli_epi32(d, 24));
  return _mm512_or_si512(low, high);
}

// In each 16 bytes of four vectors: column i of the four rows to vector i.
inline void transpose_4x4(VecF* v) {
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}
// Vector i: four floats from each of the addresses i, i + 4, i + 8 and i + 12.
inline VecF load_fours(const float* const* from, int64_t at) {
  __m512 value = _mm512_castps128_ps512(_mm_loadu_ps(from[0] + at));
  value = _mm512_insertf32x4(value, _mm_loadu_ps(from[4] + at), 1);
  value = _mm512_insertf32x4(value, _mm_loadu_ps(from[8] + at), 2);
  return _mm512_insertf32x4(value, _mm_loadu_ps(from[12] + at), 3);
}
inline void store_fours(VecF value, uint8_t* to, int64_t stride) {
  _mm_storeu_ps(reinterpret_cast<float*>(to), _mm512_castps512_ps128(value));
  _mm_storeu_ps(reinterpret_cast<float*>(to + 4 * stride), _mm512_extractf32x4_ps(value, 1));
  _mm_storeu_ps(reinterpret_cast<float*>(to + 8 * stride), _mm512_extractf32x4_ps(value, 2));
  _mm_storeu_ps(reinterpret_cast<float*>(to + 12 * stride), _mm512_extractf32x4_ps(value, 3));
}
inline VecF as_floats(VecI words) { return _mm512_castsi512_ps(words); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using VecF = __m256;
using VecI = __m256i;

inline VecF zero() { return _mm256_setzero_ps(); }
inline VecF broadcast(float value) { return _mm256_set1_ps(value); }
inline VecF load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, VecF value) { _mm256_storeu_ps(to, value); }
inline VecF add(VecF a, VecF b) { return _mm256_add_ps(a, b); }
inline VecF mul(VecF a, VecF b) { return _mm256_mul_ps(a, b); }
inline VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
inline VecF load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store_half(uint16_t* to, VecF value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline VecI load_words(const void* from) {
  return _mm256_load_si256(static_cast<const __m256i*>(from));
}
inline VecI broadcast_word(int32_t word) { return _mm256_set1_epi32(word); }
inline VecF to_float(VecI value) { return _mm256_cvtepi32_ps(value); }
#if defined(__AVXVNNI__)
inline VecI dot4(VecI acc, VecI a, VecI b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
constexpr bool kWideProducts = true;
#else
// vpmaddubsw saturates its 16-bit pair sums at 32767: codes must be at most 128.
inline VecI dot4(VecI acc, VecI a, VecI b) {
  const __m256i pairs = _mm256_maddubs_epi16(a, b);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
constexpr bool kWideProducts = false;
#endif
// For codes up to 255: with w = code - 128, |w| * (sign(w) * x) is w * x, and |w| is at most 128.
inline VecI dot4_signed(VecI acc, VecI a, VecI b) {
  const __m256i w = _mm256_xor_si256(a, _mm256_set1_epi8(-128));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(b, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int kIndex, int kOffset, int /*kBits*/>
inline VecF byte_to_float(VecI words) {
  __m256i value = _mm256_srli_epi32(words, 8 * kIndex);
  if constexpr (kIndex < 3) value = _mm256_and_si256(value, _mm256_set1_epi32(0xFF));
  if constexpr (kOffset != 0) value = _mm256_sub_epi32(value, _mm256_set1_epi32(kOffset));
  return _mm256_cvtepi32_ps(value);
}

struct Bytes {
  __m256i v;
};
constexpr int kLineRows = 2;
inline Bytes load_bytes(const uint8_t* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
inline Bytes operator&(Bytes a, int mask) {
  return {_mm256_and_si256(a.v, _mm256_set1_epi8(static_cast<char>(mask)))};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Bytes operator^(Bytes a, int mask) {
  return {_mm256_xor_si256(a.v, _mm256_set1_epi8(static_cast<char>(mask)))};
}
inline Bytes operator>>(Bytes a, int bits) {
  return Bytes{_mm256_srli_epi16(a.v, bits)} & (0xFF >> bits);
}
inline Bytes operator<<(Bytes a, int bits) {
  return Bytes{_mm256_slli_epi16(a.v, bits)} & (0xFF << bits & 0xFF);
}
inline Bytes look_up(Bytes codes, const Codebook& table) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.w));
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), codes.v)};
}
inline Bytes interleave(Bytes a, Bytes b, int half) {
  return {half == 0 ? _mm256_unpacklo_epi8(a.v, b.v) : _mm256_unpackhi_epi8(a.v, b.v)};
}
inline Bytes join(Bytes a, Bytes b, int half) {
  return {half == 0 ? _mm256_unpacklo_epi64(a.v, b.v) : _mm256_unpackhi_epi64(a.v, b.v)};
}

inline Bytes spread(Bytes a, int quarter) {
  const __m256i bytes = _mm256_setr_epi32(~0x7F7F7FFF, ~0x7F7F7FFE, ~0x7F7F7FFD, ~0x7F7F7FFC,
                                          ~0x7F7F7FFF, ~0x7F7F7FFE, ~0x7F7F7FFD, ~0x7F7F7FFC);
  const __m256i places = _mm256_add_epi32(bytes, _mm256_set1_epi32(4 * quarter));
  const __m256i word = _mm256_shuffle_epi8(a.v, places);
  const __m256i twice = _mm256_or_si256(word, _mm256_slli_epi32(word, 6));
  const __m256i all = _mm256_or_si256(twice, _mm256_slli_epi32(twice, 12));
  return {_mm256_and_si256(all, _mm256_set1_epi8(3))};
}
inline Bytes base_3_digits(__m256i bytes, __m256i powers) {
  const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(0xFF00));
  const __m256i even = _mm256_mullo_epi16(bytes, _mm256_slli_epi16(powers, 8));
  const __m256i odd = _mm256_mullo_epi16(_mm256_and_si256(bytes, upper), powers);
  const __m256i even_digits = _mm256_mulhi_epu16(even, _mm256_set1_epi16(3));
  const __m256i odd_digits = _mm256_mulhi_epu16(odd, _mm256_set1_epi16(3 << 8));
  return {_mm256_or_si256(even_digits, _mm256_and_si256(odd_digits, upper))};
}
inline Bytes base_3(Bytes a, int digit) {
  return base_3_digits(a.v, _mm256_set1_epi16(static_cast<int16_t>(power_of_3(digit))));
}
inline Bytes first_digits(const uint8_t* from) {
  const __m256i row_of = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const __m128i rows = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(rows), row_of);
  return base_3_digits(bytes, _mm256_setr_epi32(0x10001, 0x30003, 0x90009, 0x1B001B, 0x10001,
                                                0x30003, 0x90009, 0x1B001B));
}

inline Bytes bits_to_16(const uint8_t* bits) {
  uint32_t mask;
  std::memcpy(&mask, bits, sizeof(mask));
  alignas(32) uint8_t bytes[32];
  expand_to_16(mask, bytes);
  return load_bytes(bytes);
}

// Lines come as rows 0 4, 8 12, 1 5, 9 13, ...: the even vectors hold rows 0-7, the odd ones 8-15.
inline void transpose_words(const Bytes* in, uint8_t* out) {
  for (int half = 0; half < 2; ++half, out += 32) {
    const __m256i low01 = _mm256_unpacklo_epi32(in[half].v, in[half + 2].v);
    const __m256i high01 = _mm256_unpackhi_epi32(in[half].v, in[half + 2].v);
    const __m256i low23 = _mm256_unpacklo_epi32(in[half + 4].v, in[half + 6].v);
    const __m256i high23 = _mm256_unpackhi_epi32(in[half + 4].v, in[half + 6].v);
    auto* to = reinterpret_cast<__m256i*>(out);
    _mm256_store_si256(to, _mm256_unpacklo_epi64(low01, low23));
    _mm256_store_si256(to + 2, _mm256_unpackhi_epi64(low01, low23));
    _mm256_store_si256(to + 4, _mm256_unpacklo_epi64(high01, high23));
    _mm256_store_si256(to + 6, _mm256_unpackhi_epi64(high01, high23));
  }
}

// ---- for the quantisers (quantizers.h)

using Mask = __m256;
inline bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Mask less(VecF a, VecF b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask less_equal(VecF a, VecF b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
inline Mask equal(VecF a, VecF b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask not_equal(VecF a, VecF b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
inline VecF select(Mask mask, VecF a, VecF b) { return _mm256_blendv_ps(b, a, mask); }
inline VecF lesser(VecF a, VecF b) { return _mm256_min_ps(a, b); }
inline VecF greater(VecF a, VecF b) { return _mm256_max_ps(a, b); }
inline VecF square_root(VecF a) { return _mm256_sqrt_ps(a); }
inline VecF magnitude(VecF a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline VecF with_sign_of(VecF a, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
}
inline VecI truncate(VecF a) { return _mm256_cvttps_epi32(a); }
inline VecF with_fraction_bits_of(VecF a, VecF b) {
  const __m256 fraction = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFF));
  return _mm256_or_ps(_mm256_andnot_ps(fraction, a), _mm256_and_ps(fraction, b));
}
inline VecI low_bytes(VecI a) { return _mm256_and_si256(a, _mm256_set1_epi32(0xFF)); }
inline VecI signed_low_bytes(VecI a) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24); }
inline VecI bytes_to_words(VecI a, VecI b, VecI c, VecI d) {
  const __m256i low = _mm256_or_si256(low_bytes(a), _mm256_slli_epi32(low_bytes(b), 8));
  const __m256i high =
      _mm256_or_si256(_mm256_slli_epi32(low_bytes(c), 16), _mm256_slli_epi32(d, 24));
  return _mm256_or_si256(low, high);
}

// In each 16 bytes of four vectors: column i of the four rows to vector i.
inline void transpose_4x4(VecF* v) {
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
  v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}
// Vector i: four floats from each of the addresses i and i + 4.
inline VecF load_fours(const float* const* from, int64_t at) {
  const __m256 value = _mm256_castps128_ps256(_mm_loadu_ps(from[0] + at));
  return _mm256_insertf128_ps(value, _mm_loadu_ps(from[4] + at), 1);
}
inline void store_fours(VecF value, uint8_t* to, int64_t stride) {
  _mm_storeu_ps(reinterpret_cast<float*>(to), _mm256_castps256_ps128(value));
  _mm_storeu_ps(reinterpret_cast<float*>(to + 4 * stride), _mm256_extractf128_ps(value, 1));
}
inline VecF as_floats(VecI words) { return _mm256_castsi256_ps(words); }

#else  // any other CPU: the compiler's own vectors, four lanes

constexpr int kLanes = 4;
using VecF = float __attribute__((vector_size(16)));
using VecI = int32_t __attribute__((vector_size(16)));

inline VecF zero() { return VecF{0, 0, 0, 0}; }
inline VecF broadcast(float value) { return VecF{value, value, value, value}; }
inline VecF load(const float* from) {
  VecF value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline void store(float* to, VecF value) { std::memcpy(to, &value, sizeof(value)); }
inline VecF add(VecF a, VecF b) { return a + b; }
inline VecF mul(VecF a, VecF b) { return a * b; }
inline VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
inline VecF load_half(const uint16_t* from) {
  return VecF{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]),
              half_to_float(from[3])};
}
inline void store_half(uint16_t* to, VecF value) {
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = float_to_half(value[lane]);
}

inline VecI load_words(const void* from) {
  VecI value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline VecI broadcast_word(int32_t word) { return VecI{word, word, word, word}; }
inline VecF to_float(VecI value) { return __builtin_convertvector(value, VecF); }
inline VecI dot4(VecI acc, VecI a, VecI b) {
  // Codes are below 256 and x at least -128, so every byte can be widened by shifts in its lane.
  using Unsigned = uint32_t __attribute__((vector_size(16)));
  for (int i = 0; i < 4; ++i) {
    const VecI code = (VecI)((Unsigned)a >> 8 * i & 0xFFu);
    const VecI x = (VecI)((Unsigned)b << (24 - 8 * i)) >> 24;
    acc += code * x;
  }
  return acc;
}
constexpr bool kWideProducts = true;

template <int kIndex, int kOffset, int /*kBits*/>
inline VecF byte_to_float(VecI words) {
  using Unsigned = uint32_t __attribute__((vector_size(16)));
  return to_float((VecI)((Unsigned)words >> 8 * kIndex & 0xFFu) - kOffset);
}

struct Bytes {
  uint8_t v __attribute__((vector_size(16)));
};
constexpr int kLineRows = 1;
inline Bytes load_bytes(const uint8_t* from) {
  Bytes value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline Bytes operator&(Bytes a, int mask) { return {a.v & static_cast<uint8_t>(mask)}; }
inline Bytes operator|(Bytes a, Bytes b) { return {a.v | b.v}; }
inline Bytes operator^(Bytes a, int mask) { return {a.v ^ static_cast<uint8_t>(mask)}; }
inline Bytes operator>>(Bytes a, int bits) { return {a.v >> static_cast<uint8_t>(bits)}; }
inline Bytes operator<<(Bytes a, int bits) { return {a.v << static_cast<uint8_t>(bits)}; }
inline Bytes look_up(Bytes codes, const Codebook& table) {
  Bytes result;
  for (int i = 0; i < 16; ++i) result.v[i] = table[codes.v[i]];
  return result;
}
inline Bytes interleave(Bytes a, Bytes b, int half) {
  Bytes result;
  for (int i = 0; i < 8; ++i) {
    result.v[2 * i] = a.v[8 * half + i];
    result.v[2 * i + 1] = b.v[8 * half + i];
  }
  return result;
}
inline Bytes join(Bytes a, Bytes b, int half) {
  Bytes result;
  for (int i = 0; i < 8; ++i) {
    result.v[i] = a.v[8 * half + i];
    result.v[8 + i] = b.v[8 * half + i];
  }
  return result;
}

inline Bytes spread(Bytes a, int quarter) {
  Bytes result;
  for (int i = 0; i < 4; ++i) {
    const uint32_t codes = spread_byte(a.v[4 * quarter + i]);
    std::memcpy(reinterpret_cast<uint8_t*>(&result) + 4 * i, &codes, 4);
  }
  return result;
}
// The vector's elements are bytes, so that a product leaves out by itself what is above the point.
inline Bytes base_3_digits(Bytes a, Bytes powers) {
  const Bytes fraction = {a.v * powers.v};
  const Bytes thirds = {(fraction.v > 85) & 1}, two_thirds = {(fraction.v > 170) & 1};
  return {thirds.v + two_thirds.v};
}
inline Bytes base_3(Bytes a, int digit) {
  return base_3_digits(a, Bytes{} ^ static_cast<int>(power_of_3(digit)));
}
inline Bytes first_digits(const uint8_t* from) {
  Bytes bytes, powers;
  for (int digit = 0; digit < 4; ++digit) {
    std::memcpy(reinterpret_cast<uint8_t*>(&bytes) + 4 * digit, from, 4);
    std::memset(reinterpret_cast<uint8_t*>(&powers) + 4 * digit,
                static_cast<int>(power_of_3(digit)), 4);
  }
  return base_3_digits(bytes, powers);
}

inline Bytes bits_to_16(const uint8_t* bits) {
  uint16_t mask;
  std::memcpy(&mask, bits, sizeof(mask));
  uint8_t bytes[32];
  expand_to_16(mask, bytes);
  return load_bytes(bytes);
}

inline void transpose_words(const Bytes* in, uint8_t* out) {
  for (int place = 0; place < 16; ++place) {
    const int row = place % 4 * 4 + place / 4;  // line_row of kernels/packed.h
    uint8_t bytes[16];
    std::memcpy(bytes, &in[place], 16);
    for (int word = 0; word < 4; ++word) {
      std::memcpy(out + 64 * word + 4 * row, bytes + 4 * word, 4);
    }
  }
}

#endif

#if !defined(__AVX512VNNI__)
inline VecI dot4_word(VecI acc, VecI a, const uint32_t* word) {
  return dot4(acc, a, broadcast_word(static_cast<int32_t>(*word)));
}
#endif

#if !defined(__AVX2__) || defined(__AVX512VNNI__)
inline VecI dot4_signed(VecI acc, VecI, VecI) { return acc; }  // kWideProducts: never called
#endif

inline Bytes choose(bool first, Bytes a, Bytes b) { return first ? a : b; }

constexpr int kRowVectors = 16 / kLanes;

// ---- for formats with a grid (kernels/formats/tables.h)

// kLanes words, which operators of C++ work on.
using VecW = uint32_t __attribute__((vector_size(4 * kLanes)));

inline VecW load_lanes(const uint8_t* from) {
  VecW words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}
inline VecW load_half_lanes(const uint8_t* from) {
  uint16_t halves[kLanes];
  std::memcpy(halves, from, sizeof(halves));
  VecW words;
  for (int r = 0; r < kLanes; ++r) words[r] = halves[r];
  return words;
}
// The entry at each index.
template <class Grid>
inline VecW grid_entry(const Grid& grid, VecW indices) {
#if defined(__AVX512VNNI__)
  const __m512i found = _mm512_i32gather_epi32((__m512i)indices, grid.entries, 2);
  return (VecW)found & 0xFFFFu;
#elif defined(__AVX2__)
  const auto* entries = reinterpret_cast<const int*>(grid.entries);
  return (VecW)_mm256_i32gather_epi32(entries, (__m256i)indices, 2) & 0xFFFFu;
#else
  VecW found;
  for (int r = 0; r < kLanes; ++r) found[r] = grid.entries[indices[r]];
  return found;
#endif
}

}  // namespace TORCH_Q4_NAMESPACE
