// Philox4x32-10, a row of the counter per thread.
#include "common.cuh"

namespace fastdmd {
namespace {

struct Philox {
  const int64_t* counter;  // [N, 4]
  const int64_t* key;      // [2]
  int64_t* words;          // [N, 4]
  int64_t num_rows;
};

// A thread makes the words of every gridDim * blockDim-th row.
__global__ void __launch_bounds__(THREADS) philox_rows(Philox a) {
  const uint32_t key0 = uint32_t(a.key[0]);
  const uint32_t key1 = uint32_t(a.key[1]);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < a.num_rows; row += step) {
    const int64_t* from = a.counter + 4 * row;
    uint32_t x0 = uint32_t(from[0]);
    uint32_t x1 = uint32_t(from[1]);
    uint32_t x2 = uint32_t(from[2]);
    uint32_t x3 = uint32_t(from[3]);
    philox(x0, x1, x2, x3, key0, key1);
    int64_t* to = a.words + 4 * row;
    to[0] = x0;
    to[1] = x1;
    to[2] = x2;
    to[3] = x3;
  }
}

Tensor philox_words(Tensor counter,  // [N, 4]
                    Tensor key /* [2] */) {
  Tensor words = torch::stable::empty_like(counter);
  const int64_t num_rows = counter.size(0);
  if (num_rows == 0) return words;
  const Device device(counter);
  const Philox a{
      .counter = static_cast<const int64_t*>(counter.const_data_ptr()),
      .key = static_cast<const int64_t*>(key.const_data_ptr()),
      .words = static_cast<int64_t*>(words.mutable_data_ptr()),
      .num_rows = num_rows,
  };
  static const int64_t resident = device.resident_blocks(philox_rows, THREADS);
  device.launch(philox_rows, std::min(ceil_divide(num_rows, THREADS), resident), THREADS, a);
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdmd_native, CUDA, m) { m.impl("philox", TORCH_BOX(&philox_words)); }

}  // namespace fastdmd
