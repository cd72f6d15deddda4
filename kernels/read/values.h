// Floats in memory: activations, which are read, and results, which are stored.
#pragma once

#include "../arch/arch.h"
#include "../arguments.h"

namespace TORCH_Q4_NAMESPACE {

template <class T>
constexpr int kElementBytes = 2;
template <>
constexpr int kElementBytes<Float32> = 4;

template <class T>
constexpr bool kIsFloat32 = kElementBytes<T> == 4;

// 16 elements of x as words: eight of two elements, or 16 of one.
template <class T>
struct Activations {
  uint32_t w[4 * kElementBytes<T>];

  // From element `index` of those that begin at `first`, the same for a whole block of threads.
  TORCH_Q4_DEVICE void load(const uint8_t* first, uint32_t index) {
    const auto* from = reinterpret_cast<const Words4*>(first + index * kElementBytes<T>);
#pragma unroll
    for (int i = 0; i < kElementBytes<T>; ++i) {
      const Words4 words = from[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[4 * i + j] = words.w[j];
    }
  }
  TORCH_Q4_DEVICE float at(int index) const {
    if constexpr (kElementBytes<T> == 4) {
      return bits_to_float(w[index]);
    } else {
      const uint32_t pair = w[index / 2];
      return index % 2 == 0 ? low_of_pair<T>(pair) : high_of_pair<T>(pair);
    }
  }
};

// Where row m of x begins.
template <class T>
TORCH_Q4_DEVICE const uint8_t* row_of(const void* x, int64_t m, int64_t k) {
  return static_cast<const uint8_t*>(x) + m * k * kElementBytes<T>;
}

TORCH_Q4_DEVICE float load_value(const void* from, int64_t index, gpu::DType dtype) {
  if (dtype == gpu::kFloat32) return static_cast<const float*>(from)[index];
  const uint32_t bits = static_cast<const uint16_t*>(from)[index];
  return dtype == gpu::kFloat16 ? low_of_pair<Float16>(bits) : low_of_pair<BFloat16>(bits);
}

TORCH_Q4_DEVICE void store_value(void* to, int64_t index, float value, gpu::DType dtype) {
  if (dtype == gpu::kFloat32) {
    static_cast<float*>(to)[index] = value;
  } else {
    const uint32_t pair =
        dtype == gpu::kFloat16 ? round_pair<Float16>(value, 0) : round_pair<BFloat16>(value, 0);
    static_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(pair);
  }
}

// 16 values to out[index], a multiple of 16.
TORCH_Q4_DEVICE void store_segment(void* out, int64_t index, const float (&values)[16],
                                   gpu::DType dtype) {
  if (dtype == gpu::kFloat32) {
    auto* to = reinterpret_cast<Words4*>(static_cast<float*>(out) + index);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = {{float_to_bits(values[4 * i]), float_to_bits(values[4 * i + 1]),
                float_to_bits(values[4 * i + 2]), float_to_bits(values[4 * i + 3])}};
    }
    return;
  }
  auto* to = reinterpret_cast<Words4*>(static_cast<uint16_t*>(out) + index);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Words4 words;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float low = values[8 * i + 2 * j], high = values[8 * i + 2 * j + 1];
      words.w[j] =
          dtype == gpu::kFloat16 ? round_pair<Float16>(low, high) : round_pair<BFloat16>(low, high);
    }
    to[i] = words;
  }
}

}  // namespace TORCH_Q4_NAMESPACE
