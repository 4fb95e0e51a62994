// Diffusion noising, y = scale * (x + sigma * noise), with the noise given or made in registers by Philox.
#include "common.cuh"

namespace fastdmd {
namespace {

struct AddNoise {
  const void* x;           // [B * sample_size]
  const void* noise;       // [B * sample_size], if rng_key is null
  void* out;               // [B * sample_size]
  const int64_t* rng_key;  // [4], see RngKey, or null
  Dtype dtype, out_dtype;
  Values sigma;  // [B]
  Values scale;  // [B], or null
  int64_t numel, sample_size;
  int64_t num_channels;  // that alternate in memory
};

// Normals of elements 4 * quad to 4 * quad + 3 of a sample.
__device__ __forceinline__ void make_normals(const RngKey& key, int64_t sample, int64_t quad, float* n /* [4] */) {
  uint32_t x0 = uint32_t(quad);
  uint32_t x1 = key.first_sample + uint32_t(sample);
  uint32_t x2 = key.iteration;
  uint32_t x3 = key.stream;
  philox(x0, x1, x2, x3, uint32_t(key.seed), uint32_t(key.seed >> 32));
  box_muller(x0, x1, n[0], n[1]);
  box_muller(x2, x3, n[2], n[3]);
}

// A thread noises V elements in a row, and then every gridDim * blockDim-th such vector. Random: samples are of whole
// quads of normals, which lie in the order that they are counted in.
template <class T, class O, bool Random>
__global__ void __launch_bounds__(THREADS) add_noise_vectors(AddNoise a) {
  constexpr int V = VECTOR<T, O>;
  const T* x = static_cast<const T*>(a.x);
  const T* noise = static_cast<const T*>(a.noise);
  O* out = static_cast<O*>(a.out);
  [[maybe_unused]] RngKey key{};
  if constexpr (Random) key = RngKey::read(a.rng_key);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.numel; i += step) {
    const int64_t count = a.numel - i;
    const Samples samples = samples_of<V>(i, a.sample_size, count);
    float x_t[V], n[V];
    load(x + i, x_t, count);
    if constexpr (Random) {
#pragma unroll
      for (int k = 0; k < V; k += 4) {
        const int64_t sample = k < samples.boundary ? samples.first : samples.second;
        make_normals(key, sample, (i + k - sample * a.sample_size) / 4, n + k);
      }
    } else {
      load(noise + i, n, count);
    }
    const float sigma0 = a.sigma.at<float>(samples.first);
    const float sigma1 = a.sigma.at<float>(samples.second);
    const float scale0 = a.scale.data ? a.scale.at<float>(samples.first) : 1.0f;
    const float scale1 = a.scale.data ? a.scale.at<float>(samples.second) : 1.0f;
#pragma unroll
    for (int k = 0; k < V; ++k)
      x_t[k] = (k < samples.boundary ? scale0 : scale1) * (x_t[k] + (k < samples.boundary ? sigma0 : sigma1) * n[k]);
    store(out + i, x_t, count);
  }
}

// A thread noises every gridDim * blockDim-th element.
template <class W>
__global__ void __launch_bounds__(THREADS) add_noise_any(AddNoise a) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += step) {
    const int64_t sample = divide(i, a.sample_size);
    const W scale = a.scale.data ? a.scale.at<W>(sample) : W(1);
    const W n = read<W>(a.noise, a.dtype, i);
    write(a.out, a.out_dtype, i, scale * (read<W>(a.x, a.dtype, i) + a.sigma.at<W>(sample) * n));
  }
}

__host__ __device__ __forceinline__ int64_t quads_of(int64_t sample_size) { return (sample_size + 3) / 4; }

// A thread makes the normals of every gridDim * blockDim-th quad, and noises its elements wherever they lie. Where
// channels alternate, neighbours take those of the same four pixels, so that a warp finds its memory in a row.
template <class W>
__global__ void __launch_bounds__(THREADS) add_noise_quads(AddNoise a) {
  const RngKey key = RngKey::read(a.rng_key);
  const int64_t num_quads = quads_of(a.sample_size);
  const int64_t end = divide(a.numel, a.sample_size) * num_quads;
  const int64_t num_pixels = divide(a.sample_size, a.num_channels);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < end; t += step) {
    const int64_t sample = divide(t, num_quads);
    int64_t quad = t - sample * num_quads;
    if (num_pixels % 4 == 0) {
      const int64_t pixels = divide(quad, a.num_channels);
      quad = (quad - pixels * a.num_channels) * (num_pixels / 4) + pixels;
    }
    float n[4];
    make_normals(key, sample, quad, n);
    const W sigma = a.sigma.at<W>(sample);
    const W scale = a.scale.data ? a.scale.at<W>(sample) : W(1);
    const int64_t channel = divide(4 * quad, num_pixels), start = sample * a.sample_size;
    int64_t i = start + (4 * quad - channel * num_pixels) * a.num_channels + channel;
    const int64_t last = start + a.sample_size - 1;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      write(a.out, a.out_dtype, i, scale * (read<W>(a.x, a.dtype, i) + sigma * W(n[k])));
      if (i == last) break;
      i += a.num_channels;
      if (i > last) i -= a.sample_size - 1;  // on to the next channel
    }
  }
}

template <class T, class O>
void launch_vectors(const Device& device, const AddNoise& a) {
  const auto kernel = a.rng_key ? add_noise_vectors<T, O, true> : add_noise_vectors<T, O, false>;
  static const int64_t resident[] = {device.resident_blocks(add_noise_vectors<T, O, false>, THREADS),
                                     device.resident_blocks(add_noise_vectors<T, O, true>, THREADS)};
  const int64_t blocks = ceil_divide(a.numel, THREADS * VECTOR<T, O>);
  device.launch(kernel, std::min(blocks, resident[a.rng_key ? 1 : 0]), THREADS, a);
}

Tensor noised(const Tensor& x,                     // [B, ...]
              const Tensor& sigma,                 // [B]
              const void* noise,                   // [B, ...], if rng_key is null
              const int64_t* rng_key,              // [4], or null
              const std::optional<Tensor>& scale,  // [B]
              ScalarType dtype) {
  Tensor out = empty_like(x, dtype);
  const int64_t numel = x.numel();
  if (numel == 0) return out;
  const AddNoise a{
      .x = x.const_data_ptr(),
      .noise = noise,
      .out = out.mutable_data_ptr(),
      .rng_key = rng_key,
      .dtype = dtype_of(x),
      .out_dtype = dtype_of(dtype),
      .sigma = values_of(sigma),
      .scale = values_of(scale),
      .numel = numel,
      .sample_size = numel / x.size(0),
      .num_channels = rng_key ? alternating_channels(x) : 1,
  };
  const Device device(x);
  const bool vectors = a.dtype != Dtype::float64 && a.out_dtype != Dtype::float64 && aligned({a.x, a.noise, a.out}) &&
                       a.sample_size >= VECTOR<__half> && (!rng_key || (a.num_channels == 1 && a.sample_size % 4 == 0));
  if (vectors)
    dispatch_vectors(a.dtype, [&](auto from) {
      dispatch_vectors(a.out_dtype, [&](auto to) { launch_vectors<decltype(from), decltype(to)>(device, a); });
    });
  else
    dispatch_wide(a.dtype, [&](auto type) {
      using W = decltype(type);
      const auto kernel = rng_key ? add_noise_quads<W> : add_noise_any<W>;
      static const int64_t resident[] = {device.resident_blocks(add_noise_any<W>, THREADS),
                                         device.resident_blocks(add_noise_quads<W>, THREADS)};
      const int64_t work = rng_key ? x.size(0) * quads_of(a.sample_size) : numel;
      device.launch(kernel, std::min(ceil_divide(work, THREADS), resident[rng_key ? 1 : 0]), THREADS, a);
    });
  return out;
}

Tensor add_noise(Tensor x,                     // [B, ...]
                 Tensor sigma,                 // [B]
                 Tensor noise,                 // [B, ...]
                 std::optional<Tensor> scale,  // [B]
                 ScalarType dtype) {
  return noised(x, sigma, noise.const_data_ptr(), nullptr, scale, dtype);
}

Tensor add_noise_rng(Tensor x,                     // [B, ...]
                     Tensor sigma,                 // [B]
                     Tensor rng_key,               // [4], see RngKey
                     std::optional<Tensor> scale,  // [B]
                     ScalarType dtype) {
  return noised(x, sigma, nullptr, static_cast<const int64_t*>(rng_key.const_data_ptr()), scale, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) {
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_rng", TORCH_BOX(&add_noise_rng));
}

}  // namespace fastdmd
