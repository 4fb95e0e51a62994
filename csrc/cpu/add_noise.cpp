// out = scale * (x + sigma * noise), with the noise read, or made here and never written to memory.
#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

constexpr int LANES = 32;         // counters in flight: two AVX-512 vectors, four of AVX2
constexpr int CHUNK = 4 * LANES;  // elements that they make

// Normals of elements [first, first + CHUNK), first a multiple of 4.
FASTDMD_INLINE void make_normals(float* __restrict normals, uint64_t first, uint64_t seed, uint64_t call) {
  alignas(64) uint32_t words[4][LANES];
  alignas(64) float by_word[4][LANES];
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane) {
    const uint64_t counter = first / 4 + lane;
    uint32_t x0 = uint32_t(counter), x1 = uint32_t(counter >> 32), x2 = 0, x3 = uint32_t(call);
    fastdmd::philox(x0, x1, x2, x3, uint32_t(seed), uint32_t(seed >> 32));
    words[0][lane] = x0, words[1][lane] = x1, words[2][lane] = x2, words[3][lane] = x3;
  }
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane) {
    box_muller(words[0][lane], words[1][lane], by_word[0][lane], by_word[1][lane]);
    box_muller(words[2][lane], words[3][lane], by_word[2][lane], by_word[3][lane]);
  }
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane)
    for (int k = 0; k < 4; ++k) normals[4 * lane + k] = by_word[k][lane];
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
    const W sigma = W(a.sigma[sample]), scale = a.scale ? W(a.scale[sample]) : W(1);
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
    const int64_t from = first < begin ? begin : first, to = first + CHUNK < end ? first + CHUNK : end;
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

}  // namespace fastdmd::FASTDMD_ISA
