// How group_norm_silu of channels_last images is cut into tiles, which a block keeps in shared memory: some groups of
// some pixels of a sample. The blocks of a cluster share the pixels, and thus the groups' moments.
#pragma once

#include <cuda_pipeline.h>

#include "cluster.cuh"
#include "group_norm_silu.cuh"

namespace fastdmd {
namespace {

constexpr int TILE_THREADS = 192;  // whole warps for rows of 3 * 2^n vectors, too; twice as many for a large tile
constexpr int RESIDENT_THREADS = 4 * TILE_THREADS;  // of a multiprocessor: they leave 80 registers each
constexpr int STAGES = 4;                           // in which a tile arrives

struct Tiles {
  GroupNorm op;
  int groups, columns;     // of a tile, whose channels are as many vectors of a pixel
  int rows;                // pixels that the threads of a block hold at once, a vector each
  int num_tiles, cluster;  // of a sample; the blocks that share the pixels of a tile
  int pixels;              // of a block; the last of the cluster may have fewer

  __host__ __device__ int channels() const { return groups * int(op.group_size()); }
  __host__ __device__ int tile_bytes() const { return 16 * columns * pixels; }
  // The threads' values [rows, channels], and later tables.
  __host__ __device__ int scratch_floats() const { return (rows > 3 ? rows : 3) * channels(); }
  int64_t shared_bytes() const {  // with what the kernels keep of every channel, and forward of every group
    const int64_t kept = op.grad_y ? (op.x_offset.data ? 4 : 3) * channels() : 3 * channels() + 2 * groups;
    return (op.grad_y ? 2 : 1) * int64_t(tile_bytes()) + int64_t(sizeof(float)) * (scratch_floats() + kept);
  }
  __device__ __forceinline__ int pixels_of(int rank) const {
    const int left = int(op.num_pixels) - rank * pixels;
    return left < pixels ? left : pixels;
  }
};

// What a thread works on, UNROLL words at a time: a vector of every rows-th pixel of the tile. Its words lie `stride`
// apart there from `word` on, and `step` elements apart in the image from `start` on.
template <class T, int UNROLL>
struct Thread {
  static constexpr int V = 16 / int(sizeof(T));
  int64_t sample, start, step;
  int rank, first_channel;  // of the block in its cluster; of the tile
  int c, row;               // its first channel and pixel in the tile
  int count, per_stage;     // its words, and how many of them at most arrive together
  int word, stride;

  __device__ __forceinline__ explicit Thread(const Tiles& a) {
    const unsigned tile = blockIdx.x / unsigned(a.cluster);
    rank = int(blockIdx.x % unsigned(a.cluster));
    sample = tile / unsigned(a.num_tiles);
    first_channel = int(tile % unsigned(a.num_tiles)) * a.channels();
    word = int(threadIdx.x);
    stride = a.rows * a.columns;
    row = word / a.columns;
    c = (word - row * a.columns) * V;
    const int left = a.pixels_of(rank) - row;
    count = row < a.rows && left > 0 ? (left + a.rows - 1) / a.rows : 0;
    per_stage = (a.pixels + STAGES * a.rows - 1) / (STAGES * a.rows);
    step = a.rows * a.op.num_channels;
    start = (sample * a.op.num_pixels + rank * a.pixels + row) * a.op.num_channels + first_channel + c;
  }

  // visit(word in the tile, element of the image) for the words that come in one stage.
  template <class Visit>
  __device__ __forceinline__ void each(int stage, Visit visit) const {
    const int end = count < (stage + 1) * per_stage ? count : (stage + 1) * per_stage;
#pragma unroll UNROLL
    for (int i = stage * per_stage; i < end; ++i) visit(word + i * stride, start + i * step);
  }
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll UNROLL
    for (int i = 0; i < count; ++i) visit(word + i * stride, start + i * step);
  }
};

// Calls visit(stage) once the words of the stage have arrived; only for the thread that asked for them.
template <class Visit>
__device__ __forceinline__ void each_stage(Visit visit) {
#pragma unroll 1  // the code is large enough
  for (int stage = 0; stage < STAGES; ++stage) {
    __pipeline_wait_prior(STAGES - 1 - stage);
    visit(stage);
  }
}

template <class T, int V>
__device__ __forceinline__ void load_shared(const uint4* word,  // [1]
                                            float (&to)[V]) {
  load<false>(reinterpret_cast<const T*>(word), to);
}

// totals[c] = the sum of `mine` over the threads of channel c, after a barrier.
template <class T, int UNROLL, int V>
__device__ __forceinline__ void sum_rows(const Tiles& a,
                                         const Thread<T, UNROLL>& thread,
                                         const float (&mine)[V],
                                         float* scratch,  // [rows, channels]
                                         float* totals /* [channels] */) {
  const int C = a.channels();
  if (thread.row < a.rows) put_down(scratch + thread.row * C + thread.c, mine);
  __syncthreads();
  // In two steps, so that all threads have something to do.
  const int threads = int(blockDim.x);
  const int parts = threads < 2 * C ? 1 : threads / C < a.rows ? threads / C : a.rows;
  for (int i = int(threadIdx.x); i < parts * C; i += threads) {
    float sum = scratch[i];
    for (int entry = i + parts * C; entry < a.rows * C; entry += parts * C) sum += scratch[entry];
    (parts == 1 ? totals : scratch)[i] = sum;
  }
  if (parts == 1) return;
  __syncthreads();
  for (int c = int(threadIdx.x); c < C; c += threads) {
    float sum = scratch[c];
    for (int part = 1; part < parts; ++part) sum += scratch[part * C + c];
    totals[c] = sum;
  }
}

// visit(g) for the groups of a warp
template <class Visit>
__device__ __forceinline__ void each_group(const Tiles& a, Visit visit) {
  for (int g = int(threadIdx.x) / WARP; g < a.groups; g += int(blockDim.x) / WARP) visit(g);
}

// visit(c) for the channels of a group, shared among the lanes of a warp
template <class Visit>
__device__ __forceinline__ void each_channel(const Tiles& a, int g, Visit visit) {
  const int group_size = int(a.op.group_size());
  for (int c = g * group_size + int(threadIdx.x) % WARP; c < (g + 1) * group_size; c += WARP) visit(c);
}

// ---- host

// The tiles of channels_last images, or nothing if none fits.
std::optional<Tiles> tiles(const Device& device, const GroupNorm& op, int max_cluster) {
  const int64_t channel_bytes = element_bytes(op.dtype);
  if (!op.channels_last || op.dtype == Dtype::float64 || op.num_channels * channel_bytes % 16 != 0 ||
      !aligned({op.x, op.grad_y, op.out}))
    return std::nullopt;
  const int64_t limit = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t in_all = device.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t enough_blocks = 2 * device.num_multiprocessors();
  // The least is the best: whole sectors of 32 bytes, two of them; a multiprocessor full of threads, in several blocks,
  // so that one loads while another stores; blocks for all multiprocessors; small clusters; wide rows.
  using Cost = std::tuple<bool, bool, int64_t, int64_t, int64_t, int, int64_t>;
  std::optional<std::pair<Cost, Tiles>> best;
  for (int64_t groups = 1; groups <= op.num_groups; ++groups) {
    const int64_t row_bytes = groups * op.group_size() * channel_bytes;
    const int64_t columns = row_bytes / 16;
    if (op.num_groups % groups != 0 || row_bytes % 16 != 0 || columns > TILE_THREADS) continue;
    for (int cluster = 1; cluster <= max_cluster; cluster *= 2) {
      const int64_t pixels = ceil_divide(op.num_pixels, cluster);
      const int64_t num_tiles = op.num_groups / groups;
      const int64_t blocks = op.num_samples * num_tiles * cluster;
      if ((cluster - 1) * pixels >= op.num_pixels || pixels * row_bytes > limit || blocks > INT_MAX) continue;
      Tiles a{
          .op = op,
          .groups = int(groups),
          .columns = int(columns),
          .num_tiles = int(num_tiles),
          .cluster = cluster,
          .pixels = int(pixels),
      };
      for (const int64_t threads : {TILE_THREADS, 2 * TILE_THREADS}) {
        a.rows = int(std::min(threads / columns, pixels));
        if (a.shared_bytes() > limit) continue;
        const int64_t resident = std::min(in_all / (a.shared_bytes() + 1024), RESIDENT_THREADS / threads);
        const Cost cost{
            row_bytes % 32 != 0,
            row_bytes < 64,
            -resident * threads,
            -resident,
            -std::min(blocks, enough_blocks),
            cluster,
            -row_bytes,
        };
        if (!best || cost < best->first) best = {cost, a};
      }
    }
  }
  if (!best) return std::nullopt;
  return best->second;
}

template <class Kernel>
bool launch_tiles(const Device& device, const GroupNorm& op, Kernel kernel) {
  const std::optional<Tiles> a = tiles(device, op, max_cluster(device, kernel));
  if (!a) return false;
  const int threads = int(ceil_divide(int64_t(a->rows) * a->columns, WARP) * WARP);
  device.prefer_shared_memory(kernel);
  device.launch(kernel, a->op.num_samples * a->num_tiles * a->cluster, threads, *a, a->shared_bytes(), a->cluster);
  return true;
}

}  // namespace
}  // namespace fastdmd
