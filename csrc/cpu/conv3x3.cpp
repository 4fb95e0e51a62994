// 3x3 convolutions of channels_last float32 images by Winograd's minimal filtering, F(2x2, 3x3) (Lavin & Gray 2016):
// 16 multiplications where the definition has 36. A tile is 2x2 outputs and the 4x4 inputs that they depend on; of a
// block of tiles everything stays in the cache.
#include "winograd.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// Calls body(first output channel, vectors of the panel as a constant) for each panel.
template <class Body>
FASTDMD_INLINE void each_panel(const Conv3x3& a, Body body) {
  for (int64_t o = 0; o < a.out_channels; o += WIDTH) {
    const int64_t vectors = (a.out_channels - o) / LANES;
    if (vectors >= 3)
      body(o, std::integral_constant<int, 3>{});
    else if (vectors == 2)
      body(o, std::integral_constant<int, 2>{});
    else
      body(o, std::integral_constant<int, 1>{});
  }
}

// A^T M A of the products of a block of tiles and a panel, plus bias.
template <int N>
void write_outputs(const Conv3x3& a,
                   const Tiles& tiles,
                   const float* products,  // [16, PRODUCTS]
                   int64_t first,
                   int64_t o) {
  for (int64_t t = 0; t < tiles.count(first); ++t)
    tiles.at(first + t, [&](int64_t pixel, int64_t top, int64_t left) {
      const bool below = top + 1 < a.height, beside = left + 1 < a.width;
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        V m[4][4], half[2][4];
#pragma GCC unroll 16
        for (int e = 0; e < 16; ++e) m[e / 4][e % 4] = load_vector(products + e * PRODUCTS + (t * N + n) * LANES);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          half[0][j] = m[0][j] + m[1][j] + m[2][j];
          half[1][j] = m[1][j] - m[2][j] - m[3][j];
        }
        const V bias = a.bias ? load_vector(a.bias + o + n * LANES) : V{};
        float* to = a.y + pixel * a.out_channels + o + n * LANES;
        store_vector(to, half[0][0] + half[0][1] + half[0][2] + bias);
        if (beside) store_vector(to + a.out_channels, half[0][1] - half[0][2] - half[0][3] + bias);
        if (!below) continue;
        to += a.width * a.out_channels;
        store_vector(to, half[1][0] + half[1][1] + half[1][2] + bias);
        if (beside) store_vector(to + a.out_channels, half[1][1] - half[1][2] - half[1][3] + bias);
      }
    });
}

// A dY A^T of a block of tiles and a panel, zeros up to a whole number of ROWS; bias_sums += the outputs.
template <int N>
void transform_gradient(const Conv3x3& a,
                        const Tiles& tiles,
                        float* matrices,    // [16, PRODUCTS]
                        double* bias_sums,  // [out_channels]
                        int64_t first,
                        int64_t o) {
  V sums[N] = {};
  const auto put = [&](int64_t t, int n, int e, V x) {
    store_vector(matrices + e * PRODUCTS + (t * N + n) * LANES, x);
  };
  for (int64_t t = 0; t < tiles.count(first); ++t)
    tiles.at(first + t, [&](int64_t pixel, int64_t top, int64_t left) {
      const bool below = top + 1 < a.height, beside = left + 1 < a.width;
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        const float* from = a.y + pixel * a.out_channels + o + n * LANES;
        V g[2][2] = {};
        g[0][0] = load_vector(from);
        if (beside) g[0][1] = load_vector(from + a.out_channels);
        if (below) g[1][0] = load_vector(from + a.width * a.out_channels);
        if (below && beside) g[1][1] = load_vector(from + (a.width + 1) * a.out_channels);
        sums[n] += (g[0][0] + g[0][1]) + (g[1][0] + g[1][1]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const V g0 = i == 3 ? -g[1][0] : i == 0 ? g[0][0] : i == 1 ? g[0][0] + g[1][0] : g[0][0] - g[1][0];
          const V g1 = i == 3 ? -g[1][1] : i == 0 ? g[0][1] : i == 1 ? g[0][1] + g[1][1] : g[0][1] - g[1][1];
          put(t, n, i * 4, g0);
          put(t, n, i * 4 + 1, g0 + g1);
          put(t, n, i * 4 + 2, g0 - g1);
          put(t, n, i * 4 + 3, -g1);
        }
      }
    });
  for (int n = 0; n < N; ++n)
    for (int lane = 0; lane < LANES; ++lane) bias_sums[o + n * LANES + lane] += double(sums[n][lane]);
}

// Element (o, i, y, x) of the weight for LANES output channels.
FASTDMD_INLINE float* weight_at(const Conv3x3& a, int64_t o, int64_t i, int y, int x) {
  if (a.flipped) {
    y = 2 - y;
    x = 2 - x;
  }
  return a.weight + o * a.weight_out + i * a.weight_in + y * a.weight_y + x * a.weight_x;
}

// Where the LANES output channels from o on are in matrix 0 of their panel, and how wide that is.
FASTDMD_INLINE float* panel_at(const Conv3x3& a,
                               float* matrices,  // [16 * in_channels * out_channels]
                               int64_t o,
                               int64_t& width) {
  const int64_t start = o / WIDTH * WIDTH;
  width = start + WIDTH < a.out_channels ? WIDTH : a.out_channels - start;
  return matrices + start * 16 * a.in_channels + (o - start);
}

}  // namespace

// G g G^T of output channels [begin, end) * CHANNEL_STEP: panels of WIDTH output channels, in each the 16 matrices
// [in_channels, WIDTH], the last panel narrower.
void conv3x3_weights(const Conv3x3& a, int64_t begin, int64_t end) {
  for (int64_t o = begin * Conv3x3::CHANNEL_STEP; o < end * Conv3x3::CHANNEL_STEP; o += LANES) {
    int64_t width;
    float* out = panel_at(a, a.transformed, o, width);
    for (int64_t i = 0; i < a.in_channels; ++i) {
      V g[3][3], half[4][3];
      for (int y = 0; y < 3; ++y)
        for (int x = 0; x < 3; ++x) {
          const float* w = weight_at(a, o, i, y, x);
          if (a.weight_out == 1)
            g[y][x] = load_vector(w);
          else
            for (int lane = 0; lane < LANES; ++lane) g[y][x][lane] = w[lane * a.weight_out];
        }
      for (int x = 0; x < 3; ++x) {
        const V even = 0.5f * (g[0][x] + g[2][x]);
        const V odd = 0.5f * g[1][x];
        half[0][x] = g[0][x];
        half[1][x] = even + odd;
        half[2][x] = even - odd;
        half[3][x] = g[2][x];
      }
      for (int y = 0; y < 4; ++y) {
        const V even = 0.5f * (half[y][0] + half[y][2]);
        const V odd = 0.5f * half[y][1];
        const V row[4] = {half[y][0], even + odd, even - odd, half[y][2]};
        for (int x = 0; x < 4; ++x) store_vector(out + ((y * 4 + x) * a.in_channels + i) * width, row[x]);
      }
    }
  }
}

// The blocks [begin, end) of tiles.
void conv3x3(const Conv3x3& a, int64_t begin, int64_t end) {
  const Tiles tiles(a);
  Inputs inputs(a);
  Scratch products(16 * PRODUCTS);
  for (int64_t first = begin * TILES; first < end * TILES && first < tiles.total; first += TILES) {
    inputs.fill(tiles, first);
    each_panel(a, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      const float* weights = a.transformed + o * 16 * a.in_channels;
      for (int e = 0; e < 16; ++e)
        for (int64_t row = 0; row < rounded_up(tiles.count(first)); row += ROWS)
          multiply<N>(false,
                      inputs.matrices.data + e * inputs.step + row * inputs.depth,
                      inputs.depth,
                      1,
                      weights + e * inputs.depth * N * LANES,
                      products.data + e * PRODUCTS + row * N * LANES,
                      inputs.depth);
      write_outputs<N>(a, tiles, products.data, first, o);
    });
  }
}

// Sums over the blocks [begin, end) of tiles, of which there is one: a.transformed = what conv3x3_weight_gradient takes
// for the gradient of the weight, bias_sums += that of the bias. a.y is the gradient of the output.
void conv3x3_weight_sums(const Conv3x3& a,
                         double* bias_sums,  // [out_channels]
                         int64_t begin,
                         int64_t end) {
  const Tiles tiles(a);
  Inputs inputs(a);
  Scratch gradients(16 * PRODUCTS);
  for (int64_t first = begin * TILES; first < end * TILES && first < tiles.total; first += TILES) {
    inputs.fill(tiles, first);
    each_panel(a, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      transform_gradient<N>(a, tiles, gradients.data, bias_sums, first, o);
      float* sums = a.transformed + o * 16 * a.in_channels;
      for (int e = 0; e < 16; ++e)
        for (int64_t i = 0; i < a.in_channels; i += ROWS)
          multiply<N>(first > begin * TILES,
                      inputs.matrices.data + e * inputs.step + i,
                      1,
                      inputs.depth,
                      gradients.data + e * PRODUCTS,
                      sums + (e * a.in_channels + i) * N * LANES,
                      tiles.count(first));
    });
  }
}

// G^T S G of output channels [begin, end) * CHANNEL_STEP, where S is the sum of `num_sums` results of
// conv3x3_weight_sums that lie in a row in a.transformed. Writes a.weight.
void conv3x3_weight_gradient(const Conv3x3& a, int64_t num_sums, int64_t begin, int64_t end) {
  const int64_t size = 16 * a.in_channels * a.out_channels;
  for (int64_t o = begin * Conv3x3::CHANNEL_STEP; o < end * Conv3x3::CHANNEL_STEP; o += LANES) {
    int64_t width;
    const float* from = panel_at(a, a.transformed, o, width);
    for (int64_t i = 0; i < a.in_channels; ++i) {
      V s[4][4] = {}, half[3][4];
      for (int64_t part = 0; part < num_sums; ++part)
        for (int e = 0; e < 16; ++e)
          s[e / 4][e % 4] += load_vector(from + part * size + (e * a.in_channels + i) * width);
      for (int x = 0; x < 4; ++x) {
        const V sum = 0.5f * (s[1][x] + s[2][x]);
        half[0][x] = s[0][x] + sum;
        half[1][x] = 0.5f * (s[1][x] - s[2][x]);
        half[2][x] = sum + s[3][x];
      }
      for (int y = 0; y < 3; ++y) {
        const V sum = 0.5f * (half[y][1] + half[y][2]);
        const V row[3] = {half[y][0] + sum, 0.5f * (half[y][1] - half[y][2]), sum + half[y][3]};
        for (int x = 0; x < 3; ++x)
          for (int lane = 0; lane < LANES; ++lane) weight_at(a, o, i, y, x)[lane * a.weight_out] = row[x][lane];
      }
    }
  }
}

}  // namespace fastdmd::FASTDMD_ISA
