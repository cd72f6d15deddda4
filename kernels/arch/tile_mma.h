// The matrix tile (gpu.h) by NVIDIA's mma instructions.
#pragma once

#include "gpu.h"

namespace TORCH_Q4_NAMESPACE {

// mma.sync.m16n8k16 twice. PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type":
// with g = lane / 4 and t = lane % 4, A's registers hold rows g, g + 8, g, g + 8, the first two for
// k = 2 t, 2 t + 1, the others for k = 2 t + 8, 2 t + 9; B's two registers the same k of x's row g;
// C's row g, rows 2 t, 2 t + 1 of x, then the same of row g + 8.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 2, kXRowSlots = 2, kKLanes = 4, kSums = 4, kMaxTiles = 4;
  static constexpr int kPieceWords = 4;
  static constexpr bool kPartialSums = false;

  TORCH_Q4_DEVICE static int place(int lane, int slot) { return lane / 4 + 8 * slot; }
  TORCH_Q4_DEVICE static int x_row(int lane, int slot) { return lane / 4 + 8 * slot; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane % 4; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int sum) { return lane / 4 + sum / 2 * 8; }
  TORCH_Q4_DEVICE static int sum_x_row(int lane, int slot, int sum) {
    return 8 * slot + lane % 4 * 2 + sum % 2;
  }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[2][8], int piece, const uint32_t (&x)[4],
                                       float (&sums)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int at = 4 * piece + i;
      step(w[0][at], w[1][at], w[0][at + 1], w[1][at + 1], x[i], x[i + 1], sums);
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

}  // namespace TORCH_Q4_NAMESPACE
