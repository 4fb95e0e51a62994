// Vectors of float32 as wide as the instruction set has them, from and to memory of float32 or bfloat16.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
using V = float __attribute__((vector_size(LANES * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(sizeof(V))));
using HalfBits = uint16_t __attribute__((vector_size(sizeof(V) / 2)));

FASTDMD_INLINE V load_vector(const float* from /* [LANES] */) {
  V result;
  __builtin_memcpy(&result, from, sizeof(V));
  return result;
}
FASTDMD_INLINE V load_vector(const BFloat16* from /* [LANES] */) {
#if defined(__AVX512F__)
  return V(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#else
  HalfBits bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return V(__builtin_convertvector(bits, Bits) << 16);
#endif
}
FASTDMD_INLINE void store_vector(float* to,  // [LANES]
                                 V x) {
  __builtin_memcpy(to, &x, sizeof(V));
}
FASTDMD_INLINE void store_vector(BFloat16* to,  // [LANES]
                                 V x) {
  const Bits bits = Bits(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Bits out = x == x ? rounded : Bits{} + 0x7FC0u;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(out)));
#else
  const HalfBits half = __builtin_convertvector(out, HalfBits);
  __builtin_memcpy(to, &half, sizeof(half));
#endif
}

// Elements of two vectors, one from each by turns, from element `first` on.
FASTDMD_INLINE V interleave(V a, V b, int first) {
#if defined(__clang__)
  V result;
  for (int lane = 0; lane < LANES; ++lane) result[lane] = (lane % 2 ? b : a)[first + lane / 2];
  return result;
#else
  Bits from;
  for (int lane = 0; lane < LANES; ++lane) from[lane] = uint32_t(first + lane / 2 + lane % 2 * LANES);
  return __builtin_shuffle(a, b, from);
#endif
}

// Rows become columns. Where row and column are bits of a position, to interleave the rows of the upper half with those
// of the lower one rotates the bits by one; after as many times as a row has bits they have changed places.
FASTDMD_INLINE void transpose(V (&x)[LANES]) {
  for (int bits = LANES; bits > 1; bits /= 2) {
    V y[LANES];
#pragma GCC unroll 8
    for (int row = 0; row < LANES / 2; ++row) {
      y[2 * row] = interleave(x[row], x[row + LANES / 2], 0);
      y[2 * row + 1] = interleave(x[row], x[row + LANES / 2], LANES / 2);
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; ++row) x[row] = y[row];
  }
}

}  // namespace
}  // namespace fastdmd::FASTDMD_ISA
