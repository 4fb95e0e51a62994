// group_norm_silu of channels_last images in one launch each way that reads memory once, tile by tile.
#pragma once

#include "group_norm_silu_tiles.cuh"

namespace fastdmd {
namespace {

// A block has its pixels of a tile, a thread the words of its Thread; a warp has the moments of a group at a time.
template <class T>
__global__ void __launch_bounds__(2 * TILE_THREADS, 2) group_norm_tiles(Tiles a) {
  const Thread<T, 2> thread(a);
  constexpr int V = thread.V;
  const int C = a.channels();
  const int lane = int(threadIdx.x) % WARP;
  uint4* tile = reinterpret_cast<uint4*>(shared);                 // [pixels, columns]
  float* scratch = shared + a.tile_bytes() / 4;                   // [scratch_floats]
  float* slopes = scratch + a.scratch_floats();                   // [C]
  float* offsets = slopes + C;                                    // [C]
  float* totals = offsets + C;                                    // [C]
  auto* moments_of = reinterpret_cast<Pair<float>*>(totals + C);  // [groups]: mean, sum of squared deviations

  const T* x = static_cast<const T*>(a.op.x);  // [B, H, W, num_channels]
  for (int stage = 0; stage < STAGES; ++stage) {
    thread.each(stage, [&](int word, int64_t i) { __pipeline_memcpy_async(tile + word, x + i, 16); });
    __pipeline_commit();
  }
  for (int c = int(threadIdx.x); c < C; c += int(blockDim.x)) {  // while the tile is on its way
    const Channel<float> channel(a.op, thread.sample, thread.first_channel + c, 0.0f, 1.0f);
    slopes[c] = channel.slope;
    offsets[c] = channel.offset;
  }
  Moments<float> moments[V];
  each_stage([&](int stage) {
    if (stage == 0 && thread.count > 0) {
      float values[V];
      load_shared<T>(tile + thread.word, values);
#pragma unroll
      for (int k = 0; k < V; ++k) moments[k].shift = values[k];
    }
    thread.each(stage, [&](int word, int64_t) {
      float values[V];
      load_shared<T>(tile + word, values);
#pragma unroll
      for (int k = 0; k < V; ++k) moments[k].add(values[k]);
    });
  });

  const float count = float(thread.count);
  const float size = float(a.op.group_size()) * float(a.pixels_of(thread.rank));
  float terms[V];
#pragma unroll
  for (int k = 0; k < V; ++k) terms[k] = moments[k].shift * count + moments[k].sum;
  const int64_t sample = thread.sample, first_channel = thread.first_channel;
  sum_rows(a, thread, terms, scratch, totals);
  __syncthreads();
  each_group(a, [&](int g) {
    float sum = 0;
    const float pixels = float(a.pixels_of(thread.rank));
    each_channel(a, g, [&](int c) { sum += totals[c] + pixels * x_offset<float>(a.op, sample, first_channel + c); });
    const float mean = warp_sum(sum) / size;
    each_channel(a, g, [&](int c) { totals[c] = mean - x_offset<float>(a.op, sample, first_channel + c); });
    if (lane == 0) moments_of[g].first = mean;
  });
  __syncthreads();
  if (thread.row < a.rows) {
    float mean[V];
    look_up(totals + thread.c, mean);
#pragma unroll
    for (int k = 0; k < V; ++k) terms[k] = moments[k].deviations_from(mean[k], count);
  }
  sum_rows(a, thread, terms, scratch, totals);
  __syncthreads();
  each_group(a, [&](int g) {
    float sum = 0;
    each_channel(a, g, [&](int c) { sum += totals[c]; });
    sum = warp_sum(sum);
    if (lane == 0) moments_of[g].second = sum < 0 ? 0.0f : sum;  // NaN stays
  });
  cluster_barrier(a.cluster);

  const float whole = float(a.op.group_size()) * float(a.op.num_pixels);
  each_group(a, [&](int g) {
    Pair<float> part{0, 0};
    float part_size = 0;
    if (lane < a.cluster) {
      part = of_block(moments_of, lane)[g];
      part_size = float(a.op.group_size()) * float(a.pixels_of(lane));
    }
    const float mean = warp_sum(part_size * part.first) / whole;
    const float distance = part.first - mean;
    const float squares = warp_sum(part_size > 0 ? part.second + part_size * distance * distance : 0.0f);
    const float rstd = 1 / sqrtf(squares / whole + float(a.op.eps));
    if (lane == 0 && thread.rank == 0) {
      const int64_t group = thread.sample * a.op.num_groups + thread.first_channel / a.op.group_size() + g;
      static_cast<float*>(a.op.mean)[group] = mean;
      static_cast<float*>(a.op.rstd)[group] = rstd;
    }
    each_channel(a, g, [&](int c) {
      totals[c] = mean - x_offset<float>(a.op, sample, first_channel + c);
      slopes[c] *= rstd;
    });
  });
  cluster_arrive(a.cluster);
  __syncthreads();

  float mean[V], gain[V], offset[V];
  look_up(totals + thread.c, mean);
  look_up(slopes + thread.c, gain);
  look_up(offsets + thread.c, offset);
  T* y = static_cast<T*>(a.op.out);  // [B, H, W, num_channels]
  if_silu(a.op, [&](auto silu) {
    thread.each([&](int word, int64_t i) {
      float values[V];
      load_shared<T>(tile + word, values);
#pragma unroll
      for (int k = 0; k < V; ++k)
        values[k] = activation<decltype(silu)::value>(gain[k] * (values[k] - mean[k]) + offset[k]);
      store(y + i, values);
    });
  });
  cluster_wait(a.cluster);
}

// x - mean and grad_m of a word; a function, because nvcc 13.0 crashes on the lambda.
template <bool Silu, class T, int V>
__device__ __forceinline__ void load_both(const uint4* x,       // [1]
                                          const uint4* grad_y,  // [1]
                                          const float (&mean)[V],
                                          const float (&gain)[V],
                                          const float (&offset)[V],
                                          float (&centred)[V],
                                          float (&grad_m)[V]) {
  load_shared<T>(x, centred);
  load_shared<T>(grad_y, grad_m);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    centred[k] -= mean[k];
    grad_m[k] *= activation_derivative<Silu>(gain[k] * centred[k] + offset[k]);
  }
}

// A block has its pixels of a tile, a thread the words of its Thread; a warp has the sums of a group at a time.
// grad_x = gain * grad_m - constant - linear * (x - mean)
template <class T>
__global__ void __launch_bounds__(2 * TILE_THREADS, 2) group_norm_backward_tiles(Tiles a) {
  const Thread<T, 1> thread(a);
  constexpr int V = thread.V;
  const int C = a.channels();
  uint4* tile = reinterpret_cast<uint4*>(shared);  // [pixels, columns]
  uint4* grad_tile = tile + a.tile_bytes() / 16;   // [pixels, columns]
  float* scratch = shared + a.tile_bytes() / 2;    // [scratch_floats]
  float* slopes = scratch + a.scratch_floats();    // [C]
  float* totals = slopes + C;  // [3, C]: sums over the block's pixels of grad_m, grad_m * (x - mean), x - mean

  const T* x = static_cast<const T*>(a.op.x);            // [B, H, W, num_channels]
  const T* grad_y = static_cast<const T*>(a.op.grad_y);  // [B, H, W, num_channels]
  for (int stage = 0; stage < STAGES; ++stage) {
    thread.each(stage, [&](int word, int64_t i) {
      __pipeline_memcpy_async(tile + word, x + i, 16);
      __pipeline_memcpy_async(grad_tile + word, grad_y + i, 16);
    });
    __pipeline_commit();
  }
  const int64_t first_group = thread.sample * a.op.num_groups + thread.first_channel / a.op.group_size();
  const float* means = static_cast<const float*>(a.op.mean) + first_group;  // [groups]
  const float* rstds = static_cast<const float*>(a.op.rstd) + first_group;  // [groups]
  each_group(a, [&](int g) {
    each_channel(a, g, [&](int c) {
      const Channel<float> channel(a.op, thread.sample, thread.first_channel + c, means[g], rstds[g]);
      slopes[c] = channel.slope;
      tabulate(channel, scratch, c, C);
    });
  });
  __syncthreads();
  float mean[V], gain[V], offset[V], grad[V] = {}, grad_x[V] = {};
  if (thread.row < a.rows) {
    look_up(scratch + thread.c, mean);
    look_up(scratch + C + thread.c, gain);
    look_up(scratch + 2 * C + thread.c, offset);
  }
  __syncthreads();  // the tables give way to the sums
  if_silu(a.op, [&](auto silu) {
    each_stage([&](int stage) {
      thread.each(stage, [&](int word, int64_t) {
        float centred[V], grad_m[V];
        load_both<decltype(silu)::value, T>(tile + word, grad_tile + word, mean, gain, offset, centred, grad_m);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          grad[k] += grad_m[k];
          grad_x[k] += grad_m[k] * centred[k];
        }
      });
    });
  });
  sum_rows(a, thread, grad, scratch, totals);
  __syncthreads();
  sum_rows(a, thread, grad_x, scratch, totals + C);
  if (a.op.x_offset.data) {
    float deviations[V] = {};  // apart, so that other calls keep their registers
    thread.each([&](int word, int64_t) {
      float values[V];
      load_shared<T>(tile + word, values);
#pragma unroll
      for (int k = 0; k < V; ++k) deviations[k] += values[k] - mean[k];
    });
    __syncthreads();
    sum_rows(a, thread, deviations, scratch, totals + 2 * C);
  }
  cluster_barrier(a.cluster);

  const float size = float(a.op.group_size()) * float(a.op.num_pixels);
  each_group(a, [&](int g) {
    const float rstd = rstds[g];
    float group_grad = 0, group_grad_h = 0;
    each_channel(a, g, [&](int c) {
      Pair<float> sums{0, 0};
      for (int rank = 0; rank < a.cluster; ++rank) {
        sums.first += of_block(totals, rank)[c];
        sums.second += of_block(totals, rank)[C + c];
      }
      sums.second *= rstd;
      if (thread.rank == 0)
        static_cast<Pair<float>*>(a.op.sums)[thread.sample * a.op.num_channels + thread.first_channel + c] = sums;
      group_grad += slopes[c] * sums.first;
      group_grad_h += slopes[c] * sums.second;
    });
    group_grad = warp_sum(group_grad);
    group_grad_h = warp_sum(group_grad_h);
    const float constant = rstd * (group_grad / size), linear = rstd * rstd * (group_grad_h / size);
    each_channel(a, g, [&](int c) {
      scratch[c] = constant;
      scratch[C + c] = linear;
      if (!a.op.x_offset.data || thread.rank != 0) return;
      float sum = 0, deviations = 0;
      for (int rank = 0; rank < a.cluster; ++rank) {
        sum += of_block(totals, rank)[c];
        deviations += of_block(totals, rank)[2 * C + c];
      }
      write_grad_x_sum(
          a.op, thread.sample, thread.first_channel + c, rstd * slopes[c], sum, constant, linear, deviations);
    });
  });
  cluster_arrive(a.cluster);
  __syncthreads();

  float constant[V], linear[V];
  look_up(scratch + thread.c, constant);
  look_up(scratch + C + thread.c, linear);
  T* out = static_cast<T*>(a.op.out);  // [B, H, W, num_channels]
  if_silu(a.op, [&](auto silu) {
    thread.each([&](int word, int64_t i) {
      float centred[V], grad_m[V];
      load_both<decltype(silu)::value, T>(tile + word, grad_tile + word, mean, gain, offset, centred, grad_m);
#pragma unroll
      for (int k = 0; k < V; ++k) centred[k] = gain[k] * grad_m[k] - constant[k] - linear[k] * centred[k];
      store(out + i, centred);
    });
  });
  cluster_wait(a.cluster);
}

}  // namespace
}  // namespace fastdmd
