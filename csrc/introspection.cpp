// What the library knows of itself. No tensors go in, so these work under any dispatch key.
#include "checks.h"
#include "cpu/kernels.h"
#include "gpu/common.h"

namespace torch_q4 {
namespace {

// A line per format: name, type number, elements and bytes of a block.
std::string format_table() {
  std::string table;
  for (const FormatInfo& info : kFormatInfos) {
    table +=
        text_of(info.name, ' ', info.type_id, ' ', info.block_elems, ' ', info.block_bytes, '\n');
  }
  return table;
}

std::string cpu_isa() { return cpu::kernels().isa; }

// Lines "hip ARCHITECTURE..." and "cuda ARCHITECTURE...": what the GPU kernels were built for. A
// line "driver PATH" where the process has a GPU driver's library.
std::string gpu_table() {
  std::string table =
      std::string("hip ") + gpu::built_for_hip() + "\ncuda " + gpu::built_for_cuda() + '\n';
  try {
    table += "driver " + gpu::driver_path("gpu_table") + '\n';
  } catch (const std::runtime_error&) {
    // No GPU is in use: nothing to tell.
  }
  return table;
}

// Why kernels do not run on a device; "" where they do. Loads one to find out.
std::string gpu_problem(int64_t device) {
  try {
    const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
    gpu::find_kernel("gpu_problem", gpu::kCommonObject, gpu::kSumSplits, static_cast<int>(device));
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CompositeExplicitAutograd, m) {
  m.impl("format_table", TORCH_BOX(&format_table));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("gpu_table", TORCH_BOX(&gpu_table));
  m.impl("gpu_problem", TORCH_BOX(&gpu_problem));
}

}  // namespace torch_q4
