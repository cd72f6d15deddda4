// MXFP4: 32 elements in 17 bytes, a power of two as the scale and 4-bit floats.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "blocks_of_32.h"
#include "e2m1.h"

namespace TORCH_Q4_NAMESPACE {

struct MXFP4 {
  // Layout: ggml-common.h, block_mxfp4. Byte i of qs holds element i (low) and i + 16 (high).
  // Blocks lie at odd addresses, too.
  struct Block {
    uint8_t e;  // exponent of the scale, E8M0
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 17);

  static constexpr const char* kName = "mxfp4";
  static constexpr int kTypeId = 39;
  static constexpr int kBlockElems = 32;
  static constexpr int kCodeBits = 5;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 12;
  static constexpr bool kHasShift = false;

  // 2^(exponent - 128), half of what E8M0 says, since the codebook has every value twice. The two
  // lowest are subnormal. The highest, NaN elsewhere, is a number to ggml.
  TORCH_Q4_HOST_DEVICE static float scale_of(int exponent) {
    const uint32_t e = static_cast<uint32_t>(exponent);
    return bits_to_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  }

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    scales[0] = scale_of(block.e);
    unpack_nibbles(block.qs, codes);
    for (int i = 0; i < 32; ++i) codes[i] = e2m1_codebook()[codes[i]];
  }

  static constexpr Chunk kChunks[] = {{1, 16}, {0, 1}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    return look_up_nibbles(rows.line(0), segment, e2m1_codebook());
  }

  template <class Rows>
  static void packed_scales(const Rows& rows, float (*scales)[16], float (* /*shifts*/)[16]) {
    const auto exponents = rows.bytes(1);
    for (int r = 0; r < 16; ++r) scales[0][r] = scale_of(exponents[r]);
  }

  template <class Row>
  TORCH_Q4_HOST_DEVICE static void part_scales(const Row& row, int /*part*/, float* scales,
                                               float* /*shifts*/) {
    scales[0] = scale_of(row.template byte<1>());
  }

  // ggml has no importance-weighted variant.
  static void quantize_row(const float* x, const float* /*importance*/, Block* blocks, int64_t n) {
    for (int64_t start = 0; start < n; start += kBlockElems) {
      Block& block = blocks[start / kBlockElems];
      const float extreme = find_extreme<32>(x + start);
      // From the logarithm and not from the float's own exponent: just below a power of two, the
      // logarithm rounds up to the whole number. Below 2^-125 the byte wraps around, as ggml's.
      const float exponent = std::floor(std::log2(std::fabs(extreme))) + 125;
      block.e = extreme != 0 ? static_cast<uint8_t>(truncate_to_int(exponent)) : 0;
      uint8_t codes[32];
      encode_e2m1<32>(x + start, extreme, scale_of(block.e), codes);
      pack_nibbles(codes, block.qs);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
