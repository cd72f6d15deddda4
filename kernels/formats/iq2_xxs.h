// IQ2_XXS: 256 elements in 66 bytes, eight magnitudes to an index of 8 bits, eight groups of 32
// with 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ2_XXS : GridFormat<IQ2_XXS> {
  // Layout: ggml-common.h, block_iq2_xxs. Of each eight bytes of qs, the first four are indices of
  // the grid, eight elements each; the last four, a word, are as many signs of seven bits and, in
  // the top four bits, the scale of the 32 elements.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint8_t qs[64];
  };
  static_assert(sizeof(Block) == 66);

  static constexpr const char* kName = "iq2_xxs";
  static constexpr int kTypeId = 16;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 7;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = kIQ2Offset;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq2_xxs_grid(); }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the two at 2 + 8 (segment / 2) + 2 (segment % 2) and the four at 6 + 8 (segment / 2).
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const int group = segment / 2 * 8;
    const Word indices = row.template at<0>(group + segment % 2 * 2).halfword();
    const Word signs = segment_signs<Word>(row.template at<0>(group + 4).word(), segment);
    iq2_segment<Word>(grid_entry(grid(), indices & 0xFFu), grid_entry(grid(), indices >> 8), signs,
                      codes);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<0>(8 * group + 4).word() >> 28;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    return row.template at<4>(0).halfword();
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) { return iq2_scale(d, bits); }

  // A line holds the indices, signs and scales of segments 4 line to 4 line + 3. A part uses half
  // of each word of two lines. Chunks of 4 bytes would save it nothing.
  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {34, 16}, {50, 16}, {0, 2}};
};
static_assert(chunks_cover_block<IQ2_XXS>());

}  // namespace TORCH_Q4_NAMESPACE
