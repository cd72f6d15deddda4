// Q3_K: 256 elements in 110 bytes, sixteen groups of 16 with 6-bit signed scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_256.h"
#include "scales.h"

namespace TORCH_Q4_NAMESPACE {

struct Q3_K {
  // Layout: ggml-common.h, block_q3_K. Byte i of each 32 of qs holds the low two bits of elements
  // i, i + 32, i + 64 and i + 96 of 128; bit b of hmask[i] is the third bit of element 32 b + i.
  struct Block {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;  // scale of the groups' scales
  };
  static_assert(sizeof(Block) == 110);

  static constexpr const char* kName = "q3_k";
  static constexpr int kTypeId = 11;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 3;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = 4;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    uint8_t group_scale[16];
    unpack_6bit_scales(block.scales, group_scale);
    for (int g = 0; g < 16; ++g) scales[g] = d * (group_scale[g] - 32);
    const uint8_t* low = block.qs;
    const uint8_t* top = block.hmask;
    // Written out because a compiler vectorises byte shifts only by constants.
    for (int i = 0; i < 32; ++i) codes[i] = (low[i] & 3) | (top[i] << 2 & 4);
    for (int i = 0; i < 32; ++i) codes[i + 32] = (low[i] >> 2 & 3) | (top[i] << 1 & 4);
    for (int i = 0; i < 32; ++i) codes[i + 64] = (low[i] >> 4 & 3) | (top[i] & 4);
    for (int i = 0; i < 32; ++i) codes[i + 96] = (low[i] >> 6) | (top[i] >> 1 & 4);
    low += 32;
    for (int i = 0; i < 32; ++i) codes[i + 128] = (low[i] & 3) | (top[i] >> 2 & 4);
    for (int i = 0; i < 32; ++i) codes[i + 160] = (low[i] >> 2 & 3) | (top[i] >> 3 & 4);
    for (int i = 0; i < 32; ++i) codes[i + 192] = (low[i] >> 4 & 3) | (top[i] >> 4 & 4);
    for (int i = 0; i < 32; ++i) codes[i + 224] = (low[i] >> 6) | (top[i] >> 5 & 4);
  }

  static constexpr Chunk kChunks[] = {{32, 16}, {48, 16}, {64, 16}, {80, 16}, {0, 16},
                                      {16, 16}, {96, 4},  {100, 4}, {104, 4}, {108, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto low = rows.line(segment / 8 * 2 + segment % 2) >> segment / 2 % 4 * 2 & 3;
    const auto top = rows.line(4 + segment % 2) >> segment / 2 & 1;
    return low | top << 2;
  }

  // The words are those of unpack_6bit_scales: low nibbles in two, top bit pairs in the third.
  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    float d[16];
    rows.halves(9, d);
    const auto tops = rows.words(8);
    for (int g = 0; g < 16; ++g) {
      const auto lows = rows.words(6 + g / 4 % 2);
      const int bit = g % 4 * 8;
      for (int r = 0; r < 16; ++r) {
        const uint32_t low = lows[r] >> (bit + g / 8 * 4) & 0xF;
        const uint32_t top = tops[r] >> (bit + g / 4 * 2) & 3;
        scales[g][r] = d[r] * static_cast<float>(static_cast<int>(low | top << 4) - 32);
      }
    }
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int part, float* scales,
                                               float* /*shifts*/) {
    const float d = row.template half<9>();
    const int bit = part % 2 * 8 + part / 2 * 4;
    const uint32_t tops = row.template word<8>() >> bit;
    for (int i = 0; i < 4; ++i) {
      const uint32_t lows = (i < 2 ? row.template word<6>() : row.template word<7>()) >> bit;
      const uint32_t codes = (lows & 0x000F000F) | (tops >> i / 2 * 2 & 0x00030003) << 4;
      scales[i] = d * (byte_to_float(codes, i % 2 * 2) - 32);
    }
  }

  static void pack(const uint8_t* codes, Block& block) {
    pack_2bit(codes, block.qs);
    for (int i = 0; i < 32; ++i) {
      block.hmask[i] = 0;
      for (int b = 0; b < 8; ++b) block.hmask[i] |= codes[32 * b + i] >> 2 << b;
    }
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      uint8_t codes[256], group_scale[16];
      block.d =
          float_to_half(importance == nullptr
                            ? fit_plain(x + start, codes, group_scale)
                            : fit_by_importance(x + start, importance + start, codes, group_scale));
      pack_6bit_scales(group_scale, block.scales);
      for (int g = 0; g < 16; ++g) {
        const float scale = half_to_float(block.d) * (group_scale[g] - 32);
        recode_symmetric<16, 4>(x + start + 16 * g, scale, codes + 16 * g);
      }
      pack(codes, block);
    }
  }

 private:
  // Both return d and give codes to the elements and to the groups' scales.
  static float fit_by_importance(const float* x, const float* importance, uint8_t* codes,
                                 uint8_t* group_scale) {
    const float variance = 2 * sum_squares(x, 256) / 256;
    float scales[16], weight_sums[16];
    for (int g = 0; g < 16; ++g) {
      float weights[16];
      weigh_by_importance<16>(x + 16 * g, importance + 16 * g, variance, weights);
      weight_sums[g] = sum_weights<16>(weights);
      scales[g] = fit_symmetric<16, 4>(x + 16 * g, weights, codes + 16 * g);
    }
    return fit_symmetric<16, 32>(scales, weight_sums, group_scale);
  }

  static float fit_plain(const float* x, uint8_t* codes, uint8_t* group_scale) {
    float scales[16];
    for (int g = 0; g < 16; ++g) scales[g] = fit_group(x + 16 * g, codes + 16 * g);
    const float extreme = find_extreme<16>(scales);
    if (extreme == 0) {
      std::fill_n(group_scale, 16, uint8_t{0});
      return 0;
    }
    const float inverse = -32 / extreme;
    for (int g = 0; g < 16; ++g) {
      const int code = static_cast<int8_t>(round_to_int(inverse * scales[g]));
      group_scale[g] = static_cast<uint8_t>(std::clamp(code, -32, 31) + 32);
    }
    return 1 / inverse;
  }

  // Minimises sum x^2 (x - scale * (code - 4))^2 by coordinate descent from the scale that maps the
  // extreme element to -4. Returns the scale.
  static float fit_group(const float* x, uint8_t* codes) {
    const float extreme = find_extreme<16>(x);
    if (std::fabs(extreme) < kNegligible) {
      std::fill_n(codes, 16, uint8_t{0});
      return 0;
    }
    const float inverse = -4 / extreme;
    float weights[16];
    int8_t signed_codes[16];
    Moments moments;
    for (int i = 0; i < 16; ++i) {
      weights[i] = x[i] * x[i];
      signed_codes[i] = static_cast<int8_t>(std::clamp(round_to_int(inverse * x[i]), -4, 3));
      moments.add(weights[i], x[i], signed_codes[i]);
    }
    refine_codes<16, -4, 3>(x, weights, signed_codes, moments);
    for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>(signed_codes[i] + 4);
    return moments.qq > 0 ? moments.xq / moments.qq : 0;
  }
};

}  // namespace TORCH_Q4_NAMESPACE
