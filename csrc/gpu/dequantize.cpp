#include "common.h"

namespace torch_q4::gpu {
namespace {

Tensor dequantize(const Tensor& blocks, int64_t format_id, ScalarType dtype) {
  const FormatInfo format = check_dequantize(blocks, format_id, dtype);
  const Call call("dequantize", format, blocks);
  std::vector<int64_t> shape = shape_of(blocks);
  const int64_t rows = leading(shape);
  shape.back() = columns_of(blocks, format);
  Tensor values = call.empty(shape, dtype);
  if (values.numel() == 0) return values;

  const Tensor source = aligned(blocks);
  DequantizeArgs args;
  args.blocks = static_cast<const uint8_t*>(source.const_data_ptr());
  args.out = values.mutable_data_ptr();
  args.n = rows;
  args.k = shape.back();
  args.row_begin = 0;
  args.row_end = rows;
  args.packed = false;
  args.dtype = dtype_of(dtype);
  call.run(kDequantize, dequantize_grid(args, format.block_elems), args);
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CUDA, m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace torch_q4::gpu
