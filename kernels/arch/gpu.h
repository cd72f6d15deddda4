// What hip.h and cuda.h have in common: the words that GPU kernels are written in, each with what
// it means. Those that are only declared here are defined by the header of each compiler.
#pragma once

#include "arch.h"

#define TORCH_Q4_DEVICE __device__ __forceinline__

namespace TORCH_Q4_NAMESPACE {

// The element types of activations, as tags: their values are handled as bits, two in a word.
struct Float32 {};
struct Float16 {};
struct BFloat16 {};

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct alignas(8) Words2 {
  uint32_t w[2];
};

// ---- waves, registers and order

// Keeps the compiler from moving loads across: it would rather have all that a loop's body reads in
// registers at once, at the cost of the number of waves that fit beside each other.
TORCH_Q4_DEVICE void schedule_fence();

// The value, of which the compiler no longer knows that it is the same in every turn of a loop.
// Otherwise it keeps what follows from it, such as the addresses of many rows of x, in registers.
TORCH_Q4_DEVICE int64_t recomputed(int64_t value);

// The value, which the caller knows to be the same in all lanes of a wave: AMD's compiler then
// keeps it, and addresses that follow from it, in scalar registers.
TORCH_Q4_DEVICE int same_in_wave(int value);

// Of two kernels of which the second was launched to overlap with the first (Block::overlaps in
// csrc/gpu/runtime.h): once all blocks of the first have said so the second one's may begin, which
// then wait for the first to end before they read what it wrote.
TORCH_Q4_DEVICE void let_next_begin();
TORCH_Q4_DEVICE void wait_for_previous();

// Ends the kernel with an error that the next call of the driver reports.
TORCH_Q4_DEVICE void stop_with_error();

// ---- bytes and integers

// Bytes kA, kB, kC and kD of the eight bytes of low (0 to 3) and high (4 to 7), lowest first.
template <int kA, int kB, int kC, int kD>
TORCH_Q4_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high);

// The low word of high:low >> bits, for bits below 32.
TORCH_Q4_DEVICE uint32_t shift_words(uint32_t low, uint32_t high, uint32_t bits);

// word & mask | over, in one instruction. (nvcc makes two of it where both are constants.)
TORCH_Q4_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t over);

// Of each of the four bytes of `codes`, all below 16, the table's entry.
TORCH_Q4_DEVICE uint32_t look_up_4(uint32_t codes, const Codebook& table);
// The same of the low (half 0) or high (1) nibble of each byte of a word.
TORCH_Q4_DEVICE uint32_t look_up_nibbles_4(uint32_t word, int half, const Codebook& table);

// acc + sum of the products of four signed bytes.
TORCH_Q4_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t acc);

// The formats' `unpack`, which only CPUs call, wants it.
TORCH_Q4_HOST_DEVICE inline void expand_to_16(uint32_t bits, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    const uint32_t four = expand_4_bits(bits >> 4 * i & 0xFu);
    __builtin_memcpy(out + 4 * i, &four, 4);
  }
}

// ---- codes as floats

// code_to_float<kIndex, kBits>(prepare_codes<kBits>(word)) is kCodeBias<kBits> + byte kIndex of the
// word, a code of kBits bits.
template <int kBits>
TORCH_Q4_DEVICE uint32_t prepare_codes(uint32_t word);
template <int kIndex, int kBits>
TORCH_Q4_DEVICE float code_to_float(uint32_t word);

// A product that is rounded to float16 next.
TORCH_Q4_DEVICE float signed_product(float a, float b);

// ---- pairs of 16-bit floats

// Two floats rounded to nearest even, the first in the low half.
template <class T>
TORCH_Q4_DEVICE uint32_t round_pair(float low, float high);

// The same for many values that follow from a few: those went through plain_nan<T>, and what
// arithmetic makes of them needs no test of its own.
template <class T>
TORCH_Q4_DEVICE float plain_nan(float value) {
  return value;
}
template <class T>
TORCH_Q4_DEVICE uint32_t round_plain_pair(float low, float high) {
  return round_pair<T>(low, high);
}

template <class T>
TORCH_Q4_DEVICE float low_of_pair(uint32_t pair);
template <class T>
TORCH_Q4_DEVICE float high_of_pair(uint32_t pair);

template <>
TORCH_Q4_DEVICE float low_of_pair<Float16>(uint32_t pair) {
  return half_to_float(static_cast<uint16_t>(pair));
}
template <>
TORCH_Q4_DEVICE float high_of_pair<Float16>(uint32_t pair) {
  return half_to_float(static_cast<uint16_t>(pair >> 16));
}
template <>
TORCH_Q4_DEVICE float low_of_pair<BFloat16>(uint32_t pair) {
  return bits_to_float(pair << 16);
}
template <>
TORCH_Q4_DEVICE float high_of_pair<BFloat16>(uint32_t pair) {
  return bits_to_float(pair & 0xFFFF0000u);
}

// From how many rows of x on weights are worth rounding for dot2<T>, where they are not in T
// anyway.
template <class T>
constexpr int kFewestDot2XRows = 1;

// Whether dot2<T> is one instruction: exact products of two pairs, added up in float32.
template <class T>
constexpr bool kHasDot2 = false;

template <class T>
TORCH_Q4_DEVICE float dot2(uint32_t a, uint32_t b, float acc) {
  acc = fmaf(low_of_pair<T>(a), low_of_pair<T>(b), acc);
  return fmaf(high_of_pair<T>(a), high_of_pair<T>(b), acc);
}

// Whether the GPU multiplies and adds two T at a time, and those operations.
template <class T>
constexpr bool kHasPairMath = false;
template <>
constexpr bool kHasPairMath<Float16> = true;

template <class T>
TORCH_Q4_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b);
template <class T>
TORCH_Q4_DEVICE uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c);

// ---- the matrix tile
//
// Tile<T>, in a header of its own for each kind of matrix instruction (tile_*.h).
//
// A wave multiplies 16 rows of W with 16 rows of x, over elements of k that it takes in portions:
// 16 elements, eight words of two, at a time of each of its lanes. Lanes with the same row and
// different k_lane hold different portions; a lane of W and one of x that meet in a product hold
// the same. Since every matrix instruction adds up all of its k, which of them stands where inside
// of it does not matter, as long as W and x agree: so all take the words in their order.
//
//   kRowSlots      rows of W whose portions one lane holds, those at place(lane, 0 ...)
//   kXRowSlots     rows of x that one lane holds, x_row(lane, 0 ...)
//   kKLanes        lanes that hold different portions of the same row
//   kSums          sums that a lane keeps for each slot of x; sum r of slot c is that of W's row at
//                  sum_place(lane, r) and of row sum_x_row(lane, c, r) of x
//   kPartialSums   whether the sums of the k_lanes have still to be added up
//   kMaxTiles      tiles of 16 rows of x for which one wave may keep its sums
//   kPieceWords    words of a portion that one call of multiply takes
//   multiply       adds the products of a piece of a portion
//   kHeld          AMD's: what linear/pipelined.h keeps in registers

// By the position of the number of rows of x in gpu::kPipelinedXRows: groups of 16 rows of W that a
// wave multiplies with all of them, and pieces of x.
struct HeldInRegisters {
  int of_w[3], of_x[3];

  TORCH_Q4_HOST_DEVICE static constexpr int position(int x_rows) {
    return x_rows <= 16 ? 0 : x_rows <= 64 ? 1 : 2;
  }
  TORCH_Q4_HOST_DEVICE constexpr int groups(int x_rows) const { return of_w[position(x_rows)]; }
  TORCH_Q4_HOST_DEVICE constexpr int pieces(int x_rows) const { return of_x[position(x_rows)]; }
};

}  // namespace TORCH_Q4_NAMESPACE
