// The quantisers that are simple enough for a thread to do a block by itself: those without a
// search. Their results are those of Format::quantize_row to the last bit.
#pragma once

#include "read/decode.h"
#include "read/values.h"

namespace TORCH_Q4_NAMESPACE {

// Elements of a block, and the one of largest magnitude, with its sign.
struct BlockOf32 {
  float x[32];
  float extreme = 0;

  TORCH_Q4_DEVICE BlockOf32(const void* from, int64_t first, gpu::DType dtype) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      x[i] = load_value(from, first + i, dtype);
      if (fabsf(x[i]) > fabsf(extreme)) extreme = x[i];
    }
  }
};

// The integer part, or 0 where it does not fit, NaN included.
TORCH_Q4_DEVICE int truncate_to_int32(float value) {
  return fabsf(value) < 0x1p31f ? static_cast<int>(value) : 0;
}

TORCH_Q4_DEVICE void store_halves(uint8_t* to, const uint32_t* words, int count) {
  auto* halves = reinterpret_cast<uint16_t*>(to);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    halves[2 * i] = static_cast<uint16_t>(words[i]);
    halves[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
}

TORCH_Q4_DEVICE void quantize_block(Q4_0, const BlockOf32& block, uint8_t* to) {
  const float scale = signed_product(block.extreme, -0.125f);
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  uint32_t codes[4] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int code = static_cast<int8_t>(truncate_to_int32(block.x[i] * inverse + 8.5f));
    const uint32_t nibble = static_cast<uint32_t>(code < 15 ? code : 15) & 0xFFu;
    // As bytes would: the low nibble's own high bits reach the high one where a code is negative.
    codes[i % 16 / 4] |= (i < 16 ? nibble : nibble << 4 & 0xFFu) << (i % 4 * 8);
  }
  *reinterpret_cast<uint16_t*>(to) = float_to_half(scale);
  store_halves(to + 2, codes, 4);
}

TORCH_Q4_DEVICE void quantize_block(Q8_0, const BlockOf32& block, uint8_t* to) {
  const float scale = fabsf(block.extreme) / 127;
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  uint32_t codes[8] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int code = truncate_to_int32(roundf(block.x[i] * inverse));
    codes[i / 4] |= (static_cast<uint32_t>(code) & 0xFFu) << (i % 4 * 8);
  }
  *reinterpret_cast<uint16_t*>(to) = float_to_half(scale);
  store_halves(to + 2, codes, 8);
}

template <class Format>
TORCH_Q4_DEVICE void quantize(const gpu::QuantizeArgs& a) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  if (thread >= a.count / 32) return;
  constexpr int64_t kBytes = sizeof(typename Format::Block);
  quantize_block(Format(), BlockOf32(a.w, 32 * thread, a.dtype), a.blocks + thread * kBytes);
}

// What rows_int8 multiplies with.
TORCH_Q4_DEVICE void quantize_activations(const gpu::ActivationArgs& a) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  if (thread >= a.count / 32) return;
  const BlockOf32 block(a.x, 32 * thread, a.dtype);
  const float scale = fabsf(block.extreme) / 127;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 32; ++i) finite = finite && fabsf(block.x[i]) < INFINITY;
  const float inverse = finite && scale != 0 ? 1.0f / scale : 0.0f;
  uint32_t codes[8] = {};
  int32_t sums[2] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int code = truncate_to_int32(rintf(block.x[i] * inverse));
    codes[i / 4] |= (static_cast<uint32_t>(code) & 0xFFu) << (i % 4 * 8);
    sums[i / 16] += code;
  }
  auto* to = reinterpret_cast<Words4*>(a.codes + 32 * thread);
  to[0] = {{codes[0], codes[1], codes[2], codes[3]}};
  to[1] = {{codes[4], codes[5], codes[6], codes[7]}};
  // Neither infinities nor NaN have a code: the scale carries them.
  a.scales[thread] = finite ? scale : NAN;
  a.sums[2 * thread] = sums[0];
  a.sums[2 * thread + 1] = sums[1];
}

}  // namespace TORCH_Q4_NAMESPACE
