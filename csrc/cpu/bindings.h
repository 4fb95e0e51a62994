// What the bindings of the CPU kernels share: torch tensors in, kernel arguments out.
#pragma once

#include <optional>
#include <vector>

#include "../tensors.h"
#include "instruction_set.h"
#include "numeric.h"

namespace fastdmd {

constexpr int64_t GRAIN = 1 << 15;  // elements worth a thread: about 10 us of work
constexpr int64_t BLOCK = 1 << 14;  // elements of one partial sum; fixed, so that sums do not depend on the threads

inline double read(const void* data,  // [n]
                   Dtype dtype,
                   int64_t index) {
  return dispatch(dtype, [&](auto type) { return double(load(static_cast<const decltype(type)*>(data)[index])); });
}
inline void write(void* data,  // [n]
                  Dtype dtype,
                  int64_t index,
                  double value) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    store(static_cast<T*>(data)[index], Wide<T>(value));
  });
}

inline double item(const Tensor& scalar) { return read(scalar.const_data_ptr(), dtype_of(scalar), 0); }

// A vector or a table (rows strided, columns strided) in float64.
inline std::vector<double> values(const Tensor& tensor) {
  const int64_t columns = tensor.size(tensor.dim() - 1), column_stride = tensor.stride(tensor.dim() - 1);
  const int64_t rows = tensor.dim() == 2 ? tensor.size(0) : 1, row_stride = tensor.dim() == 2 ? tensor.stride(0) : 0;
  std::vector<double> result(rows * columns);
  dispatch(dtype_of(tensor), [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(tensor.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        result[row * columns + column] = double(load(data[row * row_stride + column * column_stride]));
  });
  return result;
}
inline std::vector<double> values(const std::optional<Tensor>& tensor) {
  return tensor ? values(*tensor) : std::vector<double>();
}
inline const double* pointer(const std::vector<double>& values) { return values.empty() ? nullptr : values.data(); }

inline Tensor scalar(const Tensor& like, ScalarType dtype, double value) {
  Tensor result = torch::stable::new_empty(like, {}, dtype);
  write(result.mutable_data_ptr(), dtype_of(dtype), 0, value);
  return result;
}

inline double total(const std::vector<double>& partial_sums) {
  double sum = 0;
  for (double partial : partial_sums) sum += partial;
  return sum;
}

}  // namespace fastdmd
