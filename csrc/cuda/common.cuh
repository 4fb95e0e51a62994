// What the kernels share: dtypes, 16-byte loads and stores, values of a dtype known at run time.
//
// Most ops have two kernels: `*_vectors` for float32, bfloat16 and float16 in aligned memory, 16 bytes at a time, and
// `*_any` for every other dtype, alignment and size, one element at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>

#include "../formulas.h"
#include "launch.cuh"

namespace fastdmd {
namespace {  // each file compiles its own copy

constexpr int WARP = 32;
constexpr int THREADS = 256;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }

// 2^x and 1 / x to two units in the last place, an instruction each; what is below 2^-126 is 0. On a CPU, for tests.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return 1 / x;
#endif
}

// Element i of memory whose dtype is known at run time, in W.
template <class W>
__device__ __forceinline__ W read(const void* data,  // [n]
                                  Dtype dtype,
                                  int64_t i) {
  switch (dtype) {
    case Dtype::float64: return W(static_cast<const double*>(data)[i]);
    case Dtype::bfloat16: return W(wide(static_cast<const __nv_bfloat16*>(data)[i]));
    case Dtype::float16: return W(wide(static_cast<const __half*>(data)[i]));
    default: return W(static_cast<const float*>(data)[i]);
  }
}

template <class W>
__device__ __forceinline__ void write(void* data,  // [n]
                                      Dtype dtype,
                                      int64_t i,
                                      W value) {
  switch (dtype) {
    case Dtype::float64: static_cast<double*>(data)[i] = double(value); break;
    case Dtype::bfloat16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(value)); break;
    case Dtype::float16: static_cast<__half*>(data)[i] = __float2half_rn(float(value)); break;
    default: static_cast<float*>(data)[i] = float(value);
  }
}

// A small table, such as sigma `[B]` or scale `[B, C]` with unit stride in C.
struct Values {
  const void* data;  // [rows] or [rows, columns]; null: the argument was not given
  int64_t stride;    // of the first dimension
  Dtype dtype;

  template <class W>
  __device__ __forceinline__ W at(int64_t row, int64_t column = 0) const {
    return read<W>(data, dtype, row * stride + column);
  }
};

// Elements that fill 16 bytes of each of the dtypes, and at least the four that one call of Philox makes.
template <class... T>
constexpr int VECTOR = std::max({int(16 / sizeof(T))...});

template <bool Constant>
__device__ __forceinline__ uint4 load_word(const uint4* from /* [1] */) {
  if constexpr (Constant) return __ldg(from);
  return *from;
}

// The values in 16 bytes.
template <class T>
__device__ __forceinline__ void widen(uint4 word, float* to /* [16 / sizeof(T)] */) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one instruction each, where nvcc 13.0 takes two
    const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to[2 * k] = float_of(parts[k] << 16);
      to[2 * k + 1] = float_of(parts[k] & 0xffff0000u);
    }
  } else {
    T values[16 / sizeof(T)];
    memcpy(values, &word, 16);
#pragma unroll
    for (int k = 0; k < int(16 / sizeof(T)); ++k) to[k] = wide(values[k]);
  }
}

// In assembly, because nvcc 13.0 splits some assignments of uint4 into four stores.
__device__ __forceinline__ void store_word(uint4* to,  // [1]
                                           uint4 word) {
  asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
      "r"(word.x),
      "r"(word.y),
      "r"(word.z),
      "r"(word.w)
      : "memory");
}

// The first `count` of V values at a 16-byte boundary, the others 0. Constant: nothing writes this memory while the
// kernel runs, so that the compiler may move the load above stores.
template <bool Constant = true, class T, int V>
__device__ __forceinline__ void load(const T* from,  // [count]
                                     float (&to)[V],
                                     int64_t count = V) {
  constexpr int num_words = V * int(sizeof(T)) / 16, per_word = 16 / int(sizeof(T));
  static_assert(num_words * per_word == V);
  if (count >= V) {
    uint4 words[num_words];
#pragma unroll
    for (int w = 0; w < num_words; ++w) words[w] = load_word<Constant>(reinterpret_cast<const uint4*>(from) + w);
#pragma unroll
    for (int w = 0; w < num_words; ++w) widen<T>(words[w], to + w * per_word);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = k < count ? wide(from[k]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ uint32_t pair(float first, float second) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 rounded = __floats2half2_rn(first, second);
    memcpy(&bits, &rounded, 4);
  } else {
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(first, second);
    memcpy(&bits, &rounded, 4);
  }
  return bits;
}

// The first `count` of V values, rounded once, to a 16-byte boundary.
template <class T, int V>
__device__ __forceinline__ void store(T* to,  // [count]
                                      const float (&from)[V],
                                      int64_t count = V) {
  constexpr int num_words = V * int(sizeof(T)) / 16, per_word = 16 / int(sizeof(T));
  static_assert(num_words * per_word == V);
  if (count >= V) {
#pragma unroll
    for (int w = 0; w < num_words; ++w) {
      const float* f = from + w * per_word;
      uint4 word;
      if constexpr (std::is_same_v<T, float>)
        word = make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
      else
        word = make_uint4(pair<T>(f[0], f[1]), pair<T>(f[2], f[3]), pair<T>(f[4], f[5]), pair<T>(f[6], f[7]));
      store_word(reinterpret_cast<uint4*>(to) + w, word);
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k)
      if (k < count) {
        if constexpr (std::is_same_v<T, float>) to[k] = from[k];
        if constexpr (std::is_same_v<T, __nv_bfloat16>) to[k] = __float2bfloat16_rn(from[k]);
        if constexpr (std::is_same_v<T, __half>) to[k] = __float2half_rn(from[k]);
      }
  }
}

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;  // in 32 bits it costs a quarter
}

// The V elements from `i` on are of one sample or of two, since a sample has at least V: those from `boundary` on are
// of `second`, which is a sample even where only `count` elements are left.
struct Samples {
  int64_t first, second;
  int boundary;
};

template <int V>
__device__ __forceinline__ Samples samples_of(int64_t i, int64_t sample_size, int64_t count) {
  const int64_t first = divide(i, sample_size);
  const int64_t left = (first + 1) * sample_size - i;
  return {first, left < V && left < count ? first + 1 : first, left < V ? int(left) : V};
}

// ---- host

inline Values values_of(const Tensor& tensor) {
  return {
      .data = tensor.const_data_ptr(),
      .stride = tensor.dim() > 0 ? tensor.stride(0) : 0,
      .dtype = dtype_of(tensor),
  };
}
inline Values values_of(const std::optional<Tensor>& tensor) {
  return tensor ? values_of(*tensor) : Values{nullptr, 0, Dtype::float32};
}

// Calls body with a value of the type that `dtype` names, for `*_vectors`: never float64.
template <class Body>
void dispatch_vectors(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::bfloat16: body(__nv_bfloat16{}); break;
    case Dtype::float16: body(__half{}); break;
    default: body(float{});
  }
}

// Calls body with a value of the type in which `dtype` is computed, for `*_any`.
template <class Body>
void dispatch_wide(Dtype dtype, Body body) {
  if (dtype == Dtype::float64)
    body(double{});
  else
    body(float{});
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

}  // namespace
}  // namespace fastdmd
