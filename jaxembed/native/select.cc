// Picks the instance of the hot loop for the processor it runs on.
#include "bag.h"
#include "instances.h"

namespace jaxembed {
namespace {

RunTask Select() {
  const Instances found = FindInstances();
  RunTask fastest = nullptr;
  for (const Instance& instance : found.of) fastest = instance.run ? instance.run : fastest;
  return fastest;
}

}  // namespace

Instances FindInstances() {
  Instances found = {{{"baseline", baseline::Run}, {"v3", nullptr}, {"v4", nullptr}}};
#if defined(JAXEMBED_X86_64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    found.of[1].run = v3::Run;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    found.of[2].run = v4::Run;
  }
#endif
  return found;
}

int64_t RunBag(const Bag& bag, const Placed& placed, const Task& task) {
  static const RunTask run = Select();
  return run(bag, placed, task);
}

void FinishBag(const Bag& bag, int64_t b, float* partials, int64_t count) {
  baseline::Finish(bag, b, partials, count);
}

}  // namespace jaxembed
