// The shared memory of the block that runs, and how it gives way to that of another.
#pragma once

#include <link.h>

#include <cstring>
#include <vector>

#include "fibers.h"

constexpr size_t MAX_SHARED_BYTES = 227 << 10;
// Of csrc/cuda, where it is declared without a size: fastdmd::(anonymous namespace)::shared.
alignas(16) thread_local char dynamic_shared[MAX_SHARED_BYTES] asm("_ZN7fastdmd12_GLOBAL__N_16sharedE");

namespace cuda_on_cpu {
namespace {

// The __shared__ variables: all thread_local ones of this library, and the first bytes of the dynamic array. They lie
// at the same place for every block, so that their contents change when the block does.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) : dynamic_bytes_(dynamic_bytes) {
    dynamic_shared[0] = 0;  // a thread has this memory only once it uses it
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* self) {
          char* begin = static_cast<char*>(library->dlpi_tls_data);
          for (int i = 0; i < library->dlpi_phnum; ++i) {
            const ElfW(Phdr)& segment = library->dlpi_phdr[i];
            if (segment.p_type == PT_TLS && begin <= dynamic_shared && dynamic_shared < begin + segment.p_memsz) {
              static_cast<SharedMemory*>(self)->begin_ = begin;
              static_cast<SharedMemory*>(self)->size_ = segment.p_memsz;
            }
          }
          return 0;
        },
        this);
    instance = this;
    forbid(dynamic_shared + dynamic_bytes, MAX_SHARED_BYTES - dynamic_bytes);
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { allow(dynamic_shared, MAX_SHARED_BYTES); }

  static inline const SharedMemory* instance;  // of the launch under way

  // Where it is saved.
  size_t offset_of(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return size_t(at - begin_) - (at < dynamic_shared + MAX_SHARED_BYTES ? 0 : MAX_SHARED_BYTES - dynamic_bytes_);
  }
  size_t size() const { return size_ - MAX_SHARED_BYTES + dynamic_bytes_; }

  // copy(part of shared memory, offset, bytes) for the parts
  template <class Copy>
  void each(Copy copy) const {
    const size_t before = size_t(dynamic_shared - begin_);
    copy(begin_, size_t(0), before + dynamic_bytes_);
    copy(dynamic_shared + MAX_SHARED_BYTES, before + dynamic_bytes_, size_ - before - MAX_SHARED_BYTES);
  }
  void save(std::vector<char>& saved) const {
    each([&](char* part, size_t offset, size_t bytes) { std::memcpy(saved.data() + offset, part, bytes); });
  }
  void restore(const std::vector<char>& saved) const {
    each([&](char* part, size_t offset, size_t bytes) { std::memcpy(part, saved.data() + offset, bytes); });
  }

 private:
  char* begin_ = nullptr;
  size_t size_ = 0, dynamic_bytes_;
};

}  // namespace
}  // namespace cuda_on_cpu
