// Clipping to a global norm, AdamW, moving average and low-precision copy on flat buffers, in two launches: the norm,
// and the update.
#include "../adamw_ema.h"
#include "grid_sum.cuh"

namespace fastdmd {
namespace {

struct AdamW {
  void* param;       // [n]
  void* grad;        // [n]
  void* exp_avg;     // [n]
  void* exp_avg_sq;  // [n]
  void* ema;         // [n], or null
  void* shadow;      // [n], or null
  int64_t* step;     // [1]
  void* grad_norm;   // [1], of the dtype of param
  void* partials;    // [blocks], of the dtype of param
  Factors* factors;  // [1], written by the first kernel for the second
  Dtype dtype, grad_dtype, shadow_dtype;
  Values learning_rate;  // [1]
  int64_t n;
  Hyperparameters hyperparameters;
  bool zero_grad;
  unsigned ticket;
};

// The last block turns the sum of squares into the norm and the factors.
template <class W>
__device__ void finish_norm(const AdamW& a, W sum) {
  double total;
  if (!GridSum<W>{static_cast<W*>(a.partials), a.ticket}(sum, total) || threadIdx.x != 0) return;
  const W rounded = W(sqrt(total));
  *static_cast<W*>(a.grad_norm) = rounded;
  const double learning_rate = a.learning_rate.at<double>(0);
  const bool moves = isfinite(rounded);
  const double t = double(*a.step + 1);
  if (moves) ++*a.step;
  *a.factors = factors_of(a.hyperparameters, double(rounded), learning_rate, t, moves);
}

// Elements of a thread at a time.
constexpr int NORM_WIDTH = 16;
constexpr int UPDATE_WIDTH = 8;

// A thread sums the squares of V elements in a row, and then of every gridDim * blockDim-th such vector.
template <class G>
__global__ void __launch_bounds__(THREADS) grad_norm_vectors(AdamW a) {
  constexpr int V = NORM_WIDTH;
  const G* grad = static_cast<const G*>(a.grad);
  float sums[V] = {};
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.n; i += step) {
    float g[V];
    load(grad + i, g, a.n - i);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] += g[k] * g[k];
  }
  float sum = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) sum += sums[k];
  finish_norm(a, sum);
}

// A thread sums the squares of every gridDim * blockDim-th element.
template <class W>
__global__ void __launch_bounds__(THREADS) grad_norm_any(AdamW a) {
  W sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n; i += step) {
    const W g = read<W>(a.grad, a.grad_dtype, i);
    sum += g * g;
  }
  finish_norm(a, sum);
}

// The factors in the precision of the update.
template <class W>
struct Rule {
  W grad, beta1, beta2, eps, decay, step_size, inverse_sqrt_bias2, ema_weight, one_minus_beta1, one_minus_beta2;

  __device__ __forceinline__ Rule(const Hyperparameters& h, const Factors& f)
      : grad(W(f.grad)),
        beta1(W(h.beta1)),
        beta2(W(h.beta2)),
        eps(W(h.eps)),
        decay(W(f.decay)),
        step_size(W(f.step_size)),
        inverse_sqrt_bias2(W(f.inverse_sqrt_bias2)),
        ema_weight(W(f.ema_weight)),
        one_minus_beta1(W(1 - h.beta1)),
        one_minus_beta2(W(1 - h.beta2)) {}

  __device__ __forceinline__ void operator()(W& param, W gradient, W& exp_avg, W& exp_avg_sq) const {
    const W g = grad * gradient;
    exp_avg = beta1 * exp_avg + one_minus_beta1 * g;
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (g * g);
    param = decay * param - step_size * exp_avg / (sqrt(exp_avg_sq) * inverse_sqrt_bias2 + eps);
  }
};

// A thread updates V elements in a row of every buffer, and then every gridDim * blockDim-th such vector.
template <class G>
__global__ void __launch_bounds__(THREADS) adamw_ema_vectors(AdamW a) {
  constexpr int V = UPDATE_WIDTH;
  const Factors factors = *a.factors;
  if (!factors.moves && !a.zero_grad) return;
  const Rule<float> rule(a.hyperparameters, factors);
  float* param = static_cast<float*>(a.param);
  G* grad = static_cast<G*>(a.grad);
  float* exp_avg = static_cast<float*>(a.exp_avg);
  float* exp_avg_sq = static_cast<float*>(a.exp_avg_sq);
  float* ema = static_cast<float*>(a.ema);
  const float zero[V] = {};
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.n; i += step) {
    const int64_t count = a.n - i;
    if (factors.moves) {
      float p[V], g[V], m[V], v[V], average[V];
      load<false>(param + i, p, count);
      load<false>(grad + i, g, count);
      load<false>(exp_avg + i, m, count);
      load<false>(exp_avg_sq + i, v, count);
      if (ema) load<false>(ema + i, average, count);
#pragma unroll
      for (int k = 0; k < V; ++k) rule(p[k], g[k], m[k], v[k]);
      store(param + i, p, count);
      store(exp_avg + i, m, count);
      store(exp_avg_sq + i, v, count);
      if (ema) {
#pragma unroll
        for (int k = 0; k < V; ++k) average[k] += rule.ema_weight * (p[k] - average[k]);
        store(ema + i, average, count);
      }
      if (a.shadow && a.shadow_dtype == Dtype::float16) store(static_cast<__half*>(a.shadow) + i, p, count);
      if (a.shadow && a.shadow_dtype == Dtype::bfloat16) store(static_cast<__nv_bfloat16*>(a.shadow) + i, p, count);
    }
    if (a.zero_grad) store(grad + i, zero, count);
  }
}

// A thread updates every gridDim * blockDim-th element of every buffer.
template <class W>
__global__ void __launch_bounds__(THREADS, 4) adamw_ema_any(AdamW a) {
  const Factors factors = *a.factors;
  const Rule<W> rule(a.hyperparameters, factors);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n; i += step) {
    if (factors.moves) {
      W p = read<W>(a.param, a.dtype, i);
      W m = read<W>(a.exp_avg, a.dtype, i);
      W v = read<W>(a.exp_avg_sq, a.dtype, i);
      rule(p, read<W>(a.grad, a.grad_dtype, i), m, v);
      write(a.param, a.dtype, i, p);
      write(a.exp_avg, a.dtype, i, m);
      write(a.exp_avg_sq, a.dtype, i, v);
      if (a.ema) {
        const W average = read<W>(a.ema, a.dtype, i);
        write(a.ema, a.dtype, i, average + rule.ema_weight * (p - average));
      }
      if (a.shadow) write(a.shadow, a.shadow_dtype, i, p);
    }
    if (a.zero_grad) write(a.grad, a.grad_dtype, i, W(0));
  }
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
  const Dtype dtype = dtype_of(param);
  const Dtype grad_dtype = dtype_of(grad);
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64,
                  "fastdmd.adamw_ema_: expected param of dtype float32 or float64, got dtype number ",
                  int(param.scalar_type()));
  STD_TORCH_CHECK(grad_dtype == dtype || grad_dtype == Dtype::bfloat16 || grad_dtype == Dtype::float16,
                  "fastdmd.adamw_ema_: expected grad of the dtype of param, bfloat16 or float16, got dtype number ",
                  int(grad.scalar_type()));
  Tensor grad_norm = torch::stable::new_empty(param, {});
  constexpr int64_t num_factors = sizeof(Factors) / sizeof(double);
  const Tensor factors = torch::stable::new_empty(param, {num_factors}, ScalarType::Double);
  const Device device(param);
  AdamW a{
      .param = param.mutable_data_ptr(),
      .grad = grad.mutable_data_ptr(),
      .exp_avg = exp_avg.mutable_data_ptr(),
      .exp_avg_sq = exp_avg_sq.mutable_data_ptr(),
      .ema = mutable_data_of(ema),
      .shadow = mutable_data_of(shadow),
      .step = static_cast<int64_t*>(step.mutable_data_ptr()),
      .grad_norm = grad_norm.mutable_data_ptr(),
      .factors = static_cast<Factors*>(factors.mutable_data_ptr()),
      .dtype = dtype,
      .grad_dtype = grad_dtype,
      .shadow_dtype = shadow ? dtype_of(*shadow) : Dtype::bfloat16,
      .learning_rate = values_of(learning_rate),
      .n = param.numel(),
      .hyperparameters = {beta1, beta2, eps, weight_decay, max_grad_norm, ema_decay, ema_warmup},
      .zero_grad = zero_grad,
      .ticket = next_ticket(device.stream()),
  };
  // One block of the first kernel at least: without a single weight, the step still counts.
  const auto launch =
      [&](auto norm, int64_t norm_resident, int norm_width, auto update, int64_t update_resident, int update_width) {
        const int64_t norm_blocks = std::clamp(ceil_divide(a.n, THREADS * norm_width), int64_t(1), norm_resident);
        const int64_t update_blocks = std::min(ceil_divide(a.n, THREADS * update_width), update_resident);
        const Tensor partials = torch::stable::new_empty(param, {norm_blocks});
        a.partials = partials.mutable_data_ptr();
        device.launch(norm, norm_blocks, THREADS, a);
        if (update_blocks > 0) device.launch(update, update_blocks, THREADS, a);
      };
  const auto launch_vectors = [&](auto type) {
    using G = decltype(type);
    static const int64_t norm_resident = device.resident_blocks(grad_norm_vectors<G>, THREADS);
    static const int64_t update_resident = device.resident_blocks(adamw_ema_vectors<G>, THREADS);
    launch(grad_norm_vectors<G>, norm_resident, NORM_WIDTH, adamw_ema_vectors<G>, update_resident, UPDATE_WIDTH);
  };
  if (dtype == Dtype::float64 || !aligned({a.param, a.grad, a.exp_avg, a.exp_avg_sq, a.ema, a.shadow}))
    dispatch_wide(dtype, [&](auto type) {
      using W = decltype(type);
      static const int64_t norm_resident = device.resident_blocks(grad_norm_any<W>, THREADS);
      static const int64_t update_resident = device.resident_blocks(adamw_ema_any<W>, THREADS);
      launch(grad_norm_any<W>, norm_resident, 1, adamw_ema_any<W>, update_resident, 1);
    });
  else if (grad_dtype == Dtype::bfloat16)
    launch_vectors(__nv_bfloat16{});
  else if (grad_dtype == Dtype::float16)
    launch_vectors(__half{});
  else
    launch_vectors(float{});
  return grad_norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) { m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_)); }

}  // namespace fastdmd
