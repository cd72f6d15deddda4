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
  const QuantizeRows quantize_rows = quantizer(format.index);
  parallel_for(0, rows, columns * kQuantizeWork, [&](int64_t begin, int64_t end) {
    if (dtype == ScalarType::Float) {
      const float* x = reinterpret_cast<const float*>(from) + begin * columns;
      return quantize_rows(x, weight, to + begin * row_bytes, end - begin, columns);
    }
    // As many rows at a time as fill the quantiser's lanes and stay in L2.
    constexpr int64_t kSomeElems = 1 << 16;
    const int64_t step = std::clamp<int64_t>(kSomeElems / columns, 1, end - begin);
    std::vector<float> x(step * columns);
    for (int64_t i = begin; i < end; i += step) {
      const int64_t count = std::min(step, end - i);
      to_float(from + i * columns * 2, dtype, x.data(), count * columns);
      quantize_rows(x.data(), weight, to + i * row_bytes, count, columns);
    }
  });
  return blocks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace torch_q4::cpu
