// The instruction set that the kernels run with. One choice per process, which the ops and fastdmd._runtime share.
#pragma once

#include <string>
#include <vector>

#include "facts.h"
#include "kernels.h"

namespace fastdmd {

FASTDMD_EXPORT const Kernels& kernels();  // of the set that was chosen
FASTDMD_EXPORT const char* instruction_set();

// Those that were compiled, best first.
FASTDMD_EXPORT std::vector<std::string> instruction_sets();

// Takes the best that this machine has, up to `name`; false, changing nothing, if no set has that name.
FASTDMD_EXPORT bool hold_back(const std::string& name);

}  // namespace fastdmd
