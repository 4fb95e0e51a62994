// Sums over a warp, a block and a grid, in a fixed order: the same inputs give the same bits.
#pragma once

#include <atomic>

#include "common.cuh"

namespace fastdmd {
namespace {

// Every lane gets the same bits, because each step adds the same two numbers on both sides.
template <class W>
__device__ __forceinline__ W warp_sum(W value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// All threads of the block must call it, whole warps, and all get the sum.
template <class W>
__device__ W block_sum(W value) {
  __shared__ W partials[WARP];
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  value = warp_sum(value);
  __syncthreads();  // the call before may still be reading
  if (lane == 0) partials[warp] = value;
  __syncthreads();
  return warp_sum(lane < int(blockDim.x) / WARP ? partials[lane] : W(0));
}

}  // namespace
}  // namespace fastdmd
