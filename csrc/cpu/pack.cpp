#include <cstdlib>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torch_q4::cpu {
namespace {

// Asks Linux to move the bytes to pages of 2 MB, as far as they cover whole ones: weights are read
// once from end to end for every token, and on 4 KB pages both the CPU's prefetching and its
// address translation start anew 500 times as often. Costs about as much as a copy. Whether it is
// done or not (old kernels, no memory in one piece, TORCH_Q4_HUGE_PAGES=0) changes nothing but
// speed.
void use_huge_pages([[maybe_unused]] uint8_t* bytes, [[maybe_unused]] int64_t count) {
#if defined(__linux__)
  static const bool wanted = [] {
    const char* value = std::getenv("TORCH_Q4_HUGE_PAGES");
    return value == nullptr || std::string(value) != "0";
  }();
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1; not in every libc's headers
  const uintptr_t first = (reinterpret_cast<uintptr_t>(bytes) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(bytes) + count) / kPage * kPage;
  if (wanted && first < last) madvise(reinterpret_cast<void*>(first), last - first, kCollapse);
#endif
}

// Both directions work in place, 16 rows at a time; rows past the last 16 keep their canonical
// bytes.
void repack(const Tensor& blocks, const FormatInfo& format, bool pack) {
  const int64_t groups = blocks.size(0) / 16, row_bytes = blocks.size(1);
  if (row_bytes == 0) return;
  const int64_t k = row_bytes / format.block_bytes * format.block_elems;
  auto* bytes = static_cast<uint8_t*>(blocks.mutable_data_ptr());
  const FormatKernels& kernel = kernels().formats[format.index];
  const auto run = pack ? kernel.pack : kernel.unpack;
  parallel_for(0, groups, 16 * row_bytes * kDecodeWork, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> scratch(16 * row_bytes);
    run(bytes + begin * 16 * row_bytes, end - begin, k, scratch.data());
  });
  if (pack) use_huge_pages(bytes, blocks.size(0) * row_bytes);
}

Tensor pack(const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_repack("pack", blocks, format_id);
  Tensor result = copy_of(blocks);
  repack(result, format, true);
  return result;
}

Tensor unpack(const Tensor& packed, int64_t format_id) {
  const FormatInfo format = check_repack("unpack", packed, format_id);
  Tensor result = copy_of(packed);
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
