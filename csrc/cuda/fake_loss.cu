// The weighted denoising loss and its gradient in one launch, and the scaling of a stored gradient.
#include "grid_sum.cuh"

namespace fastdmd {
namespace {

struct FakeLoss {
  const void* output;  // [B * sample_size]: D_x, or F_x if x_t is given
  const void* images;  // [B * sample_size]
  const void* x_t;     // [B * sample_size], or null
  void* grad;          // [B * sample_size], the derivative of the loss in output
  void* loss;          // one wide value
  void* partials;      // [blocks], wide
  Dtype dtype, grad_dtype;
  Values weight;  // [B], or null: it follows from sigma
  Values sigma;   // [B], or null
  double sigma_data;
  int64_t numel, sample_size;
  unsigned ticket;
};

// Of one sample: error = output - (images - c_skip * x_t) * inverse_c_out, or output - images if there is no x_t.
template <class W>
struct Coefficients {
  W weight, c_skip, inverse_c_out;

  __device__ __forceinline__ Coefficients(const FakeLoss& a, int64_t sample) : weight(1), c_skip(0), inverse_c_out(1) {
    if (a.weight.data) {
      weight = a.weight.at<W>(sample);
      return;
    }
    const W sigma = a.sigma.at<W>(sample);
    const W sigma_data = W(a.sigma_data);
    if (a.x_t) {
      c_skip = fastdmd::c_skip(sigma, sigma_data);
      inverse_c_out = W(1) / fastdmd::c_out(sigma, sigma_data);
    } else {
      weight = fastdmd::loss_weight(sigma, sigma_data);
    }
  }
};

template <class W>
__device__ void finish(const FakeLoss& a, W sum) {
  double total;
  if (GridSum<W>{static_cast<W*>(a.partials), a.ticket}(sum, total) && threadIdx.x == 0)
    *static_cast<W*>(a.loss) = W(total / double(a.numel));
}

// A thread has V elements in a row, and then every gridDim * blockDim-th such vector.
template <class T, bool Raw>
__global__ void __launch_bounds__(THREADS, 4) fake_loss_vectors(FakeLoss a) {
  using G = std::conditional_t<std::is_same_v<T, __half>, float, T>;
  constexpr int V = 16 / sizeof(T);
  const T* output = static_cast<const T*>(a.output);
  const T* images = static_cast<const T*>(a.images);
  const T* x_t = static_cast<const T*>(a.x_t);
  G* grad = static_cast<G*>(a.grad);
  const float factor = float(2 / double(a.numel));
  float sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.numel; i += step) {
    const int64_t count = a.numel - i;
    float error[V], target[V], skipped[V];
    load(output + i, error, count);
    load(images + i, target, count);
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

// A thread has every gridDim * blockDim-th element.
template <class W>
__global__ void __launch_bounds__(THREADS) fake_loss_any(FakeLoss a) {
  const W factor = W(2 / double(a.numel));
  W sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += step) {
    const Coefficients<W> of_sample(a, divide(i, a.sample_size));
    W target = read<W>(a.images, a.dtype, i);
    if (a.x_t) target = (target - of_sample.c_skip * read<W>(a.x_t, a.dtype, i)) * of_sample.inverse_c_out;
    const W error = read<W>(a.output, a.dtype, i) - target;
    const W weighted = of_sample.weight * error;
    sum += weighted * error;
    write(a.grad, a.grad_dtype, i, factor * weighted);
  }
  finish(a, sum);
}

std::tuple<Tensor, Tensor> weighted_error(const Tensor& output,                 // [B, ...]
                                          const Tensor& images,                 // [B, ...]
                                          const void* x_t,                      // [B, ...], or null
                                          const std::optional<Tensor>& weight,  // [B], or else
                                          const std::optional<Tensor>& sigma,   // [B]
                                          double sigma_data) {
  const ScalarType grad_type = gradient_dtype(output);
  Tensor grad = empty_like(output, grad_type);
  Tensor loss = torch::stable::new_empty(output, {}, wide_dtype(output));
  const int64_t numel = output.numel();
  const Dtype dtype = dtype_of(output);
  if (numel == 0) return {torch::stable::fill_(loss, std::numeric_limits<double>::quiet_NaN()), grad};
  const Device device(output);
  FakeLoss a{
      .output = output.const_data_ptr(),
      .images = images.const_data_ptr(),
      .x_t = x_t,
      .grad = grad.mutable_data_ptr(),
      .loss = loss.mutable_data_ptr(),
      .dtype = dtype,
      .grad_dtype = dtype_of(grad_type),
      .weight = values_of(weight),
      .sigma = values_of(sigma),
      .sigma_data = sigma_data,
      .numel = numel,
      .sample_size = numel / output.size(0),
      .ticket = next_ticket(device.stream()),
  };
  const auto launch = [&](auto kernel, int64_t resident, int64_t per_thread) {
    const int64_t blocks = std::min(ceil_divide(numel, THREADS * per_thread), resident);
    const Tensor partials = torch::stable::new_empty(output, {blocks}, wide_dtype(output));
    a.partials = partials.mutable_data_ptr();
    device.launch(kernel, blocks, THREADS, a);
  };
  const int64_t width = dtype == Dtype::float32 ? 4 : 8;
  if (dtype != Dtype::float64 && aligned({a.output, a.images, a.x_t, a.grad}) && a.sample_size >= width)
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

std::tuple<Tensor, Tensor> denoising_loss(Tensor D_x,     // [B, ...]
                                          Tensor images,  // [B, ...]
                                          Tensor weight /* [B] */) {
  return weighted_error(D_x, images, nullptr, weight, std::nullopt, 0);
}

std::tuple<Tensor, Tensor> fake_loss(Tensor D_fake,  // [B, ...]
                                     Tensor x_gen,   // [B, ...]
                                     Tensor sigma,   // [B]
                                     double sigma_data) {
  return weighted_error(D_fake, x_gen, nullptr, std::nullopt, sigma, sigma_data);
}

std::tuple<Tensor, Tensor> fake_loss_raw(Tensor F_fake,  // [B, ...]
                                         Tensor x_gen,   // [B, ...]
                                         Tensor x_t,     // [B, ...]
                                         Tensor sigma,   // [B]
                                         double sigma_data) {
  return weighted_error(F_fake, x_gen, x_t.const_data_ptr(), std::nullopt, sigma, sigma_data);
}

struct ScaleGradient {
  const void* grad;  // [numel]
  void* out;         // [numel]
  Dtype dtype, out_dtype;
  Values grad_loss;  // one value
  int64_t numel;
};

// As fake_loss_vectors.
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

// As fake_loss_any.
template <class W>
__global__ void __launch_bounds__(THREADS) scale_gradient_any(ScaleGradient a) {
  const W factor = a.grad_loss.at<W>(0);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += step)
    write(a.out, a.out_dtype, i, read<W>(a.grad, a.dtype, i) * factor);
}

Tensor scale_gradient(Tensor grad,       // [...]
                      Tensor grad_loss,  // []
                      ScalarType dtype) {
  Tensor out = empty_like(grad, dtype);
  const ScaleGradient a{
      .grad = grad.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .dtype = dtype_of(grad),
      .out_dtype = dtype_of(dtype),
      .grad_loss = values_of(grad_loss),
      .numel = grad.numel(),
  };
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
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("fake_loss", TORCH_BOX(&fake_loss));
  m.impl("fake_loss_raw", TORCH_BOX(&fake_loss_raw));
  m.impl("scale_gradient", TORCH_BOX(&scale_gradient));
}

}  // namespace fastdmd
