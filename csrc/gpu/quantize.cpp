#include "common.h"

namespace torch_q4::gpu {
namespace {

// Formats whose quantiser is simple enough to be a kernel. The others search for their scales,
// which is written once, for the CPU, and must give ggml's bytes.
bool has_kernel(const FormatInfo& format) {
  return format.type_id == Q4_0::kTypeId || format.type_id == Q8_0::kTypeId;
}

// By way of the CPU; waits for the device.
Tensor quantize_on_cpu(const Tensor& w, int64_t format_id,
                       const std::optional<Tensor>& importance) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::optional<Tensor> weights;
  if (importance) weights = torch::stable::to(*importance, cpu);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(torch::stable::to(w, cpu)),
                                    torch::stable::detail::from(format_id),
                                    torch::stable::detail::from(weights)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("torch_q4::quantize", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::to(torch::stable::detail::to<Tensor>(stack[0]), w.device());
}

Tensor quantize(const Tensor& w, int64_t format_id, std::optional<Tensor> importance) {
  const FormatInfo format = check_quantize(w, format_id, importance);
  if (importance || !has_kernel(format)) return quantize_on_cpu(w, format_id, importance);
  const Call call("quantize", format, w);
  std::vector<int64_t> shape = shape_of(w);
  shape.back() = shape.back() / format.block_elems * format.block_bytes;
  Tensor blocks = call.empty(shape, ScalarType::Byte);
  if (blocks.numel() == 0) return blocks;

  const Tensor source = aligned(w);
  QuantizeArgs args;
  args.w = source.const_data_ptr();
  args.blocks = static_cast<uint8_t*>(blocks.mutable_data_ptr());
  args.count = source.numel();
  args.dtype = dtype_of(source.scalar_type());
  call.run(kQuantize, quantize_grid(args, format.block_elems), args);
  return blocks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CUDA, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace torch_q4::gpu
