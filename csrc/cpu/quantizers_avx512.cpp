#define TORCH_Q4_NAMESPACE torch_q4_avx512
#include "quantizers.h"

constexpr torch_q4::cpu::Quantizers torch_q4::cpu::kAvx512Quantizers =
    TORCH_Q4_NAMESPACE::quantizer_table();
