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
    const W c_skip = W(a.c_skip), c_out = W(a.c_out);
    return sum<W>(begin, end, [=](int64_t i) {
      return std::abs(load(x_gen[i]) - (c_skip * load(x_t[i]) + c_out * load(real[i])));
    });
  });
}

double dm_gradient(const DMLoss& a, int64_t begin, int64_t end, double w) {
  return dispatch(a.dtype, [&](auto type) {
    using T = decltype(type);
    using W = Wide<T>;
    const T* __restrict x_gen = static_cast<const T*>(a.x_gen);
    const T* __restrict real = static_cast<const T*>(a.real);
    const T* __restrict fake = static_cast<const T*>(a.fake);
    T* __restrict grad = static_cast<T*>(a.grad);
    const W divisor = W(w), c_out = W(a.c_out);
    if (a.x_t)
      return sum<W>(begin, end, [=](int64_t i) {
        const W g = finite_or_zero(c_out * (load(fake[i]) - load(real[i])) / divisor);
        store(grad[i], g);
        return g * g;
      });
    return sum<W>(begin, end, [=](int64_t i) {
      const W x = load(x_gen[i]);
      const W g = finite_or_zero(((x - load(real[i])) - (x - load(fake[i]))) / divisor);
      store(grad[i], g);
      return g * g;
    });
  });
}

}  // namespace fastdmd::FASTDMD_ISA
