// Bindings of conv3x3: which threads take which tiles.
#include <algorithm>
#include <cstdlib>

#include "bindings.h"

namespace fastdmd {
namespace {

using torch::stable::parallel_for;

void check(const Tensor& images, const char* name, ScalarType dtype) {
  const int64_t C = images.size(1), H = images.size(2), W = images.size(3);
  const auto strides = [&](int64_t dim, int64_t stride) {
    return images.size(dim) == 1 || images.stride(dim) == stride;
  };
  const bool channels_last = strides(0, H * W * C) && strides(1, 1) && strides(2, W * C) && strides(3, C);
  STD_TORCH_CHECK(images.scalar_type() == dtype && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) &&
                      C % Conv3x3::CHANNEL_STEP == 0 && channels_last,
                  "fastdmd.conv3x3: expected ",
                  name,
                  " of the weight's dtype, float32 or bfloat16, channels_last, of a multiple of 16 channels");
}

// The side of the tiles that take less time: each weight is multiplied by 36 inputs for 4x4 outputs, or by 16 for 2x2.
// A multiplication by 4x4 takes 1.1 times as long, and 36 matrices of a weight take longer to make and to read than 16,
// the more so the less the cache holds of them (AVX-512, one thread). Sums of few tiles, for the gradient of the
// weight, err more by 4x4.
int tile(const Conv3x3& a, bool sums) {
  const auto tiles = [&](int64_t side) {
    return a.num_images * ceil_divide(a.height, side) * ceil_divide(a.width, side);
  };
  const int64_t more = (sums ? 1800 : 200) + a.in_channels * a.out_channels / 450;
  return 40 * tiles(4) + more < 16 * tiles(2) ? 4 : 2;
}

enum class Of { output, input_gradient, weight_gradient };

// y is the output, of C_out channels, or its gradient; as x, if y is that of the input.
Conv3x3 arguments(const Tensor& x, const Tensor& weight, const Tensor& y, Of wanted) {
  const bool transposed = wanted == Of::input_gradient;  // the roles of the weight's channels are swapped
  Conv3x3 a{};
  a.dtype = dtype_of(weight);
  a.x = x.const_data_ptr();
  a.y = y.data_ptr();
  a.weight = weight.data_ptr();
  a.num_images = x.size(0);
  a.height = x.size(2);
  a.width = x.size(3);
  a.in_channels = x.size(1);
  a.out_channels = y.size(1);
  a.weight_out = weight.stride(transposed ? 1 : 0);
  a.weight_in = weight.stride(transposed ? 0 : 1);
  a.weight_y = weight.stride(2);
  a.weight_x = weight.stride(3);
  a.flipped = transposed;
  a.tile = tile(a, wanted == Of::weight_gradient);
  return a;
}

// Memory of the calling thread for transformed weights, kept for its next call: from among tensors of all sizes, which
// stay in the holes that it leaves, it would take a tenth of a network's memory.
float* transformed_weights(int64_t size) {
  struct Kept {
    float* data = nullptr;  // [size]
    int64_t size = 0;
    ~Kept() { std::free(data); }
  };
  thread_local Kept kept;
  if (kept.size < size) {
    std::free(kept.data);
    kept.size = 0;
    kept.data = static_cast<float*>(std::aligned_alloc(64, size_t(size + 15) / 16 * 64));
    STD_TORCH_CHECK(kept.data, "fastdmd.conv3x3: out of memory for ", size, " transformed weights");
    kept.size = size;
  }
  return kept.data;
}

void run(Conv3x3 a) {
  a.transformed = transformed_weights(a.transformed_size());
  parallel_for(0, a.out_channels / Conv3x3::CHANNEL_STEP, 1, [&](int64_t first, int64_t last) {
    kernels().conv3x3_weights(a, first, last);
  });
  parallel_for(
      0, kernels().conv3x3_steps(a), 1, [&](int64_t first, int64_t last) { kernels().conv3x3(a, first, last); });
}

Tensor conv3x3(Tensor x,       // [B, C_in, H, W]
               Tensor weight,  // [C_out, C_in, 3, 3]
               std::optional<Tensor> bias /* [C_out] */) {
  check(x, "x", weight.scalar_type());
  Tensor y = torch::stable::empty({x.size(0), weight.size(0), x.size(2), x.size(3)},
                                  x.scalar_type(),
                                  std::nullopt,
                                  std::nullopt,
                                  std::nullopt,
                                  torch::headeronly::MemoryFormat::ChannelsLast);
  check(y, "y", weight.scalar_type());
  STD_TORCH_CHECK(!bias || bias->scalar_type() == weight.scalar_type(),
                  "fastdmd.conv3x3: expected a bias of the weight's dtype");
  Conv3x3 a = arguments(x, weight, y, Of::output);
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  run(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv3x3_backward(Tensor grad_y,  // [B, C_out, H, W]
                                                    Tensor x,       // [B, C_in, H, W]
                                                    Tensor weight,  // [C_out, C_in, 3, 3]
                                                    bool of_input,
                                                    bool of_parameters) {
  check(grad_y, "grad_y", weight.scalar_type());
  check(x, "x", weight.scalar_type());
  const auto wanted = [&](bool is, const Tensor& like) {
    return is ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {int64_t(0)});
  };
  Tensor grad_x = wanted(of_input, x);
  Tensor grad_weight = wanted(of_parameters, weight);
  Tensor grad_bias = torch::stable::new_empty(weight, {of_parameters ? weight.size(0) : int64_t(0)});
  if (of_input) run(arguments(grad_y, weight, grad_x, Of::input_gradient));
  if (!of_parameters) return {grad_x, grad_weight, grad_bias};
  Conv3x3 a = arguments(x, grad_weight, grad_y, Of::weight_gradient);
  const int64_t steps = kernels().conv3x3_steps(a);
  if (steps == 0)  // no tile, so nobody would write them
    return {grad_x, torch::stable::fill_(grad_weight, 0), torch::stable::fill_(grad_bias, 0)};

  const int64_t size = a.transformed_size();
  const int64_t parts = std::max(int64_t(1), std::min(steps, int64_t(torch::stable::get_num_threads())));
  std::vector<double> bias_sums(parts * a.out_channels);
  float* data = transformed_weights(parts * size);
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      Conv3x3 own = a;
      own.transformed = data + part * size;
      kernels().conv3x3_weight_sums(
          own, bias_sums.data() + part * a.out_channels, part * steps / parts, (part + 1) * steps / parts);
    }
  });
  a.transformed = data;
  parallel_for(0, a.out_channels / Conv3x3::CHANNEL_STEP, 1, [&](int64_t first, int64_t last) {
    kernels().conv3x3_weight_gradient(a, parts, first, last);
  });
  for (int64_t o = 0; o < a.out_channels; ++o) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += bias_sums[part * a.out_channels + o];
    write(grad_bias.mutable_data_ptr(), a.dtype, o, total);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
}

}  // namespace fastdmd
