// Bindings of conv1x1: which threads take which pixels and channels.
#include "convolution.h"

namespace fastdmd {
namespace {

using torch::stable::parallel_for;

constexpr int64_t WORTH = 1 << 20;  // multiplications worth a thread: about 10 us of work

constexpr Convolution OP{.name = "conv1x1", .side = 1, .takes_bfloat16 = false};

// Raises unless the weight's rows follow each other.
void check_rows(const Tensor& weight /* [C_out, C_in, 1, 1] */) {
  STD_TORCH_CHECK(weight.stride(0) == weight.size(1) && weight.stride(1) == 1,
                  "fastdmd.conv1x1: expected a weight in rows of its input channels, one after the other");
}

template <class T>
T* floats(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Conv1x1 arguments(const Tensor& x, const Tensor& weight, bool transposed) {
  Conv1x1 a{};
  a.x = floats<const float>(x);
  a.weight = floats<const float>(weight);
  a.num_pixels = x.size(0) * x.size(2) * x.size(3);
  a.in_channels = weight.size(transposed ? 0 : 1);
  a.out_channels = weight.size(transposed ? 1 : 0);
  return a;
}

void run(const Conv1x1& a) {
  const int64_t work = a.STEP * a.in_channels * a.out_channels;
  parallel_for(0, ceil_divide(a.num_pixels, a.STEP), ceil_divide(WORTH, work), [&](int64_t begin, int64_t end) {
    kernels().conv1x1(a, begin, end);
  });
}

Tensor conv1x1(Tensor x,       // [B, C_in, H, W]
               Tensor weight,  // [C_out, C_in, 1, 1]
               std::optional<Tensor> bias /* [C_out] */) {
  Tensor y = output(x, weight.size(0));
  check(OP, x, weight, y, bias);
  check_rows(weight);
  Conv1x1 a = arguments(x, weight, false);
  const Tensor matrix = torch::stable::new_empty(weight, {a.in_channels, a.out_channels});
  a.matrix = floats<float>(matrix);
  a.bias = bias ? floats<const float>(*bias) : nullptr;
  a.y = floats<float>(y);
  kernels().conv1x1_weights(a);
  run(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_backward(Tensor grad_y,  // [B, C_out, H, W]
                                                    Tensor x,       // [B, C_in, H, W]
                                                    Tensor weight,  // [C_out, C_in, 1, 1]
                                                    bool of_input,
                                                    bool of_parameters) {
  check(OP, x, weight, grad_y);
  check_rows(weight);
  auto [grad_x, grad_weight, grad_bias] = gradients(x, weight, of_input, of_parameters);
  if (of_input) {
    Conv1x1 a = arguments(grad_y, weight, true);
    a.matrix = floats<float>(weight);
    a.y = floats<float>(grad_x);
    run(a);
  }
  if (!of_parameters) return {grad_x, grad_weight, grad_bias};
  Conv1x1 a = arguments(x, weight, false);
  if (a.num_pixels == 0) return {grad_x, torch::stable::fill_(grad_weight, 0), torch::stable::fill_(grad_bias, 0)};
  a.grad_y = floats<const float>(grad_y);
  a.grad_weight = floats<float>(grad_weight);
  a.grad_bias = floats<float>(grad_bias);
  const int64_t work = a.STEP * a.in_channels * a.num_pixels;
  parallel_for(0, a.out_channels / a.STEP, ceil_divide(WORTH, work), [&](int64_t begin, int64_t end) {
    kernels().conv1x1_parameters(a, begin, end);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CPU, m) {
  m.impl("conv1x1", TORCH_BOX(&conv1x1));
  m.impl("conv1x1_backward", TORCH_BOX(&conv1x1_backward));
}

}  // namespace fastdmd
