// A part of a packed row whose bytes are loaded well before they are decoded.
//
// What a format reads of a part is known only by letting it decode one: so it decodes each part
// twice. The first time a HeldRow that loads puts everything that is read into a HeldPart, in the
// order in which it is read; what comes of it is not used, and the compiler leaves only the loads.
// The second time a HeldRow that does not load hands out the same again.
#pragma once

#include "decode.h"

namespace TORCH_Q4_NAMESPACE {

// Calls use(number) for the numbers below kCount, each known when this is compiled: the compiler
// keeps a long loop, whatever is asked of it, and what it indexes then in memory.
template <int kCount, class Use>
TORCH_Q4_DEVICE void each_below(const Use& use) {
  if constexpr (kCount > 0) {
    each_below<kCount - 1>(use);
    use(std::integral_constant<int, kCount - 1>());
  }
}

// Bytes as they lie in memory: whoever computes with them has to wait for them. The compiler keeps
// no more of them in registers than there are.
struct HeldPart {
  static constexpr int kMostLines = 16, kMostWords = 40;
  Bytes lines[kMostLines];
  uint32_t words[kMostWords];
};

template <class Format, bool kLoads>
struct HeldRow {
  // How much has been read so far.
  struct Cursor {
    int lines = 0, words = 0;
  };

  const PackedRow<Format>& row;  // without kLoads of any block of the row
  HeldPart& held;
  Cursor& cursor;

  TORCH_Q4_DEVICE Bytes line(int index) const {
    if (cursor.lines >= HeldPart::kMostLines) stop_with_error();  // known when this is compiled
    Bytes& line = held.lines[cursor.lines++];
    if constexpr (kLoads) line = row.line(index);
    return line;
  }
  TORCH_Q4_DEVICE Bytes fifth_bits(int index) const {
    return expand_bits(take<2>(row.template chunk_with_lines<2>(index)));
  }
  TORCH_Q4_DEVICE Bytes digits(int index) const {
    return expand_digits(take<4>(row.template chunk_with_lines<4>(index)));
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t word() const {
    return take<4>(row.template small_offset<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t halfword() const {
    return take<2>(row.template small_offset<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE uint32_t byte() const {
    return take<1>(row.template small_offset<kIndex>());
  }
  template <int kIndex>
  TORCH_Q4_DEVICE float half() const {
    return half_to_float(static_cast<uint16_t>(halfword<kIndex>()));
  }

  struct Place {
    const HeldRow& row;
    typename PackedRow<Format>::Offset offset;

    TORCH_Q4_DEVICE uint32_t word() const { return row.template take<4>(offset); }
    TORCH_Q4_DEVICE uint32_t halfword() const { return row.template take<2>(offset); }
    TORCH_Q4_DEVICE uint32_t byte() const { return row.template take<1>(offset); }
  };
  template <int kFirst>
  TORCH_Q4_DEVICE Place at(int offset) const {
    return {*this, row.template offset_of<kFirst>(offset)};
  }
  TORCH_Q4_DEVICE Bytes grid_codes(int segment) const {
    Bytes codes;
    Format::segment(*this, segment, codes.w);
    return codes;
  }

 private:
  // kBytes bytes, at a multiple of as many.
  template <int kBytes>
  TORCH_Q4_DEVICE uint32_t take(typename PackedRow<Format>::Offset offset) const {
    if (cursor.words >= HeldPart::kMostWords) stop_with_error();
    uint32_t& word = held.words[cursor.words++];
    if constexpr (kBytes == 4 || kLoadsFillRegisters) {
      if constexpr (kLoads) {
        const uint8_t* from = row.at_offset(offset);
        word = kBytes == 4   ? *reinterpret_cast<const uint32_t*>(from)
               : kBytes == 2 ? *reinterpret_cast<const uint16_t*>(from)
                             : *from;
      }
      return word;
    } else {
      // A packed block has a multiple of 16 bytes: where in its word something is, is the same in
      // all of a row's blocks.
      const uint32_t inside = (offset.thread + static_cast<uint32_t>(offset.fixed)) % 4;
      if constexpr (kLoads) {
        offset.thread -= inside;
        word = *reinterpret_cast<const uint32_t*>(row.at_offset(offset));
      }
      return word >> 8 * inside & (kBytes == 2 ? 0xFFFFu : 0xFFu);
    }
  }
};

// Loads what decoding a part will read.
template <class Format, class T>
TORCH_Q4_DEVICE void load_part(const PackedRow<Format>& row, int part, HeldPart& held) {
  typename HeldRow<Format, true>::Cursor cursor;
  const HeldRow<Format, true> loading{row, held, cursor};
  const PairDecoder<Format, T> scales(loading, part);
  each_below<kPartSegments<Format>>([&](auto i) TORCH_Q4_INLINE_LAMBDA {
    const Bytes codes = Format::packed_codes(loading, part_segment<Format>(part, i));
    (void)codes;
  });
  (void)scales;
}

// Decodes a part that has been loaded: first its scales, then one segment after another.
template <class Format, class T>
struct HeldDecoder {
  typename HeldRow<Format, false>::Cursor cursor;
  PairDecoder<Format, T> scales;

  TORCH_Q4_DEVICE void begin(const PackedRow<Format>& row, int part, HeldPart& held) {
    cursor = {};
    scales = PairDecoder<Format, T>(HeldRow<Format, false>{row, held, cursor}, part);
  }
  TORCH_Q4_DEVICE void next(const PackedRow<Format>& row, int part, HeldPart& held, int segment,
                            uint32_t (&pairs)[8]) {
    const HeldRow<Format, false> loaded{row, held, cursor};
    const Bytes codes = Format::packed_codes(loaded, part_segment<Format>(part, segment));
    scales.decode(codes, segment, pairs);
  }
};

}  // namespace TORCH_Q4_NAMESPACE
