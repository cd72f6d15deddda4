#include <mutex>

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
  // Each index is read once: what is checked is what is used, even if another thread writes to the
  // indices meanwhile.
  const auto index_at = [&](int64_t i) -> int64_t {
    return wide ? __atomic_load_n(static_cast<const int64_t*>(index_data) + i, __ATOMIC_RELAXED)
                : __atomic_load_n(static_cast<const int32_t*>(index_data) + i, __ATOMIC_RELAXED);
  };

  std::vector<int64_t> shape = shape_of(wanted);
  shape.push_back(columns);
  Tensor values = empty(shape, dtype);
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  const auto kernel = kernels().formats[format.index].dequantize_row;
  std::mutex mutex;
  int64_t first_bad = count, bad_index = 0;
  parallel_for(0, count, columns * kDecodeWork, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(dtype == ScalarType::Float ? 0 : columns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = index_at(i);
      if (index < 0 || index >= rows) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (i < first_bad) {
          first_bad = i;
          bad_index = index;
        }
        return;
      }
      if (dtype == ScalarType::Float) {
        kernel(weight, index, reinterpret_cast<float*>(to) + i * columns);
      } else {
        kernel(weight, index, buffer.data());
        from_float(buffer.data(), dtype, to + i * columns * 2, columns);
      }
    }
  });
  TORCH_Q4_CHECK(first_bad == count, "embedding: indices must be in [0, ", rows, "), got ",
                 bad_index);
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace torch_q4::cpu
