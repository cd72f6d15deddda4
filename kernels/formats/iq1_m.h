// IQ1_M: 256 elements in 56 bytes, eight values to an index of 11 bits, sixteen groups of 16 with
// 3-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ1_M : GridFormat<IQ1_M> {
  // Layout: ggml-common.h, block_iq1_m. Byte i of qs is the low eight bits of the index of elements
  // 8 i to 8 i + 7. A nibble of qh belongs to as many, the low one first: three bits are the top of
  // the index, the fourth is set where an eighth is taken off each value of the grid. Where
  // the bit is clear an eighth is added. A halfword of scales is four groups' scales, three bits
  // each, the lowest first, and four bits of the block's own scale, the lowest in the first one.
  struct Block {
    uint8_t qs[32];
    uint8_t qh[16];
    uint16_t scales[4];
  };
  static_assert(sizeof(Block) == 56);

  static constexpr const char* kName = "iq1_m";
  static constexpr int kTypeId = 29;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = kIQ1Offset;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq1_grid(); }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the two at 2 segment and the one at 32 + segment; their scale is in the two at
  // 48 + 2 (segment / 4), and the block's in the odd bytes from 49 to 55.
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const Word low = row.template at<0>(2 * segment).halfword();
    const Word top = row.template at<2>(segment).byte();
    iq1_half_segment<Word>(grid_entry(grid(), (low & 0xFFu) | (top << 8 & 0x700u)), top >> 3 & 1u,
                           codes);
    iq1_half_segment<Word>(grid_entry(grid(), low >> 8 | (top << 4 & 0x700u)), top >> 7, codes + 2);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<6>(group / 4 * 2).halfword() >> group % 4 * 3 & 7u;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    const auto first = row.template at<6>(0).word(), second = row.template at<6>(4).word();
    return (first >> 12 & 0xFu) | (first >> 24 & 0xF0u) | (second >> 4 & 0xF00u) |
           (second >> 16 & 0xF000u);
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) { return iq1_scale(d, bits); }

  // Lines 0 and 1 hold the low bits of the indices of eight segments each. A part uses half of each
  // word of one line. It uses every second byte of the first or the last two words of qh, which are
  // half a line: chunks of 4 bytes are read with less in vain. The scale of the block needs both
  // words of scales.
  static constexpr Chunk kChunks[] = {{0, 16}, {16, 16}, {32, 4}, {36, 4},
                                      {40, 4}, {44, 4},  {48, 4}, {52, 4}};
};
static_assert(chunks_cover_block<IQ1_M>());

}  // namespace TORCH_Q4_NAMESPACE
