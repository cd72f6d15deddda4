#include "plans.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <tuple>

#include "../error.h"

namespace torch_q4::gpu {

const PlanTable kNoPlans;
std::atomic<const PlanTable*> plan_tables[kMaxDevices];

namespace {

std::atomic<PlanLoader> plan_loader;
std::mutex setting;  // of those who set plans; nobody holds it while a loader runs

using Entry = std::pair<PlanKey, Plan>;

auto ordered(const PlanKey& key) {
  return std::make_tuple(key.n, key.k, key.format, key.dtype, key.packed);
}

// Where the key is, or would be.
std::vector<Entry>::const_iterator place_of(const PlanTable& table, const PlanKey& key) {
  return std::lower_bound(
      table.plans.begin(), table.plans.end(), key,
      [](const Entry& entry, const PlanKey& key) { return ordered(entry.first) < ordered(key); });
}

const Plan* find_plan(const PlanTable& table, const PlanKey& key) {
  const auto place = place_of(table, key);
  const bool found = place != table.plans.end() && ordered(place->first) == ordered(key);
  return found ? &place->second : nullptr;
}

int check_device(const char* op, int64_t device) {
  TORCH_Q4_CHECK(device >= 0 && device < kMaxDevices, op, ": device must be in [0, ", kMaxDevices,
                 "), got ", device);
  return static_cast<int>(device);
}

Plan parse_plan(const char* op, int device, const PlanKey& key, const std::string& text) {
  Plan plan;
  for (const std::string& line : split_text(text, "\n")) {
    const std::vector<std::string> words = split_text(line, " ");
    char* end = nullptr;
    errno = 0;
    const int64_t most_rows = words.empty() ? 0 : std::strtoll(words[0].c_str(), &end, 10);
    TORCH_Q4_CHECK(words.size() == 2 && *end == '\0' && errno == 0, op,
                   ": a line of plan must be MOST_ROWS KERNEL, got ", line);
    const std::string& name = words[1];
    const int64_t before = plan.empty() ? 0 : plan.back().most_rows;
    TORCH_Q4_CHECK(most_rows > before, op, ": rows of plan must rise, got ", most_rows, " after ",
                   before);
    const LinearKernelInfo& info = find_linear_kernel(op, name);
    TORCH_Q4_CHECK(takes_layout(info, key.packed), op, ": packed must be true for ", name,
                   ", got false");
    TORCH_Q4_CHECK(takes_dtype(info, key.dtype), op, ": dtype must be float16 or bfloat16 for ",
                   name, ", got float32");
    check_kernel_runs_on(op, info, device);
    plan.push_back({most_rows, info.kernel});
  }
  return plan;
}

}  // namespace

void set_plan_loader(PlanLoader loader) { plan_loader.store(loader); }

const PlanTable* loaded_plans(int device) {
  const PlanTable* table = plan_tables[device].load(std::memory_order_acquire);
  if (table) return table;
  const PlanLoader load = plan_loader.load();
  if (!load) return &kNoPlans;
  // Whoever calls meanwhile, the loader included, goes by the table instead of waiting: a lock held
  // here could stand against Python's, which the loader takes.
  if (plan_tables[device].compare_exchange_strong(table, &kNoPlans)) load(device);
  return plan_tables[device].load(std::memory_order_acquire);
}

LinearKernel choose_by_plans(const PlanTable& table, int format, const LinearCase& c) {
  if (const Plan* plan = find_plan(table, {format, c.dtype, c.packed, c.n, c.k})) {
    for (const PlanStep& step : *plan) {
      if (c.m <= step.most_rows) return step.kernel;
    }
  }
  return choose_linear(c);
}

const LinearKernelInfo& find_linear_kernel(const char* op, const std::string& name) {
  std::string known;
  for (const LinearKernelInfo& info : kLinearKernels) {
    if (name == info.name) return info;
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  }
  fail(op, ": kernel must be one of ", known, ", got ", name);
}

const char* linear_kernel_name(LinearKernel kernel) {
  for (const LinearKernelInfo& info : kLinearKernels) {
    if (info.kernel == kernel) return info.name;
  }
  return "";  // int8's own have none
}

void check_kernel_runs_on(const char* op, const LinearKernelInfo& kernel, int device) {
  // Without asking a driver, which there may not be.
  if (kernel.families == LinearKernelInfo::kAnyFamily) return;
  const DeviceInfo& info = device_info(op, device);
  if (takes_family(kernel, info.family)) return;
  if (kernel.families != LinearKernelInfo::kHopperOnly) {
    const bool amd = kernel.families == LinearKernelInfo::kAnyAmd;
    fail(op, ": the GPU must be ", amd ? "AMD's" : "NVIDIA's", " for ", kernel.name, ", got ",
         info.architecture);
  }
  const bool is_hopper = info.architecture == "sm_90";
  fail(op, ": the GPU must be sm_90, with kernels built for sm_90a, for ", kernel.name, ", got ",
       info.architecture, is_hopper ? " with kernels for " : "", is_hopper ? built_for_cuda() : "");
}

std::string kernels_for(DType dtype, bool packed, std::optional<Family> family) {
  std::string names;
  for (const LinearKernelInfo& info : kLinearKernels) {
    if (!takes_layout(info, packed) || !takes_dtype(info, dtype)) continue;
    if (family && !takes_family(info, *family)) continue;
    names += (names.empty() ? "" : " ") + std::string(info.name);
  }
  return names;
}

void set_linear_plan(const char* op, int64_t device_index, const PlanKey& key,
                     const std::string& text) {
  const int device = check_device(op, device_index);
  TORCH_Q4_CHECK(key.n > 0 && key.k > 0, op, ": n and k must be at least 1, got ", key.n, ", ",
                 key.k);
  Plan plan = parse_plan(op, device, key, text);
  loaded_plans(device);  // else this plan would keep the saved ones from being loaded
  const std::lock_guard<std::mutex> lock(setting);
  const PlanTable* old = plan_tables[device].load(std::memory_order_acquire);
  auto* table = new PlanTable(old ? *old : kNoPlans);
  const auto place = table->plans.begin() + (place_of(*table, key) - table->plans.cbegin());
  const bool found = find_plan(*table, key) != nullptr;
  if (plan.empty()) {
    if (found) table->plans.erase(place);
  } else if (found) {
    place->second = std::move(plan);
  } else {
    table->plans.insert(place, {key, std::move(plan)});
  }
  plan_tables[device].store(table, std::memory_order_release);
}

std::string linear_plan(const char* op, int64_t device, const PlanKey& key) {
  const Plan* plan = find_plan(*loaded_plans(check_device(op, device)), key);
  std::string text;
  if (plan) {
    for (const PlanStep& step : *plan) {
      text += text_of(step.most_rows, ' ', linear_kernel_name(step.kernel), '\n');
    }
  }
  return text;
}

}  // namespace torch_q4::gpu
