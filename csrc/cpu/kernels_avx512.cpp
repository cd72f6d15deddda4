#define TORCH_Q4_NAMESPACE torch_q4_avx512
#include "kernels_impl.h"

constexpr torch_q4::cpu::Kernels torch_q4::cpu::kAvx512Kernels =
    TORCH_Q4_NAMESPACE::kernel_table("avx512");
