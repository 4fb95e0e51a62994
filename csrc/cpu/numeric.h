// What the kernels share: half precision, exp, and loops that the compiler turns into vectors.
#pragma once

#include <limits>
#include <type_traits>

#include "../formulas.h"
#include "kernels.h"

namespace fastdmd {
namespace {  // each instruction set compiles its own copy

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

FASTDMD_INLINE float load(const float& x) { return x; }
FASTDMD_INLINE double load(const double& x) { return x; }
FASTDMD_INLINE float load(const BFloat16& x) { return float_of(uint32_t(x.bits) << 16); }
FASTDMD_INLINE float load(const Float16& x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
  const float finite = float_of(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : bits_of(finite);  // inf and NaN
  return float_of(bits | uint32_t(x.bits & 0x8000u) << 16);
}

FASTDMD_INLINE void store(float& out, float x) { out = x; }
FASTDMD_INLINE void store(float& out, double x) { out = float(x); }
FASTDMD_INLINE void store(double& out, double x) { out = x; }
FASTDMD_INLINE void store(BFloat16& out, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7FC0u);
}
FASTDMD_INLINE void store(Float16& out, float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // the addition rounds
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  out.bits = uint16_t((magnitude >= 0x477FF000u ? special : finite) | (bits >> 16 & 0x8000u));
}

// e^x to 1e-7 relative, of the nearest x in [-87.3, 87.3], whose power is a normal float; NaN counts as a limit.
FASTDMD_INLINE float exponential(float x) {
  // Compared as integers: after two comparisons of floats GCC 12 needs 1.5 times as long for group_norm_silu with
  // AVX-512, 2.6 times with AVX2.
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu, sign = bits_of(x) & 0x80000000u, limit = bits_of(87.3f);
  const float t = float_of((magnitude < limit ? magnitude : limit) | sign);
  // 1.5 * 2^23 is so large that the addition rounds to a whole number n, and 127 puts the exponent of 2^n in its bits.
  const float shifted = t * 1.44269504f + (0x1.8p23f + 127.0f);
  const float n = shifted - (0x1.8p23f + 127.0f);
  const float r = (t - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of(bits_of(shifted) << 23);
}
FASTDMD_INLINE double exponential(double x) { return std::exp(x); }

template <class W>
FASTDMD_INLINE W sigmoid(W x) {  // what it is multiplied by carries a NaN on
  return W(1) / (W(1) + exponential(-x));
}

template <class W>
FASTDMD_INLINE W finite_or_zero(W x) {
  return std::abs(x) <= std::numeric_limits<W>::max() ? x : W(0);
}

// Sum of term(i) for i in [begin, end): 64 running sums, of which each takes at most 64 terms in a row before they
// go to float64. The result does not depend on the instruction set's width.
template <class W, class Term>
FASTDMD_INLINE double sum(int64_t begin, int64_t end, Term term) {
  constexpr int lanes = 64, run = 64 * lanes;
  double total = 0;
  for (int64_t i = begin; i < end; i += run) {
    const int64_t stop = i + run < end ? i + run : end;
    W partial[lanes] = {};
    int64_t j = i;
    for (; j + lanes <= stop; j += lanes)
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) partial[lane] += term(j + lane);
    for (; j < stop; ++j) partial[0] += term(j);
    double run_total = 0;
    for (int lane = 0; lane < lanes; ++lane) run_total += double(partial[lane]);
    total += run_total;
  }
  return total;
}

// Calls body(T{}) with the type that `dtype` names.
template <class Body>
FASTDMD_INLINE auto dispatch(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float64: return body(double{});
    case Dtype::bfloat16: return body(BFloat16{});
    case Dtype::float16: return body(Float16{});
    default: return body(float{});
  }
}

}  // namespace
}  // namespace fastdmd
