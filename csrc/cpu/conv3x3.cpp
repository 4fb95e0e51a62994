// 3x3 convolutions of channels_last images by Winograd's minimal filtering, F(4x4, 3x3) or F(2x2, 3x3) (Lavin & Gray
// 2016): 36 multiplications for 16 outputs, or 16 for 4, where the definition has 9 for each. A tile is up to OUT x OUT
// outputs and the inputs that they depend on, IN x IN; of a block of tiles everything stays in the cache, in float32
// whatever the images are of, T.
#include "conv3x3_weight.h"
#include "winograd_tiles.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

template <class F>
constexpr int64_t TILES = Conv3x3::block_steps(F::OUT) * Conv3x3::TILE_STEP;

// Input channels whose weights are transformed at once, just before their products.
template <class F>
constexpr int64_t PIECE = F::OUT == 4 ? 64 : 128;

// A^T M A of the products of a block of tiles and a panel of so many vectors, plus bias. (One function for panels of
// all widths, which depend on the number of threads: elsewhere the compiler may contract other additions.)
template <class F, class T>
void write_outputs(const Conv3x3& a,
                   const Block<F, TILES<F>>& block,
                   const float* products,  // [IN^2, PRODUCTS]
                   int64_t o,
                   int vectors) {
  constexpr int IN = F::IN, OUT = F::OUT;
  block.each_tile([&](auto has, const Step& of, int64_t t, int64_t pixel, int64_t top, int64_t left) {
    const int64_t height = a.height - top, width = a.width - left;  // what the image still has
    for (int n = 0; n < vectors; ++n) {
      V m[IN][IN], y[OUT][OUT];
#pragma GCC unroll 36
      for (int e = 0; e < IN * IN; ++e)
        m[e / IN][e % IN] = has(of, e) ? load_vector(products + e * block.PRODUCTS + (t * vectors + n) * LANES) : V{};
      on_both_axes<F::output>(m, y);
      const V bias = a.bias ? load_vector(static_cast<const T*>(a.bias) + o + n * LANES) : V{};
      T* to = static_cast<T*>(a.y) + pixel * a.y_channels + o + n * LANES;
#pragma GCC unroll 4
      for (int row = 0; row < OUT; ++row)
#pragma GCC unroll 4
        for (int column = 0; column < OUT; ++column)
          if (row < height && column < width)
            store_vector(to + (row * a.width + column) * a.y_channels, y[row][column] + bias);
    }
  });
}

// G g G^T of LANES output channels from o on and input channels [begin, end): columns of matrices [IN^2, rows, width].
template <class F, class T>
void transform_weights(const Conv3x3& a,
                       int64_t o,
                       int64_t begin,
                       int64_t end,
                       float* out,  // their place in the first row
                       int64_t rows,
                       int64_t width) {
  constexpr int IN = F::IN;
  for (int64_t first = begin; first < end; first += LANES) {
    V w[3][3][LANES];
    load_weights<T>(a, o, first, w);
    for (int k = 0; k < LANES; ++k) {
      V g[3][3], transformed[IN][IN];
#pragma GCC unroll 9
      for (int n = 0; n < 9; ++n) g[n / 3][n % 3] = w[n / 3][n % 3][k];
      on_both_axes<F::weight>(g, transformed);
#pragma GCC unroll 36
      for (int e = 0; e < IN * IN; ++e)
        store_vector(out + (e * rows + first - begin + k) * width, transformed[e / IN][e % IN]);
    }
  }
}

template <class F, class T>
void transform_panels(const Conv3x3& a, int64_t begin, int64_t end) {
  for (int64_t o = begin * Conv3x3::CHANNEL_STEP; o < end * Conv3x3::CHANNEL_STEP; o += LANES) {
    const int64_t start = o / WIDTH * WIDTH, width = start + WIDTH < a.out_channels ? WIDTH : a.out_channels - start;
    float* out = a.transformed + start * F::IN * F::IN * a.rows() + (o - start);
    transform_weights<F, T>(a, o, 0, a.in_channels, out, a.rows(), width);
  }
}

template <class F, class T>
void convolve(const Conv3x3& a, int64_t begin, int64_t end) {
  constexpr int NUM_MATRICES = F::IN * F::IN;
  const bool by_pieces = !a.transformed;
  const int64_t piece = by_pieces && PIECE<F> < a.in_channels ? PIECE<F> : a.in_channels;
  const int64_t rows = piece + 1;  // as of Conv3x3::rows()
  const int64_t panels = (a.out_channels + WIDTH - 1) / WIDTH, pieces = (a.in_channels + piece - 1) / piece;
  const int64_t steps = end - begin < Block<F, TILES<F>>::MAX_STEPS ? end - begin : Block<F, TILES<F>>::MAX_STEPS;
  Inputs<F, T> inputs(a, steps * Conv3x3::TILE_STEP, piece);
  Scratch products(NUM_MATRICES * Block<F, TILES<F>>::PRODUCTS), own(by_pieces ? NUM_MATRICES * rows * WIDTH : 0);
  each_block<F, T, TILES<F>>(a, begin, end, panels * pieces * NUM_MATRICES, [&](const auto& block, auto prefetch) {
    inputs.fill(block);
    each_panel(a.out_channels, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      const float* weights = by_pieces ? own.data : a.transformed + o * NUM_MATRICES * rows;
      for (int64_t i = 0; i < a.in_channels; i += piece) {
        const int64_t depth = i + piece < a.in_channels ? piece : a.in_channels - i;
        for (int n = 0; n < N && by_pieces; ++n)
          transform_weights<F, T>(a, o + n * LANES, i, i + depth, own.data + n * LANES, rows, N * LANES);
        for (int e = 0; e < NUM_MATRICES; ++e, prefetch())
          block.each_run(e, [&](int64_t first, int64_t count) {
            for (int64_t row = first; row < first + rounded_up(count); row += ROWS)
              multiply<N>(i > 0 ? Before::continued : Before::dropped,
                          inputs.at(e, row, i),
                          inputs.group,
                          1,
                          weights + e * rows * N * LANES,
                          N * LANES,
                          nullptr,
                          products.data + e * block.PRODUCTS + row * N * LANES,
                          N * LANES,
                          depth);
          });
      }
      write_outputs<F, T>(a, block, products.data, o, N);
    });
  });
}

}  // namespace

// G g G^T of output channels [begin, end) * CHANNEL_STEP: panels of WIDTH output channels, in each the matrices
// [in_channels, WIDTH], the last panel narrower.
void conv3x3_weights(const Conv3x3& a, int64_t begin, int64_t end) {
  with_tiles(a, [&]<class F, class T>() { transform_panels<F, T>(a, begin, end); });
}

// The steps [begin, end), each of a kind of tiles.
void conv3x3(const Conv3x3& a, int64_t begin, int64_t end) {
  with_tiles(a, [&]<class F, class T>() { convolve<F, T>(a, begin, end); });
}

}  // namespace fastdmd::FASTDMD_ISA
