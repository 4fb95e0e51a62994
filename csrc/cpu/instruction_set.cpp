// The choice of the instruction set.
#include "instruction_set.h"

#include <atomic>
#include <cstdlib>

namespace fastdmd {

FASTDMD_DECLARE_KERNELS(generic)
#if defined(__x86_64__)
FASTDMD_DECLARE_KERNELS(avx2)
FASTDMD_DECLARE_KERNELS(avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels& kernels;
  bool (*runs)();
};

const InstructionSet SETS[] = {
#if defined(__x86_64__)
    {"avx512",
     avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     }},
    {"avx2",
     avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }},
#endif
    {"generic", generic::kernels, [] { return true; }},
};

// Null if no set has that name; the last one runs everywhere.
const InstructionSet* best_up_to(const std::string& name) {
  bool allowed = false;
  for (const InstructionSet& set : SETS) {
    allowed = allowed || set.name == name;
    if (allowed && set.runs()) return &set;
  }
  return nullptr;
}

// ATEN_CPU_CAPABILITY=avx2|default holds it back, as it does torch.
const InstructionSet* from_environment() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = variable ? variable : "";
  const InstructionSet* set = best_up_to(capability == "default" ? "generic" : capability);
  return set ? set : best_up_to(SETS[0].name);
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set = from_environment();
  return set;
}

}  // namespace

const Kernels& kernels() { return chosen().load(std::memory_order_relaxed)->kernels; }

const char* instruction_set() { return chosen().load(std::memory_order_relaxed)->name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : SETS) names.push_back(set.name);
  return names;
}

bool hold_back(const std::string& name) {
  const InstructionSet* set = best_up_to(name);
  if (set) chosen().store(set, std::memory_order_relaxed);
  return set;
}

}  // namespace fastdmd
