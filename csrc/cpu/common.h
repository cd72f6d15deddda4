// Small things that several CPU operators need.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../tensors.h"
#include "kernels.h"
#include "threads.h"

namespace torch_q4::cpu {

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, shape, dtype);
}

inline Weight as_weight(const Tensor& blocks, const FormatInfo& format, bool packed) {
  return {static_cast<const uint8_t*>(blocks.const_data_ptr()), blocks.size(0),
          blocks.size(1) / format.block_bytes * format.block_elems, packed};
}

inline void to_float(const void* from, ScalarType dtype, float* to, int64_t count) {
  const auto* bits = static_cast<const uint16_t*>(from);
  if (dtype == ScalarType::Half) return kernels().half_to_float(bits, to, count);
  if (dtype == ScalarType::BFloat16) return kernels().bfloat16_to_float(bits, to, count);
  std::memcpy(to, from, count * sizeof(float));
}

inline void from_float(const float* from, ScalarType dtype, void* to, int64_t count) {
  auto* bits = static_cast<uint16_t*>(to);
  if (dtype == ScalarType::Half) return kernels().float_to_half(from, bits, count);
  if (dtype == ScalarType::BFloat16) return kernels().float_to_bfloat16(from, bits, count);
  std::memcpy(to, from, count * sizeof(float));
}

// The tensor as contiguous float32: itself where it is that already.
inline Tensor as_float(const Tensor& tensor) {
  const Tensor source = as_contiguous(tensor);
  if (source.scalar_type() == ScalarType::Float) return source;
  Tensor result = empty(shape_of(source), ScalarType::Float);
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  const ScalarType dtype = source.scalar_type();
  parallel_for(0, source.numel(), kConvertWork, [&](int64_t begin, int64_t end) {
    to_float(from + begin * 2, dtype, to + begin, end - begin);
  });
  return result;
}

// The float32 tensor in `dtype`: itself for float32.
inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  if (dtype == ScalarType::Float) return tensor;
  Tensor result = empty(shape_of(tensor), dtype);
  const auto* from = static_cast<const float*>(tensor.const_data_ptr());
  auto* to = static_cast<char*>(result.mutable_data_ptr());
  parallel_for(0, tensor.numel(), kConvertWork, [&](int64_t begin, int64_t end) {
    from_float(from + begin, dtype, to + begin * 2, end - begin);
  });
  return result;
}

}  // namespace torch_q4::cpu
