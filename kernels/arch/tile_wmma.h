// The matrix tile (gpu.h) by the matrix instructions of AMD's RDNA3 and RDNA4.
#pragma once

#include "gpu.h"

namespace TORCH_Q4_NAMESPACE {

// v_wmma_f32_16x16x16 in wave32. RDNA3's ISA document ("Wave Matrix Multiply Accumulate") gives a
// lane of A a whole row, lane % 16, with all 16 elements of k, and the upper 16 lanes repeat the
// lower ones; B is the same with rows of x, and register r of D holds the sum of row 2 r + lane /
// 16 of W and row lane % 16 of x. RDNA4 repeats nothing: the upper 16 lanes hold the other half of
// k, so that an instruction takes half a portion of each lane, and register r of D is row 8 (lane /
// 16) + r.
template <class T>
struct Tile {
#if defined(__GFX12__)
  static constexpr int kKLanes = 2, kPieceWords = 4;
  static constexpr HeldInRegisters kHeld = {{2, 2, 1}, {8, 2, 4}};
#else
  static constexpr int kKLanes = 1, kPieceWords = 8;
  static constexpr HeldInRegisters kHeld = {{2, 2, 1}, {4, 2, 2}};
#endif
  static constexpr int kRowSlots = 1, kXRowSlots = 1, kSums = 8, kMaxTiles = 8;
  static constexpr bool kPartialSums = false;

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int x_row(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return kKLanes == 2 ? lane / 16 : 0; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int sum) {
    return kKLanes == 2 ? lane / 16 * 8 + sum : 2 * sum + lane / 16;
  }
  TORCH_Q4_DEVICE static int sum_x_row(int lane, int, int) { return lane % 16; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], int piece,
                                       const uint32_t (&x)[kPieceWords], float (&sums)[8]) {
    Sums c = words<Sums>(reinterpret_cast<const uint32_t*>(sums));
    steps(w[0] + kPieceWords * piece, x, c);
    __builtin_memcpy(sums, &c, sizeof(c));
  }

 private:
  using Sums = float __attribute__((ext_vector_type(8)));
  TORCH_Q4_DEVICE static void steps(const uint32_t* w, const uint32_t* x, Sums& c);

  template <class Vector>
  TORCH_Q4_DEVICE static Vector words(const uint32_t* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }
};

#if defined(__GFX12__)
template <>
TORCH_Q4_DEVICE void Tile<Float16>::steps(const uint32_t* w, const uint32_t* x, Sums& c) {
  using Eight = _Float16 __attribute__((ext_vector_type(8)));
  c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(words<Eight>(w), words<Eight>(x), c);
}
template <>
TORCH_Q4_DEVICE void Tile<BFloat16>::steps(const uint32_t* w, const uint32_t* x, Sums& c) {
  using Eight = short __attribute__((ext_vector_type(8)));
  c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(words<Eight>(w), words<Eight>(x), c);
}
#else
template <>
TORCH_Q4_DEVICE void Tile<Float16>::steps(const uint32_t* w, const uint32_t* x, Sums& c) {
  using Sixteen = _Float16 __attribute__((ext_vector_type(16)));
  c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(words<Sixteen>(w), words<Sixteen>(x), c);
}
template <>
TORCH_Q4_DEVICE void Tile<BFloat16>::steps(const uint32_t* w, const uint32_t* x, Sums& c) {
  using Sixteen = short __attribute__((ext_vector_type(16)));
  c = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(words<Sixteen>(w), words<Sixteen>(x), c);
}
#endif

}  // namespace TORCH_Q4_NAMESPACE
