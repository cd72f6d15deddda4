#include "driver.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>

#include "../error.h"

namespace torch_q4::gpu {
namespace {

// From the two libraries' public headers.
constexpr int kHipMultiprocessorCount = 63;
constexpr int kCudaMultiprocessorCount = 16;
constexpr int kCudaMajor = 75, kCudaMinor = 76;
constexpr int kCudaSharedBytes = 97;        // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kCudaDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr Result kCudaInvalidContext = 201;

// CUlaunchAttribute and CUlaunchConfig. A value takes 64 bytes; this attribute's is an int.
constexpr int kCudaProgrammaticSerialization = 6;
struct CudaLaunchAttribute {
  int id;
  int padding;
  int value[16];
};
struct CudaLaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  CudaLaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(CudaLaunchAttribute) == 72 && sizeof(CudaLaunchConfig) == 56);

// hipDeviceProp_t as hipGetDevicePropertiesR0600 fills it: the structure of ROCm 6.0, to which only
// reserved space has been put to use since. That symbol is asked for by its own name because the
// plain hipGetDeviceProperties is still ROCm 5's, with another layout.
constexpr size_t kHipArchNameOffset = 1160, kHipArchNameBytes = 256;
constexpr size_t kHipPropertiesBytes = 4096;  // 1472 in ROCm 6 and 7, and room to grow

struct Loaded {
  std::string hip, cuda;
  bool torch_cuda = false;
};

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

int note_library(dl_phdr_info* info, size_t, void* data) {
  auto& loaded = *static_cast<Loaded*>(data);
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string name = path.substr(path.rfind('/') + 1);
  if (starts_with(name, "libamdhip64") && name.find(".so") != std::string::npos) loaded.hip = path;
  if (starts_with(name, "libcuda.so")) loaded.cuda = path;
  if (starts_with(name, "libtorch_cuda")) loaded.torch_cuda = true;
  return 0;
}

}  // namespace

Driver::Driver(const char* op) {
  if (const char* given = std::getenv("TORCH_Q4_GPU_DRIVER")) {
    path_ = given;
    library_ = dlopen(given, RTLD_LAZY | RTLD_LOCAL);
    TORCH_Q4_CHECK(library_, op, ": TORCH_Q4_GPU_DRIVER must name a library that loads, got ",
                   dlerror());
  } else {
    Loaded loaded;
    dl_iterate_phdr(note_library, &loaded);
    // A process may have both, say through another package; torch has only one of them.
    const bool prefer_cuda = loaded.hip.empty() || (loaded.torch_cuda && !loaded.cuda.empty());
    path_ = prefer_cuda ? loaded.cuda : loaded.hip;
    TORCH_Q4_CHECK(
        !path_.empty(), op,
        ": libamdhip64.so (ROCm) or libcuda.so.1 (CUDA) must be loaded, which torch does "
        "when it uses a GPU, got neither");
    library_ = dlopen(path_.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    TORCH_Q4_CHECK(library_, op, ": ", path_, " must stay loaded, got ", dlerror());
  }

  hip_ = dlsym(library_, "hipModuleLoadData") != nullptr;
  if (hip_) {
    resolve(op, "hipModuleLoadData", module_load_);
    resolve(op, "hipModuleGetFunction", module_get_function_);
    resolve(op, "hipModuleLaunchKernel", launch_);
    resolve(op, "hipDeviceGetAttribute", get_attribute_);
    resolve(op, "hipThreadExchangeStreamCaptureMode", exchange_capture_mode_);
    resolve(op, "hipGetDevicePropertiesR0600", hip_get_properties_);
    resolve(op, "hipGetErrorName", hip_error_name_);
    resolve(op, "hipGetErrorString", hip_error_string_);
  } else {
    resolve(op, "cuModuleLoadData", module_load_);
    resolve(op, "cuModuleGetFunction", module_get_function_);
    resolve(op, "cuLaunchKernel", launch_);
    resolve(op, "cuDeviceGetAttribute", get_attribute_);
    resolve(op, "cuThreadExchangeStreamCaptureMode", exchange_capture_mode_);
    resolve(op, "cuGetErrorName", cu_error_name_);
    resolve(op, "cuGetErrorString", cu_error_string_);
    resolve(op, "cuDeviceGet", cu_device_get_);
    resolve(op, "cuCtxGetCurrent", cu_context_get_);
    resolve(op, "cuCtxSetCurrent", cu_context_set_);
    resolve(op, "cuDevicePrimaryCtxRetain", cu_primary_retain_);
    resolve(op, "cuFuncSetAttribute", cu_function_set_);
    cu_function_load_ = reinterpret_cast<Result (*)(Function)>(dlsym(library_, "cuFuncLoad"));
    // Older drivers have it, too, but cannot capture such a launch.
    if (cu_function_load_) {
      cu_launch_ex_ =
          reinterpret_cast<decltype(cu_launch_ex_)>(dlsym(library_, "cuLaunchKernelEx"));
    }
  }
}

void* Driver::symbol(const char* op, const char* name) const {
  void* address = dlsym(library_, name);
  TORCH_Q4_CHECK(address, op, ": ", path_, " must export ", name, ", got no such symbol");
  return address;
}

template <class Pointer>
void Driver::resolve(const char* op, const char* name, Pointer& pointer) const {
  pointer = reinterpret_cast<Pointer>(symbol(op, name));
}

Result Driver::get_function(Function* function, Module module, const char* name) const {
  const Result result = module_get_function_(function, module, name);
  // CUDA puts off loading a function to its first launch, where a stream capture would forbid it.
  return result != 0 || !cu_function_load_ ? result : cu_function_load_(*function);
}

Result Driver::allow_shared_bytes(Function function, int bytes) const {
  return hip_ ? 0 : cu_function_set_(function, kCudaDynamicSharedBytes, bytes);
}

Result Driver::launch_overlapping(Function function, unsigned grid_x, unsigned grid_y,
                                  unsigned threads, unsigned shared_bytes, Stream stream,
                                  void** params) const {
  if (!cu_launch_ex_) {
    return launch(function, grid_x, grid_y, threads, shared_bytes, stream, params);
  }
  CudaLaunchAttribute attribute = {kCudaProgrammaticSerialization, 0, {1}};
  const CudaLaunchConfig config = {grid_x, grid_y,       1,      threads,    1,
                                   1,      shared_bytes, stream, &attribute, 1};
  return cu_launch_ex_(&config, function, params, nullptr);
}

Result Driver::cuda_device(int device, int* handle) const { return cu_device_get_(handle, device); }

Result Driver::cuda_attribute(int device, int attribute, int* value) const {
  int handle = 0;
  const Result result = cuda_device(device, &handle);
  return result != 0 ? result : get_attribute_(value, attribute, handle);
}

Result Driver::get_multiprocessors(int device, int* count) const {
  return hip_ ? get_attribute_(count, kHipMultiprocessorCount, device)
              : cuda_attribute(device, kCudaMultiprocessorCount, count);
}

Result Driver::get_shared_bytes(int device, int* bytes) const {
  *bytes = 0;
  return hip_ ? 0 : cuda_attribute(device, kCudaSharedBytes, bytes);
}

std::string Driver::architecture(const char* op, int device) const {
  if (!hip_) {
    int major = 0, minor = 0;
    Result result = cuda_attribute(device, kCudaMajor, &major);
    if (result == 0) result = cuda_attribute(device, kCudaMinor, &minor);
    TORCH_Q4_CHECK(result == 0, op, ": device ", device, " must have a compute capability, got ",
                   describe(result));
    return "sm_" + std::to_string(major) + std::to_string(minor);
  }
  char properties[kHipPropertiesBytes] = {};
  const Result result = hip_get_properties_(properties, device);
  TORCH_Q4_CHECK(result == 0, op, ": device ", device, " must have properties, got ",
                 describe(result));
  const char* start = properties + kHipArchNameOffset;
  const std::string name(start, strnlen(start, kHipArchNameBytes));
  TORCH_Q4_CHECK(starts_with(name, "gfx"), op, ": the architecture of device ", device,
                 " must begin with gfx, got '", name, "'");
  return name.substr(0, name.find(':'));  // what follows are features, as in gfx90a:sramecc+:xnack-
}

std::string Driver::describe(Result error) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (hip_) {
    name = hip_error_name_(error);
    text = hip_error_string_(error);
  } else {
    cu_error_name_(error, &name);
    cu_error_string_(error, &text);
  }
  return (name ? name : "error " + std::to_string(error)) + " (" + (text ? text : "no text") + ")";
}

Result Driver::bind_context(int device) const {
  if (hip_) return 0;
  void* context = nullptr;
  Result result = cu_context_get_(&context);
  if (result != 0 || context) return result;
  int handle = 0;
  result = cuda_device(device, &handle);
  // Never released: torch keeps it for as long as the process lives, too.
  if (result == 0) result = cu_primary_retain_(&context, handle);
  return result != 0 ? result : cu_context_set_(context);
}

bool Driver::lacks_context(Result error) const { return !hip_ && error == kCudaInvalidContext; }

}  // namespace torch_q4::gpu
