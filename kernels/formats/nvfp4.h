// NVFP4: 64 elements in 36 bytes, four groups of 16 with 8-bit floats as scales, 4-bit floats.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "e2m1.h"

namespace TORCH_Q4_NAMESPACE {

struct NVFP4 {
  // Layout: ggml-common.h, block_nvfp4. Byte i of each 8 of qs holds element i (low) and i + 8
  // (high) of a group.
  struct Block {
    uint8_t d[4];
    uint8_t qs[32];
  };
  static_assert(sizeof(Block) == 36);

  static constexpr const char* kName = "nvfp4";
  static constexpr int kTypeId = 40;
  static constexpr int kBlockElems = 64;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 16;
  static constexpr int kOffset = 12;
  static constexpr bool kHasShift = false;

  // Half of what the low seven bits say as a float of four exponent bits, bias 7, and three
  // mantissa bits, since the codebook has every value twice. The top bit counts nothing, except
  // that 0xFF is a number and 0x7F, NaN elsewhere, is zero.
  TORCH_Q4_HOST_DEVICE static float scale_of(uint8_t byte) {
    const uint32_t magnitude = byte & 0x7Fu;
    const float subnormal = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-10f;
    const float normal = bits_to_float((magnitude << 20) + (119u << 23));
    return byte == 0x7F ? 0.0f : magnitude < 8 ? subnormal : normal;
  }

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    for (int g = 0; g < 4; ++g) {
      scales[g] = scale_of(block.d[g]);
      for (int i = 0; i < 8; ++i) {
        const uint8_t byte = block.qs[8 * g + i];
        codes[16 * g + i] = e2m1_codebook()[byte & 0xF];
        codes[16 * g + i + 8] = e2m1_codebook()[byte >> 4];
      }
    }
  }

  static constexpr Chunk kChunks[] = {{4, 16}, {20, 16}, {0, 4}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return look_up_joined(rows.line(segment / 2), segment % 2, e2m1_codebook());
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    const auto words = rows.words(2);
    for (int g = 0; g < 4; ++g) {
      for (int r = 0; r < 16; ++r) scales[g][r] = scale_of(words[r] >> 8 * g & 0xFF);
    }
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    const uint32_t word = row.template word<2>();
    for (int i = 0; i < 4; ++i) scales[i] = scale_of(word >> 8 * i & 0xFF);
  }

  // ggml has no importance-weighted variant.
  static void quantize_row(const float* x, const float* /*importance*/, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      for (int g = 0; g < 4; ++g) {
        const float* group = x + start + 16 * g;
        const float extreme = find_extreme<16>(group);
        block.d[g] = scale_code(std::fabs(extreme) / 6);
        uint8_t codes[16];
        encode_e2m1<16>(group, extreme, scale_of(block.d[g]), codes);
        for (int i = 0; i < 8; ++i) block.qs[8 * g + i] = codes[i] | codes[i + 8] << 4;
      }
    }
  }

 private:
  // The nearest float of four exponent and three mantissa bits, halves rounded up. What ggml does
  // at the ends is kept: below 2^-6 nothing rounds up to 2^-6, and from 256 on all is 448.
  static uint8_t scale_code(float scale) {
    if (!(scale > 0)) return 0;
    if (scale < 0x1p-6f) {
      return static_cast<uint8_t>(std::min(7, static_cast<int>(scale * 512 + 0.5f)));
    }
    const uint32_t rounded = (float_to_bits(scale) - (120u << 23) + (1u << 19)) >> 20;
    return static_cast<uint8_t>(rounded < 0x78 ? rounded : 0x7E);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
