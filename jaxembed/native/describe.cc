// What the kernel tells of itself.
#include <cstdint>

#include "decode.h"
#include "instances.h"

// The instruction set of the hot loop that this processor gets: "baseline", "v3" or "v4".
extern "C" __attribute__((visibility("default"))) const char* JaxembedInstructionSet() {
  return jaxembed::Fastest().name;
}

// How many numbers describe a feature: a caller of other sources sends more or fewer.
extern "C" __attribute__((visibility("default"))) int64_t JaxembedNumbers() { return jaxembed::kFields; }
