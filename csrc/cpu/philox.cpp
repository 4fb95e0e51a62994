// Philox4x32-10 on given counters: the published test vectors check the generator that add_noise draws from.
#include "kernels.h"
#include "words.h"

namespace fastdmd::FASTDMD_ISA {

void philox(const int64_t* counter,  // [N, 4]
            const int64_t* key,      // [2]
            int64_t* words,          // [N, 4]
            int64_t begin,
            int64_t end) {
  uint64_t lanes[4][Words::size] = {};
  for (int64_t first = begin; first < end; first += Words::size) {
    const int count = first + Words::size < end ? Words::size : int(end - first);
    for (int lane = 0; lane < count; ++lane)
      for (int k = 0; k < 4; ++k) lanes[k][lane] = uint64_t(counter[4 * (first + lane) + k]);
    Words x[4] = {Words::load(lanes[0]), Words::load(lanes[1]), Words::load(lanes[2]), Words::load(lanes[3])};
    fastdmd::philox(x[0], x[1], x[2], x[3], uint32_t(key[0]), uint32_t(key[1]));
    for (int k = 0; k < 4; ++k) x[k].store(lanes[k]);
    for (int lane = 0; lane < count; ++lane)
      for (int k = 0; k < 4; ++k) words[4 * (first + lane) + k] = int64_t(uint32_t(lanes[k][lane]));
  }
}

}  // namespace fastdmd::FASTDMD_ISA
