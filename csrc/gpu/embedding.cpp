#include "common.h"

namespace torch_q4::gpu {
namespace {

// Indices are checked by the kernel: looking at them here would wait for the device.
Tensor embedding(const Tensor& indices, const Tensor& blocks, int64_t format_id, ScalarType dtype,
                 bool packed) {
  const FormatInfo format = check_embedding(indices, blocks, format_id, dtype);
  const Call call("embedding", format, indices);
  std::vector<int64_t> shape = shape_of(indices);
  shape.push_back(columns_of(blocks, format));
  Tensor values = call.empty(shape, dtype);
  if (values.numel() == 0) return values;

  const Tensor table = aligned_weight("embedding", blocks), wanted = as_contiguous(indices);
  EmbeddingArgs args;
  args.indices = wanted.const_data_ptr();
  args.blocks = static_cast<const uint8_t*>(table.const_data_ptr());
  args.out = values.mutable_data_ptr();
  args.count = wanted.numel();
  args.n = table.size(0);
  args.k = shape.back();
  args.wide = wanted.scalar_type() == ScalarType::Long;
  args.packed = packed;
  args.dtype = dtype_of(dtype);
  call.run(kEmbedding, embedding_grid(args, format.block_elems), args);
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CUDA, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace torch_q4::gpu
