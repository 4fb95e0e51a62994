// group_norm_silu of contiguous images with a block per sample and group that reads memory once: the group, which is in
// one piece, stays in shared memory.
#pragma once

#include <cuda_pipeline.h>

#include "group_norm_silu.cuh"

namespace fastdmd {
namespace {

constexpr int PLANE_THREADS = 192;

// A team of lanes works on a channel at a time.
struct Planes {
  GroupNorm op;
  int team, num_teams;  // the number divides that of the channels, so that all teams of a warp stay together
  int words;            // of a channel: 16 bytes each

  __host__ __device__ int group_words() const { return int(op.group_size()) * words; }
  int64_t shared_bytes() const {
    return (op.grad_y ? 2 : 1) * 16 * int64_t(group_words()) + 3 * int64_t(sizeof(float)) * op.group_size();
  }
};

template <class Visit>
__device__ __forceinline__ void each_channel(const Planes& a, Visit visit) {
  for (int c = int(threadIdx.x) / a.team; c < int(a.op.group_size()); c += a.num_teams) visit(c);
}

// visit(i) for this lane's words of channel c: their places in the group
template <class Visit>
__device__ __forceinline__ void each_word(const Planes& a, int c, Visit visit) {
  for (int w = int(threadIdx.x) % a.team; w < a.words; w += a.team) visit(c * a.words + w);
}

__device__ __forceinline__ float team_sum(const Planes& a, float value) {
  for (int distance = a.team / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// A block has a group of a sample, a team of its lanes a channel at a time, a lane every team-th word of it.
template <class T>
__global__ void __launch_bounds__(PLANE_THREADS, 6) group_norm_planes(Planes a) {
  constexpr int V = 16 / int(sizeof(T));
  const int group_size = int(a.op.group_size());
  const int64_t task = blockIdx.x;
  const int64_t sample = task / a.op.num_groups;
  const int64_t start = task * a.group_words() * V;
  const int64_t first_channel = task % a.op.num_groups * group_size;
  uint4* tile = reinterpret_cast<uint4*>(shared);  // [group_words]
  float* slopes = shared + 4 * a.group_words();    // [group_size]
  float* offsets = slopes + group_size;            // [group_size]
  const T* x = static_cast<const T*>(a.op.x) + start;
  each_channel(a, [&](int c) { each_word(a, c, [&](int i) { __pipeline_memcpy_async(tile + i, x + i * V, 16); }); });
  __pipeline_commit();
  for (int c = int(threadIdx.x); c < group_size; c += int(blockDim.x)) {  // while the group is on its way
    const Channel<float> channel(a.op, sample, first_channel + c, 0.0f, 1.0f);
    slopes[c] = channel.slope;
    offsets[c] = channel.offset;
  }
  __pipeline_wait_prior(0);
  Moments<float> moments[V];
  float count = 0;
  each_channel(a, [&](int c) {
    const float added = x_offset<float>(a.op, sample, first_channel + c);
    each_word(a, c, [&](int i) {
      float values[V];
      load<false>(reinterpret_cast<const T*>(tile + i), values);
#pragma unroll
      for (int k = 0; k < V; ++k) values[k] += added;
      if (count == 0) {  // relative to some of the values, because one of them may be far from all others
        float shift = 0;
#pragma unroll
        for (int k = 0; k < V; ++k) shift += values[k] / V;
#pragma unroll
        for (int k = 0; k < V; ++k) moments[k].shift = shift;
      }
#pragma unroll
      for (int k = 0; k < V; ++k) moments[k].add(values[k]);
      count += V;
    });
  });
#pragma unroll
  for (int k = 1; k < V; ++k) {
    moments[0].sum += moments[k].sum;
    moments[0].sum_of_squares += moments[k].sum_of_squares;
  }
  const float size = float(group_size) * float(a.op.num_pixels);
  const float mean = block_sum(count * moments[0].shift + moments[0].sum) / size;
  const float squares = block_sum(moments[0].deviations_from(mean, count));
  const float rstd = 1 / sqrtf((squares < 0 ? 0.0f : squares) / size + float(a.op.eps));
  if (threadIdx.x == 0) {
    static_cast<float*>(a.op.mean)[task] = mean;
    static_cast<float*>(a.op.rstd)[task] = rstd;
  }
  T* y = static_cast<T*>(a.op.out) + start;
  if_silu(a.op, [&](auto silu) {
    each_channel(a, [&](int c) {
      const float gain = rstd * slopes[c], offset = offsets[c];
      const float centre = mean - x_offset<float>(a.op, sample, first_channel + c);
      each_word(a, c, [&](int i) {
        float values[V];
        load<false>(reinterpret_cast<const T*>(tile + i), values);
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = activation<decltype(silu)::value>(gain * (values[k] - centre) + offset);
        store(y + i * V, values);
      });
    });
  });
}

// x - mean and grad_m of a word
template <bool Silu, class T, int V>
__device__ __forceinline__ void load_both(const uint4* x,       // [1]
                                          const uint4* grad_y,  // [1]
                                          float mean,
                                          float gain,
                                          float offset,
                                          float (&centred)[V],
                                          float (&grad_m)[V]) {
  load<false>(reinterpret_cast<const T*>(x), centred);
  load<false>(reinterpret_cast<const T*>(grad_y), grad_m);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    centred[k] -= mean;
    grad_m[k] *= activation_derivative<Silu>(gain * centred[k] + offset);
  }
}

// A block has a group of a sample, a team of its lanes a channel at a time, a lane every team-th word of it.
template <class T>
__global__ void __launch_bounds__(PLANE_THREADS, 5) group_norm_backward_planes(Planes a) {
  constexpr int V = 16 / int(sizeof(T));
  const int group_size = int(a.op.group_size());
  const int64_t task = blockIdx.x;
  const int64_t sample = task / a.op.num_groups;
  const int64_t start = task * a.group_words() * V;
  const int64_t first_channel = task % a.op.num_groups * group_size;
  uint4* tile = reinterpret_cast<uint4*>(shared);  // [group_words]
  uint4* grad_tile = tile + a.group_words();       // [group_words]
  float* slopes = shared + 8 * a.group_words();    // [group_size]
  float* gains = slopes + group_size;              // [group_size]
  float* offsets = gains + group_size;             // [group_size]
  const T* x = static_cast<const T*>(a.op.x) + start;
  const T* grad_y = static_cast<const T*>(a.op.grad_y) + start;
  each_channel(a, [&](int c) {
    each_word(a, c, [&](int i) {
      __pipeline_memcpy_async(tile + i, x + i * V, 16);
      __pipeline_memcpy_async(grad_tile + i, grad_y + i * V, 16);
    });
  });
  __pipeline_commit();
  const float mean = static_cast<const float*>(a.op.mean)[task];
  const float rstd = static_cast<const float*>(a.op.rstd)[task];
  const auto grad_x_sum = [&](int c) -> float& {
    return static_cast<float*>(a.op.grad_x_sums)[sample * a.op.num_channels + first_channel + c];
  };
  for (int c = int(threadIdx.x); c < group_size; c += int(blockDim.x)) {  // while the group is on its way
    const Channel<float> channel(a.op, sample, first_channel + c, mean, rstd);
    slopes[c] = channel.slope;
    gains[c] = channel.gain;
    offsets[c] = channel.offset;
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  float group_grad = 0, group_grad_h = 0;
  if_silu(a.op, [&](auto silu) {
    each_channel(a, [&](int c) {
      const float centre = mean - x_offset<float>(a.op, sample, first_channel + c);
      float grad[2] = {}, grad_x[2] = {}, deviations = 0;
      each_word(a, c, [&](int i) {
        float centred[V], grad_m[V];
        load_both<decltype(silu)::value, T>(tile + i, grad_tile + i, centre, gains[c], offsets[c], centred, grad_m);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          grad[k % 2] += grad_m[k];
          grad_x[k % 2] += grad_m[k] * centred[k];
          deviations += centred[k];
        }
      });
      const Pair<float> sums{team_sum(a, grad[0] + grad[1]), rstd * team_sum(a, grad_x[0] + grad_x[1])};
      if (a.op.x_offset.data) deviations = team_sum(a, deviations);
      if (int(threadIdx.x) % a.team != 0) return;
      if (a.op.x_offset.data) grad_x_sum(c) = deviations;  // until all of the group is known
      static_cast<Pair<float>*>(a.op.sums)[sample * a.op.num_channels + first_channel + c] = sums;
      group_grad += slopes[c] * sums.first;
      group_grad_h += slopes[c] * sums.second;
    });
  });
  const float size = float(group_size) * float(a.op.num_pixels);
  const float constant = rstd * (block_sum(group_grad) / size);
  const float linear = rstd * rstd * (block_sum(group_grad_h) / size);
  T* out = static_cast<T*>(a.op.out) + start;
  if_silu(a.op, [&](auto silu) {
    each_channel(a, [&](int c) {
      const float gain = gains[c], offset = offsets[c];
      const float centre = mean - x_offset<float>(a.op, sample, first_channel + c);
      if (a.op.x_offset.data && int(threadIdx.x) % a.team == 0) {
        const float grad =
            static_cast<const Pair<float>*>(a.op.sums)[sample * a.op.num_channels + first_channel + c].first;
        write_grad_x_sum(a.op, sample, first_channel + c, gain, grad, constant, linear, grad_x_sum(c));
      }
      each_word(a, c, [&](int i) {
        float centred[V], grad_m[V];
        load_both<decltype(silu)::value, T>(tile + i, grad_tile + i, centre, gain, offset, centred, grad_m);
#pragma unroll
        for (int k = 0; k < V; ++k) centred[k] = gain * grad_m[k] - constant - linear * centred[k];
        store(out + i * V, centred);
      });
    });
  });
}

// ---- host

// How teams share a group, or nothing if it does not fit twice into a multiprocessor or leaves most threads idle.
inline std::optional<Planes> planes(const Device& device, const GroupNorm& op) {
  const int64_t width = 16 / element_bytes(op.dtype);
  const int64_t words = op.num_pixels / width;
  if (!contiguous_vectors(op) || op.num_samples * op.num_groups > INT_MAX) return std::nullopt;
  const int64_t limit = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024;
  if (op.group_size() * words > limit / 16) return std::nullopt;
  int team = WARP;
  while (team > words) team /= 2;
  for (int num_teams = PLANE_THREADS / team; num_teams * team >= PLANE_THREADS / 2; --num_teams) {
    const Planes a{.op = op, .team = team, .num_teams = num_teams, .words = int(words)};
    if (op.group_size() % num_teams == 0 && num_teams * team % WARP == 0 && a.shared_bytes() <= limit) return a;
  }
  return std::nullopt;
}

template <class Kernel>
bool launch_planes(const Device& device, const GroupNorm& op, Kernel kernel) {
  const std::optional<Planes> a = planes(device, op);
  if (!a) return false;
  device.prefer_shared_memory(kernel);
  device.launch(kernel, op.num_samples * op.num_groups, a->team * a->num_teams, *a, a->shared_bytes());
  return true;
}

}  // namespace
}  // namespace fastdmd
