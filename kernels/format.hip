// The kernels of one format, TORCH_Q4_FORMAT: this file is compiled once for each in the registry.
// arguments.h says what they take and how they are launched.
#include "dequantize.h"
#include "element.h"
#include "matmul.h"
#include "matvec.h"
#include "quantize.h"
#include "repack.h"
#include "transposed.h"
#if defined(TORCH_Q4_HOPPER)
#include "paired.h"
#include "staged.h"
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

#define TORCH_Q4_MATMUL(name, T, columns, blocks)                                                  \
  extern "C" __global__ void TORCH_Q4_BLOCKS(gpu::kBlockThreads, blocks) name(gpu::LinearArgs a) { \
    matmul<Format, T, columns>(a);                                                                 \
  }

extern "C" __global__ void TORCH_Q4_BLOCKS(gpu::kBlockThreads, 8)
    dequantize(gpu::DequantizeArgs a) {
  torch_q4::dequantize<Format>(a);
}
TORCH_Q4_KERNEL(embedding, EmbeddingArgs, torch_q4::embedding<Format>)
TORCH_Q4_KERNEL(pack, RepackArgs, repack<Format, true>)
TORCH_Q4_KERNEL(unpack, RepackArgs, repack<Format, false>)
TORCH_Q4_KERNEL(transposed, TransposedArgs, torch_q4::transposed<Format>)

TORCH_Q4_KERNEL(matvec_int8_1, LinearArgs, matvec_int8<Format, 1>)
TORCH_Q4_KERNEL(matvec_int8_2, LinearArgs, matvec_int8<Format, 2>)
TORCH_Q4_KERNEL(matvec_int8_4, LinearArgs, matvec_int8<Format, 4>)
TORCH_Q4_KERNEL(matvec_int8_8, LinearArgs, matvec_int8<Format, 8>)

#define TORCH_Q4_KERNELS_OF(name, T)                                   \
  TORCH_Q4_KERNEL(element_##name, LinearArgs, element<Format, T>)      \
  TORCH_Q4_KERNEL(matvec_##name##_1, LinearArgs, matvec<Format, T, 1>) \
  TORCH_Q4_KERNEL(matvec_##name##_2, LinearArgs, matvec<Format, T, 2>) \
  TORCH_Q4_KERNEL(matvec_##name##_4, LinearArgs, matvec<Format, T, 4>) \
  TORCH_Q4_KERNEL(matvec_##name##_8, LinearArgs, matvec<Format, T, 8>)
TORCH_Q4_KERNELS_OF(f32, Float32)
TORCH_Q4_KERNELS_OF(f16, Float16)
TORCH_Q4_KERNELS_OF(bf16, BFloat16)

TORCH_Q4_MATMUL(matmul_f16_16, Float16, 16, 3)
TORCH_Q4_MATMUL(matmul_f16_64, Float16, 64, 2)
TORCH_Q4_MATMUL(matmul_bf16_16, BFloat16, 16, 3)
TORCH_Q4_MATMUL(matmul_bf16_64, BFloat16, 64, 2)

#if defined(TORCH_Q4_HOPPER)
#define TORCH_Q4_STAGED(name, T, columns)                                       \
  extern "C" __global__ void __launch_bounds__(gpu::staged_threads(columns), 1) \
      staged_##name##_##columns(gpu::StagedArgs a) {                            \
    staged<Format, T, columns>(a);                                              \
  }
#define TORCH_Q4_STAGED_OF(name, T) \
  TORCH_Q4_STAGED(name, T, 8)       \
  TORCH_Q4_STAGED(name, T, 16)      \
  TORCH_Q4_STAGED(name, T, 32)      \
  TORCH_Q4_STAGED(name, T, 64)      \
  TORCH_Q4_STAGED(name, T, 128)
TORCH_Q4_STAGED_OF(f16, Float16)
TORCH_Q4_STAGED_OF(bf16, BFloat16)

#define TORCH_Q4_PAIRED(name, T, columns)                                                        \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(gpu::kPairedThreads, 1) \
      paired_##name##_##columns(gpu::PairedArgs a) {                                             \
    paired<Format, T, columns>(a);                                                               \
  }
TORCH_Q4_PAIRED(f16, Float16, 128)
TORCH_Q4_PAIRED(f16, Float16, 256)
TORCH_Q4_PAIRED(bf16, BFloat16, 128)
TORCH_Q4_PAIRED(bf16, BFloat16, 256)
#endif

// Which formats have a quantiser in quantize.h.
#define TORCH_Q4_QUANTIZES_Q4_0 1
#define TORCH_Q4_QUANTIZES_Q8_0 1
#define TORCH_Q4_JOIN(a, b) a##b
#define TORCH_Q4_QUANTIZES(format) TORCH_Q4_JOIN(TORCH_Q4_QUANTIZES_, format)
#if TORCH_Q4_QUANTIZES(TORCH_Q4_FORMAT)
TORCH_Q4_KERNEL(quantize, QuantizeArgs, torch_q4::quantize<Format>)
#endif
