// IQ3_S: 256 elements in 110 bytes, four magnitudes to an index of 9 bits, eight groups of 32 with
// 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ3_S : GridFormat<IQ3_S> {
  // Layout: ggml-common.h, block_iq3_s. Byte i of qs is the low eight bits of the index of elements
  // 4 i to 4 i + 3, bit i % 8 of qh[i / 8] the top one; bits of signs are elements', the lowest
  // first. A nibble of scales is a group's, the low one first.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
  };
  static_assert(sizeof(Block) == 110);

  static constexpr const char* kName = "iq3_s";
  static constexpr int kTypeId = 21;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 15;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq3_s_grid(); }

  // The magnitudes are the odd numbers from 1 to 15.
  template <class Word>
  TORCH_Q4_HOST_DEVICE static constexpr Word magnitudes(Word entry) {
    return (grid_steps(entry) << 1) + 0x01010101u;
  }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the four at 2 + 4 segment, a nibble of the one at 66 + segment / 2 and the two at
  // 74 + 2 segment; their scale is in the one at 106 + segment / 4.
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const Word low = row.template at<0>(4 * segment).word();
    const Word top = row.template at<6>(segment / 2).byte() >> segment % 2 * 4;
    const Word signs = row.template at<4>(2 * segment).halfword();
    for (int i = 0; i < 4; ++i) {
      const Word index = (low >> 8 * i & 0xFFu) | (top << (8 - i) & 0x100u);
      const Word entry = grid_entry(grid(), index);
      codes[i] = signed_codes<kOffset, Word>(magnitudes<Word>(entry), signs >> 4 * i);
    }
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<8>(group / 2).byte() >> group % 2 * 4 & 0xFu;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    return row.template at<9>(0).halfword();
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) {
    return d * static_cast<float>(1 + 2 * bits);
  }

  // Lines 0 to 3 hold the indices of four segments each, a word for a segment. A part uses every
  // second word of two of these lines. Lines 4 and 5 hold the signs of eight segments each. A part
  // uses half of each word of one of these lines, a nibble of each byte of one word of qh, and two
  // of the four bytes of scales.
  static constexpr Chunk kChunks[] = {{2, 16},  {18, 16}, {34, 16}, {50, 16}, {74, 16},
                                      {90, 16}, {66, 4},  {70, 4},  {106, 4}, {0, 2}};
};
static_assert(chunks_cover_block<IQ3_S>());

}  // namespace TORCH_Q4_NAMESPACE
