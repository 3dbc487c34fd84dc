// The hot loop's instances, one for each instruction set.
#ifndef JAXEMBED_INSTANCES_H_
#define JAXEMBED_INSTANCES_H_

#include "bag.h"

namespace jaxembed {

#define JAXEMBED_DECLARE(isa)                               \
  namespace isa {                                           \
  int64_t Run(const Bag&, const Placed&, const Task&);      \
  void Finish(const Bag&, int64_t b, float*, int64_t count); \
  }
JAXEMBED_DECLARE(baseline)
#if defined(JAXEMBED_X86_64)
JAXEMBED_DECLARE(v3)
JAXEMBED_DECLARE(v4)
#endif
#undef JAXEMBED_DECLARE

struct Instance {
  const char* name;
  RunTask run;  // null where this processor cannot run it
};

// The fastest last.
constexpr int kInstances = 3;
struct Instances {
  Instance of[kInstances];
};
Instances FindInstances();
Instance Fastest();

}  // namespace jaxembed

#endif  // JAXEMBED_INSTANCES_H_
