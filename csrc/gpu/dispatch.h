// Which kernel computes a product: a pure function over a table for each family of devices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "runtime.h"

namespace torch_q4::gpu {

enum class LinearKernel {
  kReference,     // a thread per output; what the others are compared with
  kRows,          // reads the weight once for up to 8 rows of x
  kRowsInt8,      // the same with activations rounded to int8
  kTiles16,       // NVIDIA's matrix cores, 16 rows of x at a time
  kTiles64,       // the same, 64 rows
  kPipelined16,   // AMD's, 16 rows of x at a time
  kPipelined64,   // the same, 64 rows
  kPipelined128,  // the same, 128 rows
  kHopperRows,    // Hopper's, 8 to 128 rows
  kHopperMany,    // Hopper's, 128 or 256 rows
  kBlas,          // dequantises, then torch's own product
};

struct LinearCase {
  DType dtype;
  bool int8;  // may round activations to int8
  bool packed;
  int64_t m, n, k;
  Family family;
  int block_elems, block_bytes;
  int multiprocessors;
};

constexpr int64_t kAnyNumber = std::numeric_limits<int64_t>::max();

struct LinearRule {
  enum Layouts { kAnyLayout, kPackedOnly } layouts;
  enum DTypes { kAnyDType, k16Bit } dtypes;
  enum Computes { kAnyCompute, kInt8Only } computes;
  int64_t most_rows;  // of x
  LinearKernel kernel;
  int64_t most_n = kAnyNumber, most_k = kAnyNumber;
  bool (*when)(const LinearCase&) = nullptr;  // null: always
};

// What can be asked for by name, and what each can compute. int8 has one kernel only, and no plans.
struct LinearKernelInfo {
  const char* name;
  LinearKernel kernel;
  LinearRule::Layouts layouts;
  LinearRule::DTypes dtypes;
  enum Families { kAnyFamily, kAnyNvidia, kHopperOnly, kAnyAmd } families = kAnyFamily;
};

constexpr LinearKernelInfo kLinearKernels[] = {
    {"reference", LinearKernel::kReference, LinearRule::kAnyLayout, LinearRule::kAnyDType},
    {"rows", LinearKernel::kRows, LinearRule::kAnyLayout, LinearRule::kAnyDType},
    {"tiles_16", LinearKernel::kTiles16, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kAnyNvidia},
    {"tiles_64", LinearKernel::kTiles64, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kAnyNvidia},
    {"pipelined_16", LinearKernel::kPipelined16, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kAnyAmd},
    {"pipelined_64", LinearKernel::kPipelined64, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kAnyAmd},
    {"pipelined_128", LinearKernel::kPipelined128, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kAnyAmd},
    {"hopper_rows", LinearKernel::kHopperRows, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kHopperOnly},
    {"hopper_many", LinearKernel::kHopperMany, LinearRule::kPackedOnly, LinearRule::k16Bit,
     LinearKernelInfo::kHopperOnly},
    {"blas", LinearKernel::kBlas, LinearRule::kAnyLayout, LinearRule::kAnyDType},
};

constexpr bool takes_layout(const LinearKernelInfo& kernel, bool packed) {
  return kernel.layouts == LinearRule::kAnyLayout || packed;
}
constexpr bool takes_dtype(const LinearKernelInfo& kernel, DType dtype) {
  return kernel.dtypes == LinearRule::kAnyDType || dtype != kFloat32;
}
constexpr bool takes_family(const LinearKernelInfo& kernel, Family family) {
  const bool amd = family == Family::kAmdMatrix || family == Family::kAmdNoMatrix;
  switch (kernel.families) {
    case LinearKernelInfo::kAnyNvidia:
      return !amd;
    case LinearKernelInfo::kHopperOnly:
      return family == Family::kHopper;
    case LinearKernelInfo::kAnyAmd:
      return amd;
    default:
      return true;
  }
}

// What hopper_many_T_C and torch's own product should take, in nanoseconds: fitted to what they did
// take on an H100 for weights of 1024 x 4096 to 28672 x 4096 and 128 to 2048 rows of x, most of it
// within a tenth. Of weights of 2048 x 2048 and less it only says rightly that torch's is the
// quicker.
struct HopperManyCut {
  int width;  // a position in kHopperManyXRows
  int32_t splits;
  int64_t time;
};

// The quickest way to cut the product up. Blocks are as many as multiprocessors, and those of the
// last round, which need not be all of them, take as long as the others.
constexpr HopperManyCut hopper_many_cut(int64_t m, int64_t n, int64_t k, int block_elems,
                                        int block_bytes, int multiprocessors) {
  constexpr int64_t kMostSplits = 8;
  // Of 128 elements of K, by what decoding takes: scales of K-quants, codes of more than four bits.
  const bool large = part_elems(block_elems) == 64, wide = block_bytes * 8 > 5 * block_elems;
  const int64_t step_times[kHopperManyWidths] = {
      large ? (wide ? 1120 : 1010) : (wide ? 960 : 880),
      large ? (wide ? 1610 : 1480) : (wide ? 1490 : 1420),
  };
  const int64_t steps = (k + 127) / 128;
  const int64_t places = multiprocessors < 2 ? 1 : multiprocessors / 2;
  HopperManyCut best = {0, 1, kAnyNumber};
  for (int width = 0; width < kHopperManyWidths; ++width) {
    for (int32_t splits = 1; splits <= kMostSplits && (splits == 1 || 4 * splits <= steps);
         ++splits) {
      HopperManyArgs args = {};
      args.linear.m = m;
      args.linear.row_end = n / kGroupRows * kGroupRows;
      args.splits = splits;
      const int64_t rounds =
          (hopper_many_count(args, kHopperManyXRows[width]) + places - 1) / places;
      const int64_t arranging = 3500 + m * k / 1000;
      const int64_t adding_up = splits > 1 ? 2000 + splits * m * n / 300 : 0;
      const int64_t time =
          rounds * ((steps + splits - 1) / splits) * step_times[width] + arranging + adding_up;
      if (time < best.time) best = {width, splits, time};
    }
  }
  return best;
}

constexpr int64_t blas_time(int64_t m, int64_t n, int64_t k, int block_elems) {
  const int64_t dequantising = n * k / (part_elems(block_elems) == 64 ? 1000 : 1100),
                reading = n * k / 1500;
  const int64_t multiplying = static_cast<int64_t>(static_cast<double>(m) * n * k / 375000);
  return 2000 + dequantising + (reading > multiplying ? reading : multiplying);
}

constexpr bool hopper_many_beats_blas(const LinearCase& c) {
  return hopper_many_cut(c.m, c.n, c.k, c.block_elems, c.block_bytes, c.multiprocessors).time <
         blas_time(c.m, c.n, c.k, c.block_elems);
}

// The first rule that fits is taken; the last ones of each table fit everything. Exact products
// keep int8's promise, too, so where they are faster they are what int8 gets.

// Measured on an H100 (benchmarks/bench_gpu.py --kernels): the matrix kernel takes as long for 16
// rows of x as for one, and dequantising for torch's own product is worth it from about 100.
constexpr LinearRule kNvidiaRules[] = {
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 48,
     LinearKernel::kTiles16},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 96,
     LinearKernel::kTiles64},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kRowsInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kRows},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

// Measured on an H100, too.
constexpr LinearRule kHopperRules[] = {
    // Of a small weight each block has little: what starts quickest wins.
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 16,
     LinearKernel::kTiles16, /*most_n=*/4096, /*most_k=*/4096},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 4,
     LinearKernel::kTiles16, /*most_n=*/8192, /*most_k=*/8192},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 64,
     LinearKernel::kHopperRows},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 256,
     LinearKernel::kHopperRows, /*most_n=*/4096, /*most_k=*/4096},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 128,
     LinearKernel::kHopperRows, /*most_n=*/5120, /*most_k=*/5120},
    // From 4096 rows on dequantising costs no more than arranging them does.
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 2048,
     LinearKernel::kHopperMany, kAnyNumber, kAnyNumber, hopper_many_beats_blas},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kRowsInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kRows},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

// Not measured on any device: guesses from the code that the compiler makes. These GPUs have dot
// products for single rows, which NVIDIA's lack.
constexpr LinearRule kAmdMatrixRules[] = {
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 2,
     LinearKernel::kRowsInt8},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 2, LinearKernel::kRows},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 16,
     LinearKernel::kPipelined16},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 64,
     LinearKernel::kPipelined64},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 256,
     LinearKernel::kPipelined128},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kRowsInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kRows},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

// Not measured either. The matrix kernels run on dot products here.
constexpr LinearRule kAmdNoMatrixRules[] = {
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kRowsInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kRows},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 32,
     LinearKernel::kPipelined16},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

constexpr bool fits(const LinearRule& rule, const LinearCase& c) {
  return c.m <= rule.most_rows && c.n <= rule.most_n && c.k <= rule.most_k &&
         (rule.layouts == LinearRule::kAnyLayout || c.packed) &&
         (rule.dtypes == LinearRule::kAnyDType || c.dtype != kFloat32) &&
         (rule.computes == LinearRule::kAnyCompute || c.int8) && (!rule.when || rule.when(c));
}

template <size_t kCount>
constexpr LinearKernel first_fitting(const LinearRule (&rules)[kCount], const LinearCase& c) {
  for (const LinearRule& rule : rules) {
    if (fits(rule, c)) return rule.kernel;
  }
  return LinearKernel::kBlas;
}

constexpr LinearKernel choose_linear(const LinearCase& c) {
  switch (c.family) {
    case Family::kAmdMatrix:
      return first_fitting(kAmdMatrixRules, c);
    case Family::kAmdNoMatrix:
      return first_fitting(kAmdNoMatrixRules, c);
    case Family::kHopper:
      return first_fitting(kHopperRules, c);
    default:
      return first_fitting(kNvidiaRules, c);
  }
}

// Parts that K is cut into for pipelined_T_C, so that the device has three blocks for each
// multiprocessor. Fewer than 512 elements of K are too little for a block: its waves share them
// out.
constexpr int32_t pipelined_splits(int64_t m, int64_t n, int64_t k, int x_rows,
                                   int multiprocessors) {
  const int64_t groups = n / kGroupRows, block_groups = pipelined_groups(x_rows);
  const int64_t blocks = (groups + block_groups - 1) / block_groups * ((m + x_rows - 1) / x_rows);
  const int64_t wanted = blocks < 1 ? 1 : 3 * multiprocessors / blocks, most = k / 512;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int32_t>(splits < 1 ? 1 : splits > 16 ? 16 : splits);
}

// How hopper_rows_T_C cuts up a product of m rows of x with n packed rows of W.
struct HopperRowsPlan {
  int width;  // a position in kHopperRowsXRows
  int32_t groups, stages, splits;
};

// More of them gain nothing, since one is read while the others are on their way.
constexpr int32_t kHopperRowsUsefulStages = kHopperRowsMostStages < 4 ? kHopperRowsMostStages : 4;

// The most stages for which a block's shared memory suffices, fewer than 2 if it does not.
constexpr int32_t hopper_rows_stages(int width, int32_t groups, int block_elems, int block_bytes,
                                     int shared_bytes) {
  HopperRowsArgs args = {};
  args.groups = groups;
  args.stages = kHopperRowsUsefulStages;
  while (args.stages >= 2 && hopper_rows_shared_bytes(args, kHopperRowsXRows[width], block_elems,
                                                      block_bytes) > shared_bytes) {
    --args.stages;
  }
  return args.stages;
}

// One wave of blocks, as many as there are multiprocessors for: the fewest rows of W to a block
// that leave no block over, and K split where there are too few rows, in parts of two units or
// more.
constexpr HopperRowsPlan hopper_rows_plan(int64_t m, int64_t n, int64_t k, int block_elems,
                                          int block_bytes, int multiprocessors, int shared_bytes) {
  const int64_t total = n < kGroupRows ? 1 : n / kGroupRows;
  const int64_t most_splits = (k + kStageUnit - 1) / kStageUnit / 2;
  int width = 0;
  while (width < kHopperRowsWidths - 1 && kHopperRowsXRows[width] < m) ++width;
  for (;; --width) {
    const int64_t x_row_blocks = (m + kHopperRowsXRows[width] - 1) / kHopperRowsXRows[width];
    const int64_t most_blocks = x_row_blocks < 1 ? multiprocessors : multiprocessors / x_row_blocks;
    const int64_t fewest = (total + kHopperRowsMostGroups - 1) / kHopperRowsMostGroups;
    int64_t splits = most_blocks / fewest;
    splits = splits > most_splits ? most_splits : splits;
    splits = splits < 1 ? 1 : splits;
    int32_t groups = 1;
    while (groups < kHopperRowsMostGroups && (total + groups - 1) / groups * splits > most_blocks) {
      ++groups;
    }
    int32_t stages = hopper_rows_stages(width, groups, block_elems, block_bytes, shared_bytes);
    if (stages < 2 && width > 0) continue;
    while (stages < 2 && groups > 1) {
      stages = hopper_rows_stages(width, --groups, block_elems, block_bytes, shared_bytes);
    }
    return {width, groups, stages < 2 ? 2 : stages, static_cast<int32_t>(splits)};
  }
}

// How hopper_many_T_C cuts up a product of m rows of x with n packed rows of W.
struct HopperManyPlan {
  int width;  // a position in kHopperManyXRows
  int32_t x_stages, weight_stages, splits;
};

// As many stages of x as shared memory has room for beside two units of 256 elements of the
// weights, since refilling one takes both blocks of a pair; then of the weights. Fewer than 2 of
// either if there is no room.
constexpr HopperManyPlan with_stages(HopperManyPlan plan, int block_elems, int block_bytes,
                                     int shared_bytes) {
  const int x_rows = kHopperManyXRows[plan.width];
  const int32_t most_x = x_rows > 128 ? 5 : 8;
  const int32_t unit_stages = kStageUnit / hopper_many_unit(block_elems);
  HopperManyArgs args = {};
  args.weight_stages = 2 * unit_stages;
  const auto fits = [&] {
    return hopper_many_shared_bytes(args, x_rows, block_elems, block_bytes) <= shared_bytes;
  };
  while (args.x_stages < most_x && (++args.x_stages, fits())) {
  }
  if (!fits()) --args.x_stages;
  while (args.weight_stages < 3 * unit_stages && (++args.weight_stages, fits())) {
  }
  if (!fits()) --args.weight_stages;
  return {plan.width, args.x_stages, args.weight_stages, plan.splits};
}

constexpr HopperManyPlan hopper_many_plan(int64_t m, int64_t n, int64_t k, int block_elems,
                                          int block_bytes, int multiprocessors, int shared_bytes) {
  const HopperManyCut cut = hopper_many_cut(m, n, k, block_elems, block_bytes, multiprocessors);
  return with_stages({cut.width, 0, 0, cut.splits}, block_elems, block_bytes, shared_bytes);
}

// Of linear_transposed: up to so many rows of grad are multiplied by our own kernel.
constexpr int64_t kTransposedMaxRows = 8;

// Parts that n is cut into so that the device has four blocks for each multiprocessor.
constexpr int32_t transposed_splits(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  const int64_t groups = (n + kGroupRows - 1) / kGroupRows;
  const int64_t blocks = ((k + 255) / 256) * ((m + kTransposedRows - 1) / kTransposedRows);
  const int64_t wanted = (4 * multiprocessors + blocks - 1) / blocks;
  return static_cast<int32_t>(wanted < 1 ? 1 : wanted > groups ? groups : wanted);
}

}  // namespace torch_q4::gpu
