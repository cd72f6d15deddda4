// Reads memory and does nothing else: what the speed of kernels that read a weight once is held
// against. bench_gpu.py compiles this when it runs and takes the quickest variant for each size.
#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
#endif

#include <cstdint>

struct ReadArgs {
  const uint4* data;
  int64_t count;   // of data
  uint32_t* sink;  // gets `match` where the words that a thread has read, XORed, are that
  uint32_t match;  // without which the compiler would leave out the loads
};

namespace {

__device__ uint32_t fold(const uint4& value) { return value.x ^ value.y ^ value.z ^ value.w; }

// kLoads loads are under way before the first is waited for.
template <int kLoads>
__device__ void read(const ReadArgs& args) {
  const int64_t threads = blockDim.x, portion = threads * kLoads;
  uint32_t seen = 0;
  int64_t start = blockIdx.x * portion;
#pragma unroll 1  // nvcc would hold four rounds' values in registers
  for (; start + portion <= args.count; start += gridDim.x * portion) {
    const uint4* from = args.data + start + threadIdx.x;
    uint4 values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) values[i] = from[i * threads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) seen ^= fold(values[i]);
  }
  for (int64_t i = start + threadIdx.x; i < args.count; i += threads) seen ^= fold(args.data[i]);
  if (seen == args.match) *args.sink = seen;
}

}  // namespace

extern "C" {

__global__ void __launch_bounds__(256) read_2(ReadArgs args) { read<2>(args); }
__global__ void __launch_bounds__(256) read_4(ReadArgs args) { read<4>(args); }
__global__ void __launch_bounds__(256) read_8(ReadArgs args) { read<8>(args); }

// What a launch costs in itself.
__global__ void __launch_bounds__(256) nothing(ReadArgs) {}

}  // extern "C"
