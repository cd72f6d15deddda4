// Q5_K: 256 elements in 176 bytes, eight groups of 32 with 6-bit scales and minimums.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_256.h"
#include "scales.h"

namespace TORCH_Q4_NAMESPACE {

struct Q5_K {
  // Layout: ggml-common.h, block_q5_K. Each 32 bytes of qs hold the low four bits of two groups, as
  // in Q4_K; bit g of qh[i] is the fifth bit of element i of group g.
  struct Block {
    uint16_t d;     // scale of the groups' scales
    uint16_t dmin;  // scale of the groups' minimums
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
  };
  static_assert(sizeof(Block) == 176);

  static constexpr const char* kName = "q5_k";
  static constexpr int kTypeId = 13;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 0;
  static constexpr bool kHasShift = true;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* shifts) {
    const float d = half_to_float(block.d);
    const float dmin = half_to_float(block.dmin);
    uint8_t group_scale[8], group_min[8];
    unpack_6bit_pairs(block.scales, group_scale, group_min);
    for (int g = 0; g < 8; ++g) {
      scales[g] = d * group_scale[g];
      shifts[g] = -(dmin * group_min[g]);
    }
    const uint8_t* low = block.qs;
    const uint8_t* top = block.qh;
    // Written out because a compiler vectorises byte shifts only by constants.
    for (int i = 0; i < 32; ++i) codes[i] = (low[i] & 0xF) | (top[i] << 4 & 16);
    for (int i = 0; i < 32; ++i) codes[i + 32] = (low[i] >> 4) | (top[i] << 3 & 16);
    for (int i = 0; i < 32; ++i) codes[i + 64] = (low[i + 32] & 0xF) | (top[i] << 2 & 16);
    for (int i = 0; i < 32; ++i) codes[i + 96] = (low[i + 32] >> 4) | (top[i] << 1 & 16);
    for (int i = 0; i < 32; ++i) codes[i + 128] = (low[i + 64] & 0xF) | (top[i] & 16);
    for (int i = 0; i < 32; ++i) codes[i + 160] = (low[i + 64] >> 4) | (top[i] >> 1 & 16);
    for (int i = 0; i < 32; ++i) codes[i + 192] = (low[i + 96] & 0xF) | (top[i] >> 2 & 16);
    for (int i = 0; i < 32; ++i) codes[i + 224] = (low[i + 96] >> 4) | (top[i] >> 3 & 16);
  }

  // ggml's own choices for this format. Plain weights are |x| plus the group's root mean square.
  struct Search {
    static constexpr int kGroups = 8;
    static constexpr int kMaxCode = 31;
    static constexpr int kMaxScale = 63;
    static constexpr float kVarianceFactor = 2;
    static constexpr bool kPlainWeightsAddRms = true;
    static constexpr ErrorNorm kPlainNorm = ErrorNorm::kSquared;
    static constexpr RangeGrid kPlainGrid = {-0.5f, 0.1f, 15};
    static constexpr auto unpack_scales = unpack_6bit_pairs;

    // Unlike Q4_K's, this keeps a wrapped code from spilling into its neighbour's bits.
    static void pack_scales(uint8_t* scales, uint8_t* mins, uint8_t* packed) {
      for (int g = 0; g < 8; ++g) scales[g] = std::min(scales[g], uint8_t{kMaxScale});
      for (int g = 0; g < 8; ++g) mins[g] = std::min(mins[g], uint8_t{kMaxScale});
      pack_6bit_pairs(scales, mins, packed);
    }
  };

  static constexpr Chunk kChunks[] = {{48, 16},  {64, 16},  {80, 16},  {96, 16}, {112, 16},
                                      {128, 16}, {144, 16}, {160, 16}, {16, 16}, {32, 16},
                                      {4, 4},    {8, 4},    {12, 4},   {0, 2},   {2, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto line = rows.line(segment / 4 * 2 + segment % 2);
    const auto top = rows.line(8 + segment % 2) >> segment / 2 & 1;
    return (segment / 2 % 2 == 0 ? line & 0xF : line >> 4) | top << 4;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (*shifts)[16]) {
    float d[16], dmin[16];
    rows.halves(13, d);
    rows.halves(14, dmin);
    packed_6bit_pairs(rows.words(10), rows.words(11), rows.words(12), d, dmin, scales, shifts);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int part, float* scales,
                                               float* shifts) {
    part_6bit_pairs(row.template word<10>(), row.template word<11>(), row.template word<12>(),
                    row.template half<13>(), row.template half<14>(), part, scales, shifts);
  }

  static void pack(const uint8_t* codes, Block& block) {
    for (int pair = 0; pair < 4; ++pair) {
      const uint8_t* in = codes + 64 * pair;
      uint8_t* qs = block.qs + 32 * pair;
      for (int i = 0; i < 32; ++i) qs[i] = (in[i] & 0xF) | (in[i + 32] & 0xF) << 4;
    }
    for (int i = 0; i < 32; ++i) {
      block.qh[i] = 0;
      for (int g = 0; g < 8; ++g) block.qh[i] |= codes[32 * g + i] >> 4 << g;
    }
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      uint8_t codes[256];
      fit_block_with_mins<Search>(x + start, importance ? importance + start : nullptr, block,
                                  codes);
      pack(codes, block);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
