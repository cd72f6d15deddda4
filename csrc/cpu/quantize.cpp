#include "common.h"

namespace torch_q4::cpu {
namespace {

Tensor quantize(const Tensor& w, int64_t format_id, std::optional<Tensor> importance) {
  const FormatInfo format = check_quantize(w, format_id, importance);
  const Tensor source = as_contiguous(w);
  std::vector<int64_t> shape = shape_of(source);
  const int64_t rows = leading(shape), columns = shape.back();
  const int64_t row_bytes = columns / format.block_elems * format.block_bytes;
  shape.back() = row_bytes;
  Tensor blocks = empty(shape, ScalarType::Byte);
  if (blocks.numel() == 0) return blocks;

  const Tensor weights = importance ? as_contiguous(*importance) : Tensor();
  const auto* weight = importance ? static_cast<const float*>(weights.const_data_ptr()) : nullptr;
  const ScalarType dtype = source.scalar_type();
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(blocks.mutable_data_ptr());
  const QuantizeRow quantize_row = kQuantizeRow[format.index];
  parallel_for(0, rows, columns * kQuantizeWork, [&](int64_t begin, int64_t end) {
    std::vector<float> row(dtype == ScalarType::Float ? 0 : columns);
    for (int64_t i = begin; i < end; ++i) {
      const float* x = reinterpret_cast<const float*>(from) + i * columns;
      if (!row.empty()) {
        to_float(from + i * columns * 2, dtype, row.data(), columns);
        x = row.data();
      }
      quantize_row(x, weight, to + i * row_bytes, columns);
    }
  });
  return blocks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace torch_q4::cpu
