// The matrix tile (gpu.h) by dot2, where there are no matrix instructions.
#pragma once

#include "gpu.h"

namespace TORCH_Q4_NAMESPACE {

// No matrix instructions (gfx906, gfx10): a lane multiplies its row with all 16 rows of x by dot2,
// and the k_lanes' sums are added up at the end.
template <class T>
struct Tile {
  static constexpr int kRowSlots = 1, kXRowSlots = 16, kKLanes = kWaveLanes / 16, kSums = 1;
  static constexpr int kMaxTiles = 2;  // more would not fit into the instruction cache
  static constexpr bool kPartialSums = true;

  TORCH_Q4_DEVICE static int place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int x_row(int, int slot) { return slot; }
  TORCH_Q4_DEVICE static int k_lane(int lane) { return lane / 16; }
  TORCH_Q4_DEVICE static int sum_place(int lane, int) { return lane % 16; }
  TORCH_Q4_DEVICE static int sum_x_row(int, int slot, int) { return slot; }

  TORCH_Q4_DEVICE static void multiply(const uint32_t (&w)[1][8], const uint32_t (&x)[8],
                                       float (&sums)[1]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[0] = dot2<T>(w[0][i], x[i], sums[0]);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
