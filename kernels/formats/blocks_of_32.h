// What the formats with blocks of 32 share: how rows are quantised and how 5-bit codes lie.
#pragma once

#include "../arch/arch.h"
#include "search.h"

namespace TORCH_Q4_NAMESPACE {

// Rows of element = scale * (code - kOffset).
template <class Format>
void quantize_symmetric(const float* x, const float* importance, typename Format::Block* blocks,
                        int64_t n) {
  constexpr int kHalf = Format::kOffset;
  const float variance = importance == nullptr ? 0 : sum_squares(x, n) / n;
  for (int64_t b = 0; b < n / 32; ++b) {
    const float* block = x + 32 * b;
    uint8_t codes[32];
    if (importance == nullptr) {
      const float scale = scale_by_extreme<32, kHalf>(block, codes);
      Format::pack(codes, scale, blocks[b]);
    } else {
      float weights[32];
      weigh_by_importance<32>(block, importance + 32 * b, variance, weights);
      const float scale = fit_symmetric<32, kHalf>(block, weights, codes);
      Format::pack(codes, scale, blocks[b]);
    }
  }
}

// Rows of element = scale * code + min.
template <class Format>
void quantize_with_min(const float* x, const float* importance, typename Format::Block* blocks,
                       int64_t n) {
  constexpr int kMaxCode = (1 << Format::kCodeBits) - 1;
  const float variance = importance == nullptr ? 0 : sum_squares(x, n) / n;
  for (int64_t b = 0; b < n / 32; ++b) {
    const float* block = x + 32 * b;
    uint8_t codes[32];
    if (importance == nullptr) {
      const ScaleAndMin fit = scale_by_range<32, kMaxCode>(block, codes);
      Format::pack(codes, fit.scale, fit.min, blocks[b]);
    } else {
      float weights[32];
      weigh_by_importance<32>(block, importance + 32 * b, variance, weights);
      const ScaleAndMin fit = fit_with_min<32, kMaxCode>(block, weights, kImportanceGrid, codes);
      Format::pack(codes, fit.scale, fit.min, blocks[b]);
    }
  }
}

// The nibbles of 16 bytes: codes 0-15 are the low ones, codes 16-31 the high ones. In words, since
// GCC unrolls a loop over 16 bytes before it would vectorise it; four words it vectorises.
TORCH_Q4_HOST_DEVICE inline void unpack_nibbles(const uint8_t* packed, uint8_t* codes) {
  uint32_t in[4], out[4];
  std::memcpy(in, packed, 16);
  for (int i = 0; i < 4; ++i) out[i] = in[i] & 0x0F0F0F0Fu;
  std::memcpy(codes, out, 16);
  for (int i = 0; i < 4; ++i) out[i] = in[i] >> 4 & 0x0F0F0F0Fu;
  std::memcpy(codes + 16, out, 16);
}

inline void pack_nibbles(const uint8_t* codes, uint8_t* packed) {
  for (int i = 0; i < 16; ++i) packed[i] = codes[i] | codes[i + 16] << 4;
}

// As unpack_nibbles, with bit i of `top`, counted through its bytes, as the fifth bit of code i.
TORCH_Q4_HOST_DEVICE inline void unpack_5bit(const uint8_t* top, const uint8_t* low,
                                             uint8_t* codes) {
  uint32_t bits, in[4], fifth[8], out[4];
  std::memcpy(&bits, top, 4);
  std::memcpy(in, low, 16);
  expand_to_16(bits, reinterpret_cast<uint8_t*>(fifth));
  for (int i = 0; i < 4; ++i) out[i] = (in[i] & 0x0F0F0F0Fu) | fifth[i];
  std::memcpy(codes, out, 16);
  for (int i = 0; i < 4; ++i) out[i] = (in[i] >> 4 & 0x0F0F0F0Fu) | fifth[i + 4];
  std::memcpy(codes + 16, out, 16);
}

inline void pack_5bit(const uint8_t* codes, uint8_t* top, uint8_t* low) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (codes[i] >> 4 & 1u) << i;
  std::memcpy(top, &bits, sizeof(bits));
  for (int i = 0; i < 16; ++i) low[i] = (codes[i] & 0xF) | (codes[i + 16] & 0xF) << 4;
}

}  // namespace TORCH_Q4_NAMESPACE
