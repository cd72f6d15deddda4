#include "common.h"

namespace torch_q4::cpu {
namespace {

Tensor embedding(const Tensor& indices, const Tensor& blocks, int64_t format_id, ScalarType dtype,
                 bool packed) {
  const FormatInfo format = check_embedding(indices, blocks, format_id, dtype);
  const Tensor table = as_contiguous(blocks), wanted = as_contiguous(indices);
  const Weight weight = as_weight(table, format, packed);
  const int64_t rows = weight.n, columns = weight.k;
  const int64_t count = wanted.numel();
  const bool wide = wanted.scalar_type() == ScalarType::Long;
  const void* index_data = wanted.const_data_ptr();
  const auto index_at = [&](int64_t i) -> int64_t {
    return wide ? static_cast<const int64_t*>(index_data)[i]
                : static_cast<const int32_t*>(index_data)[i];
  };
  for (int64_t i = 0; i < count; ++i) {
    TORCH_Q4_CHECK(index_at(i) >= 0 && index_at(i) < rows, "embedding: indices must be in [0, ",
                   rows, "), got ", index_at(i));
  }

  std::vector<int64_t> shape = shape_of(wanted);
  shape.push_back(columns);
  Tensor values = empty(shape, dtype);
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  const auto kernel = kernels().formats[format.index].dequantize_row;
  parallel_for(0, count, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(dtype == ScalarType::Float ? 0 : columns);
    for (int64_t i = begin; i < end; ++i) {
      if (dtype == ScalarType::Float) {
        kernel(weight, index_at(i), reinterpret_cast<float*>(to) + i * columns);
      } else {
        kernel(weight, index_at(i), buffer.data());
        from_float(buffer.data(), dtype, to + i * columns * 2, columns);
      }
    }
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace torch_q4::cpu
