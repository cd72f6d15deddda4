// The calls of HIP's driver that tests/device/driver.py makes, for kernels that were compiled for
// this CPU (hip/hip_runtime.h). A "code object" is the path of a library. Each thread of a block
// has a stack of its own and runs until it ends or waits for others, and then the next one
// does.
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../kernels/arguments.h"

namespace {

struct EmulatedThread {
  uint32_t thread, block_x, block_y, grid_x, grid_y;
  void (*synchronize)();
  const void* (*exchange)(const void* operands, size_t bytes, uint32_t lanes);
};

constexpr int kNotFound = 500;  // hipErrorNotFound
constexpr size_t kStackBytes = 128 << 10;

// A kernel's one argument. A launch does not say how large it is: as many bytes are taken as the
// largest has. All are larger than two registers and so passed in memory, where more bytes behind
// them do no harm.
struct Argument {
  char bytes[std::max({sizeof(torch_q4::gpu::LinearArgs), sizeof(torch_q4::gpu::HopperRowsArgs),
                       sizeof(torch_q4::gpu::HopperManyArgs),
                       sizeof(torch_q4::gpu::DequantizeArgs)})];
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool ended = false, at_barrier = false;
  uint32_t exchanges = 0;
};

// What the lanes of a wave hand over: of the last exchange and of the next, since the first lanes
// may come to that before the last have read this one.
struct Wave {
  std::vector<char> operands[2];
  uint32_t arrived = 0;
};

EmulatedThread place;
Argument argument;
void (*kernel)(Argument);
ucontext_t scheduler;
std::vector<Thread> threads;
std::vector<Wave> waves;

void give_way() { swapcontext(&threads[place.thread].context, &scheduler); }

void synchronize() {
  threads[place.thread].at_barrier = true;
  give_way();
}

const void* exchange(const void* operands, size_t bytes, uint32_t lanes) {
  Wave& wave = waves[place.thread / lanes];
  const uint32_t number = threads[place.thread].exchanges++;
  std::vector<char>& all = wave.operands[number % 2];
  all.resize(bytes * lanes);
  std::memcpy(all.data() + bytes * (place.thread % lanes), operands, bytes);
  ++wave.arrived;
  while (wave.arrived < (number + 1) * lanes) give_way();
  return all.data();
}

void run_thread() {
  kernel(argument);
  threads[place.thread].ended = true;
  give_way();
}

// Runs a thread on; false when it has ended.
bool resume(uint32_t thread) {
  place.thread = thread;
  swapcontext(&scheduler, &threads[thread].context);
  return !threads[thread].ended;
}

void run_block(uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.ended = thread.at_barrier = false;
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  waves.assign(count, {});
  for (uint32_t left = count; left > 0;) {
    bool ran = false;
    for (uint32_t i = 0; i < count; ++i) {
      if (threads[i].ended || threads[i].at_barrier) continue;
      ran = true;
      if (!resume(i)) --left;
    }
    if (ran) continue;  // until all that have not ended are at the barrier
    for (uint32_t i = 0; i < count; ++i) threads[i].at_barrier = false;
  }
}

}  // namespace

extern "C" {

int hipInit(unsigned) { return 0; }
int hipSetDevice(int) { return 0; }
int hipDeviceSynchronize() { return 0; }
const char* hipGetErrorString(int) { return "the emulator has no words for it"; }
int hipDeviceGetName(char* name, int size, int) {
  std::snprintf(name, static_cast<size_t>(size), "this CPU, as a GPU");
  return 0;
}
int hipRuntimeGetVersion(int* version) {
  *version = 0;
  return 0;
}
int hipMalloc(void** address, size_t bytes) {
  *address = std::aligned_alloc(256, (bytes + 511) / 256 * 256);
  return *address == nullptr;
}
int hipFree(void* address) {
  std::free(address);
  return 0;
}
int hipMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return 0;
}

int hipModuleLoadData(void** module, const char* path) {
  *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (*module == nullptr) {
    std::fprintf(stderr, "emulator: %s\n", dlerror());
    return 1;
  }
  place.synchronize = synchronize;
  place.exchange = exchange;
  *static_cast<EmulatedThread**>(dlsym(*module, "emulated_thread")) = &place;
  return 0;
}

int hipModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, name);
  return *function == nullptr ? kNotFound : 0;
}

int hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned,
                          unsigned count, unsigned, unsigned, unsigned, void*, void** arguments,
                          void*) {
  kernel = reinterpret_cast<void (*)(Argument)>(function);
  std::memcpy(&argument, arguments[0], sizeof(argument));
  if (threads.size() < count) threads.resize(count);
  place.grid_x = grid_x;
  place.grid_y = grid_y;
  for (place.block_y = 0; place.block_y < grid_y; ++place.block_y) {
    for (place.block_x = 0; place.block_x < grid_x; ++place.block_x) run_block(count);
  }
  return 0;
}
}
