// What the host hands to the kernels: one structure each, by value. Whoever launches a kernel
// includes this file and nothing else of the device code.
//
// Two kinds of code objects exist. One per format, compiled from format.hip, holds
//
//     dequantize               DequantizeArgs   dequantize_grid
//     embedding                EmbeddingArgs    embedding_grid
//     element_T                LinearArgs       element_grid
//     matvec_T_C               LinearArgs       rows_grid, C columns a block
//     matvec_int8_C            LinearArgs       rows_grid, C columns a block
//     matmul_T_C               LinearArgs       rows_grid, C columns a block; T is f16 or bf16;
//                                               packed rows only, a multiple of 16 of them
//     transposed_T             TransposedArgs   transposed_grid
//     pack, unpack             RepackArgs       repack_grid
//     quantize                 QuantizeArgs     quantize_grid; q4_0 and q8_0 only
//
// with T in f32, f16, bf16 and C in the lists below; the other, from common.hip, what no format
// enters into:
//
//     quantize_activations     ActivationArgs   activation_grid
//     sum_splits               SumArgs          sum_grid
//
// Every kernel is launched with kBlockThreads threads a block, and no dynamic shared memory. All
// tensors are contiguous; x, blocks and out start at multiples of 16 bytes.
#pragma once

#include <cstdint>

namespace torch_q4::gpu {

constexpr int kBlockThreads = 256;
constexpr int kGroupRows = 16;  // rows that a block works on, those that the layout packs together

constexpr int kMatvecColumns[] = {1, 2, 4, 8};
constexpr int kMatmulColumns[] = {16, 64};
constexpr int kTransposedRows = 4;  // rows of grad that a block works on
constexpr int kPanelColumns = 512;  // elements of 16 rows that a block of dequantize works on

// The dtype of a floating-point tensor.
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// out[i, j] = sum_k x[i, k] * W[row_begin + j, k] + bias[row_begin + j] for j < row_end - row_begin
// goes to out[i * n + row_begin + j]. row_begin is a multiple of 16.
struct LinearArgs {
  const void* x;          // (m, k); matvec_int8: the codes of quantize_activations
  const float* scales;    // matvec_int8 only: (m, k / 32), likewise
  const int32_t* sums;    // matvec_int8 only: (m, k / 16), likewise
  const uint8_t* blocks;  // (n, bytes per row), the whole weight
  const void* bias;       // (n,) in dtype, or null
  void* out;              // (m, n) in dtype
  int64_t m, n, k;
  int64_t row_begin, row_end;
  int32_t packed;  // rows below n / 16 * 16 are in the packed layout; others never are
  DType dtype;     // of x, bias and out; matvec_int8: of bias and out
};

// W[row_begin : row_end] to out (row_end - row_begin, k). If packed, row_begin is a multiple of 16
// and row_end one, too, or n.
struct DequantizeArgs {
  const uint8_t* blocks;  // (n, bytes per row), the whole weight
  void* out;
  int64_t n, k;
  int64_t row_begin, row_end;
  int32_t packed;
  DType dtype;  // of out
};

// W[indices] to out (count, k). An index outside [0, n) stops the kernel with a device-side trap.
struct EmbeddingArgs {
  const void* indices;
  const uint8_t* blocks;
  void* out;
  int64_t count, n, k;
  int32_t wide;  // indices are int64, else int32
  int32_t packed;
  DType dtype;  // of out
};

// partial[s, i, k] = sum of grad[i, n] * W[n, k] over the rows n of split s; float32. Split s has
// the groups of 16 rows [groups * s / splits, groups * (s + 1) / splits).
struct TransposedArgs {
  const void* grad;  // (m, n)
  const uint8_t* blocks;
  float* partial;  // (splits, m, k)
  int64_t m, n, k;
  int32_t splits;
  int32_t packed;
  DType dtype;  // of grad
};

// out[i] = sum over s of partial[s, i], in the order of s.
struct SumArgs {
  const float* partial;  // (splits, count)
  void* out;
  int64_t count;
  int32_t splits;
  DType dtype;  // of out
};

// `groups` whole groups of 16 rows from one layout to the other; not in place.
struct RepackArgs {
  const uint8_t* from;
  uint8_t* to;
  int64_t groups, k;
};

// count elements of w, whole blocks one after another, to blocks.
struct QuantizeArgs {
  const void* w;
  uint8_t* blocks;
  int64_t count;
  DType dtype;  // of w
};

// Of each 32 elements of x: int8 codes, x = scale * code to within half a scale, and the scale,
// max|x| / 127; of each 16 elements the sum of the codes.
struct ActivationArgs {
  const void* x;  // (m, k), k a multiple of 32
  int8_t* codes;  // (m, k)
  float* scales;  // (m, k / 32)
  int32_t* sums;  // (m, k / 16)
  int64_t count;  // m * k
  DType dtype;    // of x
};

struct Grid {
  uint32_t x, y;
};

inline uint32_t ceil_div(int64_t a, int64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

// Elements of a row that one thread decodes at a time: a quarter of a K-quant's block, or all of a
// small one.
constexpr int part_elems(int block_elems) { return block_elems == 256 ? 64 : 32; }

// A block takes kPanelColumns elements of 16 packed rows, or a part a thread of rows that are not.
inline Grid dequantize_grid(const DequantizeArgs& a, int block_elems) {
  const int64_t rows = a.row_end - a.row_begin;
  const int64_t groups = a.packed ? rows / kGroupRows : 0;
  const int64_t others = (rows - groups * kGroupRows) * (a.k / part_elems(block_elems));
  return {static_cast<uint32_t>(groups) * ceil_div(a.k, kPanelColumns) +
              ceil_div(others, kBlockThreads),
          1};
}
inline Grid embedding_grid(const EmbeddingArgs& a, int block_elems) {
  return {ceil_div(a.count * (a.k / part_elems(block_elems)), kBlockThreads), 1};
}
inline Grid element_grid(const LinearArgs& a) {
  return {ceil_div(a.m * (a.row_end - a.row_begin), kBlockThreads), 1};
}
inline Grid rows_grid(const LinearArgs& a, int columns) {
  return {ceil_div(a.row_end - a.row_begin, kGroupRows), ceil_div(a.m, columns)};
}
// A block takes 256 elements of k, split by split; the rows of grad are the grid's other side.
inline Grid transposed_grid(const TransposedArgs& a) {
  return {ceil_div(a.k, 256) * static_cast<uint32_t>(a.splits), ceil_div(a.m, kTransposedRows)};
}
inline Grid sum_grid(const SumArgs& a) { return {ceil_div(a.count, kBlockThreads), 1}; }
// A thread moves the chunks of one row's block.
inline Grid repack_grid(const RepackArgs& a, int block_elems) {
  return {ceil_div(a.groups * kGroupRows * (a.k / block_elems), kBlockThreads), 1};
}
inline Grid quantize_grid(const QuantizeArgs& a, int block_elems) {
  return {ceil_div(a.count / block_elems, kBlockThreads), 1};
}
inline Grid activation_grid(const ActivationArgs& a) {
  return {ceil_div(a.count / 32, kBlockThreads), 1};
}

}  // namespace torch_q4::gpu
