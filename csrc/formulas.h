// Scalar mathematics that host and device share: Philox4x32-10, normals, preconditioning, half precision. One copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDMD_INLINE __host__ __device__ __forceinline__
#define FASTDMD_UNROLL _Pragma("unroll")
#else
#define FASTDMD_INLINE inline __attribute__((always_inline))
#define FASTDMD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastdmd {

// Philox4x32-10 (Salmon et al. 2011): a counter of four words and a key of two give four random words, in place.
// `Word` is uint32_t, or a type with its operators for many counters at once.
template <class Word>
FASTDMD_INLINE void philox(Word& x0, Word& x1, Word& x2, Word& x3, uint32_t key0, uint32_t key1) {
  FASTDMD_UNROLL
  for (int round = 0; round < 10; ++round) {
    const auto product0 = uint64_t(0xD2511F53u) * x0;
    const auto product1 = uint64_t(0xCD9E8D57u) * x2;
    x0 = Word(product1 >> 32) ^ x1 ^ key0;
    x2 = Word(product0 >> 32) ^ x3 ^ key1;
    x1 = Word(product1);
    x3 = Word(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// What the numbers of a draw are a function of, beside sample and element: normal i mod 4 of the Philox counter
// (i div 4, first_sample + b, iteration, stream) with key = seed is that of element i, in the order (C, H, W), of the
// b-th image.
struct RngKey {
  uint64_t seed;
  uint32_t stream, iteration, first_sample;

  FASTDMD_INLINE static RngKey read(const int64_t* key /* [4] */) {
    return {uint64_t(key[0]), uint32_t(key[1]), uint32_t(key[2]), uint32_t(key[3])};
  }
};

FASTDMD_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

FASTDMD_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ln(u) for u in (0, 1], without a branch: u = 2^e m with m in [sqrt(1/2), sqrt(2)), and a polynomial in m - 1.
FASTDMD_INLINE float log_unit(float u) {
  const uint32_t shifted = bits_of(u) - 0x3F3504F3u;  // bits of sqrt(1/2)
  const float e = float(int32_t(shifted) >> 23);
  const float f = float_of((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float z = f * f;
  return f + (p * f * z - 0.5f * z) + e * 0.693147180559945f;
}

// sin(pi t) and cos(pi t) for t in [-1, 1], to 2e-7: a quarter turn q and a rest r in [-1/4, 1/4].
FASTDMD_INLINE void sincospi_unit(float t, float& sine, float& cosine) {
  const float shifted = 2.0f * t + 0x1.8p23f;  // the addition rounds 2 t to q, and the lowest bits hold it
  const float r = t - 0.5f * (shifted - 0x1.8p23f);
  const uint32_t quarter = bits_of(shifted);
  const float z = r * r;
  float s = -0.5992645293f;
  s = s * z + 2.5501640399f;
  s = s * z - 5.1677127800f;
  s = (s * z + 3.1415926536f) * r;
  float c = 0.2353306303f;
  c = c * z - 1.3352627689f;
  c = c * z + 4.0587121264f;
  c = c * z - 4.9348022005f;
  c = c * z + 1.0f;
  const float a = (quarter & 1) ? c : s, b = (quarter & 1) ? s : c;
  sine = float_of(bits_of(a) ^ (quarter << 30 & 0x80000000u));
  cosine = float_of(bits_of(b) ^ ((quarter + 1) << 30 & 0x80000000u));
}

// Two standard normals from two random words (Box and Muller 1958). Both conversions are of 31 bits and a sign,
// because unsigned ones cost three instructions more.
FASTDMD_INLINE void box_muller(uint32_t a, uint32_t b, float& normal0, float& normal1) {
  const float u = float(int32_t(a >> 1)) * 0x1p-31f + 0x1p-32f;  // (0, 1]
  const float radius = sqrtf(-2.0f * log_unit(u));
  float sine, cosine;
  sincospi_unit(float(int32_t(b)) * 0x1p-31f, sine, cosine);
  normal0 = radius * cosine;
  normal1 = radius * sine;
}

// EDM preconditioning (Karras et al. 2022, table 1), in a form that holds for infinite sigma or sigma_data, too.
template <class T>
FASTDMD_INLINE T c_skip(T sigma, T sigma_data) {
  const T ratio = sigma / sigma_data;
  return 1 / (1 + ratio * ratio);
}

template <class T>
FASTDMD_INLINE T loss_weight(T sigma, T sigma_data) {  // 1 / c_out^2
  return 1 / (sigma * sigma) + 1 / (sigma_data * sigma_data);
}

template <class T>
FASTDMD_INLINE T c_out(T sigma, T sigma_data) {
  return 1 / std::sqrt(loss_weight(sigma, sigma_data));
}

// The weight of a sample is its mean |p_real|, but not less than eps. NaN stays.
template <class T>
FASTDMD_INLINE T at_least(T x, T least) {
  return x < least ? least : x;
}

}  // namespace fastdmd
