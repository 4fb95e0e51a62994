// Bindings of group_norm_silu and adamw_ema_.
#include <cmath>

#include "bindings.h"

namespace fastdmd {
namespace {

using torch::stable::parallel_for;

// Samples times ranges of groups, so that every thread has some; at least 32 channels each, two lines of the cache.
template <class Body>
void for_groups(const Tensor& x, int64_t num_groups, Body body) {
  const int64_t num_samples = x.size(0);
  const int64_t group_size = x.size(1) / num_groups;
  if (x.numel() == 0) return;
  int64_t slices = 1;
  while (num_samples * slices < torch::stable::get_num_threads() && num_groups % (2 * slices) == 0 &&
         num_groups / (2 * slices) * group_size >= 32)
    slices *= 2;
  const int64_t task = x.numel() / (num_samples * slices);
  const int64_t per_slice = num_groups / slices;
  parallel_for(0, num_samples * slices, ceil_divide(GRAIN / 4, task), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i / slices, i % slices * per_slice, (i % slices + 1) * per_slice);
  });
}

// In float64, as the kernels read them.
struct Tables {
  std::vector<double> weight, bias;  // [C]
  std::vector<double> scale, shift;  // [B, C], or empty
  std::vector<double> offset;        // [B, C], or [1, C], or empty
};

// The arguments of one sample.
GroupNormSiLU of_sample(GroupNormSiLU a, int64_t sample) {
  const int64_t offset = sample * a.num_channels * a.num_pixels * element_bytes(a.dtype);
  a.x = static_cast<const char*>(a.x) + offset;
  if (a.grad_y) a.grad_y = static_cast<const char*>(a.grad_y) + offset;
  a.out = static_cast<char*>(a.out) + offset;
  a.mean += sample * a.num_groups;
  a.rstd += sample * a.num_groups;
  if (a.scale) a.scale += sample * a.num_channels;
  if (a.shift) a.shift += sample * a.num_channels;
  if (a.x_offset) a.x_offset += sample * a.x_offset_stride;
  if (a.sum_grad) a.sum_grad += sample * a.num_channels;
  if (a.sum_grad_h) a.sum_grad_h += sample * a.num_channels;
  if (a.sum_grad_x) a.sum_grad_x += sample * a.num_channels;
  return a;
}

// The arguments of all samples, but for what forward and backward set apart.
GroupNormSiLU arguments(const Tensor& x,    // [B, C, H, W]
                        const Tensor& out,  // [B, C, H, W]: y, or grad_x
                        const Tables& tables,
                        std::vector<double>& mean,  // [B, G]
                        std::vector<double>& rstd,  // [B, G]
                        int64_t num_groups,
                        bool silu) {
  GroupNormSiLU a{};
  a.dtype = dtype_of(x);
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.mean = mean.data();
  a.rstd = rstd.data();
  a.weight = tables.weight.data();
  a.bias = tables.bias.data();
  a.scale = pointer(tables.scale);
  a.shift = pointer(tables.shift);
  a.x_offset = pointer(tables.offset);
  a.x_offset_stride = int64_t(tables.offset.size()) > x.size(1) ? x.size(1) : 0;
  a.num_channels = x.size(1);
  a.num_groups = num_groups;
  a.num_pixels = x.size(2) * x.size(3);
  a.silu = silu;
  const bool contiguous = x.is_contiguous();
  a.channel_stride = contiguous ? a.num_pixels : 1;
  a.pixel_stride = contiguous ? 1 : a.num_channels;
  return a;
}

Tensor filled(const Tensor& like,
              const std::vector<int64_t>& shape,
              ScalarType dtype,
              const std::vector<double>& values) {
  Tensor result = torch::stable::new_empty(like, shape, dtype);
  dispatch(dtype_of(dtype), [&](auto type) {
    using T = decltype(type);
    auto* data = static_cast<T*>(result.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) store(data[i], Wide<T>(values[i]));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x,                      // [B, C, H, W]
                                                   Tensor weight,                 // [C]
                                                   Tensor bias,                   // [C]
                                                   std::optional<Tensor> scale,   // [B, C]
                                                   std::optional<Tensor> shift,   // [B, C]
                                                   std::optional<Tensor> offset,  // [B, C] or [1, C]
                                                   int64_t num_groups,
                                                   double eps,
                                                   bool silu) {
  Tensor y = torch::stable::empty_like(x);
  const Tables tables{values(weight), values(bias), values(scale), values(shift), values(offset)};
  std::vector<double> mean(x.size(0) * num_groups);
  std::vector<double> rstd(x.size(0) * num_groups);
  GroupNormSiLU a = arguments(x, y, tables, mean, rstd, num_groups, silu);
  a.eps = eps;
  for_groups(x, num_groups, [&](int64_t sample, int64_t begin, int64_t end) {
    kernels().group_norm_silu(of_sample(a, sample), begin, end);
  });
  return {
      y,
      filled(x, {x.size(0), num_groups}, wide_dtype(x), mean),
      filled(x, {x.size(0), num_groups}, wide_dtype(x), rstd),
  };
}

// Of x, weight, bias, scale, shift and offset.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients group_norm_silu_backward(Tensor grad_y,                 // [B, C, H, W]
                                   Tensor x,                      // [B, C, H, W]
                                   Tensor mean,                   // [B, G]
                                   Tensor rstd,                   // [B, G]
                                   Tensor weight,                 // [C]
                                   Tensor bias,                   // [C]
                                   std::optional<Tensor> scale,   // [B, C]
                                   std::optional<Tensor> shift,   // [B, C]
                                   std::optional<Tensor> offset,  // [B, C] or [1, C]
                                   int64_t num_groups,
                                   bool silu) {
  Tensor grad_x = torch::stable::empty_like(x);
  const int64_t B = x.size(0), C = x.size(1);
  std::vector<double> means = values(mean);
  std::vector<double> rstds = values(rstd);
  const Tables tables{values(weight), values(bias), values(scale), values(shift), values(offset)};
  std::vector<double> sum_grad(B * C);
  std::vector<double> sum_grad_h(B * C);
  std::vector<double> sum_grad_x(offset ? B * C : 0);
  GroupNormSiLU a = arguments(x, grad_x, tables, means, rstds, num_groups, silu);
  a.grad_y = grad_y.const_data_ptr();
  a.sum_grad = sum_grad.data();
  a.sum_grad_h = sum_grad_h.data();
  a.sum_grad_x = sum_grad_x.data();
  for_groups(x, num_groups, [&](int64_t sample, int64_t begin, int64_t end) {
    kernels().group_norm_silu_backward(of_sample(a, sample), begin, end);
  });

  std::vector<double> grad_weight(C);
  std::vector<double> grad_bias(C);
  std::vector<double> grad_scale(scale ? B * C : 0);
  std::vector<double> grad_offset(tables.offset.size());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c) {
      const int64_t i = b * C + c;
      const double gain = scale ? 1 + tables.scale[i] : 1;
      grad_weight[c] += gain * sum_grad_h[i];
      grad_bias[c] += gain * sum_grad[i];
      if (scale) grad_scale[i] = tables.weight[c] * sum_grad_h[i] + tables.bias[c] * sum_grad[i];
      if (offset) grad_offset[b * a.x_offset_stride + c] += sum_grad_x[i];
    }
  const std::vector<int64_t> table = scale ? std::vector<int64_t>{B, C} : std::vector<int64_t>{0};
  if (!scale) sum_grad.clear();
  return {
      grad_x,
      filled(x, {C}, weight.scalar_type(), grad_weight),
      filled(x, {C}, bias.scalar_type(), grad_bias),
      filled(x, table, scale ? scale->scalar_type() : wide_dtype(x), grad_scale),
      filled(x, table, shift ? shift->scalar_type() : wide_dtype(x), sum_grad),
      offset ? filled(x, {offset->size(0), C}, offset->scalar_type(), grad_offset)
             : torch::stable::new_empty(x, {int64_t(0)}, wide_dtype(x)),
  };
}

Tensor adamw_ema_(Tensor param,                  // [n]
                  Tensor grad,                   // [n]
                  Tensor exp_avg,                // [n]
                  Tensor exp_avg_sq,             // [n]
                  Tensor step,                   // [1]
                  Tensor learning_rate,          // []
                  std::optional<Tensor> ema,     // [n]
                  std::optional<Tensor> shadow,  // [n]
                  double beta1,
                  double beta2,
                  double eps,
                  double weight_decay,
                  double max_grad_norm,
                  double ema_decay,
                  double ema_warmup,
                  bool zero_grad) {
  const int64_t n = param.numel();
  const void* gradient = grad.const_data_ptr();
  std::vector<double> partial(ceil_divide(n, BLOCK));
  parallel_for(0, int64_t(partial.size()), GRAIN / BLOCK, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      partial[block] = kernels().sum_of_squares(
          gradient, dtype_of(grad), block * BLOCK, (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n);
  });
  Tensor grad_norm = scalar(param, param.scalar_type(), std::sqrt(total(partial)));
  const double norm = item(grad_norm);
  auto& count = *static_cast<int64_t*>(step.mutable_data_ptr());
  const bool moves = std::isfinite(norm);
  const Hyperparameters h{beta1, beta2, eps, weight_decay, max_grad_norm, ema_decay, ema_warmup};
  const AdamW a{
      .dtype = dtype_of(param),
      .grad_dtype = dtype_of(grad),
      .shadow_dtype = shadow ? dtype_of(*shadow) : Dtype::bfloat16,
      .param = param.mutable_data_ptr(),
      .grad = grad.mutable_data_ptr(),
      .exp_avg = exp_avg.mutable_data_ptr(),
      .exp_avg_sq = exp_avg_sq.mutable_data_ptr(),
      .ema = mutable_data_of(ema),
      .shadow = mutable_data_of(shadow),
      .hyperparameters = h,
      .factors = factors_of(h, norm, item(learning_rate), double(count + 1), moves),
      .zero_grad = zero_grad,
  };
  if (moves) ++count;
  parallel_for(0, n, GRAIN, [&](int64_t begin, int64_t end) { kernels().adamw(a, begin, end); });
  return grad_norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
}

}  // namespace fastdmd
