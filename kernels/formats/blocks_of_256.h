// What the K formats share in quantising a block of 256.
#pragma once

#include "search.h"

namespace TORCH_Q4_NAMESPACE {

// Quantises a block of Q2_K, Q4_K or Q5_K, element = d * scale * code - dmin * min, except that the
// elements' codes are left for the format to pack. Fits each group by itself, then codes for the
// groups' scales and minimums, then the elements' codes again under what these can express. Search
// names the ranges of the codes, how those of the groups are packed, and what differs between the
// formats when no importance is given.
template <typename Search, typename Block>
void fit_block_with_mins(const float* x, const float* importance, Block& block, uint8_t* codes) {
  constexpr int kGroups = Search::kGroups;
  constexpr int kElems = 256 / kGroups;
  float scales[kGroups], mins[kGroups], weight_sums[kGroups];
  const float variance = Search::kVarianceFactor * sum_squares(x, 256) / 256;
  for (int g = 0; g < kGroups; ++g) {
    const float* group = x + kElems * g;
    uint8_t* group_codes = codes + kElems * g;
    float weights[kElems];
    ScaleAndMin fit;
    if (importance == nullptr) {
      const float base =
          Search::kPlainWeightsAddRms ? std::sqrt(sum_squares(group, kElems) / kElems) : 0;
      for (int i = 0; i < kElems; ++i) weights[i] = base + std::fabs(group[i]);
      fit = fit_with_min<kElems, Search::kMaxCode, Search::kPlainNorm>(
          group, weights, Search::kPlainGrid, group_codes);
    } else {
      weigh_by_importance<kElems>(group, importance + kElems * g, variance, weights);
      fit = fit_with_min<kElems, Search::kMaxCode>(group, weights, kImportanceGrid, group_codes);
    }
    scales[g] = fit.scale;
    mins[g] = -fit.min;
    weight_sums[g] = sum_weights<kElems>(weights);
  }

  constexpr int kMaxScale = Search::kMaxScale;
  uint8_t scale_codes[kGroups], min_codes[kGroups];
  if (importance == nullptr) {
    block.d = float_to_half(scale_by_max<kGroups, kMaxScale>(scales, scale_codes));
    block.dmin = float_to_half(scale_by_max<kGroups, kMaxScale>(mins, min_codes));
  } else {
    block.d = float_to_half(fit_nonnegative<kGroups, kMaxScale>(scales, weight_sums, scale_codes));
    block.dmin = float_to_half(fit_nonnegative<kGroups, kMaxScale>(mins, weight_sums, min_codes));
  }
  // Read back what was stored: where weights span many orders of magnitude, rounding can turn a
  // group's scale negative, and its code then wraps into something that does not fit.
  Search::pack_scales(scale_codes, min_codes, block.scales);
  Search::unpack_scales(block.scales, scale_codes, min_codes);

  const float d = half_to_float(block.d);
  const float dmin = half_to_float(block.dmin);
  for (int g = 0; g < kGroups; ++g) {
    recode_with_min<kElems, Search::kMaxCode>(x + kElems * g, d * scale_codes[g],
                                              dmin * min_codes[g], codes + kElems * g);
  }
}

// Byte i of each 32 holds the low two bits of codes i, i + 32, i + 64 and i + 96 of 128.
inline void pack_2bit(const uint8_t* codes, uint8_t* packed) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* in = codes + 128 * half;
    for (int i = 0; i < 32; ++i) {
      packed[32 * half + i] =
          (in[i] & 3) | (in[i + 32] & 3) << 2 | (in[i + 64] & 3) << 4 | (in[i + 96] & 3) << 6;
    }
  }
}

}  // namespace TORCH_Q4_NAMESPACE
