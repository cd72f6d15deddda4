// The matrix tile (gpu.h) by dot2, where there are no matrix instructions.
#pragma once

#include "gpu.h"

namespace TORCH_Q4_NAMESPACE {

// No matrix instructions (gfx906, gfx10): a lane multiplies its row with all 16 rows of x by dot2,
// and the k_lanes' sums are added up at the end.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 1, kXRowSlots = 16, kKLanes = kWaveLanes / 16, kSums = 1;
  static constexpr int kMaxTiles =
      kHasDot2<T> ? 2 : 1;  // more would not fit into the instruction cache
  static constexpr int kPieceWords = 4;
  static constexpr bool kPartialSums = true;
  static constexpr HeldInRegisters kHeld = {{1, 1, 1}, {1, 1, 1}};

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int x_row(int, int slot) { return slot; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane / 16; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int sum_x_row(int, int slot, int) { return slot; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], int piece, const uint32_t (&x)[4],
                                       float (&sums)[1]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0] = dot2<T>(w[0][4 * piece + i], x[i], sums[0]);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
