// Q2_K: 256 elements in 84 bytes, sixteen groups of 16 with 4-bit scales and minimums.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_256.h"

namespace TORCH_Q4_NAMESPACE {

struct Q2_K {
  // Layout: ggml-common.h, block_q2_K. Byte i of each 32 of qs holds elements i, i + 32, i + 64 and
  // i + 96 of 128, lowest bits first; a byte of scales is a scale (low nibble) and a minimum.
  struct Block {
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d;     // scale of the groups' scales
    uint16_t dmin;  // scale of the groups' minimums
  };
  static_assert(sizeof(Block) == 84);

  static constexpr const char* kName = "q2_k";
  static constexpr int kTypeId = 10;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 2;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = 0;
  static constexpr bool kHasShift = true;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* shifts) {
    const float d = half_to_float(block.d);
    const float dmin = half_to_float(block.dmin);
    for (int g = 0; g < 16; ++g) {
      scales[g] = d * (block.scales[g] & 0xF);
      shifts[g] = -(dmin * (block.scales[g] >> 4));
    }
    for (int half = 0; half < 2; ++half) {
      const uint8_t* qs = block.qs + 32 * half;
      uint8_t* out = codes + 128 * half;
      for (int i = 0; i < 32; ++i) out[i] = qs[i] & 3;
      for (int i = 0; i < 32; ++i) out[i + 32] = qs[i] >> 2 & 3;
      for (int i = 0; i < 32; ++i) out[i + 64] = qs[i] >> 4 & 3;
      for (int i = 0; i < 32; ++i) out[i + 96] = qs[i] >> 6;
    }
  }

  // ggml's own choices for this format. Plain weights are |x|.
  struct Search {
    static constexpr int kGroups = 16;
    static constexpr int kMaxCode = 3;
    static constexpr int kMaxScale = 15;
    static constexpr float kVarianceFactor = 1;
    static constexpr bool kPlainWeightsAddRms = false;
    static constexpr ErrorNorm kPlainNorm = ErrorNorm::kAbsolute;
    static constexpr RangeGrid kPlainGrid = {-0.5f, 0.1f, 15};

    static void pack_scales(const uint8_t* scales, const uint8_t* mins, uint8_t* packed) {
      for (int g = 0; g < 16; ++g) packed[g] = scales[g] | mins[g] << 4;
    }
    static void unpack_scales(const uint8_t* packed, uint8_t* scales, uint8_t* mins) {
      for (int g = 0; g < 16; ++g) scales[g] = packed[g] & 0xF;
      for (int g = 0; g < 16; ++g) mins[g] = packed[g] >> 4;
    }
  };

  static constexpr Chunk kChunks[] = {{16, 16}, {32, 16}, {48, 16}, {64, 16}, {0, 4},
                                      {4, 4},   {8, 4},   {12, 4},  {80, 2},  {82, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto line = rows.line(segment / 8 * 2 + segment % 2);
    return line >> segment / 2 % 4 * 2 & 3;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (*shifts)[16]) {
    float d[16], dmin[16];
    rows.halves(8, d);
    rows.halves(9, dmin);
    for (int i = 0; i < 4; ++i) {
      const auto word = rows.words(4 + i);
      for (int j = 0; j < 4; ++j) {
        float* scale = scales[4 * i + j];
        float* shift = shifts[4 * i + j];
        for (int r = 0; r < 16; ++r) {
          const int byte = word[r] >> 8 * j & 0xFF;
          scale[r] = d[r] * static_cast<float>(byte & 0xF);
          shift[r] = -(dmin[r] * static_cast<float>(byte >> 4));
        }
      }
    }
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int part, float* scales,
                                               float* shifts) {
    const float d = row.template half<8>(), dmin = row.template half<9>();
    const uint32_t low = part < 2 ? row.template word<4>() : row.template word<6>();
    const uint32_t high = part < 2 ? row.template word<5>() : row.template word<7>();
    for (int i = 0; i < 4; ++i) {
      const uint32_t bytes = (i < 2 ? low : high) >> part % 2 * 8;
      scales[i] = d * byte_to_float(bytes & 0x000F000F, i % 2 * 2);
      shifts[i] = -(dmin * byte_to_float(bytes >> 4 & 0x000F000F, i % 2 * 2));
    }
  }

  static void pack(const uint8_t* codes, Block& block) { pack_2bit(codes, block.qs); }

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
