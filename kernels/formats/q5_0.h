// Q5_0: 32 elements in 22 bytes, one float16 scale and 5-bit codes.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"

namespace TORCH_Q4_NAMESPACE {

struct Q5_0 {
  // Layout: ggml-common.h, block_q5_0. For qh and qs see unpack_5bit.
  struct Block {
    uint16_t d;
    uint8_t qh[4];
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 22);

  static constexpr const char* kName = "q5_0";
  static constexpr int kTypeId = 6;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 16;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = half_to_float(block.d);
    unpack_5bit(block.qh, block.qs, codes);
  }

  static constexpr Chunk kChunks[] = {{6, 16}, {2, 2, true}, {4, 2, true}, {0, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto low = segment == 0 ? rows.line(0) & 0xF : rows.line(0) >> 4;
    return low | rows.fifth_bits(1 + segment);
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    rows.halves(3, scales[0]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    scales[0] = row.template half<3>();
  }

  static void pack(const uint8_t* codes, float scale, Block& block) {
    block.d = float_to_half(scale);
    pack_5bit(codes, block.qh, block.qs);
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    quantize_symmetric<Q5_0>(x, importance, blocks, n);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
