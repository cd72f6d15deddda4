// Q8_0: 32 elements in 34 bytes, one float16 scale and signed bytes.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

struct Q8_0 {
  // Layout: ggml-common.h, block_q8_0.
  struct Block {
    uint16_t d;
    int8_t qs[32];
  };
  static_assert(sizeof(Block) == 34);

  static constexpr const char* kName = "q8_0";
  static constexpr int kTypeId = 8;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 8;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 128;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = half_to_float(block.d);
    // Flipping the sign bit of a two's complement byte adds 128.
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(block.qs[i]) ^ 0x80;
  }

  static constexpr Chunk kChunks[] = {{2, 16}, {18, 16}, {0, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return rows.line(segment) ^ 0x80;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    rows.halves(2, scales[0]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    scales[0] = row.template half<2>();
  }

  // ggml has no importance-weighted variant.
  static void quantize_row(const float* x, const float* /*importance*/, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      const float scale = std::fabs(find_extreme<32>(x + start)) / 127;
      const float inverse = reciprocal_or_zero(scale);
      block.d = float_to_half(scale);
      for (int i = 0; i < 32; ++i) {
        block.qs[i] = static_cast<int8_t>(truncate_to_int(std::round(x[start + i] * inverse)));
      }
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
