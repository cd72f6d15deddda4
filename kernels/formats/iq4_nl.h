// IQ4_NL: 32 elements in 18 bytes, one float16 scale and 4-bit indices into a codebook.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"
#include "iq4.h"

namespace TORCH_Q4_NAMESPACE {

struct IQ4_NL {
  // Layout: ggml-common.h, block_iq4_nl. Byte i of qs holds element i (low) and i + 16 (high).
  struct Block {
    uint16_t d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 18);

  static constexpr const char* kName = "iq4_nl";
  static constexpr int kTypeId = 20;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 8;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 128;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = half_to_float(block.d);
    unpack_nibbles(block.qs, codes);
    for (int i = 0; i < 32; ++i) codes[i] = iq4_codebook()[codes[i]];
  }

  static constexpr Chunk kChunks[] = {{2, 16}, {0, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return look_up_nibbles(rows.line(0), segment, iq4_codebook());
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    rows.halves(1, scales[0]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    scales[0] = row.template half<1>();
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      const float variance = sum_squares(x + start, 32) * (2.0f / 32);
      float weights[32];
      uint8_t codes[32];
      weigh_iq4(x + start, importance ? importance + start : nullptr, variance, weights);
      const float scale = fit_iq4(x + start, weights);
      encode_iq4(x + start, reciprocal_or_zero(scale), codes);
      block.d = float_to_half(scale);
      pack_nibbles(codes, block.qs);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
