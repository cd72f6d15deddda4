// IQ2_S: 256 elements in 82 bytes, eight magnitudes to an index of 10 bits, sixteen groups of 16
// with 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ2_S : GridFormat<IQ2_S> {
  // Layout: ggml-common.h, block_iq2_s, whose qs is qs and signs here. Byte i of qs is the low
  // eight bits of the index of elements 8 i to 8 i + 7, byte i of signs has a bit for each of them;
  // two bits of qh[i / 4], the lowest first, are the top of the index. A nibble of scales is a
  // group's, the low one first.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint8_t qs[32];
    uint8_t signs[32];
    uint8_t qh[8];
    uint8_t scales[8];
  };
  static_assert(sizeof(Block) == 82);

  static constexpr const char* kName = "iq2_s";
  static constexpr int kTypeId = 22;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 7;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = kIQ2Offset;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq2_s_grid(); }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the two at 2 + 2 segment, the two at 34 + 2 segment and a nibble of the one at
  // 66 + segment / 2; their scale is in the one at 74 + segment / 2.
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const Word low = row.template at<0>(2 * segment).halfword();
    const Word signs = row.template at<2>(2 * segment).halfword();
    const Word top = row.template at<4>(segment / 2).byte() >> segment % 2 * 4;
    iq2_segment<Word>(grid_entry(grid(), (low & 0xFFu) | (top << 8 & 0x300u)),
                      grid_entry(grid(), low >> 8 | (top << 6 & 0x300u)), signs, codes);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<6>(group / 2).byte() >> group % 2 * 4 & 0xFu;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    return row.template at<8>(0).halfword();
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) { return iq2_scale(d, bits); }

  // Lines 0 and 1 hold the indices of eight segments each, lines 2 and 3 the signs. A part uses
  // half of each word of one line of both. It uses a nibble of each byte of a word of qh and of a
  // word of scales: in chunks of 16 bytes, which qh and scales would fill together, three quarters
  // would be of other parts.
  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {34, 16}, {50, 16}, {66, 4},
                                      {70, 4}, {74, 4},  {78, 4},  {0, 2}};
};
static_assert(chunks_cover_block<IQ2_S>());

}  // namespace TORCH_Q4_NAMESPACE
