// The dtypes of the kernels' memory. Knows nothing of torch.
#pragma once

#include <cstdint>

namespace fastdmd {

enum class Dtype : int { float32, float64, bfloat16, float16 };

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

}  // namespace fastdmd
