// IQ3_XXS: 256 elements in 98 bytes, four magnitudes to an index of 8 bits, eight groups of 32 with
// 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ3_XXS : GridFormat<IQ3_XXS> {
  // Layout: ggml-common.h, block_iq3_xxs, whose qs is qs and signs here. A byte of qs is an index
  // of the grid, four elements; a word of signs is four times seven bits, eight elements each, and,
  // in the top four bits, the scale of the 32 elements.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint8_t qs[64];
    uint8_t signs[32];
  };
  static_assert(sizeof(Block) == 98);

  static constexpr const char* kName = "iq3_xxs";
  static constexpr int kTypeId = 18;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 7;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 62;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq3_xxs_grid(); }

  // The magnitudes are 4, 12, 20 and so on by eights, except that the last is 62.
  template <class Word>
  TORCH_Q4_HOST_DEVICE static constexpr Word magnitudes(Word entry) {
    const Word steps = grid_steps(entry);
    const Word last = (steps + 0x01010101u) >> 2 & 0x02020202u;
    return (steps << 3) + last + 0x04040404u;
  }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the four at 2 + 4 segment and the four at 66 + 4 (segment / 2), where their scale is, too.
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const Word indices = row.template at<0>(4 * segment).word();
    const Word signs = segment_signs<Word>(row.template at<4>(segment / 2 * 4).word(), segment);
    for (int i = 0; i < 4; ++i) {
      const Word entry = grid_entry(grid(), indices >> 8 * i & 0xFFu);
      codes[i] = signed_codes<kOffset, Word>(magnitudes<Word>(entry), signs >> 4 * i);
    }
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<4>(4 * group).word() >> 28;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    return row.template at<6>(0).halfword();
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) {
    return d * (0.5f + static_cast<float>(bits)) * 0.5f;
  }

  // Lines 0 to 3 hold the indices of four segments each, a word for a segment. A part uses every
  // second word of two of these lines. Lines 4 and 5 hold the signs and scales of eight segments
  // each, a word for two segments. A part uses one of these lines, half the signs of each word.
  static constexpr Chunk kChunks[] = {{2, 16},  {18, 16}, {34, 16}, {50, 16},
                                      {66, 16}, {82, 16}, {0, 2}};
};
static_assert(chunks_cover_block<IQ3_XXS>());

}  // namespace TORCH_Q4_NAMESPACE
