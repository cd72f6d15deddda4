// What every operator checks before it touches memory, the same for each backend. The wording is
// that of torch_q4/ops.py, which holds the fakes to the same rules; a test compares the two.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

#include "../kernels/formats/registry.h"
#include "error.h"

namespace torch_q4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct FormatInfo {
  int index;  // position in TORCH_Q4_FORMATS
  const char* name;
  int64_t type_id, block_elems, block_bytes;
  bool quantizes;  // whether it has a quantiser
};

inline constexpr FormatInfo kFormatInfos[] = {
#define TORCH_Q4_INFO(Format) \
  {0,                         \
   Format::kName,             \
   Format::kTypeId,           \
   Format::kBlockElems,       \
   sizeof(Format::Block),     \
   kHasQuantizer<Format>},
    TORCH_Q4_FORMATS(TORCH_Q4_INFO)
#undef TORCH_Q4_INFO
};

inline FormatInfo check_format(const char* op, int64_t type_id) {
  int index = 0;
  std::string known;
  for (FormatInfo info : kFormatInfos) {
    info.index = index++;
    if (info.type_id == type_id) return info;
  }
  for (const FormatInfo& info : kFormatInfos) {
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  }
  fail(op, ": format must be one of ", known, ", got ", type_id);
}

// A tensor's dtype. Tensor::scalar_type throws, in words of torch's, where the stable ABI has no
// word for it: float8_e8m0fnu, int4, bits8 and others. The code is ScalarType's own number.
inline ScalarType dtype_in(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return static_cast<ScalarType>(code);
}

// As Python has it.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      break;
  }
  // Of all others Python's name is C++'s in small letters.
  std::string name = torch::headeronly::toString(dtype);
  if (name == "UNKNOWN_SCALAR") return "dtype number " + std::to_string(static_cast<int>(dtype));
  for (char& letter : name) {
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  }
  return "torch." + name;
}

inline std::string shape_name(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

inline void check_float(const char* op, const char* what, ScalarType dtype) {
  TORCH_Q4_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
      ": ", what, " must be float32, float16 or bfloat16, got ", dtype_name(dtype));
}

inline void check_same_device(const char* op, const char* what, const Tensor& tensor,
                              const char* reference_name, const Tensor& reference) {
  const auto device = tensor.device(), expected = reference.device();
  TORCH_Q4_CHECK(device == expected, op, ": ", what, " must be on the device of ", reference_name);
}

// Blocks whose last dimension is whole rows; returns the columns of one row.
inline int64_t check_blocks(const char* op, const Tensor& blocks, const FormatInfo& format,
                            bool matrix) {
  TORCH_Q4_CHECK(dtype_in(blocks) == ScalarType::Byte, op, ": blocks must be uint8, got ",
                 dtype_name(dtype_in(blocks)));
  if (matrix) {
    TORCH_Q4_CHECK(blocks.dim() == 2, op, ": blocks must have 2 dimensions, got shape ",
                   shape_name(blocks));
  } else {
    TORCH_Q4_CHECK(blocks.dim() >= 1, op, ": blocks must have at least 1 dimension, got shape ",
                   shape_name(blocks));
  }
  const int64_t row_bytes = blocks.size(blocks.dim() - 1);
  TORCH_Q4_CHECK(row_bytes % format.block_bytes == 0, op,
                 ": bytes per row of blocks must be a multiple of ", format.block_bytes, " for ",
                 format.name, ", got ", row_bytes);
  return row_bytes / format.block_bytes * format.block_elems;
}

inline void check_columns(const char* op, const char* what, int64_t columns,
                          const FormatInfo& format) {
  TORCH_Q4_CHECK(columns % format.block_elems == 0, op, ": columns of ", what,
                 " must be a multiple of ", format.block_elems, " for ", format.name, ", got ",
                 columns);
}

inline FormatInfo check_quantize(const Tensor& w, int64_t format_id,
                                 const std::optional<Tensor>& importance) {
  const FormatInfo format = check_format("quantize", format_id);
  TORCH_Q4_CHECK(format.quantizes,
                 "quantize: format must be one that torch_q4 quantises to; llama.cpp's "
                 "llama-quantize makes files of the others with an importance matrix; got ",
                 format.name);
  check_float("quantize", "w", dtype_in(w));
  TORCH_Q4_CHECK(w.dim() >= 1, "quantize: w must have at least 1 dimension, got shape ",
                 shape_name(w));
  const int64_t columns = w.size(w.dim() - 1);
  check_columns("quantize", "w", columns, format);
  if (importance) {
    TORCH_Q4_CHECK(dtype_in(*importance) == ScalarType::Float,
                   "quantize: importance must be float32, got ", dtype_name(dtype_in(*importance)));
    TORCH_Q4_CHECK(importance->dim() == 1 && importance->size(0) == columns,
                   "quantize: importance must have shape (", columns, ",), got ",
                   shape_name(*importance));
    check_same_device("quantize", "importance", *importance, "w", w);
  }
  return format;
}

// For pack, unpack and pack_.
inline FormatInfo check_repack(const char* op, const Tensor& blocks, int64_t format_id) {
  const FormatInfo format = check_format(op, format_id);
  check_blocks(op, blocks, format, /*matrix=*/true);
  return format;
}

inline FormatInfo check_dequantize(const Tensor& blocks, int64_t format_id, ScalarType dtype) {
  const FormatInfo format = check_format("dequantize", format_id);
  check_blocks("dequantize", blocks, format, /*matrix=*/false);
  check_float("dequantize", "dtype", dtype);
  return format;
}

// x (..., columns) against blocks (rows, bytes); `columns` is what x's last dimension must be.
inline void check_product(const char* op, const char* x_name, const Tensor& x,
                          const Tensor& blocks) {
  check_float(op, x_name, dtype_in(x));
  TORCH_Q4_CHECK(x.dim() >= 1, op, ": ", x_name, " must have at least 1 dimension, got shape ",
                 shape_name(x));
  check_same_device(op, "blocks", blocks, x_name, x);
}

inline FormatInfo check_linear(const Tensor& x, const Tensor& blocks, int64_t format_id,
                               const std::optional<Tensor>& bias, const std::string& compute) {
  const FormatInfo format = check_format("linear", format_id);
  check_product("linear", "x", x, blocks);
  const int64_t columns = x.size(x.dim() - 1);
  check_columns("linear", "x", columns, format);
  TORCH_Q4_CHECK(dtype_in(blocks) == ScalarType::Byte, "linear: blocks must be uint8, got ",
                 dtype_name(dtype_in(blocks)));
  TORCH_Q4_CHECK(blocks.dim() == 2, "linear: blocks must have 2 dimensions, got shape ",
                 shape_name(blocks));
  const int64_t row_bytes = columns / format.block_elems * format.block_bytes;
  TORCH_Q4_CHECK(blocks.size(1) == row_bytes, "linear: blocks must have ", row_bytes,
                 " bytes per row for ", format.name, " with ", columns, " columns, got ",
                 blocks.size(1));
  if (bias) {
    TORCH_Q4_CHECK(dtype_in(*bias) == dtype_in(x), "linear: bias must have the dtype of x, ",
                   dtype_name(dtype_in(x)), ", got ", dtype_name(dtype_in(*bias)));
    TORCH_Q4_CHECK(bias->dim() == 1 && bias->size(0) == blocks.size(0),
                   "linear: bias must have shape (", blocks.size(0), ",), got ", shape_name(*bias));
    check_same_device("linear", "bias", *bias, "x", x);
  }
  TORCH_Q4_CHECK(compute == "exact" || compute == "int8",
                 "linear: compute must be exact or int8, got ", compute);
  return format;
}

inline FormatInfo check_linear_transposed(const Tensor& grad, const Tensor& blocks,
                                          int64_t format_id) {
  const char* op = "linear_transposed";
  const FormatInfo format = check_format(op, format_id);
  check_product(op, "grad", grad, blocks);
  check_blocks(op, blocks, format, /*matrix=*/true);
  TORCH_Q4_CHECK(grad.size(grad.dim() - 1) == blocks.size(0), op, ": grad must have ",
                 blocks.size(0), " columns, one per row of blocks, got ",
                 grad.size(grad.dim() - 1));
  return format;
}

inline FormatInfo check_embedding(const Tensor& indices, const Tensor& blocks, int64_t format_id,
                                  ScalarType dtype) {
  const FormatInfo format = check_format("embedding", format_id);
  const ScalarType index_dtype = dtype_in(indices);
  TORCH_Q4_CHECK(index_dtype == ScalarType::Long || index_dtype == ScalarType::Int,
                 "embedding: indices must be int64 or int32, got ", dtype_name(index_dtype));
  check_blocks("embedding", blocks, format, /*matrix=*/true);
  check_float("embedding", "dtype", dtype);
  check_same_device("embedding", "blocks", blocks, "indices", indices);
  return format;
}

}  // namespace torch_q4
