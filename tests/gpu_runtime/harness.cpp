// csrc/gpu's torch-free part as C functions, for tests/test_gpu_runtime.py. Those that can fail
// return the error's text.
#include <atomic>
#include <exception>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/gpu/dispatch.h"
#include "../../csrc/gpu/plans.h"
#include "../../csrc/gpu/runtime.h"

using namespace torch_q4::gpu;

namespace {

thread_local std::string message;

// What `run` returns, or the text of what it throws.
template <class Run>
const char* text_of(const Run& run) {
  try {
    message = run();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

constexpr int kQ4Bytes = 18;

// Measured on an H100: no other plan is faster for these.
constexpr HopperRowsPlan kOneWave = hopper_rows_plan(1, 14336, 4096, 32, kQ4Bytes, 132, 232448);
static_assert(kOneWave.groups == 7 && kOneWave.splits == 1);
constexpr HopperRowsPlan kSplit = hopper_rows_plan(1, 4096, 4096, 32, kQ4Bytes, 132, 232448);
static_assert(kSplit.groups == 8 && kSplit.splits == 4);

constexpr HopperManyPlan kPrompt = hopper_many_plan(512, 14336, 4096, 32, kQ4Bytes, 132, 232448);
static_assert(kHopperManyXRows[kPrompt.width] == 256 && kPrompt.splits == 1);
constexpr HopperManyPlan kSmallPrompt =
    hopper_many_plan(512, 4096, 4096, 32, kQ4Bytes, 132, 232448);
static_assert(kHopperManyXRows[kSmallPrompt.width] == 128 && kSmallPrompt.splits == 1);

void* const kStream = reinterpret_cast<void*>(0x1234);

}  // namespace

extern "C" {

int kernel_count() { return kKernelCount; }

const char* name_of_kernel(int kernel) {
  return text_of([&] { return kernel_name(Kernel(kernel)); });
}

int rows_number(int dtype, int width) { return rows_kernel(DType(dtype), width); }
int tiles_number(int dtype, int width) { return tiles_kernel(DType(dtype), width); }
int hopper_rows_number(int dtype, int width) { return hopper_rows_kernel(DType(dtype), width); }

// A kernel of the first format that takes LinearArgs by rows, `rows of x` to a block.
const char* launch_linear(int kernel, int device, int x_rows, const LinearArgs* args) {
  return text_of([&] {
    launch("linear", CodeObject(0), Kernel(kernel), device, kStream, rows_grid(*args, x_rows),
           *args);
    return "";
  });
}

// hopper_rows_T_C of the first format, Q4_0.
const char* launch_hopper_rows(int width, int device, const HopperRowsArgs* args) {
  return text_of([&] {
    const int x_rows = kHopperRowsXRows[width];
    const int bytes = hopper_rows_shared_bytes(*args, x_rows, 32, kQ4Bytes);
    launch("linear", CodeObject(0), hopper_rows_kernel(args->linear.dtype, width), device, kStream,
           hopper_rows_grid(*args, x_rows), *args,
           {static_cast<unsigned>(hopper_rows_threads(x_rows)), static_cast<unsigned>(bytes)});
    return "";
  });
}

// hopper_many_T_C of the first format, which waits for the kernel before it by itself.
const char* launch_hopper_many(int width, int device, const HopperManyArgs* args) {
  return text_of([&] {
    const int x_rows = kHopperManyXRows[width];
    const int bytes = hopper_many_shared_bytes(*args, x_rows, 32, kQ4Bytes);
    launch("linear", CodeObject(0), hopper_many_kernel(args->linear.dtype, width), device, kStream,
           hopper_many_grid(*args, x_rows, 132), *args,
           {kHopperManyThreads, static_cast<unsigned>(bytes), /*overlaps=*/true});
    return "";
  });
}

int threads_of_hopper_rows(int width) { return hopper_rows_threads(kHopperRowsXRows[width]); }
int bytes_of_hopper_rows(int width, const HopperRowsArgs* args) {
  return hopper_rows_shared_bytes(*args, kHopperRowsXRows[width], 32, kQ4Bytes);
}

// To `plan`: rows of x, groups, stages, splits, bytes of shared memory, and the grid's sides.
void plan_of_hopper_rows(int64_t m, int64_t n, int64_t k, int block_elems, int block_bytes,
                         int multiprocessors, int shared_bytes, int64_t* plan) {
  const HopperRowsPlan found =
      hopper_rows_plan(m, n, k, block_elems, block_bytes, multiprocessors, shared_bytes);
  const int x_rows = kHopperRowsXRows[found.width];
  HopperRowsArgs args = {};
  args.linear.m = m;
  args.linear.row_end = n / 16 * 16;
  args.groups = found.groups;
  args.stages = found.stages;
  args.splits = found.splits;
  const Grid grid = hopper_rows_grid(args, x_rows);
  const int bytes = hopper_rows_shared_bytes(args, x_rows, block_elems, block_bytes);
  const int64_t all[] = {x_rows, found.groups, found.stages, found.splits, bytes, grid.x, grid.y};
  for (int i = 0; i < 7; ++i) plan[i] = all[i];
}

// To `plan`: rows of x, stages of x, stages of the weights, splits, bytes of shared memory, blocks.
void plan_of_hopper_many(int64_t m, int64_t n, int64_t k, int block_elems, int block_bytes,
                         int multiprocessors, int shared_bytes, int64_t* plan) {
  const HopperManyPlan found =
      hopper_many_plan(m, n, k, block_elems, block_bytes, multiprocessors, shared_bytes);
  const int x_rows = kHopperManyXRows[found.width];
  HopperManyArgs args = {};
  args.linear.m = m;
  args.linear.row_end = n / 16 * 16;
  args.x_stages = found.x_stages;
  args.weight_stages = found.weight_stages;
  args.splits = found.splits;
  const Grid grid = hopper_many_grid(args, x_rows, multiprocessors);
  const int bytes = hopper_many_shared_bytes(args, x_rows, block_elems, block_bytes);
  const int64_t all[] = {x_rows, found.x_stages, found.weight_stages, found.splits, bytes, grid.x};
  for (int i = 0; i < 6; ++i) plan[i] = all[i];
}
int hopper_many_is_quicker(int64_t m, int64_t n, int64_t k, int block_elems, int block_bytes) {
  return hopper_many_beats_blas(
      {kFloat16, false, true, m, n, k, Family::kHopper, block_elems, block_bytes, 132});
}
int bytes_of_hopper_many(int width, const HopperManyArgs* args) {
  return hopper_many_shared_bytes(*args, kHopperManyXRows[width], 32, kQ4Bytes);
}

const char* find_in(int object, int kernel, int device) {
  return text_of([&] {
    find_kernel("linear", CodeObject(object), Kernel(kernel), device);
    return "";
  });
}

// `threads` threads ask for two kernels at once; returns how many got them.
int find_in_threads(int threads, int device) {
  std::atomic<int> ready{0}, found{0};
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&] {
      ++ready;
      while (ready < threads) {
      }
      try {
        find_kernel("linear", CodeObject(0), kDequantize, device);
        find_kernel("linear", CodeObject(0), kPack, device);
        ++found;
      } catch (const std::exception&) {
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  return found;
}

// A launch in a thread that has no context yet.
const char* launch_in_new_thread(int kernel, const LinearArgs* args) {
  std::string result;
  std::thread([&] { result = launch_linear(kernel, 0, 1, args); }).join();
  return text_of([&] { return result; });
}

const char* path_of_driver() {
  return text_of([] { return driver_path("linear"); });
}

int built_serves(const char* built, const char* architecture) {
  return serves(built, architecture);
}

int multiprocessors_of(int device) { return device_info("linear", device).multiprocessors; }
int shared_bytes_of(int device) { return device_info("linear", device).shared_bytes; }
int family_of(int device) { return static_cast<int>(device_info("linear", device).family); }

// The number of the LinearKernel.
int choose(int dtype, int int8, int packed, int64_t m, int64_t n, int family) {
  return static_cast<int>(choose_linear(
      {DType(dtype), int8 != 0, packed != 0, m, n, 4096, Family(family), 32, kQ4Bytes, 132}));
}

// Of a weight in the format of number `format`, (n, 4096), packed.
const char* set_plan(int64_t device, int format, int dtype, int packed, int64_t n,
                     const char* plan) {
  return text_of([&] {
    set_linear_plan("set", device, {format, DType(dtype), packed != 0, n, 4096}, plan);
    return "";
  });
}

const char* plan_of(int64_t device, int format, int dtype, int packed, int64_t n) {
  return text_of(
      [&] { return linear_plan("get", device, {format, DType(dtype), packed != 0, n, 4096}); });
}

// As `choose`, by the plans.
int planned(int device, int format, int dtype, int int8, int packed, int64_t m, int64_t n,
            int family) {
  const LinearCase c = {DType(dtype), int8 != 0,      packed != 0, m,        n,
                        4096,         Family(family), 32,          kQ4Bytes, 132};
  return static_cast<int>(planned_linear(device, format, c));
}

void set_loader(PlanLoader loader) { set_plan_loader(loader); }

// Of any family if `family` is negative.
const char* names_of_kernels(int dtype, int packed, int family) {
  return text_of([&] {
    std::optional<Family> of;
    if (family >= 0) of = Family(family);
    return kernels_for(DType(dtype), packed != 0, of);
  });
}

const char* check_runs_on(const char* kernel, int device) {
  return text_of([&] {
    check_kernel_runs_on("linear", find_linear_kernel("linear", kernel), device);
    return "";
  });
}

const char* name_of_choice(int kernel) {
  return text_of([&] { return linear_kernel_name(LinearKernel(kernel)); });
}

// One thread sets plans while others choose by them; returns how many choices were neither the
// table's nor a plan's. Plan i of 1000 is of n = i % 50 + 1 and says reference or blas.
int choose_while_setting(int threads) {
  std::atomic<bool> done{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&] {
      while (!done) {
        for (int64_t n = 1; n <= 51; ++n) {
          const LinearCase c = {kFloat16, false,           true, 4,        n,
                                4096,     Family::kNvidia, 32,   kQ4Bytes, 132};
          const LinearKernel kernel = planned_linear(0, 0, c);
          const bool planned = kernel == LinearKernel::kReference || kernel == LinearKernel::kBlas;
          if (kernel != choose_linear(c) && !(planned && n <= 50)) ++wrong;
        }
      }
    });
  }
  for (int i = 0; i < 1000; ++i) {
    const PlanKey key = {0, kFloat16, true, i % 50 + 1, 4096};
    set_linear_plan("set", 0, key, i % 3 ? "8 reference\n" : "8 blas\n");
  }
  done = true;
  for (std::thread& thread : all) thread.join();
  return wrong;
}

int splits_of_pipelined(int64_t m, int64_t n, int64_t k, int x_rows, int multiprocessors) {
  return pipelined_splits(m, n, k, x_rows, multiprocessors);
}

int splits(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  return transposed_splits(m, n, k, multiprocessors);
}
}
