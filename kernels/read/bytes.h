// The byte vectors that a GPU's thread decodes with, in registers.
#pragma once

#include "../arch/arch.h"

namespace TORCH_Q4_NAMESPACE {

TORCH_Q4_DEVICE constexpr uint32_t in_each_byte(int value) {
  return static_cast<uint32_t>(value & 0xFF) * 0x01010101u;
}

// Bytes, four in a word: codes of weights, and what they are made of.
template <int kWords>
struct ByteVector {
  uint32_t w[kWords];

  template <class Word>
  TORCH_Q4_DEVICE static ByteVector map(const Word& word) {
    ByteVector out;
#pragma unroll
    for (int i = 0; i < kWords; ++i) out.w[i] = word(i);
    return out;
  }
  TORCH_Q4_DEVICE friend ByteVector operator&(const ByteVector& a, int mask) {
    return map([&](int i) { return a.w[i] & in_each_byte(mask); });
  }
  TORCH_Q4_DEVICE friend ByteVector operator^(const ByteVector& a, int mask) {
    return map([&](int i) { return a.w[i] ^ in_each_byte(mask); });
  }
  TORCH_Q4_DEVICE friend ByteVector operator|(const ByteVector& a, const ByteVector& b) {
    return map([&](int i) { return a.w[i] | b.w[i]; });
  }
  // Shifts are of words: the mask takes off what came over from the neighbouring byte.
  TORCH_Q4_DEVICE friend ByteVector operator>>(const ByteVector& a, int bits) {
    return map([&](int i) { return a.w[i] >> bits & in_each_byte(0xFF >> bits); });
  }
  TORCH_Q4_DEVICE friend ByteVector operator<<(const ByteVector& a, int bits) {
    return map([&](int i) { return a.w[i] << bits & in_each_byte(0xFF << bits); });
  }
  // Each code's entry in a table of 16 bytes (formats/codebooks.h).
  TORCH_Q4_DEVICE friend ByteVector look_up(const ByteVector& codes, const Codebook& table) {
    return map([&](int i) { return look_up_4(codes.w[i], table); });
  }
  // Digit `digit` in base 3 of each byte (base_3_word).
  TORCH_Q4_DEVICE friend ByteVector base_3(const ByteVector& a, int digit) {
    return map([&](int i) { return base_3_word(a.w[i], power_of_3(digit)); });
  }
  TORCH_Q4_DEVICE friend ByteVector choose(bool first, const ByteVector& a, const ByteVector& b) {
    return map([&](int i) { return first ? a.w[i] : b.w[i]; });
  }
};
// A segment's codes, or a line of memory.
using Bytes = ByteVector<4>;

// 16 codes of which each is part of a byte, still in their place: masks and shifts, which a format
// writes as it does for Bytes, are kept for whoever takes the codes out.
struct Fields {
  Bytes bytes;
  int shift = 0, mask = 0xFF;  // a code is byte >> shift & mask

  TORCH_Q4_DEVICE Fields operator>>(int bits) const {
    return {bytes, shift + bits, mask >> bits & 0xFF >> (shift + bits)};
  }
  TORCH_Q4_DEVICE Fields operator&(int bits) const { return {bytes, shift, mask & bits}; }
  TORCH_Q4_DEVICE Bytes codes() const {
    return Bytes::map([&](int i) { return bytes.w[i] >> shift & in_each_byte(mask); });
  }
  TORCH_Q4_DEVICE operator Bytes() const { return codes(); }
  TORCH_Q4_DEVICE Bytes operator^(int bits) const { return codes() ^ bits; }
  TORCH_Q4_DEVICE Bytes operator|(const Bytes& other) const { return codes() | other; }
  TORCH_Q4_DEVICE Bytes operator<<(int bits) const { return codes() << bits; }
};

// Reads a word from bytes that are aligned to kAlign.
template <int kAlign>
TORCH_Q4_DEVICE uint32_t load_word(const uint8_t* from) {
  if constexpr (kAlign >= 4) {
    return *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kAlign == 2) {
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  } else {
    return from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24;
  }
}

template <int kAlign>
TORCH_Q4_DEVICE Bytes load_line(const uint8_t* from) {
  if constexpr (kAlign >= 16) {
    const Words4 line = *reinterpret_cast<const Words4*>(from);
    return {{line.w[0], line.w[1], line.w[2], line.w[3]}};
  } else {
    return Bytes::map([&](int i) { return load_word<kAlign>(from + 4 * i); });
  }
}

TORCH_Q4_DEVICE Bytes look_up(const Fields& fields, const Codebook& table) {
  return look_up(fields.codes(), table);
}

// 16 codes of two bits, from word `quarter` of the four: those of each byte follow each other, the
// lowest first.
TORCH_Q4_DEVICE Bytes spread(const Bytes& a, int quarter) {
  const uint32_t low = choose_word(quarter % 2 == 0, a.w[0], a.w[1]);
  const uint32_t high = choose_word(quarter % 2 == 0, a.w[2], a.w[3]);
  const uint32_t word = choose_word(quarter < 2, low, high);
  return Bytes::map([&](int i) { return spread_byte(word >> 8 * i & 0xFFu); });
}
TORCH_Q4_DEVICE Bytes spread(const Fields& a, int quarter) { return spread(a.codes(), quarter); }

TORCH_Q4_DEVICE Bytes base_3(const Fields& a, int digit) { return base_3(a.codes(), digit); }
// Of a word's four bytes the first digits, then the second, third and fourth ones.
TORCH_Q4_DEVICE Bytes expand_digits(uint32_t word) {
  return Bytes::map([&](int i) { return base_3_word(word, power_of_3(i)); });
}

// 16 bytes with 16 where one of 16 bits is set.
TORCH_Q4_DEVICE Bytes expand_bits(uint32_t bits) {
  return Bytes::map([&](int i) { return expand_4_bits(bits >> 4 * i & 0xFu); });
}

// Half 0 or 1 of the 16 bytes of `low` and those of `high`: byte by byte in turns, or the one after
// the other.
TORCH_Q4_DEVICE Bytes interleave(const Bytes& low, const Bytes& high, int half) {
  Bytes out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t a = choose_word(half == 0, low.w[i], low.w[i + 2]);
    const uint32_t b = choose_word(half == 0, high.w[i], high.w[i + 2]);
    out.w[2 * i] = select_bytes<0, 4, 1, 5>(a, b);
    out.w[2 * i + 1] = select_bytes<2, 6, 3, 7>(a, b);
  }
  return out;
}
TORCH_Q4_DEVICE Bytes join(const Bytes& low, const Bytes& high, int half) {
  // A choice by bits: of two words in memory AMD's compiler would choose the address.
  const uint32_t second = half == 0 ? 0 : ~0u;
  const auto choose = [&](uint32_t a, uint32_t b) { return (a & ~second) | (b & second); };
  return {{choose(low.w[0], low.w[2]), choose(low.w[1], low.w[3]), choose(high.w[0], high.w[2]),
           choose(high.w[1], high.w[3])}};
}

// What formats/codebooks.h has for every line.
TORCH_Q4_DEVICE Bytes look_up_nibbles(const Bytes& line, int half, const Codebook& table) {
  return Bytes::map([&](int i) { return look_up_nibbles_4(line.w[i], half, table); });
}
TORCH_Q4_DEVICE Bytes look_up_nibbles(const Fields& line, int half, const Codebook& table) {
  return look_up_nibbles(line.codes(), half, table);
}
TORCH_Q4_DEVICE Bytes look_up_joined(const Bytes& line, int half, const Codebook& table) {
  return join(look_up_nibbles(line, 0, table), look_up_nibbles(line, 1, table), half);
}
TORCH_Q4_DEVICE Bytes look_up_joined(const Fields& line, int half, const Codebook& table) {
  return look_up_joined(line.codes(), half, table);
}

}  // namespace TORCH_Q4_NAMESPACE
