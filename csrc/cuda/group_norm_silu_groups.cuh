// group_norm_silu with a block per sample and group: contiguous memory 16 bytes at a time (`*_vectors`: a vector is of
// one channel), and any layout, size and dtype one element at a time (`*_any`).
#pragma once

#include "group_norm_silu.cuh"

namespace fastdmd {
namespace {

struct alignas(16) Any {};  // in place of a dtype that is known at run time; as wide as a vector, so one fills it

template <class T, class W>
struct Access {
  static constexpr int V = 16 / int(sizeof(T));

  static __device__ __forceinline__ void load(const GroupNorm& a,
                                              const void* from,  // [B, C, H, W]
                                              int64_t i,
                                              W (&to)[V]) {
    if constexpr (std::is_same_v<T, Any>)
      to[0] = read<W>(from, a.dtype, i);
    else
      fastdmd::load(static_cast<const T*>(from) + i, to);
  }
  static __device__ __forceinline__ void store(const GroupNorm& a, int64_t i, const W (&from)[V]) {
    if constexpr (std::is_same_v<T, Any>)
      write(a.out, a.dtype, i, from[0]);
    else
      fastdmd::store(static_cast<T*>(a.out) + i, from);
  }
};

// Where pixel p of channel c of a sample lies.
__device__ __forceinline__ int64_t place(const GroupNorm& a, int64_t sample, int64_t c, int64_t p) {
  return a.channels_last ? (sample * a.num_pixels + p) * a.num_channels + c
                         : (sample * a.num_channels + c) * a.num_pixels + p;
}

// A vector of a group, numbered in the order of memory.
struct Spot {
  int64_t c, p;
};

template <int V>
__device__ __forceinline__ Spot spot(const GroupNorm& a, int64_t first_channel, int64_t vector) {
  const int64_t run = a.channels_last ? a.group_size() : a.num_pixels;
  const int64_t row = divide(vector * V, run);
  const int64_t column = vector * V - row * run;
  return a.channels_last ? Spot{first_channel + column, row} : Spot{first_channel + row, column};
}

// A block has a group of a sample, and then every gridDim-th; a thread every blockDim-th vector of it.
template <class T, class W>
__device__ void group_forward(const GroupNorm& a) {
  constexpr int V = Access<T, W>::V;
  const int64_t group_size = a.group_size();
  const int64_t num_vectors = group_size * a.num_pixels / V;
  const W size = W(group_size * a.num_pixels);
  for (int64_t task = blockIdx.x; task < a.num_samples * a.num_groups; task += gridDim.x) {
    const int64_t sample = task / a.num_groups;
    const int64_t first_channel = task % a.num_groups * group_size;
    // Around the mean of the threads' first values: one of them may be what makes up the variance.
    W first = 0;
    if (threadIdx.x < num_vectors) {
      const Spot at = spot<V>(a, first_channel, threadIdx.x);
      W x[V];
      Access<T, W>::load(a, a.x, place(a, sample, at.c, at.p), x);
      first = x[0] + x_offset<W>(a, sample, at.c);
    }
    Moments<W> moments;
    moments.shift = block_sum(first) / W(num_vectors < blockDim.x ? num_vectors : blockDim.x);
    W count = 0;
    for (int64_t vector = threadIdx.x; vector < num_vectors; vector += blockDim.x) {
      const Spot at = spot<V>(a, first_channel, vector);
      W x[V];
      Access<T, W>::load(a, a.x, place(a, sample, at.c, at.p), x);
      const W added = x_offset<W>(a, sample, at.c);
#pragma unroll
      for (int k = 0; k < V; ++k) moments.add(x[k] + added);
      count += V;
    }
    const W own_mean = moments.mean(count);
    const W mean = block_sum(count * own_mean) / size;
    const W distance = own_mean - mean;
    const W variance = block_sum(moments.deviations(count) + (count > 0 ? count * distance * distance : W(0))) / size;
    const W rstd = 1 / sqrt(variance + W(a.eps));
    if (threadIdx.x == 0) {
      static_cast<W*>(a.mean)[task] = mean;
      static_cast<W*>(a.rstd)[task] = rstd;
    }
    for (int64_t vector = threadIdx.x; vector < num_vectors; vector += blockDim.x) {
      const Spot at = spot<V>(a, first_channel, vector);
      const int64_t i = place(a, sample, at.c, at.p);
      const Channel<W> channel(a, sample, at.c, mean, rstd);
      W x[V];
      Access<T, W>::load(a, a.x, i, x);
#pragma unroll
      for (int k = 0; k < V; ++k) x[k] = activation(a, channel.gain * (x[k] - channel.mean) + channel.offset);
      Access<T, W>::store(a, i, x);
    }
  }
}

// A block has a group of a sample, and then every gridDim-th; a warp its channels, one at a time, so that the sums of a
// channel need no other warp.
template <class T, class W>
__device__ void group_backward(const GroupNorm& a) {
  constexpr int V = Access<T, W>::V;
  const int64_t group_size = a.group_size();
  const W size = W(group_size * a.num_pixels);
  const int lane = int(threadIdx.x) % WARP;
  const int warp = int(threadIdx.x) / WARP;
  const int num_warps = int(blockDim.x) / WARP;
  for (int64_t task = blockIdx.x; task < a.num_samples * a.num_groups; task += gridDim.x) {
    const int64_t sample = task / a.num_groups;
    const int64_t first_channel = task % a.num_groups * group_size;
    const W mean = static_cast<const W*>(a.mean)[task];
    const W rstd = static_cast<const W*>(a.rstd)[task];
    // body(channel, c, place, x, grad_m) for every vector of the channels of this warp, after begin(c), before end(c)
    const auto each = [&](auto body, auto end) {
      for (int64_t c = first_channel + warp; c < first_channel + group_size; c += num_warps) {
        const Channel<W> channel(a, sample, c, mean, rstd);
        for (int64_t p = lane * V; p < a.num_pixels; p += WARP * V) {
          const int64_t i = place(a, sample, c, p);
          W x[V], grad_m[V];
          Access<T, W>::load(a, a.x, i, x);
          Access<T, W>::load(a, a.grad_y, i, grad_m);
#pragma unroll
          for (int k = 0; k < V; ++k)
            grad_m[k] *= activation_derivative(a, channel.gain * (x[k] - channel.mean) + channel.offset);
          body(channel, i, x, grad_m);
        }
        end(channel, c);
      }
    };
    W grad = 0, grad_h = 0, grad_x = 0;  // of the channel at hand, this thread's part
    W group_grad = 0, group_grad_h = 0;  // of this warp's channels, times the slope
    each(
        [&](const Channel<W>& channel, int64_t, W(&x)[V], W(&grad_m)[V]) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            grad += grad_m[k];
            grad_h += grad_m[k] * ((x[k] - channel.mean) * rstd);
          }
        },
        [&](const Channel<W>& channel, int64_t c) {
          const Pair<W> sums{warp_sum(grad), warp_sum(grad_h)};
          if (lane == 0) static_cast<Pair<W>*>(a.sums)[sample * a.num_channels + c] = sums;
          group_grad += channel.slope * sums.first;
          group_grad_h += channel.slope * sums.second;
          grad = grad_h = 0;
        });
    const W S1 = block_sum(lane == 0 ? group_grad : W(0)) / size;
    const W S2 = block_sum(lane == 0 ? group_grad_h : W(0)) / size;
    each(
        [&](const Channel<W>& channel, int64_t i, W(&x)[V], W(&grad_m)[V]) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            x[k] = rstd * (channel.slope * grad_m[k] - S1 - (x[k] - channel.mean) * rstd * S2);
            grad_x += x[k];
          }
          Access<T, W>::store(a, i, x);
        },
        [&](const Channel<W>&, int64_t c) {
          if (!a.x_offset.data) return;
          const W sum = warp_sum(grad_x);
          if (lane == 0) static_cast<W*>(a.grad_x_sums)[sample * a.num_channels + c] = sum;
          grad_x = 0;
        });
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) group_norm_silu_vectors(GroupNorm a) {
  group_forward<T, float>(a);
}

template <class W>
__global__ void __launch_bounds__(THREADS, 3) group_norm_silu_any(GroupNorm a) {
  group_forward<Any, W>(a);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) group_norm_silu_backward_vectors(GroupNorm a) {
  group_backward<T, float>(a);
}

template <class W>
__global__ void __launch_bounds__(THREADS, 2) group_norm_silu_backward_any(GroupNorm a) {
  group_backward<Any, W>(a);
}

}  // namespace
}  // namespace fastdmd
