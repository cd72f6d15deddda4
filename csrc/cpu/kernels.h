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

// Elements that the kernels work through at a time: one K-quant block, or eight of the small ones.
constexpr int kTileElems = 256;

// A weight of n rows of k elements. Packed, whole groups of 16 rows are in the packed layout
// (kernels/packed.h), and rows past them are canonical, as all are where it is not.
struct Weight {
  const uint8_t* blocks;
  int64_t n, k;
  bool packed;
};

// Activations as the linear kernels read them: columns of x side by side, so that a kernel for C
// of them finds what it multiplies with one weight in C consecutive words. Columns go in blocks of
// equal width, as wide as the instruction set's registers allow; elements in tiles of 256, padded
// with zeros. Of each column, a tile has the words below, and word w of column c of a block lies at
// [w * C + c] from the tile's start. All of m columns take m * tiles * words words.

// exact:  256 floats x, then per group of 16 or 32 elements the sum of x.
constexpr int kExactSums = 256, kExactWords = 272;
// int8:   64 words of four codes, x = scale * code to within half a scale;
//         8 scales, max|x| / 127 of each 32 elements;
//         per group of 16 or 32 elements, -kOffset * sum(code) as int32, and scale * sum(code).
constexpr int kInt8Scales = 64, kInt8Starts = 72, kInt8Sums = 88, kInt8Words = 104;

// out[m, n] = sum_k x[m, k] * W[n, k] + bias[n] for all m rows of x, the weight rows
// [row_begin, row_end), row_begin a multiple of 16, and k in the tiles [tile_begin, tile_end). out
// has weight.n columns; bias may be null. The bias is added to the finished sum: a sum that started
// from a large bias would round each product to the bias's last bit.
struct LinearArgs {
  Weight weight;
  const void* x;  // as prepare_exact or prepare_int8 leaves it
  int64_t m;
  const float* bias;
  float* out;
  int64_t row_begin, row_end;
  int64_t tile_begin, tile_end;
  bool huge;  // linear_exact: whether prepare_exact found x to be so
};

struct FormatKernels {
  // elems values, a whole number of canonical blocks, to float32; bit for bit ggml's.
  void (*dequantize)(const void* blocks, int64_t elems, float* out);
  // Row `row` to float32, and its canonical blocks.
  void (*dequantize_row)(const Weight& weight, int64_t row, float* out);
  // Whole groups of 16 rows, `groups` of them, in place; scratch: the bytes of a group.
  void (*pack)(uint8_t* blocks, int64_t groups, int64_t k, uint8_t* scratch);
  void (*unpack)(uint8_t* blocks, int64_t groups, int64_t k, uint8_t* scratch);
  // The weights of rows [row_begin, row_end), row_begin a multiple of 16, to float32, one row of k
  // floats after the other.
  void (*dequantize_rows)(const Weight& weight, int64_t row_begin, int64_t row_end, float* out);
  // Write column `m` of x, k floats, into `out`, as described above. False if x is finite but huge:
  // products with codes, whose scales come in later, could overflow where x W does not.
  bool (*prepare_exact)(const float* x, int64_t k, int64_t m, int64_t m_total, void* out);
  bool (*prepare_int8)(const float* x, int64_t k, int64_t m, int64_t m_total, void* out);
  // scratch: 16 floats for each of the m columns.
  void (*linear_exact)(const LinearArgs& args, float* scratch);
  void (*linear_int8)(const LinearArgs& args, float* scratch);
  // grad_x[m, k] = sum_n grad[m, n] * W[n, k] for m in [m_begin, m_end) and the elements
  // [k_begin, k_end) of a row, k_begin a multiple of 256. Overwrites its part of grad_x (m, k).
  void (*linear_transposed)(const float* grad, const Weight& weight, int64_t m_begin, int64_t m_end,
                            int64_t k_begin, int64_t k_end, float* grad_x);
};

// Exact products by the matrix instructions that some CPUs have.
struct Tiles {
  int64_t least_rows;  // of x, for which they are the quickest; 0: the CPU has none
  // Writes column `m` of x, k floats, into `out`, which has x_floats floats for all m_total. False
  // if not all of it is finite: then these kernels cannot multiply by it.
  bool (*prepare)(const float* x, int64_t k, int64_t m, int64_t m_total, void* out);
  int64_t (*x_floats)(int64_t m_total, int64_t k);
  // scratch: as many floats as scratch_floats says.
  void (*linear[kFormatCount])(const LinearArgs& args, float* scratch);
  int64_t (*scratch_floats)(int64_t m);
};

// rows of n floats to blocks; importance is null or n weights, for each of the rows.
using QuantizeRows = void (*)(const float* x, const float* importance, void* blocks, int64_t rows,
                              int64_t n);

// quantizers.h: as many blocks at a time as vectors have lanes. Null for a format without that
// form.
struct Quantizers {
  QuantizeRows formats[kFormatCount];
};
#if defined(__x86_64__)
extern const Quantizers kAvx2Quantizers;
extern const Quantizers kAvx512Quantizers;
#endif

struct Kernels {
  const char* isa;
  FormatKernels formats[kFormatCount];
  const Quantizers* quantizers;  // null where the instruction set has none
  Tiles tiles;
  void (*half_to_float)(const uint16_t* from, float* to, int64_t count);
  void (*float_to_half)(const float* from, uint16_t* to, int64_t count);
  void (*bfloat16_to_float)(const uint16_t* from, float* to, int64_t count);
  void (*float_to_bfloat16)(const float* from, uint16_t* to, int64_t count);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#endif

// The best table that this CPU runs, or the one that the environment variable TORCH_Q4_CPU_ISA
// names (generic, avx2, avxvnni, avx512, amx). Throws std::runtime_error if it names another, or
// one that this CPU lacks. Decided at the first call.
const Kernels& kernels();

// The fastest quantiser of a format that has one. The bytes are those of Format::quantize_row on
// every CPU.
QuantizeRows quantizer(int format);

}  // namespace torch_q4::cpu
