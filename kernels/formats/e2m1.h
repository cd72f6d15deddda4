// What MXFP4 and NVFP4 share in quantising, element = scale * kE2m1Values[code].
#pragma once

#include "codebooks.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

// The code of least |element - x|, computed in float32. Of several, the lowest code, as ggml.
inline uint8_t nearest_e2m1(float x, float scale) {
  int nearest = 0;
  float least_error = std::fabs(x);
  for (int code = 1; code < 16; ++code) {
    const float error = std::fabs(kE2m1Values[code] * scale - x);
    if (error < least_error) {
      least_error = error;
      nearest = code;
    }
  }
  return static_cast<uint8_t>(nearest);
}

// The codes of nearest_e2m1 for scales of at most four significant bits, `extreme` being the
// largest magnitude of x.
//
// With such a scale the elements and the midpoints between them are exact, and so are both
// differences where x is near a midpoint (Sterbenz). Comparing with midpoints then finds the same
// code. It does not where x is so large that the differences round to the same float: for these,
// infinity included, ggml takes code 0.
template <int kCount>
void encode_e2m1(const float* x, float extreme, float scale, uint8_t* codes) {
  if (!(std::fabs(extreme) <= 16 * scale)) {
    for (int i = 0; i < kCount; ++i) codes[i] = nearest_e2m1(x[i], scale);
    return;
  }
  int magnitude[kCount] = {};
  for (int code = 0; code < 7; ++code) {
    const float midpoint = (kE2m1Values[code] + kE2m1Values[code + 1]) * (0.5f * scale);
    for (int i = 0; i < kCount; ++i) magnitude[i] += std::fabs(x[i]) > midpoint;
  }
  for (int i = 0; i < kCount; ++i) {
    const int sign = x[i] < 0 && magnitude[i] != 0 ? 8 : 0;
    codes[i] = static_cast<uint8_t>(magnitude[i] | sign);
  }
}

}  // namespace TORCH_Q4_NAMESPACE
