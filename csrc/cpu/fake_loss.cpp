// The weighted denoising loss with its gradient, and the scaling that is a loss's backward.
#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

template <class T, class G>
double fake_loss_typed(const FakeLoss& a, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const T* __restrict output = static_cast<const T*>(a.output);
  const T* __restrict images = static_cast<const T*>(a.images);
  const T* __restrict x_t = static_cast<const T*>(a.x_t);
  G* __restrict grad = static_cast<G*>(a.grad);
  const W weight = W(a.weight);
  const W factor = W(a.factor);
  const W c_skip = W(a.c_skip);
  const W inverse_c_out = W(a.inverse_c_out);
  const auto emit = [=](int64_t i, W error) {
    const W weighted = weight * error;
    store(grad[i], factor * weighted);
    return weighted * error;
  };
  if (!x_t) return sum<W>(begin, end, [=](int64_t i) { return emit(i, load(output[i]) - load(images[i])); });
  return sum<W>(begin, end, [=](int64_t i) {
    return emit(i, load(output[i]) - (load(images[i]) - c_skip * load(x_t[i])) * inverse_c_out);
  });
}

}  // namespace

double fake_loss(const FakeLoss& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::float16) return fake_loss_typed<Float16, float>(a, begin, end);
  return dispatch(a.dtype, [&](auto type) { return fake_loss_typed<decltype(type), decltype(type)>(a, begin, end); });
}

void scale_gradient(const void* grad,  // [numel]
                    Dtype dtype,
                    void* out,  // [numel]
                    Dtype out_dtype,
                    double factor,
                    int64_t begin,
                    int64_t end) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    dispatch(out_dtype, [&](auto out_type) {
      using Out = decltype(out_type);
      const T* __restrict from = static_cast<const T*>(grad);
      Out* __restrict to = static_cast<Out*>(out);
      const Wide<T> f = Wide<T>(factor);
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(to[i], Wide<Out>(load(from[i]) * f));
    });
  });
}

}  // namespace fastdmd::FASTDMD_ISA
