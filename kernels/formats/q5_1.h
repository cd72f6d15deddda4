// Q5_1: 32 elements in 24 bytes, a float16 scale, a float16 minimum and 5-bit codes.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"

namespace TORCH_Q4_NAMESPACE {

struct Q5_1 {
  // Layout: ggml-common.h, block_q5_1. For qh and qs see unpack_5bit.
  struct Block {
    uint16_t d;
    uint16_t m;
    uint8_t qh[4];
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 24);

  static constexpr const char* kName = "q5_1";
  static constexpr int kTypeId = 7;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 0;
  static constexpr bool kHasShift = true;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* shifts) {
    scales[0] = half_to_float(block.d);
    shifts[0] = half_to_float(block.m);
    unpack_5bit(block.qh, block.qs, codes);
  }

  static constexpr Chunk kChunks[] = {{8, 16}, {4, 2, true}, {6, 2, true}, {0, 2}, {2, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto low = segment == 0 ? rows.line(0) & 0xF : rows.line(0) >> 4;
    return low | rows.fifth_bits(1 + segment);
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (*shifts)[16]) {
    rows.halves(3, scales[0]);
    rows.halves(4, shifts[0]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* shifts) {
    scales[0] = row.template half<3>();
    shifts[0] = row.template half<4>();
  }

  static void pack(const uint8_t* codes, float scale, float min, Block& block) {
    block.d = float_to_half(scale);
    block.m = float_to_half(min);
    pack_5bit(codes, block.qh, block.qs);
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    quantize_with_min<Q5_1>(x, importance, blocks, n);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
