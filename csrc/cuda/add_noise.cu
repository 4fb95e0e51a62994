// Diffusion noising, y = scale * (x + sigma * noise), with the noise given or made in registers by Philox.
#include "common.cuh"

namespace fastdmd {
namespace {

struct AddNoise {
  const void* x;       // [B * sample_size]
  const void* noise;   // [B * sample_size], if rng_state is null
  void* out;           // [B * sample_size]
  int64_t* rng_state;  // [2], seed and offset, or null
  Dtype dtype, out_dtype;
  Values sigma;  // [B]
  Values scale;  // [B], or null
  int64_t numel, sample_size;
};

// The random stream of one call.
struct Stream {
  uint32_t key0, key1, call;

  // Normals of elements 4 * quad to 4 * quad + 3.
  __device__ __forceinline__ void normals(int64_t quad, float* n /* [4] */) const {
    uint32_t x0 = uint32_t(quad);
    uint32_t x1 = uint32_t(uint64_t(quad) >> 32);
    uint32_t x2 = 0;
    uint32_t x3 = call;
    philox(x0, x1, x2, x3, key0, key1);
    box_muller(x0, x1, n[0], n[1]);
    box_muller(x2, x3, n[2], n[3]);
  }
};

// Reads the state, and advances it by 2^32 once for all blocks: each takes a ticket from the low word of the offset,
// and the one that finds all other tickets taken makes the low word 0 again. Nobody reads the offset but by a ticket.
__device__ Stream open_stream(int64_t* rng_state /* [2] */) {
  __shared__ unsigned long long ticket;
  if (threadIdx.x == 0) {
    auto* offset = reinterpret_cast<unsigned long long*>(rng_state + 1);
    ticket = atomicAdd(offset, 1ull);
    if ((ticket & 0xffffffffull) == gridDim.x - 1) atomicAdd(offset, (1ull << 32) - gridDim.x);
  }
  __syncthreads();
  const auto seed = uint64_t(rng_state[0]);
  return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(ticket >> 32)};
}

// A thread noises V elements in a row, and then every gridDim * blockDim-th such vector.
template <class T, class O, bool Random>
__global__ void __launch_bounds__(THREADS) add_noise_vectors(AddNoise a) {
  constexpr int V = VECTOR<T, O>;
  const T* x = static_cast<const T*>(a.x);
  const T* noise = static_cast<const T*>(a.noise);
  O* out = static_cast<O*>(a.out);
  [[maybe_unused]] Stream stream{};
  if constexpr (Random) stream = open_stream(a.rng_state);
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < a.numel; i += step) {
    const int64_t count = a.numel - i;
    float x_t[V], n[V];
    load(x + i, x_t, count);
    if constexpr (Random) {
#pragma unroll
      for (int quad = 0; quad < V / 4; ++quad) stream.normals(i / 4 + quad, n + 4 * quad);
    } else {
      load(noise + i, n, count);
    }
    const Samples samples = samples_of<V>(i, a.sample_size, count);
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

// A thread noises every gridDim * blockDim-th element; it makes four normals for each, and takes one.
template <class W>
__global__ void __launch_bounds__(THREADS) add_noise_any(AddNoise a) {
  Stream stream{};
  if (a.rng_state) stream = open_stream(a.rng_state);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += step) {
    W n;
    if (a.rng_state) {
      float normals[4];
      stream.normals(i / 4, normals);
      n = W(i % 4 < 2 ? (i % 2 ? normals[1] : normals[0]) : (i % 2 ? normals[3] : normals[2]));
    } else {
      n = read<W>(a.noise, a.dtype, i);
    }
    const int64_t sample = divide(i, a.sample_size);
    const W scale = a.scale.data ? a.scale.at<W>(sample) : W(1);
    write(a.out, a.out_dtype, i, scale * (read<W>(a.x, a.dtype, i) + a.sigma.at<W>(sample) * n));
  }
}

template <class T, class O>
void launch_vectors(const Device& device, const AddNoise& a) {
  const auto kernel = a.rng_state ? add_noise_vectors<T, O, true> : add_noise_vectors<T, O, false>;
  static const int64_t resident[] = {device.resident_blocks(add_noise_vectors<T, O, false>, THREADS),
                                     device.resident_blocks(add_noise_vectors<T, O, true>, THREADS)};
  const int64_t blocks = ceil_divide(a.numel, THREADS * VECTOR<T, O>);
  device.launch(kernel, std::min(blocks, resident[a.rng_state ? 1 : 0]), THREADS, a);
}

Tensor noised(const Tensor& x,                     // [B, ...]
              const Tensor& sigma,                 // [B]
              const void* noise,                   // [B, ...], if rng_state is null
              int64_t* rng_state,                  // [2], or null
              const std::optional<Tensor>& scale,  // [B]
              ScalarType dtype) {
  Tensor out = empty_like(x, dtype);
  const int64_t numel = x.numel();
  if (numel == 0 && !rng_state) return out;
  const AddNoise a{
      .x = x.const_data_ptr(),
      .noise = noise,
      .out = out.mutable_data_ptr(),
      .rng_state = rng_state,
      .dtype = dtype_of(x),
      .out_dtype = dtype_of(dtype),
      .sigma = values_of(sigma),
      .scale = values_of(scale),
      .numel = numel,
      .sample_size = numel > 0 ? numel / x.size(0) : 1,
  };
  const Device device(x);
  const bool vectors = a.dtype != Dtype::float64 && a.out_dtype != Dtype::float64 && aligned({a.x, a.noise, a.out}) &&
                       a.sample_size >= VECTOR<__half>;
  if (vectors)
    dispatch_vectors(a.dtype, [&](auto from) {
      dispatch_vectors(a.out_dtype, [&](auto to) { launch_vectors<decltype(from), decltype(to)>(device, a); });
    });
  else
    dispatch_wide(a.dtype, [&](auto type) {
      const auto kernel = add_noise_any<decltype(type)>;
      static const int64_t resident = device.resident_blocks(kernel, THREADS);
      // One block at least: without a single element, the offset still advances.
      const int64_t blocks = std::clamp(ceil_divide(numel, THREADS), int64_t(1), resident);
      device.launch(kernel, blocks, THREADS, a);
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
                     Tensor rng_state,             // [2], seed and offset
                     std::optional<Tensor> scale,  // [B]
                     ScalarType dtype) {
  return noised(x, sigma, nullptr, static_cast<int64_t*>(rng_state.mutable_data_ptr()), scale, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) {
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_rng", TORCH_BOX(&add_noise_rng));
}

}  // namespace fastdmd
