#include "common.h"

namespace torch_q4::cpu {
namespace {

// Both directions work in place, 16 rows at a time; rows past the last 16 keep their canonical
// bytes.
void repack(const Tensor& blocks, const FormatInfo& format, bool pack) {
  const int64_t groups = blocks.size(0) / 16, row_bytes = blocks.size(1);
  if (row_bytes == 0) return;
  const int64_t k = row_bytes / format.block_bytes * format.block_elems;
  auto* bytes = static_cast<uint8_t*>(blocks.mutable_data_ptr());
  const FormatKernels& kernel = kernels().formats[format.index];
  const auto run = pack ? kernel.pack : kernel.unpack;
  parallel_for(0, groups, grain(16 * row_bytes), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(16 * row_bytes);
    run(bytes + begin * 16 * row_bytes, end - begin, k, scratch.data());
  });
}

Tensor pack(const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_repack("pack", blocks, format_id);
  Tensor result = torch::stable::clone(as_contiguous(blocks));
  repack(result, format, true);
  return result;
}

Tensor unpack(const Tensor& packed, int64_t format_id) {
  const FormatInfo format = check_repack("unpack", packed, format_id);
  Tensor result = torch::stable::clone(as_contiguous(packed));
  repack(result, format, false);
  return result;
}

void pack_(const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_repack("pack_", blocks, format_id);
  TORCH_Q4_CHECK(blocks.is_contiguous(), "pack_: blocks must be contiguous, got other strides");
  repack(blocks, format, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("pack_", TORCH_BOX(&pack_));
}

}  // namespace torch_q4::cpu
