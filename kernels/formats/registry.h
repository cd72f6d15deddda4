// Every format that the project knows. A format is a struct with:
//
//   Block                    the bytes as they lie in a GGUF file, sizeof asserted
//   kName, kTypeId           "q4_0" and ggml's type number (negative: not a ggml type)
//   kBlockElems              elements in a block
//   kCodeBits                bits of what unpack gives: with a codebook, of its largest entry
//   kGroupElems              elements that share a scale, 16 or 32
//   kOffset, kHasShift       value = scale * (code - kOffset) [+ shift, where kHasShift]
//   unpack(block, codes, scales, shifts)
//                            kBlockElems unsigned codes in element order, kBlockElems / kGroupElems
//                            scales and, where kHasShift, as many shifts
//   kChunks                  how the packed layout cuts the block up, in the order of packed.h
//   packed_codes(rows, segment), packed_scales(rows, scales, shifts)
//                            the same as unpack, of 16 packed rows at once: the codes of elements
//                            16 segment to 16 segment + 15, and [group][row] scales and shifts.
//                            `rows` reads chunks by their number: line(i) is a 16-byte one as byte
//                            vectors, halves(i, out) and floats(i, out) are 16 rows' 2- or 4-byte
//                            ones as numbers, words(i), halfwords(i) and bytes(i) those of 4, 2 or
//                            1 bytes as they are, fifth_bits(i) has 16 where a bit of a 2-byte one
//                            is set, digits(i) has the first four digits in base 3 of the bytes of
//                            a 4-byte one, all first ones first. look_up(codes, table) is each
//                            code's entry in a codebook (look_up_nibbles and look_up_joined:
//                            codebooks.h), interleave and join(low, high, half) put 8 and 8 bytes
//                            together, spread(bytes, quarter) takes 16 two-bit codes out of four
//                            bytes, base_3(bytes, digit) a digit of 0 to 4 out of each byte;
//                            choose(first, a, b) is a or b. Byte vectors have & ^ << >> with a
//                            number and | with each other; shifts stay within bytes
//   part_scales(row, part, scales, shifts)
//                            of one row, what a GPU's thread decodes at a time: of a block of 128
//                            or 256, part p is segments 8 (p / 2) + p % 2 + {0, 2, 4, 6}; a block
//                            of 64 is one part, too, all with a scale and shift for each of four
//                            segments; a block of 32 is one part with one of each. `row` reads
//                            chunks by their number: half<i>(), word<i>(), halfword<i>(), byte<i>()
//   quantize_row(x, importance, blocks, n)
//                            n floats to n / kBlockElems blocks; importance is null or n weights.
//                            csrc/cpu/quantizers.h may have the same for many blocks at a time. A
//                            format may do without, and is then only read
//
// A format whose codes are rows of a grid is a GridFormat, which has unpack, packed_codes and
// part_scales for it: tables.h says what it wants instead.
//
// To add one: write its header, name it in TORCH_Q4_FORMATS, add its reference to
// torch_q4/formats.py. Every kernel and test follows from the list.
#pragma once

#include "iq1_m.h"
#include "iq1_s.h"
#include "iq2_s.h"
#include "iq2_xs.h"
#include "iq2_xxs.h"
#include "iq3_s.h"
#include "iq3_xxs.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "mxfp4.h"
#include "nvfp4.h"
#include "q1_0.h"
#include "q2_0.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_0_f32.h"
#include "q4_1.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"
#include "tq1_0.h"
#include "tq2_0.h"

#define TORCH_Q4_FORMATS(X) \
  X(Q4_0)                   \
  X(Q4_1)                   \
  X(Q5_0)                   \
  X(Q5_1)                   \
  X(Q8_0)                   \
  X(Q2_K)                   \
  X(Q3_K)                   \
  X(Q4_K)                   \
  X(Q5_K)                   \
  X(Q6_K)                   \
  X(IQ4_NL)                 \
  X(IQ4_XS)                 \
  X(TQ1_0)                  \
  X(TQ2_0)                  \
  X(MXFP4)                  \
  X(NVFP4)                  \
  X(Q1_0)                   \
  X(Q2_0)                   \
  X(Q4_0_F32)               \
  X(IQ2_XXS)                \
  X(IQ2_XS)                 \
  X(IQ3_XXS)                \
  X(IQ1_S)                  \
  X(IQ3_S)                  \
  X(IQ2_S)                  \
  X(IQ1_M)

namespace TORCH_Q4_NAMESPACE {

template <class Format, class = void>
constexpr bool kHasQuantizer = false;
template <class Format>
constexpr bool kHasQuantizer<Format, std::void_t<decltype(&Format::quantize_row)>> = true;

}  // namespace TORCH_Q4_NAMESPACE
