#define TORCH_Q4_NAMESPACE torch_q4_amx
#include "kernels_impl.h"

constexpr torch_q4::cpu::Kernels torch_q4::cpu::kAmxKernels =
    TORCH_Q4_NAMESPACE::kernel_table("amx");
