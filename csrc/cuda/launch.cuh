// How a kernel is launched: on the device and the current stream of a tensor.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "../tensors.h"

namespace fastdmd {
namespace {  // each file compiles its own copy

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
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_multiprocessor, reinterpret_cast<const void*>(kernel), threads, 0));
    return int64_t(std::max(per_multiprocessor, 1)) * num_multiprocessors();
  }

  // For kernels that keep their data in shared memory: as many blocks as fit, at the cost of the L1 cache.
  template <class Arguments>
  void prefer_shared_memory(void (*kernel)(Arguments)) const {
    const auto* function = reinterpret_cast<const void*>(kernel);
    with_facts(function, [&](KernelFacts& facts) {
      if (facts.prefers_shared_memory) return;
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
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
  void launch(void (*kernel)(Arguments),
              int64_t blocks,
              int threads,
              std::type_identity_t<Arguments> arguments,
              int64_t shared_bytes = 0,
              int cluster = 1) const {
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > KernelFacts{}.shared_bytes)
      with_facts(function, [&](KernelFacts& facts) {
        if (shared_bytes <= facts.shared_bytes) return;
        STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
        facts.shared_bytes = shared_bytes;
      });
    void* pointers[] = {&arguments};
    const dim3 grid(static_cast<unsigned>(blocks));
    const dim3 block(static_cast<unsigned>(threads));
    if (cluster == 1) {
      STD_CUDA_CHECK(cudaLaunchKernel(function, grid, block, pointers, size_t(shared_bytes), stream_));
      return;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = 1;
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
