// TQ2_0: 256 elements of -1, 0 and 1 in 66 bytes, two bits each and one float16 scale.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_256.h"
#include "ternary.h"

namespace TORCH_Q4_NAMESPACE {

struct TQ2_0 {
  // Layout: ggml-common.h, block_tq2_0. Byte i of each 32 of qs holds elements i, i + 32, i + 64
  // and i + 96 of 128, lowest bits first. Code 3 is an element of 2, which quantising never gives.
  struct Block {
    uint8_t qs[64];
    uint16_t d;
  };
  static_assert(sizeof(Block) == 66);

  static constexpr const char* kName = "tq2_0";
  static constexpr int kTypeId = 35;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 2;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 1;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    for (int g = 0; g < 8; ++g) scales[g] = d;
    for (int half = 0; half < 2; ++half) {
      const uint8_t* in = block.qs + 32 * half;
      uint8_t* out = codes + 128 * half;
      for (int i = 0; i < 32; ++i) out[i] = in[i] & 3;
      for (int i = 0; i < 32; ++i) out[i + 32] = in[i] >> 2 & 3;
      for (int i = 0; i < 32; ++i) out[i + 64] = in[i] >> 4 & 3;
      for (int i = 0; i < 32; ++i) out[i + 96] = in[i] >> 6;
    }
  }

  static constexpr Chunk kChunks[] = {{0, 16}, {16, 16}, {32, 16}, {48, 16}, {64, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return rows.line(segment / 8 * 2 + segment % 2) >> segment / 2 % 4 * 2 & 3;
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    for (int g = 0; g < kBlockElems / kGroupElems; ++g) rows.halves(4, scales[g]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    for (int i = 0; i < 4; ++i) scales[i] = row.template half<4>();
  }

  // ggml has no importance-weighted variant.
  static void quantize_row(const float* x, const float* /*importance*/, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      uint8_t codes[256];
      block.d = float_to_half(encode_ternary<256>(x + start, codes));
      pack_2bit(codes, block.qs);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
