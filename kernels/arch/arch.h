// What everything under kernels/ is written against: names that mean the same everywhere. It asks
// which compiler reads it, a host C++ compiler, hipcc or nvcc; one header for each then gives the
// names their form.
//
//   host.h      a CPU
//   gpu.h       what both GPU compilers understand, and the names that hip.h and cuda.h define
//   tile_*.h    the matrix tile of gpu.h, by mfma, wmma or mma instructions, or by none
//   hopper.h    what NVIDIA's sm_90a alone has
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__HIPCC__)
// AMD's compiler leaves some calls of a large kernel, and then keeps in memory what they refer to.
#define TORCH_Q4_HOST_DEVICE __host__ __device__ __attribute__((always_inline))
#elif defined(__CUDACC__)
#define TORCH_Q4_HOST_DEVICE __host__ __device__
#else
#define TORCH_Q4_HOST_DEVICE
#endif

// The CPU kernels compile these headers several times, under different instruction sets. Each time
// in a namespace of its own, or the linker would merge the copies of an inline function and hand
// AVX-512 code to a CPU without it.
#ifndef TORCH_Q4_NAMESPACE
#define TORCH_Q4_NAMESPACE torch_q4
#endif

namespace TORCH_Q4_NAMESPACE {

TORCH_Q4_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TORCH_Q4_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// IEEE binary16 bits to float32; exact for every input, subnormals included.
TORCH_Q4_HOST_DEVICE inline float half_to_float(uint16_t half);

// float32 to IEEE binary16 bits, rounding to nearest even, overflowing to infinity.
TORCH_Q4_HOST_DEVICE inline uint16_t float_to_half(float value);

// a or b. AMD's compiler would branch, and keep two versions of what follows; of two words in
// memory it would choose the address.
TORCH_Q4_HOST_DEVICE inline uint32_t choose_word(bool first, uint32_t a, uint32_t b);

// Byte i is 16 where bit i of four bits is set, else 0: the factor puts copies of the four at bits
// 0, 7, 14 and 21, which brings bit i to bit 8 i.
TORCH_Q4_HOST_DEVICE inline uint32_t expand_4_bits(uint32_t bits) {
  return (bits * 0x00204081u & 0x01010101u) << 4;
}
// Byte i of out[32] is 16 where bit i of `bits` is set, else 0.
TORCH_Q4_HOST_DEVICE inline void expand_to_16(uint32_t bits, uint8_t* out);

// Byte i is bits 2 i and 2 i + 1 of a byte: of its copies at bits 0, 6, 12 and 18 the two bits that
// are wanted lie where one of them alone has any.
TORCH_Q4_HOST_DEVICE inline uint32_t spread_byte(uint32_t byte) {
  const uint32_t twice = byte | byte << 6;
  return (twice | twice << 12) & 0x03030303u;
}

// 3 to the power of 0 to 4.
TORCH_Q4_HOST_DEVICE constexpr uint32_t power_of_3(int exponent) {
  return exponent < 2 ? (exponent == 0 ? 1 : 3) : exponent == 2 ? 9 : exponent == 3 ? 27 : 81;
}
// A byte is a fraction of 256 with five digits in base 3. Times `power`, that of 3 which is the
// number of a digit, and without what is above the point, the digit is the first; times 3, it is
// what is above the point. Here that is done to each of a word's four bytes, two by two.
TORCH_Q4_HOST_DEVICE inline uint32_t base_3_word(uint32_t bytes, uint32_t power) {
  const uint32_t even = (bytes & 0x00FF00FFu) * power & 0x00FF00FFu;
  const uint32_t odd = (bytes >> 8 & 0x00FF00FFu) * power & 0x00FF00FFu;
  return (even * 3 >> 8 & 0x00030003u) | (odd * 3 & 0x03000300u);
}

// A table of 16 bytes, the entries of a codebook, four in a word, the first lowest.
struct Codebook {
  uint32_t w[4];

  TORCH_Q4_HOST_DEVICE constexpr uint8_t operator[](int index) const {
    return static_cast<uint8_t>(w[index / 4] >> index % 4 * 8);
  }
};
// That of `values`, each plus `offset`: what unpacking takes for a code, which is never negative.
TORCH_Q4_HOST_DEVICE constexpr Codebook make_codebook(const int (&values)[16], int offset) {
  Codebook table = {};
  for (int i = 0; i < 16; ++i) {
    table.w[i / 4] |= static_cast<uint32_t>((values[i] + offset) & 0xFF) << i % 4 * 8;
  }
  return table;
}

// Byte `index` of a word as a number.
TORCH_Q4_HOST_DEVICE inline float byte_to_float(uint32_t word, int index);

}  // namespace TORCH_Q4_NAMESPACE

#if defined(__HIPCC__)
#include "hip.h"
#elif defined(__CUDACC__)
#include "cuda.h"
#else
#include "host.h"
#endif
