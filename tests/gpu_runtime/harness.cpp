// csrc/gpu's torch-free part as C functions, for tests/test_gpu_runtime.py. Those that can fail
// return the error's text.
#include <atomic>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/gpu/dispatch.h"
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

void* const kStream = reinterpret_cast<void*>(0x1234);

}  // namespace

extern "C" {

int kernel_count() { return kKernelCount; }

const char* name_of_kernel(int kernel) {
  return text_of([&] { return kernel_name(Kernel(kernel)); });
}

int matvec_number(int dtype, int width) { return matvec_kernel(DType(dtype), width); }
int matmul_number(int dtype, int width) { return matmul_kernel(DType(dtype), width); }

// A kernel of the first format that takes LinearArgs by rows, `columns` to a block.
const char* launch_linear(int kernel, int device, int columns, const LinearArgs* args) {
  return text_of([&] {
    launch("linear", CodeObject(0), Kernel(kernel), device, kStream, rows_grid(*args, columns),
           *args);
    return "";
  });
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

// The number of the LinearKernel.
int choose(int dtype, int int8, int packed, int64_t m, int family) {
  return static_cast<int>(
      choose_linear({DType(dtype), int8 != 0, packed != 0, m, 4096, 4096, Family(family)}));
}

int splits(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  return transposed_splits(m, n, k, multiprocessors);
}
}
