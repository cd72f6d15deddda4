// IQ1_M: 256 elements in 56 bytes, eight values to an index of 11 bits, sixteen groups of 16 with
// 3-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ1_M {
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
  TORCH_Q4_HOST_DEVICE static void segment(const uint8_t* block, int segment, uint32_t* codes) {
    const uint8_t* low = block + 2 * segment;
    const uint32_t top = block[32 + segment];
    iq1_half_segment(grid()[low[0] | (top << 8 & 0x700u)], (top & 0x08u) != 0, codes);
    iq1_half_segment(grid()[low[1] | (top << 4 & 0x700u)], (top & 0x80u) != 0, codes + 2);
  }

  // The block's scale from its words of scales, bytes 48 to 51 and 52 to 55.
  TORCH_Q4_HOST_DEVICE static float block_scale(uint32_t first, uint32_t second) {
    return half_to_float(static_cast<uint16_t>((first >> 12 & 0xFu) | (first >> 24 & 0xF0u) |
                                               (second >> 4 & 0xF00u) | (second >> 16 & 0xF000u)));
  }

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&block);
    const float d = block_scale(read_word(bytes + 48), read_word(bytes + 52));
    for (int g = 0; g < 16; ++g) {
      scales[g] = iq1_scale(d, block.scales[g / 4] >> g % 4 * 3 & 7);
    }
    unpack_segments<IQ1_M>(block, codes);
  }

  // Lines 0 and 1 hold the low bits of the indices of eight segments each. A part uses half of each
  // word of one line. It uses every second byte of the first or the last two words of qh, which are
  // half a line: chunks of 4 bytes are read with less in vain. The scale of the block needs both
  // words of scales.
  static constexpr Chunk kChunks[] = {{0, 16}, {16, 16}, {32, 4}, {36, 4},
                                      {40, 4}, {44, 4},  {48, 4}, {52, 4}};
};
static_assert(chunks_cover_block<IQ1_M>());

}  // namespace TORCH_Q4_NAMESPACE
