// The distribution-matching gradient: grad = (p_real - p_fake) / w, non-finite entries 0.
#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {

double dm_weight(const DMLoss& a, int64_t begin, int64_t end) {
  return dispatch(a.dtype, [&](auto type) {
    using T = decltype(type);
    using W = Wide<T>;
    const T* __restrict x_gen = static_cast<const T*>(a.x_gen);
    const T* __restrict real = static_cast<const T*>(a.real);
    const T* __restrict x_t = static_cast<const T*>(a.x_t);
    if (!x_t) return sum<W>(begin, end, [=](int64_t i) { return std::abs(load(x_gen[i]) - load(real[i])); });
    const W c_skip = W(a.c_skip);
    const W c_out = W(a.c_out);
    return sum<W>(begin, end, [=](int64_t i) {
      return std::abs(load(x_gen[i]) - (c_skip * load(x_t[i]) + c_out * load(real[i])));
    });
  });
}

namespace {

template <class T, class G>
double dm_gradient_typed(const DMLoss& a, int64_t begin, int64_t end, double w) {
  using W = Wide<T>;
  const T* __restrict x_gen = static_cast<const T*>(a.x_gen);
  const T* __restrict real = static_cast<const T*>(a.real);
  const T* __restrict fake = static_cast<const T*>(a.fake);
  G* __restrict grad = static_cast<G*>(a.grad);
  const W divisor = W(w);
  const W c_out = W(a.c_out);
  const W factor = W(a.factor);
  const auto emit = [=](int64_t i, W difference) {
    const W g = finite_or_zero(difference / divisor);
    store(grad[i], factor * g);
    return g * g;
  };
  if (a.x_t) return sum<W>(begin, end, [=](int64_t i) { return emit(i, c_out * (load(fake[i]) - load(real[i]))); });
  return sum<W>(begin, end, [=](int64_t i) {
    const W x = load(x_gen[i]);
    return emit(i, (x - load(real[i])) - (x - load(fake[i])));
  });
}

}  // namespace

double dm_gradient(const DMLoss& a, int64_t begin, int64_t end, double w) {
  if (a.dtype == Dtype::float16 && a.grad_dtype == Dtype::float32)
    return dm_gradient_typed<Float16, float>(a, begin, end, w);
  return dispatch(a.dtype,
                  [&](auto type) { return dm_gradient_typed<decltype(type), decltype(type)>(a, begin, end, w); });
}

}  // namespace fastdmd::FASTDMD_ISA
