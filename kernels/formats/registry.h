// Every format that the project knows. A format is a struct with:
//
//   Block                    the bytes as they lie in a GGUF file, sizeof asserted
//   kName, kTypeId           "q4_0" and ggml's type number (negative: not a ggml type)
//   kBlockElems              elements in a block
//   kCodeBits                bits of a code
//   kGroupElems              elements that share a scale, 16 or 32
//   kOffset, kHasShift       value = scale * (code - kOffset) [+ shift, where kHasShift]
//   unpack(block, codes, scales, shifts)
//                            kBlockElems unsigned codes in element order, kBlockElems / kGroupElems
//                            scales and, where kHasShift, as many shifts
//   kChunks                  how the packed layout (packed.h) cuts the block up, wide chunks first
//   packed_codes(rows, segment), packed_scales(rows, scales, shifts)
//                            the same as unpack, of 16 packed rows at once: the codes of elements
//                            16 segment to 16 segment + 15, and [group][row] scales and shifts.
//                            `rows` reads chunks by their number: line(i) is a 16-byte one as byte
//                            vectors, halves(i, out), floats(i, out) and words(i) are 16 rows' 2-
//                            or 4-byte ones, fifth_bits(i) has 16 where a bit of a 2-byte one is
//                            set
//   part_scales(row, part, scales, shifts)
//                            of one row, what a GPU's thread decodes at a time: of a block of 256,
//                            part 0 to 3 is segments 8 (part / 2) + part % 2 + {0, 2, 4, 6}, with a
//                            scale and shift each; a block of 32 is one part with one of each.
//                            `row` reads chunks by their number: half<i>() and word<i>()
//   quantize_row(x, importance, blocks, n)
//                            n floats to n / kBlockElems blocks; importance is null or n weights.
//                            csrc/cpu/quantizers.h may have the same for many blocks at a time
//
// To add one: write its header, name it in TORCH_Q4_FORMATS, add its reference to
// torch_q4/formats.py. Every kernel and test follows from the list.
#pragma once

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
  X(Q4_0_F32)
