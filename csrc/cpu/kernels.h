// The CPU kernels as tables of functions: torch-free, one table per instruction set, chosen once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../kernels/formats/registry.h"

namespace torch_q4::cpu {

// Position of each format in the tables, by its C++ name.
enum FormatIndex : int {
#define TORCH_Q4_INDEX(Format) k##Format##Index,
  TORCH_Q4_FORMATS(TORCH_Q4_INDEX)
#undef TORCH_Q4_INDEX
      kFormatCount
};

// Elements that the kernels unpack at a time: one K-quant block, or eight of the small ones.
constexpr int kTileElems = 256;

// A tile's codes, and a scale and a shift per group; 16 of each, so that a vector holds either.
struct alignas(64) Tile {
  uint8_t codes[kTileElems];
  float scales[16];
  float shifts[16];
};

constexpr int kInt8Rows = 4;  // weight rows that linear_int8 unpacks at a time

// Rows of activations as the int8 arithmetic wants them, K padded with zeros to whole tiles of 256:
//   codes   (m, padded)       int8, x = scale * code to within half a scale
//   scales  (m, padded / 32)  max|x| / 127 of each 32 elements
//   sums16  (m, padded / 16)  scale * sum(code) of each 16 elements
//   sums32  (m, padded / 32)  the same of each 32
struct Int8Rows {
  int8_t* codes;
  float* scales;
  float* sums16;
  float* sums32;
  int64_t padded;
};

// What every linear kernel is told: out[m, n] = bias[n] + sum_k x[m, k] * W[n, k] for the weight
// rows [row_begin, row_end) and all m rows of x. out has n_total columns; bias may be null.
struct LinearArgs {
  const void* blocks;
  const float* bias;
  float* out;
  int64_t m, k, n_total;
  int64_t row_begin, row_end;
};

struct FormatKernels {
  // elems values, a whole number of blocks, to float32; bit for bit ggml's.
  void (*dequantize)(const void* blocks, int64_t elems, float* out);
  // x: (m, k) float32.
  void (*linear_exact)(const LinearArgs& args, const float* x);
  // scratch: kInt8Rows rows of x.padded / 256 tiles.
  void (*linear_int8)(const LinearArgs& args, const Int8Rows& x, Tile* scratch);
  // grad_x[m, k] = sum_n grad[m, n] * W[n, k] for m in [m_begin, m_end) and the elements
  // [k_begin, k_end) of a row, k_begin a multiple of 256. Overwrites its part of grad_x (m, k).
  void (*linear_transposed)(const float* grad, const void* blocks, int64_t n, int64_t k,
                            int64_t m_begin, int64_t m_end, int64_t k_begin, int64_t k_end,
                            float* grad_x);
};

struct Kernels {
  const char* isa;
  FormatKernels formats[kFormatCount];
  void (*quantize_int8)(const float* x, int64_t k, int64_t row, const Int8Rows& out);
  void (*half_to_float)(const uint16_t* from, float* to, int64_t count);
  void (*float_to_half)(const float* from, uint16_t* to, int64_t count);
  void (*bfloat16_to_float)(const uint16_t* from, float* to, int64_t count);
  void (*float_to_bfloat16)(const float* from, uint16_t* to, int64_t count);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best table that this CPU runs, or the one that the environment variable TORCH_Q4_CPU_ISA
// names (generic, avx2, avx512). Throws std::runtime_error if it names another, or one that this
// CPU lacks. Decided at the first call.
const Kernels& kernels();

// Quantisers are compiled once, without vector extensions: their bytes must not depend on the CPU.
using QuantizeRow = void (*)(const float* x, const float* importance, void* blocks, int64_t n);
extern const QuantizeRow kQuantizeRow[kFormatCount];

}  // namespace torch_q4::cpu
