// AdamW, moving average and low-precision copy in one pass over flat buffers.
#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

template <class T, class G, class S>
void adamw_typed(const AdamW& a, int64_t begin, int64_t end) {
  const Hyperparameters& h = a.hyperparameters;
  const Factors& f = a.factors;
  T* __restrict param = static_cast<T*>(a.param);
  G* __restrict grad = static_cast<G*>(a.grad);
  T* __restrict exp_avg = static_cast<T*>(a.exp_avg);
  T* __restrict exp_avg_sq = static_cast<T*>(a.exp_avg_sq);
  T* __restrict ema = static_cast<T*>(a.ema);
  S* __restrict shadow = static_cast<S*>(a.shadow);
  const T factor = T(f.grad);
  const T beta1 = T(h.beta1);
  const T beta2 = T(h.beta2);
  const T eps = T(h.eps);
  const T rest1 = T(1 - h.beta1);
  const T rest2 = T(1 - h.beta2);
  const T decay = T(f.decay);
  const T step_size = T(f.step_size);
  const T inverse_sqrt_bias2 = T(f.inverse_sqrt_bias2);
  const T ema_weight = T(f.ema_weight);
  const auto update = [=](int64_t i, auto with_ema, auto with_shadow, auto zero) {
    const T g = factor * T(load(grad[i]));
    const T m = beta1 * exp_avg[i] + rest1 * g;
    const T v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    const T p = decay * param[i] - step_size * m / (std::sqrt(v) * inverse_sqrt_bias2 + eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = p;
    if constexpr (decltype(with_ema)::value) ema[i] += ema_weight * (p - ema[i]);
    if constexpr (decltype(with_shadow)::value) store(shadow[i], float(p));
    if constexpr (decltype(zero)::value) store(grad[i], Wide<G>(0));
  };
  const auto loop = [&](auto with_ema, auto with_shadow, auto zero) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) update(i, with_ema, with_shadow, zero);
  };
  const auto choose_zero = [&](auto with_ema, auto with_shadow) {
    a.zero_grad ? loop(with_ema, with_shadow, std::true_type{}) : loop(with_ema, with_shadow, std::false_type{});
  };
  const auto choose_shadow = [&](auto with_ema) {
    shadow ? choose_zero(with_ema, std::true_type{}) : choose_zero(with_ema, std::false_type{});
  };
  ema ? choose_shadow(std::true_type{}) : choose_shadow(std::false_type{});
}

template <class T, class G>
void adamw_shadowed(const AdamW& a, int64_t begin, int64_t end) {
  a.shadow_dtype == Dtype::float16 ? adamw_typed<T, G, Float16>(a, begin, end)
                                   : adamw_typed<T, G, BFloat16>(a, begin, end);
}

template <class T>
void adamw_wide(const AdamW& a, int64_t begin, int64_t end) {
  switch (a.grad_dtype) {
    case Dtype::bfloat16: return adamw_shadowed<T, BFloat16>(a, begin, end);
    case Dtype::float16: return adamw_shadowed<T, Float16>(a, begin, end);
    default: return adamw_shadowed<T, T>(a, begin, end);
  }
}

}  // namespace

double sum_of_squares(const void* grad,  // [n]
                      Dtype dtype,
                      int64_t begin,
                      int64_t end) {
  return dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    const T* __restrict g = static_cast<const T*>(grad);
    return sum<Wide<T>>(begin, end, [=](int64_t i) { return load(g[i]) * load(g[i]); });
  });
}

void adamw(const AdamW& a, int64_t begin, int64_t end) {
  if (a.factors.moves) {
    a.dtype == Dtype::float64 ? adamw_wide<double>(a, begin, end) : adamw_wide<float>(a, begin, end);
  } else if (a.zero_grad) {
    const int64_t bytes = element_bytes(a.grad_dtype);
    std::memset(static_cast<char*>(a.grad) + begin * bytes, 0, (end - begin) * bytes);
  }
}

}  // namespace fastdmd::FASTDMD_ISA
