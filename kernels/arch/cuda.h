// nvcc, and what NVIDIA's architectures from sm_80 on have.
#pragma once

#include "gpu.h"

// A kernel's thread block, of which `blocks` should fit on a multiprocessor together.
#define TORCH_Q4_BLOCKS(threads, blocks) __launch_bounds__(threads, blocks)

namespace TORCH_Q4_NAMESPACE {

constexpr int kWaveLanes = 32;  // lanes that run in step
constexpr bool kFewRegisters = false;
constexpr bool kLoadsFillRegisters = true;

TORCH_Q4_HOST_DEVICE inline float half_to_float(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
TORCH_Q4_HOST_DEVICE inline uint16_t float_to_half(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

TORCH_Q4_HOST_DEVICE inline uint32_t choose_word(bool first, uint32_t a, uint32_t b) {
  return first ? a : b;
}

TORCH_Q4_DEVICE void schedule_fence() { asm volatile("" ::: "memory"); }
TORCH_Q4_DEVICE int64_t recomputed(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
TORCH_Q4_DEVICE int same_in_wave(int value) { return value; }
TORCH_Q4_DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
TORCH_Q4_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
TORCH_Q4_DEVICE void stop_with_error() { __trap(); }

template <int kA, int kB, int kC, int kD>
TORCH_Q4_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, kA | kB << 4 | kC << 8 | kD << 12);
}
TORCH_Q4_DEVICE uint32_t shift_words(uint32_t low, uint32_t high, uint32_t bits) {
  return __funnelshift_r(low, high, bits);
}
TORCH_Q4_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t over) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(over));
  return result;
}
// A selector has four bits a byte, of which the fourth does not choose among 16: the two halves of
// the table are looked up apart.
TORCH_Q4_DEVICE uint32_t look_up_4(uint32_t codes, const Codebook& table) {
  const uint32_t four = __byte_perm(codes | codes >> 4, 0, 0x4420);
  const uint32_t low = __byte_perm(table.w[0], table.w[1], four & 0x7777);
  const uint32_t high = __byte_perm(table.w[2], table.w[3], four & 0x7777);
  return __byte_perm(low, high, (four >> 1 & 0x4444) | 0x3210);
}
// The compiler's own word for the instruction: __byte_perm masks the selector, and of two copies of
// inline assembly it does not make one.
TORCH_Q4_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __nvvm_prmt(low, high, selector);
}
// Nibbles are selectors as they lie, so that half as many instructions look up all eight of a word:
// what is common to both halves the compiler makes once.
TORCH_Q4_DEVICE uint32_t look_up_nibbles_4(uint32_t word, int half, const Codebook& table) {
  const uint32_t place = word & 0x77777777u, part = (word >> 1 & 0x44444444u) | 0x32103210u;
  const auto of_two_bytes = [&](int shift) {
    const uint32_t low = permute(table.w[0], table.w[1], place >> shift);
    const uint32_t high = permute(table.w[2], table.w[3], place >> shift);
    return permute(low, high, part >> shift);
  };
  return __byte_perm(of_two_bytes(0), of_two_bytes(16), half == 0 ? 0x6420 : 0x7531);
}
TORCH_Q4_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t acc) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), acc);
}

// The byte as the last bits of a float from 2^23 on, and exactly back.
TORCH_Q4_HOST_DEVICE inline float byte_to_float(uint32_t word, int index) {
  return bits_to_float(__byte_perm(word, 0x4B000000u, 0x7440 | index)) - 0x1p23f;
}

// Conversions run at a sixteenth of the rate of other instructions, so a code becomes the leading
// bits of a float's mantissa, over the exponent of 2^kBits. That bias costs nothing, being taken
// off by the multiply-add that scales the code, and is small enough to cost no precision either.
template <int kBits>
constexpr int kCodeBias = kBits < 8 ? 1 << kBits : 0;
template <int kBits>
TORCH_Q4_DEVICE uint32_t prepare_codes(uint32_t word) {
  // The lowest bit of the exponent is the highest one of the byte that holds the code.
  return kBits < 8 ? word << (7 - kBits) | (127 + kBits) % 2 * 0x80808080u : word;
}
template <int kIndex, int kBits>
TORCH_Q4_DEVICE float code_to_float(uint32_t word) {
  if constexpr (kBits < 8) {
    constexpr uint32_t kExponent = static_cast<uint32_t>(127 + kBits) / 2 << 24;
    return bits_to_float(select_bytes<4, 4, kIndex, 7>(word, kExponent));
  } else {
    // A whole byte does not lie beneath the exponent of 2^8: above 2^23, and exactly back.
    return bits_to_float(select_bytes<kIndex, 4, 4, 7>(word, 0x4B000000u)) - 0x1p23f;
  }
}

TORCH_Q4_DEVICE float signed_product(float a, float b) { return a * b; }

template <>
TORCH_Q4_DEVICE uint32_t round_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
TORCH_Q4_DEVICE uint32_t round_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
constexpr bool kHasPairMath<BFloat16> = true;
template <>
TORCH_Q4_DEVICE uint32_t add_pairs<Float16>(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
template <>
TORCH_Q4_DEVICE uint32_t fma_pairs<Float16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
template <>
TORCH_Q4_DEVICE uint32_t fma_pairs<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
template <>
TORCH_Q4_DEVICE uint32_t add_pairs<BFloat16>(uint32_t a, uint32_t b) {
  return fma_pairs<BFloat16>(a, 0x3F803F80u, b);  // sm_80 has no addition by itself
}

}  // namespace TORCH_Q4_NAMESPACE

#include "tile_mma.h"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "hopper.h"
#endif
