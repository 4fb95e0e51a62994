// 1x1 convolutions of channels_last images: products of matrices, of which chunks of pixels stay in the cache.
#include "products.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

constexpr int64_t CHUNK = 96;  // pixels, a multiple of ROWS

}  // namespace

// a.matrix = the weight, transposed.
void conv1x1_weights(const Conv1x1& a) {
  for (int64_t o = 0; o < a.out_channels; o += LANES)
    for (int64_t i = 0; i < a.in_channels; i += LANES) {
      V w[LANES];
      for (int lane = 0; lane < LANES; ++lane) w[lane] = load_vector(a.weight + (o + lane) * a.in_channels + i);
      transpose(w);
      for (int lane = 0; lane < LANES; ++lane) store_vector(a.matrix + (i + lane) * a.out_channels + o, w[lane]);
    }
}

// Of pixels [begin, end) * STEP, as far as there are so many.
void conv1x1(const Conv1x1& a, int64_t begin, int64_t end) {
  const int64_t depth = a.in_channels, width = a.out_channels;
  begin *= a.STEP;
  end = end * a.STEP < a.num_pixels ? end * a.STEP : a.num_pixels;
  const int64_t whole = begin + (end - begin) / ROWS * ROWS;
  Scratch rest(ROWS * (depth + width));  // the last pixels, fewer than ROWS, and what becomes of them
  float *rest_x = rest.data, *rest_y = rest.data + ROWS * depth;
  for (int64_t i = 0; i < ROWS * depth; ++i) rest_x[i] = i < (end - whole) * depth ? a.x[whole * depth + i] : 0;
  for (int64_t first = begin; first < end; first += CHUNK) {
    const int64_t last = first + CHUNK < end ? first + CHUNK : end;
    each_panel(width, [&](int64_t o, auto vectors) {
      constexpr int N = vectors;
      for (int64_t p = first; p < last; p += ROWS)
        multiply<N>(Before::dropped,
                    p < whole ? a.x + p * depth : rest_x,
                    depth,
                    1,
                    a.matrix + o,
                    width,
                    a.bias ? a.bias + o : nullptr,
                    (p < whole ? a.y + p * width : rest_y) + o,
                    width,
                    depth);
    });
  }
  for (int64_t i = 0; i < (end - whole) * width; ++i) a.y[whole * width + i] = rest_y[i];
}

// The gradients of weight and bias, of output channels [begin, end) * STEP.
void conv1x1_parameters(const Conv1x1& a, int64_t begin, int64_t end) {
  const int64_t depth = a.in_channels, width = a.out_channels;
  begin *= a.STEP;
  end *= a.STEP;
  Scratch sums(end - begin);
  for (int64_t first = 0; first < a.num_pixels; first += CHUNK) {
    const int64_t pixels = first + CHUNK < a.num_pixels ? CHUNK : a.num_pixels - first;
    const float *x = a.x + first * depth, *grad_y = a.grad_y + first * width;
    each_panel(depth, [&](int64_t i, auto vectors) {
      constexpr int N = vectors;
      for (int64_t o = begin; o < end; o += ROWS)
        multiply<N>(first > 0 ? Before::added : Before::dropped,
                    grad_y + o,
                    1,
                    width,
                    x + i,
                    depth,
                    nullptr,
                    a.grad_weight + o * depth + i,
                    depth,
                    pixels);
    });
    for (int64_t o = begin; o < end; ++o) sums.data[o - begin] = 0;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t o = begin; o < end; ++o) sums.data[o - begin] += grad_y[p * width + o];
    for (int64_t o = begin; o < end; ++o) a.grad_bias[o] = (first > 0 ? a.grad_bias[o] : 0) + sums.data[o - begin];
  }
}

}  // namespace fastdmd::FASTDMD_ISA
