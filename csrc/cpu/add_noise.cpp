// out = scale * (x + sigma * noise), with the noise read, or made here and never written to memory.
#include "numeric.h"
#include "words.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

constexpr int CHUNK = 4 * Words::size;  // elements whose noise is made at a time

// Normals of elements [first, first + CHUNK), first a multiple of 4.
FASTDMD_INLINE void make_normals(float* __restrict normals,  // [CHUNK]
                                 uint64_t first,
                                 uint64_t seed,
                                 uint64_t call) {
  alignas(64) uint64_t counter[2][Words::size];
#pragma omp simd
  for (int lane = 0; lane < Words::size; ++lane) {
    counter[0][lane] = first / 4 + lane;
    counter[1][lane] = (first / 4 + lane) >> 32;
  }
  Words x0 = Words::load(counter[0]), x1 = Words::load(counter[1]), x2{}, x3 = x2 ^ uint32_t(call);
  fastdmd::philox(x0, x1, x2, x3, uint32_t(seed), uint32_t(seed >> 32));
  alignas(64) uint32_t a[2 * Words::size];
  alignas(64) uint32_t b[2 * Words::size];
  interleave(x0, x2, a);
  interleave(x1, x3, b);
#pragma omp simd
  for (int pair = 0; pair < 2 * Words::size; ++pair)
    box_muller(a[pair], b[pair], normals[2 * pair], normals[2 * pair + 1]);
}

template <class T, class Out, class Noise>
FASTDMD_INLINE void apply(const AddNoise& a, int64_t begin, int64_t end, Noise noise) {
  using W = Wide<T>;
  const T* __restrict x = static_cast<const T*>(a.x);
  Out* __restrict out = static_cast<Out*>(a.out);
  while (begin < end) {  // sample by sample
    const int64_t sample = begin / a.sample_size;
    const int64_t sample_end = (sample + 1) * a.sample_size;
    const int64_t stop = sample_end < end ? sample_end : end;
    const W sigma = W(a.sigma[sample]);
    const W scale = a.scale ? W(a.scale[sample]) : W(1);
#pragma omp simd
    for (int64_t i = begin; i < stop; ++i) {
      const W x_t = scale * (load(x[i]) + sigma * noise(i));
      if constexpr (std::is_same_v<Out, double> || std::is_same_v<Out, float>)
        store(out[i], x_t);
      else
        store(out[i], float(x_t));
    }
    begin = stop;
  }
}

template <class T, class Out>
void add_noise_typed(const AddNoise& a, int64_t begin, int64_t end) {
  using W = Wide<T>;
  if (a.noise) {
    const T* __restrict noise = static_cast<const T*>(a.noise);
    return apply<T, Out>(a, begin, end, [=](int64_t i) { return load(noise[i]); });
  }
  alignas(64) float normals[CHUNK];
  for (int64_t first = begin / CHUNK * CHUNK; first < end; first += CHUNK) {
    make_normals(normals, uint64_t(first), a.seed, a.call);
    const int64_t from = first < begin ? begin : first;
    const int64_t to = first + CHUNK < end ? first + CHUNK : end;
    const float* __restrict made = normals;
    apply<T, Out>(a, from, to, [=](int64_t i) { return W(made[i - first]); });
  }
}

}  // namespace

void add_noise(const AddNoise& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto x) {
    dispatch(a.out_dtype, [&](auto out) { add_noise_typed<decltype(x), decltype(out)>(a, begin, end); });
  });
}

void normals(float* out,  // [end - begin]
             uint64_t seed,
             uint64_t call,
             int64_t begin,
             int64_t end) {
  alignas(64) float made[CHUNK];
  for (int64_t first = begin / CHUNK * CHUNK; first < end; first += CHUNK) {
    make_normals(made, uint64_t(first), seed, call);
    const int64_t from = first < begin ? begin : first;
    const int64_t to = first + CHUNK < end ? first + CHUNK : end;
    std::memcpy(out + (from - begin), made + (from - first), sizeof(float) * size_t(to - from));
  }
}

}  // namespace fastdmd::FASTDMD_ISA
