// The distribution-matching gradient, grad = (p_real - p_fake) / mean|p_real|, and its loss: a block per sample, which
// keeps p_real - p_fake in registers until the mean is known.
#include "grid_sum.cuh"

namespace fastdmd {
namespace {

constexpr int MAX_THREADS = 768;  // leaves 80 registers each; 1024 would leave 64, which spill
constexpr int KEPT = 32;          // values that a thread keeps: a sample of up to 24576 elements is read once

struct DMLoss {
  const void* x_gen;  // [B * sample_size]
  const void* real;   // [B * sample_size]: D_real, or F_real if x_t is given
  const void* fake;   // [B * sample_size]: D_fake, or F_fake if x_t is given
  const void* x_t;    // [B * sample_size], or null
  void* grad;         // [B * sample_size]
  void* loss;         // [1], wide, or null
  void* partials;     // [blocks], wide
  Dtype dtype, grad_dtype;
  Values sigma;  // [B], if x_t is given
  double sigma_data, eps;
  double factor;  // of grad on output: 1 / numel makes it the derivative of the loss
  int64_t num_samples, sample_size;
  unsigned ticket;
};

// Of one sample: D = c_skip * x_t + c_out * F.
template <class W, bool Raw>
struct Denoiser {
  W c_skip = 0, c_out = 1;

  __device__ __forceinline__ Denoiser(const DMLoss& a, int64_t sample) {
    if constexpr (Raw) {
      const W sigma = a.sigma.at<W>(sample);
      const W sigma_data = W(a.sigma_data);
      c_skip = fastdmd::c_skip(sigma, sigma_data);
      c_out = fastdmd::c_out(sigma, sigma_data);
    }
  }

  __device__ __forceinline__ W p_real(W x_gen, W real, W x_t) const {
    return Raw ? x_gen - (c_skip * x_t + c_out * real) : x_gen - real;
  }

  // p_real - p_fake; the skip terms of raw outputs cancel.
  __device__ __forceinline__ W difference(W x_gen, W real, W fake) const {
    return Raw ? c_out * (fake - real) : (x_gen - real) - (x_gen - fake);
  }
};

template <class W>
__device__ __forceinline__ W weight_factor(const DMLoss& a, W sum) {
  return at_least(sum / W(a.sample_size), W(a.eps));
}

template <class W>
__device__ __forceinline__ W finite_or_zero(W x) {
  return isfinite(x) ? x : W(0);
}

template <class W>
__device__ void finish(const DMLoss& a, W sum) {
  if (!a.loss) return;
  double total;
  if (GridSum<W>{static_cast<W*>(a.partials), a.ticket}(sum, total) && threadIdx.x == 0)
    *static_cast<W*>(a.loss) = W(0.5 * total / (double(a.num_samples) * double(a.sample_size)));
}

// A block has a sample, and then every gridDim-th; a thread every blockDim-th vector of it, of which it keeps K.
template <class T, class G, bool Raw>
__global__ void __launch_bounds__(MAX_THREADS) dm_loss_vectors(DMLoss a) {
  constexpr int V = 16 / sizeof(T);
  constexpr int K = KEPT / V;
  const int64_t num_vectors = a.sample_size / V;
  const float factor = float(a.factor);
  float loss = 0;
  for (int64_t sample = blockIdx.x; sample < a.num_samples; sample += gridDim.x) {
    const int64_t start = sample * a.sample_size;
    const T* x_gen = static_cast<const T*>(a.x_gen) + start;
    const T* real = static_cast<const T*>(a.real) + start;
    const T* fake = static_cast<const T*>(a.fake) + start;
    const T* x_t = static_cast<const T*>(a.x_t) + (Raw ? start : 0);
    G* grad = static_cast<G*>(a.grad) + start;
    const Denoiser<float, Raw> denoiser(a, sample);

    float sum = 0;
    // difference[k] = p_real - p_fake of a vector, and sum += |p_real|
    const auto visit = [&](int64_t vector, float (&difference)[V]) {
      float x[V], r[V], f[V], t[V] = {};
      load(x_gen + vector * V, x);
      load(real + vector * V, r);
      load(fake + vector * V, f);
      if constexpr (Raw) load(x_t + vector * V, t);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sum += fabsf(denoiser.p_real(x[k], r[k], t[k]));
        difference[k] = denoiser.difference(x[k], r[k], f[k]);
      }
    };
    float kept[K][V];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t vector = threadIdx.x + int64_t(k) * blockDim.x;
      if (vector < num_vectors) visit(vector, kept[k]);
    }
    const int64_t rest = threadIdx.x + int64_t(K) * blockDim.x;
    for (int64_t vector = rest; vector < num_vectors; vector += blockDim.x) {
      float unused[V];
      visit(vector, unused);
    }

    const float w = weight_factor(a, block_sum(sum));
    const auto emit = [&](int64_t vector, float (&g)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        g[k] = finite_or_zero(g[k] / w);
        loss += g[k] * g[k];
        g[k] *= factor;
      }
      store(grad + vector * V, g);
    };
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t vector = threadIdx.x + int64_t(k) * blockDim.x;
      if (vector < num_vectors) emit(vector, kept[k]);
    }
    for (int64_t vector = rest; vector < num_vectors; vector += blockDim.x) {
      float difference[V];
      visit(vector, difference);  // what it adds to sum is no longer read
      emit(vector, difference);
    }
  }
  finish(a, loss);
}

// A block has a sample, and then every gridDim-th; a thread every blockDim-th element of it, which it reads twice.
template <class W, bool Raw>
__global__ void __launch_bounds__(THREADS, 4) dm_loss_any(DMLoss a) {
  W loss = 0;
  for (int64_t sample = blockIdx.x; sample < a.num_samples; sample += gridDim.x) {
    const int64_t begin = sample * a.sample_size;
    const int64_t end = begin + a.sample_size;
    const Denoiser<W, Raw> denoiser(a, sample);
    W sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const W x = read<W>(a.x_gen, a.dtype, i);
      const W real = read<W>(a.real, a.dtype, i);
      sum += fabs(denoiser.p_real(x, real, Raw ? read<W>(a.x_t, a.dtype, i) : W(0)));
    }
    const W w = weight_factor(a, block_sum(sum));
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const W x = read<W>(a.x_gen, a.dtype, i);
      const W real = read<W>(a.real, a.dtype, i);
      const W fake = read<W>(a.fake, a.dtype, i);
      const W g = finite_or_zero(denoiser.difference(x, real, fake) / w);
      loss += g * g;
      write(a.grad, a.grad_dtype, i, g * W(a.factor));
    }
  }
  finish(a, loss);
}

void launch(const Device& device, const DMLoss& a, int64_t blocks) {
  const int64_t width = 16 / element_bytes(a.dtype);
  if (a.dtype == Dtype::float64 || a.sample_size % width != 0 || !aligned({a.x_gen, a.real, a.fake, a.x_t, a.grad})) {
    dispatch_wide(a.dtype, [&](auto type) {
      using W = decltype(type);
      device.launch(a.x_t ? dm_loss_any<W, true> : dm_loss_any<W, false>, blocks, THREADS, a);
    });
    return;
  }
  // Many samples: as few threads as can keep one. Few samples: a thread per vector, to have more loads in flight.
  const int64_t per_thread = a.num_samples >= 2 * device.num_multiprocessors() ? KEPT : width;
  const int threads =
      int(std::clamp(ceil_divide(a.sample_size, per_thread * WARP) * WARP, int64_t(2 * WARP), int64_t(MAX_THREADS)));
  dispatch_vectors(a.dtype, [&](auto type) {
    using T = decltype(type);
    using G = std::conditional_t<std::is_same_v<T, __half>, float, T>;
    device.launch(a.x_t ? dm_loss_vectors<T, G, true> : dm_loss_vectors<T, G, false>, blocks, threads, a);
  });
}

void fill_in(DMLoss& a, const Tensor& x_gen, const Tensor& grad) {
  a.x_gen = x_gen.const_data_ptr();
  a.grad = grad.mutable_data_ptr();
  a.dtype = dtype_of(x_gen);
  a.grad_dtype = dtype_of(grad);
  a.num_samples = x_gen.size(0);
  a.sample_size = a.num_samples > 0 ? x_gen.numel() / a.num_samples : 0;
}

int64_t num_blocks(const DMLoss& a) { return std::min(a.num_samples, int64_t(1) << 20); }

Tensor dm_gradient(Tensor x_gen,   // [B, ...]
                   Tensor D_real,  // [B, ...]
                   Tensor D_fake,  // [B, ...]
                   double eps) {
  Tensor grad = empty_like(x_gen, gradient_dtype(x_gen));
  DMLoss a{
      .real = D_real.const_data_ptr(),
      .fake = D_fake.const_data_ptr(),
      .eps = eps,
      .factor = 1,
  };
  fill_in(a, x_gen, grad);
  if (x_gen.numel() > 0) launch(Device(x_gen), a, num_blocks(a));
  return grad;
}

std::tuple<Tensor, Tensor> loss_and_gradient(DMLoss a, const Tensor& x_gen) {
  Tensor grad = empty_like(x_gen, gradient_dtype(x_gen));
  Tensor loss = torch::stable::new_empty(x_gen, {}, wide_dtype(x_gen));
  fill_in(a, x_gen, grad);
  if (x_gen.numel() == 0) return {torch::stable::fill_(loss, std::numeric_limits<double>::quiet_NaN()), grad};
  const Device device(x_gen);
  const Tensor partials = torch::stable::new_empty(x_gen, {num_blocks(a)}, wide_dtype(x_gen));
  a.loss = loss.mutable_data_ptr();
  a.partials = partials.mutable_data_ptr();
  a.factor = 1 / double(x_gen.numel());
  a.ticket = next_ticket(device.stream());
  launch(device, a, num_blocks(a));
  return {loss, grad};
}

std::tuple<Tensor, Tensor> dm_loss(Tensor x_gen,   // [B, ...]
                                   Tensor D_real,  // [B, ...]
                                   Tensor D_fake,  // [B, ...]
                                   double eps) {
  const DMLoss a{
      .real = D_real.const_data_ptr(),
      .fake = D_fake.const_data_ptr(),
      .eps = eps,
  };
  return loss_and_gradient(a, x_gen);
}

std::tuple<Tensor, Tensor> dm_loss_raw(Tensor x_gen,   // [B, ...]
                                       Tensor x_t,     // [B, ...]
                                       Tensor sigma,   // [B]
                                       Tensor F_real,  // [B, ...]
                                       Tensor F_fake,  // [B, ...]
                                       double sigma_data,
                                       double eps) {
  const DMLoss a{
      .real = F_real.const_data_ptr(),
      .fake = F_fake.const_data_ptr(),
      .x_t = x_t.const_data_ptr(),
      .sigma = values_of(sigma),
      .sigma_data = sigma_data,
      .eps = eps,
  };
  return loss_and_gradient(a, x_gen);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) {
  m.impl("dm_gradient", TORCH_BOX(&dm_gradient));
  m.impl("dm_loss", TORCH_BOX(&dm_loss));
  m.impl("dm_loss_raw", TORCH_BOX(&dm_loss_raw));
}

}  // namespace fastdmd
