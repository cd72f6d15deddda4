// What operators of every backend do with tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "checks.h"

namespace torch_q4 {

// An uninitialised tensor; strides in elements. Straight from the C entry point: through the
// dispatcher it would cost about two microseconds more a call.
inline Tensor empty_strided(int32_t device_type, int32_t device_index, int64_t dims,
                            const int64_t* shape, const int64_t* strides, int32_t dtype_code,
                            int64_t element_bytes) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dims, shape, strides, dtype_code, device_type, device_index,
                               &handle) == TORCH_SUCCESS) {
    return Tensor(handle);
  }
  // What torch says of it is lost on the way through its C interface. Nothing but memory can have
  // been missing.
  double bytes = static_cast<double>(element_bytes);
  std::string text;
  for (int64_t i = 0; i < dims; ++i) {
    bytes *= static_cast<double>(shape[i]);
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  // torch's own words on a GPU, by which programs know that a smaller batch may do.
  const bool on_cpu = device_type == aoti_torch_device_type_cpu();
  char size[64];  // a double: the product of the sizes may have no place in 64 bits
  std::snprintf(size, sizeof(size), "%.0f", bytes);
  fail(on_cpu ? "out of memory" : "CUDA out of memory", ": torch_q4 could not allocate ", size,
       " bytes for a tensor of shape (", text, dims == 1 ? ",)" : ")");
}

// A contiguous one.
inline Tensor empty_contiguous(int32_t device_type, int32_t device_index,
                               const std::vector<int64_t>& shape, int32_t dtype_code,
                               int64_t element_bytes) {
  constexpr size_t kMaxDims = 64;  // torch's own limit
  TORCH_Q4_CHECK(shape.size() <= kMaxDims, "empty: at most 64 dimensions, got ", shape.size());
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    // Sizes whose product has no place in 64 bits: torch refuses them as it does any other.
    if (__builtin_mul_overflow(stride, std::max<int64_t>(shape[i], 1), &stride)) {
      stride = std::numeric_limits<int64_t>::max() / kMaxDims;
    }
  }
  return empty_strided(device_type, device_index, static_cast<int64_t>(shape.size()), shape.data(),
                       strides, dtype_code, element_bytes);
}

inline Tensor empty_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& shape,
                       ScalarType dtype) {
  const bool wide = dtype == ScalarType::Float;
  const int32_t code = wide                            ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_uint8();
  return empty_contiguous(device_type, device_index, shape, code,
                          wide                        ? 4
                          : dtype == ScalarType::Byte ? 1
                                                      : 2);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// Elements in all dimensions but the last.
inline int64_t leading(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
  return count;
}

// A contiguous copy.
inline Tensor copy_of(const Tensor& tensor) {
  int32_t device_type = 0, dtype_code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype_code));
  Tensor copy = empty_contiguous(device_type, tensor.get_device_index(), shape_of(tensor),
                                 dtype_code, tensor.element_size());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Contiguous, and each element at a multiple of its size: a tensor over bytes of the caller's, as
// torch.frombuffer makes, need not be.
inline Tensor as_contiguous(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return tensor.is_contiguous() && address % tensor.element_size() == 0 ? tensor : copy_of(tensor);
}

}  // namespace torch_q4
