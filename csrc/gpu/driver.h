// The GPU driver's library that torch has loaded already, HIP's or CUDA's, behind one set of
// function pointers. Neither is linked against nor are their headers needed: a build without either
// serves both, and whichever version torch brought is the one that is used.
#pragma once

#include <string>

namespace torch_q4::gpu {

// Both libraries' handles are pointers and their results integers, 0 for success.
using Result = int;
using Module = void*;
using Function = void*;
using Stream = void*;

class Driver {
 public:
  // Opens the library that the environment variable TORCH_Q4_GPU_DRIVER names (tests do that), or
  // else finds the one that this process has loaded. Throws where there is none, or where it lacks
  // a function.
  explicit Driver(const char* op);

  bool is_hip() const { return hip_; }
  const std::string& path() const { return path_; }

  // All of these concern the current device, or the one that is named.
  Result load_module(Module* module, const void* image) const {
    return module_load_(module, image);
  }
  Result get_function(Function* function, Module module, const char* name) const;
  // Lets the function be launched with so much dynamic shared memory. CUDA wants to be told of more
  // than 48 kB, HIP does not.
  Result allow_shared_bytes(Function function, int bytes) const;
  Result launch(Function function, unsigned grid_x, unsigned grid_y, unsigned threads,
                unsigned shared_bytes, Stream stream, void** params) const {
    return launch_(function, grid_x, grid_y, 1, threads, 1, 1, shared_bytes, stream, params,
                   nullptr);
  }
  // The same for a kernel that waits for the one before it by itself. Where the driver knows no
  // such thing it does not begin before that one's end, as ever.
  Result launch_overlapping(Function function, unsigned grid_x, unsigned grid_y, unsigned threads,
                            unsigned shared_bytes, Stream stream, void** params) const;
  Result get_multiprocessors(int device, int* count) const;
  // The most that allow_shared_bytes may name; 0 for HIP.
  Result get_shared_bytes(int device, int* bytes) const;
  // "gfx90a" or "sm_90".
  std::string architecture(const char* op, int device) const;
  // "hipErrorInvalidImage (device kernel image is invalid)"
  std::string describe(Result error) const;

  // CUDA's driver works on the calling thread's current context. Threads in which torch has not yet
  // done anything have none: this gives the thread the device's, the one that torch uses.
  Result bind_context(int device) const;
  // Whether a launch failed for want of that.
  bool lacks_context(Result error) const;

  // While one lives, the thread may do what a stream capture forbids, such as loading a module.
  class CaptureAllowed {
   public:
    explicit CaptureAllowed(const Driver& driver) : driver_(driver) {
      driver_.exchange_capture_mode_(&mode_);
    }
    ~CaptureAllowed() { driver_.exchange_capture_mode_(&mode_); }
    CaptureAllowed(const CaptureAllowed&) = delete;
    CaptureAllowed& operator=(const CaptureAllowed&) = delete;

   private:
    const Driver& driver_;
    int mode_ = 2;  // hipStreamCaptureModeRelaxed and CU_STREAM_CAPTURE_MODE_RELAXED
  };

 private:
  void* symbol(const char* op, const char* name) const;
  template <class Pointer>
  void resolve(const char* op, const char* name, Pointer& pointer) const;
  Result cuda_device(int device, int* handle) const;
  Result cuda_attribute(int device, int attribute, int* value) const;

  void* library_ = nullptr;
  std::string path_;
  bool hip_ = false;

  // The same in both libraries but for their prefix.
  Result (*module_load_)(Module*, const void* image) = nullptr;
  Result (*module_get_function_)(Function*, Module, const char* name) = nullptr;
  Result (*launch_)(Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                    unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream,
                    void** params, void** extra) = nullptr;
  Result (*get_attribute_)(int* value, int attribute, int device) = nullptr;
  Result (*exchange_capture_mode_)(int* mode) = nullptr;
  // HIP only.
  Result (*hip_get_properties_)(void* properties, int device) = nullptr;
  const char* (*hip_error_name_)(Result) = nullptr;
  const char* (*hip_error_string_)(Result) = nullptr;
  // CUDA only.
  Result (*cu_error_name_)(Result, const char**) = nullptr;
  Result (*cu_error_string_)(Result, const char**) = nullptr;
  Result (*cu_device_get_)(int* handle, int device) = nullptr;
  Result (*cu_context_get_)(void** context) = nullptr;
  Result (*cu_context_set_)(void* context) = nullptr;
  Result (*cu_primary_retain_)(void** context, int handle) = nullptr;
  Result (*cu_function_set_)(Function, int attribute, int value) = nullptr;
  Result (*cu_function_load_)(Function) = nullptr;  // null before CUDA 12.4
  Result (*cu_launch_ex_)(const void* config, Function, void** params, void** extra) = nullptr;
};

}  // namespace torch_q4::gpu
