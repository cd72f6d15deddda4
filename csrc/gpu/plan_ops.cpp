// The operators that set and show plans. No tensors go in, so these work under any dispatch key.
#include <array>

#include "common.h"
#include "plans.h"

namespace torch_q4::gpu {
namespace {

PlanKey key_of(const char* op, int64_t format_id, ScalarType dtype, bool packed, int64_t n,
               int64_t k) {
  check_float(op, "dtype", dtype);
  return {check_format(op, format_id).index, dtype_of(dtype), packed, n, k};
}

void set_plan(int64_t device, int64_t format, ScalarType dtype, bool packed, int64_t n, int64_t k,
              std::string plan) {
  const char* op = "_set_linear_plan";
  set_linear_plan(op, device, key_of(op, format, dtype, packed, n, k), plan);
}

std::string plan(int64_t device, int64_t format, ScalarType dtype, bool packed, int64_t n,
                 int64_t k) {
  const char* op = "_linear_plan";
  return linear_plan(op, device, key_of(op, format, dtype, packed, n, k));
}

std::string kernels(ScalarType dtype, bool packed, std::optional<int64_t> device) {
  const char* op = "_linear_kernels";
  check_float(op, "dtype", dtype);
  std::optional<Family> family;
  if (device) family = device_info(op, static_cast<int>(*device)).family;
  return kernels_for(dtype_of(dtype), packed, family);
}

// What `linear` does on that device; with `by_table` what it would do without plans.
std::string choice(int64_t device, int64_t format, ScalarType dtype, bool packed, int64_t m,
                   int64_t n, int64_t k, bool by_table) {
  const char* op = "_linear_choice";
  const PlanKey key = key_of(op, format, dtype, packed, n, k);
  const int index = static_cast<int>(device);
  const DeviceInfo& info = device_info(op, index);
  const FormatInfo of_format = check_format(op, format);
  const LinearCase c = {key.dtype,
                        /*int8=*/false,
                        packed,
                        m,
                        n,
                        k,
                        info.family,
                        static_cast<int>(of_format.block_elems),
                        static_cast<int>(of_format.block_bytes),
                        info.multiprocessors};
  return linear_kernel_name(by_table ? choose_linear(c) : planned_linear(index, key.format, c));
}

// Python's operator. What goes wrong there must not keep a product from being computed.
void load_plans(int device) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(static_cast<int64_t>(device))};
  torch_call_dispatcher("torch_q4::_load_linear_plans", "", stack.data(), TORCH_ABI_VERSION);
}

void use_saved_plans() { set_plan_loader(&load_plans); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CompositeExplicitAutograd, m) {
  m.impl("_set_linear_plan", TORCH_BOX(&set_plan));
  m.impl("_linear_plan", TORCH_BOX(&plan));
  m.impl("_linear_kernels", TORCH_BOX(&kernels));
  m.impl("_linear_choice", TORCH_BOX(&choice));
  m.impl("_use_saved_plans", TORCH_BOX(&use_saved_plans));
}

}  // namespace torch_q4::gpu
