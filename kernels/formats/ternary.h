// How TQ2_0 is quantised, element = scale * (code - 1), codes 0, 1 and 2.
#pragma once

#include "search.h"

namespace TORCH_Q4_NAMESPACE {

// The largest magnitude is the scale; what is less than half of it becomes zero. Where the scale's
// inverse overflows, the codes are 1. Returns the scale.
template <int kCount>
float encode_ternary(const float* x, uint8_t* codes) {
  float scale = 0;
  for (int i = 0; i < kCount; ++i) {
    const float magnitude = std::fabs(x[i]);
    scale = scale > magnitude ? scale : magnitude;
  }
  const float inverse = reciprocal_or_zero(scale);
  for (int i = 0; i < kCount; ++i) {
    codes[i] = static_cast<uint8_t>(truncate_to_int(std::round(x[i] * inverse)) + 1);
  }
  return scale;
}

}  // namespace TORCH_Q4_NAMESPACE
