// Q4_K: 256 elements in 144 bytes, eight groups of 32 with 6-bit scales and minimums.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_256.h"
#include "scales.h"

namespace TORCH_Q4_NAMESPACE {

struct Q4_K {
  // Layout: ggml-common.h, block_q4_K. Each 32 bytes of qs hold two groups: low nibbles, then high.
  struct Block {
    uint16_t d;     // scale of the groups' scales
    uint16_t dmin;  // scale of the groups' minimums
    uint8_t scales[12];
    uint8_t qs[128];
  };
  static_assert(sizeof(Block) == 144);

  static constexpr const char* kName = "q4_k";
  static constexpr int kTypeId = 12;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 4;
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
    for (int pair = 0; pair < 4; ++pair) {
      const uint8_t* qs = block.qs + 32 * pair;
      for (int i = 0; i < 32; ++i) codes[64 * pair + i] = qs[i] & 0xF;
      for (int i = 0; i < 32; ++i) codes[64 * pair + 32 + i] = qs[i] >> 4;
    }
  }

  // ggml's own choices for this format. Plain weights are |x| plus the group's root mean square.
  struct Search {
    static constexpr int kGroups = 8;
    static constexpr int kMaxCode = 15;
    static constexpr int kMaxScale = 63;
    static constexpr float kVarianceFactor = 2;
    static constexpr bool kPlainWeightsAddRms = true;
    static constexpr ErrorNorm kPlainNorm = ErrorNorm::kSquared;
    static constexpr RangeGrid kPlainGrid = {-1.0f, 0.1f, 20};
    static constexpr auto pack_scales = pack_6bit_pairs;
    static constexpr auto unpack_scales = unpack_6bit_pairs;
  };

  static constexpr Chunk kChunks[] = {{16, 16}, {32, 16},  {48, 16},  {64, 16}, {80, 16},
                                      {96, 16}, {112, 16}, {128, 16}, {4, 4},   {8, 4},
                                      {12, 4},  {0, 2},    {2, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto line = rows.line(segment / 4 * 2 + segment % 2);
    return segment / 2 % 2 == 0 ? line & 0xF : line >> 4;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (*shifts)[16]) {
    float d[16], dmin[16];
    rows.halves(11, d);
    rows.halves(12, dmin);
    packed_6bit_pairs(rows.words(8), rows.words(9), rows.words(10), d, dmin, scales, shifts);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int part, float* scales,
                                               float* shifts) {
    part_6bit_pairs(row.template word<8>(), row.template word<9>(), row.template word<10>(),
                    row.template half<11>(), row.template half<12>(), part, scales, shifts);
  }

  static void pack(const uint8_t* codes, Block& block) {
    for (int pair = 0; pair < 4; ++pair) {
      const uint8_t* in = codes + 64 * pair;
      uint8_t* qs = block.qs + 32 * pair;
      for (int i = 0; i < 32; ++i) qs[i] = in[i] | in[i + 32] << 4;
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
