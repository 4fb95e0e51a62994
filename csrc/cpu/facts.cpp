// The facts of the build, from the compiler's command line. A small file, as every new commit compiles it again.
#include "facts.h"

#include <string>

#include "instruction_set.h"

namespace fastdmd {

const BuildFacts& build_facts() {
  static constexpr BuildFacts facts{FASTDMD_COMPILER, FASTDMD_FLAGS, FASTDMD_TORCH_TARGET, FASTDMD_COMMIT};
  return facts;
}

}  // namespace fastdmd

// What it was built from, by fastdmd/_sources.py; empty if unknown.
extern "C" FASTDMD_EXPORT const char* fastdmd_sources() { return FASTDMD_SOURCES; }

// In words, where Python has no module fastdmd._runtime.
extern "C" FASTDMD_EXPORT const char* fastdmd_build_facts() {
  thread_local std::string facts;
  facts = std::string("compiled by ") + FASTDMD_COMPILER + ", stable ABI of torch " + FASTDMD_TORCH_TARGET +
          ", running " + fastdmd::instruction_set();
  return facts.c_str();
}
