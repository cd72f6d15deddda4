// What the library knows of itself. No tensors go in, so these work under any dispatch key.
#include "checks.h"
#include "cpu/kernels.h"

namespace torch_q4 {
namespace {

// A line per format: name, type number, elements and bytes of a block.
std::string format_table() {
  std::ostringstream table;
  for (const FormatInfo& info : kFormatInfos) {
    table << info.name << ' ' << info.type_id << ' ' << info.block_elems << ' ' << info.block_bytes
          << '\n';
  }
  return table.str();
}

std::string cpu_isa() { return cpu::kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CompositeExplicitAutograd, m) {
  m.impl("format_table", TORCH_BOX(&format_table));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace torch_q4
