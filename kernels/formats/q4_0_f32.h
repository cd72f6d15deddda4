// Q4_0_F32: 32 elements in 20 bytes, one float32 scale and 4-bit codes. Not a ggml format.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"

namespace TORCH_Q4_NAMESPACE {

struct Q4_0_F32 {
  // Byte i of qs holds elements 2 i (low) and 2 i + 1 (high), unlike Q4_0.
  struct Block {
    float d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 20);

  static constexpr const char* kName = "q4_0_f32";
  static constexpr int kTypeId = -2;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 4;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 8;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = block.d;
    uint16_t in[8];
    std::memcpy(in, block.qs, 16);
    for (int i = 0; i < 8; ++i) {
      // Two bytes to four: spread the bytes, then the nibbles in them.
      const uint32_t spread = (in[i] | in[i] << 8) & 0x00FF00FFu;
      const uint32_t out = (spread | spread << 4) & 0x0F0F0F0Fu;
      std::memcpy(codes + 4 * i, &out, 4);
    }
  }

  // Codes are Q4_0's, and scales are before Q4_0 rounds them to float16.
  static constexpr Chunk kChunks[] = {{4, 16}, {0, 4}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    const auto line = rows.line(0);
    return interleave(line & 0xF, line >> 4, segment);
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    rows.floats(1, scales[0]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    scales[0] = bits_to_float(row.template word<1>());
  }

  static void pack(const uint8_t* codes, float scale, Block& block) {
    block.d = scale;
    for (int i = 0; i < 16; ++i) block.qs[i] = codes[2 * i] | codes[2 * i + 1] << 4;
  }

  static void quantize_row(const float* x, const float* importance, Block* blocks, int64_t n) {
    quantize_symmetric<Q4_0_F32>(x, importance, blocks, n);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
