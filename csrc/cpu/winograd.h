// Winograd's transforms, with which conv3x3 computes.
#pragma once

#include "products.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// Minimal filtering of one axis (Lavin & Gray 2016): OUT outputs of a filter of 3 weights from IN inputs, y = A^T [(G
// g) * (B^T d)]. The transposed transforms are those of the gradient of the weight. On two axes, IN^2 multiplications.
//
// F(2, 3): polynomials through 0, 1, -1 and infinity.
struct F2 {
  static constexpr int OUT = 2, IN = 4;
  static constexpr int64_t SUM_TILES = 128;  // of a block

  // Which points so many outputs need: a bit each. One does without infinity, on which it does not depend.
  static constexpr uint64_t points(int64_t outputs) { return outputs == 2 ? 0b1111 : 0b0111; }
  static FASTDMD_INLINE void complete(int64_t, V (&)[4]) {}

  // B^T d
  static FASTDMD_INLINE void input(const V (&d)[4], V (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  // G g
  static FASTDMD_INLINE void weight(const V (&g)[3], V (&t)[4]) {
    const V even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    t[0] = g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = g[2];
  }
  // A^T m
  static FASTDMD_INLINE void output(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  // A g
  static FASTDMD_INLINE void gradient(const V (&g)[2], V (&t)[4]) {
    t[0] = g[0];
    t[1] = g[0] + g[1];
    t[2] = g[0] - g[1];
    t[3] = -g[1];
  }
  // G^T s
  static FASTDMD_INLINE void weight_gradient(const V (&s)[4], V (&g)[3]) {
    const V even = 0.5f * (s[1] + s[2]);
    g[0] = s[0] + even;
    g[1] = 0.5f * (s[1] - s[2]);
    g[2] = even + s[3];
  }
};

// F(4, 3): through 0, a, -a, b, -b and infinity. With a = 5/8 and b = 3/2, which float32 holds, it errs 1.8 times as
// much as the definition (96 channels, root mean square); with the usual 1 and 2 four times.
struct F4 {
  static constexpr int OUT = 4, IN = 6;
  static constexpr int64_t SUM_TILES = 64;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  static constexpr float at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

  // Three outputs do without infinity, on which they do not depend; two without 0, and one without -b, if inputs
  // beyond theirs are such that B^T d is 0 there. Then they err less than four do.
  static constexpr uint64_t points(int64_t outputs) {
    return outputs == 4 ? 0b111111 : outputs == 3 ? 0b011111 : outputs == 2 ? 0b011110 : 0b001110;
  }
  // Makes the inputs so.
  static FASTDMD_INLINE void complete(int64_t outputs, V (&d)[6]) {
    if (outputs == 1) d[3] = a2 * (d[1] - b * d[0]) + b * d[2];
    if (outputs <= 2) d[4] = (a2 + b2) * d[2] - a2 * b2 * d[0];
  }
  static FASTDMD_INLINE void input(const V (&d)[6], V (&t)[6]) {
    const V even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
    const V even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
    t[0] = d[4] - (a2 + b2) * d[2] + a2 * b2 * d[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = d[5] - (a2 + b2) * d[3] + a2 * b2 * d[1];
  }
  static FASTDMD_INLINE void weight(const V (&g)[3], V (&t)[6]) {
    const V even_a = at_a * (g[0] + a2 * g[2]), odd_a = at_a * a * g[1];
    const V even_b = at_b * (g[0] + b2 * g[2]), odd_b = at_b * b * g[1];
    t[0] = at_0 * g[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  }
  static FASTDMD_INLINE void output(const V (&m)[6], V (&y)[4]) {
    const V sum_a = m[1] + m[2], difference_a = a * (m[1] - m[2]);
    const V sum_b = m[3] + m[4], difference_b = b * (m[3] - m[4]);
    y[0] = m[0] + sum_a + sum_b;
    y[1] = difference_a + difference_b;
    y[2] = a2 * sum_a + b2 * sum_b;
    y[3] = a2 * difference_a + b2 * difference_b + m[5];
  }
  static FASTDMD_INLINE void gradient(const V (&g)[4], V (&t)[6]) {
    const V even_a = g[0] + a2 * g[2], odd_a = a * (g[1] + a2 * g[3]);
    const V even_b = g[0] + b2 * g[2], odd_b = b * (g[1] + b2 * g[3]);
    t[0] = g[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[3];
  }
  static FASTDMD_INLINE void weight_gradient(const V (&s)[6], V (&g)[3]) {
    const V sum_a = at_a * (s[1] + s[2]), sum_b = at_b * (s[3] + s[4]);
    g[0] = at_0 * s[0] + sum_a + sum_b;
    g[1] = at_a * a * (s[1] - s[2]) + at_b * b * (s[3] - s[4]);
    g[2] = a2 * sum_a + b2 * sum_b + s[5];
  }
};

// A transform of one axis, N values to K, on both axes of x.
template <auto TRANSFORM, int N, int K>
FASTDMD_INLINE void on_both_axes(const V (&x)[N][N], V (&y)[K][K]) {
  V half[K][N];  // transposed
#pragma GCC unroll 6
  for (int row = 0; row < N; ++row) {
    V out[K];
    TRANSFORM(x[row], out);
#pragma GCC unroll 6
    for (int k = 0; k < K; ++k) half[k][row] = out[k];
  }
#pragma GCC unroll 6
  for (int column = 0; column < K; ++column) {
    V out[K];
    TRANSFORM(half[column], out);
#pragma GCC unroll 6
    for (int k = 0; k < K; ++k) y[k][column] = out[k];
  }
}

}  // namespace
}  // namespace fastdmd::FASTDMD_ISA
