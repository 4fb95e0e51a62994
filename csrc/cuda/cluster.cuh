// Blocks that run at the same time and read each other's shared memory: thread block clusters, which sm_90 brought. In
// code for older GPUs a block is alone.
#pragma once

#include <cooperative_groups.h>

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTDMD_CLUSTERS
#endif

namespace fastdmd {
namespace {

constexpr int MAX_CLUSTER = 8;  // blocks; more are not portable

// A barrier for all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_barrier(int cluster) {
#ifdef FASTDMD_CLUSTERS
  if (cluster > 1) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}

// A block may end only after all others have read its memory: each thread arrives when it has read theirs, and waits at
// its end. Relaxed, because nothing has been written for others: the barrier above waits for all writes.
__device__ __forceinline__ void cluster_arrive(int cluster) {
#ifdef FASTDMD_CLUSTERS
  if (cluster == 1) return;
#ifdef __CUDA_ARCH__
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  cooperative_groups::this_cluster().barrier_arrive();
#endif
#endif
}
__device__ __forceinline__ void cluster_wait(int cluster) {
#ifdef FASTDMD_CLUSTERS
  if (cluster == 1) return;
#ifdef __CUDA_ARCH__
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  cooperative_groups::this_cluster().barrier_wait();
#endif
#endif
}

// Where block `rank` of the cluster has what this one has at `mine`, in shared memory.
template <class T>
__device__ __forceinline__ const T* of_block(const T* mine,  // [n]
                                             int rank) {
#ifdef FASTDMD_CLUSTERS
  return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(mine), rank);
#else
  return mine;
#endif
}

// How many blocks a cluster of this kernel may have.
template <class Arguments>
int max_cluster(const Device& device, void (*kernel)(Arguments)) {
  return device.ptx_version(kernel) >= 90 ? MAX_CLUSTER : 1;
}

}  // namespace
}  // namespace fastdmd
