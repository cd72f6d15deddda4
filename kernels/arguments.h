// What the host hands to the kernels: one structure each, by value. Whoever launches a kernel
// includes this file and nothing else of the device code.
//
// Two kinds of code objects exist. One per format, compiled from format.hip, holds
//
//     dequantize           DequantizeArgs   dequantize_grid
//     embedding            EmbeddingArgs    embedding_grid
//     reference_T          LinearArgs       reference_grid
//     rows_T_C             LinearArgs       rows_grid, C rows of x a block
//     rows_int8_C          LinearArgs       rows_grid, C rows of x a block
//     tiles_T_C            LinearArgs       rows_grid, C rows of x a block; T is f16 or bf16;
//                                          packed rows only, a multiple of 16 of them
//     pipelined_T_C        PipelinedArgs    pipelined_grid; likewise
//     hopper_rows_T_C      HopperRowsArgs   hopper_rows_grid; likewise
//     hopper_many_T_C      HopperManyArgs   hopper_many_grid; likewise
//     transposed           TransposedArgs   transposed_grid
//     pack, unpack         RepackArgs       repack_grid
//     quantize             QuantizeArgs     quantize_grid; q4_0 and q8_0 only
//
// with T in f32, f16, bf16 and C in the lists below; the other, from common.hip, what no format
// enters into:
//
//     quantize_activations ActivationArgs   activation_grid
//     sum_splits           SumArgs          sum_grid
//     arrange_lanes        ArrangeArgs      arrange_lanes_grid
//     arrange              ArrangeArgs      arrange_grid
//
// tiles_T_C is NVIDIA's, pipelined_T_C and arrange_lanes are AMD's; hopper_rows_T_C,
// hopper_many_T_C and arrange are for sm_90a only. Kernels are launched with kBlockThreads threads
// a block and no dynamic shared memory, but hopper_rows_T_C with hopper_rows_threads and
// hopper_rows_shared_bytes, hopper_many_T_C with kHopperManyThreads and hopper_many_shared_bytes.
// All tensors are contiguous; x, blocks and out start at multiples of 16 bytes.
#pragma once

#include <cstdint>

#if defined(__HIPCC__) || defined(__CUDACC__)
#define TORCH_Q4_ARGUMENTS_HOST_DEVICE __host__ __device__
#else
#define TORCH_Q4_ARGUMENTS_HOST_DEVICE
#endif

namespace torch_q4::gpu {

constexpr int kBlockThreads = 256;
constexpr int kGroupRows = 16;  // rows that a block works on, those that the layout packs together

constexpr int kRowsXRows[] = {1, 2, 4, 8};
constexpr int kTilesXRows[] = {16, 64};
constexpr int kPipelinedXRows[] = {16, 64, 128};
// Groups of 16 rows of W, a block.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int pipelined_groups(int x_rows) {
  return x_rows > 16 ? 4 : 2;
}
constexpr int kTransposedRows = 4;  // rows of grad that a block works on
constexpr int kPanelElems = 1024;   // elements of 16 rows that a block of dequantize works on

constexpr int kHopperRowsXRows[] = {8, 16, 32, 64, 128};
constexpr int kStageUnit = 256;            // elements of K, a stage
constexpr int kHopperRowsMostGroups = 8;   // of 16 rows
constexpr int kHopperRowsProducers = 128;  // threads that copy
// Waves that share each group's work; the sums of many rows of x leave no room for a second one's.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_rows_share(int x_rows) {
  return x_rows > 32 ? 1 : 2;
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_rows_threads(int x_rows) {
  return 32 * kHopperRowsMostGroups * hopper_rows_share(x_rows) + kHopperRowsProducers;
}
constexpr int kHopperRowsMostStages = 6;

constexpr int kHopperManyXRows[] = {128, 256};
constexpr int kHopperManyRows = 128;  // of W, a block; the two of a pair have neighbouring ones
constexpr int kHopperManyMostStages = 8;
constexpr int kHopperManyThreads = 384;  // 256 that multiply and four waves of which one copies
// Theirs, of those that all begin with.
constexpr int kHopperManyConsumerRegisters = 232, kHopperManyProducerRegisters = 24;
constexpr int kHopperManyBarrierBytes = 4 * 8 * kHopperManyMostStages;
constexpr int kHopperManyStoreBytes = 1024;  // for each wave that multiplies
constexpr int kArrangeRows = 16;             // of x, a block of arrange

// The dtype of a floating-point tensor.
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// out[i, j] = sum_k x[i, k] * W[row_begin + j, k] + bias[row_begin + j] for j < row_end - row_begin
// goes to out[i * n + row_begin + j]. row_begin is a multiple of 16.
struct LinearArgs {
  const void* x;          // (m, k); rows_int8: the codes of quantize_activations
  const float* scales;    // rows_int8 only: (m, k / 32), likewise
  const int32_t* sums;    // rows_int8 only: (m, k / 16), likewise
  const uint8_t* blocks;  // (n, bytes per row), the whole weight
  const void* bias;       // (n,) in dtype, or null
  void* out;              // (m, n) in dtype
  int64_t m, n, k;
  int64_t row_begin, row_end;
  int32_t packed;  // rows below n / 16 * 16 are in the packed layout; others never are
  DType dtype;     // of x, bias and out; rows_int8: of bias and out
};

// A product by matrix instructions whose operands are loaded before they are needed:
// kernels/linear/pipelined.h. Rows [row_begin, row_end) are whole groups of 16 packed ones.
struct PipelinedArgs {
  LinearArgs linear;     // x is not read
  const void* arranged;  // x as arrange_lanes leaves it for so many rows
  float* partial;        // (splits, m, row_end - row_begin) where splits > 1, without bias
  int32_t splits;        // blocks that share out K
};

// A product whose operands are brought to shared memory stage by stage:
// kernels/linear/hopper_rows.h. Rows [row_begin, row_end) are whole groups of 16 packed ones.
struct HopperRowsArgs {
  LinearArgs linear;
  float* partial;  // (splits, m, row_end - row_begin) where splits > 1, without bias
  int32_t groups;  // of 16 rows, a block; at most kHopperRowsMostGroups
  int32_t stages;  // that have their place in shared memory at once, 2 to kHopperRowsMostStages
  int32_t splits;  // blocks that share out K
};

// The same product by pairs of blocks: kernels/linear/hopper_many.h.
struct HopperManyArgs {
  LinearArgs linear;                // x is not read
  const void* arranged;             // x as arrange leaves it for so many rows
  float* partial;                   // as HopperRowsArgs's
  int32_t x_stages, weight_stages;  // 2 to kHopperManyMostStages
  int32_t splits;
};

// x (m, k) of 16-bit elements to out: arranged_lanes_bytes in the order of
// kernels/linear/pipelined.h, or arranged_bytes in that of kernels/linear/hopper_many.h.
struct ArrangeArgs {
  const void* x;
  void* out;
  int64_t m, k;
  int32_t x_rows;       // C of pipelined_T_C or hopper_many_T_C
  int32_t block_elems;  // of the weight's format
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

// out[i, j] = sum over s of partial[s, i, j], in the order of s, + bias[j] for j < rows goes to
// out[i * n + j].
struct SumArgs {
  const float* partial;  // (splits, count / rows, rows)
  const void* bias;      // (rows,) in dtype, or null
  void* out;             // (count / rows, n) in dtype
  int64_t count, rows, n;
  int32_t splits;
  DType dtype;  // of bias and out
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

// Elements of a row that one thread decodes at a time: all of a block of 32 or 64, or 64 of a
// larger one.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int part_elems(int block_elems) {
  return block_elems >= 64 ? 64 : 32;
}

// A block takes kPanelElems elements of 16 packed rows, or a part a thread of rows that are not.
inline Grid dequantize_grid(const DequantizeArgs& a, int block_elems) {
  const int64_t rows = a.row_end - a.row_begin;
  const int64_t groups = a.packed ? rows / kGroupRows : 0;
  const int64_t others = (rows - groups * kGroupRows) * (a.k / part_elems(block_elems));
  return {
      static_cast<uint32_t>(groups) * ceil_div(a.k, kPanelElems) + ceil_div(others, kBlockThreads),
      1};
}
inline Grid embedding_grid(const EmbeddingArgs& a, int block_elems) {
  return {ceil_div(a.count * (a.k / part_elems(block_elems)), kBlockThreads), 1};
}
inline Grid reference_grid(const LinearArgs& a) {
  return {ceil_div(a.m * (a.row_end - a.row_begin), kBlockThreads), 1};
}
inline Grid rows_grid(const LinearArgs& a, int x_rows) {
  return {ceil_div(a.row_end - a.row_begin, kGroupRows), ceil_div(a.m, x_rows)};
}
inline Grid pipelined_grid(const PipelinedArgs& a, int x_rows) {
  const int64_t groups = (a.linear.row_end - a.linear.row_begin) / kGroupRows;
  return {ceil_div(groups, pipelined_groups(x_rows)) * static_cast<uint32_t>(a.splits),
          ceil_div(a.linear.m, x_rows)};
}
// Whole blocks of rows, and as many parts as the lanes of any architecture need: 4.
constexpr int64_t arranged_lanes_bytes(int64_t m, int64_t k, int x_rows, int block_elems) {
  const int64_t step = 4 * part_elems(block_elems);
  return (m + x_rows - 1) / x_rows * x_rows * ((k + step - 1) / step) * step * 2;
}
inline Grid arrange_lanes_grid(const ArrangeArgs& a) {
  return {ceil_div(arranged_lanes_bytes(a.m, a.k, a.x_rows, a.block_elems) / 16, kBlockThreads), 1};
}
// A block takes 256 elements of k, split by split; the rows of grad are the grid's other side.
inline Grid transposed_grid(const TransposedArgs& a) {
  return {ceil_div(a.k, 256) * static_cast<uint32_t>(a.splits), ceil_div(a.m, kTransposedRows)};
}
// Bytes of 16 packed blocks that lie in shared memory as they do in memory, and where those from
// `offset` on are: blocks of 256 elements have gaps between, so that fewer of the lines that lanes
// read at once are in the same banks.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int stage_piece_bytes(int block_elems) {
  return block_elems == kStageUnit ? 1024 : 8192;
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int stage_offset(int block_elems, int offset) {
  return offset + offset / stage_piece_bytes(block_elems) * 64;
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int stage_block_bytes(int block_elems, int block_bytes) {
  return stage_offset(block_elems, kGroupRows * block_bytes - 16) + 16;
}
// What one matrix instruction reads of x, and a gap for the same reason.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_rows_tile_bytes(int x_rows) {
  return x_rows * 16 * 2 + 16;
}
// One stage: x, then the weights.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_rows_x_bytes(int x_rows) {
  return kStageUnit / 16 * hopper_rows_tile_bytes(x_rows);
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_rows_weight_bytes(int block_elems,
                                                                      int block_bytes) {
  return kStageUnit / block_elems * stage_block_bytes(block_elems, block_bytes);
}
// Bytes of shared memory: barriers, then the stages, in which sums find their place at the end.
constexpr int kHopperRowsBarrierBytes = 128;
// Floats between rows of x, so that lanes use different banks.
constexpr int kHopperRowsSumStride = 20;
constexpr int hopper_rows_shared_bytes(const HopperRowsArgs& a, int x_rows, int block_elems,
                                       int block_bytes) {
  const int stage =
      hopper_rows_x_bytes(x_rows) + a.groups * hopper_rows_weight_bytes(block_elems, block_bytes);
  const int sums =
      hopper_rows_share(x_rows) * kHopperRowsMostGroups * x_rows * kHopperRowsSumStride * 4;
  return kHopperRowsBarrierBytes + (a.stages * stage > sums ? a.stages * stage : sums);
}
inline Grid hopper_rows_grid(const HopperRowsArgs& a, int x_rows) {
  const int64_t groups = (a.linear.row_end - a.linear.row_begin) / kGroupRows;
  return {ceil_div(groups, a.groups) * static_cast<uint32_t>(a.splits),
          ceil_div(a.linear.m, x_rows)};
}
// A stage of x has 64 elements, one of the weights a unit: 256, or half of it where blocks are
// smaller, which leaves room for more of x.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_many_unit(int block_elems) {
  return part_elems(block_elems) == 64 ? kStageUnit : kStageUnit / 2;
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_many_x_bytes(int x_rows) {
  return x_rows * 64 * 2;
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int hopper_many_weight_bytes(int block_elems,
                                                                      int block_bytes) {
  return hopper_many_unit(block_elems) / block_elems * stage_block_bytes(block_elems, block_bytes);
}
// Bytes of shared memory: barriers, x, the weights, room in which each wave stores its sums.
constexpr int hopper_many_shared_bytes(const HopperManyArgs& a, int x_rows, int block_elems,
                                       int block_bytes) {
  constexpr int kGroups = kHopperManyRows / kGroupRows;
  return kHopperManyBarrierBytes + a.x_stages * hopper_many_x_bytes(x_rows) +
         kGroups * (a.weight_stages * hopper_many_weight_bytes(block_elems, block_bytes) +
                    kHopperManyStoreBytes);
}
// Pairs of tiles: of rows of W, and in all.
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int64_t hopper_many_row_pairs(const LinearArgs& a) {
  return (a.row_end - a.row_begin + 2 * kHopperManyRows - 1) / (2 * kHopperManyRows);
}
TORCH_Q4_ARGUMENTS_HOST_DEVICE constexpr int64_t hopper_many_count(const HopperManyArgs& a,
                                                                   int x_rows) {
  return hopper_many_row_pairs(a.linear) * ((a.linear.m + x_rows - 1) / x_rows) * a.splits;
}
inline Grid hopper_many_grid(const HopperManyArgs& a, int x_rows, int multiprocessors) {
  const int64_t count = hopper_many_count(a, x_rows);
  const int64_t most = multiprocessors < 2 ? 1 : multiprocessors / 2;
  return {static_cast<uint32_t>(2 * (count < most ? count : most)), 1};
}
constexpr int64_t arranged_bytes(int64_t m, int64_t k, int x_rows) {
  return (m + x_rows - 1) / x_rows * x_rows * ((k + kStageUnit - 1) / kStageUnit) * kStageUnit * 2;
}
inline Grid arrange_grid(const ArrangeArgs& a) {
  return {ceil_div(a.k, kStageUnit), ceil_div(a.m, kArrangeRows)};
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
