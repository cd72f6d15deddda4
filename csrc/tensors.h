// What operators of every backend do with tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace torch_q4 {

// A contiguous tensor. Straight from the C entry point: through the dispatcher it would cost about
// two microseconds more a call.
inline Tensor empty_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& shape,
                       ScalarType dtype) {
  constexpr size_t kMaxDims = 64;  // torch's own limit
  TORCH_Q4_CHECK(shape.size() <= kMaxDims, "empty: at most 64 dimensions, got ", shape.size());
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) {
    strides[i] = stride;
  }
  const int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_uint8();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides, code,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
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

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace torch_q4
