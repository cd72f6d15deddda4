// IQ2_XS: 256 elements in 74 bytes, eight magnitudes to an index of 9 bits, sixteen groups of 16
// with 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ2_XS : GridFormat<IQ2_XS> {
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
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const Word word = row.template at<0>(4 * segment).word();
    const Word signs = complete_signs<Word>((word >> 9 & 0x7Fu) | (word >> 17 & 0x7F00u));
    iq2_segment<Word>(grid_entry(grid(), word & 0x1FFu), grid_entry(grid(), word >> 16 & 0x1FFu),
                      signs, codes);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<4>(group / 2).byte() >> group % 2 * 4 & 0xFu;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    return row.template at<6>(0).halfword();
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) { return iq2_scale(d, bits); }

  // A line holds segments 4 line to 4 line + 3, a word each. A part uses every second word of two
  // lines, and of one word of scales a nibble of each byte.
  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {34, 16}, {50, 16},
                                      {66, 4}, {70, 4},  {0, 2}};
};
static_assert(chunks_cover_block<IQ2_XS>());

}  // namespace TORCH_Q4_NAMESPACE
