// Q6_K: 256 elements in 210 bytes, sixteen groups of 16 with 8-bit signed scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

struct Q6_K {
  // Layout: ggml-common.h, block_q6_K. Of each 128 elements, 64 bytes of ql hold the low four bits
  // (byte i: elements i and i + 64), 32 bytes of qh the top two (byte i: elements i, i + 32, i + 64
  // and i + 96, lowest bits first).
  struct Block {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;  // scale of the groups' scales
  };
  static_assert(sizeof(Block) == 210);

  static constexpr const char* kName = "q6_k";
  static constexpr int kTypeId = 14;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 6;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = 32;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    for (int g = 0; g < 16; ++g) scales[g] = d * block.scales[g];
    for (int half = 0; half < 2; ++half) {
      const uint8_t* low = block.ql + 64 * half;
      const uint8_t* top = block.qh + 32 * half;
      uint8_t* out = codes + 128 * half;
      for (int i = 0; i < 32; ++i) out[i] = (low[i] & 0xF) | (top[i] << 4 & 48);
      for (int i = 0; i < 32; ++i) out[i + 32] = (low[i + 32] & 0xF) | (top[i] << 2 & 48);
      for (int i = 0; i < 32; ++i) out[i + 64] = (low[i] >> 4) | (top[i] & 48);
      for (int i = 0; i < 32; ++i) out[i + 96] = (low[i + 32] >> 4) | (top[i] >> 2 & 48);
    }
  }

  static constexpr Chunk kChunks[] = {
      {0, 16},   {16, 16},  {32, 16},  {48, 16}, {64, 16}, {80, 16}, {96, 16}, {112, 16}, {128, 16},
      {144, 16}, {160, 16}, {176, 16}, {192, 4}, {196, 4}, {200, 4}, {204, 4}, {208, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto line = rows.line(segment / 8 * 4 + segment % 4);
    const auto low = segment / 4 % 2 == 0 ? line & 0xF : line >> 4;
    const auto top = rows.line(8 + segment / 8 * 2 + segment % 2) >> segment / 2 % 4 * 2 & 3;
    return low | top << 4;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    float d[16];
    rows.halves(16, d);
    for (int g = 0; g < 16; ++g) {
      const auto word = rows.words(12 + g / 4);
      for (int r = 0; r < 16; ++r) {
        // Signed bytes: to the top of the word, then down again with the sign.
        const int32_t scale = static_cast<int32_t>(word[r] << (24 - g % 4 * 8)) >> 24;
        scales[g][r] = d[r] * static_cast<float>(scale);
      }
    }
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int part, float* scales,
                                               float* /*shifts*/) {
    const float d = row.template half<16>();
    const uint32_t low = part < 2 ? row.template word<12>() : row.template word<14>();
    const uint32_t high = part < 2 ? row.template word<13>() : row.template word<15>();
    for (int i = 0; i < 4; ++i) {
      const uint32_t bytes = (i < 2 ? low : high) >> part % 2 * 8 ^ 0x00800080;
      scales[i] = d * (byte_to_float(bytes, i % 2 * 2) - 128);
    }
  }

  static void pack(const uint8_t* codes, Block& block) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* in = codes + 128 * half;
      for (int i = 0; i < 64; ++i) {
        block.ql[64 * half + i] = (in[i] & 0xF) | (in[i + 64] & 0xF) << 4;
      }
      for (int i = 0; i < 32; ++i) {
        block.qh[32 * half + i] =
            (in[i] >> 4) | (in[i + 32] >> 4) << 2 | (in[i + 64] >> 4) << 4 | (in[i + 96] >> 4) << 6;
      }
    }
  }

  // Importance replaces the squares of the elements as weights, as it is.
  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      uint8_t codes[256];
      float scales[16];
      for (int g = 0; g < 16; ++g) {
        const float* group = x + start + 16 * g;
        float weights[16];
        for (int i = 0; i < 16; ++i) {
          weights[i] = importance ? importance[start + 16 * g + i] : group[i] * group[i];
        }
        scales[g] = fit_symmetric<16, 32>(group, weights, codes + 16 * g);
      }
      const float extreme = find_extreme<16>(scales);
      if (std::fabs(extreme) < kNegligible) {
        std::memset(&block, 0, sizeof(block));
        continue;
      }
      const float inverse = -128 / extreme;
      block.d = float_to_half(1 / inverse);
      for (int g = 0; g < 16; ++g) {
        block.scales[g] = static_cast<int8_t>(std::min(127, round_to_int(inverse * scales[g])));
        const float scale = half_to_float(block.d) * block.scales[g];
        recode_symmetric<16, 32>(x + start + 16 * g, scale, codes + 16 * g);
      }
      pack(codes, block);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
