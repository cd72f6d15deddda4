// hipcc, and what AMD's architectures have: __GFX9__ is GCN and CDNA, __GFX10__ to __GFX12__ RDNA.
// Without __AMDGCN__ tests/device/emulate.py compiles it for a CPU.
#pragma once

#include <hip/hip_runtime.h>

#include "gpu.h"

// A kernel's thread block. The second bound of HIP means something else than NVIDIA's, and AMD's
// compiler needs none.
#define TORCH_Q4_BLOCKS(threads, blocks) __launch_bounds__(threads)

// A lambda of device code that must not become a function of its own.
#define TORCH_Q4_INLINE_LAMBDA __attribute__((always_inline))

namespace TORCH_Q4_NAMESPACE {

// Lanes that run in step.
#if defined(__GFX9__)
constexpr int kWaveLanes = 64;
#else
constexpr int kWaveLanes = 32;
#endif

// Of gfx9, the older ones have half the registers: there a thread that holds a whole part's codes
// while it multiplies leaves too little room for other waves.
#if defined(__gfx906__) || defined(__gfx908__)
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// Whether a load of one or two bytes has a register of 32 bits to itself. Where two of them may
// share one, the compiler lets the second wait for the first.
#if defined(__GFX11__) || defined(__GFX12__)
constexpr bool kLoadsFillRegisters = false;
#else
constexpr bool kLoadsFillRegisters = true;
#endif

TORCH_Q4_HOST_DEVICE inline float half_to_float(uint16_t half) {
  return static_cast<float>(__builtin_bit_cast(_Float16, half));
}
TORCH_Q4_HOST_DEVICE inline uint16_t float_to_half(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}
TORCH_Q4_HOST_DEVICE inline float byte_to_float(uint32_t word, int index) {
  return static_cast<float>(word >> 8 * index & 0xFFu);
}

TORCH_Q4_HOST_DEVICE inline uint32_t choose_word(bool first, uint32_t a, uint32_t b) {
  const uint32_t second = first ? 0 : ~0u;
  return (a & ~second) | (b & second);
}

TORCH_Q4_DEVICE void schedule_fence() { __builtin_amdgcn_sched_barrier(0); }
TORCH_Q4_DEVICE int64_t recomputed(int64_t value) {
#if defined(__AMDGCN__)
  asm volatile("" : "+s"(value));
#endif
  return value;
}
TORCH_Q4_DEVICE int same_in_wave(int value) { return __builtin_amdgcn_readfirstlane(value); }
// Kernels do not overlap.
TORCH_Q4_DEVICE void let_next_begin() {}
TORCH_Q4_DEVICE void wait_for_previous() {}
TORCH_Q4_DEVICE void stop_with_error() { __builtin_trap(); }

template <int kA, int kB, int kC, int kD>
TORCH_Q4_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high) {
  return __builtin_amdgcn_perm(high, low, kA | kB << 8 | kC << 16 | kD << 24);
}
TORCH_Q4_DEVICE uint32_t shift_words(uint32_t low, uint32_t high, uint32_t bits) {
  return __builtin_amdgcn_alignbit(high, low, bits);
}
TORCH_Q4_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t over) {
  return (word & mask) | over;
}
TORCH_Q4_DEVICE uint32_t look_up_4(uint32_t codes, const Codebook& table) {
  const uint32_t place = codes & 0x07070707u;
  const uint32_t low = __builtin_amdgcn_perm(table.w[1], table.w[0], place);
  const uint32_t high = __builtin_amdgcn_perm(table.w[3], table.w[2], place);
  return __builtin_amdgcn_perm(high, low, (codes >> 1 & 0x04040404u) | 0x03020100u);
}
TORCH_Q4_DEVICE uint32_t look_up_nibbles_4(uint32_t word, int half, const Codebook& table) {
  return look_up_4(word >> 4 * half & 0x0F0F0F0Fu, table);
}
TORCH_Q4_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t acc) {
#if defined(__GFX11__) || defined(__GFX12__)
  return __builtin_amdgcn_sudot4(true, static_cast<int>(a), true, static_cast<int>(b), acc, false);
#else
  return __builtin_amdgcn_sdot4(static_cast<int>(a), static_cast<int>(b), acc, false);
#endif
}

// A byte is converted in one instruction.
template <int kBits>
constexpr int kCodeBias = 0;
template <int kBits>
TORCH_Q4_DEVICE uint32_t prepare_codes(uint32_t word) {
  // Otherwise LLVM takes each byte out of what the mask before was put on, an instruction more.
#if defined(__AMDGCN__)
  asm("" : "+v"(word));
#endif
  return word;
}
template <int kIndex, int kBits>
TORCH_Q4_DEVICE float code_to_float(uint32_t word) {
  return static_cast<float>(word >> 8 * kIndex & 0xFFu);
}

// LLVM makes one instruction of the product and its rounding that adds +0 on the way, and so turns
// -0 into +0.
TORCH_Q4_DEVICE float signed_product(float a, float b) {
  float product = a * b;
#if defined(__AMDGCN__)
  asm("" : "+v"(product));
#endif
  return product;
}

// Bits of which the upper half is the value rounded to nearest even, as a bfloat16. The mantissa's
// carry runs into the exponent as it should, but a NaN can become anything.
TORCH_Q4_DEVICE uint32_t round_to_upper_half(float value) {
  const uint32_t bits = float_to_bits(value);
  return bits + 0x7FFFu + (bits >> 16 & 1u);
}

template <>
TORCH_Q4_DEVICE uint32_t round_pair<Float16>(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
template <>
TORCH_Q4_DEVICE uint32_t round_pair<BFloat16>(float low, float high) {
#if defined(__gfx950__)
  using Pair = __bf16 __attribute__((ext_vector_type(2)));
  const Pair pair = {static_cast<__bf16>(low), static_cast<__bf16>(high)};
  return __builtin_bit_cast(uint32_t, pair);
#else
  const auto rounded = [](float value) {
    // A NaN must stay one.
    return value == value ? round_to_upper_half(value) : 0x7FC00000u;
  };
  return select_bytes<2, 3, 6, 7>(rounded(low), rounded(high));
#endif
}

#if !defined(__gfx950__)
// That test would be two instructions of five. Arithmetic hands on a NaN's mantissa; one with only
// its first bit set can be rounded.
template <>
TORCH_Q4_DEVICE float plain_nan<BFloat16>(float value) {
  return value == value ? value : bits_to_float(0x7FC00000u);
}
template <>
TORCH_Q4_DEVICE uint32_t round_plain_pair<BFloat16>(float low, float high) {
  return select_bytes<2, 3, 6, 7>(round_to_upper_half(low), round_to_upper_half(high));
}
#endif

template <>
constexpr bool kHasDot2<Float16> = true;
template <>
TORCH_Q4_DEVICE float dot2<Float16>(uint32_t a, uint32_t b, float acc) {
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_amdgcn_fdot2(__builtin_bit_cast(Pair, a), __builtin_bit_cast(Pair, b), acc,
                                false);
}

#if defined(__gfx950__) || defined(__GFX11__) || defined(__GFX12__)
template <>
constexpr bool kHasDot2<BFloat16> = true;
template <>
TORCH_Q4_DEVICE float dot2<BFloat16>(uint32_t a, uint32_t b, float acc) {
  using Pair = __bf16 __attribute__((ext_vector_type(2)));
  return __builtin_amdgcn_fdot2_f32_bf16(__builtin_bit_cast(Pair, a), __builtin_bit_cast(Pair, b),
                                         acc, false);
}
#endif
#if defined(__GFX11__) || defined(__GFX12__)
template <>
constexpr int kFewestDot2XRows<BFloat16> = 4;
#endif

template <>
TORCH_Q4_DEVICE uint32_t add_pairs<Float16>(uint32_t a, uint32_t b) {
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(uint32_t, __builtin_bit_cast(Pair, a) + __builtin_bit_cast(Pair, b));
}
template <>
TORCH_Q4_DEVICE uint32_t fma_pairs<Float16>(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(
      uint32_t, __builtin_elementwise_fma(__builtin_bit_cast(Pair, a), __builtin_bit_cast(Pair, b),
                                          __builtin_bit_cast(Pair, c)));
}

}  // namespace TORCH_Q4_NAMESPACE

#if defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__) || \
    defined(__gfx9_4_generic__)
#include "tile_mfma.h"
#elif defined(__GFX11__) || defined(__GFX12__)
#include "tile_wmma.h"
#else
#include "tile_dot2.h"
#endif
