// 3x3 convolutions of channels_last images by Winograd's minimal filtering, F(4x4, 3x3) or F(2x2, 3x3) (Lavin & Gray
// 2016): 36 multiplications for 16 outputs, or 16 for 4, where the definition has 9 for each. A tile is up to OUT x OUT
// outputs and the inputs that they depend on, IN x IN; of a block of tiles everything stays in the cache, in float32
// whatever the images are of, T.
#include "winograd_tiles.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

// Calls body<F4 or F2, T>(), as the argument says.
template <class Body>
FASTDMD_INLINE void with_tiles(const Conv3x3& a, Body body) {
  const auto with_filter = [&]<class F>() {
    if (a.dtype == Dtype::bfloat16)
      body.template operator()<F, BFloat16>();
    else
      body.template operator()<F, float>();
  };
  if (a.tile == F4::OUT)
    with_filter.template operator()<F4>();
  else
    with_filter.template operator()<F2>();
}

// A^T M A of the products of a block of tiles and a panel of so many vectors, plus bias. (One function for panels of
// all widths, which depend on the number of threads: elsewhere the compiler may contract other additions.)
template <class F, class T>
void write_outputs(const Conv3x3& a,
                   const Block<F>& block,
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

// A dY A^T of a block of tiles and a panel; bias_sums += the outputs.
template <class F, class T>
void transform_gradient(const Conv3x3& a,
                        const Block<F>& block,
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

// body(from, to) for the elements (y, x) of LANES output channels from o on and LANES input channels from i on: `at`
// their first, w[y][x] what it is in registers.
template <class T, class W, class Body>
FASTDMD_INLINE void each_element(const Conv3x3& a, int64_t o, int64_t i, W (&w)[3][3][LANES], Body body) {
  T* first = static_cast<T*>(a.weight) + o * a.weight_out + i * a.weight_in;
  for (int y = 0; y < 3; ++y)
    for (int x = 0; x < 3; ++x)
      body(first + (a.flipped ? 2 - y : y) * a.weight_y + (a.flipped ? 2 - x : x) * a.weight_x, w[y][x]);
}

// w[y][x][k] = elements (y, x) of LANES output channels from o on and input channel i + k.
template <class T>
void load_weights(const Conv3x3& a, int64_t o, int64_t i, V (&w)[3][3][LANES]) {
  each_element<T>(a, o, i, w, [&](const T* at, V(&out)[LANES]) {
    if (a.weight_in == 1) {
      for (int lane = 0; lane < LANES; ++lane) out[lane] = load_vector(at + lane * a.weight_out);
      transpose(out);
      return;
    }
    for (int k = 0; k < LANES; ++k, at += a.weight_in)
      if (a.weight_out == 1)
        out[k] = load_vector(at);
      else
        for (int lane = 0; lane < LANES; ++lane) out[k][lane] = load(at[lane * a.weight_out]);
  });
}

// What load_weights loads. Overwrites w.
template <class T>
void store_weights(const Conv3x3& a, int64_t o, int64_t i, V (&w)[3][3][LANES]) {
  each_element<T>(a, o, i, w, [&](T* at, V(&in)[LANES]) {
    if (a.weight_in == 1) {
      transpose(in);
      for (int lane = 0; lane < LANES; ++lane) store_vector(at + lane * a.weight_out, in[lane]);
      return;
    }
    for (int k = 0; k < LANES; ++k, at += a.weight_in) {
      T lanes[LANES];
      store_vector(lanes, in[k]);
      for (int lane = 0; lane < LANES; ++lane) at[lane * a.weight_out] = lanes[lane];
    }
  });
}

// Where the LANES output channels from o on are in matrix 0 of their panel, and how wide that is.
template <class F>
FASTDMD_INLINE float* panel_at(const Conv3x3& a,
                               float* matrices,  // [IN^2 * rows() * out_channels]
                               int64_t o,
                               int64_t& width) {
  const int64_t start = o / WIDTH * WIDTH;
  width = start + WIDTH < a.out_channels ? WIDTH : a.out_channels - start;
  return matrices + start * F::IN * F::IN * a.rows() + (o - start);
}

template <class F, class T>
void transform_weights(const Conv3x3& a, int64_t begin, int64_t end) {
  constexpr int IN = F::IN;
  for (int64_t o = begin * Conv3x3::CHANNEL_STEP; o < end * Conv3x3::CHANNEL_STEP; o += LANES) {
    int64_t width;
    float* out = panel_at<F>(a, a.transformed, o, width);
    for (int64_t first = 0; first < a.in_channels; first += LANES) {
      V w[3][3][LANES];
      load_weights<T>(a, o, first, w);
      for (int k = 0; k < LANES; ++k) {
        V g[3][3], transformed[IN][IN];
#pragma GCC unroll 9
        for (int n = 0; n < 9; ++n) g[n / 3][n % 3] = w[n / 3][n % 3][k];
        on_both_axes<F::weight>(g, transformed);
#pragma GCC unroll 36
        for (int e = 0; e < IN * IN; ++e)
          store_vector(out + (e * a.rows() + first + k) * width, transformed[e / IN][e % IN]);
      }
    }
  }
}

// visit(block) for the blocks of steps [begin, end), and what brings the next one nearer meanwhile, over as many calls
// as there are panels and matrices.
template <class F, class T, class Visit>
FASTDMD_INLINE void each_block(const Conv3x3& a, int64_t begin, int64_t end, Visit visit) {
  const int64_t calls = (a.out_channels + WIDTH - 1) / WIDTH * F::IN * F::IN;
  for (int64_t first = begin; first < end; first += Block<F>::MAX_STEPS) {
    const Block<F> next(a, first + Block<F>::MAX_STEPS, end);
    Prefetch<F, T> x(next, static_cast<const T*>(a.x), a.in_channels, a.in_channels, 1, calls);
    Prefetch<F, T> y(next, static_cast<const T*>(a.y), a.y_channels, a.out_channels, 0, calls);
    visit(Block<F>(a, first, end), [&] {
      x.lines();
      y.lines();
    });
  }
}

template <class F, class T>
void convolve(const Conv3x3& a, int64_t begin, int64_t end) {
  constexpr int NUM_MATRICES = F::IN * F::IN;
  Inputs<F, T> inputs(a);
  Scratch products(NUM_MATRICES * Block<F>::PRODUCTS);
  each_block<F, T>(a, begin, end, [&](const Block<F>& block, auto prefetch) {
    inputs.fill(block);
    each_panel(a.out_channels, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      const float* weights = a.transformed + o * NUM_MATRICES * a.rows();
      for (int e = 0; e < NUM_MATRICES; ++e, prefetch())
        block.each_run(e, [&](int64_t first, int64_t count) {
          for (int64_t row = first; row < first + rounded_up(count); row += ROWS)
            multiply<N>(false,
                        inputs.matrices.data + e * inputs.step + row * inputs.depth,
                        inputs.depth,
                        1,
                        weights + e * a.rows() * N * LANES,
                        N * LANES,
                        nullptr,
                        products.data + e * block.PRODUCTS + row * N * LANES,
                        N * LANES,
                        inputs.depth);
        });
      write_outputs<F, T>(a, block, products.data, o, N);
    });
  });
}

template <class F, class T>
void sum_weight_gradient(const Conv3x3& a,
                         double* bias_sums,  // [out_channels]
                         int64_t begin,
                         int64_t end) {
  constexpr int NUM_MATRICES = F::IN * F::IN;
  Inputs<F, T> inputs(a);
  Scratch gradients(NUM_MATRICES * Block<F>::PRODUCTS);
  uint64_t begun = 0;  // matrices
  each_block<F, T>(a, begin, end, [&](const Block<F>& block, auto prefetch) {
    inputs.fill(block);
    uint64_t seen = begun;
    each_panel(a.out_channels, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      transform_gradient<F, T>(a, block, gradients.data, bias_sums, o, N);
      float* sums = a.transformed + o * NUM_MATRICES * a.rows();
      for (int e = 0; e < NUM_MATRICES; ++e, prefetch()) {
        bool add = begun >> e & 1;
        block.each_run(e, [&](int64_t first, int64_t count) {
          for (int64_t i = 0; i < a.in_channels; i += ROWS)
            multiply<N>(add,
                        inputs.matrices.data + e * inputs.step + first * inputs.depth + i,
                        1,
                        inputs.depth,
                        gradients.data + e * block.PRODUCTS + first * N * LANES,
                        N * LANES,
                        nullptr,
                        sums + (e * a.rows() + i) * N * LANES,
                        N * LANES,
                        count);
          add = true;
        });
        seen |= uint64_t(add) << e;
      }
    });
    begun = seen;
  });
  each_panel(a.out_channels, [&](int64_t o, auto vectors) {
    const int64_t size = a.rows() * vectors * LANES;
    for (int e = 0; e < NUM_MATRICES; ++e)
      for (int64_t i = 0; i < size && !(begun >> e & 1); ++i)
        a.transformed[o * NUM_MATRICES * a.rows() + e * size + i] = 0;
  });
}

template <class F, class T>
void write_weight_gradient(const Conv3x3& a, int64_t num_sums, int64_t begin, int64_t end) {
  constexpr int IN = F::IN;
  const int64_t size = a.transformed_size();
  for (int64_t o = begin * Conv3x3::CHANNEL_STEP; o < end * Conv3x3::CHANNEL_STEP; o += LANES) {
    int64_t width;
    const float* from = panel_at<F>(a, a.transformed, o, width);
    for (int64_t first = 0; first < a.in_channels; first += LANES) {
      V w[3][3][LANES];
      for (int k = 0; k < LANES; ++k) {
        V s[IN][IN] = {}, g[3][3];
        for (int64_t part = 0; part < num_sums; ++part)
#pragma GCC unroll 36
          for (int e = 0; e < IN * IN; ++e)
            s[e / IN][e % IN] += load_vector(from + part * size + (e * a.rows() + first + k) * width);
        on_both_axes<F::weight_gradient>(s, g);
#pragma GCC unroll 9
        for (int n = 0; n < 9; ++n) w[n / 3][n % 3][k] = g[n / 3][n % 3];
      }
      store_weights<T>(a, o, first, w);
    }
  }
}

}  // namespace

// G g G^T of output channels [begin, end) * CHANNEL_STEP: panels of WIDTH output channels, in each the matrices
// [in_channels, WIDTH], the last panel narrower.
void conv3x3_weights(const Conv3x3& a, int64_t begin, int64_t end) {
  with_tiles(a, [&]<class F, class T>() { transform_weights<F, T>(a, begin, end); });
}

// The steps [begin, end), each of a kind of tiles.
void conv3x3(const Conv3x3& a, int64_t begin, int64_t end) {
  with_tiles(a, [&]<class F, class T>() { convolve<F, T>(a, begin, end); });
}

// Sums over the steps [begin, end): a.transformed = what conv3x3_weight_gradient takes for the gradient of the weight,
// bias_sums += that of the bias. a.y is the gradient of the output.
void conv3x3_weight_sums(const Conv3x3& a,
                         double* bias_sums,  // [out_channels]
                         int64_t begin,
                         int64_t end) {
  with_tiles(a, [&]<class F, class T>() { sum_weight_gradient<F, T>(a, bias_sums, begin, end); });
}

// G^T S G of output channels [begin, end) * CHANNEL_STEP, where S is the sum of `num_sums` results of
// conv3x3_weight_sums that lie in a row in a.transformed. Writes a.weight.
void conv3x3_weight_gradient(const Conv3x3& a, int64_t num_sums, int64_t begin, int64_t end) {
  with_tiles(a, [&]<class F, class T>() { write_weight_gradient<F, T>(a, num_sums, begin, end); });
}

}  // namespace fastdmd::FASTDMD_ISA
