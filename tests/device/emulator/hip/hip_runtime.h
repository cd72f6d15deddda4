// In the place of HIP's header: the kernels compiled as C++ for a CPU, as for the AMD GPU that
// __gfx942__ or its like names. driver.cpp runs the threads of a block one after the other, each as
// far as it gets until it waits for others: at __syncthreads(), or for the lanes of its wave at a
// matrix instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __host__
#define __global__ __attribute__((visibility("default")))
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

// Which thread runs, and what it calls to wait for others; driver.cpp knows this structure too.
struct EmulatedThread {
  uint32_t thread, block_x, block_y, grid_x, grid_y;
  void (*synchronize)();  // with all threads of the block
  // With the `lanes` threads of the wave: what each of them handed over, one after the other.
  const void* (*exchange)(const void* operands, size_t bytes, uint32_t lanes);
};
extern "C" __attribute__((visibility("default"), weak)) EmulatedThread* emulated_thread = nullptr;

struct EmulatedPlace {
  uint32_t x, y;
};
#define threadIdx (EmulatedPlace{emulated_thread->thread, 0})
#define blockIdx (EmulatedPlace{emulated_thread->block_x, emulated_thread->block_y})
#define gridDim (EmulatedPlace{emulated_thread->grid_x, emulated_thread->grid_y})
#define __syncthreads() emulated_thread->synchronize()

// ---- the compiler's own functions, as the instruction set's manual has them

// v_perm_b32: each byte of `selector` names one of the eight bytes of high:low. Other selectors
// give constants, which nothing here asks for.
static inline uint32_t __builtin_amdgcn_perm(uint32_t high, uint32_t low, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 8 * i & 0xFF;
    if (which > 7) std::abort();
    result |= static_cast<uint32_t>(bytes >> 8 * which & 0xFF) << 8 * i;
  }
  return result;
}
// v_alignbit_b32
static inline uint32_t __builtin_amdgcn_alignbit(uint32_t high, uint32_t low, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
// v_dot4_i32_i8, v_dot4_i32_iu8
static inline int __builtin_amdgcn_sdot4(int a, int b, int acc, bool /*clamp*/) {
  for (int i = 0; i < 4; ++i)
    acc += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return acc;
}
static inline int __builtin_amdgcn_sudot4(bool a_signed, int a, bool b_signed, int b, int acc,
                                          bool) {
  if (!a_signed || !b_signed) std::abort();
  return __builtin_amdgcn_sdot4(a, b, acc, false);
}

// Rounds to bfloat16, to nearest even: the compiler calls it, and libgcc has it from GCC 13 on
// only. A
// __bf16 is returned where the lowest bits of a float are; written as one, this would call itself.
extern "C" __attribute__((weak)) float emulated_bfloat16(float value) __asm__("__truncsfbf2");
extern "C" __attribute__((weak)) float emulated_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (value == value ? bits + 0x7FFF + (bits >> 16 & 1) : 0x7FC00000) >> 16;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// ---- vectors of 16-bit floats; bfloat16 comes as itself or as its bits

template <class Element, int kCount>
using EmulatedVector = Element __attribute__((ext_vector_type(kCount)));

static inline float emulated_float(_Float16 value) { return static_cast<float>(value); }
static inline float emulated_float(__bf16 value) { return static_cast<float>(value); }
static inline float emulated_float(short bits) {
  const uint32_t wide = static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// v_dot2_f32_f16, v_dot2_f32_bf16
template <class Element>
static inline float emulated_dot2(EmulatedVector<Element, 2> a, EmulatedVector<Element, 2> b,
                                  float acc) {
  acc = std::fma(emulated_float(a.x), emulated_float(b.x), acc);
  return std::fma(emulated_float(a.y), emulated_float(b.y), acc);
}
static inline float __builtin_amdgcn_fdot2(EmulatedVector<_Float16, 2> a,
                                           EmulatedVector<_Float16, 2> b, float acc, bool) {
  return emulated_dot2<_Float16>(a, b, acc);
}
static inline float __builtin_amdgcn_fdot2_f32_bf16(EmulatedVector<__bf16, 2> a,
                                                    EmulatedVector<__bf16, 2> b, float acc, bool) {
  return emulated_dot2<__bf16>(a, b, acc);
}

// ---- matrix instructions
//
// Lane l holds row (of B: column) l % 16 and of k the kHeld elements from kHeld * (l / 16) on,
// where kKLanes groups of 16 lanes share out k; where that is one group, the other lanes repeat it.
// Of D it holds column l % 16 and the rows row_of(l, r).
template <int kKLanes, uint32_t kLanes, class Element, int kHeld, int kSums, class RowOf>
static inline EmulatedVector<float, kSums> emulated_matrix(EmulatedVector<Element, kHeld> a,
                                                           EmulatedVector<Element, kHeld> b,
                                                           EmulatedVector<float, kSums> c,
                                                           const RowOf& row_of) {
  struct Operands {
    float a[kHeld], b[kHeld];
  } own;
  for (int i = 0; i < kHeld; ++i) {
    own.a[i] = emulated_float(a[i]);
    own.b[i] = emulated_float(b[i]);
  }
  const auto* wave =
      static_cast<const Operands*>(emulated_thread->exchange(&own, sizeof(own), kLanes));
  const int lane = static_cast<int>(emulated_thread->thread % kLanes);
  for (int r = 0; r < kSums; ++r) {
    float sum = c[r];
    for (int group = 0; group < kKLanes; ++group) {
      const Operands& row = wave[16 * group + row_of(lane, r)];
      const Operands& column = wave[16 * group + lane % 16];
      for (int i = 0; i < kHeld; ++i) sum = std::fma(row.a[i], column.b[i], sum);
    }
    c[r] = sum;
  }
  return c;
}

// v_mfma_f32_16x16x*: CDNA's ISA documents, "Matrix Arithmetic Instructions".
template <class Element, int kHeld>
static inline EmulatedVector<float, 4> emulated_mfma(EmulatedVector<Element, kHeld> a,
                                                     EmulatedVector<Element, kHeld> b,
                                                     EmulatedVector<float, 4> c) {
  return emulated_matrix<4, 64, Element, kHeld, 4>(
      a, b, c, [](int lane, int r) { return 4 * (lane / 16) + r; });
}
#define EMULATED_MFMA(name, Element, held)                                                 \
  static inline EmulatedVector<float, 4> name(EmulatedVector<Element, held> a,             \
                                              EmulatedVector<Element, held> b,             \
                                              EmulatedVector<float, 4> c, int, int, int) { \
    return emulated_mfma<Element, held>(a, b, c);                                          \
  }
EMULATED_MFMA(__builtin_amdgcn_mfma_f32_16x16x16f16, _Float16, 4)
EMULATED_MFMA(__builtin_amdgcn_mfma_f32_16x16x32_f16, _Float16, 8)
EMULATED_MFMA(__builtin_amdgcn_mfma_f32_16x16x8bf16, short, 2)
EMULATED_MFMA(__builtin_amdgcn_mfma_f32_16x16x16bf16_1k, short, 4)
EMULATED_MFMA(__builtin_amdgcn_mfma_f32_16x16x32_bf16, __bf16, 8)

// v_wmma_f32_16x16x16_*: "Wave Matrix Multiply Accumulate" of RDNA3's ISA document, and RDNA4's.
#define EMULATED_WMMA(name, Element, held, k_lanes, row)                                        \
  static inline EmulatedVector<float, 8> name(EmulatedVector<Element, held> a,                  \
                                              EmulatedVector<Element, held> b,                  \
                                              EmulatedVector<float, 8> c) {                     \
    return emulated_matrix<k_lanes, 32, Element, held, 8>(a, b, c,                              \
                                                          [](int lane, int r) { return row; }); \
  }
EMULATED_WMMA(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32, _Float16, 16, 1, 2 * r + lane / 16)
EMULATED_WMMA(__builtin_amdgcn_wmma_f32_16x16x16_bf16_w32, short, 16, 1, 2 * r + lane / 16)
EMULATED_WMMA(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12, _Float16, 8, 2, 8 * (lane / 16) + r)
EMULATED_WMMA(__builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12, short, 8, 2, 8 * (lane / 16) + r)

// ---- what asks for nothing here: callers know that all lanes have the same value
static inline int __builtin_amdgcn_readfirstlane(int value) { return value; }
static inline void __builtin_amdgcn_sched_barrier(int) {}
