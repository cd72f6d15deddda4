// Runs every kernel of one instruction set (TORCH_Q4_CPU_ISA) over golden blocks and over random
// shapes, and holds it to the definition of a format in registry.h. Built with the sanitizers and
// without torch; tests/cpp/run.py feeds it the golden blocks.
//
// Standard input: any number of [int32 type, int64 bytes, int64 elements, the bytes, their float32
// values]. With --types it prints the type numbers that it knows. Exit status 1 at the first
// difference, with its place.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace {

using namespace torch_q4;
using torch_q4::cpu::FormatKernels;
using torch_q4::cpu::Kernels;
using torch_q4::cpu::LinearArgs;
using torch_q4::cpu::Weight;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "test_kernels: %s\n", what.c_str());
  std::exit(1);
}

// A small generator of our own: the same numbers everywhere.
struct Random {
  uint64_t state = 0x9E3779B97F4A7C15u;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  // Roughly normal: the sum of twelve uniforms, less six.
  float normal() {
    float sum = -6.0f;
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(bits()) * 0x1p-31f;
    return sum;
  }
};

std::vector<float> normals(Random& random, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = random.normal();
  return values;
}

bool same_bits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || float_to_bits(a) == float_to_bits(b);
}

// The definition in registry.h, one element at a time.
template <class Format>
std::vector<float> reference_values(const std::vector<uint8_t>& blocks) {
  const int64_t count = blocks.size() / sizeof(typename Format::Block);
  std::vector<float> values;
  for (int64_t b = 0; b < count; ++b) {
    typename Format::Block block;
    std::memcpy(&block, blocks.data() + b * sizeof(block), sizeof(block));
    uint8_t codes[256];
    float scales[16], shifts[16];
    Format::unpack(block, codes, scales, shifts);
    for (int i = 0; i < Format::kBlockElems; ++i) {
      const int group = i / Format::kGroupElems;
      const float product = scales[group] * static_cast<float>(codes[i] - Format::kOffset);
      values.push_back(Format::kHasShift ? product + shifts[group] : product);
    }
  }
  return values;
}

// n rows of k weights of ordinary size. Where there is no quantiser blocks are random bytes, of
// which those stay whose values could be weights.
template <class Format>
std::vector<uint8_t> make_weight(Random& random, int64_t n, int64_t k) {
  constexpr size_t kBytes = sizeof(typename Format::Block);
  const int64_t row_blocks = k / Format::kBlockElems;
  std::vector<uint8_t> blocks(n * row_blocks * kBytes);
  if constexpr (kHasQuantizer<Format>) {
    const std::vector<float> dense = normals(random, n * k);
    std::vector<typename Format::Block> row_of_blocks(row_blocks);
    for (int64_t row = 0; row < n; ++row) {
      Format::quantize_row(dense.data() + row * k, nullptr, row_of_blocks.data(), k);
      std::memcpy(blocks.data() + row * row_blocks * kBytes, row_of_blocks.data(),
                  row_blocks * kBytes);
    }
  } else {
    std::vector<uint8_t> block(kBytes);
    for (size_t at = 0; at < blocks.size(); at += kBytes) {
      double squares;
      do {
        for (uint8_t& byte : block) byte = static_cast<uint8_t>(random.bits());
        squares = 0;
        for (const float value : reference_values<Format>(block)) squares += value * value;
      } while (!(squares > Format::kBlockElems / 16 && squares < Format::kBlockElems * 16));
      std::memcpy(blocks.data() + at, block.data(), kBytes);
    }
  }
  return blocks;
}

// The form for several blocks at a time against quantize_row, byte for byte.
template <class Format>
void test_quantiser(const Kernels& kernels, int format, int64_t rows, int64_t n) {
  if (kernels.quantizers == nullptr) return;
  const auto quantize_rows = kernels.quantizers->formats[format];
  if (quantize_rows == nullptr) return;
  using Block = typename Format::Block;
  Random random;
  std::vector<float> x = normals(random, rows * n), importance = normals(random, n);
  for (float& value : x) {
    if (random.bits() % 4 == 0) value = 0;
  }
  for (float& value : importance) value = std::max(value, 0.0f);
  const int64_t row_blocks = n / Format::kBlockElems;
  for (const float* weights :
       {static_cast<const float*>(nullptr), std::as_const(importance).data()}) {
    std::vector<Block> wanted(rows * row_blocks), got(rows * row_blocks);
    for (int64_t row = 0; row < rows; ++row) {
      Format::quantize_row(x.data() + row * n, weights, wanted.data() + row * row_blocks, n);
    }
    quantize_rows(x.data(), weights, got.data(), rows, n);
    for (int64_t i = 0; i < rows * row_blocks; ++i) {
      if (std::memcmp(&got[i], &wanted[i], sizeof(Block)) != 0) {
        fail(std::string(kernels.isa) + " " + Format::kName + " quantize_rows of " +
             std::to_string(rows) + "x" + std::to_string(n) + ": block " + std::to_string(i));
      }
    }
  }
}

struct Problem {
  int64_t m, n, k;
};

void expect_close(const std::string& what, const std::vector<float>& got,
                  const std::vector<double>& wanted, const std::vector<double>& bound) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - wanted[i]) <= bound[i])) {
      fail(what + ": element " + std::to_string(i) + " must be " + std::to_string(wanted[i]) +
           ", got " + std::to_string(got[i]));
    }
  }
}

template <class Format>
void test_products(const Kernels& kernels, int format, const Problem& p) {
  const FormatKernels& kernel = kernels.formats[format];
  Random random;
  const std::string what = std::string(kernels.isa) + " " + Format::kName + " " +
                           std::to_string(p.m) + "x" + std::to_string(p.n) + "x" +
                           std::to_string(p.k);
  // Exactly as many bytes as there are: the address sanitizer sees every byte past them.
  const std::vector<uint8_t> blocks = make_weight<Format>(random, p.n, p.k);
  const std::vector<float> w = reference_values<Format>(blocks);
  const std::vector<float> x = normals(random, p.m * p.k), bias = normals(random, p.n);

  std::vector<double> wanted(p.m * p.n), exact_bound(p.m * p.n), int8_bound(p.m * p.n);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = bias[n], magnitude = std::abs(bias[n]), error = 0;
      for (int64_t group = 0; group < p.k; group += 32) {
        double largest = 0, weights = 0;
        for (int64_t k = group; k < group + 32; ++k) {
          const double product = double{x[m * p.k + k]} * w[n * p.k + k];
          sum += product;
          magnitude += std::abs(product);
          weights += std::abs(w[n * p.k + k]);
          largest = std::max(largest, std::abs(double{x[m * p.k + k]}));
        }
        error += weights * largest / 254;  // half a step of 1/127
      }
      wanted[m * p.n + n] = sum;
      exact_bound[m * p.n + n] = 16 * 0x1p-24 * magnitude;
      int8_bound[m * p.n + n] = error + 64 * 0x1p-24 * magnitude;
    }
  }

  // The same weight in both layouts; the last rows of the packed one are canonical.
  std::vector<uint8_t> packed = blocks;
  std::vector<uint8_t> scratch(16 * (blocks.size() / p.n));
  kernel.pack(packed.data(), p.n / 16, p.k, scratch.data());
  const Weight weights[] = {{blocks.data(), p.n, p.k, false}, {packed.data(), p.n, p.k, true}};

  const int64_t tiles = (p.k + 255) / 256;
  std::vector<uint32_t> exact(p.m * tiles * cpu::kExactWords);
  std::vector<uint32_t> int8(p.m * tiles * cpu::kInt8Words);
  for (int64_t m = 0; m < p.m; ++m) {
    if (!kernel.prepare_exact(x.data() + m * p.k, p.k, m, p.m, exact.data()) ||
        !kernel.prepare_int8(x.data() + m * p.k, p.k, m, p.m, int8.data())) {
      fail(what + " prepare: x is not huge");
    }
  }
  std::vector<float> by_tiles, tile_scratch;
  if (const cpu::Tiles& tiles = kernels.tiles; tiles.least_rows > 0) {
    by_tiles.resize(tiles.x_floats(p.m, p.k));
    tile_scratch.resize(tiles.scratch_floats(p.m));
    for (int64_t m = 0; m < p.m; ++m) {
      if (!tiles.prepare(x.data() + m * p.k, p.k, m, p.m, by_tiles.data())) fail(what + " prepare");
    }
    for (const float odd : {INFINITY, -INFINITY, NAN}) {
      std::vector<float> row(p.k, 1.0f);
      row[p.k / 2] = odd;
      std::vector<float> unused(tiles.x_floats(1, p.k));
      if (tiles.prepare(row.data(), p.k, 0, 1, unused.data()))
        fail(what + " prepare of " + std::to_string(odd));
    }
  }
  std::vector<float> sums(16 * p.m), out(p.m * p.n);
  const auto multiply = [&](const Weight& weight, const void* activations, auto run,
                            std::vector<float>& scratch_floats) {
    out.assign(out.size(), NAN);
    LinearArgs args{weight, activations, p.m, bias.data(), out.data(), 0, 0, 0, tiles, false};
    const int64_t middle = p.n / 32 * 16;  // in two parts, as two threads would
    for (const auto& [begin, end] : {std::pair{int64_t{0}, middle}, std::pair{middle, p.n}}) {
      args.row_begin = begin;
      args.row_end = end;
      run(args, scratch_floats.data());
    }
  };
  for (const Weight& weight : weights) {
    const std::string layout = weight.packed ? " packed" : " canonical";
    multiply(weight, exact.data(), kernel.linear_exact, sums);
    expect_close(what + layout + " exact", out, wanted, exact_bound);
    multiply(weight, int8.data(), kernel.linear_int8, sums);
    expect_close(what + layout + " int8", out, wanted, int8_bound);
    if (kernels.tiles.least_rows > 0) {
      multiply(weight, by_tiles.data(), kernels.tiles.linear[format], tile_scratch);
      expect_close(what + layout + " tiles", out, wanted, exact_bound);
    }
    std::vector<float> all_rows(p.n * p.k);
    kernel.dequantize_rows(weight, 0, p.n, all_rows.data());
    for (int64_t row = 0; row < p.n; ++row) {
      std::vector<float> values(p.k);
      kernel.dequantize_row(weight, row, values.data());
      for (int64_t k = 0; k < p.k; ++k) {
        if (!same_bits(values[k], w[row * p.k + k])) fail(what + layout + " dequantize_row");
        if (!same_bits(all_rows[row * p.k + k], values[k]))
          fail(what + layout + " dequantize_rows");
      }
    }
  }

  const std::vector<float> grad = normals(random, p.m * p.n);
  std::vector<double> grad_wanted(p.m * p.k), grad_bound(p.m * p.k);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; ++k) {
      double sum = 0, magnitude = 0;
      for (int64_t n = 0; n < p.n; ++n) {
        const double product = double{grad[m * p.n + n]} * w[n * p.k + k];
        sum += product;
        magnitude += std::abs(product);
      }
      grad_wanted[m * p.k + k] = sum;
      grad_bound[m * p.k + k] = (p.n + 4) * 0x1p-24 * magnitude;
    }
  }
  for (const Weight& weight : weights) {
    std::vector<float> grad_x(p.m * p.k, NAN);
    for (int64_t k = 0; k < p.k; k += 256) {
      kernel.linear_transposed(grad.data(), weight, 0, p.m, k, std::min(p.k, k + 256),
                               grad_x.data());
    }
    expect_close(what + " transposed", grad_x, grad_wanted, grad_bound);
  }

  kernel.unpack(packed.data(), p.n / 16, p.k, scratch.data());
  if (packed != blocks) fail(what + ": unpack must invert pack");
}

template <class Format>
void test_quantisers(const Kernels& kernels, int format) {
  for (const int64_t rows : {1, 2, 15, 16, 33}) {
    for (const int64_t blocks : {1, 3, 16}) {
      test_quantiser<Format>(kernels, format, rows, blocks * Format::kBlockElems);
    }
  }
  // Values that no search expects must not trip one: infinities, NaN, zeros, subnormals, extremes.
  const float odd[] = {INFINITY, -INFINITY, NAN,   0.0f,   -0.0f,
                       1e-42f,   -1e-39f,   3e38f, -3e38f, 1e-5f};
  for (int kind = 0; kind < 30; ++kind) {
    Random random;
    std::vector<float> row = normals(random, 256), weights(256, 1.0f);
    for (int i = 0; i < 256; ++i) {
      if (kind < 10 || random.bits() % 4 == 0) row[i] = odd[kind % 10];
      if (kind >= 20) weights[i] = odd[random.bits() % 10];
    }
    std::vector<typename Format::Block> out(256 / Format::kBlockElems);
    Format::quantize_row(row.data(), nullptr, out.data(), 256);
    Format::quantize_row(row.data(), weights.data(), out.data(), 256);
    if (kernels.quantizers != nullptr && kernels.quantizers->formats[format] != nullptr) {
      const auto quantize_rows = kernels.quantizers->formats[format];
      quantize_rows(row.data(), nullptr, out.data(), 1, 256);
      quantize_rows(row.data(), weights.data(), out.data(), 1, 256);
    }
  }
}

template <class Format>
void test_format(const Kernels& kernels, int format) {
  for (const int64_t m : {1, 2, 4, 5, 13, 30, 49}) {
    for (const int64_t n : {1, 16, 39}) {
      for (const int64_t k : {256, 512, 1280}) test_products<Format>(kernels, format, {m, n, k});
      if (Format::kBlockElems == 32) {
        for (const int64_t k : {32, 288, 736}) test_products<Format>(kernels, format, {m, n, k});
      }
    }
  }
  if constexpr (kHasQuantizer<Format>) test_quantisers<Format>(kernels, format);
}

void test_conversions(const Kernels& kernels) {
  std::vector<uint16_t> halves(65536 + 5), back(halves.size());
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> floats(halves.size());
  kernels.half_to_float(halves.data(), floats.data(), halves.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    if (!same_bits(floats[i], half_to_float(halves[i]))) fail("half_to_float");
  }
  kernels.float_to_half(floats.data(), back.data(), floats.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    if (!std::isnan(floats[i]) && back[i] != halves[i]) fail("float_to_half");
  }
  kernels.bfloat16_to_float(halves.data(), floats.data(), halves.size());
  kernels.float_to_bfloat16(floats.data(), back.data(), floats.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    if (!std::isnan(floats[i]) && back[i] != halves[i]) fail("float_to_bfloat16");
  }
}

template <class T>
bool read(T* to, size_t count) {
  return std::fread(to, sizeof(T), count, stdin) == count;
}

// Golden blocks: the kernel's values must be the file's, bit for bit.
int test_golden(const Kernels& kernels) {
  int arrays = 0;
  int32_t type;
  while (read(&type, 1)) {
    int64_t bytes = 0, elems = 0;
    if (!read(&bytes, 1) || !read(&elems, 1)) fail("input ends early");
    std::vector<uint8_t> blocks(bytes);
    std::vector<float> wanted(elems), values(elems);
    if (!read(blocks.data(), bytes) || !read(wanted.data(), elems)) fail("input ends early");
    bool found = false;
#define TORCH_Q4_TEST(Format)                                                               \
  if (type == Format::kTypeId) {                                                            \
    found = true;                                                                           \
    kernels.formats[cpu::k##Format##Index].dequantize(blocks.data(), elems, values.data()); \
  }
    TORCH_Q4_FORMATS(TORCH_Q4_TEST)
#undef TORCH_Q4_TEST
    if (!found) fail("unknown type " + std::to_string(type));
    for (int64_t i = 0; i < elems; ++i) {
      if (!same_bits(values[i], wanted[i])) {
        fail("type " + std::to_string(type) + ": value " + std::to_string(i) + " must be " +
             std::to_string(wanted[i]) + ", got " + std::to_string(values[i]));
      }
    }
    ++arrays;
  }
  return arrays;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--types") {
#define TORCH_Q4_TEST(Format) std::printf("%d\n", Format::kTypeId);
    TORCH_Q4_FORMATS(TORCH_Q4_TEST)
#undef TORCH_Q4_TEST
    return 0;
  }
  const Kernels& kernels = cpu::kernels();
  const int arrays = test_golden(kernels);
  test_conversions(kernels);
#define TORCH_Q4_TEST(Format) test_format<Format>(kernels, cpu::k##Format##Index);
  TORCH_Q4_FORMATS(TORCH_Q4_TEST)
#undef TORCH_Q4_TEST
  std::printf("%s: %d golden arrays and %d formats agree\n", kernels.isa, arrays,
              static_cast<int>(cpu::kFormatCount));
  return 0;
}
