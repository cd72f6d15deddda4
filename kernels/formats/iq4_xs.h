// IQ4_XS: 256 elements in 136 bytes, eight groups of 32 with 6-bit signed scales, 4-bit indices
// into a codebook.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"
#include "iq4.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ4_XS {
  // Layout: ggml-common.h, block_iq4_xs. Of scale g, plus 32, nibble g of scales_l holds the low
  // four bits, bit pair g of scales_h the top two. Byte i of each 16 of qs holds element i (low)
  // and i + 16 (high) of a group.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint16_t scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
  };
  static_assert(sizeof(Block) == 136);

  static constexpr const char* kName = "iq4_xs";
  static constexpr int kTypeId = 23;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 8;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 128;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    uint32_t low;
    std::memcpy(&low, block.scales_l, 4);
    for (int g = 0; g < 8; ++g) {
      scales[g] = d * static_cast<float>(group_scale(low, block.scales_h, g));
      unpack_nibbles(block.qs + 16 * g, codes + 32 * g);
    }
    for (int i = 0; i < 256; ++i) codes[i] = iq4_codebook()[codes[i]];
  }

  // Scale g, from 4 bits each in `low` and 2 bits each in `high`.
  TORCH_Q4_HOST_DEVICE static int group_scale(uint32_t low, uint32_t high, int g) {
    return static_cast<int>((low >> 4 * g & 0xF) | (high >> 2 * g & 3) << 4) - 32;
  }

  static constexpr Chunk kChunks[] = {{8, 16},   {24, 16},  {40, 16}, {56, 16}, {72, 16}, {88, 16},
                                      {104, 16}, {120, 16}, {4, 4},   {0, 2},   {2, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto line = rows.line(segment / 2);
    return look_up(line >> segment % 2 * 4 & 0xF, iq4_codebook());
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    float d[16];
    rows.halves(9, d);
    const auto low = rows.words(8), high = rows.halfwords(10);
    for (int g = 0; g < 8; ++g) {
      for (int r = 0; r < 16; ++r) {
        scales[g][r] = d[r] * static_cast<float>(group_scale(low[r], high[r], g));
      }
    }
  }

  // Part p has half of groups 4 (p / 2) to 4 (p / 2) + 3.
  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int part, float* scales,
                                               float* /*shifts*/) {
    const float d = row.template half<9>();
    const uint32_t low = row.template word<8>() >> 16 * (part >> 1);
    const uint32_t high = row.template halfword<10>() >> 8 * (part >> 1);
    for (int i = 0; i < 4; ++i) scales[i] = d * static_cast<float>(group_scale(low, high, i));
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      const float variance = sum_squares(x + start, 256) * (2.0f / 256);
      float scales[8];
      for (int g = 0; g < 8; ++g) {
        const int64_t at = start + 32 * g;
        float weights[32];
        weigh_iq4(x + at, importance ? importance + at : nullptr, variance, weights);
        scales[g] = fit_iq4(x + at, weights);
      }
      store(x + start, scales, blocks[start / kBlockElems]);
    }
  }

 private:
  // Gives codes to the scales, then codes to the elements under what the scales became. These count
  // from the scale of scales in float32, since ggml's do; the block holds it in float16.
  static void store(const float* x, const float* scales, Block& block) {
    const float d = -find_extreme<8>(scales) / 32;
    const float inverse = reciprocal_or_zero(d);
    block.d = float_to_half(d);
    block.scales_h = 0;
    std::memset(block.scales_l, 0, sizeof(block.scales_l));
    for (int g = 0; g < 8; ++g) {
      const int scale = std::clamp(round_to_int(inverse * scales[g]), -32, 31);
      const int code = scale + 32;
      block.scales_l[g / 2] |= (code & 0xF) << g % 2 * 4;
      block.scales_h |= code >> 4 << 2 * g;
      uint8_t codes[32];
      encode_iq4(x + 32 * g, reciprocal_or_zero(d * scale), codes);
      pack_nibbles(codes, block.qs + 16 * g);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
