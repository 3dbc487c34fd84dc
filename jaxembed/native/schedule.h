// Work given to XLA's threads.
#ifndef JAXEMBED_SCHEDULE_H_
#define JAXEMBED_SCHEDULE_H_

#include <cstdint>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace jaxembed {

// Without memory for all of them fewer help, for none may run on when the call has ended: this thread does the rest.
template <typename Run>
void ScheduleAll(xla::ffi::ThreadPool& pool, int64_t helpers, const Run& run) {
  try {
    for (int64_t t = 0; t < helpers; ++t) pool.Schedule(Run(run));
  } catch (const std::bad_alloc&) {
  }
}

}  // namespace jaxembed

#endif  // JAXEMBED_SCHEDULE_H_
