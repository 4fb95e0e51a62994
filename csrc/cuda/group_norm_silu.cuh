// Arguments and arithmetic that all kernels of group_norm_silu share.
#pragma once

#include "reduce.cuh"

namespace fastdmd {
namespace {

template <class W>
struct alignas(2 * sizeof(W)) Pair {
  W first, second;
};

struct GroupNorm {
  const void* x;        // [B, C, H, W]
  const void* grad_y;   // [B, C, H, W], backward only
  void* out;            // [B, C, H, W]: y, or grad_x
  void *mean, *rstd;    // [B, G] wide; written by forward, read by backward
  void* sums;           // [B, C] pairs, wide, written by backward: sums over pixels of grad_m and of grad_m * h
  Values weight, bias;  // [C]
  Values scale, shift;  // [B, C], or null
  Dtype dtype;
  bool channels_last, silu;
  int64_t num_samples, num_channels, num_groups, num_pixels;
  double eps;

  __host__ __device__ int64_t group_size() const { return num_channels / num_groups; }
};

// Of one channel of one sample: h = (x - mean) * rstd, m = gain * (x - mean) + offset, y = m * sigmoid(m) or m, and
// d(m) / d(h) = slope.
template <class W>
struct Channel {
  W mean, rstd, slope, gain, offset;

  __device__ __forceinline__ Channel(const GroupNorm& a, int64_t sample, int64_t c, W mean, W rstd)
      : mean(mean), rstd(rstd) {
    const W multiplier = a.scale.data ? W(1) + a.scale.at<W>(sample, c) : W(1);
    slope = a.weight.at<W>(c) * multiplier;
    gain = rstd * slope;
    offset = a.bias.at<W>(c) * multiplier + (a.shift.data ? a.shift.at<W>(sample, c) : W(0));
  }
};

// The fast exponential and division are within 2e-7 of the sigmoid everywhere, 0 and 1 at the infinities.
__device__ __forceinline__ float sigmoid(float m) { return __fdividef(1.0f, 1.0f + __expf(-m)); }
__device__ __forceinline__ double sigmoid(double m) { return 1 / (1 + exp(-m)); }

template <class W>
__device__ __forceinline__ W activation(const GroupNorm& a, W m) {
  return a.silu ? m * sigmoid(m) : m;
}

template <class W>
__device__ __forceinline__ W activation_derivative(const GroupNorm& a, W m) {
  if (!a.silu) return W(1);
  const W s = sigmoid(m);
  return s + m * s * (1 - s);
}

// Mean and sum of squared deviations of numbers that come one by one. They are summed relative to `shift`, one of them,
// so that a mean far from 0 costs no digits.
template <class W>
struct Moments {
  W shift = 0, sum = 0, sum_of_squares = 0;

  __device__ __forceinline__ void add(W x) {
    const W d = x - shift;
    sum += d;
    sum_of_squares += d * d;
  }
  __device__ __forceinline__ W mean(W count) const { return count > 0 ? shift + sum / count : W(0); }
  __device__ __forceinline__ W deviations(W count) const {
    if (!(count > 0)) return 0;
    const W rest = sum_of_squares - sum * sum / count;
    return rest < 0 ? W(0) : rest;  // NaN stays
  }
};

}  // namespace
}  // namespace fastdmd
