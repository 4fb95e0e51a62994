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
  const void* x;       // [B, C, H, W]
  const void* grad_y;  // [B, C, H, W], backward only
  void* out;           // [B, C, H, W]: y, or grad_x
  void* mean;          // [B, G], wide, written by forward, read by backward
  void* rstd;          // [B, G], likewise
  void* sums;          // [B, C] pairs, wide, written by backward: sums over pixels of grad_m and of grad_m * h
  void* grad_x_sums;   // [B, C], wide, written by backward if there is an x_offset: sums over pixels of grad_x
  Values weight;       // [C]
  Values bias;         // [C]
  Values scale;        // [B, C], or null
  Values shift;        // [B, C], or null
  Values x_offset;     // [B, C] or [1, C], added to x, or null
  Dtype dtype;
  bool channels_last, silu;
  int64_t num_samples, num_channels, num_groups, num_pixels;
  double eps;

  __host__ __device__ int64_t group_size() const { return num_channels / num_groups; }
};

// What is added to x.
template <class W>
__device__ __forceinline__ W x_offset(const GroupNorm& a, int64_t sample, int64_t c) {
  return a.x_offset.data ? a.x_offset.at<W>(sample, c) : W(0);
}

// Of one channel of one sample: h = (x - mean) * rstd, m = gain * (x - mean) + offset, y = m * sigmoid(m) or m, and
// d(m) / d(h) = slope. The mean is that of the group without what is added to x.
template <class W>
struct Channel {
  W mean, rstd, slope, gain, offset;

  __device__ __forceinline__ Channel(const GroupNorm& a, int64_t sample, int64_t c, W mean, W rstd)
      : mean(mean - x_offset<W>(a, sample, c)), rstd(rstd) {
    const W multiplier = a.scale.data ? W(1) + a.scale.at<W>(sample, c) : W(1);
    slope = a.weight.at<W>(c) * multiplier;
    gain = rstd * slope;
    offset = a.bias.at<W>(c) * multiplier + (a.shift.data ? a.shift.at<W>(sample, c) : W(0));
  }
};

// Writes the sum over pixels of grad_x = rstd * slope * grad_m - constant - linear * (x - mean) from those of grad_m
// and x - mean.
template <class W>
__device__ __forceinline__ void write_grad_x_sum(
    const GroupNorm& a, int64_t sample, int64_t c, W gain, W grad_m, W constant, W linear, W deviations) {
  static_cast<W*>(a.grad_x_sums)[sample * a.num_channels + c] =
      gain * grad_m - W(a.num_pixels) * constant - linear * deviations;
}

// Whether a vector is of one channel, at a 16-byte boundary.
inline bool contiguous_vectors(const GroupNorm& op) {
  const int64_t width = 16 / element_bytes(op.dtype);
  return !op.channels_last && op.dtype != Dtype::float64 && op.num_pixels % width == 0 &&
         aligned({op.x, op.grad_y, op.out});
}

// Calls body with whether there is a SiLU, as a constant.
template <class Body>
__device__ __forceinline__ void if_silu(const GroupNorm& a, Body body) {
  if (a.silu)
    body(std::true_type{});
  else
    body(std::false_type{});
}

// Within 2e-7 of the sigmoid everywhere, 0 and 1 at the infinities.
__device__ __forceinline__ float sigmoid(float m) {
  return fast_reciprocal(1.0f + fast_exp2(-1.4426950408889634f * m));
}
__device__ __forceinline__ double sigmoid(double m) { return 1 / (1 + exp(-m)); }

template <bool Silu, class W>
__device__ __forceinline__ W activation(W m) {
  return Silu ? m * sigmoid(m) : m;
}
template <class W>
__device__ __forceinline__ W activation(const GroupNorm& a, W m) {
  return a.silu ? activation<true>(m) : m;
}

template <bool Silu, class W>
__device__ __forceinline__ W activation_derivative(W m) {
  if constexpr (!Silu) return W(1);
  const W s = sigmoid(m);
  return s * (1 + m * (1 - s));
}
template <class W>
__device__ __forceinline__ W activation_derivative(const GroupNorm& a, W m) {
  return a.silu ? activation_derivative<true>(m) : W(1);
}

extern __shared__ __align__(16) float shared[];

// to[k] = table[k] of a thread's channels, 16 bytes at a time as everything in shared memory
template <int V>
__device__ __forceinline__ void look_up(const float* table,  // [V]
                                        float (&to)[V]) {
  load<false>(table, to);
}
template <int V>
__device__ __forceinline__ void put_down(float* table,  // [V]
                                         const float (&from)[V]) {
#pragma unroll
  for (int k = 0; k < V; k += 4)
    *reinterpret_cast<uint4*>(table + k) =
        make_uint4(bits_of(from[k]), bits_of(from[k + 1]), bits_of(from[k + 2]), bits_of(from[k + 3]));
}

// Puts mean, gain and offset of channel c of C into three tables.
__device__ __forceinline__ void tabulate(const Channel<float>& channel,
                                         float* tables,  // [3, C]
                                         int c,
                                         int C) {
  tables[c] = channel.mean;
  tables[C + c] = channel.gain;
  tables[2 * C + c] = channel.offset;
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
  // From any mean, not only that of these numbers.
  __device__ __forceinline__ W deviations_from(W mean, W count) const {
    const W distance = shift - mean;
    return sum_of_squares + distance * (2 * sum + count * distance);
  }
  __device__ __forceinline__ W deviations(W count) const {
    if (!(count > 0)) return 0;
    const W rest = sum_of_squares - sum * sum / count;
    return rest < 0 ? W(0) : rest;  // NaN stays
  }
};

}  // namespace
}  // namespace fastdmd
