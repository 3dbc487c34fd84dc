// Picks the instance of the hot loop for the processor it runs on.
#include "bag.h"

namespace jaxembed {

#define JAXEMBED_DECLARE(isa)                                     \
  namespace isa {                                                 \
  int64_t Run(const Bag&, const Placed&, const Task&);            \
  void Finish(const Bag&, int64_t b, float*, int64_t count);       \
  }
JAXEMBED_DECLARE(baseline)
#if defined(JAXEMBED_X86_64)
JAXEMBED_DECLARE(v3)
JAXEMBED_DECLARE(v4)
#endif

namespace {

RunTask Select() {
#if defined(JAXEMBED_X86_64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    return v4::Run;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return v3::Run;
#endif
  return baseline::Run;
}

}  // namespace

int64_t RunBag(const Bag& bag, const Placed& placed, const Task& task) {
  static const RunTask run = Select();
  return run(bag, placed, task);
}

void FinishBag(const Bag& bag, int64_t b, float* partials, int64_t count) {
  baseline::Finish(bag, b, partials, count);
}

}  // namespace jaxembed
