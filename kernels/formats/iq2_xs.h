// IQ2_XS: 256 elements in 74 bytes, eight magnitudes to an index of 9 bits, sixteen groups of 16
// with 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ2_XS {
  // Layout: ggml-common.h, block_iq2_xs. A halfword of qs is eight elements: nine bits are an index
  // of the grid, the top seven are signs. A nibble of scales is a group's, the low one first.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint16_t qs[32];
    uint8_t scales[8];
  };
  static_assert(sizeof(Block) == 74);

  static constexpr const char* kName = "iq2_xs";
  static constexpr int kTypeId = 17;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 7;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = kIQ2Offset;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq2_xs_grid(); }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the four at 2 + 4 segment; their scale is in the one at 66 + segment / 2.
  TORCH_Q4_HOST_DEVICE static void segment(const uint8_t* block, int segment, uint32_t* codes) {
    const uint32_t word = read_word(block + 2 + 4 * segment);
    const uint32_t signs = complete_signs((word >> 9 & 0x7Fu) | (word >> 17 & 0x7F00u));
    iq2_segment(grid()[word & 0x1FFu], grid()[word >> 16 & 0x1FFu], signs, codes);
  }

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    for (int g = 0; g < 16; ++g) {
      scales[g] = iq2_scale(d, block.scales[g / 2] >> g % 2 * 4 & 0xF);
    }
    unpack_segments<IQ2_XS>(block, codes);
  }

  // A line holds segments 4 line to 4 line + 3, a word each. A part uses every second word of two
  // lines, and of one word of scales a nibble of each byte.
  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {34, 16}, {50, 16},
                                      {66, 4}, {70, 4},  {0, 2}};
};
static_assert(chunks_cover_block<IQ2_XS>());

}  // namespace TORCH_Q4_NAMESPACE
