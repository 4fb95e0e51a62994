// out = scale * (x + sigma * noise), with the noise read, or made here and never written to memory.
#include "numeric.h"
#include "words.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

constexpr int QUADS = Words::size;  // whose normals are made at a time

// Normals of QUADS quads from one of a sample on, through samples that have num_quads each. Inlined, it spills what it
// keeps in registers: with AVX-512, add_noise takes 0.60 ns an element then instead of 0.44.
[[gnu::noinline]] void make_normals(float* __restrict normals,  // [4 * QUADS]
                                    uint64_t sample,
                                    uint64_t quad,
                                    uint64_t num_quads,
                                    const RngKey& key) {
  alignas(64) uint64_t counter[2][QUADS];
  sample += key.first_sample;
  if (num_quads >= QUADS) {  // they are of two samples at most
    const uint64_t left = num_quads - quad;
#pragma omp simd
    for (uint64_t lane = 0; lane < QUADS; ++lane) {
      counter[0][lane] = quad + lane - (lane < left ? 0 : num_quads);
      counter[1][lane] = sample + (lane < left ? 0 : 1);
    }
  } else {
    for (int lane = 0; lane < QUADS; ++lane) {
      counter[0][lane] = quad;
      counter[1][lane] = sample;
      if (++quad == num_quads) {
        quad = 0;
        ++sample;
      }
    }
  }
  Words x0 = Words::load(counter[0]), x1 = Words::load(counter[1]), x2{}, x3{};
  x2 = x2 ^ key.iteration;
  x3 = x3 ^ key.stream;
  fastdmd::philox(x0, x1, x2, x3, uint32_t(key.seed), uint32_t(key.seed >> 32));
  alignas(64) uint32_t a[2 * QUADS];
  alignas(64) uint32_t b[2 * QUADS];
  interleave(x0, x2, a);
  interleave(x1, x3, b);
#pragma omp simd
  for (int pair = 0; pair < 2 * QUADS; ++pair) box_muller(a[pair], b[pair], normals[2 * pair], normals[2 * pair + 1]);
}

// Elements [begin, end) of a sample, which lie at(i); the noise of each is noise(i).
template <class T, class Out, class At, class Noise>
FASTDMD_INLINE void apply(const AddNoise& a, int64_t sample, int64_t begin, int64_t end, At at, Noise noise) {
  using W = Wide<T>;
  const T* __restrict x = static_cast<const T*>(a.x) + sample * a.sample_size;
  Out* __restrict out = static_cast<Out*>(a.out) + sample * a.sample_size;
  const W sigma = W(a.sigma[sample]);
  const W scale = a.scale ? W(a.scale[sample]) : W(1);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const W x_t = scale * (load(x[at(i)]) + sigma * noise(i));
    if constexpr (std::is_same_v<Out, double> || std::is_same_v<Out, float>)
      store(out[at(i)], x_t);
    else
      store(out[at(i)], float(x_t));
  }
}

template <class T, class Out>
void add_noise_typed(const AddNoise& a, int64_t begin, int64_t end) {
  while (begin < end) {  // sample by sample
    const int64_t sample = begin / a.sample_size, start = sample * a.sample_size;
    const int64_t stop = start + a.sample_size < end ? start + a.sample_size : end;
    const T* __restrict noise = static_cast<const T*>(a.noise) + start;
    apply<T, Out>(
        a, sample, begin - start, stop - start, [](int64_t i) { return i; }, [=](int64_t i) { return load(noise[i]); });
    begin = stop;
  }
}

// Calls body(begin, end, at) with the parts of [begin, end) that are of one channel, whose elements lie at(i).
template <class Body>
FASTDMD_INLINE void by_channel(const AddNoise& a, int64_t begin, int64_t end, Body body) {
  const int64_t stride = a.num_channels, num_pixels = a.sample_size / stride;
  while (begin < end) {
    const int64_t channel = begin / num_pixels, start = channel * num_pixels;
    const int64_t stop = start + num_pixels < end ? start + num_pixels : end;
    body(begin, stop, [=](int64_t i) { return (i - start) * stride + channel; });
    begin = stop;
  }
}

template <class T, class Out>
void add_noise_rng_typed(const AddNoise& a, int64_t begin, int64_t end) {
  using W = Wide<T>;
  alignas(64) float normals[4 * QUADS];
  int64_t sample = begin / a.num_quads(), quad = begin % a.num_quads();
  for (int64_t first = begin; first < end; first += QUADS) {
    make_normals(normals, uint64_t(sample), uint64_t(quad), uint64_t(a.num_quads()), a.key);
    const int64_t count = first + QUADS < end ? QUADS : end - first;
    for (int64_t done = 0; done < count;) {  // sample by sample
      const int64_t left = a.num_quads() - quad, num = left < count - done ? left : count - done;
      const int64_t from = 4 * quad, to = num < left ? from + 4 * num : a.sample_size;
      const float* __restrict made = normals + 4 * (done - quad);
      const auto noise = [=](int64_t i) { return W(made[i]); };
      if (a.num_channels == 1)
        apply<T, Out>(a, sample, from, to, [](int64_t i) { return i; }, noise);
      else
        by_channel(
            a, from, to, [&](int64_t begin, int64_t end, auto at) { apply<T, Out>(a, sample, begin, end, at, noise); });
      done += num;
      quad = num < left ? quad + num : 0;
      sample += num < left ? 0 : 1;
    }
  }
}

}  // namespace

void add_noise(const AddNoise& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto x) {
    dispatch(a.out_dtype, [&](auto out) { add_noise_typed<decltype(x), decltype(out)>(a, begin, end); });
  });
}

void add_noise_rng(const AddNoise& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&](auto x) {
    dispatch(a.out_dtype, [&](auto out) { add_noise_rng_typed<decltype(x), decltype(out)>(a, begin, end); });
  });
}

void normals(float* out,  // [end - begin]
             const RngKey& key,
             int64_t begin,
             int64_t end) {
  constexpr int size = 4 * QUADS;
  alignas(64) float made[size];
  for (int64_t first = begin / 4 * 4; first < end; first += size) {
    make_normals(made, 0, uint64_t(first) / 4, uint64_t(1) << 62, key);
    const int64_t from = first < begin ? begin : first;
    const int64_t to = first + size < end ? first + size : end;
    std::memcpy(out + (from - begin), made + (from - first), sizeof(float) * size_t(to - from));
  }
}

}  // namespace fastdmd::FASTDMD_ISA
