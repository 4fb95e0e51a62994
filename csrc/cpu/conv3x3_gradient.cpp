// The gradients of weight and bias of conv3x3: products of transformed inputs and transformed gradients of outputs,
// summed over a block of tiles, are transformed back where they are in the cache, and then added up.
#include "conv3x3_weight.h"
#include "winograd_tiles.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

constexpr int64_t CHANNELS = Conv3x3::CHANNEL_STEP;

// A dY A^T of a block of tiles and a panel; bias_sums += the outputs.
template <class F, class T>
void transform_gradient(const Conv3x3& a,
                        const Block<F, F::SUM_TILES>& block,
                        float* matrices,    // [IN^2, PRODUCTS]
                        double* bias_sums,  // [out_channels]
                        int64_t o,
                        int vectors) {
  constexpr int IN = F::IN, OUT = F::OUT;
  V sums[VECTORS] = {};
  block.each_tile([&](auto has, const Step& of, int64_t t, int64_t pixel, int64_t top, int64_t left) {
    const int64_t height = a.height - top, width = a.width - left;  // what the image still has
    for (int n = 0; n < vectors; ++n) {
      const T* from = static_cast<const T*>(a.y) + pixel * a.y_channels + o + n * LANES;
      V g[OUT][OUT] = {}, transformed[IN][IN];
      V rows = {};
#pragma GCC unroll 4
      for (int row = 0; row < OUT; ++row) {
        V sum = {};
#pragma GCC unroll 4
        for (int column = 0; column < OUT; ++column) {
          if (row < height && column < width)
            g[row][column] = load_vector(from + (row * a.width + column) * a.y_channels);
          sum += g[row][column];
        }
        rows += sum;
      }
      sums[n] += rows;
      on_both_axes<F::gradient>(g, transformed);
#pragma GCC unroll 36
      for (int e = 0; e < IN * IN; ++e)
        if (has(of, e))
          store_vector(matrices + e * block.PRODUCTS + (t * vectors + n) * LANES, transformed[e / IN][e % IN]);
    }
  });
  for (int n = 0; n < vectors; ++n)
    for (int lane = 0; lane < LANES; ++lane) bias_sums[o + n * LANES + lane] += double(sums[n][lane]);
}

// Where the sums of input channel i and LANES output channels from o on are: [out_channels / LANES, in_channels, 9,
// LANES].
FASTDMD_INLINE float* sums_at(const Conv3x3& a, int64_t o, int64_t i) {
  return a.sums + (o * a.in_channels + i * LANES) * 9;
}

// a.sums = or, if `add`, += G^T S G of CHANNELS input channels from i on and a panel, where S are the products.
template <class F>
void add_sums(const Conv3x3& a,
              bool add,
              const float* products,  // [IN^2, CHANNELS, vectors * LANES]
              int64_t o,
              int64_t i,
              int vectors) {
  constexpr int IN = F::IN;
  for (int n = 0; n < vectors; ++n)
    for (int64_t k = 0; k < CHANNELS; ++k) {
      V s[IN][IN], g[3][3];
#pragma GCC unroll 36
      for (int e = 0; e < IN * IN; ++e)
        s[e / IN][e % IN] = load_vector(products + ((e * CHANNELS + k) * vectors + n) * LANES);
      on_both_axes<F::weight_gradient>(s, g);
      float* to = sums_at(a, o + n * LANES, i + k);
#pragma GCC unroll 9
      for (int m = 0; m < 9; ++m, to += LANES)
        store_vector(to, add ? load_vector(to) + g[m / 3][m % 3] : g[m / 3][m % 3]);
    }
}

template <class F, class T>
void sum_weight_gradient(const Conv3x3& a,
                         double* bias_sums,  // [out_channels]
                         int64_t begin,
                         int64_t end) {
  using Tiles = Block<F, F::SUM_TILES>;
  constexpr int NUM_MATRICES = F::IN * F::IN;
  for (int64_t n = 0; n < a.sums_size() && begin == end; ++n) a.sums[n] = 0;
  const int64_t steps = end - begin < Tiles::MAX_STEPS ? end - begin : Tiles::MAX_STEPS;
  Inputs<F, T> inputs(a, steps * Conv3x3::TILE_STEP, CHANNELS);
  Scratch gradients(NUM_MATRICES * Tiles::PRODUCTS), products(NUM_MATRICES * CHANNELS * WIDTH);
  const int64_t calls = (a.out_channels + WIDTH - 1) / WIDTH * (a.in_channels / CHANNELS) * NUM_MATRICES;
  bool add = false;
  each_block<F, T, F::SUM_TILES>(a, begin, end, calls, [&](const Tiles& block, auto prefetch) {
    inputs.fill(block);
    each_panel(a.out_channels, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      transform_gradient<F, T>(a, block, gradients.data, bias_sums, o, N);
      for (int64_t i = 0; i < a.in_channels; i += CHANNELS) {
        for (int e = 0; e < NUM_MATRICES; ++e, prefetch()) {
          Before before = Before::dropped;
          block.each_run(e, [&](int64_t first, int64_t count) {
            for (int64_t k = 0; k < CHANNELS; k += ROWS)
              multiply<N>(before,
                          inputs.at(e, first, i + k),
                          1,
                          inputs.group,
                          gradients.data + e * block.PRODUCTS + first * N * LANES,
                          N * LANES,
                          nullptr,
                          products.data + (e * CHANNELS + k) * N * LANES,
                          N * LANES,
                          count);
            before = Before::added;
          });
          if (before == Before::dropped)  // no tile has this matrix
            for (int64_t n = 0; n < CHANNELS * N * LANES; ++n) products.data[e * CHANNELS * N * LANES + n] = 0;
        }
        add_sums<F>(a, add, products.data, o, i, N);
      }
    });
    add = true;
  });
}

template <class T>
void write_weight_gradient(const Conv3x3& a, int64_t num_sums, int64_t begin, int64_t end) {
  for (int64_t o = begin * CHANNELS; o < end * CHANNELS; o += LANES)
    for (int64_t first = 0; first < a.in_channels; first += LANES) {
      V w[3][3][LANES];
      for (int k = 0; k < LANES; ++k) {
        const float* from = sums_at(a, o, first + k);
#pragma GCC unroll 9
        for (int n = 0; n < 9; ++n) {
          V sum = {};
          for (int64_t part = 0; part < num_sums; ++part) sum += load_vector(from + part * a.sums_size() + n * LANES);
          w[n / 3][n % 3][k] = sum;
        }
      }
      store_weights<T>(a, o, first, w);
    }
}

}  // namespace

// Sums over the steps [begin, end): a.sums = what conv3x3_weight_gradient takes for the gradient of the weight,
// bias_sums += that of the bias. a.y is the gradient of the output.
void conv3x3_weight_sums(const Conv3x3& a,
                         double* bias_sums,  // [out_channels]
                         int64_t begin,
                         int64_t end) {
  with_tiles(a, [&]<class F, class T>() { sum_weight_gradient<F, T>(a, bias_sums, begin, end); });
}

// Writes a.weight, of output channels [begin, end) * CHANNEL_STEP: the sum of `num_sums` results of conv3x3_weight_sums
// that lie in a row in a.sums.
void conv3x3_weight_gradient(const Conv3x3& a, int64_t num_sums, int64_t begin, int64_t end) {
  with_tiles(a, [&]<class, class T>() { write_weight_gradient<T>(a, num_sums, begin, end); });
}

}  // namespace fastdmd::FASTDMD_ISA
