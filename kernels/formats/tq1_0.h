// TQ1_0: 256 elements of -1, 0 and 1 in 54 bytes, five to a byte, and one float16 scale.
#pragma once

#include "../arch/arch.h"
#include "../packed.h"
#include "ternary.h"

namespace TORCH_Q4_NAMESPACE {

struct TQ1_0 {
  // Layout: ggml-common.h, block_tq1_0. A byte is a fraction of 256 with five digits of base 3, the
  // first of which counts most. Digit t of byte i is element 32 t + i in the first 32 of qs,
  // element 160 + 16 t + i in its last 16, and element 240 + 4 t + i in qh, whose fifth digit is
  // not used.
  struct Block {
    uint8_t qs[48];
    uint8_t qh[4];
    uint16_t d;
  };
  static_assert(sizeof(Block) == 54);

  static constexpr const char* kName = "tq1_0";
  static constexpr int kTypeId = 34;
  static constexpr int kBlockElems = 256;
  static constexpr int kCodeBits = 2;
  static constexpr int kGroupElems = 32;
  static constexpr int kOffset = 1;
  static constexpr bool kHasShift = false;

  TORCH_Q4_HOST_DEVICE static void unpack(const Block& block, uint8_t* codes, float* scales,
                                          float* /*shifts*/) {
    const float d = half_to_float(block.d);
    for (int g = 0; g < 8; ++g) scales[g] = d;
    unpack_digits<32, 5>(block.qs, codes);
    unpack_digits<16, 5>(block.qs + 32, codes + 160);
    unpack_digits<4, 4>(block.qh, codes + 240);
  }

  static constexpr Chunk kChunks[] = {{0, 16}, {16, 16}, {32, 16}, {48, 4, true}, {52, 2}};

  template <class Rows>
  TORCH_Q4_HOST_DEVICE static auto packed_codes(const Rows& rows, int segment) {
    // By the segment's bits: a GPU's compiler knows those in the middle (part_segment, decode.h).
    const bool odd = segment & 1, upper = segment >> 3;
    const int pair = segment >> 1 & 3;
    const auto line = rows.line(upper && pair != 0 ? 2 : odd);
    const auto codes = base_3(line, !upper ? pair : pair == 0 ? 4 : 2 * pair + odd - 2);
    // One of both is taken, rather than made: a GPU's threads that differ in it then stay together.
    return pair == 3 ? choose(upper && odd, rows.digits(3), codes) : codes;
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
      pack_digits<32, 5>(codes, block.qs);
      pack_digits<16, 5>(codes + 160, block.qs + 32);
      pack_digits<4, 4>(codes + 240, block.qh);
    }
  }

 private:
  template <int kBytes, int kDigits>
  TORCH_Q4_HOST_DEVICE static void unpack_digits(const uint8_t* packed, uint8_t* codes) {
    for (int t = 0; t < kDigits; ++t) {
      for (int i = 0; i < kBytes; i += 4) {
        uint32_t word;
        __builtin_memcpy(&word, packed + i, 4);
        word = base_3_word(word, power_of_3(t));
        __builtin_memcpy(codes + kBytes * t + i, &word, 4);
      }
    }
  }

  // The fraction is rounded up: cut off, it would lose its last digit.
  template <int kBytes, int kDigits>
  static void pack_digits(const uint8_t* codes, uint8_t* packed) {
    for (int i = 0; i < kBytes; ++i) {
      uint8_t number = 0;
      for (int t = 0; t < 5; ++t) {
        const int digit = t < kDigits ? codes[kBytes * t + i] : 0;
        number = static_cast<uint8_t>(number * 3 + digit);
      }
      packed[i] = static_cast<uint8_t>((number * 256 + 242) / 243);
    }
  }
};

}  // namespace TORCH_Q4_NAMESPACE
