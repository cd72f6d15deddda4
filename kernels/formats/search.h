// The searches by which the quantisers choose scales and codes, on the host.
//
// Their results are ggml's to the last bit (ggml-quants.c): the grids of candidates, thresholds and
// weightings are ggml's, and every sum runs in ggml's order. Compile with -ffp-contract=off, since
// a fused multiply-add rounds differently.
//
// Weights must not be negative. Infinities and NaNs give some code, never undefined behaviour.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../arch/arch.h"

namespace TORCH_Q4_NAMESPACE {

// A group whose largest magnitude is below this counts as all zero.
constexpr float kNegligible = 1e-15f;

// Nearest integer, ties to even, for |value| < 2^22. Adding 1.5 * 2^23 leaves no fraction bits in
// the sum's mantissa; reading it back, unlike a cast, is defined for every float.
inline int round_to_int(float value) {
  return static_cast<int>(float_to_bits(value + 0x1.8p23f) & 0x7FFFFFu) - 0x400000;
}

// The integer part, or 0 where it does not fit into 32 bits, NaN included.
inline int truncate_to_int(float value) {
  return std::fabs(value) < 0x1p31f ? static_cast<int>(value) : 0;
}

// 1 / scale, with which zero divides to zero.
inline float reciprocal_or_zero(float scale) { return scale != 0 ? 1.0f / scale : 0.0f; }

// The element of largest magnitude, with its sign; 0 if all are.
template <int kCount>
float find_extreme(const float* x) {
  float extreme = 0;
  for (int i = 0; i < kCount; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  return extreme;
}

inline float sum_squares(const float* x, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// weights[i] = importance[i] * sqrt(variance + x[i]^2): an element's own importance, raised with
// its magnitude once that stands out from the variance around it.
template <int kCount>
void weigh_by_importance(const float* x, const float* importance, float variance, float* weights) {
  for (int i = 0; i < kCount; ++i) {
    weights[i] = importance[i] * std::sqrt(variance + x[i] * x[i]);
  }
}

template <int kCount>
float sum_weights(const float* weights) {
  float sum = 0;
  for (int i = 0; i < kCount; ++i) sum += weights[i];
  return sum;
}

// The plain way for x ~ scale * (code - kHalf), codes 0 to 2 kHalf - 1: the scale maps the extreme
// element to code 0, the end of the range that reaches further. Returns the scale.
template <int kCount, int kHalf>
float scale_by_extreme(const float* x, uint8_t* codes) {
  const float scale = find_extreme<kCount>(x) / -kHalf;
  const float inverse = reciprocal_or_zero(scale);
  for (int i = 0; i < kCount; ++i) {
    const int code = static_cast<int8_t>(truncate_to_int(x[i] * inverse + (kHalf + 0.5f)));
    codes[i] = static_cast<uint8_t>(std::min(2 * kHalf - 1, code));
  }
  return scale;
}

struct ScaleAndMin {
  float scale;
  float min;
};

// The plain way for x ~ scale * code + min, codes 0 to kMaxCode: they span the range of x.
template <int kCount, int kMaxCode>
ScaleAndMin scale_by_range(const float* x, uint8_t* codes) {
  float min = std::numeric_limits<float>::max();
  float max = -min;
  for (int i = 0; i < kCount; ++i) {
    if (x[i] < min) min = x[i];
    if (x[i] > max) max = x[i];
  }
  const float scale = (max - min) / kMaxCode;
  const float inverse = reciprocal_or_zero(scale);
  for (int i = 0; i < kCount; ++i) {
    const int code = truncate_to_int((x[i] - min) * inverse + 0.5f);
    codes[i] = static_cast<uint8_t>(std::min(kMaxCode, code));
  }
  return {scale, min};
}

// The two sums from which a least-squares scale for fixed codes q follows: it is xq / qq, and
// leaves an error of sum(w x^2) - xq^2 / qq, so the codes with the largest xq^2 / qq are the best.
struct Moments {
  float xq = 0;  // sum of w x q
  float qq = 0;  // sum of w q^2

  void add(float weight, float x, int q) {
    xq += weight * x * q;
    qq += weight * q * q;
  }
};

// Minimises sum w (x - scale * (code - kHalf))^2, codes 0 to 2 kHalf - 1, over scales that map the
// extreme element to -kHalf + 0.1 step, step = -9 ... 9, each followed by a least-squares scale for
// its codes. Returns that scale, or 0 with all codes 0 for a negligible group.
template <int kCount, int kHalf>
float fit_symmetric(const float* x, const float* weights, uint8_t* codes) {
  const float extreme = find_extreme<kCount>(x);
  if (std::fabs(extreme) < kNegligible) {
    std::fill_n(codes, kCount, uint8_t{0});
    return 0;
  }
  int candidate[kCount];
  const auto try_inverse = [&](float inverse) {
    Moments moments;
    for (int i = 0; i < kCount; ++i) {
      candidate[i] = std::clamp(round_to_int(inverse * x[i]), -kHalf, kHalf - 1);
      moments.add(weights[i], x[i], candidate[i]);
    }
    return moments;
  };
  const auto keep_candidate = [&] {
    for (int i = 0; i < kCount; ++i) codes[i] = static_cast<uint8_t>(candidate[i] + kHalf);
  };

  Moments moments = try_inverse(-kHalf / extreme);
  keep_candidate();
  float scale = moments.qq != 0 ? moments.xq / moments.qq : 0;
  float best = scale * moments.xq;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;  // was the start
    moments = try_inverse(-(kHalf + 0.1f * step) / extreme);
    if (moments.qq > 0 && moments.xq * moments.xq > best * moments.qq) {
      keep_candidate();
      scale = moments.xq / moments.qq;
      best = scale * moments.xq;
    }
  }
  return scale;
}

// Coordinate descent on sum w (x - scale * code)^2: up to five times over the elements, give each
// the code that is best for the scale which the others imply, if that raises xq^2 / qq. `moments`
// are those of `codes`; both are updated. A signed Code (kMin < 0) may also leave zero, where the
// others have no scale.
template <int kCount, int kMin, int kMax, typename Code>
void refine_codes(const float* x, const float* weights, Code* codes, Moments& moments) {
  for (int round = 0; round < 5; ++round) {
    bool changed = false;
    for (int i = 0; i < kCount; ++i) {
      Moments others;
      others.xq = moments.xq - weights[i] * x[i] * codes[i];
      others.qq = moments.qq - weights[i] * codes[i] * codes[i];
      if (!(others.xq > 0 && (kMin < 0 || others.qq > 0))) continue;
      const int nearest = round_to_int(x[i] * others.qq / others.xq);
      const int code = kMin < 0 ? std::clamp(nearest, kMin, kMax) : std::min(nearest, kMax);
      if (code == codes[i]) continue;
      others.add(weights[i], x[i], code);
      if (others.qq > 0 &&
          others.xq * others.xq * moments.qq > moments.xq * moments.xq * others.qq) {
        codes[i] = static_cast<Code>(code);
        moments = others;
        changed = true;
      }
    }
    if (!changed) return;
  }
}

// Minimises sum w (x - scale * code)^2, codes 0 to kMaxCode, for x that are not negative, as are
// scales and minimums. The largest x goes to kMaxCode + 0.1 step, step = -4 ... 4, whichever leaves
// the least error; coordinate descent follows. Returns the scale, 0 for a negligible group.
//
// Rounding in fit_with_min can leave a negative x all the same. Its code wraps around in a byte, in
// the first candidate's error already, since ggml's does.
template <int kCount, int kMaxCode>
float fit_nonnegative(const float* x, const float* weights, uint8_t* codes) {
  float max = 0;
  for (int i = 0; i < kCount; ++i) max = max > x[i] ? max : x[i];
  if (max < kNegligible) {
    std::fill_n(codes, kCount, uint8_t{0});
    return 0;
  }
  const auto error_of = [&](float inverse, bool wrapped) {
    const float scale = 1 / inverse;
    float error = 0;
    for (int i = 0; i < kCount; ++i) {
      int code = std::min(round_to_int(inverse * x[i]), kMaxCode);
      if (wrapped) code = static_cast<uint8_t>(code);
      const float difference = x[i] - scale * code;
      error += weights[i] * difference * difference;
    }
    return error;
  };
  float inverse = kMaxCode / max;
  float least_error = error_of(inverse, true);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;  // was the start
    const float other_inverse = (0.1f * step + kMaxCode) / max;
    const float error = error_of(other_inverse, false);
    if (error < least_error) {
      least_error = error;
      inverse = other_inverse;
    }
  }
  Moments moments;
  for (int i = 0; i < kCount; ++i) {
    const int code = std::min(round_to_int(inverse * x[i]), kMaxCode);
    codes[i] = static_cast<uint8_t>(code);
    moments.add(weights[i], x[i], code);
  }
  refine_codes<kCount, 0, kMaxCode>(x, weights, codes, moments);
  return moments.qq > 0 ? moments.xq / moments.qq : 0;
}

// The scales that fit_with_min tries: what lies between min and max maps to
// kMaxCode + first + step * s codes, s = 0 ... last.
struct RangeGrid {
  float first;
  float step;
  int last;
};

constexpr RangeGrid kImportanceGrid = {-0.9f, 0.05f, 36};

enum class ErrorNorm { kAbsolute, kSquared };

// Minimises sum w |x - (scale * code + min)|^p, codes 0 to kMaxCode, min <= 0, p = 1 or 2 by kNorm:
// each candidate of the grid gives codes, a weighted linear regression on them gives scale and min,
// and the candidate with the least error stays, its min the one from which the next candidates
// count. Where the regression asks for a positive min, it is repeated through the origin.
template <int kCount, int kMaxCode, ErrorNorm kNorm = ErrorNorm::kSquared>
ScaleAndMin fit_with_min(const float* x, const float* weights, const RangeGrid& grid,
                         uint8_t* codes) {
  float min = x[0];
  float max = x[0];
  float sum_w = weights[0];
  float sum_wx = sum_w * x[0];
  for (int i = 1; i < kCount; ++i) {
    if (x[i] < min) min = x[i];
    if (x[i] > max) max = x[i];
    sum_w += weights[i];
    sum_wx += weights[i] * x[i];
  }
  if (min > 0) min = 0;
  if (max <= min) {
    std::fill_n(codes, kCount, uint8_t{0});
    return {0, min};
  }

  uint8_t candidate[kCount];
  ScaleAndMin best = {0, min};
  const auto encode = [&](float inverse) {
    for (int i = 0; i < kCount; ++i) {
      const int code = round_to_int(inverse * (x[i] - best.min));
      candidate[i] = static_cast<uint8_t>(std::clamp(code, 0, kMaxCode));
    }
  };
  const auto error_of = [&](const ScaleAndMin& fit) {
    float error = 0;
    for (int i = 0; i < kCount; ++i) {
      const float difference = fit.scale * candidate[i] + fit.min - x[i];
      error += weights[i] *
               (kNorm == ErrorNorm::kAbsolute ? std::fabs(difference) : difference * difference);
    }
    return error;
  };

  float inverse = kMaxCode / (max - min);
  best.scale = 1 / inverse;
  encode(inverse);
  std::copy_n(candidate, kCount, codes);
  float least_error = error_of(best);
  for (int s = 0; s <= grid.last; ++s) {
    inverse = (grid.first + grid.step * s + kMaxCode) / (max - best.min);
    encode(inverse);
    float sum_wq = 0, sum_wqq = 0, sum_wqx = 0;
    for (int i = 0; i < kCount; ++i) {
      const float wq = weights[i] * candidate[i];
      sum_wq += wq;
      sum_wqq += wq * candidate[i];
      sum_wqx += wq * x[i];
    }
    const float determinant = sum_w * sum_wqq - sum_wq * sum_wq;
    if (!(determinant > 0)) continue;
    ScaleAndMin fit = {(sum_w * sum_wqx - sum_wx * sum_wq) / determinant,
                       (sum_wqq * sum_wx - sum_wq * sum_wqx) / determinant};
    if (fit.min > 0) fit = {sum_wqx / sum_wqq, 0};
    const float error = error_of(fit);
    if (error < least_error) {
      least_error = error;
      best = fit;
      std::copy_n(candidate, kCount, codes);
    }
  }
  return best;
}

// The plain way for values that are not negative: the largest goes to kMaxCode. Returns the scale.
template <int kCount, int kMaxCode>
float scale_by_max(const float* x, uint8_t* codes) {
  float max = 0;
  for (int i = 0; i < kCount; ++i) max = x[i] > max ? x[i] : max;
  const float inverse = max > 0 ? kMaxCode / max : 0;
  for (int i = 0; i < kCount; ++i) {
    const uint8_t code = static_cast<uint8_t>(round_to_int(inverse * x[i]));
    codes[i] = std::min(code, uint8_t{kMaxCode});
  }
  return max / kMaxCode;
}

// The codes nearest to x under the scale and minimum that the block can hold. A zero scale leaves
// the codes of the search, which then carry no meaning but are what ggml stores.
template <int kCount, int kMaxCode>
void recode_with_min(const float* x, float scale, float min, uint8_t* codes) {
  if (scale == 0) return;
  for (int i = 0; i < kCount; ++i) {
    const int code = round_to_int((x[i] + min) / scale);
    codes[i] = static_cast<uint8_t>(std::clamp(code, 0, kMaxCode));
  }
}

template <int kCount, int kHalf>
void recode_symmetric(const float* x, float scale, uint8_t* codes) {
  if (scale == 0) return;
  for (int i = 0; i < kCount; ++i) {
    const int code = round_to_int(x[i] / scale);
    codes[i] = static_cast<uint8_t>(std::clamp(code, -kHalf, kHalf - 1) + kHalf);
  }
}

}  // namespace TORCH_Q4_NAMESPACE
