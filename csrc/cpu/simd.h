// The vector operations that the CPU kernels are written in, for whichever instruction set this
// translation unit is compiled for. Everything above this file is the same for all of them.
//
// Include only from kernels_impl.h: its includer puts all of this into a namespace of its own, so
// that the linker can never merge an AVX-512 copy of an inline function into baseline code.
#pragma once

#include <cstdint>

#include "../../kernels/portability.h"
#include "kernels.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace TORCH_Q4_NAMESPACE {

using torch_q4::cpu::kTileElems;

#if defined(__AVX512VNNI__)

constexpr int kLanes = 16;
constexpr int kMicroRows = 4, kMicroColumns = 6;  // 24 accumulators of 32 registers
using VecF = __m512;
inline VecF zero() { return _mm512_setzero_ps(); }
inline VecF broadcast(float value) { return _mm512_set1_ps(value); }
inline VecF load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, VecF value) { _mm512_storeu_ps(to, value); }
inline VecF add(VecF a, VecF b) { return _mm512_add_ps(a, b); }
inline VecF mul(VecF a, VecF b) { return _mm512_mul_ps(a, b); }
inline VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce(VecF value) { return _mm512_reduce_add_ps(value); }

// 16 codes less their offset, as floats: exact, since both are small integers.
template <int kOffset>
inline VecF load_codes(const uint8_t* from) {
  __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if constexpr (kOffset != 0) wide = _mm512_sub_epi32(wide, _mm512_set1_epi32(kOffset));
  return _mm512_cvtepi32_ps(wide);
}

inline VecF load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store_half(uint16_t* to, VecF value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// kGroups floats, one per group of a tile, the other lanes zero.
template <int kGroups>
inline VecF load_groups(const float* from) {
  if constexpr (kGroups == 16) return load(from);
  return _mm512_zextps256_ps512(_mm256_loadu_ps(from));
}

// acc + sum over the tile's groups of weight_scale * x_scale * sum(code * x), codes unsigned, x
// signed. x has a scale per 32 elements, the weights one per kGroupElems. vpdpbusd sums four
// products a lane, so a group of 16 is four lanes and one of 32 is eight.
template <int kGroupElems>
inline VecF dot_tile(const uint8_t* codes, const int8_t* x, const float* weight_scales,
                     const float* x_scales, VecF acc) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 x_scale = load_groups<8>(x_scales);
  if constexpr (kGroupElems == 16) {
    x_scale = _mm512_permutexvar_ps(_mm512_srli_epi32(lane, 1), x_scale);
  }
  const __m512 scales =
      _mm512_mul_ps(load_groups<kTileElems / kGroupElems>(weight_scales), x_scale);
  const __m512i group = _mm512_srli_epi32(lane, kGroupElems == 16 ? 2 : 3);
#pragma GCC unroll 4
  for (int chunk = 0; chunk < kTileElems / 64; ++chunk) {
    const __m512i sums =
        _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(codes + 64 * chunk),
                            _mm512_loadu_si512(x + 64 * chunk));
    const __m512i index = _mm512_add_epi32(group, _mm512_set1_epi32(chunk * (64 / kGroupElems)));
    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_permutexvar_ps(index, scales), acc);
  }
  return acc;
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kMicroRows = 4, kMicroColumns = 3;  // 12 accumulators of 16 registers
using VecF = __m256;
inline VecF zero() { return _mm256_setzero_ps(); }
inline VecF broadcast(float value) { return _mm256_set1_ps(value); }
inline VecF load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, VecF value) { _mm256_storeu_ps(to, value); }
inline VecF add(VecF a, VecF b) { return _mm256_add_ps(a, b); }
inline VecF mul(VecF a, VecF b) { return _mm256_mul_ps(a, b); }
inline VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce(VecF value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

template <int kOffset>
inline VecF load_codes(const uint8_t* from) {
  __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  if constexpr (kOffset != 0) wide = _mm256_sub_epi32(wide, _mm256_set1_epi32(kOffset));
  return _mm256_cvtepi32_ps(wide);
}

inline VecF load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store_half(uint16_t* to, VecF value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

// kGroups floats, one per group of a tile; this many lanes divide both counts.
template <int kGroups>
inline VecF load_groups(const float* from) {
  return load(from);
}

template <int kGroupElems>
inline VecF dot_tile(const uint8_t* codes, const int8_t* x, const float* weight_scales,
                     const float* x_scales, VecF acc) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int chunk = 0; chunk < kTileElems / 32; ++chunk) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * chunk));
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * chunk));
    // vpmaddubsw saturates its 16-bit pair sums, which codes up to 255 would reach: take the
    // codes' low seven bits first, then the top bit, which is worth 128 where it is set.
    const __m256i low = _mm256_and_si256(code, _mm256_set1_epi8(127));
    __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(low, value), ones);
    if constexpr (kGroupElems == 32) {
      const __m256i top = _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), code), value);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), top);
      sums = _mm256_add_epi32(sums, _mm256_slli_epi32(_mm256_madd_epi16(pairs, ones), 7));
    }
    __m256 scale = _mm256_broadcast_ss(x_scales + chunk);
    if constexpr (kGroupElems == 32) {
      scale = _mm256_mul_ps(scale, _mm256_broadcast_ss(weight_scales + chunk));
    } else {
      scale = _mm256_mul_ps(scale, _mm256_set_m128(_mm_broadcast_ss(weight_scales + 2 * chunk + 1),
                                                   _mm_broadcast_ss(weight_scales + 2 * chunk)));
    }
    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, acc);
  }
  return acc;
}

#else  // any other CPU: the compiler's own vectors, four lanes

constexpr int kLanes = 4;
constexpr int kMicroRows = 2, kMicroColumns = 4;
using VecF = float __attribute__((vector_size(16)));
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
inline float reduce(VecF value) { return (value[0] + value[2]) + (value[1] + value[3]); }

template <int kOffset>
inline VecF load_codes(const uint8_t* from) {
  return VecF{static_cast<float>(from[0] - kOffset), static_cast<float>(from[1] - kOffset),
              static_cast<float>(from[2] - kOffset), static_cast<float>(from[3] - kOffset)};
}

inline VecF load_half(const uint16_t* from) {
  return VecF{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]),
              half_to_float(from[3])};
}
inline void store_half(uint16_t* to, VecF value) {
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = float_to_half(value[lane]);
}

template <int kGroups>
inline VecF load_groups(const float* from) {
  return load(from);
}

template <int kGroupElems>
inline VecF dot_tile(const uint8_t* codes, const int8_t* x, const float* weight_scales,
                     const float* x_scales, VecF acc) {
  for (int group = 0; group < kTileElems / kGroupElems; ++group) {
    int32_t sum = 0;
    for (int i = 0; i < kGroupElems; ++i) {
      sum += codes[kGroupElems * group + i] * x[kGroupElems * group + i];
    }
    const float scale = weight_scales[group] * x_scales[group * kGroupElems / 32];
    acc[group % kLanes] += scale * static_cast<float>(sum);
  }
  return acc;
}

#endif

}  // namespace TORCH_Q4_NAMESPACE
