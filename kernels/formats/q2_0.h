// Q2_0: 64 elements in 18 bytes, one float16 scale and 2-bit codes for -1, 0, 1 and 2.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

struct Q2_0 {
  // Layout: ggml-common.h, block_q2_0. Byte i of qs holds elements 4 i to 4 i + 3, lowest bits
  // first.
  struct Block {
    uint16_t d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 18);

  static constexpr const char* kName = "q2_0";
  static constexpr int kTypeId = 42;
  static constexpr int kBlockElems = 64;
  static constexpr int kCodeBits = 2;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 1;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = scales[1] = half_to_float(block.d);
    for (int i = 0; i < 16; ++i) {
      const uint32_t four = spread_byte(block.qs[i]);
      __builtin_memcpy(codes + 4 * i, &four, 4);
    }
  }

  static constexpr Chunk kChunks[] = {{2, 16}, {0, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return spread(rows.line(0), segment);
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    for (int g = 0; g < kBlockElems / kGroupElems; ++g) rows.halves(1, scales[g]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    for (int i = 0; i < 4; ++i) scales[i] = row.template half<1>();
  }

  // The largest magnitude is the scale, so that no element becomes 2. Where its inverse overflows,
  // the codes are 0. ggml has no importance-weighted variant.
  static void quantize_row(const float* x, const float* /*importance*/, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      const float scale = std::fabs(find_extreme<64>(x + start));
      const float inverse = reciprocal_or_zero(scale);
      block.d = float_to_half(scale);
      for (int i = 0; i < 16; ++i) {
        int bits = 0;
        for (int j = 0; j < 4; ++j) {
          const float level = std::round(x[start + 4 * i + j] * inverse);
          const int code = std::fabs(level) <= 1 ? static_cast<int>(level) + 1 : 0;
          bits |= code << 2 * j;
        }
        block.qs[i] = static_cast<uint8_t>(bits);
      }
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
