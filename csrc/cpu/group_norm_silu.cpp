// GroupNorm, scale and shift, SiLU or not, and its backward: one sample, a range of its groups at a time.
#include <cstdlib>

#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {
namespace {

template <class W>
struct Scratch {  // no std::vector: its code would be shared between instruction sets
  W* data;        // [size]
  explicit Scratch(int64_t size) : data(static_cast<W*>(std::malloc(size_t(size > 0 ? size : 1) * sizeof(W)))) {
    if (!data) std::abort();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
  W& operator[](int64_t i) const { return data[i]; }
};

template <class W, int N>
struct Values {
  W value[N];
};

// The slice of a sample that a call works on: channels [first, first + channels), all pixels.
template <bool ChannelsLast>
struct Slice {
  int64_t first, channels, pixels, stride;

  Slice(const GroupNormSiLU& a, int64_t group_begin, int64_t group_end)
      : first(group_begin * (a.num_channels / a.num_groups)),
        channels((group_end - group_begin) * (a.num_channels / a.num_groups)),
        pixels(a.num_pixels),
        stride(ChannelsLast ? a.pixel_stride : a.channel_stride) {}

  int64_t offset() const { return ChannelsLast ? first : first * stride; }

  // body(channel of the slice, offset in x, place in a dense scratch)
  template <class Body>
  FASTDMD_INLINE void each(Body body) const {
    const int64_t rows = ChannelsLast ? pixels : channels;
    const int64_t columns = ChannelsLast ? channels : pixels;
    for (int64_t row = 0; row < rows; ++row)
#pragma omp simd
      for (int64_t column = 0; column < columns; ++column)
        body(ChannelsLast ? column : row, row * stride + column, row * columns + column);
  }

  // sums[k * channels + c] = sum over pixels of term(c, offset in x, place in a dense scratch).value[k], k < N
  template <class W, int N, class Term>
  FASTDMD_INLINE void sums(double* __restrict sums, Term term) const {
    constexpr int64_t run = 64;  // terms that float32 adds up before float64 takes over
    if constexpr (ChannelsLast) {
      Scratch<W> scratch(N * channels);
      W* __restrict partial = scratch.data;
      for (int64_t i = 0; i < N * channels; ++i) sums[i] = 0;
      for (int64_t start = 0; start < pixels; start += run) {
        const int64_t stop = start + run < pixels ? start + run : pixels;
        for (int64_t i = 0; i < N * channels; ++i) partial[i] = 0;
        for (int64_t p = start; p < stop; ++p)
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            const Values<W, N> terms = term(c, p * stride + c, p * channels + c);
            for (int k = 0; k < N; ++k) partial[k * channels + c] += terms.value[k];
          }
        for (int64_t i = 0; i < N * channels; ++i) sums[i] += double(partial[i]);
      }
    } else {
      constexpr int64_t lanes = 16;
      for (int64_t c = 0; c < channels; ++c) {
        double totals[N] = {};
        for (int64_t start = 0; start < pixels; start += run * lanes) {
          const int64_t stop = start + run * lanes < pixels ? start + run * lanes : pixels;
          W partial[N][lanes] = {};
          for (int64_t p = start; p < stop; p += lanes) {
            const int64_t width = p + lanes < stop ? lanes : stop - p;
#pragma omp simd
            for (int64_t lane = 0; lane < width; ++lane) {
              const Values<W, N> terms = term(c, c * stride + p + lane, c * pixels + p + lane);
              for (int k = 0; k < N; ++k) partial[k][lane] += terms.value[k];
            }
          }
          for (int k = 0; k < N; ++k)
            for (int64_t lane = 0; lane < lanes; ++lane) totals[k] += double(partial[k][lane]);
        }
        for (int k = 0; k < N; ++k) sums[k * channels + c] = totals[k];
      }
    }
  }
};

// Mean of per-channel sums over each group.
FASTDMD_INLINE void group_means(const double* sums,  // [channels]
                                int64_t channels,
                                int64_t group_size,
                                int64_t pixels,
                                double* means /* [channels / group_size] */) {
  for (int64_t c = 0; c < channels; c += group_size) {
    double total = 0;
    for (int64_t k = 0; k < group_size; ++k) total += sums[c + k];
    means[c / group_size] = total / (double(group_size) * double(pixels));
  }
}

// mean[i] such that x - mean[i] is the deviation of x + x_offset from the mean of its group.
template <class W>
FASTDMD_INLINE void centres(const GroupNormSiLU& a, int64_t first, int64_t channels, W* mean /* [channels] */) {
  const int64_t group_size = a.num_channels / a.num_groups;
  for (int64_t start = 0; start < channels; start += group_size)
    for (int64_t i = start; i < start + group_size; ++i)
      mean[i] = W(a.mean[(first + start) / group_size] - (a.x_offset ? a.x_offset[first + i] : 0));
}

// m = gain * (x - mean) + offset, per channel: normalisation, weight, bias, scale and shift. The mean stays apart, or
// the digits of a small deviation from a large mean would be lost.
template <class W>
FASTDMD_INLINE void affine(const GroupNormSiLU& a,
                           int64_t first,
                           int64_t channels,
                           W* gain,  // [channels]
                           W* offset /* [channels] */) {
  const int64_t group_size = a.num_channels / a.num_groups;
  for (int64_t start = 0; start < channels; start += group_size) {
    const int64_t g = (first + start) / group_size;
    for (int64_t i = start; i < start + group_size; ++i) {
      const int64_t c = first + i;
      const double multiplier = a.scale ? 1 + a.scale[c] : 1;
      const double addend = a.shift ? a.shift[c] : 0;
      gain[i] = W(a.rstd[g] * a.weight[c] * multiplier);
      offset[i] = W(a.bias[c] * multiplier + addend);
    }
  }
}

// y = m * sigmoid(m), or m.
template <bool Silu, class W>
FASTDMD_INLINE W activation(W m) {
  return Silu ? m * sigmoid(m) : m;
}

template <bool Silu, class W>
FASTDMD_INLINE W activation_derivative(W m) {
  if (!Silu) return W(1);
  const W s = sigmoid(m);
  return s + m * s * (1 - s);
}

template <class T, bool ChannelsLast, bool Silu>
void forward(const GroupNormSiLU& a, int64_t group_begin, int64_t group_end) {
  using W = Wide<T>;
  const Slice<ChannelsLast> slice(a, group_begin, group_end);
  const T* __restrict x = static_cast<const T*>(a.x) + slice.offset();
  T* __restrict y = static_cast<T*>(a.out) + slice.offset();
  const int64_t group_size = a.num_channels / a.num_groups;
  Scratch<double> sums(slice.channels);
  Scratch<W> tables(3 * slice.channels);
  W* __restrict mean = tables.data;              // [channels]
  W* __restrict gain = mean + slice.channels;    // [channels]
  W* __restrict offset = gain + slice.channels;  // [channels]
  slice.template sums<W, 1>(sums.data, [=](int64_t, int64_t i, int64_t) { return Values<W, 1>{load(x[i])}; });
  for (int64_t c = 0; c < slice.channels && a.x_offset; ++c)
    sums[c] += double(slice.pixels) * a.x_offset[slice.first + c];
  group_means(sums.data, slice.channels, group_size, slice.pixels, a.mean + group_begin);
  centres(a, slice.first, slice.channels, mean);
  slice.template sums<W, 1>(sums.data, [=](int64_t c, int64_t i, int64_t) {
    const W centred = load(x[i]) - mean[c];
    return Values<W, 1>{centred * centred};
  });
  group_means(sums.data, slice.channels, group_size, slice.pixels, a.rstd + group_begin);
  for (int64_t g = group_begin; g < group_end; ++g) a.rstd[g] = 1 / std::sqrt(a.rstd[g] + a.eps);

  affine(a, slice.first, slice.channels, gain, offset);
  slice.each([=](int64_t c, int64_t i, int64_t) {
    store(y[i], activation<Silu>(gain[c] * (load(x[i]) - mean[c]) + offset[c]));
  });
}

template <class T, bool ChannelsLast, bool Silu>
void backward(const GroupNormSiLU& a, int64_t group_begin, int64_t group_end) {
  using W = Wide<T>;
  const Slice<ChannelsLast> slice(a, group_begin, group_end);
  const T* __restrict x = static_cast<const T*>(a.x) + slice.offset();
  const T* __restrict grad_y = static_cast<const T*>(a.grad_y) + slice.offset();
  T* __restrict grad_x = static_cast<T*>(a.out) + slice.offset();
  const int64_t n = slice.channels;
  const int64_t group_size = a.num_channels / a.num_groups;
  Scratch<W> tables(5 * n);
  W* __restrict mean = tables.data;       // [n]
  W* __restrict gain = mean + n;          // [n]
  W* __restrict offset = mean + 2 * n;    // [n]
  W* __restrict by_x = mean + 3 * n;      // [n]
  W* __restrict constant = mean + 4 * n;  // [n]
  centres(a, slice.first, n, mean);
  affine(a, slice.first, n, gain, offset);

  // grad_m = grad_y * y'(m) goes where grad_x will be, or to a scratch if that is too narrow.
  constexpr bool in_place = std::is_same_v<T, W>;
  Scratch<W> scratch(in_place ? 0 : n * slice.pixels);
  W* __restrict grad_m = in_place ? reinterpret_cast<W*>(grad_x) : scratch.data;
  Scratch<double> both(2 * n), deviations(a.x_offset ? n : 0);
  slice.template sums<W, 2>(both.data, [=](int64_t c, int64_t i, int64_t dense) {
    const W centred = load(x[i]) - mean[c];
    const W g = load(grad_y[i]) * activation_derivative<Silu>(gain[c] * centred + offset[c]);
    grad_m[in_place ? i : dense] = g;
    return Values<W, 2>{g, g * centred};
  });

  if (a.x_offset)
    slice.template sums<W, 1>(deviations.data,
                              [=](int64_t c, int64_t i, int64_t) { return Values<W, 1>{load(x[i]) - mean[c]}; });

  for (int64_t start = 0; start < n; start += group_size) {
    const double size = double(group_size) * double(slice.pixels);
    const double r = a.rstd[(slice.first + start) / group_size];
    double S1 = 0, S2 = 0;
    for (int64_t i = start; i < start + group_size; ++i) {
      const int64_t c = slice.first + i;
      a.sum_grad[c] = both[i];
      a.sum_grad_h[c] = r * both[n + i];
      const double k = a.weight[c] * (a.scale ? 1 + a.scale[c] : 1);
      S1 += k * a.sum_grad[c];
      S2 += k * a.sum_grad_h[c];
    }
    for (int64_t i = start; i < start + group_size; ++i) {
      by_x[i] = W(-r * r * S2 / size);
      constant[i] = W(-r * S1 / size);
      const int64_t c = slice.first + i;
      const double k = a.weight[c] * (a.scale ? 1 + a.scale[c] : 1);
      if (a.x_offset)
        a.sum_grad_x[c] = r * (k * a.sum_grad[c] - (double(slice.pixels) * S1 + r * deviations[i] * S2) / size);
    }
  }
  slice.each([=](int64_t c, int64_t i, int64_t dense) {
    store(grad_x[i], (gain[c] * grad_m[in_place ? i : dense] + constant[c]) + by_x[c] * (load(x[i]) - mean[c]));
  });
}

// Calls body with a type of elements and, as constants, whether channels are neighbours and whether there is SiLU.
template <class Body>
void specialise(const GroupNormSiLU& a, Body body) {
  dispatch(a.dtype, [&](auto type) {
    const auto with_layout = [&](auto channels_last) {
      a.silu ? body(type, channels_last, std::true_type{}) : body(type, channels_last, std::false_type{});
    };
    a.channel_stride == 1 && a.num_channels > 1 ? with_layout(std::true_type{}) : with_layout(std::false_type{});
  });
}

}  // namespace

void group_norm_silu(const GroupNormSiLU& a, int64_t group_begin, int64_t group_end) {
  specialise(a, [&](auto type, auto channels_last, auto silu) {
    forward<decltype(type), channels_last, silu>(a, group_begin, group_end);
  });
}

void group_norm_silu_backward(const GroupNormSiLU& a, int64_t group_begin, int64_t group_end) {
  specialise(a, [&](auto type, auto channels_last, auto silu) {
    backward<decltype(type), channels_last, silu>(a, group_begin, group_end);
  });
}

}  // namespace fastdmd::FASTDMD_ISA
