// What the kernels share: dtypes, 16-byte loads and stores, values of a dtype known at run time, launching.
//
// Most ops have two kernels: `*_vectors` for float32, bfloat16 and float16 in aligned memory, 16 bytes at a time, and
// `*_any` for every other dtype, alignment and size, one element at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../formulas.h"

namespace fastdmd {
namespace {  // each file compiles its own copy

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int WARP = 32;
constexpr int THREADS = 256;

enum class Dtype : int { float32, float64, bfloat16, float16 };

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
__device__ __forceinline__ W read(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float64: return W(static_cast<const double*>(data)[i]);
    case Dtype::bfloat16: return W(wide(static_cast<const __nv_bfloat16*>(data)[i]));
    case Dtype::float16: return W(wide(static_cast<const __half*>(data)[i]));
    default: return W(static_cast<const float*>(data)[i]);
  }
}

template <class W>
__device__ __forceinline__ void write(void* data, Dtype dtype, int64_t i, W value) {
  switch (dtype) {
    case Dtype::float64: static_cast<double*>(data)[i] = double(value); break;
    case Dtype::bfloat16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(value)); break;
    case Dtype::float16: static_cast<__half*>(data)[i] = __float2half_rn(float(value)); break;
    default: static_cast<float*>(data)[i] = float(value);
  }
}

// A small table, such as sigma `[B]` or scale `[B, C]` with unit stride in C.
struct Values {
  const void* data;  // null: the argument was not given
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
__device__ __forceinline__ uint4 load_word(const uint4* from) {
  if constexpr (Constant) return __ldg(from);
  return *from;
}

// The values in 16 bytes.
template <class T>
__device__ __forceinline__ void widen(uint4 word, float* to) {
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
__device__ __forceinline__ void store_word(uint4* to, uint4 word) {
  asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y),
      "r"(word.z), "r"(word.w)
      : "memory");
}

// The first `count` of V values at a 16-byte boundary, the others 0. Constant: nothing writes this memory while the
// kernel runs, so that the compiler may move the load above stores.
template <bool Constant = true, class T, int V>
__device__ __forceinline__ void load(const T* from, float (&to)[V], int64_t count = V) {
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
__device__ __forceinline__ void store(T* to, const float (&from)[V], int64_t count = V) {
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
  const int64_t first = divide(i, sample_size), left = (first + 1) * sample_size - i;
  return {first, left < V && left < count ? first + 1 : first, left < V ? int(left) : V};
}

// ---- host

inline Dtype dtype_of(ScalarType type, const char* op) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fastdmd.", op, ": expected float32, float64, bfloat16 or float16, got dtype number ",
                  int(type));
  return Dtype::float32;
}
inline Dtype dtype_of(const Tensor& tensor, const char* op) { return dtype_of(tensor.scalar_type(), op); }

inline ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Values values_of(const Tensor& tensor, const char* op) {
  return {tensor.const_data_ptr(), tensor.dim() > 0 ? tensor.stride(0) : 0, dtype_of(tensor, op)};
}
inline Values values_of(const std::optional<Tensor>& tensor, const char* op) {
  return tensor ? values_of(*tensor, op) : Values{nullptr, 0, Dtype::float32};
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
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; });
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised, of the strides of `like`, whatever its dtype.
inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(like),
      torch::stable::detail::from(std::optional<ScalarType>(dtype)),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// What the driver has said of a kernel on a device, or granted it: asked once, since asking takes microseconds.
struct KernelFacts {
  int64_t shared_bytes = 48 * 1024;  // of a block; more has to be asked for
  bool prefers_shared_memory = false;
  int ptx_version = 0;  // 0: not asked yet
};

struct KnownKernels {
  std::mutex mutex;
  std::map<std::pair<const void*, int>, KernelFacts> facts;  // of a kernel and a device

  static KnownKernels& instance() {
    static KnownKernels known;
    return known;
  }
};

// Makes the device of a tensor the current one, and launches on its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int num_multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
    return value;
  }

  // How many blocks of a kernel the device runs at once: the grid of a kernel whose blocks loop over their work.
  template <class Arguments>
  int64_t resident_blocks(void (*kernel)(Arguments), int threads) const {
    int per_multiprocessor = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor,
                                                                 reinterpret_cast<const void*>(kernel), threads, 0));
    return int64_t(std::max(per_multiprocessor, 1)) * num_multiprocessors();
  }

  // For kernels that keep their data in shared memory: as many blocks as fit, at the cost of the L1 cache.
  template <class Arguments>
  void prefer_shared_memory(void (*kernel)(Arguments)) const {
    const auto* function = reinterpret_cast<const void*>(kernel);
    with_facts(function, [&](KernelFacts& facts) {
      if (facts.prefers_shared_memory) return;
      STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared));
      facts.prefers_shared_memory = true;
    });
  }

  // 90 for code of compute capability 9.0: a kernel was compiled for some GPU, not always for the one at hand.
  template <class Arguments>
  int ptx_version(void (*kernel)(Arguments)) const {
    const auto* function = reinterpret_cast<const void*>(kernel);
    int version = 0;
    with_facts(function, [&](KernelFacts& facts) {
      if (facts.ptx_version == 0) {
        cudaFuncAttributes attributes{};
        STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, function));
        facts.ptx_version = attributes.ptxVersion;
      }
      version = facts.ptx_version;
    });
    return version;
  }

  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t blocks, int threads, std::type_identity_t<Arguments> arguments,
              int64_t shared_bytes = 0, int cluster = 1) const {
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > KernelFacts{}.shared_bytes)
      with_facts(function, [&](KernelFacts& facts) {
        if (shared_bytes <= facts.shared_bytes) return;
        STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
        facts.shared_bytes = shared_bytes;
      });
    void* pointers[] = {&arguments};
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    if (cluster == 1) {
      STD_CUDA_CHECK(cudaLaunchKernel(function, grid, block, pointers, size_t(shared_bytes), stream_));
      return;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared_bytes), config.stream = stream_;
    config.attrs = &attribute, config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelExC(&config, function, pointers));
  }

 private:
  // use(facts) of a kernel on this device, one thread at a time.
  template <class Use>
  void with_facts(const void* kernel, Use use) const {
    KnownKernels& known = KnownKernels::instance();
    const std::lock_guard<std::mutex> lock(known.mutex);
    use(known.facts[{kernel, index_}]);
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace fastdmd
