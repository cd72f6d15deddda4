#include <array>

#include "common.h"
#include "dispatch.h"
#include "plans.h"

namespace torch_q4::gpu {
namespace {

using torch::stable::copy_;
using torch::stable::narrow;
using torch::stable::view;

// Blocks along a grid's second side, at most 65535. A multiple of 8, so that where there are more
// rows of x than fit in one launch, the next one's part of `out` starts at a multiple of 16 bytes.
constexpr int64_t kMostGridY = 65528;

// Hands `rows` rows of x at a time to `run`.
template <class Run>
void by_rows(const LinearArgs& args, int64_t rows, int64_t x_bytes, const Run& run) {
  for (int64_t done = 0; done < args.m; done += rows) {
    LinearArgs part = args;
    part.m = std::min(rows, args.m - done);
    part.x = at(args.x, done * args.k, x_bytes);
    part.out = at(args.out, done * args.n, dtype_bytes(args.dtype));
    if (args.scales) part.scales = args.scales + done * (args.k / 32);
    if (args.sums) part.sums = args.sums + done * (args.k / 16);
    run(part);
  }
}

void run_reference(const Call& call, const LinearArgs& args) {
  // HIP counts a grid's threads in 32 bits.
  const int64_t rows = std::max<int64_t>(8, (int64_t{1} << 31) / args.n / 8 * 8);
  by_rows(args, rows, dtype_bytes(args.dtype), [&](const LinearArgs& part) {
    call.run(reference_kernel(args.dtype), reference_grid(part), part);
  });
}

void run_rows(const Call& call, const LinearArgs& args, bool int8) {
  int width = 0;
  while (width < kRowsWidths - 1 && kRowsXRows[width] < args.m) ++width;
  const int x_rows = kRowsXRows[width];
  const Kernel kernel = int8 ? rows_int8_kernel(width) : rows_kernel(args.dtype, width);
  const int64_t x_bytes = int8 ? 1 : dtype_bytes(args.dtype);
  by_rows(args, kMostGridY * x_rows, x_bytes,
          [&](const LinearArgs& part) { call.run(kernel, rows_grid(part, x_rows), part); });
}

// The last ones of a packed weight, which the matrix kernels leave out.
void rows_that_are_not_packed(const Call& call, LinearArgs args) {
  args.row_begin = args.n / kGroupRows * kGroupRows;
  args.row_end = args.n;
  if (args.row_begin < args.n) run_rows(call, args, /*int8=*/false);
}

// Adds up `partial`, (splits, rows of out, rows of W).
SumArgs sum_args(const Tensor& partial, void* out, DType dtype) {
  SumArgs args = {};
  args.partial = static_cast<const float*>(partial.const_data_ptr());
  args.out = out;
  args.splits = static_cast<int32_t>(partial.size(0));
  args.count = partial.numel() / args.splits;
  args.rows = args.n = partial.size(2);
  args.dtype = dtype;
  return args;
}

// What the blocks that share out K leave to be added up.
std::optional<Tensor> partial_sums(const Call& call, const LinearArgs& args, int32_t splits) {
  if (splits == 1) return std::nullopt;
  return call.empty({splits, args.m, args.row_end}, ScalarType::Float);
}

void add_up(const Call& call, const Tensor& partial, const LinearArgs& args) {
  SumArgs sum = sum_args(partial, args.out, args.dtype);
  sum.bias = args.bias;
  sum.n = args.n;
  Block block;
  block.overlaps = true;
  call.run_common(kSumSplits, sum_grid(sum), sum, block);
}

// Rows of x that are arranged at a time, at most kPanelBytes of them: so few that no grid is too
// large.
int64_t arranged_rows(int64_t k) {
  constexpr int64_t kMultiple = 256;  // whole blocks
  const int64_t rows = kPanelBytes / arranged_bytes(1, k, 1) / kMultiple * kMultiple;
  return std::max(rows, kMultiple);
}

void run_tiles(const Call& call, LinearArgs args, int width) {
  const int x_rows = kTilesXRows[width];
  args.row_end = args.n / kGroupRows * kGroupRows;
  by_rows(args, kMostGridY * x_rows, dtype_bytes(args.dtype), [&](const LinearArgs& part) {
    call.run(tiles_kernel(args.dtype, width), rows_grid(part, x_rows), part);
  });
  rows_that_are_not_packed(call, args);
}

void run_pipelined(const Call& call, LinearArgs args, int width) {
  const FormatInfo& format = call.format;
  const int x_rows = kPipelinedXRows[width];
  const auto block_elems = static_cast<int32_t>(format.block_elems);
  args.row_end = args.n / kGroupRows * kGroupRows;
  by_rows(args, arranged_rows(args.k), dtype_bytes(args.dtype), [&](const LinearArgs& part) {
    if (part.row_end == 0) return;
    const Tensor arranged =
        call.empty({arranged_lanes_bytes(part.m, part.k, x_rows, block_elems)}, ScalarType::Byte);
    const ArrangeArgs arrange = {part.x,     arranged.mutable_data_ptr(), part.m, part.k, x_rows,
                                 block_elems};
    call.run_common(kArrangeLanes, arrange_lanes_grid(arrange), arrange);
    PipelinedArgs all = {
        part, arrange.out, nullptr,
        pipelined_splits(part.m, part.n, part.k, x_rows, call.info().multiprocessors)};
    std::optional<Tensor> partial = partial_sums(call, part, all.splits);
    if (partial) all.partial = static_cast<float*>(partial->mutable_data_ptr());
    call.run(pipelined_kernel(args.dtype, width), pipelined_grid(all, x_rows), all);
    if (partial) add_up(call, *partial, part);
  });
  rows_that_are_not_packed(call, args);
}

void run_hopper_rows(const Call& call, LinearArgs args) {
  const FormatInfo& format = call.format;
  const DeviceInfo& info = call.info();
  const HopperRowsPlan plan =
      hopper_rows_plan(args.m, args.n, args.k, format.block_elems, format.block_bytes,
                       info.multiprocessors, info.shared_bytes);
  const int x_rows = kHopperRowsXRows[plan.width];
  args.row_end = args.n / kGroupRows * kGroupRows;
  by_rows(args, kMostGridY * x_rows, dtype_bytes(args.dtype), [&](const LinearArgs& part) {
    if (part.row_end == 0) return;
    HopperRowsArgs all = {part, nullptr, plan.groups, plan.stages, plan.splits};
    std::optional<Tensor> partial = partial_sums(call, part, plan.splits);
    if (partial) all.partial = static_cast<float*>(partial->mutable_data_ptr());
    const int bytes = hopper_rows_shared_bytes(all, x_rows, format.block_elems, format.block_bytes);
    call.run(hopper_rows_kernel(args.dtype, plan.width), hopper_rows_grid(all, x_rows), all,
             {static_cast<unsigned>(hopper_rows_threads(x_rows)), static_cast<unsigned>(bytes)});
    if (partial) add_up(call, *partial, part);
  });
  rows_that_are_not_packed(call, args);
}

void run_hopper_many(const Call& call, LinearArgs args) {
  const FormatInfo& format = call.format;
  const DeviceInfo& info = call.info();
  args.row_end = args.n / kGroupRows * kGroupRows;
  by_rows(args, arranged_rows(args.k), dtype_bytes(args.dtype), [&](const LinearArgs& part) {
    if (part.row_end == 0) return;
    const HopperManyPlan plan =
        hopper_many_plan(part.m, part.n, part.k, format.block_elems, format.block_bytes,
                         info.multiprocessors, info.shared_bytes);
    const int x_rows = kHopperManyXRows[plan.width];
    const Tensor arranged = call.empty({arranged_bytes(part.m, part.k, x_rows)}, ScalarType::Byte);
    const ArrangeArgs arrange = {part.x, arranged.mutable_data_ptr(),
                                 part.m, part.k,
                                 x_rows, static_cast<int32_t>(format.block_elems)};
    call.run_common(kArrange, arrange_grid(arrange), arrange);
    HopperManyArgs all = {part,          arrange.out,        nullptr,
                          plan.x_stages, plan.weight_stages, plan.splits};
    std::optional<Tensor> partial = partial_sums(call, part, plan.splits);
    if (partial) all.partial = static_cast<float*>(partial->mutable_data_ptr());
    Block block;
    block.threads = kHopperManyThreads;
    block.shared_bytes =
        hopper_many_shared_bytes(all, x_rows, format.block_elems, format.block_bytes);
    block.overlaps = true;
    call.run(hopper_many_kernel(args.dtype, plan.width),
             hopper_many_grid(all, x_rows, info.multiprocessors), all, block);
    if (partial) add_up(call, *partial, part);
  });
  rows_that_are_not_packed(call, args);
}

void rows_of_int8(const Call& call, LinearArgs args) {
  const int64_t count = args.m * args.k;
  const auto rounded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  const int64_t scales_at = rounded(count), sums_at = scales_at + rounded(count / 32 * 4);
  const Tensor workspace = call.empty({sums_at + count / 16 * 4}, ScalarType::Byte);
  auto* start = static_cast<char*>(workspace.mutable_data_ptr());
  ActivationArgs activations;
  activations.x = args.x;
  activations.codes = reinterpret_cast<int8_t*>(start);
  activations.scales = reinterpret_cast<float*>(start + scales_at);
  activations.sums = reinterpret_cast<int32_t*>(start + sums_at);
  activations.count = count;
  activations.dtype = args.dtype;
  call.run_common(kQuantizeActivations, activation_grid(activations), activations);
  args.x = activations.codes;
  args.scales = activations.scales;
  args.sums = activations.sums;
  run_rows(call, args, /*int8=*/true);
}

// The C entry points of torch's matrix products, which write to `out`. The dispatcher is told an
// operator's name and looks it up, then every call inside it goes through the dispatcher again:
// about three microseconds that these do without. Null where torch does not export them.
struct DenseProducts {
  AOTITorchError (*mm)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
  AOTITorchError (*addmm)(AtenTensorHandle out, AtenTensorHandle bias, AtenTensorHandle a,
                          AtenTensorHandle b, double beta, double alpha);
};

const DenseProducts& dense_products() {
  static const DenseProducts found = {
      reinterpret_cast<decltype(DenseProducts::mm)>(dlsym(RTLD_DEFAULT, "aoti_torch_cuda_mm_out")),
      reinterpret_cast<decltype(DenseProducts::addmm)>(
          dlsym(RTLD_DEFAULT, "aoti_torch_cuda_addmm_out")),
  };
  return found;
}

// A contiguous tensor's elements as a matrix.
Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  if (tensor.dim() == 2) return tensor;
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle matrix = nullptr;
  // The offset counts from the tensor's own.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, /*offset=*/0, &matrix));
  return Tensor(matrix);
}

// torch's own x @ w.T + bias.
Tensor dense_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x @ w.T + bias for a weight that is one panel.
Tensor linear_by_panel(const Call& call, const Tensor& x, const Tensor& blocks,
                       const std::optional<Tensor>& bias, bool packed,
                       const std::vector<int64_t>& shape) {
  const ScalarType dtype = x.scalar_type();
  const int64_t m = leading(shape), n = blocks.size(0), k = columns_of(blocks, call.format);
  const DenseProducts& products = dense_products();
  if (!products.mm || !products.addmm) {
    const Tensor panel = call.empty({n, k}, dtype);
    dequantize_panel(call, blocks, packed, 0, n, dtype, panel);
    return dense_linear(x, panel, bias);
  }
  const Tensor panel = call.empty_transposed(n, k, dtype);
  dequantize_panel(call, blocks, packed, 0, n, dtype, panel);
  Tensor out = call.empty(shape, dtype);
  const Tensor from = as_matrix(x, m, k), to = as_matrix(out, m, n);
  TORCH_ERROR_CODE_CHECK(bias ? products.addmm(to.get(), bias->get(), from.get(), panel.get(), 1, 1)
                              : products.mm(to.get(), from.get(), panel.get()));
  return out;
}

Tensor linear_by_blas(const Call& call, const Tensor& x, const Tensor& blocks,
                      const std::optional<Tensor>& bias, bool packed, std::vector<int64_t> shape) {
  const ScalarType dtype = x.scalar_type();
  const int64_t n = blocks.size(0), k = columns_of(blocks, call.format);
  const int64_t rows = panel_rows(n, k, dtype_of(dtype));
  if (rows == n) return linear_by_panel(call, x, blocks, bias, packed, shape);
  Tensor panel = call.empty({rows, k}, dtype);
  Tensor out = call.empty(shape, dtype);
  const int64_t m = leading(shape);
  const Tensor x_rows = view(x, {m, k});
  Tensor out_rows = view(out, {m, n});
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    dequantize_panel(call, blocks, packed, begin, begin + count, dtype, panel);
    std::optional<Tensor> part_bias;
    if (bias) {
      Tensor whole_bias = *bias;
      part_bias = narrow(whole_bias, 0, begin, count);
    }
    Tensor part = narrow(out_rows, 1, begin, count);
    copy_(part, dense_linear(x_rows, narrow(panel, 0, 0, count), part_bias));
  }
  return out;
}

// `given` decides in place of plans and the table.
Tensor run_linear(const char* op, const Tensor& x, const Tensor& blocks, const FormatInfo& format,
                  const std::optional<Tensor>& bias, bool int8, bool packed,
                  const LinearKernel* given) {
  const Call call(op, format, x);
  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> shape = shape_of(x);
  LinearArgs args = {};
  args.m = leading(shape);
  args.n = blocks.size(0);
  args.k = shape.back();
  args.row_begin = 0;
  args.row_end = args.n;
  args.packed = packed;
  args.dtype = dtype_of(dtype);
  shape.back() = args.n;
  if (args.m == 0 || args.n == 0) return call.empty(shape, dtype);
  if (args.k == 0) {
    Tensor out = call.empty(shape, dtype);
    if (bias) return copy_(out, *bias);
    return torch::stable::zero_(out);
  }

  const LinearKernel kernel =
      given ? *given
            : planned_linear(call.device, format.index,
                             {args.dtype, int8, packed, args.m, args.n, args.k, call.info().family,
                              static_cast<int>(format.block_elems),
                              static_cast<int>(format.block_bytes), call.info().multiprocessors});
  const Tensor source = aligned(x), weight = aligned_weight("linear", blocks);
  if (kernel == LinearKernel::kBlas) {
    return linear_by_blas(call, source, weight, bias, packed, std::move(shape));
  }
  std::optional<Tensor> bias_values;
  if (bias) bias_values = as_contiguous(*bias);
  Tensor out = call.empty(shape, dtype);
  args.x = source.const_data_ptr();
  args.blocks = static_cast<const uint8_t*>(weight.const_data_ptr());
  args.bias = bias_values ? bias_values->const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  switch (kernel) {
    case LinearKernel::kReference:
      run_reference(call, args);
      break;
    case LinearKernel::kTiles16:
      run_tiles(call, args, 0);
      break;
    case LinearKernel::kTiles64:
      run_tiles(call, args, 1);
      break;
    case LinearKernel::kPipelined16:
      run_pipelined(call, args, 0);
      break;
    case LinearKernel::kPipelined64:
      run_pipelined(call, args, 1);
      break;
    case LinearKernel::kPipelined128:
      run_pipelined(call, args, 2);
      break;
    case LinearKernel::kHopperRows:
      run_hopper_rows(call, args);
      break;
    case LinearKernel::kHopperMany:
      run_hopper_many(call, args);
      break;
    case LinearKernel::kRowsInt8:
      rows_of_int8(call, args);
      break;
    default:
      run_rows(call, args, /*int8=*/false);
  }
  return out;
}

Tensor linear(const Tensor& x, const Tensor& blocks, int64_t format_id, std::optional<Tensor> bias,
              std::string compute, bool packed) {
  const FormatInfo format = check_linear(x, blocks, format_id, bias, compute);
  return run_linear("linear", x, blocks, format, bias, compute == "int8", packed, nullptr);
}

// `linear` by a kernel of the caller's choice, for tests and experiments.
Tensor linear_with(const Tensor& x, const Tensor& blocks, int64_t format_id,
                   std::optional<Tensor> bias, std::string compute, bool packed,
                   std::string kernel) {
  const char* op = "_linear_with";
  const FormatInfo format = check_linear(x, blocks, format_id, bias, compute);
  const LinearKernelInfo& info = find_linear_kernel(op, kernel);
  const bool int8 = compute == "int8";
  TORCH_Q4_CHECK(!int8 || info.kernel == LinearKernel::kRows, op,
                 ": kernel must be rows for compute int8, got ", kernel);
  TORCH_Q4_CHECK(takes_layout(info, packed), op, ": blocks must be packed for ", kernel,
                 ", got canonical ones");
  TORCH_Q4_CHECK(takes_dtype(info, dtype_of(x.scalar_type())), op,
                 ": x must be float16 or bfloat16 for ", kernel, ", got ",
                 dtype_name(x.scalar_type()));
  check_kernel_runs_on(op, info, x.get_device_index());
  const LinearKernel given = int8 ? LinearKernel::kRowsInt8 : info.kernel;
  return run_linear(op, x, blocks, format, bias, int8, packed, &given);
}

// out = a @ b. These forms of torch's product, unlike the others, do not heed autocast, which would
// round a float32 gradient to 16 bits.
void dense_matmul(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (const auto mm = dense_products().mm) {
    TORCH_ERROR_CODE_CHECK(mm(out.get(), a.get(), b.get()));
    return;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over what the call returned
}

void sum_splits(const Call& call, const Tensor& partial, const Tensor& out) {
  const SumArgs args = sum_args(partial, out.mutable_data_ptr(), dtype_of(out.scalar_type()));
  call.run_common(kSumSplits, sum_grid(args), args);
}

// grad (m, n) times the dequantised weight. Several panels' products are added up in float32.
void transposed_by_blas(const Call& call, const Tensor& grad, const Tensor& blocks, bool packed,
                        const Tensor& out) {
  const ScalarType dtype = grad.scalar_type();
  const int64_t m = grad.size(0), n = blocks.size(0), k = columns_of(blocks, call.format);
  const int64_t rows = panel_rows(n, k, dtype_of(dtype));
  Tensor panel = call.empty({rows, k}, dtype);
  if (rows == n) {
    dequantize_panel(call, blocks, packed, 0, n, dtype, panel);
    return dense_matmul(grad, panel, out);
  }
  // The sum so far, and the next panel's product.
  Tensor partial = call.empty({2, m, k}, ScalarType::Float);
  Tensor sum = torch::stable::select(partial, 0, 0), next = torch::stable::select(partial, 0, 1);
  Tensor product = call.empty({m, k}, dtype), all_grad = grad;
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    dequantize_panel(call, blocks, packed, begin, begin + count, dtype, panel);
    dense_matmul(narrow(all_grad, 1, begin, count), narrow(panel, 0, 0, count), product);
    copy_(begin == 0 ? sum : next, product);
    if (begin > 0) sum_splits(call, partial, begin + count < n ? sum : out);
  }
}

void transposed_by_kernel(const Call& call, const Tensor& grad, const Tensor& blocks, bool packed,
                          const Tensor& out) {
  TransposedArgs args;
  args.grad = grad.const_data_ptr();
  args.blocks = static_cast<const uint8_t*>(blocks.const_data_ptr());
  args.m = grad.size(0);
  args.n = blocks.size(0);
  args.k = columns_of(blocks, call.format);
  args.splits = transposed_splits(args.m, args.n, args.k, call.info().multiprocessors);
  args.packed = packed;
  args.dtype = dtype_of(grad.scalar_type());
  const Tensor partial = call.empty({args.splits, args.m, args.k}, ScalarType::Float);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  call.run(kTransposed, transposed_grid(args), args);
  sum_splits(call, partial, out);
}

Tensor linear_transposed(const Tensor& grad, const Tensor& blocks, int64_t format_id, bool packed) {
  const FormatInfo format = check_linear_transposed(grad, blocks, format_id);
  const Call call("linear_transposed", format, grad);
  std::vector<int64_t> shape = shape_of(grad);
  const int64_t m = leading(shape), n = shape.back(), k = columns_of(blocks, format);
  shape.back() = k;
  Tensor out = call.empty(shape, grad.scalar_type());
  if (out.numel() == 0) return out;
  if (n == 0) return torch::stable::zero_(out);

  const Tensor rows = view(aligned(grad), {m, n}),
               weight = aligned_weight("linear_transposed", blocks);
  const Tensor out_rows = view(out, {m, k});
  const auto run = m <= kTransposedMaxRows ? transposed_by_kernel : transposed_by_blas;
  run(call, rows, weight, packed, out_rows);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_q4, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("_linear_with", TORCH_BOX(&linear_with));
  m.impl("linear_transposed", TORCH_BOX(&linear_transposed));
}

}  // namespace torch_q4::gpu
