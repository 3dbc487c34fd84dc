// Picks the instance of the hot loop for the processor it runs on.
#include "bag.h"
#include "instances.h"

#if defined(JAXEMBED_X86_64)
#include <cpuid.h>
#endif

namespace jaxembed {
namespace {

#if defined(JAXEMBED_X86_64)
// What compilers may use of x86-64-v3 beside AVX2, FMA and BMI2. Virtual machines may hide each by itself, and not all
// compilers know all of their names.
bool HasRestOfV3() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kMovbe = 1u << 22, kF16c = 1u << 29, kBmi = 1u << 3, kLzcnt = 1u << 5;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kMovbe) || !(c & kF16c)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & kBmi)) return false;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & kLzcnt);
}
#endif

}  // namespace

Instances FindInstances() {
  Instances found = {{{"baseline", baseline::Run}, {"v3", nullptr}, {"v4", nullptr}}};
#if defined(JAXEMBED_X86_64)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      HasRestOfV3()) {
    found.of[1].run = v3::Run;
  }
  if (found.of[1].run && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
    found.of[2].run = v4::Run;
  }
#endif
  return found;
}

Instance Fastest() {
  Instance fastest = {};
  for (const Instance& instance : FindInstances().of) fastest = instance.run ? instance : fastest;
  return fastest;
}

int64_t RunBag(const Bag& bag, const Placed& placed, const Task& task) {
  static const RunTask run = Fastest().run;
  return run(bag, placed, task);
}

void FinishBag(const Bag& bag, int64_t b, float* partials, int64_t count) {
  baseline::Finish(bag, b, partials, count);
}

}  // namespace jaxembed
