// What the kernel tells of itself.
#include "instances.h"

// The instruction set of the hot loop that this processor gets: "baseline", "v3" or "v4".
extern "C" __attribute__((visibility("default"))) const char* JaxembedInstructionSet() {
  const char* name = "";
  for (const jaxembed::Instance& instance : jaxembed::FindInstances().of) name = instance.run ? instance.name : name;
  return name;
}
