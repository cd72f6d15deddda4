// Q4_0: 32 elements in 18 bytes, one float16 scale and 4-bit codes.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"

namespace TORCH_Q4_NAMESPACE {

struct Q4_0 {
  // Layout: ggml-common.h, block_q4_0. Byte i of qs holds element i (low) and i + 16 (high).
  struct Block {
    uint16_t d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 18);

  static constexpr const char* kName = "q4_0";
  static constexpr int kTypeId = 2;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 4;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 8;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = half_to_float(block.d);
    unpack_nibbles(block.qs, codes);
  }

  static constexpr Chunk kChunks[] = {{2, 16}, {0, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return segment == 0 ? rows.line(0) & 0xF : rows.line(0) >> 4;
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

  static void pack(const uint8_t* codes, float scale, Block& block) {
    block.d = float_to_half(scale);
    pack_nibbles(codes, block.qs);
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    quantize_symmetric<Q4_0>(x, importance, blocks, n);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
