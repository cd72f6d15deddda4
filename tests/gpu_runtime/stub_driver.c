// A GPU driver's library without a GPU: the functions of libamdhip64.so, or with STUB_CUDA those of
// libcuda.so.1, that csrc/gpu/driver.cpp asks for. It records what arrives and fails on request.
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
  char image[64];
} Module;

typedef struct {
  const Module* module;
  char name[64];
} Function;

// What tests read and set.
struct {
  int loads, lookups, launches, loads_under_capture, function_loads, attributes;
  int shared_allowed;  // the last attribute's value
  char image[64], kernel[64];
  unsigned grid[3], block[3], shared;
  int overlaps;  // whether the last launch may begin before the one before it has ended
  void* stream;
  unsigned char args[256];
  int args_bytes;
  // Results to return: 0 is success.
  int fail_load, fail_lookup, fail_launch, fail_attribute;
  char architecture[64];  // of HIP
  int major, minor;       // of CUDA
} stub = {.architecture = "gfx90a:sramecc+:xnack-", .major = 9};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int capture_mode = 0;

static int load_module(void** module, const void* image) {
  // Long enough for threads that do not wait for each other to load it twice.
  const struct timespec pause = {0, 20 * 1000 * 1000};
  nanosleep(&pause, NULL);
  pthread_mutex_lock(&lock);
  ++stub.loads;
  stub.loads_under_capture += capture_mode != 2;
  strncpy(stub.image, image, sizeof(stub.image) - 1);
  pthread_mutex_unlock(&lock);
  if (stub.fail_load) return stub.fail_load;
  Module* made = calloc(1, sizeof(Module));
  strncpy(made->image, image, sizeof(made->image) - 1);
  *module = made;
  return 0;
}

static int get_function(void** function, void* module, const char* name) {
  pthread_mutex_lock(&lock);
  ++stub.lookups;
  pthread_mutex_unlock(&lock);
  if (stub.fail_lookup) return stub.fail_lookup;
  Function* made = calloc(1, sizeof(Function));
  made->module = module;
  strncpy(made->name, name, sizeof(made->name) - 1);
  *function = made;
  return 0;
}

static int launch(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                  unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                  void* stream, void** params, void** extra, int overlaps) {
  if (stub.fail_launch || extra) return stub.fail_launch;
  pthread_mutex_lock(&lock);
  ++stub.launches;
  const Function* launched = function;
  strcpy(stub.kernel, launched->name);
  strcpy(stub.image, launched->module->image);
  stub.grid[0] = grid_x, stub.grid[1] = grid_y, stub.grid[2] = grid_z;
  stub.block[0] = block_x, stub.block[1] = block_y, stub.block[2] = block_z;
  stub.shared = shared;
  stub.overlaps = overlaps;
  stub.stream = stream;
  memcpy(stub.args, params[0], stub.args_bytes);
  pthread_mutex_unlock(&lock);
  return 0;
}

static int exchange_capture_mode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}

static const char* error_name(int error) {
  return error == 209 ? "ErrorNoBinaryForGpu" : error == 500 ? "ErrorNotFound" : "ErrorOther";
}

#ifndef STUB_CUDA

int hipModuleLoadData(void** module, const void* image) { return load_module(module, image); }
int hipModuleGetFunction(void** function, void* module, const char* name) {
  return get_function(function, module, name);
}
int hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                          void** extra) {
  return launch(function, gx, gy, gz, bx, by, bz, shared, stream, params, extra, 0);
}
int hipThreadExchangeStreamCaptureMode(int* mode) { return exchange_capture_mode(mode); }
int hipDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = 60;
  return attribute == 63 ? 0 : 1;  // hipDeviceAttributeMultiprocessorCount
}
#ifndef STUB_WITHOUT_PROPERTIES
int hipGetDevicePropertiesR0600(char* properties, int device) {
  (void)device;
  memset(properties, 0xEE, 1472);                // sizeof(hipDeviceProp_tR0600)
  strcpy(properties + 1160, stub.architecture);  // gcnArchName
  return 0;
}
#endif
const char* hipGetErrorName(int error) { return error_name(error); }
const char* hipGetErrorString(int error) {
  (void)error;
  return "what it means";
}

#else

static __thread void* context = NULL;

int cuModuleLoadData(void** module, const void* image) {
  return context ? load_module(module, image) : 201;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return get_function(function, module, name);
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
  if (!context) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  return launch(function, gx, gy, gz, bx, by, bz, shared, stream, params, extra, 0);
}
#ifndef STUB_WITHOUT_ATTRIBUTES
// CUlaunchAttribute and CUlaunchConfig.
typedef struct {
  int id, padding;
  union {
    char bytes[64];
    int overlaps;
  } value;
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
int cuLaunchKernelEx(const Config* config, void* function, void** params, void** extra) {
  if (!context) return 201;
  int overlaps = 0;
  for (unsigned i = 0; i < config->count; ++i) {
    if (config->attributes[i].id != 6) return 1;  // PROGRAMMATIC_STREAM_SERIALIZATION
    overlaps = config->attributes[i].value.overlaps;
  }
  const unsigned *grid = config->grid, *block = config->block;
  return launch(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared,
                config->stream, params, extra, overlaps);
}
#endif
int cuThreadExchangeStreamCaptureMode(int* mode) { return exchange_capture_mode(mode); }
int cuDeviceGet(int* handle, int device) {
  *handle = device + 100;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int handle) {
  *value = attribute == 16   ? 132
           : attribute == 97 ? 232448
           : attribute == 75 ? stub.major
                             : stub.minor;
  return handle >= 100 ? 0 : 101;
}
int cuGetErrorName(int error, const char** name) {
  *name = error_name(error);
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "what it means";
  return 0;
}
int cuCtxGetCurrent(void** current) {
  *current = context;
  return 0;
}
int cuCtxSetCurrent(void* current) {
  context = current;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** primary, int handle) {
  *primary = &stub;
  return handle >= 100 ? 0 : 101;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function;
  if (attribute != 8) return 1;
  ++stub.attributes;
  stub.shared_allowed = value;
  return stub.fail_attribute;
}
int cuFuncLoad(void* function) {
  (void)function;
  ++stub.function_loads;
  return 0;
}

#endif
