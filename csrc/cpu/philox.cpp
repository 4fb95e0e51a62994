// Philox4x32-10 on given counters: the published test vectors check the generator that add_noise draws from.
#include "numeric.h"

namespace fastdmd::FASTDMD_ISA {

void philox(const int64_t* counter, const int64_t* key, int64_t* words, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    uint32_t word[4];
    for (int k = 0; k < 4; ++k) word[k] = uint32_t(counter[4 * i + k]);
    fastdmd::philox(word[0], word[1], word[2], word[3], uint32_t(key[0]), uint32_t(key[1]));
    for (int k = 0; k < 4; ++k) words[4 * i + k] = int64_t(word[k]);
  }
}

}  // namespace fastdmd::FASTDMD_ISA
