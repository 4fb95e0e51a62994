// A sum over the whole grid in the kernel that makes its terms: the last block to arrive adds up the blocks' sums.
#pragma once

#include "reduce.cuh"

namespace fastdmd {
namespace {

// Where the blocks of one launch count themselves; 0 between launches, so that nothing has to be cleared. Launches that
// run at the same time need slots of their own: those recorded in graphs, which keep theirs, are apart from the others,
// which take turns.
constexpr unsigned PASSING_TICKETS = 1 << 10;
constexpr unsigned RECORDED_TICKETS = 1 << 13;
__device__ unsigned tickets[PASSING_TICKETS + RECORDED_TICKETS];

inline unsigned next_ticket(cudaStream_t stream) {
  static std::atomic<unsigned> passing{0}, recorded{0};
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status == cudaStreamCaptureStatusNone) return passing++ % PASSING_TICKETS;
  return PASSING_TICKETS + recorded++ % RECORDED_TICKETS;
}

template <class W>
struct GridSum {
  W* partials;      // [blocks]
  unsigned ticket;  // of next_ticket

  // All threads of all blocks call it. True in the last block only, which gets the total.
  __device__ bool operator()(W term, double& total) const {
    __shared__ bool is_last;
    const W sum = block_sum(term);
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = sum;
      // The sum must be there before the count, which wraps around to 0.
      __threadfence();
      is_last = atomicInc(&tickets[ticket], gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    double rest = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) rest += double(__ldcg(partials + block));
    total = block_sum(rest);
    return true;
  }
};

}  // namespace
}  // namespace fastdmd
