// Products of matrices in pieces that stay in registers, which the convolutions are made of.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "vectors.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// Of a product, ROWS rows and VECTORS vectors of columns stay in registers, of which there are 32 or 16.
constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = 3;
constexpr int WIDTH = VECTORS * LANES;  // columns of a panel
constexpr int64_t PAD = 16;             // floats that keep matrices out of each other's cache lines

struct Scratch {
  float* data;  // [size]
  explicit Scratch(int64_t size) : data(static_cast<float*>(std::aligned_alloc(64, size_t(size * 4 + 64) / 64 * 64))) {
    if (!data) std::abort();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

// visit(first column, vectors of the panel as a constant) for the panels of so many columns
template <class Visit>
FASTDMD_INLINE void each_panel(int64_t columns, Visit visit) {
  for (int64_t first = 0; first < columns; first += WIDTH) {
    const int64_t vectors = (columns - first) / LANES;
    if (vectors >= 3)
      visit(first, std::integral_constant<int, 3>{});
    else if (vectors == 2)
      visit(first, std::integral_constant<int, 2>{});
    else
      visit(first, std::integral_constant<int, 1>{});
  }
}

// What becomes of the numbers that a product is written over.
enum class Before {
  dropped,
  added,     // to the sum, which starts from 0: over many calls a running sum would lose half a digit per factor of ten
  continued  // as the sum's first terms, so that pieces of a sum add up to what it is in one, bit by bit
};

// c[row, :] = (c[row, :], unless it is dropped) + (start, if there is one) + sum over k of a[row * row_step + k * step]
// * b[k, :], for ROWS rows and N vectors of columns.
template <int N>
FASTDMD_INLINE void multiply(Before before,
                             const float* a,  // [ROWS, depth], strided
                             int64_t row_step,
                             int64_t step,
                             const float* b,  // [depth, N * LANES], rows b_step apart
                             int64_t b_step,
                             const float* start,  // [N * LANES], or null
                             float* c,            // [ROWS, N * LANES], rows c_step apart
                             int64_t c_step,
                             int64_t depth) {
  V sums[ROWS][N] = {};
  const auto each = [&](auto body) {
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) body(sums[row][n], c + row * c_step + n * LANES, n);
  };
  if (before == Before::continued) each([](V& sum, const float* at, int) { sum = load_vector(at); });
  for (int64_t k = 0; k < depth; ++k) {
    V panel[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) panel[n] = load_vector(b + k * b_step + n * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const float value = a[row * row_step + k * step];
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[row][n] += value * panel[n];
    }
  }
  each([&](V& sum, float* at, int n) {
    if (before == Before::added) sum += load_vector(at);
    if (start) sum += load_vector(start + n * LANES);
    store_vector(at, sum);
  });
}

}  // namespace
}  // namespace fastdmd::FASTDMD_ISA
