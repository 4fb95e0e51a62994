// What the native libraries were built with and from.
#pragma once

#define FASTDMD_EXPORT __attribute__((visibility("default")))

namespace fastdmd {

struct BuildFacts {
  const char* compiler;   // "GNU 12.2.0"
  const char* flags;      // of the kernels, for every instruction set
  const char* torch_abi;  // the oldest torch whose stable ABI has all that the ops call: "2.10"
  const char* commit;     // "83b2f07", "83b2f07+changes"; empty if unknown
};

FASTDMD_EXPORT const BuildFacts& build_facts();

}  // namespace fastdmd
