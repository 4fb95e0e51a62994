// What the kernels of conv3x3 share: products of small matrices in registers, and the transformed inputs of tiles.
#pragma once

#include <cstdlib>

#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// Of a product, ROWS rows and VECTORS vectors of columns stay in registers, of which there are 32 or 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int VECTORS = 3;
constexpr int WIDTH = VECTORS * LANES;             // output channels of a panel
constexpr int64_t TILES = Conv3x3::BLOCK_TILES;    // of 2x2 outputs
constexpr int64_t PAD = 16;                        // floats that keep the 16 matrices out of each other's cache lines
constexpr int64_t PRODUCTS = TILES * WIDTH + PAD;  // from one matrix of a panel to the next
using V = float __attribute__((vector_size(LANES * sizeof(float))));

FASTDMD_INLINE V load_vector(const float* from /* [LANES] */) {
  V result;
  __builtin_memcpy(&result, from, sizeof(V));
  return result;
}
FASTDMD_INLINE void store_vector(float* to,  // [LANES]
                                 V x) {
  __builtin_memcpy(to, &x, sizeof(V));
}

// c[row, :] = (c[row, :] if `add`) + sum over k of a[row * row_step + k * step] * b[k, :], for ROWS rows and N vectors
// of columns. The sum over k starts from 0: over many calls a running sum would lose half a digit per factor of ten.
template <int N>
FASTDMD_INLINE void multiply(bool add,
                             const float* a,  // [ROWS, depth], strided
                             int64_t row_step,
                             int64_t step,
                             const float* b,  // [depth, N * LANES]
                             float* c,        // [ROWS, N * LANES]
                             int64_t depth) {
  V sums[ROWS][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V panel[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) panel[n] = load_vector(b + k * N * LANES + n * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const float value = a[row * row_step + k * step];
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[row][n] += value * panel[n];
    }
  }
  if (add)
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[row][n] += load_vector(c + (row * N + n) * LANES);
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) store_vector(c + (row * N + n) * LANES, sums[row][n]);
}

struct Scratch {
  float* data;  // [size]
  explicit Scratch(int64_t size)
      : data(static_cast<float*>(std::aligned_alloc(64, size_t((size * 4 + 63) / 64 * 64)))) {
    if (!data) std::abort();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

// B^T d B of a tile's 4x4 inputs.
FASTDMD_INLINE void transform_input(V (&d)[4][4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V d0 = d[0][j] - d[2][j];
    const V d1 = d[1][j] + d[2][j];
    const V d2 = d[2][j] - d[1][j];
    const V d3 = d[1][j] - d[3][j];
    d[0][j] = d0;
    d[1][j] = d1;
    d[2][j] = d2;
    d[3][j] = d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V d0 = d[i][0] - d[i][2];
    const V d1 = d[i][1] + d[i][2];
    const V d2 = d[i][2] - d[i][1];
    const V d3 = d[i][1] - d[i][3];
    d[i][0] = d0;
    d[i][1] = d1;
    d[i][2] = d2;
    d[i][3] = d3;
  }
}

// The tiles of all images, in a row.
struct Tiles {
  int64_t height, width, across, per_image, total;
  explicit Tiles(const Conv3x3& a)
      : height(a.height),
        width(a.width),
        across((a.width + 1) / 2),
        per_image(across * ((a.height + 1) / 2)),
        total(a.num_images * per_image) {}

  int64_t count(int64_t first) const { return first + TILES < total ? TILES : total - first; }

  // visit(number of the pixel of all images that tile t starts at, its row, its column)
  template <class Visit>
  FASTDMD_INLINE void at(int64_t t, Visit visit) const {
    const int64_t image = t / per_image, tile = t % per_image, top = tile / across * 2, left = tile % across * 2;
    visit((image * height + top) * width + left, top, left);
  }
};

int64_t rounded_up(int64_t count) { return (count + ROWS - 1) / ROWS * ROWS; }

// The 16 matrices [TILES, in_channels] of a block of tiles.
struct Inputs {
  const Conv3x3& a;
  const int64_t depth, step;
  Scratch matrices;  // [16, step]
  Scratch zeros;     // [depth]

  explicit Inputs(const Conv3x3& a)
      : a(a), depth(a.in_channels), step(TILES * depth + PAD), matrices(16 * step), zeros(depth) {
    for (int64_t i = 0; i < depth; ++i) zeros.data[i] = 0;
    for (int64_t i = 0; i < 16 * step; ++i) matrices.data[i] = 0;
  }

  void fill(const Tiles& tiles, int64_t first) {
    for (int64_t t = 0; t < tiles.count(first); ++t)
      tiles.at(first + t, [&](int64_t pixel, int64_t top, int64_t left) {
        const float* from[4][4];
        for (int64_t y = 0; y < 4; ++y)
          for (int64_t x = 0; x < 4; ++x) {
            const int64_t row = top + y - 1, column = left + x - 1;
            const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
            from[y][x] = inside ? a.x + (pixel + (y - 1) * a.width + x - 1) * depth : zeros.data;
          }
        for (int64_t c = 0; c < depth; c += LANES) {
          V d[4][4];
#pragma GCC unroll 16
          for (int e = 0; e < 16; ++e) d[e / 4][e % 4] = load_vector(from[e / 4][e % 4] + c);
          transform_input(d);
#pragma GCC unroll 16
          for (int e = 0; e < 16; ++e) store_vector(matrices.data + e * step + t * depth + c, d[e / 4][e % 4]);
        }
      });
  }
};

}  // namespace
}  // namespace fastdmd::FASTDMD_ISA
