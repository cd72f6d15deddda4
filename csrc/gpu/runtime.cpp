#include "runtime.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <vector>

#include "../error.h"
#include "driver.h"

// Set by CMake to what it compiled the kernels for.
#ifndef TORCH_Q4_BUILT_FOR_HIP
#define TORCH_Q4_BUILT_FOR_HIP ""
#endif
#ifndef TORCH_Q4_BUILT_FOR_CUDA
#define TORCH_Q4_BUILT_FOR_CUDA ""
#endif

namespace torch_q4::gpu {
namespace {

constexpr const char* kObjectNames[kCodeObjectCount] = {
#define TORCH_Q4_NAME(Format) Format::kName,
    TORCH_Q4_FORMATS(TORCH_Q4_NAME)
#undef TORCH_Q4_NAME
        "common"};

std::atomic<Function> functions[kMaxDevices][kCodeObjectCount][kKernelCount];
std::atomic<const DeviceInfo*> infos[kMaxDevices];

// Everything below is guarded by this. Nothing is ever unloaded: when static destructors run, the
// driver may be gone already.
std::mutex mutex;
Module modules[kMaxDevices][kCodeObjectCount];
std::vector<char>* images[kCodeObjectCount];

const Driver& driver(const char* op) {
  static const Driver found(op);  // a failure throws, and the next call tries again
  return found;
}

void check_device(const char* op, int device) {
  TORCH_Q4_CHECK(device >= 0 && device < kMaxDevices, op, ": device must be in [0, ", kMaxDevices,
                 "), got ", device);
}

// The directory of this library. torch_q4/kernels/ lies beside torch_q4/_C.so.
std::string library_directory() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&library_directory), &info) || !info.dli_fname) {
    return ".";
  }
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::string object_path(const Driver& driver, CodeObject object) {
  return library_directory() + "/kernels/" + kObjectNames[object] +
         (driver.is_hip() ? ".hipfb" : ".fatbin");
}

std::vector<std::string> words(const std::string& text) { return split_text(text, " \n"); }

std::string comma_separated(const std::string& text) {
  std::string result;
  for (const std::string& word : words(text)) result += (result.empty() ? "" : ", ") + word;
  return result;
}

// "90a" of sm_90a is for that very device; "90" is for every later minor version, too.
struct Capability {
  int number;
  bool specific;
};

Capability capability(const std::string& name) {
  const char* digits = name.c_str() + name.find('_') + 1;
  char* end = nullptr;
  const long number = std::strtol(digits, &end, 10);
  return {static_cast<int>(number), *end != '\0'};
}

// LLVM's generic targets and the processors that run their code.
constexpr struct {
  const char *generic, *members;
} kGenericTargets[] = {
    {"gfx9-generic", "gfx900 gfx902 gfx904 gfx906 gfx909 gfx90c"},
    {"gfx9-4-generic", "gfx940 gfx941 gfx942 gfx950"},
    {"gfx10-1-generic", "gfx1010 gfx1011 gfx1012 gfx1013"},
    {"gfx10-3-generic", "gfx1030 gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036"},
    {"gfx11-generic", "gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153"},
    {"gfx12-generic", "gfx1200 gfx1201"},
};

bool serves_one(const std::string& built, const std::string& architecture) {
  if (architecture.rfind("gfx", 0) != 0) {
    const Capability code = capability(built), device = capability(architecture);
    if (code.specific) return code.number == device.number;
    if (built.rfind("compute_", 0) == 0) return code.number <= device.number;  // PTX
    return code.number / 10 == device.number / 10 && code.number <= device.number;
  }
  const std::string target = built.substr(0, built.find(':'));  // without features
  if (target == architecture) return true;
  for (const auto& generic : kGenericTargets) {
    if (target != generic.generic) continue;
    for (const std::string& member : words(generic.members)) {
      if (member == architecture) return true;
    }
  }
  return false;
}

Family family_of(const std::string& architecture) {
  if (architecture.rfind("gfx", 0) != 0) {
    const bool has_hopper_rows = std::string(built_for_cuda()).find("90a") != std::string::npos;
    return architecture == "sm_90" && has_hopper_rows ? Family::kHopper : Family::kNvidia;
  }
  const bool no_matrix =
      architecture.rfind("gfx10", 0) == 0 ||
      (architecture.rfind("gfx90", 0) == 0 && architecture != "gfx908" && architecture != "gfx90a");
  return no_matrix ? Family::kAmdNoMatrix : Family::kAmdMatrix;
}

// The command that builds kernels for this architecture.
std::string rebuild_command(const Driver& driver, const std::string& architecture) {
  // Some kernels are for sm_90a only.
  const std::string number = architecture.substr(3) + (architecture == "sm_90" ? "a" : "");
  const std::string setting =
      driver.is_hip() ? "TORCH_Q4_ROCM_ARCH=" + architecture : "TORCH_Q4_CUDA_ARCH=" + number;
  return setting + " pip install --no-build-isolation .";
}

void check_built_for(const char* op, const Driver& driver, const DeviceInfo& info) {
  const char* built = driver.is_hip() ? built_for_hip() : built_for_cuda();
  const char* compiler = driver.is_hip() ? "hipcc" : "nvcc";
  TORCH_Q4_CHECK(*built, op, ": torch_q4 must be built with GPU kernels for ",
                 driver.is_hip() ? "AMD" : "NVIDIA", " to run on ", info.architecture,
                 ", got a build without; with ", compiler,
                 " installed, run in its source: ", rebuild_command(driver, info.architecture));
  TORCH_Q4_CHECK(serves(built, info.architecture), op,
                 ": the GPU must be one that the kernels were built for, ", comma_separated(built),
                 ", got ", info.architecture, "; with ", compiler,
                 " installed, run in the source: ", rebuild_command(driver, info.architecture));
}

const std::vector<char>& read_image(const char* op, CodeObject object, const std::string& path) {
  if (!images[object]) {
    std::ifstream file(path, std::ios::binary);
    TORCH_Q4_CHECK(file, op, ": torch_q4 must have the GPU kernels ", path,
                   ", got no such file; this installation is not complete");
    images[object] = new std::vector<char>(std::istreambuf_iterator<char>(file), {});
  }
  return *images[object];
}

Module find_module(const char* op, const Driver& driver, CodeObject object, int device,
                   const DeviceInfo& info) {
  Module& module = modules[device][object];
  if (module) return module;
  check_built_for(op, driver, info);
  const std::string path = object_path(driver, object);
  // HIP may go on reading from the image after the call, so images are kept.
  const std::vector<char>& image = read_image(op, object, path);
  Module loaded = nullptr;
  const Result result = driver.load_module(&loaded, image.data());
  TORCH_Q4_CHECK(result == 0, op, ": the driver must load ", path, " on device ", device, ", ",
                 info.architecture, ", got ", driver.describe(result));
  return module = loaded;
}

bool has_dynamic_shared_memory(Kernel kernel) {
  return kernel >= kHopperRows && kernel < kQuantizeActivations;
}

// The first use of a kernel on a device.
Function load_kernel(const char* op, CodeObject object, Kernel kernel, int device) {
  const DeviceInfo& info = device_info(op, device);
  const Driver& driver = gpu::driver(op);
  const std::lock_guard<std::mutex> lock(mutex);
  auto& slot = functions[device][object][kernel];
  if (Function function = slot.load(std::memory_order_relaxed)) return function;
  const Driver::CaptureAllowed allowed(driver);
  Result result = driver.bind_context(device);
  TORCH_Q4_CHECK(result == 0, op, ": device ", device, " must have a context, got ",
                 driver.describe(result));
  const Module module = find_module(op, driver, object, device, info);
  Function function = nullptr;
  result = driver.get_function(&function, module, kernel_name(kernel).c_str());
  TORCH_Q4_CHECK(result == 0, op, ": ", object_path(driver, object), " must hold the kernel ",
                 kernel_name(kernel), " for ", info.architecture, ", got ",
                 driver.describe(result));
  if (has_dynamic_shared_memory(kernel)) {
    result = driver.allow_shared_bytes(function, info.shared_bytes);
    TORCH_Q4_CHECK(result == 0, op, ": ", kernel_name(kernel), " must be allowed ",
                   info.shared_bytes, " bytes of shared memory on ", info.architecture, ", got ",
                   driver.describe(result));
  }
  slot.store(function, std::memory_order_release);
  return function;
}

}  // namespace

std::string kernel_name(Kernel kernel) {
  constexpr const char* kSuffixes[kDTypes] = {"f32", "f16", "bf16"};
  const auto with_width = [](const std::string& name, int x_rows) {
    return name + "_" + std::to_string(x_rows);
  };
  switch (kernel) {
    case kDequantize:
      return "dequantize";
    case kEmbedding:
      return "embedding";
    case kPack:
      return "pack";
    case kUnpack:
      return "unpack";
    case kQuantize:
      return "quantize";
    case kTransposed:
      return "transposed";
    case kQuantizeActivations:
      return "quantize_activations";
    case kSumSplits:
      return "sum_splits";
    case kArrangeLanes:
      return "arrange_lanes";
    case kArrange:
      return "arrange";
    default:
      break;
  }
  if (kernel < kRows) return std::string("reference_") + kSuffixes[kernel - kReference];
  if (kernel < kRowsInt8) {
    const int place = kernel - kRows;
    return with_width(std::string("rows_") + kSuffixes[place / kRowsWidths],
                      kRowsXRows[place % kRowsWidths]);
  }
  if (kernel < kTiles) return with_width("rows_int8", kRowsXRows[kernel - kRowsInt8]);
  if (kernel < kPipelined) {
    const int place = kernel - kTiles;
    return with_width(std::string("tiles_") + kSuffixes[1 + place / kTilesWidths],
                      kTilesXRows[place % kTilesWidths]);
  }
  if (kernel < kHopperRows) {
    const int place = kernel - kPipelined;
    return with_width(std::string("pipelined_") + kSuffixes[1 + place / kPipelinedWidths],
                      kPipelinedXRows[place % kPipelinedWidths]);
  }
  if (kernel < kHopperMany) {
    const int place = kernel - kHopperRows;
    return with_width(std::string("hopper_rows_") + kSuffixes[1 + place / kHopperRowsWidths],
                      kHopperRowsXRows[place % kHopperRowsWidths]);
  }
  const int place = kernel - kHopperMany;
  return with_width(std::string("hopper_many_") + kSuffixes[1 + place / kHopperManyWidths],
                    kHopperManyXRows[place % kHopperManyWidths]);
}

const DeviceInfo& device_info(const char* op, int device) {
  check_device(op, device);
  if (const DeviceInfo* info = infos[device].load(std::memory_order_acquire)) return *info;
  const Driver& driver = gpu::driver(op);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const DeviceInfo* info = infos[device].load(std::memory_order_relaxed)) return *info;
  DeviceInfo info;
  info.architecture = driver.architecture(op, device);
  info.family = family_of(info.architecture);
  Result result = driver.get_multiprocessors(device, &info.multiprocessors);
  TORCH_Q4_CHECK(result == 0, op, ": device ", device, " must tell its multiprocessors, got ",
                 driver.describe(result));
  result = driver.get_shared_bytes(device, &info.shared_bytes);
  TORCH_Q4_CHECK(result == 0, op, ": device ", device, " must tell its shared memory, got ",
                 driver.describe(result));
  infos[device].store(new DeviceInfo(info), std::memory_order_release);
  return *infos[device].load(std::memory_order_relaxed);
}

void* find_kernel(const char* op, CodeObject object, Kernel kernel, int device) {
  check_device(op, device);
  const Function function = functions[device][object][kernel].load(std::memory_order_acquire);
  return function ? function : load_kernel(op, object, kernel, device);
}

void launch_raw(const char* op, CodeObject object, Kernel kernel, int device, void* stream,
                Grid grid, Block block, const void* args) {
  const Function function = find_kernel(op, object, kernel, device);
  const Driver& driver = gpu::driver(op);
  void* params[] = {const_cast<void*>(args)};
  const auto run = [&] {
    return block.overlaps ? driver.launch_overlapping(function, grid.x, grid.y, block.threads,
                                                      block.shared_bytes, stream, params)
                          : driver.launch(function, grid.x, grid.y, block.threads,
                                          block.shared_bytes, stream, params);
  };
  Result result = run();
  if (driver.lacks_context(result) && (result = driver.bind_context(device)) == 0) result = run();
  TORCH_Q4_CHECK(result == 0, op, ": the launch of ", kObjectNames[object], "'s ",
                 kernel_name(kernel), " must succeed, with a grid of ", grid.x, " x ", grid.y,
                 " on device ", device, ", ", device_info(op, device).architecture, ", got ",
                 driver.describe(result));
}

const char* built_for_hip() { return TORCH_Q4_BUILT_FOR_HIP; }
const char* built_for_cuda() { return TORCH_Q4_BUILT_FOR_CUDA; }

const std::string& driver_path(const char* op) { return driver(op).path(); }

bool serves(const std::string& built, const std::string& architecture) {
  for (const std::string& one : words(built)) {
    if (serves_one(one, architecture)) return true;
  }
  return false;
}

}  // namespace torch_q4::gpu
