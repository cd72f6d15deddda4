#include "common.h"

namespace torch_q4::gpu {
namespace {

// `groups` whole groups of 16 rows, from one address to another.
void repack(const Call& call, Kernel kernel, const void* from, void* to, int64_t groups,
            int64_t k) {
  RepackArgs args;
  args.from = static_cast<const uint8_t*>(from);
  args.to = static_cast<uint8_t*>(to);
  args.groups = groups;
  args.k = k;
  call.run(kernel, repack_grid(args, call.format.block_elems), args);
}

Tensor repacked(const char* op, Kernel kernel, const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_repack(op, blocks, format_id);
  const Call call(op, format, blocks);
  Tensor source = aligned(blocks);
  Tensor result = call.empty(shape_of(source), ScalarType::Byte);
  if (result.numel() == 0) return result;
  const int64_t rows = source.size(0), groups = rows / kGroupRows;
  repack(call, kernel, source.const_data_ptr(), result.mutable_data_ptr(), groups,
         columns_of(source, format));
  // Rows past the last 16 are the same in both layouts.
  const int64_t whole = groups * kGroupRows;
  if (whole < rows) {
    Tensor rest = torch::stable::narrow(result, 0, whole, rows - whole);
    torch::stable::copy_(rest, torch::stable::narrow(source, 0, whole, rows - whole));
  }
  return result;
}

Tensor pack(const Tensor& blocks, int64_t format_id) {
  return repacked("pack", kPack, blocks, format_id);
}

Tensor unpack(const Tensor& packed, int64_t format_id) {
  return repacked("unpack", kUnpack, packed, format_id);
}

// The kernel does not work in place, so a part of the rows at a time goes to a buffer and back: a
// large weight must not need its own size in memory once more.
void pack_(const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_repack("pack_", blocks, format_id);
  TORCH_Q4_CHECK(blocks.is_contiguous(), "pack_: blocks must be contiguous, got other strides");
  const Call call("pack_", format, blocks);
  const int64_t groups = blocks.size(0) / kGroupRows, row_bytes = blocks.size(1);
  if (groups == 0 || row_bytes == 0) return;
  constexpr int64_t kBufferBytes = 64 << 20;
  const int64_t most =
      std::min(groups, std::max<int64_t>(1, kBufferBytes / (kGroupRows * row_bytes)));
  Tensor all = blocks;
  Tensor buffer = call.empty({most * kGroupRows, row_bytes}, ScalarType::Byte);
  for (int64_t done = 0; done < groups; done += most) {
    const int64_t count = std::min(most, groups - done);
    Tensor part = torch::stable::narrow(all, 0, done * kGroupRows, count * kGroupRows);
    const Tensor source = aligned(part);
    repack(call, kPack, source.const_data_ptr(), buffer.mutable_data_ptr(), count,
           columns_of(blocks, format));
    torch::stable::copy_(part, torch::stable::narrow(buffer, 0, 0, count * kGroupRows));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("pack_", TORCH_BOX(&pack_));
}

}  // namespace torch_q4::gpu
