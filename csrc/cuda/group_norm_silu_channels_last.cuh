// group_norm_silu of channels_last images of which no tile fits into shared memory, 16 bytes at a time whatever the
// group size: a thread keeps to its channels and walks over pixels. Two launches each way read x twice: one for the
// sums of a chunk of pixels, one that merges them and writes the result.
#pragma once

#include "group_norm_silu.cuh"

namespace fastdmd {
namespace {

constexpr int MAX_COLUMNS = 512;     // threads of a block
constexpr int REGISTER_BOUND = 768;  // as many threads leave 80 registers each: three blocks of 256 on a multiprocessor

struct ChannelsLast {
  GroupNorm op;
  int columns, rows;      // of a block's threads: vectors of a pixel, pixels
  int num_chunks;         // of a sample, a block each
  int64_t chunk_pixels;   // the last chunk may have fewer
  Pair<float>* partials;  // forward: mean and squared deviations [B, chunks, G]; backward: both sums [B, chunks, C]
  float* deviations;      // [B, chunks, C], backward with an x_offset: sums of x - mean

  __device__ __forceinline__ int64_t pixels_of(int chunk) const {
    const int64_t left = op.num_pixels - chunk * chunk_pixels;
    return left < chunk_pixels ? left : chunk_pixels;
  }
};

// What a thread works on: every rows-th pixel of the chunk from `begin` to `end`, from channel `c` on.
struct Task {
  int64_t sample, begin, end;
  int chunk, c, row;
  bool active;

  template <int V>
  __device__ __forceinline__ static Task of_thread(const ChannelsLast& a, std::integral_constant<int, V>) {
    Task task;
    task.sample = blockIdx.x / unsigned(a.num_chunks);
    task.chunk = int(blockIdx.x % unsigned(a.num_chunks));
    task.row = int(threadIdx.x) / a.columns;
    task.c = (int(threadIdx.x) - task.row * a.columns) * V;
    task.active = task.row < a.rows;
    const int64_t start = task.chunk * a.chunk_pixels;
    task.end = start + a.pixels_of(task.chunk);
    task.begin = task.active ? start + task.row : task.end;
    return task;
  }
};

template <class T>
constexpr std::integral_constant<int, 16 / int(sizeof(T))> width_of{};

// visit(p) for the pixels of a thread; N at a time while there are so many, so that their loads are under way together.
template <int N, class Visit>
__device__ __forceinline__ void each_pixel(const Task& task, int rows, Visit visit) {
  int64_t p = task.begin;
  for (; p + (N - 1) * rows < task.end; p += N * rows) {
#pragma unroll
    for (int n = 0; n < N; ++n) visit(p + n * rows);
  }
  for (; p < task.end; p += rows) visit(p);
}

// A block has a chunk of a sample's pixels, a thread the vectors of its Task; a warp merges the moments of a group.
template <class T>
__global__ void __launch_bounds__(REGISTER_BOUND, 1) group_norm_moments_vectors(ChannelsLast a) {
  constexpr int V = 16 / sizeof(T);
  const int C = int(a.op.num_channels);
  const int group_size = int(a.op.group_size());
  const Task task = Task::of_thread(a, width_of<T>);
  const T* x = static_cast<const T*>(a.op.x) + task.sample * a.op.num_pixels * C + task.c;
  Moments<float> moments[V];
  if (task.begin < task.end) {
    float values[V];
    load(x + task.begin * C, values);
#pragma unroll
    for (int k = 0; k < V; ++k) moments[k].shift = values[k];
  }
  each_pixel<4>(task, a.rows, [&](int64_t p) {
    float values[V];
    load(x + p * C, values);
#pragma unroll
    for (int k = 0; k < V; ++k) moments[k].add(values[k]);
  });

  const int num_pixels = int(a.pixels_of(task.chunk));
  const auto count_of = [&](int row) { return float(row < num_pixels ? (num_pixels - row + a.rows - 1) / a.rows : 0); };
  float* means = shared;                    // [rows, C]
  float* deviations = shared + a.rows * C;  // [rows, C]
  if (task.active) {
    const float count = count_of(task.row);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      means[task.row * C + task.c + k] = moments[k].mean(count) + x_offset<float>(a.op, task.sample, task.c + k);
      deviations[task.row * C + task.c + k] = moments[k].deviations(count);
    }
  }
  __syncthreads();
  const int lane = int(threadIdx.x) % WARP;
  const int num_warps = int(blockDim.x) / WARP;
  for (int g = int(threadIdx.x) / WARP; g < a.op.num_groups; g += num_warps) {
    float sum = 0, squares = 0;
    for (int entry = lane; entry < a.rows * group_size; entry += WARP) {
      const int row = entry / group_size;
      const int i = row * C + g * group_size + entry - row * group_size;
      sum += count_of(row) * means[i];
    }
    const float mean = warp_sum(sum) / (float(group_size) * float(num_pixels));
    for (int entry = lane; entry < a.rows * group_size; entry += WARP) {
      const int row = entry / group_size;
      const int i = row * C + g * group_size + entry - row * group_size;
      const float distance = means[i] - mean;
      squares += deviations[i] + count_of(row) * distance * distance;
    }
    squares = warp_sum(squares);
    if (lane == 0) a.partials[int64_t(blockIdx.x) * a.op.num_groups + g] = {mean, squares};
  }
}

// A block has a chunk, whose y it writes once its warps have merged the moments of all chunks, a group each.
template <class T>
__global__ void __launch_bounds__(REGISTER_BOUND, 1) group_norm_apply_vectors(ChannelsLast a) {
  constexpr int V = 16 / sizeof(T);
  const int C = int(a.op.num_channels);
  const int group_size = int(a.op.group_size());
  const Task task = Task::of_thread(a, width_of<T>);
  const int lane = int(threadIdx.x) % WARP;
  const int num_warps = int(blockDim.x) / WARP;
  const float size = float(group_size) * float(a.op.num_pixels);
  for (int g = int(threadIdx.x) / WARP; g < a.op.num_groups; g += num_warps) {
    const Pair<float>* partials = a.partials + task.sample * a.num_chunks * a.op.num_groups + g;  // [chunks, G] from g
    float sum = 0, squares = 0;
    for (int chunk = lane; chunk < a.num_chunks; chunk += WARP)
      sum += float(group_size) * float(a.pixels_of(chunk)) * partials[chunk * a.op.num_groups].first;
    const float mean = warp_sum(sum) / size;
    for (int chunk = lane; chunk < a.num_chunks; chunk += WARP) {
      const Pair<float> partial = partials[chunk * a.op.num_groups];
      const float distance = partial.first - mean;
      squares += partial.second + float(group_size) * float(a.pixels_of(chunk)) * distance * distance;
    }
    const float rstd = 1 / sqrtf(warp_sum(squares) / size + float(a.op.eps));
    if (lane == 0 && task.chunk == 0) {
      static_cast<float*>(a.op.mean)[task.sample * a.op.num_groups + g] = mean;
      static_cast<float*>(a.op.rstd)[task.sample * a.op.num_groups + g] = rstd;
    }
    for (int c = g * group_size + lane; c < (g + 1) * group_size; c += WARP)
      tabulate(Channel<float>(a.op, task.sample, c, mean, rstd), shared, c, C);
  }
  __syncthreads();
  if (!task.active) return;
  float mean[V], gain[V], offset[V];
  look_up(shared + task.c, mean);
  look_up(shared + C + task.c, gain);
  look_up(shared + 2 * C + task.c, offset);
  const int64_t start = task.sample * a.op.num_pixels * C + task.c;
  const T* x = static_cast<const T*>(a.op.x) + start;
  T* y = static_cast<T*>(a.op.out) + start;
  each_pixel<4>(task, a.rows, [&](int64_t p) {
    float values[V];
    load(x + p * C, values);
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = activation(a.op, gain[k] * (values[k] - mean[k]) + offset[k]);
    store(y + p * C, values);
  });
}

// A block has a chunk, a thread the vectors of its Task, and at last the sums of every blockDim-th channel. As many
// threads leave 96 registers each: 80 spill.
template <class T>
__global__ void __launch_bounds__(640, 1) group_norm_sums_vectors(ChannelsLast a) {
  constexpr int V = 16 / sizeof(T);
  const int C = int(a.op.num_channels);
  const int group_size = int(a.op.group_size());
  const Task task = Task::of_thread(a, width_of<T>);
  const float* means = static_cast<const float*>(a.op.mean) + task.sample * a.op.num_groups;  // [G]
  const float* rstds = static_cast<const float*>(a.op.rstd) + task.sample * a.op.num_groups;  // [G]
  for (int c = int(threadIdx.x); c < C; c += int(blockDim.x))
    tabulate(Channel<float>(a.op, task.sample, c, means[c / group_size], rstds[c / group_size]), shared, c, C);
  __syncthreads();
  float mean[V], gain[V], offset[V], grad[V] = {}, grad_x[V] = {};
  if (task.active) {
    look_up(shared + task.c, mean);
    look_up(shared + C + task.c, gain);
    look_up(shared + 2 * C + task.c, offset);
  }
  __syncthreads();  // the tables give way to the sums
  const int64_t start = task.sample * a.op.num_pixels * C + task.c;
  const T* x = static_cast<const T*>(a.op.x) + start;
  const T* grad_y = static_cast<const T*>(a.op.grad_y) + start;
  each_pixel<2>(task, a.rows, [&](int64_t p) {
    float centred[V], grad_m[V];
    load(x + p * C, centred);
    load(grad_y + p * C, grad_m);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      centred[k] -= mean[k];
      grad_m[k] *= activation_derivative(a.op, gain[k] * centred[k] + offset[k]);
      grad[k] += grad_m[k];
      grad_x[k] += grad_m[k] * centred[k];
    }
  });
  if (task.active) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      shared[task.row * C + task.c + k] = grad[k];
      shared[(a.rows + task.row) * C + task.c + k] = grad_x[k];
    }
  }
  __syncthreads();
  for (int c = int(threadIdx.x); c < C; c += int(blockDim.x)) {
    Pair<float> sums{0, 0};
    for (int row = 0; row < a.rows; ++row) {
      sums.first += shared[row * C + c];
      sums.second += shared[(a.rows + row) * C + c];
    }
    sums.second *= rstds[c / group_size];
    a.partials[int64_t(blockIdx.x) * C + c] = sums;
  }
  if (!a.op.x_offset.data) return;
  float deviations[V] = {};  // apart, so that other calls keep their registers
  each_pixel<2>(task, a.rows, [&](int64_t p) {
    float values[V];
    load(x + p * C, values);
#pragma unroll
    for (int k = 0; k < V; ++k) deviations[k] += values[k] - mean[k];
  });
  __syncthreads();
  if (task.active) put_down(shared + task.row * C + task.c, deviations);
  __syncthreads();
  for (int c = int(threadIdx.x); c < C; c += int(blockDim.x)) {
    float sum = 0;
    for (int row = 0; row < a.rows; ++row) sum += shared[row * C + c];
    a.deviations[int64_t(blockIdx.x) * C + c] = sum;
  }
}

// A block has a chunk, whose grad_x = gain * grad_m - constant - linear * (x - mean) it writes once its warps have
// merged the sums of all chunks, a group each.
template <class T>
__global__ void __launch_bounds__(REGISTER_BOUND, 1) group_norm_backward_vectors(ChannelsLast a) {
  constexpr int V = 16 / sizeof(T);
  const int C = int(a.op.num_channels);
  const int group_size = int(a.op.group_size());
  const Task task = Task::of_thread(a, width_of<T>);
  const int lane = int(threadIdx.x) % WARP;
  const int num_warps = int(blockDim.x) / WARP;
  const float size = float(group_size) * float(a.op.num_pixels);
  for (int g = int(threadIdx.x) / WARP; g < a.op.num_groups; g += num_warps) {
    const float mean = static_cast<const float*>(a.op.mean)[task.sample * a.op.num_groups + g];
    const float rstd = static_cast<const float*>(a.op.rstd)[task.sample * a.op.num_groups + g];
    float grad = 0, grad_h = 0;
    for (int c = g * group_size + lane; c < (g + 1) * group_size; c += WARP) {
      Pair<float> sums{0, 0};
      for (int chunk = 0; chunk < a.num_chunks; ++chunk) {
        const Pair<float> partial = a.partials[(task.sample * a.num_chunks + chunk) * C + c];
        sums.first += partial.first;
        sums.second += partial.second;
      }
      if (task.chunk == 0) static_cast<Pair<float>*>(a.op.sums)[task.sample * C + c] = sums;
      const Channel<float> channel(a.op, task.sample, c, mean, rstd);
      tabulate(channel, shared, c, C);
      grad += channel.slope * sums.first;
      grad_h += channel.slope * sums.second;
    }
    const float constant = rstd * (warp_sum(grad) / size), linear = rstd * rstd * (warp_sum(grad_h) / size);
    for (int c = g * group_size + lane; c < (g + 1) * group_size; c += WARP) {
      shared[3 * C + c] = constant;
      shared[4 * C + c] = linear;
      if (!a.op.x_offset.data || task.chunk != 0) continue;
      float sum = 0, deviations = 0;
      for (int chunk = 0; chunk < a.num_chunks; ++chunk) {
        const int64_t i = (task.sample * a.num_chunks + chunk) * C + c;
        sum += a.partials[i].first;
        deviations += a.deviations[i];
      }
      write_grad_x_sum(a.op, task.sample, c, shared[C + c], sum, constant, linear, deviations);
    }
  }
  __syncthreads();
  if (!task.active) return;
  float mean[V], gain[V], offset[V], constant[V], linear[V];
  look_up(shared + task.c, mean);
  look_up(shared + C + task.c, gain);
  look_up(shared + 2 * C + task.c, offset);
  look_up(shared + 3 * C + task.c, constant);
  look_up(shared + 4 * C + task.c, linear);
  const int64_t start = task.sample * a.op.num_pixels * C + task.c;
  const T* x = static_cast<const T*>(a.op.x) + start;
  const T* grad_y = static_cast<const T*>(a.op.grad_y) + start;
  T* grad_x = static_cast<T*>(a.op.out) + start;
  each_pixel<2>(task, a.rows, [&](int64_t p) {
    float centred[V], grad_m[V];
    load(x + p * C, centred);
    load(grad_y + p * C, grad_m);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      centred[k] -= mean[k];
      grad_m[k] *= activation_derivative(a.op, gain[k] * centred[k] + offset[k]);
      centred[k] = gain[k] * grad_m[k] - constant[k] - linear[k] * centred[k];
    }
    store(grad_x + p * C, centred);
  });
}

}  // namespace
}  // namespace fastdmd
