#include <memory>

#include "common.h"

namespace torch_q4::cpu {
namespace {

// x quantised for the int8 arithmetic, in one piece of memory from torch's allocator.
class Int8Activations {
 public:
  Int8Activations(const float* x, int64_t m, int64_t k) {
    rows_.padded = (k + 255) / 256 * 256;
    const int64_t row_bytes = rows_.padded * (1 + 4 / 32. + 4 / 16. + 4 / 32.);
    storage_ = empty({m * row_bytes + 64}, ScalarType::Byte);
    auto* next = static_cast<char*>(storage_.mutable_data_ptr());
    const auto take = [&](int64_t bytes) { return std::exchange(next, next + m * bytes); };
    rows_.scales = reinterpret_cast<float*>(take(rows_.padded / 32 * 4));
    rows_.sums16 = reinterpret_cast<float*>(take(rows_.padded / 16 * 4));
    rows_.sums32 = reinterpret_cast<float*>(take(rows_.padded / 32 * 4));
    rows_.codes = reinterpret_cast<int8_t*>(take(rows_.padded));
    parallel_for(0, m, grain(k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernels().quantize_int8(x + row * k, k, row, rows_);
      }
    });
  }

  const Int8Rows& rows() const { return rows_; }

 private:
  Tensor storage_;
  Int8Rows rows_;
};

Tensor linear(const Tensor& x, const Tensor& blocks, int64_t format_id, std::optional<Tensor> bias,
              std::string compute) {
  const FormatInfo format = check_linear(x, blocks, format_id, bias, compute);
  const Tensor weight = as_blocks(blocks), source = as_float(x);
  const Tensor bias_float = bias ? as_float(*bias) : Tensor();
  std::vector<int64_t> shape = shape_of(x);
  LinearArgs args;
  args.m = leading(shape);
  args.k = shape.back();
  args.n_total = shape.back() = weight.size(0);
  Tensor out = empty(shape, ScalarType::Float);
  args.blocks = weight.const_data_ptr();
  args.bias = bias ? static_cast<const float*>(bias_float.const_data_ptr()) : nullptr;
  args.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() == 0) return in_dtype(out, x.scalar_type());

  const auto* activations = static_cast<const float*>(source.const_data_ptr());
  const FormatKernels& kernel = kernels().formats[format.index];
  const auto over_rows = [&](const auto& body) {
    parallel_for(0, args.n_total, grain(args.m * args.k), [&](int64_t begin, int64_t end) {
      LinearArgs part = args;
      part.row_begin = begin;
      part.row_end = end;
      body(part);
    });
  };
  if (compute == "int8") {
    const Int8Activations quantized(activations, args.m, args.k);
    const Int8Rows& rows = quantized.rows();
    over_rows([&](const LinearArgs& part) {
      const auto scratch = std::make_unique<Tile[]>(kInt8Rows * rows.padded / kTileElems);
      kernel.linear_int8(part, rows, scratch.get());
    });
  } else {
    over_rows([&](const LinearArgs& part) { kernel.linear_exact(part, activations); });
  }
  return in_dtype(out, x.scalar_type());
}

Tensor linear_transposed(const Tensor& grad, const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_linear_transposed(grad, blocks, format_id);
  const Tensor weight = as_blocks(blocks), source = as_float(grad);
  std::vector<int64_t> shape = shape_of(grad);
  const int64_t m = leading(shape), n = weight.size(0);
  const int64_t k = weight.size(1) / format.block_bytes * format.block_elems;
  shape.back() = k;
  Tensor out = empty(shape, ScalarType::Float);
  if (out.numel() == 0) return in_dtype(out, grad.scalar_type());

  const auto* from = static_cast<const float*>(source.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const void* bytes = weight.const_data_ptr();
  const auto kernel = kernels().formats[format.index].linear_transposed;
  // A unit is 256 elements of K for 64 rows: the weights of its panel are unpacked once for all.
  constexpr int64_t kUnitElems = 256, kUnitRows = 64;
  const int64_t columns = (k + kUnitElems - 1) / kUnitElems;
  const int64_t units = columns * ((m + kUnitRows - 1) / kUnitRows);
  parallel_for(0, units, grain(kUnitElems * n), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t k_begin = unit % columns * kUnitElems;
      const int64_t m_begin = unit / columns * kUnitRows;
      kernel(from, bytes, n, k, m_begin, std::min(m, m_begin + kUnitRows), k_begin,
             std::min(k, k_begin + kUnitElems), to);
    }
  });
  return in_dtype(out, grad.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_transposed", TORCH_BOX(&linear_transposed));
}

}  // namespace torch_q4::cpu
