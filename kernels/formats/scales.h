// The two ways in which K formats squeeze 6-bit scales into 12 bytes.
#pragma once

#include "../portability.h"

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
