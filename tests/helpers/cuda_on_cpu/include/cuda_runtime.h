// CUDA's language and runtime, as far as csrc/cuda needs them, for g++: no kernel source is rewritten. What a kernel
// uses beyond this does not compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Means static inside a function, and may follow extern. The emulator exchanges this memory when it changes blocks.
#define __shared__ thread_local

using std::exp, std::fabs, std::isfinite, std::isinf, std::isnan, std::pow, std::sqrt;

struct uint3 {
  unsigned x = 1, y = 1, z = 1;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace cuda_on_cpu {

void barrier();
// Waits for the other lanes of the warp, and copies what the lane `distance` away, by exclusive or, has at `mine`.
void shuffle(const void* mine, void* theirs, size_t num_bytes, int distance, unsigned mask);
void let_others_run();  // perhaps
[[noreturn]] void fail(const char* message);
void launch(const void* kernel, const char* name, const std::function<void()>& thread, dim3 grid, dim3 block,
            size_t shared_bytes, unsigned cluster);
int num_multiprocessors();
int compute_capability();  // 90

template <class T>
const T* require_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("a thread reads or writes at a misaligned address");
  return address;
}

template <class Arguments>
int launch(void (*kernel)(Arguments), void** pointers, dim3 grid, dim3 block, size_t shared_bytes,
           unsigned cluster = 1) {
  const auto& arguments = *static_cast<const Arguments*>(pointers[0]);
  launch(reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__, [&] { kernel(arguments); }, grid, block,
         shared_bytes, cluster);
  return 0;
}

}  // namespace cuda_on_cpu

// ---- device

inline void __syncthreads() { cuda_on_cpu::barrier(); }
inline void __threadfence() { cuda_on_cpu::let_others_run(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  T result;
  cuda_on_cpu::shuffle(&value, &result, sizeof(T), distance, mask);
  return result;
}

// All threads of all blocks are fibers of one thread, so that these are atomic as they stand.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  cuda_on_cpu::let_others_run();
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  cuda_on_cpu::let_others_run();
  return old;
}
template <class T>
T atomicAdd(T* address, T value) {
  cuda_on_cpu::let_others_run();
  const T old = *address;
  *address = old + value;
  cuda_on_cpu::let_others_run();
  return old;
}

template <class T>
T __ldg(const T* from) { return *cuda_on_cpu::require_alignment(from); }
template <class T>
T __ldcg(const T* from) { return *cuda_on_cpu::require_alignment(from); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
// As documented: 0 where the divisor is beyond 2^126, infinity over that is NaN.
inline float __fdividef(float a, float b) {
  const float size = std::fabs(b);
  return size > 0x1p126f && size < INFINITY ? 0.0f * a : a / b;
}
inline float __expf(float x) { return std::exp2(x * 1.4426950408889634f); }

// The one instruction of assembly, which writes what its address says, unseen by sanitizers: they see it read before.
asm(R"(
.macro st.global.v4.u32 to, x, y, z, w
.intel_syntax prefix
mov dword ptr \to, \x
mov dword ptr \to + 4, \y
mov dword ptr \to + 8, \z
mov dword ptr \to + 12, \w
.att_syntax prefix
.endm
)");
inline size_t __cvta_generic_to_global(const uint4* address) {
  const volatile unsigned* words = &cuda_on_cpu::require_alignment(address)->x;
  (void)words[0], (void)words[3];
  return reinterpret_cast<size_t>(address);
}

// ---- host

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaSharedmemCarveoutMaxShared = 100 };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int kilobytes = cuda_on_cpu::compute_capability() >= 90 ? 228 : 164;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_cpu::num_multiprocessors(); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (kilobytes - 1) << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kilobytes << 10; break;
  }
  return 0;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = cuda_on_cpu::compute_capability();
  return 0;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads, size_t) {
  *count = std::max(1024 / threads, 1);
  return 0;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return 0; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return 0;
}
// The type of the arguments is that of `kernel`, a name of the function that launches.
#define cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream) \
  cuda_on_cpu::launch(kernel, pointers, grid, block, shared_bytes)
#define cudaLaunchKernelExC(config, function, pointers)                                                    \
  cuda_on_cpu::launch(kernel, pointers, (config)->gridDim, (config)->blockDim, (config)->dynamicSmemBytes, \
                      (config)->attrs[0].val.clusterDim.x)

// ---- what torch's headers know of CUDA

#include <torch/csrc/stable/library.h>
// Instead of (fastdmd_native, CUDA): beside the native ops, on CPU tensors.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
