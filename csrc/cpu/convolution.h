// What the bindings of both convolutions share: what they take, and what they give.
#pragma once

#include "bindings.h"

namespace fastdmd {

struct Convolution {
  const char* name;
  int64_t side;         // of the weight
  bool takes_bfloat16;  // beside float32
};

// Raises unless these are what the kernels take; y is the output, or its gradient.
inline void check(const Convolution& op,
                  const Tensor& x,       // [B, C_in, H, W]
                  const Tensor& weight,  // [C_out, C_in, side, side]
                  const Tensor& y,       // [B, C_out, H, W]
                  const std::optional<Tensor>& bias = std::nullopt /* [C_out] */) {
  const ScalarType dtype = weight.scalar_type();
  const bool is_taken = dtype == ScalarType::Float || (op.takes_bfloat16 && dtype == ScalarType::BFloat16);
  const auto fits = [&](const Tensor& images) {
    if (images.dim() != 4) return false;
    const int64_t C = images.size(1), H = images.size(2), W = images.size(3);
    const auto strides = [&](int64_t dim, int64_t stride) {
      return images.size(dim) == 1 || images.stride(dim) == stride;
    };
    return images.scalar_type() == dtype && C > 0 && C % Conv3x3::CHANNEL_STEP == 0 && strides(0, H * W * C) &&
           strides(1, 1) && strides(2, W * C) && strides(3, C);
  };
  STD_TORCH_CHECK(is_taken && fits(x) && fits(y),
                  "fastdmd.",
                  op.name,
                  ": expected images of the weight's dtype, float32",
                  op.takes_bfloat16 ? " or bfloat16" : "",
                  ", channels_last, of a multiple of 16 channels");
  bool is_one = weight.dim() == 4 && weight.size(0) == y.size(1) && weight.size(1) == x.size(1) &&
                weight.size(2) == op.side && weight.size(3) == op.side;
  for (const int64_t dim : {0, 2, 3}) is_one = is_one && x.size(dim) == y.size(dim);
  STD_TORCH_CHECK(is_one,
                  "fastdmd.",
                  op.name,
                  ": expected a weight of shape [C_out, C_in, ",
                  op.side,
                  ", ",
                  op.side,
                  "] and images of C_in and C_out channels, alike but for these");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == dtype && bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                            bias->is_contiguous()),
                  "fastdmd.",
                  op.name,
                  ": expected a dense bias of the weight's dtype, a number for each of its output channels");
}

// Uninitialised, of so many channels.
inline Tensor output(const Tensor& x /* [B, C_in, H, W] */, int64_t channels) {
  return torch::stable::empty({x.size(0), channels, x.size(2), x.size(3)},
                              x.scalar_type(),
                              std::nullopt,
                              std::nullopt,
                              std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// Uninitialised, of x, weight and bias; what is not wanted has no elements.
inline std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& x,
                                                    const Tensor& weight,
                                                    bool of_input,
                                                    bool of_parameters) {
  const auto wanted = [](bool is, const Tensor& like) {
    return is ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {int64_t(0)});
  };
  return {
      wanted(of_input, x),
      wanted(of_parameters, weight),
      torch::stable::new_empty(weight, {of_parameters ? weight.size(0) : int64_t(0)}),
  };
}

}  // namespace fastdmd
