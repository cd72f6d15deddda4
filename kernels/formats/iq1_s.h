// IQ1_S: 256 elements in 50 bytes, eight values to an index of 11 bits, eight groups of 32 with
// 3-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ1_S : GridFormat<IQ1_S> {
  // Layout: ggml-common.h, block_iq1_s. Byte i of qs is the low eight bits of the index of elements
  // 8 i to 8 i + 7, three bits of qh[i / 4], the lowest first, the top ones. Above these twelve
  // bits are the scale of the 32 elements, three bits, and one that is set where an eighth is taken
  // off each value of the grid. Where the bit is clear an eighth is added.
  struct Block {
    uint16_t d;  // scale of the groups' scales
    uint8_t qs[32];
    uint16_t qh[8];
  };
  static_assert(sizeof(Block) == 50);

  static constexpr const char* kName = "iq1_s";
  static constexpr int kTypeId = 19;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = kIQ1Offset;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static const auto& grid() { return iq1_grid(); }

  // Codes of elements 16 segment to 16 segment + 15, four in a word. Of the block's bytes they take
  // the two at 2 + 2 segment and the two at 34 + 2 (segment / 2), where their scale is, too.
  template <class Row, class Word>
  TORCH_Q4_HOST_DEVICE static void segment(const Row& row, int segment, Word* codes) {
    const Word low = row.template at<0>(2 * segment).halfword();
    const Word shared = row.template at<2>(segment / 2 * 2).halfword();
    const Word top = shared >> segment % 2 * 6, minus = shared >> 15;
    iq1_half_segment<Word>(grid_entry(grid(), (low & 0xFFu) | (top << 8 & 0x700u)), minus, codes);
    iq1_half_segment<Word>(grid_entry(grid(), low >> 8 | (top << 5 & 0x700u)), minus, codes + 2);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto scale_bits(const Row& row, int group) {
    return row.template at<2>(2 * group).halfword() >> 12 & 7u;
  }
  template <class Row>
  TORCH_Q4_HOST_DEVICE static auto block_scale_bits(const Row& row) {
    return row.template at<6>(0).halfword();
  }
  TORCH_Q4_HOST_DEVICE static float scale(float d, uint32_t bits) { return iq1_scale(d, bits); }

  // Lines 0 and 1 hold the low bits of the indices of eight segments each. A part uses half of each
  // word of one line. It uses the first or the last two words of qh, which are half a line: as
  // chunks of 4 bytes, nothing is read in vain.
  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {34, 4}, {38, 4},
                                      {42, 4}, {46, 4},  {0, 2}};
};
static_assert(chunks_cover_block<IQ1_S>());

}  // namespace TORCH_Q4_NAMESPACE
