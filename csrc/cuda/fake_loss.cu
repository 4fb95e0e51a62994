// The denoising loss of the fake score and its gradient in one launch, and the scaling of a stored gradient.
#include "grid_sum.cuh"

namespace fastdmd {
namespace {

struct FakeLoss {
  const void* output;  // [B * sample_size]: D_fake, or F_fake if x_t is given
  const void* x_gen;   // [B * sample_size]
  const void* x_t;     // [B * sample_size], or null
  void* grad;          // [B * sample_size], the derivative of the loss in output
  void* loss;          // one wide value
  void* partials;      // [blocks], wide
  Dtype dtype, grad_dtype;
  Values sigma;  // [B]
  double sigma_data;
  int64_t numel, sample_size;
  unsigned ticket;
};

// Of one sample: error = output - (x_gen - c_skip * x_t) * inverse_c_out, or output - x_gen if there is no x_t.
template <class W>
struct Coefficients {
  W weight, c_skip, inverse_c_out;

  __device__ __forceinline__ Coefficients(const FakeLoss& a, int64_t sample) {
    const W sigma = a.sigma.at<W>(sample), sigma_data = W(a.sigma_data);
    weight = a.x_t ? W(1) : fastdmd::loss_weight(sigma, sigma_data);
    c_skip = a.x_t ? fastdmd::c_skip(sigma, sigma_data) : W(0);
    inverse_c_out = a.x_t ? W(1) / fastdmd::c_out(sigma, sigma_data) : W(1);
  }
};

template <class W>
__device__ void finish(const FakeLoss& a, W sum) {
  double total;
  if (GridSum<W>{static_cast<W*>(a.partials), a.ticket}(sum, total) && threadIdx.x == 0)
    *static_cast<W*>(a.loss) = W(total / double(a.numel));
}

template <class T, bool Raw>
__global__ void __launch_bounds__(THREADS, 4) fake_loss_vectors(FakeLoss a) {
  using G = std::conditional_t<std::is_same_v<T, __half>, float, T>;
  constexpr int V = 16 / sizeof(T);
  const T* output = static_cast<const T*>(a.output);
  const T* x_gen = static_cast<const T*>(a.x_gen);
  const T* x_t = static_cast<const T*>(a.x_t);
  G* grad = static_cast<G*>(a.grad);
  const float factor = float(2 / double(a.numel));
  float sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.numel; i += step) {
    const int64_t count = a.numel - i;
    float error[V], target[V], skipped[V];
    load(output + i, error, count);
    load(x_gen + i, target, count);
    if constexpr (Raw) load(x_t + i, skipped, count);
    const Samples samples = samples_of<V>(i, a.sample_size, count);
    const Coefficients<float> first(a, samples.first);
    const Coefficients<float> second = samples.second == samples.first ? first : Coefficients<float>(a, samples.second);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const bool is_first = k < samples.boundary;
      if constexpr (Raw)
        target[k] = (target[k] - (is_first ? first.c_skip : second.c_skip) * skipped[k]) *
                    (is_first ? first.inverse_c_out : second.inverse_c_out);
      error[k] -= target[k];
      const float weighted = Raw ? error[k] : (is_first ? first.weight : second.weight) * error[k];
      if (k < count) sum += weighted * error[k];
      error[k] = factor * weighted;
    }
    store(grad + i, error, count);
  }
  finish(a, sum);
}

template <class W>
__global__ void __launch_bounds__(THREADS) fake_loss_any(FakeLoss a) {
  const W factor = W(2 / double(a.numel));
  W sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += step) {
    const Coefficients<W> of_sample(a, divide(i, a.sample_size));
    W target = read<W>(a.x_gen, a.dtype, i);
    if (a.x_t) target = (target - of_sample.c_skip * read<W>(a.x_t, a.dtype, i)) * of_sample.inverse_c_out;
    const W error = read<W>(a.output, a.dtype, i) - target, weighted = of_sample.weight * error;
    sum += weighted * error;
    write(a.grad, a.grad_dtype, i, factor * weighted);
  }
  finish(a, sum);
}

std::tuple<Tensor, Tensor> denoising_loss(const Tensor& output, const Tensor& x_gen, const void* x_t,
                                          const Tensor& sigma, double sigma_data) {
  const ScalarType grad_type = gradient_dtype(output);
  Tensor grad = empty_like(output, grad_type);
  Tensor loss = torch::stable::new_empty(output, {}, wide_dtype(output));
  const int64_t numel = output.numel();
  const Dtype dtype = dtype_of(output);
  if (numel == 0) return {torch::stable::fill_(loss, std::numeric_limits<double>::quiet_NaN()), grad};
  FakeLoss a{output.const_data_ptr(), x_gen.const_data_ptr(), x_t, grad.mutable_data_ptr(), loss.mutable_data_ptr(),
             nullptr, dtype, dtype_of(grad_type), values_of(sigma), sigma_data, numel,
             numel / output.size(0), 0};
  const Device device(output);
  a.ticket = next_ticket(device.stream());
  const auto launch = [&](auto kernel, int64_t resident, int64_t per_thread) {
    const int64_t blocks = std::min(ceil_divide(numel, THREADS * per_thread), resident);
    const Tensor partials = torch::stable::new_empty(output, {blocks}, wide_dtype(output));
    a.partials = partials.mutable_data_ptr();
    device.launch(kernel, blocks, THREADS, a);
  };
  const int64_t width = dtype == Dtype::float32 ? 4 : 8;
  if (dtype != Dtype::float64 && aligned({a.output, a.x_gen, a.x_t, a.grad}) && a.sample_size >= width)
    dispatch_vectors(dtype, [&](auto type) {
      using T = decltype(type);
      static const int64_t resident[] = {device.resident_blocks(fake_loss_vectors<T, false>, THREADS),
                                         device.resident_blocks(fake_loss_vectors<T, true>, THREADS)};
      launch(x_t ? fake_loss_vectors<T, true> : fake_loss_vectors<T, false>, resident[x_t ? 1 : 0], width);
    });
  else
    dispatch_wide(dtype, [&](auto type) {
      static const int64_t resident = device.resident_blocks(fake_loss_any<decltype(type)>, THREADS);
      launch(fake_loss_any<decltype(type)>, resident, 1);
    });
  return {loss, grad};
}

std::tuple<Tensor, Tensor> fake_loss(Tensor D_fake, Tensor x_gen, Tensor sigma, double sigma_data) {
  return denoising_loss(D_fake, x_gen, nullptr, sigma, sigma_data);
}

std::tuple<Tensor, Tensor> fake_loss_raw(Tensor F_fake, Tensor x_gen, Tensor x_t, Tensor sigma, double sigma_data) {
  return denoising_loss(F_fake, x_gen, x_t.const_data_ptr(), sigma, sigma_data);
}

struct ScaleGradient {
  const void* grad;  // [numel]
  void* out;         // [numel]
  Dtype dtype, out_dtype;
  Values grad_loss;  // one value
  int64_t numel;
};

template <class T, class O>
__global__ void __launch_bounds__(THREADS) scale_gradient_vectors(ScaleGradient a) {
  constexpr int V = VECTOR<T, O>;
  const T* grad = static_cast<const T*>(a.grad);
  O* out = static_cast<O*>(a.out);
  const float factor = a.grad_loss.at<float>(0);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.numel; i += step) {
    float g[V];
    load(grad + i, g, a.numel - i);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] *= factor;
    store(out + i, g, a.numel - i);
  }
}

template <class W>
__global__ void __launch_bounds__(THREADS) scale_gradient_any(ScaleGradient a) {
  const W factor = a.grad_loss.at<W>(0);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += step)
    write(a.out, a.out_dtype, i, read<W>(a.grad, a.dtype, i) * factor);
}

Tensor scale_gradient(Tensor grad, Tensor grad_loss, ScalarType dtype) {
  Tensor out = empty_like(grad, dtype);
  const ScaleGradient a{grad.const_data_ptr(), out.mutable_data_ptr(), dtype_of(grad), dtype_of(dtype),
                        values_of(grad_loss), grad.numel()};
  if (a.numel == 0) return out;
  const Device device(grad);
  const auto launch = [&](auto kernel, int64_t resident, int64_t per_thread) {
    device.launch(kernel, std::min(ceil_divide(a.numel, THREADS * per_thread), resident), THREADS, a);
  };
  if (a.dtype != Dtype::float64 && a.out_dtype != Dtype::float64 && aligned({a.grad, a.out}))
    dispatch_vectors(a.dtype, [&](auto from) {
      dispatch_vectors(a.out_dtype, [&](auto to) {
        using T = decltype(from);
        using O = decltype(to);
        static const int64_t resident = device.resident_blocks(scale_gradient_vectors<T, O>, THREADS);
        launch(scale_gradient_vectors<T, O>, resident, VECTOR<T, O>);
      });
    });
  else
    dispatch_wide(a.dtype, [&](auto type) {
      static const int64_t resident = device.resident_blocks(scale_gradient_any<decltype(type)>, THREADS);
      launch(scale_gradient_any<decltype(type)>, resident, 1);
    });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) {
  m.impl("fake_loss", TORCH_BOX(&fake_loss));
  m.impl("fake_loss_raw", TORCH_BOX(&fake_loss_raw));
  m.impl("scale_gradient", TORCH_BOX(&scale_gradient));
}

}  // namespace fastdmd
