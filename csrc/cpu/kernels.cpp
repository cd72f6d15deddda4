#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace torch_q4::cpu {

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx_vnni() {
  // Not in GCC 12's __builtin_cpu_supports: bit 4 of EAX in leaf 7, subleaf 1.
  unsigned eax = 0, ebx, ecx, edx;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// Not in GCC 12's __builtin_cpu_supports: bits 22 and 24 of EDX in leaf 7. Linux wants to be
// asked before a process uses the tiles, since they make the state of its threads 8 KB larger.
bool has_amx() {
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kWanted = 1u << 22 | 1u << 24;  // bfloat16 and tiles
  if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
      (edx & kWanted) != kWanted) {
    return false;
  }
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

const Kernels& choose() {
  const Candidate candidates[] = {// best first
#if defined(__x86_64__)
                                  {&kAmxKernels, has_amx},
                                  {&kAvx512Kernels, has_avx512},
                                  {&kAvxVnniKernels, has_avx_vnni},
                                  {&kAvx2Kernels, has_avx2},
#endif
                                  {&kGenericKernels, [] { return true; }}};
  const char* wanted = std::getenv("TORCH_Q4_CPU_ISA");
  const std::string name = wanted ? wanted : "";
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (name.empty() && candidate.runs_here()) return *candidate.kernels;
    if (name == candidate.kernels->isa) {
      if (candidate.runs_here()) return *candidate.kernels;
      throw std::runtime_error("TORCH_Q4_CPU_ISA: this CPU must have the instruction set, got " +
                               name);
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
  }
  throw std::runtime_error("TORCH_Q4_CPU_ISA: must be one of " + known + ", got " + name);
}

template <class Format>
void quantize_row_by_row(const float* x, const float* importance, void* blocks, int64_t rows,
                         int64_t n) {
  auto* to = static_cast<typename Format::Block*>(blocks);
  for (int64_t row = 0; row < rows; ++row) {
    Format::quantize_row(x + row * n, importance, to + row * (n / Format::kBlockElems), n);
  }
}

template <class Format>
constexpr QuantizeRows row_by_row() {
  if constexpr (kHasQuantizer<Format>) {
    return quantize_row_by_row<Format>;
  } else {
    return nullptr;
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

QuantizeRows quantizer(int format) {
  static constexpr QuantizeRows kRowByRow[] = {
#define TORCH_Q4_ENTRY(Format) row_by_row<Format>(),
      TORCH_Q4_FORMATS(TORCH_Q4_ENTRY)
#undef TORCH_Q4_ENTRY
  };
  const Quantizers* by_lanes = kernels().quantizers;
  const QuantizeRows found = by_lanes == nullptr ? nullptr : by_lanes->formats[format];
  return found == nullptr ? kRowByRow[format] : found;
}

}  // namespace torch_q4::cpu
