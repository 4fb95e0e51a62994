// What the ops for CPU and CUDA alike say of tensors, in torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "dtype.h"

namespace fastdmd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fastdmd: expected float32, float64, bfloat16 or float16, got dtype number ", int(type));
  return Dtype::float32;
}
inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// In which an op computes, and keeps losses and moments.
inline ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of a loss in `tensor`: the gradient may leave the range of float16.
inline ScalarType gradient_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half ? ScalarType::Float : tensor.scalar_type();
}

// Uninitialised, of the strides of `like`, whatever its dtype.
inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(like),
      torch::stable::detail::from(std::optional<ScalarType>(dtype)),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
  };
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// How many channels of dense images alternate in memory: 1 where all of a channel lies in a row.
inline int64_t alternating_channels(const Tensor& images) { return images.is_contiguous() ? 1 : images.size(1); }

inline void* mutable_data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastdmd
