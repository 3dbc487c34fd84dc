// Loops over the sums of a bag that the compiler's front end unrolls. GCC keeps an array in memory whose loops are only
// unrolled by its later passes, or that anything indexes by a variable. Of 16 sums that are neither, it keeps 13 in
// AVX2's registers.
// A part of run_task.cc, which says what must not be in here.
#ifndef JAXEMBED_SUMS_H_
#define JAXEMBED_SUMS_H_

#include <cstring>

#include "vectors.h"

#define JAXEMBED_INLINE __attribute__((always_inline))

namespace jaxembed::JAXEMBED_ISA {
namespace {

template <int V>
struct Number {
  static constexpr int value = V;
};

// step(Number<0>()), step(Number<kStep>()), ... below NV: a loop that is unrolled before GCC looks at what it indexes.
template <int NV, int kStep = 1, int kFrom = 0, typename Step>
JAXEMBED_INLINE inline void Each(Step step) {
  if constexpr (kFrom < NV) {
    step(Number<kFrom>());
    Each<NV, kStep, kFrom + kStep>(step);
  }
}

template <int kN, int NV>
JAXEMBED_INLINE inline void LoadSums(const float* from, FloatsOf<kN> (&sums)[NV]) {
  Each<NV>([&](auto v) JAXEMBED_INLINE { std::memcpy(&sums[v.value], from + kN * v.value, 4 * kN); });
}

template <int kN, int NV>
JAXEMBED_INLINE inline void ClearSums(FloatsOf<kN> (&sums)[NV]) {
  Each<NV>([&](auto v) JAXEMBED_INLINE { sums[v.value] = FloatsOf<kN>{}; });
}

template <int kN, int NV>
JAXEMBED_INLINE inline void SaveSums(const FloatsOf<kN> (&sums)[NV], float* to) {
  Each<NV>([&](auto v) JAXEMBED_INLINE { std::memcpy(to + kN * v.value, &sums[v.value], 4 * kN); });
}

}  // namespace
}  // namespace jaxembed::JAXEMBED_ISA

#endif  // JAXEMBED_SUMS_H_
