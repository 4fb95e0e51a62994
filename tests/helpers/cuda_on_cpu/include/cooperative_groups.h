// Thread block clusters.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_cpu {

void cluster_barrier();
void* of_block(void* mine, unsigned rank);  // where another block of the cluster has it, in its shared memory

}  // namespace cuda_on_cpu

namespace cooperative_groups {

struct cluster_group {
  void sync() const { cuda_on_cpu::cluster_barrier(); }
  void barrier_arrive() const {}
  void barrier_wait() const { cuda_on_cpu::cluster_barrier(); }
  template <class T>
  T* map_shared_rank(T* mine, unsigned rank) const {
    return static_cast<T*>(cuda_on_cpu::of_block(mine, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
