#include <array>
#include <atomic>

#include "common.h"

namespace torch_q4::cpu {
namespace {

// From so many rows of x on, exact products go through torch's own matrix product: by then it costs
// little to dequantise a panel of the weight first, and no kernel of ours is faster on float32,
// other than those on tiles.
constexpr int64_t kBlasRows = 192;
constexpr int64_t kBlasPanelBytes = 16 << 20;  // of dequantised weight at a time

using Prepare = bool (*)(const float* x, int64_t k, int64_t m, int64_t m_total, void* out);

// Memory for floats: on the stack where it is little, since asking torch for it costs more than a
// small product.
class Floats {
 public:
  explicit Floats(int64_t count) {
    if (count > kFew) large_ = empty({count}, ScalarType::Float);
    data_ = count > kFew ? static_cast<float*>(large_.mutable_data_ptr()) : few_;
  }
  Floats(const Floats&) = delete;
  float* data() { return data_; }

 private:
  static constexpr int64_t kFew = 2048;
  alignas(64) float few_[kFew];
  float* data_;
  Tensor large_;
};

// x as the kernels read it; false if `run` says so of one of its rows.
bool prepare(const float* x, int64_t m, int64_t k, Prepare run, void* out) {
  std::atomic<bool> all(true);
  parallel_for(0, m, k * kConvertWork, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!run(x + row * k, k, row, m, out)) all = false;
    }
  });
  return all;
}

// out = a @ b, torch's own product.
void matmul_into(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // out again, whose handle must be released
}

// out = x @ W.T + bias by dequantised panels of W; all float32. A panel is laid out as F.linear's
// weight is, so that torch sums in the same order: with the panel's transpose stored instead, its
// error on some CPUs was three times that of F.linear.
void linear_by_panels(const Tensor& x, const Weight& weight, const FormatKernels& kernel,
                      const float* bias, int64_t m, Tensor& out) {
  const Tensor rows = torch::stable::view(x, {m, weight.k});
  const int64_t most_rows = std::max<int64_t>(16, kBlasPanelBytes / (weight.k * 4));
  const int64_t panels = (weight.n + most_rows - 1) / most_rows;
  // Of equal size: a last one of a few rows would be a product of another kind.
  const int64_t panel_rows = ((weight.n + panels - 1) / panels + 15) / 16 * 16;
  Tensor panel = empty({std::min(panel_rows, weight.n), weight.k}, ScalarType::Float);
  auto* values = static_cast<float*>(panel.mutable_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  Tensor all = torch::stable::view(out, {m, weight.n});
  for (int64_t start = 0; start < weight.n; start += panel_rows) {
    const int64_t count = std::min(panel_rows, weight.n - start);
    parallel_for(
        0, (count + 15) / 16, 16 * weight.k * kDecodeWork, [&](int64_t begin, int64_t end) {
          kernel.dequantize_rows(weight, start + begin * 16, std::min(start + end * 16, weight.n),
                                 values + begin * 16 * weight.k);
        });
    Tensor product = torch::stable::narrow(all, 1, start, count);
    Tensor weights = torch::stable::narrow(panel, 0, 0, count);
    weights = torch::stable::transpose(weights, 0, 1);
    matmul_into(rows, weights, product);
  }
  if (bias == nullptr) return;
  parallel_for(0, m, weight.n * kConvertWork, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t n = 0; n < weight.n; ++n) to[row * weight.n + n] += bias[n];
    }
  });
}

// Runs a kernel over all rows, on all threads. Rows are shared out in groups of 16; where there are
// fewer groups than threads, K is too, and the parts' results are added up.
void multiply(const LinearArgs& args, void (*run)(const LinearArgs& args, float* scratch),
              int64_t scratch_floats) {
  const int64_t groups = (args.weight.n + 15) / 16;
  const int64_t tiles = (args.weight.k + kTileElems - 1) / kTileElems;
  const int64_t work = 16 * args.m * kTileElems;  // of a group's tile
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t worth = std::max<int64_t>(1, groups * tiles * work / kThreadWork);
  const int64_t wanted = groups < threads ? std::min(threads / groups, worth) : 1;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, tiles));
  const int64_t outputs = args.m * args.weight.n;
  std::vector<float> partial((parts - 1) * outputs);
  const auto of_part = [&](int64_t part) {
    return part == 0 ? args.out : partial.data() + (part - 1) * outputs;
  };
  parallel_for(0, groups * parts, work * tiles / parts, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_floats);
    LinearArgs unit = args;
    for (int64_t i = begin; i < end;) {
      const int64_t part = i / groups;
      const int64_t last = std::min(end, (part + 1) * groups);
      unit.row_begin = (i - part * groups) * 16;
      unit.row_end = std::min((last - part * groups) * 16, args.weight.n);
      unit.tile_begin = tiles * part / parts;
      unit.tile_end = tiles * (part + 1) / parts;
      if (parts > 1) unit.bias = nullptr;  // added to the sum of all parts, below
      unit.out = of_part(part);
      run(unit, scratch.data());
      i = last;
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    const float* from = of_part(part);
    for (int64_t i = 0; i < outputs; ++i) args.out[i] += from[i];
  }
  if (parts == 1 || args.bias == nullptr) return;
  for (int64_t i = 0; i < outputs; ++i) args.out[i] += args.bias[i % args.weight.n];
}

// By the CPU's matrix instructions; false if x is not finite.
bool linear_by_tiles(const LinearArgs& args, const float* x, int format) {
  constexpr int64_t kMostRows = 1024;  // at a time: what is made of x takes 6 bytes an element
  const Tiles& tiles = kernels().tiles;
  const int64_t k = args.weight.k;
  Floats prepared(tiles.x_floats(std::min(args.m, kMostRows), k));
  for (int64_t first = 0; first < args.m; first += kMostRows) {
    LinearArgs rows = args;
    rows.m = std::min(kMostRows, args.m - first);
    rows.x = prepared.data();
    rows.out = args.out + first * args.weight.n;
    if (!prepare(x + first * k, rows.m, k, tiles.prepare, prepared.data())) return false;
    multiply(rows, tiles.linear[format], tiles.scratch_floats(rows.m));
  }
  return true;
}

Tensor linear(const Tensor& x, const Tensor& blocks, int64_t format_id, std::optional<Tensor> bias,
              std::string compute, bool packed) {
  const FormatInfo format = check_linear(x, blocks, format_id, bias, compute);
  const Tensor weight_blocks = as_contiguous(blocks), source = as_float(x);
  const Tensor bias_float = bias ? as_float(*bias) : Tensor();
  std::vector<int64_t> shape = shape_of(x);
  LinearArgs args{};
  args.weight = as_weight(weight_blocks, format, packed);
  args.m = leading(shape);
  shape.back() = args.weight.n;
  Tensor out = empty(shape, ScalarType::Float);
  args.bias = bias ? static_cast<const float*>(bias_float.const_data_ptr()) : nullptr;
  args.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() == 0) return in_dtype(out, x.scalar_type());

  const bool exact = compute == "exact";
  const FormatKernels& kernel = kernels().formats[format.index];
  const int64_t k = args.weight.k, least_rows = kernels().tiles.least_rows;
  if (exact && k > 0 && least_rows > 0 && args.m >= least_rows &&
      linear_by_tiles(args, static_cast<const float*>(source.const_data_ptr()), format.index)) {
    return in_dtype(out, x.scalar_type());
  }
  if (exact && args.m >= kBlasRows && k > 0) {
    linear_by_panels(source, args.weight, kernel, args.bias, args.m, out);
    return in_dtype(out, x.scalar_type());
  }
  const int64_t tiles = (k + kTileElems - 1) / kTileElems;
  Floats activations(args.m * tiles * std::max(kExactWords, kInt8Words));
  const auto prepare_x = [&](Prepare run) {
    return prepare(static_cast<const float*>(source.const_data_ptr()), args.m, k, run,
                   activations.data());
  };
  args.x = activations.data();
  if (!exact && prepare_x(kernel.prepare_int8)) {
    multiply(args, kernel.linear_int8, 16 * args.m);
  } else {  // int8 as well where x is huge: what is rounded there is close to overflowing
    args.huge = !prepare_x(kernel.prepare_exact);
    multiply(args, kernel.linear_exact, 16 * args.m);
  }
  return in_dtype(out, x.scalar_type());
}

Tensor linear_transposed(const Tensor& grad, const Tensor& blocks, int64_t format_id, bool packed) {
  const FormatInfo format = check_linear_transposed(grad, blocks, format_id);
  const Tensor weight_blocks = as_contiguous(blocks), source = as_float(grad);
  const Weight weight = as_weight(weight_blocks, format, packed);
  std::vector<int64_t> shape = shape_of(grad);
  const int64_t m = leading(shape), k = weight.k;
  shape.back() = k;
  Tensor out = empty(shape, ScalarType::Float);
  if (out.numel() == 0) return in_dtype(out, grad.scalar_type());

  const auto* from = static_cast<const float*>(source.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const auto run = kernels().formats[format.index].linear_transposed;
  // A unit is 256 elements of K for 64 rows: the weights of its panel are unpacked once for all.
  constexpr int64_t kUnitElems = kTileElems, kUnitRows = 64;
  const int64_t columns = (k + kUnitElems - 1) / kUnitElems;
  const int64_t units = columns * ((m + kUnitRows - 1) / kUnitRows);
  parallel_for(0, units, kUnitElems * kUnitRows * weight.n, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t k_begin = unit % columns * kUnitElems;
      const int64_t m_begin = unit / columns * kUnitRows;
      run(from, weight, m_begin, std::min(m, m_begin + kUnitRows), k_begin,
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
