// Copies into shared memory, which arrive when they are waited for and not before.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_cpu {

void copy_later(void* to, const void* from, size_t num_bytes);
void commit_copies();
void wait_for_copies(size_t but_the_last);

}  // namespace cuda_on_cpu

inline void __pipeline_memcpy_async(void* to, const void* from, size_t num_bytes) {
  if (num_bytes != sizeof(uint4)) cuda_on_cpu::fail("a copy into shared memory is not of 16 bytes");
  cuda_on_cpu::require_alignment(static_cast<const uint4*>(to));
  cuda_on_cpu::require_alignment(static_cast<const uint4*>(from));
  cuda_on_cpu::copy_later(to, from, num_bytes);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t but_the_last) { cuda_on_cpu::wait_for_copies(but_the_last); }
