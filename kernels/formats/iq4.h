// What IQ4_NL and IQ4_XS share in quantising a group of 32, element = scale * kIq4Values[code].
// Results are ggml's to the last bit; search.h says how.
#pragma once

#include "codebooks.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

// Twice the midpoint of values i and i + 1, which is whole. From the midpoint on, the upper value
// is the nearer one.
constexpr int iq4_threshold(int i) { return kIq4Values[i] + kIq4Values[i + 1]; }

// The index of the value that is nearest to x, by twice x, rounded down.
struct Iq4Indices {
  static constexpr int kFirst = iq4_threshold(0) - 1;  // below all thresholds
  static constexpr int kLast = iq4_threshold(14);
  uint8_t of[kLast - kFirst + 1] = {};

  constexpr Iq4Indices() {
    for (int twice = kFirst; twice <= kLast; ++twice) {
      for (int i = 0; i < 15; ++i) of[twice - kFirst] += twice >= iq4_threshold(i);
    }
  }
};
constexpr Iq4Indices kIq4Indices;

// The index of the value that is nearest to x; 15 for NaN.
inline int nearest_iq4(float x) {
  float twice = x + x;
  twice = twice < Iq4Indices::kLast ? twice : Iq4Indices::kLast;
  twice = twice > Iq4Indices::kFirst ? twice : Iq4Indices::kFirst;
  const int truncated = static_cast<int>(twice);
  return kIq4Indices.of[truncated - (twice < truncated) - Iq4Indices::kFirst];
}

inline void encode_iq4(const float* x, float inverse, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(nearest_iq4(inverse * x[i]));
}

// Without importance the squares of the elements are the weights.
inline void weigh_iq4(const float* x, const float* importance, float variance, float* weights) {
  if (importance != nullptr) {
    weigh_by_importance<32>(x, importance, variance, weights);
  } else {
    for (int i = 0; i < 32; ++i) weights[i] = x[i] * x[i];
  }
}

// Minimises sum w (x - scale * value)^2 over scales that map the extreme element to 127 or to
// -127 + step, step = -7 ... 7, each followed by a least-squares scale for its values. Returns that
// scale, or 0 for a negligible group.
//
// The steps run side by side, a lane each. Their inverses differ by a tenth, so that most elements
// have the same value in all lanes, and few have more than two. Inverses rise from lane to lane or
// fall, and rounding keeps the order: the first and the last lane say which thresholds lie between.
inline float fit_iq4(const float* x, const float* weights) {
  const float extreme = find_extreme<32>(x);
  if (std::fabs(extreme) < kNegligible) return 0;

  constexpr int kLanes = 16;  // one more than there are steps
  constexpr int kSteps = 7;
  float inverses[kLanes], xq[kLanes] = {}, qq[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    inverses[lane] = (lane - kSteps + kIq4Values[0]) / extreme;
  }
  const float start_inverse = 1 / (-extreme / kIq4Values[0]);
  float start_xq = 0, start_qq = 0;
  for (int i = 0; i < 32; ++i) {
    const float element = x[i], weight = weights[i];
    const float start_q = kIq4Values[nearest_iq4(start_inverse * element)];
    start_xq += weight * start_q * element;
    start_qq += weight * start_q * start_q;

    const int first = nearest_iq4(inverses[0] * element);
    const int last = nearest_iq4(inverses[kLanes - 1] * element);
    const int low = std::min(first, last), high = std::max(first, last);
    float q[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) q[lane] = kIq4Values[low];
    for (int code = low; code < high; ++code) {
      const float threshold = iq4_threshold(code);
      const float rise = kIq4Values[code + 1] - kIq4Values[code];
      for (int lane = 0; lane < kLanes; ++lane) {
        const float scaled = inverses[lane] * element;
        q[lane] += scaled + scaled >= threshold ? rise : 0.0f;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      xq[lane] += weight * q[lane] * element;
      qq[lane] += weight * q[lane] * q[lane];
    }
  }

  float scale = start_qq > 0 ? start_xq / start_qq : 0;
  float best = scale * start_xq;
  for (int lane = 0; lane <= 2 * kSteps; ++lane) {
    if (qq[lane] > 0 && xq[lane] * xq[lane] > best * qq[lane]) {
      scale = xq[lane] / qq[lane];
      best = scale * xq[lane];
    }
  }
  return scale;
}

}  // namespace TORCH_Q4_NAMESPACE
