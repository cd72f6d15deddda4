// Every operator's schema, and nothing else. Kernels register themselves in the file that holds
// them: csrc/cpu/OP.cpp under the CPU key, csrc/gpu/OP.cpp under CUDA, which is ROCm's key as well.
// Fakes, autograd and autocast: torch_q4/ops.py.
//
// `format` is ggml's type number (torch_q4.formats), so that no call compares format names.
// `packed` says that blocks are in the layout of kernels/packed.h, not in GGML's own order.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_q4, m) {
  m.def("quantize(Tensor w, int format, Tensor? importance=None) -> Tensor");
  m.def("dequantize(Tensor blocks, int format, ScalarType dtype) -> Tensor");
  m.def("pack(Tensor blocks, int format) -> Tensor");
  m.def("unpack(Tensor packed, int format) -> Tensor");
  m.def("pack_(Tensor(a!) blocks, int format) -> ()");
  m.def(
      "linear(Tensor x, Tensor blocks, int format, Tensor? bias=None, str compute=\"exact\", "
      "bool packed=False) -> Tensor");
  m.def("linear_transposed(Tensor grad, Tensor blocks, int format, bool packed=False) -> Tensor");
  m.def(
      "embedding(Tensor indices, Tensor blocks, int format, ScalarType dtype, bool packed=False) "
      "-> Tensor");
  // By a named kernel, on a GPU: what tests compare with each other.
  m.def(
      "_linear_with(Tensor x, Tensor blocks, int format, Tensor? bias, str compute, bool packed, "
      "str kernel) -> Tensor");
  // Plans: which kernel `linear` takes for a weight, where torch_q4.tune measured it. A plan's text
  // is a line "MOST_ROWS KERNEL" for each step; an empty one removes the plan. _load_linear_plans
  // is Python's (torch_q4/_tune.py); after _use_saved_plans a device's first product calls it.
  m.def(
      "_set_linear_plan(int device, int format, ScalarType dtype, bool packed, int n, int k, "
      "str plan) -> ()");
  m.def("_linear_plan(int device, int format, ScalarType dtype, bool packed, int n, int k) -> str");
  m.def("_linear_kernels(ScalarType dtype, bool packed, int? device=None) -> str");
  m.def(
      "_linear_choice(int device, int format, ScalarType dtype, bool packed, int m, int n, int k, "
      "bool by_table=False) -> str");
  m.def("_load_linear_plans(int device) -> ()");
  m.def("_use_saved_plans() -> ()");
  m.def("format_table() -> str");
  m.def("cpu_isa() -> str");
  m.def("gpu_table() -> str");
  m.def("gpu_problem(int device) -> str");
}
