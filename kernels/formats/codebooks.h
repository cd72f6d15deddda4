// The codebooks of four bits: the 16 values that an index stands for, and as tables the codes that
// are unpacked for these values. A table comes from a function, since code for a GPU cannot read a
// variable of the host.
#pragma once

#include "../arch/arch.h"

namespace TORCH_Q4_NAMESPACE {

// The entries for the low (half 0) or high (1) nibbles of 16 bytes, where whoever wants one half
// wants the other one, too: byte vectors may have a quicker way for both together.
template <class Line>
TORCH_Q4_HOST_DEVICE auto look_up_nibbles(const Line& line, int half, const Codebook& table) {
  return look_up(half == 0 ? line & 0xF : line >> 4, table);
}
// Of eight bytes (half 0: the first), those for the low nibbles and then those for the high ones.
template <class Line>
TORCH_Q4_HOST_DEVICE auto look_up_joined(const Line& line, int half, const Codebook& table) {
  return look_up(join(line & 0xF, line >> 4, half), table);
}

// IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl): denser around zero, as weights are.
constexpr int kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};

TORCH_Q4_HOST_DEVICE constexpr Codebook iq4_codebook() {
  constexpr Codebook kTable = make_codebook(kIq4Values, 128);
  return kTable;
}

// MXFP4 and NVFP4 (ggml-common.h, kvalues_mxfp4): the floats of one sign bit, two exponent bits and
// one mantissa bit, E2M1, each twice, so that they are whole. Index 8 would be -0.
constexpr int kE2m1Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

TORCH_Q4_HOST_DEVICE constexpr Codebook e2m1_codebook() {
  constexpr Codebook kTable = make_codebook(kE2m1Values, 12);
  return kTable;
}

}  // namespace TORCH_Q4_NAMESPACE
