// Which kernel computes the product with a certain weight, where that was measured: plans, which
// take the place of dispatch.h's table. torch_q4/_tune.py measures, saves and brings them back.
//
// Every product asks, so nothing here locks or hashes: a device's plans are one sorted array that
// never changes. A new plan makes a new array; the old one stays, since someone may be reading it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace torch_q4::gpu {

// A weight, and the activations' dtype. `format` is a position in TORCH_Q4_FORMATS.
struct PlanKey {
  int format;
  DType dtype;
  bool packed;
  int64_t n, k;
};

// The first step that has enough rows is taken; beyond the last one the table decides, because
// nothing was measured there.
struct PlanStep {
  int64_t most_rows;
  LinearKernel kernel;
};
using Plan = std::vector<PlanStep>;

struct PlanTable {
  std::vector<std::pair<PlanKey, Plan>> plans;  // in the order of their keys
};

extern const PlanTable kNoPlans;

// By device. Null until the first product, which brings the plans that were saved.
extern std::atomic<const PlanTable*> plan_tables[kMaxDevices];

// Called at a device's first product, or before its first plan is set. Must not throw.
using PlanLoader = void (*)(int device);
void set_plan_loader(PlanLoader loader);

// The same as plan_tables[device], loaded if need be.
const PlanTable* loaded_plans(int device);

// The kernel of a plan, or the table's.
LinearKernel choose_by_plans(const PlanTable& table, int format, const LinearCase& c);

inline LinearKernel planned_linear(int device, int format, const LinearCase& c) {
  const PlanTable* table = plan_tables[device].load(std::memory_order_relaxed);
  if (table == &kNoPlans || c.int8) return choose_linear(c);
  return choose_by_plans(*loaded_plans(device), format, c);
}

const LinearKernelInfo& find_linear_kernel(const char* op, const std::string& name);
// "" for those that only int8 has.
const char* linear_kernel_name(LinearKernel kernel);

// Throws where the kernel is not for that device.
void check_kernel_runs_on(const char* op, const LinearKernelInfo& kernel, int device);

// Blank-separated names of the kernels that a plan for such weights may have on some device, or on
// one of that family.
std::string kernels_for(DType dtype, bool packed, std::optional<Family> family);

// A plan's text is a line "MOST_ROWS KERNEL" for each step, most rows rising. An empty one removes
// the plan.
void set_linear_plan(const char* op, int64_t device, const PlanKey& key, const std::string& text);

// As set; "" where there is none.
std::string linear_plan(const char* op, int64_t device, const PlanKey& key);

}  // namespace torch_q4::gpu
