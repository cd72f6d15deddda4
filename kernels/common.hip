// The kernels into which no format enters.
#include "quantize.h"
#if !defined(__CUDACC__)
#include "linear/pipelined.h"
#endif
#if defined(TORCH_Q4_HOPPER)
#include "linear/hopper_many.h"
#endif

using namespace torch_q4;

extern "C" __global__ void __launch_bounds__(gpu::kBlockThreads)
    quantize_activations(gpu::ActivationArgs a) {
  torch_q4::quantize_activations(a);
}

extern "C" __global__ void __launch_bounds__(gpu::kBlockThreads) sum_splits(gpu::SumArgs a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * gpu::kBlockThreads + threadIdx.x;
  wait_for_previous();
  if (index >= a.count) return;
  float sum = 0;
  for (int split = 0; split < a.splits; ++split) sum += a.partial[split * a.count + index];
  int64_t to = index;
  if (a.rows != a.n || a.bias != nullptr) {  // else there is nothing to divide for
    const int64_t row = index / a.rows, x_row = index - row * a.rows;
    if (a.bias != nullptr) sum += load_value(a.bias, x_row, a.dtype);
    to = row * a.n + x_row;
  }
  store_value(a.out, to, sum, a.dtype);
}

#if !defined(__CUDACC__)
extern "C" __global__ void __launch_bounds__(gpu::kBlockThreads) arrange_lanes(gpu::ArrangeArgs a) {
  torch_q4::arrange_lanes(a);
}
#endif

#if defined(TORCH_Q4_HOPPER)
extern "C" __global__ void __launch_bounds__(gpu::kBlockThreads) arrange(gpu::ArrangeArgs a) {
  torch_q4::arrange(a);
}
#endif
