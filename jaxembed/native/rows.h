// Which ids are rows, rows fetched ahead of use, and what sums are divided by.
// A part of run_task.cc, which says what must not be in here.
#ifndef JAXEMBED_ROWS_H_
#define JAXEMBED_ROWS_H_

#include <type_traits>

#include "bag.h"

namespace jaxembed::JAXEMBED_ISA {
namespace {

// Rows fetched ahead of use: about as many lines of memory as a processor waits for at a time.
constexpr int64_t Ahead(int64_t row_bytes) { return row_bytes <= 64 ? 32 : row_bytes <= 128 ? 24 : 16; }

// Always inline: GCC takes a function that only fetches ahead for one without effect, and drops its calls.
__attribute__((always_inline)) inline void Prefetch(const Table& t, int64_t row_bytes, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(t.vocabulary)) return;
  const uint8_t* row = static_cast<const uint8_t*>(t.rows) + id * row_bytes;
  for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
  __builtin_prefetch(row + row_bytes - 1, 0, 3);
}

inline float Inverse(Combiner combiner, float divisor) {
  if (combiner == Combiner::kSum) return 1.0f;
  if (combiner == Combiner::kSqrtn) divisor = __builtin_sqrtf(divisor);
  return divisor;
}

// A weight's square, rounded before it is added: GCC would fuse the two in some places only, and the bits of a bag would
// depend on which of them it comes through.
inline float Square(float w) {
  float square = w * w;
#if defined(__x86_64__)
  asm("" : "+x"(square));
#elif defined(__aarch64__)
  asm("" : "+w"(square));
#endif
  return square;
}

// Whether an id is a row. A vocabulary counts as at most 2^31 or 2^63, so that a negative id never is.
template <typename Id>
struct Rows {
  using Unsigned = std::make_unsigned_t<Id>;
  static constexpr Unsigned kNegative = Unsigned{1} << (8 * sizeof(Id) - 1);
  Unsigned size;

  explicit Rows(int64_t vocabulary)
      : size(static_cast<uint64_t>(vocabulary) < kNegative ? static_cast<Unsigned>(vocabulary) : kNegative) {}
  bool Has(Id id) const { return static_cast<Unsigned>(id) < size; }
  bool HasAll(const Id* ids, int64_t begin, int64_t end) const {
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= !Has(ids[i]);
    return !bad;
  }
};

}  // namespace
}  // namespace jaxembed::JAXEMBED_ISA

#endif  // JAXEMBED_ROWS_H_
