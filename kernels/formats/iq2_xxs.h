// IQ2_XXS: 256 elements in 66 bytes, eight magnitudes to an index of 8 bits, eight groups of 32
// with 4-bit scales.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "tables.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ2_XXS {
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
  TORCH_Q4_HOST_DEVICE static void segment(const uint8_t* block, int segment, uint32_t* codes) {
    const uint8_t* group = block + 2 + segment / 2 * 8;
    const uint8_t* indices = group + segment % 2 * 2;
    const uint32_t signs = segment_signs(read_word(group + 4), segment);
    iq2_segment(grid()[indices[0]], grid()[indices[1]], signs, codes);
  }

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    for (int g = 0; g < 8; ++g) scales[g] = iq2_scale(d, block.qs[8 * g + 7] >> 4);
    unpack_segments<IQ2_XXS>(block, codes);
  }

  // A line holds the indices, signs and scales of segments 4 line to 4 line + 3. A part uses half
  // of each word of two lines. Chunks of 4 bytes would save it nothing.
  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {34, 16}, {50, 16}, {0, 2}};
};
static_assert(chunks_cover_block<IQ2_XXS>());

}  // namespace TORCH_Q4_NAMESPACE
