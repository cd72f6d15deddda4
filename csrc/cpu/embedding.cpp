#include "common.h"

namespace torch_q4::cpu {
namespace {

Tensor embedding(const Tensor& indices, const Tensor& blocks, int64_t format_id, ScalarType dtype) {
  const FormatInfo format = check_embedding(indices, blocks, format_id, dtype);
  const Tensor table = as_blocks(blocks), wanted = as_contiguous(indices);
  const int64_t rows = table.size(0), row_bytes = table.size(1);
  const int64_t columns = row_bytes / format.block_bytes * format.block_elems;
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
  const auto* from = static_cast<const char*>(table.const_data_ptr());
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  const auto kernel = kernels().formats[format.index].dequantize;
  parallel_for(0, count, grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(dtype == ScalarType::Float ? 0 : columns);
    for (int64_t i = begin; i < end; ++i) {
      const void* row = from + index_at(i) * row_bytes;
      if (dtype == ScalarType::Float) {
        kernel(row, columns, reinterpret_cast<float*>(to) + i * columns);
      } else {
        kernel(row, columns, buffer.data());
        from_float(buffer.data(), dtype, to + i * columns * 2, columns);
      }
    }
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace torch_q4::cpu
