// The only file under kernels/ that knows which compiler reads it, a host C++ compiler, hipcc or
// nvcc, and for which GPU. Everything else is written once against the names below.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
#endif

#if defined(__HIPCC__) || defined(__CUDACC__)
#define TORCH_Q4_HOST_DEVICE __host__ __device__
#define TORCH_Q4_GPU_COMPILER 1
#else
#define TORCH_Q4_HOST_DEVICE
#endif

#if defined(__HIP_DEVICE_COMPILE__) || defined(__CUDA_ARCH__)
#define TORCH_Q4_DEVICE_CODE 1
#endif

#if defined(__F16C__) && !defined(TORCH_Q4_GPU_COMPILER)
#define TORCH_Q4_HOST_AVX2 1  // every CPU with AVX2 has F16C
#include <immintrin.h>
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
TORCH_Q4_HOST_DEVICE inline float half_to_float(uint16_t half) {
#if defined(TORCH_Q4_HOST_AVX2)
  return _cvtsh_ss(half);
#elif defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#elif defined(__HIP_DEVICE_COMPILE__)
  return static_cast<float>(__builtin_bit_cast(_Float16, half));
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

// float32 to IEEE binary16 bits, rounding to nearest even, overflowing to infinity.
TORCH_Q4_HOST_DEVICE inline uint16_t float_to_half(float value) {
#if defined(TORCH_Q4_HOST_AVX2)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#elif defined(__HIP_DEVICE_COMPILE__)
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
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

// Byte i of out[32] is 16 where bit i of `bits` is set, else 0.
TORCH_Q4_HOST_DEVICE inline void expand_to_16(uint32_t bits, uint8_t* out) {
#if defined(TORCH_Q4_HOST_AVX2) && defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_maskz_set1_epi8(bits, 16));
#elif defined(TORCH_Q4_HOST_AVX2)
  // Byte i of the vector gets the byte of `bits` that holds bit i, and tests that bit.
  const __m256i byte_of = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                             0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_and_si256(set, _mm256_set1_epi8(16)));
#else
  // Four bits at a time: the factor puts copies of them at bits 0, 7, 14 and 21, which brings bit
  // i of the four to bit 8 i.
  for (int i = 0; i < 8; ++i) {
    const uint32_t four = ((bits >> 4 * i & 0xFu) * 0x00204081u & 0x01010101u) << 4;
    std::memcpy(out + 4 * i, &four, 4);
  }
#endif
}

// Byte `index` of a word as a number.
TORCH_Q4_HOST_DEVICE inline float byte_to_float(uint32_t word, int index) {
#if defined(__CUDA_ARCH__)
  // The byte as the last bits of a float from 2^23 on, and exactly back.
  return bits_to_float(__byte_perm(word, 0x4B000000u, 0x7440 | index)) - 0x1p23f;
#else
  return static_cast<float>(word >> 8 * index & 0xFFu);
#endif
}

#ifdef TORCH_Q4_GPU_COMPILER

// ---- on a GPU
// ------------------------------------------------------------------------------------

#define TORCH_Q4_DEVICE __device__ __forceinline__

// Of gfx9, the older ones have half the registers: there a thread that holds a whole part's codes
// while it multiplies leaves too little room for other waves.
#if defined(__gfx906__) || defined(__gfx908__)
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// A kernel's thread block, of which `blocks` should fit on an NVIDIA multiprocessor together. HIP's
// second bound means something else, and AMD's compiler needs none.
#if defined(__CUDACC__)
#define TORCH_Q4_BLOCKS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#define TORCH_Q4_BLOCKS(threads, blocks) __launch_bounds__(threads)
#endif

// Keeps the compiler from moving loads across: it would rather have all that a loop's body reads in
// registers at once, at the cost of the number of waves that fit beside each other.
TORCH_Q4_DEVICE void schedule_fence() {
#if defined(__HIP_DEVICE_COMPILE__)
  __builtin_amdgcn_sched_barrier(0);
#elif defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// The value, of which the compiler no longer knows that it is the same in every turn of a loop.
// Otherwise it keeps what follows from it, such as the addresses of many columns, in registers.
TORCH_Q4_DEVICE int64_t recomputed(int64_t value) {
#if defined(__HIP_DEVICE_COMPILE__)
  asm volatile("" : "+s"(value));
#elif defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

// Of two kernels of which the second was launched to overlap with the first (Block::overlaps in
// csrc/gpu/runtime.h): once all blocks of the first have said so the second one's may begin, which
// then wait for the first to end before they read what it wrote.
TORCH_Q4_DEVICE void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
TORCH_Q4_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The element types of activations, as tags: their values are handled as bits, two in a word.
struct Float32 {};
struct Float16 {};
struct BFloat16 {};

// Lanes that run in step: 64 on gfx9, 32 on later AMD architectures and on NVIDIA.
#if defined(__GFX9__)
constexpr int kWaveLanes = 64;
#else
constexpr int kWaveLanes = 32;
#endif

// The value, which the caller knows to be the same in all lanes of a wave: AMD's compiler then
// keeps it, and addresses that follow from it, in scalar registers.
TORCH_Q4_DEVICE int same_in_wave(int value) {
#if defined(__HIP_DEVICE_COMPILE__)
  return __builtin_amdgcn_readfirstlane(value);
#else
  return value;
#endif
}

// A product that is rounded to float16 next. LLVM makes one instruction of the two that adds +0 on
// the way, and so turns -0 into +0.
TORCH_Q4_DEVICE float signed_product(float a, float b) {
  float product = a * b;
#if defined(__HIP_DEVICE_COMPILE__)
  asm("" : "+v"(product));
#endif
  return product;
}

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct alignas(8) Words2 {
  uint32_t w[2];
};

// Bytes kA, kB, kC and kD of the eight bytes of low (0 to 3) and high (4 to 7), lowest first.
template <int kA, int kB, int kC, int kD>
TORCH_Q4_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high) {
#if defined(__HIP_DEVICE_COMPILE__)
  return __builtin_amdgcn_perm(high, low, kA | kB << 8 | kC << 16 | kD << 24);
#elif defined(__CUDA_ARCH__)
  return __byte_perm(low, high, kA | kB << 4 | kC << 8 | kD << 12);
#else
  return 0;
#endif
}

// The low word of high:low >> bits, for bits below 32.
TORCH_Q4_DEVICE uint32_t shift_words(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__HIP_DEVICE_COMPILE__)
  return __builtin_amdgcn_alignbit(high, low, bits);
#elif defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return 0;
#endif
}

// word & mask | over, in one instruction. (nvcc makes two of it where both are constants.)
TORCH_Q4_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t over) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(over));
  return result;
#else
  return (word & mask) | over;
#endif
}

// acc + sum of the products of four signed bytes.
TORCH_Q4_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t acc) {
#if defined(__GFX11__) || defined(__GFX12__)
  return __builtin_amdgcn_sudot4(true, static_cast<int>(a), true, static_cast<int>(b), acc, false);
#elif defined(__HIP_DEVICE_COMPILE__)
  return __builtin_amdgcn_sdot4(static_cast<int>(a), static_cast<int>(b), acc, false);
#elif defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int>(a), static_cast<int>(b), acc);
#else
  return acc;
#endif
}

// code_to_float<kIndex, kBits>(prepare_codes<kBits>(word)) is kCodeBias<kBits> + byte kIndex of the
// word, a code of kBits bits. AMD converts a byte in one instruction; NVIDIA's conversions run at a
// sixteenth of the rate of its other instructions, so there the code becomes the leading bits of a
// float's mantissa, over the exponent of 2^kBits. That bias costs nothing, being taken off by the
// multiply-add that scales the code, and is small enough to cost no precision either.
#if defined(__HIP_DEVICE_COMPILE__)
template <int kBits>
constexpr int kCodeBias = 0;
template <int kBits>
TORCH_Q4_DEVICE uint32_t prepare_codes(uint32_t word) {
  // Otherwise LLVM takes each byte out of what the mask before was put on, an instruction more.
  asm("" : "+v"(word));
  return word;
}
template <int kIndex, int kBits>
TORCH_Q4_DEVICE float code_to_float(uint32_t word) {
  return static_cast<float>(word >> 8 * kIndex & 0xFFu);
}
#else
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
#endif

// Bits of which the upper half is the value rounded to nearest even, as a bfloat16. The mantissa's
// carry runs into the exponent as it should, but a NaN can become anything.
TORCH_Q4_DEVICE uint32_t round_to_upper_half(float value) {
  const uint32_t bits = float_to_bits(value);
  return bits + 0x7FFFu + (bits >> 16 & 1u);
}

// Two floats rounded to nearest even, the first in the low half.
template <class T>
TORCH_Q4_DEVICE uint32_t round_pair(float low, float high);

template <>
TORCH_Q4_DEVICE uint32_t round_pair<Float16>(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#endif
}

template <>
TORCH_Q4_DEVICE uint32_t round_pair<BFloat16>(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#elif defined(__gfx950__)
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

// The same for many values that follow from a few: those went through plain_nan<T>, and what
// arithmetic makes of them needs no test of its own. On most AMD architectures that test would be
// two instructions of five.
template <class T>
TORCH_Q4_DEVICE float plain_nan(float value) {
  return value;
}
template <class T>
TORCH_Q4_DEVICE uint32_t round_plain_pair(float low, float high) {
  return round_pair<T>(low, high);
}
#if defined(__HIP_DEVICE_COMPILE__) && !defined(__gfx950__)
// Arithmetic hands on a NaN's mantissa; one with only its first bit set can be rounded.
template <>
TORCH_Q4_DEVICE float plain_nan<BFloat16>(float value) {
  return value == value ? value : bits_to_float(0x7FC00000u);
}
template <>
TORCH_Q4_DEVICE uint32_t round_plain_pair<BFloat16>(float low, float high) {
  return select_bytes<2, 3, 6, 7>(round_to_upper_half(low), round_to_upper_half(high));
}
#endif

template <class T>
TORCH_Q4_DEVICE float low_of_pair(uint32_t pair);
template <class T>
TORCH_Q4_DEVICE float high_of_pair(uint32_t pair);

template <>
TORCH_Q4_DEVICE float low_of_pair<Float16>(uint32_t pair) {
  return half_to_float(static_cast<uint16_t>(pair));
}
template <>
TORCH_Q4_DEVICE float high_of_pair<Float16>(uint32_t pair) {
  return half_to_float(static_cast<uint16_t>(pair >> 16));
}
template <>
TORCH_Q4_DEVICE float low_of_pair<BFloat16>(uint32_t pair) {
  return bits_to_float(pair << 16);
}
template <>
TORCH_Q4_DEVICE float high_of_pair<BFloat16>(uint32_t pair) {
  return bits_to_float(pair & 0xFFFF0000u);
}

// From how many columns on weights are worth rounding for dot2<T>, where they are not in T anyway.
template <class T>
constexpr int kFewestDot2Columns = 1;
#if defined(__GFX11__) || defined(__GFX12__)
template <>
constexpr int kFewestDot2Columns<BFloat16> = 4;
#endif

// Whether dot2<T> is one instruction: exact products of two pairs, added up in float32.
template <class T>
constexpr bool kHasDot2 = false;
#if defined(__HIP_DEVICE_COMPILE__)
template <>
constexpr bool kHasDot2<Float16> = true;
#endif
#if defined(__gfx950__) || defined(__GFX11__) || defined(__GFX12__)
#define TORCH_Q4_DOT2_BF16 1
template <>
constexpr bool kHasDot2<BFloat16> = true;
#endif

template <class T>
TORCH_Q4_DEVICE float dot2(uint32_t a, uint32_t b, float acc) {
  acc = fmaf(low_of_pair<T>(a), low_of_pair<T>(b), acc);
  return fmaf(high_of_pair<T>(a), high_of_pair<T>(b), acc);
}
#if defined(__HIP_DEVICE_COMPILE__)
template <>
TORCH_Q4_DEVICE float dot2<Float16>(uint32_t a, uint32_t b, float acc) {
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_amdgcn_fdot2(__builtin_bit_cast(Pair, a), __builtin_bit_cast(Pair, b), acc,
                                false);
}
#endif
#if defined(TORCH_Q4_DOT2_BF16)
template <>
TORCH_Q4_DEVICE float dot2<BFloat16>(uint32_t a, uint32_t b, float acc) {
  using Pair = __bf16 __attribute__((ext_vector_type(2)));
  return __builtin_amdgcn_fdot2_f32_bf16(__builtin_bit_cast(Pair, a), __builtin_bit_cast(Pair, b),
                                         acc, false);
}
#endif

// Whether the GPU multiplies and adds two T at a time, and those operations.
template <class T>
constexpr bool kHasPairMath = false;
template <>
constexpr bool kHasPairMath<Float16> = true;
#if !defined(__HIP_DEVICE_COMPILE__)
template <>
constexpr bool kHasPairMath<BFloat16> = true;
#endif

template <class T>
TORCH_Q4_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b);
template <class T>
TORCH_Q4_DEVICE uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c);

template <>
TORCH_Q4_DEVICE uint32_t add_pairs<Float16>(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#elif defined(__HIP_DEVICE_COMPILE__)
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(uint32_t, __builtin_bit_cast(Pair, a) + __builtin_bit_cast(Pair, b));
#else
  return a + b;
#endif
}
template <>
TORCH_Q4_DEVICE uint32_t fma_pairs<Float16>(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
#elif defined(__HIP_DEVICE_COMPILE__)
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(
      uint32_t, __builtin_elementwise_fma(__builtin_bit_cast(Pair, a), __builtin_bit_cast(Pair, b),
                                          __builtin_bit_cast(Pair, c)));
#else
  return a + b + c;
#endif
}
#if defined(__CUDA_ARCH__)
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
#endif

// Ends the kernel with an error that the next call of the driver reports.
TORCH_Q4_DEVICE void stop_with_error() {
#if defined(__CUDA_ARCH__)
  __trap();
#elif defined(__HIP_DEVICE_COMPILE__)
  __builtin_trap();
#endif
}

// ---- the matrix tile
// -----------------------------------------------------------------------------
//
// A wave multiplies 16 rows of W with 16 columns, rows of x, over elements of k that it takes in
// portions: 16 elements, eight words of two, at a time of each of its lanes. Lanes with the same
// row and different k_lane hold different portions; a lane of W and one of x that meet in a product
// hold the same. Since every matrix instruction adds up all of its k, which of them stands where
// inside of it does not matter, as long as W and x agree: so all take the words in their order.
//
//   kRowSlots      rows of W whose portions one lane holds, those at place(lane, 0 ...)
//   kColumnSlots   columns of x that one lane holds, column(lane, 0 ...)
//   kKLanes        lanes that hold different portions of the same row
//   kSums          sums that a lane keeps for each column slot; sum r of slot c is that of the row
//                  at sum_place(lane, r) and column sum_column(lane, c, r)
//   kPartialSums   whether the sums of the k_lanes have still to be added up
//   kMaxTiles      tiles of 16 columns for which one wave may keep its sums
//   multiply       adds the products of a portion
#if defined(__CUDA_ARCH__) || !defined(TORCH_Q4_DEVICE_CODE)

// mma.sync.m16n8k16 twice. PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type":
// with g = lane / 4 and t = lane % 4, A's registers hold rows g, g + 8, g, g + 8, the first two for
// k = 2 t, 2 t + 1, the others for k = 2 t + 8, 2 t + 9; B's two registers the same k of column g;
// C's row g, columns 2 t, 2 t + 1, then the same of row g + 8.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 2, kColumnSlots = 2, kKLanes = 4, kSums = 4, kMaxTiles = 4;
  static constexpr bool kPartialSums = false;

  TORCH_Q4_DEVICE static int place(int lane, int slot) { return lane / 4 + 8 * slot; }
  TORCH_Q4_DEVICE static int column(int lane, int slot) { return lane / 4 + 8 * slot; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane % 4; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int sum) { return lane / 4 + sum / 2 * 8; }
  TORCH_Q4_DEVICE static int sum_column(int lane, int slot, int sum) {
    return 8 * slot + lane % 4 * 2 + sum % 2;
  }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[2][8], const uint32_t (&x)[8],
                                       float (&sums)[4]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      step(w[0][i], w[1][i], w[0][i + 1], w[1][i + 1], x[i], x[i + 1], sums);
    }
  }

 private:
  TORCH_Q4_DEVICE static void step(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1, float (&c)[4]);
};

#define TORCH_Q4_MMA(T, type)                                                            \
  template <>                                                                            \
  TORCH_Q4_DEVICE void Tile<T>::step(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                     uint32_t b0, uint32_t b1, float (&c)[4]) {          \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                           \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                         \
  }
TORCH_Q4_MMA(Float16, "f16")
TORCH_Q4_MMA(BFloat16, "bf16")
#undef TORCH_Q4_MMA

#elif defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__) || \
    defined(__gfx9_4_generic__)

// v_mfma_f32_16x16x16: AMD's CDNA ISA documents ("Matrix Arithmetic Instructions") give, for one
// block of 16x16, A[lane % 16][4 (lane / 16) + i] and B[4 (lane / 16) + i][lane % 16] in the four
// halves i, and D[4 (lane / 16) + r][lane % 16] in register r. The variants over 8 and 32 elements
// of k have two and eight of them instead of four, and the same D.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 1, kColumnSlots = 1, kKLanes = 4, kSums = 4, kMaxTiles = 4;
  static constexpr bool kPartialSums = false;

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int column(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane / 16; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int sum) { return lane / 16 * 4 + sum; }
  TORCH_Q4_DEVICE static int sum_column(int lane, int, int) { return lane % 16; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], const uint32_t (&x)[8],
                                       float (&sums)[4]) {
    Sums c = {sums[0], sums[1], sums[2], sums[3]};
    steps(w[0], x, c);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = c[i];
  }

 private:
  using Sums = float __attribute__((ext_vector_type(4)));
  TORCH_Q4_DEVICE static void steps(const uint32_t (&w)[8], const uint32_t (&x)[8], Sums& c);

  template <class Vector>
  TORCH_Q4_DEVICE static Vector words(const uint32_t* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }
};

template <>
TORCH_Q4_DEVICE void Tile<Float16>::steps(const uint32_t (&w)[8], const uint32_t (&x)[8], Sums& c) {
#if defined(__gfx950__)
  using Eight = _Float16 __attribute__((ext_vector_type(8)));
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    c = __builtin_amdgcn_mfma_f32_16x16x32_f16(words<Eight>(w + i), words<Eight>(x + i), c, 0, 0,
                                               0);
  }
#else
  using Four = _Float16 __attribute__((ext_vector_type(4)));
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    c = __builtin_amdgcn_mfma_f32_16x16x16f16(words<Four>(w + i), words<Four>(x + i), c, 0, 0, 0);
  }
#endif
}

template <>
TORCH_Q4_DEVICE void Tile<BFloat16>::steps(const uint32_t (&w)[8], const uint32_t (&x)[8],
                                           Sums& c) {
#if defined(__gfx950__)
  using Eight = __bf16 __attribute__((ext_vector_type(8)));
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    c = __builtin_amdgcn_mfma_f32_16x16x32_bf16(words<Eight>(w + i), words<Eight>(x + i), c, 0, 0,
                                                0);
  }
#elif defined(__gfx908__)
  using Two = short __attribute__((ext_vector_type(2)));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    c = __builtin_amdgcn_mfma_f32_16x16x8bf16(words<Two>(w + i), words<Two>(x + i), c, 0, 0, 0);
  }
#else
  using Four = short __attribute__((ext_vector_type(4)));
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(words<Four>(w + i), words<Four>(x + i), c, 0, 0,
                                                  0);
  }
#endif
}

#elif defined(__GFX11__) || defined(__GFX12__)

// v_wmma_f32_16x16x16 in wave32. RDNA3's ISA document ("Wave Matrix Multiply Accumulate") gives a
// lane of A a whole row, lane % 16, with all 16 elements of k, and the upper 16 lanes repeat the
// lower ones; B is the same with columns, and register r of D holds row 2 r + lane / 16 of column
// lane % 16. RDNA4 repeats nothing: the upper 16 lanes hold the other half of k, so that an
// instruction takes half a portion of each lane, and register r of D is row 8 (lane / 16) + r.
template <class T>
struct Tile {
#if defined(__GFX12__)
  static constexpr int kKLanes = 2;
#else
  static constexpr int kKLanes = 1;
#endif
  static constexpr int kRowSlots = 1, kColumnSlots = 1, kSums = 8, kMaxTiles = 4;
  static constexpr bool kPartialSums = false;

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int column(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return kKLanes == 2 ? lane / 16 : 0; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int sum) {
    return kKLanes == 2 ? lane / 16 * 8 + sum : 2 * sum + lane / 16;
  }
  TORCH_Q4_DEVICE static int sum_column(int lane, int, int) { return lane % 16; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], const uint32_t (&x)[8],
                                       float (&sums)[8]) {
    Sums c = words<Sums>(reinterpret_cast<const uint32_t*>(sums));
    steps(w[0], x, c);
    __builtin_memcpy(sums, &c, sizeof(c));
  }

 private:
  using Sums = float __attribute__((ext_vector_type(8)));
  TORCH_Q4_DEVICE static void steps(const uint32_t (&w)[8], const uint32_t (&x)[8], Sums& c);

  template <class Vector>
  TORCH_Q4_DEVICE static Vector words(const uint32_t* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }
};

#if defined(__GFX12__)
template <>
TORCH_Q4_DEVICE void Tile<Float16>::steps(const uint32_t (&w)[8], const uint32_t (&x)[8], Sums& c) {
  using Eight = _Float16 __attribute__((ext_vector_type(8)));
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(words<Eight>(w + i), words<Eight>(x + i),
                                                         c);
  }
}
template <>
TORCH_Q4_DEVICE void Tile<BFloat16>::steps(const uint32_t (&w)[8], const uint32_t (&x)[8],
                                           Sums& c) {
  using Eight = short __attribute__((ext_vector_type(8)));
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(words<Eight>(w + i), words<Eight>(x + i),
                                                          c);
  }
}
#else
template <>
TORCH_Q4_DEVICE void Tile<Float16>::steps(const uint32_t (&w)[8], const uint32_t (&x)[8], Sums& c) {
  using Sixteen = _Float16 __attribute__((ext_vector_type(16)));
  c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(words<Sixteen>(w), words<Sixteen>(x), c);
}
template <>
TORCH_Q4_DEVICE void Tile<BFloat16>::steps(const uint32_t (&w)[8], const uint32_t (&x)[8],
                                           Sums& c) {
  using Sixteen = short __attribute__((ext_vector_type(16)));
  c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(words<Sixteen>(w), words<Sixteen>(x), c);
}
#endif

#else

// No matrix instructions (gfx906, gfx10): a lane multiplies its row with all 16 columns by dot2,
// and the k_lanes' sums are added up at the end.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 1, kColumnSlots = 16, kKLanes = kWaveLanes / 16, kSums = 1;
  static constexpr int kMaxTiles = 2;  // more would not fit into the instruction cache
  static constexpr bool kPartialSums = true;

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int column(int, int slot) { return slot; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane / 16; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int sum_column(int, int slot, int) { return slot; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], const uint32_t (&x)[8],
                                       float (&sums)[1]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[0] = dot2<T>(w[0][i], x[i], sums[0]);
  }
};

#endif

// ---- the matrix tile of four waves
// -----------------------------------------------------------------------------
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TORCH_Q4_GROUP_TILE 1

// Which of the block's waves this is, in a form that the compiler knows to be the same in all
// lanes: loops over K then count in uniform registers.
TORCH_Q4_DEVICE int wave_of_block() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWaveLanes, 0);
}

// A pointer to shared memory as the number that the instructions below take.
TORCH_Q4_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A barrier in shared memory, 8 bytes: a phase of it ends when as many have arrived as it was
// initialised with and the bytes that were expected have been copied. wait_for, which a whole wave
// calls, returns once the phase of this parity, 0 for the first, has ended; before the first, that
// of parity 1 has.
TORCH_Q4_DEVICE void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
TORCH_Q4_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
TORCH_Q4_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
TORCH_Q4_DEVICE void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
TORCH_Q4_DEVICE void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (ended == 0);
  __syncwarp();  // matrix instructions want all lanes of a wave together
}

// Copies a multiple of 16 bytes to shared memory while the thread goes on; the barrier counts them.
TORCH_Q4_DEVICE void copy_async(uint32_t shared, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- pairs of blocks, launched as clusters of two: each can reach the other's shared memory

TORCH_Q4_DEVICE uint32_t rank_in_pair() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of both blocks wait for one another.
TORCH_Q4_DEVICE void sync_pair() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// Arrives at the barrier that lies at the same place in a block of the pair.
TORCH_Q4_DEVICE void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// copy_async to the same place in both blocks, each of whose barriers counts the bytes.
TORCH_Q4_DEVICE void copy_async_to_pair(uint32_t shared, const void* from, int bytes,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Makes what this thread wrote to shared memory visible to matrix instructions of any thread that
// a barrier holds back until then.
TORCH_Q4_DEVICE void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// __syncthreads of the first kThreads threads of a block.
template <int kThreads>
TORCH_Q4_DEVICE void sync_first_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// How many registers a thread has from here on. Called by four waves, the first of them a multiple
// of four; some give up those of the block's that others take.
template <int kRegisters>
TORCH_Q4_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TORCH_Q4_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma.mma_async.m64nNk16: four waves multiply 64 rows of W, 16 each, with kColumns of x. PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate": a wave's operand W and its sums lie in
// registers like those of mma.m16n8k16 (Tile), for every eight columns; x lies in shared memory in
// matrices of eight columns and eight elements, 16 bytes a column, first those of elements 0 to 7.
template <class T, int kColumns>
struct GroupTile {
  // Around the instructions whose registers others wrote, and those that are waited for together.
  TORCH_Q4_DEVICE static void begin() { asm volatile("wgmma.fence.sync.aligned;"); }
  TORCH_Q4_DEVICE static void commit() { asm volatile("wgmma.commit_group.sync.aligned;"); }
  TORCH_Q4_DEVICE static void wait(float (&c)[kColumns / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    touch(c);
  }
  // For all but those of the last commit.
  TORCH_Q4_DEVICE static void wait_for_others() {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  // Sums of which some are still under way must not be what the compiler knows to be zero.
  TORCH_Q4_DEVICE static void clear(float (&c)[kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) c[i] = 0;
    touch(c);
  }
  TORCH_Q4_DEVICE static void touch(float (&c)[kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) asm volatile("" : "+f"(c[i]));
  }
  // x as described, plus a number of 16 bytes.
  TORCH_Q4_DEVICE static void multiply(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                       uint64_t x, float (&c)[kColumns / 2]);

  // The matrix descriptor: where x begins, the distance to the next eight elements, and that to
  // the next eight columns, in units of 16 bytes.
  TORCH_Q4_DEVICE static uint64_t describe(const uint8_t* x) {
    return (shared_address(x) >> 4 & 0x3FFF) | static_cast<uint64_t>(kColumns) << 16 |
           uint64_t{8} << 32;
  }
};

// The sums of so many columns as operands, which come first, and the names of all operands.
#define TORCH_Q4_SUMS_8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define TORCH_Q4_SUMS_16(i) TORCH_Q4_SUMS_8(i), TORCH_Q4_SUMS_8(i + 4)
#define TORCH_Q4_SUMS_32(i) TORCH_Q4_SUMS_16(i), TORCH_Q4_SUMS_16(i + 8)
#define TORCH_Q4_SUMS_64(i) TORCH_Q4_SUMS_32(i), TORCH_Q4_SUMS_32(i + 16)
#define TORCH_Q4_SUMS_128(i) TORCH_Q4_SUMS_64(i), TORCH_Q4_SUMS_64(i + 32)
#define TORCH_Q4_SUMS_256(i) TORCH_Q4_SUMS_128(i), TORCH_Q4_SUMS_128(i + 64)
#define TORCH_Q4_SUM_NAMES_8 "%0, %1, %2, %3"
#define TORCH_Q4_SUM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TORCH_Q4_SUM_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TORCH_Q4_SUM_NAMES_64                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TORCH_Q4_SUM_NAMES_128                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TORCH_Q4_SUM_NAMES_256                                                                   \
  TORCH_Q4_SUM_NAMES_128                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define TORCH_Q4_INPUT_NAMES_8 "{%4, %5, %6, %7}, %8"
#define TORCH_Q4_INPUT_NAMES_16 "{%8, %9, %10, %11}, %12"
#define TORCH_Q4_INPUT_NAMES_32 "{%16, %17, %18, %19}, %20"
#define TORCH_Q4_INPUT_NAMES_64 "{%32, %33, %34, %35}, %36"
#define TORCH_Q4_INPUT_NAMES_128 "{%64, %65, %66, %67}, %68"
#define TORCH_Q4_INPUT_NAMES_256 "{%128, %129, %130, %131}, %132"
#define TORCH_Q4_WGMMA(T, type, columns)                                                         \
  template <>                                                                                    \
  TORCH_Q4_DEVICE void GroupTile<T, columns>::multiply(                                          \
      uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t x, float (&c)[columns / 2]) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type           \
                 " {" TORCH_Q4_SUM_NAMES_##columns "}, " TORCH_Q4_INPUT_NAMES_##columns          \
                 ", 1, 1, 1, 0;"                                                                 \
                 : TORCH_Q4_SUMS_##columns(0)                                                    \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(x));                                  \
  }
#define TORCH_Q4_WGMMA_OF(T, type) \
  TORCH_Q4_WGMMA(T, type, 8)       \
  TORCH_Q4_WGMMA(T, type, 16)      \
  TORCH_Q4_WGMMA(T, type, 32)      \
  TORCH_Q4_WGMMA(T, type, 64)      \
  TORCH_Q4_WGMMA(T, type, 128)     \
  TORCH_Q4_WGMMA(T, type, 256)
TORCH_Q4_WGMMA_OF(Float16, "f16")
TORCH_Q4_WGMMA_OF(BFloat16, "bf16")

#endif  // Hopper

#endif  // TORCH_Q4_GPU_COMPILER

}  // namespace TORCH_Q4_NAMESPACE
