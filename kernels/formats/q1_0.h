// Q1_0: 128 signs in 18 bytes and one float16 magnitude.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

struct Q1_0 {
  // Layout: ggml-common.h, block_q1_0. Bit b of qs[i] is set where element 8 i + b is positive.
  struct Block {
    uint16_t d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 18);

  static constexpr const char* kName = "q1_0";
  static constexpr int kTypeId = 41;
  static constexpr int kBlockElems = 128;
  static constexpr int kCodeBits = 2;  // codes are 0 and 2, for -1 and 1
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 1;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    for (int g = 0; g < 4; ++g) scales[g] = d;
    for (int i = 0; i < 16; ++i) {
      for (int b = 0; b < 8; ++b) codes[8 * i + b] = (block.qs[i] >> b & 1) << 1;
    }
  }

  static constexpr Chunk kChunks[] = {{2, 2, true},  {4, 2, true},  {6, 2, true},
                                      {8, 2, true},  {10, 2, true}, {12, 2, true},
                                      {14, 2, true}, {16, 2, true}, {0, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return rows.fifth_bits(segment) >> 3;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    for (int g = 0; g < kBlockElems / kGroupElems; ++g) rows.halves(8, scales[g]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    for (int i = 0; i < 4; ++i) scales[i] = row.template half<8>();
  }

  // The magnitude is the mean of the elements'. ggml has no importance-weighted variant.
  static void quantize_row(const float* x, const float* /*importance*/, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      float sum = 0;
      for (int i = 0; i < 128; ++i) sum += std::fabs(x[start + i]);
      block.d = float_to_half(sum / 128);
      for (int i = 0; i < 16; ++i) {
        int bits = 0;
        for (int b = 0; b < 8; ++b) bits |= (x[start + 8 * i + b] >= 0) << b;
        block.qs[i] = static_cast<uint8_t>(bits);
      }
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
