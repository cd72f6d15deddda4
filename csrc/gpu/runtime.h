// Loads the GPU kernels that lie beside this library, at first use, and launches them. Knows no
// torch: csrc/gpu/common.h brings the device, the stream and the tensors.
//
// A kernel is addressed by two numbers, its code object and its place in one; what was looked up
// once is found again with one load from an array. Every launch would pay for a lock or a hashed
// name: a prototype that had both took 22 microseconds a call.
#pragma once

#include <cstdint>
#include <string>

#include "../../kernels/arguments.h"
#include "../../kernels/formats/registry.h"

namespace torch_q4::gpu {

// The files of kernels, one per format in the order of TORCH_Q4_FORMATS and one that belongs to no
// format.
enum CodeObject : int {
#define TORCH_Q4_CODE_OBJECT(Format) k##Format##Object,
  TORCH_Q4_FORMATS(TORCH_Q4_CODE_OBJECT)
#undef TORCH_Q4_CODE_OBJECT
      kCommonObject,
  kCodeObjectCount
};

constexpr int kDTypes = 3;
constexpr int kRowsWidths = sizeof(kRowsXRows) / sizeof(int);
constexpr int kTilesWidths = sizeof(kTilesXRows) / sizeof(int);
constexpr int kPipelinedWidths = sizeof(kPipelinedXRows) / sizeof(int);
constexpr int kHopperRowsWidths = sizeof(kHopperRowsXRows) / sizeof(int);
constexpr int kHopperManyWidths = sizeof(kHopperManyXRows) / sizeof(int);

// The entry points of kernels/arguments.h. Families are addressed by the functions below.
enum Kernel : int {
  kDequantize,
  kEmbedding,
  kPack,
  kUnpack,
  kQuantize,
  kTransposed,
  kReference,
  kRows = kReference + kDTypes,
  kRowsInt8 = kRows + kDTypes * kRowsWidths,
  kTiles = kRowsInt8 + kRowsWidths,
  kPipelined = kTiles + (kDTypes - 1) * kTilesWidths,
  kHopperRows = kPipelined + (kDTypes - 1) * kPipelinedWidths,
  kHopperMany = kHopperRows + (kDTypes - 1) * kHopperRowsWidths,
  kQuantizeActivations = kHopperMany + (kDTypes - 1) * kHopperManyWidths,
  kSumSplits,
  kArrangeLanes,
  kArrange,
  kKernelCount
};

constexpr Kernel reference_kernel(DType dtype) { return Kernel(kReference + dtype); }
// `width` is a position in kRowsXRows, kTilesXRows, kPipelinedXRows, kHopperRowsXRows or
// kHopperManyXRows.
constexpr Kernel rows_kernel(DType dtype, int width) {
  return Kernel(kRows + dtype * kRowsWidths + width);
}
constexpr Kernel rows_int8_kernel(int width) { return Kernel(kRowsInt8 + width); }
constexpr Kernel tiles_kernel(DType dtype, int width) {
  return Kernel(kTiles + (dtype - 1) * kTilesWidths + width);
}
constexpr Kernel pipelined_kernel(DType dtype, int width) {
  return Kernel(kPipelined + (dtype - 1) * kPipelinedWidths + width);
}
constexpr Kernel hopper_rows_kernel(DType dtype, int width) {
  return Kernel(kHopperRows + (dtype - 1) * kHopperRowsWidths + width);
}
constexpr Kernel hopper_many_kernel(DType dtype, int width) {
  return Kernel(kHopperMany + (dtype - 1) * kHopperManyWidths + width);
}

// The entry point's name: "rows_f16_4".
std::string kernel_name(Kernel kernel);

constexpr int kMaxDevices = 64;

// What the choice of a kernel depends on.
enum class Family {
  kNvidia,
  kAmdMatrix,    // matrix cores: MFMA of CDNA, WMMA of RDNA 3 and later
  kAmdNoMatrix,  // gfx906, RDNA 1 and 2
  kHopper,       // sm_90 where the build has code for sm_90a, which alone has hopper_rows_T_C and
                 // hopper_many_T_C
};

struct DeviceInfo {
  std::string architecture;  // "gfx90a", "sm_90"
  Family family;
  int multiprocessors;
  int shared_bytes;  // the most dynamic shared memory that a block may have; 0 for HIP
};

// Looked up once per device.
const DeviceInfo& device_info(const char* op, int device);

// Loads what is not loaded yet; `device` must be the current one.
void* find_kernel(const char* op, CodeObject object, Kernel kernel, int device);

// What each block of a launch has.
struct Block {
  unsigned threads = kBlockThreads;
  unsigned shared_bytes = 0;  // dynamic ones
  // May begin while the kernel before it in the stream still runs, and waits for that one's end by
  // itself: wait_for_previous in kernels/arch/gpu.h. For Hopper and later.
  bool overlaps = false;
};

void launch_raw(const char* op, CodeObject object, Kernel kernel, int device, void* stream,
                Grid grid, Block block, const void* args);

// One launch on `device`, which must be current. An empty grid is no launch.
template <class Args>
void launch(const char* op, CodeObject object, Kernel kernel, int device, void* stream, Grid grid,
            const Args& args, Block block = {}) {
  if (grid.x == 0 || grid.y == 0) return;
  launch_raw(op, object, kernel, device, stream, grid, block, &args);
}

// The architectures that the build compiled for, blank-separated, "" for none.
const char* built_for_hip();
const char* built_for_cuda();

// The path of the driver's library; throws where there is none.
const std::string& driver_path(const char* op);

// Whether code for the blank-separated architectures `built` runs on `architecture`.
bool serves(const std::string& built, const std::string& architecture);

}  // namespace torch_q4::gpu
