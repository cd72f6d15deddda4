// What several GPU operators need: the device and its stream, aligned tensors, launches by format.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../tensors.h"
#include "runtime.h"

namespace torch_q4::gpu {

// torch's current stream of a device, as the driver's handle.
inline void* current_stream(int32_t device) {
  // The name under which torch 2.10 to 2.12 have it, and 2.13 and later beside the other.
  using Direct = AOTITorchError (*)(int32_t, void**);
  static const auto direct =
      reinterpret_cast<Direct>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (direct) {
    TORCH_ERROR_CODE_CHECK(direct(device, &stream));
    return stream;
  }
  using NativeHandle = AOTITorchError (*)(StreamHandle, void**);
  static const auto native_handle =
      reinterpret_cast<NativeHandle>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
  TORCH_Q4_CHECK(native_handle,
                 "torch_q4: torch must export aoti_torch_get_current_cuda_stream or "
                 "torch_stream_native_handle, got neither; torch 2.10 and later do");
  StreamHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
  const AOTITorchError error = native_handle(handle, &stream);
  TORCH_ERROR_CODE_CHECK(aoti_torch_delete_stream(handle));
  TORCH_ERROR_CODE_CHECK(error);
  return stream;
}

// One operator's work on the device of `tensor`, which is the current one as long as this lives.
class Call {
 public:
  Call(const char* op, const FormatInfo& format, const Tensor& tensor)
      : op(op), format(format), device(tensor.get_device_index()) {
    int32_t current = -1;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
    if (current != device) guard_.emplace(device);
    stream_ = current_stream(device);
  }

  template <class Args>
  void run(Kernel kernel, Grid grid, const Args& args, Block block = {}) const {
    launch(op, CodeObject(format.index), kernel, device, stream_, grid, args, block);
  }
  template <class Args>
  void run_common(Kernel kernel, Grid grid, const Args& args, Block block = {}) const {
    launch(op, kCommonObject, kernel, device, stream_, grid, args, block);
  }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return empty_on(aoti_torch_device_type_cuda(), device, shape, dtype);
  }
  // (columns, rows), the transpose of a contiguous tensor.
  Tensor empty_transposed(int64_t rows, int64_t columns, ScalarType dtype) const {
    const int64_t sizes[] = {columns, rows}, strides[] = {1, columns};
    const int32_t code = dtype == ScalarType::Float  ? aoti_torch_dtype_float32()
                         : dtype == ScalarType::Half ? aoti_torch_dtype_float16()
                                                     : aoti_torch_dtype_bfloat16();
    return empty_strided(aoti_torch_device_type_cuda(), device, 2, sizes, strides, code,
                         dtype == ScalarType::Float ? 4 : 2);
  }
  const DeviceInfo& info() const { return device_info(op, device); }

  const char* const op;
  const FormatInfo format;
  const int device;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_;
};

// Contiguous, and where a kernel's 16-byte loads need it to be. torch's allocations are; a slice
// need not be, and is copied.
inline bool is_aligned(const Tensor& tensor) {
  return tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}
inline Tensor aligned(const Tensor& tensor) {
  return is_aligned(tensor) ? tensor : copy_of(tensor);
}

// The same of a weight, which is used again and again: the first one that is copied is reported.
inline Tensor aligned_weight(const char* op, const Tensor& blocks) {
  if (is_aligned(blocks)) return blocks;
  static std::atomic<bool> warned(false);
  if (!warned.exchange(true)) {
    const std::string text =
        std::string(op) + ": blocks are copied on every call, " + std::to_string(blocks.numel()) +
        " bytes, since they are " +
        (blocks.is_contiguous() ? "not aligned to 16 bytes" : "not contiguous") +
        "; blocks.clone(memory_format=torch.contiguous_format), made once, avoids the copies. "
        "Further ones are not reported";
    aoti_torch_warn(op, "torch_q4", 0, text.c_str());
  }
  return copy_of(blocks);
}

inline DType dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? kFloat32 : dtype == ScalarType::Half ? kFloat16 : kBFloat16;
}

inline int64_t dtype_bytes(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// Where element `index` of an array of elements of `bytes` bytes lies.
inline const void* at(const void* start, int64_t index, int64_t bytes) {
  return static_cast<const char*>(start) + index * bytes;
}
inline void* at(void* start, int64_t index, int64_t bytes) {
  return static_cast<char*>(start) + index * bytes;
}

// The weight's columns.
inline int64_t columns_of(const Tensor& blocks, const FormatInfo& format) {
  return blocks.size(blocks.dim() - 1) / format.block_bytes * format.block_elems;
}

// Rows of a dequantised weight that are worked on at a time: a panel, in memory from torch's
// allocator. At most 256 MB, so that a large weight's product needs little more memory than it did
// before; most weights are one panel.
constexpr int64_t kPanelBytes = 256 << 20;

inline int64_t panel_rows(int64_t n, int64_t k, DType dtype) {
  const int64_t rows = kPanelBytes / (k * dtype_bytes(dtype)) / kGroupRows * kGroupRows;
  return std::min(n, std::max<int64_t>(rows, kGroupRows));
}

// Rows [row_begin, row_end) of the weight of n rows to `panel`.
inline void dequantize_panel(const Call& call, const Tensor& blocks, bool packed, int64_t row_begin,
                             int64_t row_end, ScalarType dtype, const Tensor& panel) {
  DequantizeArgs args;
  args.blocks = static_cast<const uint8_t*>(blocks.const_data_ptr());
  args.out = panel.mutable_data_ptr();
  args.n = blocks.size(0);
  args.k = columns_of(blocks, call.format);
  args.row_begin = row_begin;
  args.row_end = row_end;
  args.packed = packed;
  args.dtype = dtype_of(dtype);
  call.run(kDequantize, dequantize_grid(args, call.format.block_elems), args);
}

}  // namespace torch_q4::gpu
