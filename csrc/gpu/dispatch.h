// Which kernel computes a product: a pure function over a table for each family of devices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "runtime.h"

namespace torch_q4::gpu {

enum class LinearKernel {
  kElement,     // a thread per output; what the others are compared with
  kMatvec,      // reads the weight once for up to 8 rows of x
  kMatvecInt8,  // the same with activations rounded to int8
  kMatmul16,    // matrix cores, 16 rows of x at a time
  kMatmul64,    // the same, 64 rows
  kBlas,        // dequantises, then torch's own product
};

struct LinearCase {
  DType dtype;
  bool int8;  // may round activations to int8
  bool packed;
  int64_t m, n, k;
  Family family;
};

struct LinearRule {
  enum Layouts { kAnyLayout, kPackedOnly } layouts;
  enum DTypes { kAnyDType, k16Bit } dtypes;
  enum Computes { kAnyCompute, kInt8Only } computes;
  int64_t most_rows;  // of x
  LinearKernel kernel;
};

constexpr int64_t kAnyNumber = std::numeric_limits<int64_t>::max();

// The first rule that fits is taken; the last ones of each table fit everything. Exact products
// keep int8's promise, too, so where they are faster they are what int8 gets.

// Measured on an H100 (benchmarks/bench_gpu.py --kernels): the matrix kernel takes as long for 16
// columns as for one, and dequantising for torch's own product is worth it from about 100.
constexpr LinearRule kNvidiaRules[] = {
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 48,
     LinearKernel::kMatmul16},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 96,
     LinearKernel::kMatmul64},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kMatvecInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kMatvec},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

// Not measured on any device: guesses from the code that the compiler makes. These GPUs have dot
// products for single rows, which NVIDIA's lack.
constexpr LinearRule kAmdMatrixRules[] = {
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 2,
     LinearKernel::kMatvecInt8},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 2,
     LinearKernel::kMatvec},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 48,
     LinearKernel::kMatmul16},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 128,
     LinearKernel::kMatmul64},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kMatvecInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kMatvec},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

// Not measured either. The matrix kernels run on dot products here.
constexpr LinearRule kAmdNoMatrixRules[] = {
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kInt8Only, 8,
     LinearKernel::kMatvecInt8},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, 8,
     LinearKernel::kMatvec},
    {LinearRule::kPackedOnly, LinearRule::k16Bit, LinearRule::kAnyCompute, 32,
     LinearKernel::kMatmul16},
    {LinearRule::kAnyLayout, LinearRule::kAnyDType, LinearRule::kAnyCompute, kAnyNumber,
     LinearKernel::kBlas},
};

constexpr bool fits(const LinearRule& rule, const LinearCase& c) {
  return c.m <= rule.most_rows && (rule.layouts == LinearRule::kAnyLayout || c.packed) &&
         (rule.dtypes == LinearRule::kAnyDType || c.dtype != kFloat32) &&
         (rule.computes == LinearRule::kAnyCompute || c.int8);
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
    default:
      return first_fitting(kNvidiaRules, c);
  }
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
