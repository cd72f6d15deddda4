// The kernels of one format, TORCH_Q4_FORMAT: this file is compiled once for each in the registry.
// arguments.h says what they take and how they are launched.
#include "dequantize.h"
#include "linear/reference.h"
#include "linear/rows.h"
#include "quantize.h"
#include "repack.h"
#include "transposed.h"
#if defined(__CUDACC__)
#include "linear/tiles.h"
#else
#include "linear/pipelined.h"
#endif
#if defined(TORCH_Q4_HOPPER)
#include "linear/hopper_many.h"
#include "linear/hopper_rows.h"
#endif

#ifndef TORCH_Q4_FORMAT
#error "TORCH_Q4_FORMAT must name a format of formats/registry.h"
#endif

using namespace torch_q4;
using Format = TORCH_Q4_FORMAT;

#define TORCH_Q4_KERNEL(name, Args, ...)                                               \
  extern "C" __global__ void __launch_bounds__(gpu::kBlockThreads) name(gpu::Args a) { \
    __VA_ARGS__(a);                                                                    \
  }

extern "C" __global__ void TORCH_Q4_BLOCKS(gpu::kBlockThreads, 8)
    dequantize(gpu::DequantizeArgs a) {
  torch_q4::dequantize<Format>(a);
}
TORCH_Q4_KERNEL(embedding, EmbeddingArgs, torch_q4::embedding<Format>)
TORCH_Q4_KERNEL(pack, RepackArgs, repack<Format, true>)
TORCH_Q4_KERNEL(unpack, RepackArgs, repack<Format, false>)
TORCH_Q4_KERNEL(transposed, TransposedArgs, torch_q4::transposed<Format>)

TORCH_Q4_KERNEL(rows_int8_1, LinearArgs, rows_int8<Format, 1>)
TORCH_Q4_KERNEL(rows_int8_2, LinearArgs, rows_int8<Format, 2>)
TORCH_Q4_KERNEL(rows_int8_4, LinearArgs, rows_int8<Format, 4>)
TORCH_Q4_KERNEL(rows_int8_8, LinearArgs, rows_int8<Format, 8>)

#define TORCH_Q4_KERNELS_OF(name, T)                                         \
  TORCH_Q4_KERNEL(reference_##name, LinearArgs, linear_reference<Format, T>) \
  TORCH_Q4_KERNEL(rows_##name##_1, LinearArgs, linear_rows<Format, T, 1>)    \
  TORCH_Q4_KERNEL(rows_##name##_2, LinearArgs, linear_rows<Format, T, 2>)    \
  TORCH_Q4_KERNEL(rows_##name##_4, LinearArgs, linear_rows<Format, T, 4>)    \
  TORCH_Q4_KERNEL(rows_##name##_8, LinearArgs, linear_rows<Format, T, 8>)
TORCH_Q4_KERNELS_OF(f32, Float32)
TORCH_Q4_KERNELS_OF(f16, Float16)
TORCH_Q4_KERNELS_OF(bf16, BFloat16)

#if defined(__CUDACC__)
#define TORCH_Q4_TILES(name, T, x_rows, blocks)                                                    \
  extern "C" __global__ void TORCH_Q4_BLOCKS(gpu::kBlockThreads, blocks) name(gpu::LinearArgs a) { \
    linear_tiles<Format, T, x_rows>(a);                                                            \
  }
TORCH_Q4_TILES(tiles_f16_16, Float16, 16, 3)
TORCH_Q4_TILES(tiles_f16_64, Float16, 64, 2)
TORCH_Q4_TILES(tiles_bf16_16, BFloat16, 16, 3)
TORCH_Q4_TILES(tiles_bf16_64, BFloat16, 64, 2)
#else
TORCH_Q4_KERNEL(pipelined_f16_16, PipelinedArgs, linear_pipelined<Format, Float16, 16>)
TORCH_Q4_KERNEL(pipelined_f16_64, PipelinedArgs, linear_pipelined<Format, Float16, 64>)
TORCH_Q4_KERNEL(pipelined_f16_128, PipelinedArgs, linear_pipelined<Format, Float16, 128>)
TORCH_Q4_KERNEL(pipelined_bf16_16, PipelinedArgs, linear_pipelined<Format, BFloat16, 16>)
TORCH_Q4_KERNEL(pipelined_bf16_64, PipelinedArgs, linear_pipelined<Format, BFloat16, 64>)
TORCH_Q4_KERNEL(pipelined_bf16_128, PipelinedArgs, linear_pipelined<Format, BFloat16, 128>)
#endif

#if defined(TORCH_Q4_HOPPER)
#define TORCH_Q4_HOPPER_ROWS(name, T, x_rows)                                       \
  extern "C" __global__ void __launch_bounds__(gpu::hopper_rows_threads(x_rows), 1) \
      hopper_rows_##name##_##x_rows(gpu::HopperRowsArgs a) {                        \
    hopper_rows<Format, T, x_rows>(a);                                              \
  }
#define TORCH_Q4_HOPPER_ROWS_OF(name, T) \
  TORCH_Q4_HOPPER_ROWS(name, T, 8)       \
  TORCH_Q4_HOPPER_ROWS(name, T, 16)      \
  TORCH_Q4_HOPPER_ROWS(name, T, 32)      \
  TORCH_Q4_HOPPER_ROWS(name, T, 64)      \
  TORCH_Q4_HOPPER_ROWS(name, T, 128)
TORCH_Q4_HOPPER_ROWS_OF(f16, Float16)
TORCH_Q4_HOPPER_ROWS_OF(bf16, BFloat16)

#define TORCH_Q4_HOPPER_MANY(name, T, x_rows)                                            \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(                \
      gpu::kHopperManyThreads, 1) hopper_many_##name##_##x_rows(gpu::HopperManyArgs a) { \
    hopper_many<Format, T, x_rows>(a);                                                   \
  }
TORCH_Q4_HOPPER_MANY(f16, Float16, 128)
TORCH_Q4_HOPPER_MANY(f16, Float16, 256)
TORCH_Q4_HOPPER_MANY(bf16, BFloat16, 128)
TORCH_Q4_HOPPER_MANY(bf16, BFloat16, 256)
#endif

// Which formats have a quantiser in quantize.h.
#define TORCH_Q4_QUANTIZES_Q4_0 1
#define TORCH_Q4_QUANTIZES_Q8_0 1
#define TORCH_Q4_JOIN(a, b) a##b
#define TORCH_Q4_QUANTIZES(format) TORCH_Q4_JOIN(TORCH_Q4_QUANTIZES_, format)
#if TORCH_Q4_QUANTIZES(TORCH_Q4_FORMAT)
TORCH_Q4_KERNEL(quantize, QuantizeArgs, torch_q4::quantize<Format>)
#endif
