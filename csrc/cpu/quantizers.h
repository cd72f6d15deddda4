// quantize_row of the formats (kernels/formats/) for kLanes blocks at a time: each lane of a vector
// takes a block through the same operations in the same order, so that the bytes are the same.
// Where quantize_row returns early, skips, or keeps the better of two candidates, all lanes go on
// and a mask selects. The functions have the names of their models in kernels/formats/search.h and
// blocks_of_256.h, which say what they do.
//
// VecF has the compiler's own operators. They stay multiplications and additions, since the file is
// compiled with -ffp-contract=off.
//
// A code is a float that holds an integer, until its byte is stored.
#pragma once

#include "../../kernels/formats/registry.h"
#include "kernels.h"
#include "simd.h"

namespace TORCH_Q4_NAMESPACE {

using torch_q4::cpu::QuantizeRows;

namespace {

// ---- the searches ----------------------------------------------------------------------------

// round_to_int. The bits that it takes from a float's fraction are those of an integer from 2^23 on
// here, so that the limits can be applied to floats.
constexpr float kRoundingShift = 0x1.8p23f;
inline VecF round_unlimited(VecF value) {
  return with_fraction_bits_of(broadcast(0x1p23f), value + kRoundingShift) - kRoundingShift;
}
template <int kHigh>
inline VecF round_below(VecF value) {
  return lesser(round_unlimited(value), broadcast(kHigh));
}
template <int kLow, int kHigh>
inline VecF round_between(VecF value) {
  return lesser(greater(round_unlimited(value), broadcast(kLow)), broadcast(kHigh));
}

// What the cast of a code to uint8_t and to int8_t leaves of it.
inline VecF as_byte(VecF code) { return to_float(low_bytes(truncate(code))); }
inline VecF as_signed_byte(VecF code) { return to_float(signed_low_bytes(truncate(code))); }

inline VecF zero_unless(Mask mask, VecF value) { return select(mask, value, zero()); }
inline VecF reciprocal_or_zero(VecF scale) {
  return zero_unless(not_equal(scale, zero()), broadcast(1.0f) / scale);
}

template <int kCount>
VecF find_extreme(const VecF* x) {
  VecF extreme = zero(), largest = zero();
  for (int i = 0; i < kCount; ++i) {
    const VecF size = magnitude(x[i]);
    extreme = select(less(largest, size), x[i], extreme);
    largest = greater(size, largest);
  }
  return extreme;
}

template <int kCount>
VecF sum_squares(const VecF* x) {
  VecF sum = zero();
  for (int i = 0; i < kCount; ++i) sum = sum + x[i] * x[i];
  return sum;
}

template <int kCount>
VecF sum_weights(const VecF* weights) {
  VecF sum = zero();
  for (int i = 0; i < kCount; ++i) sum = sum + weights[i];
  return sum;
}

// `weights` comes with the importance and leaves with the weights.
template <int kCount>
void weigh_by_importance(const VecF* x, VecF variance, VecF* weights) {
  for (int i = 0; i < kCount; ++i) {
    weights[i] = weights[i] * square_root(variance + x[i] * x[i]);
  }
}

template <int kCount, int kHalf>
VecF scale_by_extreme(const VecF* x, VecF* codes) {
  const VecF scale = find_extreme<kCount>(x) / broadcast(-kHalf);
  const VecF inverse = reciprocal_or_zero(scale);
  for (int i = 0; i < kCount; ++i) {
    // Where an integer does not fit, truncate gives one whose low byte is 0, as truncate_to_int's.
    const VecF code = as_signed_byte(x[i] * inverse + (kHalf + 0.5f));
    codes[i] = lesser(code, broadcast(2 * kHalf - 1));
  }
  return scale;
}

struct LanesScaleAndMin {
  VecF scale, min;
};

template <int kCount, int kMaxCode>
LanesScaleAndMin scale_by_range(const VecF* x, VecF* codes) {
  VecF min = broadcast(std::numeric_limits<float>::max());
  VecF max = broadcast(-std::numeric_limits<float>::max());
  for (int i = 0; i < kCount; ++i) {
    min = lesser(x[i], min);
    max = greater(x[i], max);
  }
  const VecF scale = (max - min) / broadcast(kMaxCode);
  const VecF inverse = reciprocal_or_zero(scale);
  for (int i = 0; i < kCount; ++i) {
    const VecF code = to_float(truncate((x[i] - min) * inverse + 0.5f));
    codes[i] = lesser(code, broadcast(kMaxCode));
  }
  return {scale, min};
}

struct LanesMoments {
  VecF xq = zero(), qq = zero();

  void add(VecF weight, VecF x, VecF q) {
    xq = xq + weight * x * q;
    qq = qq + weight * q * q;
  }
};

template <int kCount, int kHalf>
VecF fit_symmetric(const VecF* x, const VecF* weights, VecF* codes) {
  const VecF extreme = find_extreme<kCount>(x);
  const Mask negligible = less(magnitude(extreme), broadcast(kNegligible));
  const auto code_of = [&](VecF inverse, int i) {
    return round_between<-kHalf, kHalf - 1>(inverse * x[i]);
  };
  const auto try_inverse = [&](VecF inverse) {
    LanesMoments moments;
    for (int i = 0; i < kCount; ++i) moments.add(weights[i], x[i], code_of(inverse, i));
    return moments;
  };

  VecF best_inverse = broadcast(-kHalf) / extreme;
  LanesMoments moments = try_inverse(best_inverse);
  VecF scale = zero_unless(not_equal(moments.qq, zero()), moments.xq / moments.qq);
  VecF best = scale * moments.xq;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    const VecF inverse = broadcast(-(kHalf + 0.1f * step)) / extreme;
    moments = try_inverse(inverse);
    const Mask better =
        both(less(zero(), moments.qq), less(best * moments.qq, moments.xq * moments.xq));
    scale = select(better, moments.xq / moments.qq, scale);
    best = select(better, scale * moments.xq, best);
    best_inverse = select(better, inverse, best_inverse);
  }
  for (int i = 0; i < kCount; ++i) {
    codes[i] = select(negligible, zero(), code_of(best_inverse, i) + kHalf);
  }
  return select(negligible, zero(), scale);
}

// A lane that a round leaves as it was is left so by the next rounds, too.
template <int kCount, int kMin, int kMax>
void refine_codes(const VecF* x, const VecF* weights, VecF* codes, LanesMoments& moments) {
  for (int round = 0; round < 5; ++round) {
    bool changed = false;
    for (int i = 0; i < kCount; ++i) {
      LanesMoments others;
      others.xq = moments.xq - weights[i] * x[i] * codes[i];
      others.qq = moments.qq - weights[i] * codes[i] * codes[i];
      Mask better = less(zero(), others.xq);
      if (kMin >= 0) better = both(better, less(zero(), others.qq));
      const VecF exact = x[i] * others.qq / others.xq;
      const VecF code = kMin < 0 ? round_between<kMin, kMax>(exact) : round_below<kMax>(exact);
      better = both(better, not_equal(code, codes[i]));
      others.add(weights[i], x[i], code);
      better = both(better, less(zero(), others.qq));
      better = both(better,
                    less(moments.xq * moments.xq * others.qq, others.xq * others.xq * moments.qq));
      if (!any(better)) continue;
      codes[i] = select(better, kMin < 0 ? code : as_byte(code), codes[i]);
      moments.xq = select(better, others.xq, moments.xq);
      moments.qq = select(better, others.qq, moments.qq);
      changed = true;
    }
    if (!changed) return;
  }
}

template <int kCount, int kMaxCode>
VecF fit_nonnegative(const VecF* x, const VecF* weights, VecF* codes) {
  VecF max = zero();
  for (int i = 0; i < kCount; ++i) max = greater(max, x[i]);
  const Mask negligible = less(max, broadcast(kNegligible));
  const auto error_of = [&](VecF inverse, bool wrapped) {
    const VecF scale = broadcast(1.0f) / inverse;
    VecF error = zero();
    for (int i = 0; i < kCount; ++i) {
      VecF code = round_below<kMaxCode>(inverse * x[i]);
      if (wrapped) code = as_byte(code);
      const VecF difference = x[i] - scale * code;
      error = error + weights[i] * difference * difference;
    }
    return error;
  };
  VecF inverse = broadcast(kMaxCode) / max;
  VecF least_error = error_of(inverse, true);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const VecF other_inverse = broadcast(0.1f * step + kMaxCode) / max;
    const VecF error = error_of(other_inverse, false);
    const Mask better = less(error, least_error);
    least_error = select(better, error, least_error);
    inverse = select(better, other_inverse, inverse);
  }
  LanesMoments moments;
  for (int i = 0; i < kCount; ++i) {
    const VecF code = round_below<kMaxCode>(inverse * x[i]);
    codes[i] = as_byte(code);
    moments.add(weights[i], x[i], code);
  }
  refine_codes<kCount, 0, kMaxCode>(x, weights, codes, moments);
  for (int i = 0; i < kCount; ++i) codes[i] = select(negligible, zero(), codes[i]);
  const VecF scale = zero_unless(less(zero(), moments.qq), moments.xq / moments.qq);
  return select(negligible, zero(), scale);
}

template <int kCount, int kMaxCode, ErrorNorm kNorm = ErrorNorm::kSquared>
LanesScaleAndMin fit_with_min(const VecF* x, const VecF* weights, const RangeGrid& grid,
                              VecF* codes) {
  VecF min = x[0], max = x[0];
  VecF sum_w = weights[0], sum_wx = sum_w * x[0];
  for (int i = 1; i < kCount; ++i) {
    min = lesser(x[i], min);
    max = greater(x[i], max);
    sum_w = sum_w + weights[i];
    sum_wx = sum_wx + weights[i] * x[i];
  }
  min = select(less(zero(), min), zero(), min);
  const Mask flat = less_equal(max, min);

  VecF candidate[kCount];
  const auto encode = [&](VecF inverse, VecF origin) {
    for (int i = 0; i < kCount; ++i) {
      candidate[i] = round_between<0, kMaxCode>(inverse * (x[i] - origin));
    }
  };
  const auto error_of = [&](const LanesScaleAndMin& fit) {
    VecF error = zero();
    for (int i = 0; i < kCount; ++i) {
      const VecF difference = fit.scale * candidate[i] + fit.min - x[i];
      error = error + weights[i] * (kNorm == ErrorNorm::kAbsolute ? magnitude(difference)
                                                                  : difference * difference);
    }
    return error;
  };

  // What gave the best candidate its codes: they are made again at the end.
  VecF best_inverse = broadcast(kMaxCode) / (max - min), best_origin = min;
  LanesScaleAndMin best = {broadcast(1.0f) / best_inverse, min};
  encode(best_inverse, best_origin);
  VecF least_error = error_of(best);
  for (int s = 0; s <= grid.last; ++s) {
    const VecF inverse = broadcast(grid.first + grid.step * s + kMaxCode) / (max - best.min);
    encode(inverse, best.min);
    VecF sum_wq = zero(), sum_wqq = zero(), sum_wqx = zero();
    for (int i = 0; i < kCount; ++i) {
      const VecF wq = weights[i] * candidate[i];
      sum_wq = sum_wq + wq;
      sum_wqq = sum_wqq + wq * candidate[i];
      sum_wqx = sum_wqx + wq * x[i];
    }
    const VecF determinant = sum_w * sum_wqq - sum_wq * sum_wq;
    LanesScaleAndMin fit = {(sum_w * sum_wqx - sum_wx * sum_wq) / determinant,
                            (sum_wqq * sum_wx - sum_wq * sum_wqx) / determinant};
    const Mask positive = less(zero(), fit.min);
    fit.scale = select(positive, sum_wqx / sum_wqq, fit.scale);
    fit.min = select(positive, zero(), fit.min);
    const VecF error = error_of(fit);
    const Mask better = both(less(zero(), determinant), less(error, least_error));
    least_error = select(better, error, least_error);
    best_inverse = select(better, inverse, best_inverse);
    best_origin = select(better, best.min, best_origin);
    best.scale = select(better, fit.scale, best.scale);
    best.min = select(better, fit.min, best.min);
  }
  encode(best_inverse, best_origin);
  for (int i = 0; i < kCount; ++i) codes[i] = select(flat, zero(), candidate[i]);
  return {select(flat, zero(), best.scale), select(flat, min, best.min)};
}

template <int kCount, int kMaxCode>
VecF scale_by_max(const VecF* x, VecF* codes) {
  VecF max = zero();
  for (int i = 0; i < kCount; ++i) max = greater(x[i], max);
  const VecF inverse = zero_unless(less(zero(), max), broadcast(kMaxCode) / max);
  for (int i = 0; i < kCount; ++i) {
    codes[i] = lesser(as_byte(round_unlimited(inverse * x[i])), broadcast(kMaxCode));
  }
  return max / broadcast(kMaxCode);
}

// ---- blocks ------------------------------------------------------------------------------------

// The blocks of the lanes. Without importance its addresses are null.
struct Lanes {
  const float* x[kLanes];
  const float* importance[kLanes];
  VecF variance;  // of the blocks' rows; only where there is importance, and for blocks of 32
};

template <int kCount>
void load_lanes(const float* const* from, int64_t at, VecF* to) {
  for (int i = 0; i < kCount; i += 4) {
    for (int r = 0; r < 4; ++r) to[i + r] = load_fours(from + r, at + i);
    transpose_4x4(to + i);
  }
}

// The lowest bytes of the codes: those of a lane to `to` and on, the next lane's `stride` further.
template <int kCount>
void store_codes(const VecF* codes, uint8_t* to, int64_t stride) {
  for (int i = 0; i < kCount; i += 16) {
    VecF words[4];
    for (int j = 0; j < 4; ++j) {
      const VecF* four = codes + i + 4 * j;
      words[j] = as_floats(bytes_to_words(truncate(four[0]), truncate(four[1]), truncate(four[2]),
                                          truncate(four[3])));
    }
    transpose_4x4(words);
    for (int r = 0; r < 4; ++r) store_fours(words[r], to + r * stride + i, stride);
  }
}

// [lane][i] numbers of vectors.
template <int kCount, class T>
void store_lanes(const VecF* values, T (*to)[kCount]) {
  for (int i = 0; i < kCount; ++i) {
    float of_lane[kLanes];
    store(of_lane, values[i]);
    for (int lane = 0; lane < kLanes; ++lane) to[lane][i] = static_cast<T>(of_lane[lane]);
  }
}

template <class Format>
void quantize_symmetric_blocks(const Lanes& lanes, typename Format::Block* blocks) {
  constexpr int kHalf = Format::kOffset;
  VecF x[32], codes[32], scale;
  load_lanes<32>(lanes.x, 0, x);
  if (lanes.importance[0] == nullptr) {
    scale = scale_by_extreme<32, kHalf>(x, codes);
  } else {
    VecF weights[32];
    load_lanes<32>(lanes.importance, 0, weights);
    weigh_by_importance<32>(x, lanes.variance, weights);
    scale = fit_symmetric<32, kHalf>(x, weights, codes);
  }
  uint8_t bytes[kLanes][32];
  float scales[kLanes];
  store_codes<32>(codes, bytes[0], 32);
  store(scales, scale);
  for (int lane = 0; lane < kLanes; ++lane) Format::pack(bytes[lane], scales[lane], blocks[lane]);
}

template <class Format>
void quantize_blocks_with_min(const Lanes& lanes, typename Format::Block* blocks) {
  constexpr int kMaxCode = (1 << Format::kCodeBits) - 1;
  VecF x[32], codes[32];
  LanesScaleAndMin fit;
  load_lanes<32>(lanes.x, 0, x);
  if (lanes.importance[0] == nullptr) {
    fit = scale_by_range<32, kMaxCode>(x, codes);
  } else {
    VecF weights[32];
    load_lanes<32>(lanes.importance, 0, weights);
    weigh_by_importance<32>(x, lanes.variance, weights);
    fit = fit_with_min<32, kMaxCode>(x, weights, kImportanceGrid, codes);
  }
  uint8_t bytes[kLanes][32];
  float scales[kLanes], mins[kLanes];
  store_codes<32>(codes, bytes[0], 32);
  store(scales, fit.scale);
  store(mins, fit.min);
  for (int lane = 0; lane < kLanes; ++lane) {
    Format::pack(bytes[lane], scales[lane], mins[lane], blocks[lane]);
  }
}

inline void quantize_q8_0_blocks(const Lanes& lanes, Q8_0::Block* blocks) {
  VecF x[32], codes[32];
  load_lanes<32>(lanes.x, 0, x);
  const VecF scale = magnitude(find_extreme<32>(x)) / broadcast(127);
  const VecF inverse = reciprocal_or_zero(scale);
  for (int i = 0; i < 32; ++i) {
    // Truncating rounds halves away from zero once the float below a half has been added.
    const VecF value = x[i] * inverse;
    codes[i] = value + with_sign_of(broadcast(0x1.fffffep-2f), value);
  }
  uint8_t bytes[kLanes][32];
  uint16_t d[kLanes];
  store_codes<32>(codes, bytes[0], 32);
  store_half(d, scale);
  for (int lane = 0; lane < kLanes; ++lane) {
    blocks[lane].d = d[lane];
    std::memcpy(blocks[lane].qs, bytes[lane], 32);
  }
}

// Codes of the elements of a group under the scale that the block can hold, in the place of those
// of the search, which stay where that scale is zero.
template <int kElems>
void store_recoded(const VecF* codes, VecF scale, uint8_t (*to)[256], int group) {
  if (!any(equal(scale, zero()))) return store_codes<kElems>(codes, to[0] + kElems * group, 256);
  uint8_t bytes[kLanes][kElems];
  float scales[kLanes];
  store_codes<kElems>(codes, bytes[0], kElems);
  store(scales, scale);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (scales[lane] != 0) std::memcpy(to[lane] + kElems * group, bytes[lane], kElems);
  }
}

template <int kElems, int kHalf>
void recode_symmetric(const VecF* x, VecF scale, uint8_t (*to)[256], int group) {
  VecF codes[kElems];
  for (int i = 0; i < kElems; ++i) {
    codes[i] = round_between<-kHalf, kHalf - 1>(x[i] / scale) + kHalf;
  }
  store_recoded<kElems>(codes, scale, to, group);
}

template <class Format>
void quantize_k_blocks_with_mins(const Lanes& lanes, typename Format::Block* blocks) {
  using Search = typename Format::Search;
  constexpr int kGroups = Search::kGroups, kElems = 256 / kGroups;
  constexpr int kMaxCode = Search::kMaxCode, kMaxScale = Search::kMaxScale;
  const bool weighted = lanes.importance[0] != nullptr;
  VecF x[256], scales[kGroups], mins[kGroups], weight_sums[kGroups];
  uint8_t bytes[kLanes][256];
  load_lanes<256>(lanes.x, 0, x);
  const VecF variance =
      weighted ? broadcast(Search::kVarianceFactor) * sum_squares<256>(x) / broadcast(256) : zero();
  for (int g = 0; g < kGroups; ++g) {
    const VecF* group = x + kElems * g;
    VecF weights[kElems], codes[kElems];
    LanesScaleAndMin fit;
    if (weighted) {
      load_lanes<kElems>(lanes.importance, kElems * g, weights);
      weigh_by_importance<kElems>(group, variance, weights);
      fit = fit_with_min<kElems, kMaxCode>(group, weights, kImportanceGrid, codes);
    } else {
      const VecF base = Search::kPlainWeightsAddRms
                            ? square_root(sum_squares<kElems>(group) / broadcast(kElems))
                            : zero();
      for (int i = 0; i < kElems; ++i) weights[i] = base + magnitude(group[i]);
      fit = fit_with_min<kElems, kMaxCode, Search::kPlainNorm>(group, weights, Search::kPlainGrid,
                                                               codes);
    }
    scales[g] = fit.scale;
    mins[g] = -fit.min;
    weight_sums[g] = sum_weights<kElems>(weights);
    store_codes<kElems>(codes, bytes[0] + kElems * g, 256);
  }

  VecF scale_codes[kGroups], min_codes[kGroups], d, dmin;
  if (weighted) {
    d = fit_nonnegative<kGroups, kMaxScale>(scales, weight_sums, scale_codes);
    dmin = fit_nonnegative<kGroups, kMaxScale>(mins, weight_sums, min_codes);
  } else {
    d = scale_by_max<kGroups, kMaxScale>(scales, scale_codes);
    dmin = scale_by_max<kGroups, kMaxScale>(mins, min_codes);
  }
  uint16_t d_bits[kLanes], dmin_bits[kLanes];
  store_half(d_bits, d);
  store_half(dmin_bits, dmin);
  uint8_t scale_bytes[kLanes][kGroups], min_bytes[kLanes][kGroups];
  store_lanes<kGroups>(scale_codes, scale_bytes);
  store_lanes<kGroups>(min_codes, min_bytes);
  float stored_scales[kGroups][kLanes], stored_mins[kGroups][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    blocks[lane].d = d_bits[lane];
    blocks[lane].dmin = dmin_bits[lane];
    Search::pack_scales(scale_bytes[lane], min_bytes[lane], blocks[lane].scales);
    Search::unpack_scales(blocks[lane].scales, scale_bytes[lane], min_bytes[lane]);
    for (int g = 0; g < kGroups; ++g) {
      stored_scales[g][lane] = scale_bytes[lane][g];
      stored_mins[g][lane] = min_bytes[lane][g];
    }
  }

  d = load_half(d_bits);
  dmin = load_half(dmin_bits);
  for (int g = 0; g < kGroups; ++g) {
    const VecF scale = d * load(stored_scales[g]), min = dmin * load(stored_mins[g]);
    VecF codes[kElems];
    for (int i = 0; i < kElems; ++i) {
      codes[i] = round_between<0, kMaxCode>((x[kElems * g + i] + min) / scale);
    }
    store_recoded<kElems>(codes, scale, bytes, g);
  }
  for (int lane = 0; lane < kLanes; ++lane) Format::pack(bytes[lane], blocks[lane]);
}

// Q3_K::fit_group.
inline VecF fit_q3_k_group(const VecF* x, VecF* codes) {
  const VecF extreme = find_extreme<16>(x);
  const Mask negligible = less(magnitude(extreme), broadcast(kNegligible));
  const VecF inverse = broadcast(-4) / extreme;
  VecF weights[16];
  LanesMoments moments;
  for (int i = 0; i < 16; ++i) {
    weights[i] = x[i] * x[i];
    codes[i] = round_between<-4, 3>(inverse * x[i]);
    moments.add(weights[i], x[i], codes[i]);
  }
  refine_codes<16, -4, 3>(x, weights, codes, moments);
  for (int i = 0; i < 16; ++i) codes[i] = select(negligible, zero(), codes[i] + 4.0f);
  const VecF scale = zero_unless(less(zero(), moments.qq), moments.xq / moments.qq);
  return select(negligible, zero(), scale);
}

inline void quantize_q3_k_blocks(const Lanes& lanes, Q3_K::Block* blocks) {
  const bool weighted = lanes.importance[0] != nullptr;
  VecF x[256], scales[16], scale_codes[16], d;
  uint8_t bytes[kLanes][256];
  load_lanes<256>(lanes.x, 0, x);
  if (weighted) {
    const VecF variance = broadcast(2) * sum_squares<256>(x) / broadcast(256);
    VecF weight_sums[16];
    for (int g = 0; g < 16; ++g) {
      VecF weights[16], codes[16];
      load_lanes<16>(lanes.importance, 16 * g, weights);
      weigh_by_importance<16>(x + 16 * g, variance, weights);
      weight_sums[g] = sum_weights<16>(weights);
      scales[g] = fit_symmetric<16, 4>(x + 16 * g, weights, codes);
      store_codes<16>(codes, bytes[0] + 16 * g, 256);
    }
    d = fit_symmetric<16, 32>(scales, weight_sums, scale_codes);
  } else {
    for (int g = 0; g < 16; ++g) {
      VecF codes[16];
      scales[g] = fit_q3_k_group(x + 16 * g, codes);
      store_codes<16>(codes, bytes[0] + 16 * g, 256);
    }
    const VecF extreme = find_extreme<16>(scales);
    const Mask any_scale = not_equal(extreme, zero());
    const VecF inverse = broadcast(-32) / extreme;
    for (int g = 0; g < 16; ++g) {
      const VecF code = as_signed_byte(round_unlimited(inverse * scales[g]));
      const VecF limited = lesser(greater(code, broadcast(-32)), broadcast(31));
      scale_codes[g] = zero_unless(any_scale, limited + 32.0f);
    }
    d = zero_unless(any_scale, broadcast(1.0f) / inverse);
  }
  uint16_t d_bits[kLanes];
  store_half(d_bits, d);
  d = load_half(d_bits);
  for (int g = 0; g < 16; ++g) {
    recode_symmetric<16, 4>(x + 16 * g, d * (scale_codes[g] - 32.0f), bytes, g);
  }
  uint8_t scale_bytes[kLanes][16];
  store_lanes<16>(scale_codes, scale_bytes);
  for (int lane = 0; lane < kLanes; ++lane) {
    blocks[lane].d = d_bits[lane];
    pack_6bit_scales(scale_bytes[lane], blocks[lane].scales);
    Q3_K::pack(bytes[lane], blocks[lane]);
  }
}

inline void quantize_q6_k_blocks(const Lanes& lanes, Q6_K::Block* blocks) {
  const bool weighted = lanes.importance[0] != nullptr;
  VecF x[256], scales[16], scale_codes[16];
  uint8_t bytes[kLanes][256];
  load_lanes<256>(lanes.x, 0, x);
  for (int g = 0; g < 16; ++g) {
    const VecF* group = x + 16 * g;
    VecF weights[16], codes[16];
    if (weighted) {
      load_lanes<16>(lanes.importance, 16 * g, weights);
    } else {
      for (int i = 0; i < 16; ++i) weights[i] = group[i] * group[i];
    }
    scales[g] = fit_symmetric<16, 32>(group, weights, codes);
    store_codes<16>(codes, bytes[0] + 16 * g, 256);
  }
  const VecF extreme = find_extreme<16>(scales);
  const VecF inverse = broadcast(-128) / extreme;
  uint16_t d_bits[kLanes];
  store_half(d_bits, broadcast(1.0f) / inverse);
  const VecF d = load_half(d_bits);
  for (int g = 0; g < 16; ++g) {
    scale_codes[g] = as_signed_byte(round_below<127>(inverse * scales[g]));
    recode_symmetric<16, 32>(x + 16 * g, d * scale_codes[g], bytes, g);
  }
  int8_t scale_bytes[kLanes][16];
  float extremes[kLanes];
  store_lanes<16>(scale_codes, scale_bytes);
  store(extremes, extreme);
  for (int lane = 0; lane < kLanes; ++lane) {
    Q6_K::Block& block = blocks[lane];
    if (std::fabs(extremes[lane]) < kNegligible) {
      std::memset(&block, 0, sizeof(block));
      continue;
    }
    block.d = d_bits[lane];
    std::memcpy(block.scales, scale_bytes[lane], 16);
    Q6_K::pack(bytes[lane], block);
  }
}

// ---- rows --------------------------------------------------------------------------------------

// The mean squares of up to kLanes rows of n floats.
inline void row_variances(const float* x, int64_t rows, int64_t n, float* out) {
  const float* from[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) from[r] = x + min(r, rows - 1) * n;
  VecF sum = zero();
  for (int64_t i = 0; i < n; i += 32) {
    VecF values[32];
    load_lanes<32>(from, i, values);
    for (int j = 0; j < 32; ++j) sum = sum + values[j] * values[j];
  }
  store(out, sum / broadcast(static_cast<float>(n)));
}

// Asks for what the lanes read next, `elems` floats from x on: they read a little of each block in
// turn, which the CPU's own prefetching does not foresee.
inline void prefetch_blocks(const float* x, int64_t elems) {
  constexpr int64_t kLineElems = 64 / sizeof(float);
  for (int64_t i = 0; i < elems; i += kLineElems) __builtin_prefetch(x + i);
}

// Blocks go to the lanes in the order in which they lie, across the ends of rows. Lanes past the
// last block repeat it.
template <class Format, void (*kQuantizeBlocks)(const Lanes&, typename Format::Block*)>
void quantize_rows(const float* x, const float* importance, void* blocks, int64_t rows, int64_t n) {
  using Block = typename Format::Block;
  constexpr int64_t kElems = Format::kBlockElems;
  auto* to = static_cast<Block*>(blocks);
  for (int64_t first = 0; first < rows; first += kLanes, x += kLanes * n) {
    const int64_t some_rows = min(kLanes, rows - first);
    float variances[kLanes];
    const bool with_variances = importance != nullptr && kElems == 32;
    if (with_variances) row_variances(x, some_rows, n, variances);
    const int64_t count = some_rows * (n / kElems);
    int64_t row = 0, column = 0;  // of the next block
    for (int64_t start = 0; start < count; start += kLanes) {
      const int64_t valid = min(kLanes, count - start);
      if (start + 2 * kLanes <= count)
        prefetch_blocks(x + (start + kLanes) * kElems, kLanes * kElems);
      Lanes lanes;
      float lane_variances[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lanes.x[lane] = x + min(start + lane, count - 1) * kElems;
        lanes.importance[lane] = importance == nullptr ? nullptr : importance + column;
        lane_variances[lane] = with_variances ? variances[row] : 0;
        if (start + lane + 1 < count && (column += kElems) == n) column = 0, ++row;
      }
      lanes.variance = load(lane_variances);
      if (valid == kLanes) {
        kQuantizeBlocks(lanes, to);
      } else {
        Block made[kLanes];
        kQuantizeBlocks(lanes, made);
        std::memcpy(to, made, valid * sizeof(Block));
      }
      to += valid;
    }
  }
}

// A format that is not here is quantised by its quantize_row.
template <class Format>
constexpr QuantizeRows kQuantizeRows = nullptr;
template <>
constexpr QuantizeRows kQuantizeRows<Q4_0> = quantize_rows<Q4_0, quantize_symmetric_blocks<Q4_0>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q5_0> = quantize_rows<Q5_0, quantize_symmetric_blocks<Q5_0>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q4_0_F32> =
    quantize_rows<Q4_0_F32, quantize_symmetric_blocks<Q4_0_F32>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q4_1> = quantize_rows<Q4_1, quantize_blocks_with_min<Q4_1>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q5_1> = quantize_rows<Q5_1, quantize_blocks_with_min<Q5_1>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q8_0> = quantize_rows<Q8_0, quantize_q8_0_blocks>;
template <>
constexpr QuantizeRows kQuantizeRows<Q2_K> = quantize_rows<Q2_K, quantize_k_blocks_with_mins<Q2_K>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q3_K> = quantize_rows<Q3_K, quantize_q3_k_blocks>;
template <>
constexpr QuantizeRows kQuantizeRows<Q4_K> = quantize_rows<Q4_K, quantize_k_blocks_with_mins<Q4_K>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q5_K> = quantize_rows<Q5_K, quantize_k_blocks_with_mins<Q5_K>>;
template <>
constexpr QuantizeRows kQuantizeRows<Q6_K> = quantize_rows<Q6_K, quantize_q6_k_blocks>;

constexpr torch_q4::cpu::Quantizers quantizer_table() {
#define TORCH_Q4_ENTRY(Format) kQuantizeRows<Format>,
  return {{TORCH_Q4_FORMATS(TORCH_Q4_ENTRY)}};
#undef TORCH_Q4_ENTRY
}

}  // namespace
}  // namespace TORCH_Q4_NAMESPACE
