// The matrix tile (gpu.h) by the matrix instructions of AMD's CDNA.
#pragma once

#include <type_traits>

#include "gpu.h"

namespace TORCH_Q4_NAMESPACE {

// v_mfma_f32_16x16x16: AMD's CDNA ISA documents ("Matrix Arithmetic Instructions") give, for one
// block of 16x16, A[lane % 16][4 (lane / 16) + i] and B[4 (lane / 16) + i][lane % 16] in the four
// halves i, and D[4 (lane / 16) + r][lane % 16] in register r. The variants over 8 and 32 elements
// of k have two and eight of them instead of four, and the same D.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 1, kXRowSlots = 1, kKLanes = 4, kSums = 4, kMaxTiles = 8;
  static constexpr int kPieceWords = 4;
  static constexpr bool kPartialSums = false;
#if defined(__gfx908__)
  static constexpr HeldInRegisters kHeld = {{1, 1, 1}, {8, 2, 2}};  // which has half the registers
#else
  // Rounding to bfloat16 takes registers, too.
  static constexpr bool kIsHalf = std::is_same_v<T, Float16>;
  static constexpr HeldInRegisters kHeld = {{2, 2, kIsHalf ? 2 : 1}, {8, 4, 2}};
#endif

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int x_row(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane / 16; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int sum) { return lane / 16 * 4 + sum; }
  TORCH_Q4_DEVICE static int sum_x_row(int lane, int, int) { return lane % 16; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], int piece, const uint32_t (&x)[4],
                                       float (&sums)[4]) {
    Sums c = {sums[0], sums[1], sums[2], sums[3]};
    steps(w[0] + 4 * piece, x, c);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = c[i];
  }

 private:
  using Sums = float __attribute__((ext_vector_type(4)));
  TORCH_Q4_DEVICE static void steps(const uint32_t* w, const uint32_t* x, Sums& c);

  template <class Vector>
  TORCH_Q4_DEVICE static Vector words(const uint32_t* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }
};

template <>
TORCH_Q4_DEVICE void Tile<Float16>::steps(const uint32_t* w, const uint32_t* x, Sums& c) {
#if defined(__gfx950__)
  using Eight = _Float16 __attribute__((ext_vector_type(8)));
  c = __builtin_amdgcn_mfma_f32_16x16x32_f16(words<Eight>(w), words<Eight>(x), c, 0, 0, 0);
#else
  using Four = _Float16 __attribute__((ext_vector_type(4)));
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    c = __builtin_amdgcn_mfma_f32_16x16x16f16(words<Four>(w + i), words<Four>(x + i), c, 0, 0, 0);
  }
#endif
}

template <>
TORCH_Q4_DEVICE void Tile<BFloat16>::steps(const uint32_t* w, const uint32_t* x, Sums& c) {
#if defined(__gfx950__)
  using Eight = __bf16 __attribute__((ext_vector_type(8)));
  c = __builtin_amdgcn_mfma_f32_16x16x32_bf16(words<Eight>(w), words<Eight>(x), c, 0, 0, 0);
#elif defined(__gfx908__)
  using Two = short __attribute__((ext_vector_type(2)));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c = __builtin_amdgcn_mfma_f32_16x16x8bf16(words<Two>(w + i), words<Two>(x + i), c, 0, 0, 0);
  }
#else
  using Four = short __attribute__((ext_vector_type(4)));
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(words<Four>(w + i), words<Four>(x + i), c, 0, 0,
                                                  0);
  }
#endif
}

}  // namespace TORCH_Q4_NAMESPACE
