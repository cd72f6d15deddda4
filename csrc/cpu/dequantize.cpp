#include "common.h"

namespace torch_q4::cpu {
namespace {

Tensor dequantize(const Tensor& blocks, int64_t format_id, ScalarType dtype) {
  const FormatInfo format = check_dequantize(blocks, format_id, dtype);
  const Tensor source = as_contiguous(blocks);
  std::vector<int64_t> shape = shape_of(source);
  shape.back() = shape.back() / format.block_bytes * format.block_elems;
  Tensor values = empty(shape, dtype);

  // Rows follow each other without gaps, so blocks can be shared out across them: in runs that
  // make whole tiles and whose values stay in L1 until they are converted.
  constexpr int64_t kRunElems = 2048;
  const int64_t total = values.numel();
  const int64_t runs = (total + kRunElems - 1) / kRunElems;
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  const auto kernel = kernels().formats[format.index].dequantize;
  parallel_for(0, runs, kRunElems * kDecodeWork, [&](int64_t begin, int64_t end) {
    float buffer[kRunElems];
    for (int64_t run = begin; run < end; ++run) {
      const int64_t start = run * kRunElems;
      const int64_t count = std::min(kRunElems, total - start);
      const void* run_blocks = from + start / format.block_elems * format.block_bytes;
      if (dtype == ScalarType::Float) {
        kernel(run_blocks, count, reinterpret_cast<float*>(to) + start);
      } else {
        kernel(run_blocks, count, buffer);
        from_float(buffer, dtype, to + start * 2, count);
      }
    }
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace torch_q4::cpu
