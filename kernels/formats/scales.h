// The two ways in which K formats squeeze 6-bit scales into 12 bytes.
#pragma once

#include "../arch/arch.h"

namespace TORCH_Q4_NAMESPACE {

// Q4_K and Q5_K keep eight 6-bit scales and eight 6-bit minimums in 12 bytes: the first four of
// each in the low six bits of bytes 0-3 and 4-7, whose top two bits are the top bits of the last
// four; those have their low nibbles in bytes 8-11.
TORCH_Q4_HOST_DEVICE inline void unpack_6bit_pairs(const uint8_t* packed, uint8_t* scales,
                                                   uint8_t* mins) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = packed[i] & 63;
    mins[i] = packed[i + 4] & 63;
    scales[i + 4] = (packed[i + 8] & 0xF) | (packed[i] >> 6 << 4);
    mins[i + 4] = (packed[i + 8] >> 4) | (packed[i + 4] >> 6 << 4);
  }
}

// The same for 16 packed rows, whose three words of four bytes come separately, to scales
// d * scale and shifts -(dmin * minimum) of eight groups.
template <class Words>
inline void packed_6bit_pairs(const Words& low, const Words& mid, const Words& high, const float* d,
                              const float* dmin, float (*scales)[16], float (*shifts)[16]) {
  for (int g = 0; g < 8; ++g) {
    const int bit = g % 4 * 8;
    for (int r = 0; r < 16; ++r) {
      const uint32_t scale =
          g < 4 ? low[r] >> bit & 63 : (high[r] >> bit & 0xF) | (low[r] >> (bit + 6) & 3) << 4;
      const uint32_t minimum = g < 4
                                   ? mid[r] >> bit & 63
                                   : (high[r] >> (bit + 4) & 0xF) | (mid[r] >> (bit + 6) & 3) << 4;
      scales[g][r] = d[r] * static_cast<float>(static_cast<int>(scale));
      shifts[g][r] = -(dmin[r] * static_cast<float>(static_cast<int>(minimum)));
    }
  }
}

// The same for the groups of one part (registry.h) of one row: 0 to 3 or 4 to 7.
TORCH_Q4_HOST_DEVICE inline void part_6bit_pairs(uint32_t low, uint32_t mid, uint32_t high, float d,
                                                 float dmin, int part, float* scales,
                                                 float* shifts) {
  const bool first = part < 2;
  const uint32_t scale =
      choose_word(first, low & 0x3F3F3F3Fu, (high & 0x0F0F0F0Fu) | (low >> 2 & 0x30303030u));
  const uint32_t minimum =
      choose_word(first, mid & 0x3F3F3F3Fu, (high >> 4 & 0x0F0F0F0Fu) | (mid >> 2 & 0x30303030u));
  for (int i = 0; i < 4; ++i) {
    scales[i] = d * byte_to_float(scale, i);
    shifts[i] = -(dmin * byte_to_float(minimum, i));
  }
}

inline void pack_6bit_pairs(const uint8_t* scales, const uint8_t* mins, uint8_t* packed) {
  for (int i = 0; i < 4; ++i) {
    packed[i] = scales[i] | (scales[i + 4] >> 4 << 6);
    packed[i + 4] = mins[i] | (mins[i + 4] >> 4 << 6);
    packed[i + 8] = (scales[i + 4] & 0xF) | (mins[i + 4] & 0xF) << 4;
  }
}

// Q3_K keeps sixteen 6-bit scales in 12 bytes: byte i of 0-7 has the low nibbles of scales i and
// i + 8, byte 8 + i the top two bits of scales i, i + 4, i + 8 and i + 12, lowest first.
TORCH_Q4_HOST_DEVICE inline void unpack_6bit_scales(const uint8_t* packed, uint8_t* scales) {
  for (int i = 0; i < 4; ++i) {
    const uint8_t tops = packed[i + 8];
    scales[i] = (packed[i] & 0xF) | (tops & 3) << 4;
    scales[i + 4] = (packed[i + 4] & 0xF) | (tops >> 2 & 3) << 4;
    scales[i + 8] = (packed[i] >> 4) | (tops >> 4 & 3) << 4;
    scales[i + 12] = (packed[i + 4] >> 4) | (tops >> 6) << 4;
  }
}

inline void pack_6bit_scales(const uint8_t* scales, uint8_t* packed) {
  for (int i = 0; i < 8; ++i) packed[i] = (scales[i] & 0xF) | (scales[i + 8] & 0xF) << 4;
  for (int i = 0; i < 4; ++i) {
    packed[i + 8] = (scales[i] >> 4) | (scales[i + 4] >> 4) << 2 | (scales[i + 8] >> 4) << 4 |
                    (scales[i + 12] >> 4) << 6;
  }
}

}  // namespace TORCH_Q4_NAMESPACE
