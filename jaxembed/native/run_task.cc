// The hot loop. Compiled once per instruction set, with JAXEMBED_ISA naming the namespace. Bags that whole_rows.h does
// not take are run here.
//
// Nothing here, or in the headers that only this file includes, may make a symbol that other files share (an inline
// function or template of the standard library, say): the linker would keep one of its instances, perhaps one that the
// processor cannot run.
#include <cstring>

#include "bag.h"
#include "row_values.h"
#include "rows.h"
#include "vectors.h"
#include "whole_rows.h"

namespace jaxembed::JAXEMBED_ISA {
namespace {

constexpr int64_t kRun = 32;  // entries per pass where a row takes several passes

template <typename Id>
struct Entries {
  const Id* ids;
  const float* weights;  // null: all ones
  int64_t count;
  const Id* ahead_end;  // rows are fetched ahead up to here
};

// sum[0 .. NV kLanes) += weights * rows, columns from d on; NV = 0: `tail` columns one by one.
template <RowType T, int NV, bool kWeighted, typename Id>
inline void Block(const Table& t, int64_t row_bytes, const Entries<Id>& e, int64_t d, int64_t tail, float* sum,
                  bool first, bool fetch) {
  constexpr int kVectors = NV > 0 ? NV : 1;
  Floats acc[kVectors];
  if constexpr (NV == 0) {
    acc[0] = Floats{};
    if (!first) std::memcpy(&acc[0], sum, 4 * tail);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      acc[v] = Floats{};
      if (!first) std::memcpy(&acc[v], sum + kLanes * v, 4 * kLanes);
    }
  }
  const uint8_t* base = static_cast<const uint8_t*>(t.rows);
  const int64_t ahead = Ahead(row_bytes);
  for (int64_t j = 0; j < e.count; ++j) {
    if (fetch && e.ids + j + ahead < e.ahead_end) Prefetch(t, row_bytes, e.ids[j + ahead]);
    const int64_t id = e.ids[j];
    const uint8_t* row = base + id * row_bytes;
    float w = 1.0f;
    if constexpr (kWeighted) w = e.weights[j];
    float scale = 1.0f, bias = 0.0f;
    if constexpr (Affine(T)) {
      scale = AtEnd(row + row_bytes, 0);
      bias = AtEnd(row + row_bytes, 1);
    }
    if constexpr (NV == 0) {
      for (int64_t i = 0; i < tail; ++i) {
        float x = Element<T>(t, row, d + i);
        if constexpr (Affine(T)) x = scale * x + bias;
        acc[0][i] += w * x;
      }
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        Floats x = Load<T, kLanes>(t, row, d + kLanes * v);
        if constexpr (Affine(T)) x = scale * x + bias;
        if constexpr (kWeighted) {
          acc[v] += w * x;
        } else {
          acc[v] += x;
        }
      }
    }
  }
  if constexpr (NV == 0) {
    std::memcpy(sum, &acc[0], 4 * tail);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) std::memcpy(sum + kLanes * v, &acc[v], 4 * kLanes);
  }
}

template <RowType T, bool kWeighted, typename Id>
inline void Pass(const Table& t, int64_t row_bytes, const Entries<Id>& e, float* sum, bool first) {
  int64_t d = 0;
  bool fetch = true;
  const int64_t dim = t.dim;
#define JAXEMBED_BLOCK(NV)                                                          \
  {                                                                                 \
    Block<T, NV, kWeighted, Id>(t, row_bytes, e, d, dim - d, sum + d, first, fetch); \
    d += kLanes * NV;                                                                    \
    fetch = false;                                                                  \
  }
  while (dim - d >= kMostVectors * kLanes) JAXEMBED_BLOCK(kMostVectors)
  if (dim - d >= 4 * kLanes) JAXEMBED_BLOCK(4)
  if (dim - d >= 2 * kLanes) JAXEMBED_BLOCK(2)
  if (dim - d >= kLanes) JAXEMBED_BLOCK(1)
  if (dim > d) JAXEMBED_BLOCK(0)
#undef JAXEMBED_BLOCK
}

// sum[0 .. D) = (first) or += weighted rows of all entries, which are valid.
template <RowType T, bool kWeighted, typename Id>
inline void Accumulate(const Table& t, int64_t row_bytes, Entries<Id> e, float* sum, bool first) {
  const int64_t total = e.count;
  const int64_t dim = t.dim;
  // A single block takes all columns, so that it may run through all entries.
  const bool one_pass = dim <= kLanes || (dim <= kMostVectors * kLanes && dim % kLanes == 0 && !(dim & (dim - 1)));
  const int64_t run = one_pass ? total : kRun;
  int64_t done = 0;
  do {
    e.count = total - done < run ? total - done : run;
    Pass<T, kWeighted, Id>(t, row_bytes, e, sum, first);
    first = false;
    done += e.count;
    e.ids += e.count;
    if (kWeighted) e.weights += e.count;
  } while (done < total);
}

// Writes a row, `at` values from the start of the output.
inline void Write(const Bag& bag, int64_t at, const float* sum) {
  const int64_t dim = bag.table.dim;
  if (bag.table.type == RowType::kBF16 || bag.table.type == RowType::kF16) {
    uint16_t* out = static_cast<uint16_t*>(bag.out) + at;
    if (bag.table.type == RowType::kBF16) {
      for (int64_t d = 0; d < dim; ++d) out[d] = FloatToBfloat(sum[d]);
      return;
    }
    int64_t d = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; d + 8 <= dim; d += 8) {
      const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(sum + d), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), h);
    }
#endif
    for (; d < dim; ++d) out[d] = FloatToHalf(sum[d]);
  } else if (sum != static_cast<float*>(bag.out) + at) {
    std::memcpy(static_cast<float*>(bag.out) + at, sum, 4 * dim);
  }
}

inline void Scale(Combiner combiner, float divisor, float* sum, int64_t dim) {
  if (combiner == Combiner::kSum) return;
  divisor = Inverse(combiner, divisor);
  if (divisor == 0.0f) {
    std::memset(sum, 0, 4 * dim);
  } else {
    for (int64_t d = 0; d < dim; ++d) sum[d] /= divisor;
  }
}

template <RowType T, bool kWeighted, typename Id>
struct Runner {
  const Bag& bag;
  const Placed& placed;
  const Id* ids;
  const int64_t row_bytes;
  float* scratch;  // [D], or [L, D], where the output is not float32
  bool in_place;   // the entries of a bag follow each other, and weights prune none
  int64_t bad = 0;
  const Id* ahead_end = nullptr;

  int64_t At(int64_t i) const { return placed.order ? placed.order[i] : i; }

  float* Sum(int64_t at) const {
    return scratch ? scratch : static_cast<float*>(bag.out) + at;
  }

  // Whether entry i takes part.
  bool Live(int64_t i) {
    const int64_t id = ids[i];
    if (bag.prune_ids && id < 0) return false;
    if (bag.prune_weights && bag.weights && !(bag.weights[i] > 0)) return false;
    if (static_cast<uint64_t>(id) < static_cast<uint64_t>(bag.table.vocabulary)) return true;
    ++bad;
    return false;
  }

  void Divide(const float* weights, int64_t count, float& divisor) const {
    if (bag.combiner == Combiner::kSum) return;
    if (!kWeighted) {
      divisor += static_cast<float>(count);
    } else if (bag.combiner == Combiner::kMean) {
      for (int64_t j = 0; j < count; ++j) divisor += weights[j];
    } else {
      for (int64_t j = 0; j < count; ++j) divisor += Square(weights[j]);
    }
  }

  // Entries [begin, end) into sum; returns the divisor.
  float Combine(int64_t begin, int64_t end, float* sum) {
    float divisor = 0;
    if (in_place && Rows<Id>(bag.table.vocabulary).HasAll(ids, begin, end)) {
      const float* weights = kWeighted ? bag.weights + begin : nullptr;
      Accumulate<T, kWeighted, Id>(bag.table, row_bytes, {ids + begin, weights, end - begin, ahead_end}, sum, true);
      Divide(weights, end - begin, divisor);
      return divisor;
    }
    Id live_ids[kRun];
    float live_weights[kRun];
    bool first = true;
    int64_t i = begin;
    do {
      int64_t count = 0;
      for (; i < end && count < kRun; ++i) {
        const int64_t at = At(i);
        if (!Live(at)) continue;
        Prefetch(bag.table, row_bytes, ids[at]);
        live_ids[count] = ids[at];
        if (kWeighted) live_weights[count] = bag.weights[at];
        ++count;
      }
      Accumulate<T, kWeighted, Id>(bag.table, row_bytes, {live_ids, live_weights, count, live_ids}, sum, first);
      Divide(live_weights, count, divisor);
      first = false;
    } while (i < end);
    return divisor;
  }

  // Rows are fetched up to the entry `fetch_end`.
  void Sequence(int64_t b, int64_t begin, int64_t end, int64_t fetch_end) {
    const int64_t length = bag.sequence_length, dim = bag.table.dim, ahead = Ahead(row_bytes);
    float* sum = Sum(b * bag.out_stride);
    std::memset(sum, 0, 4 * length * dim);
    if (!bag.columns.data && end - begin > length) end = begin + length;
    for (int64_t i = begin; i < end; ++i) {
      if (i + ahead < fetch_end) Prefetch(bag.table, row_bytes, ids[At(i + ahead)]);
      const int64_t at = At(i);
      const int64_t l = bag.columns.data ? bag.columns[at] : i - begin;
      if (l < 0 || l >= length || !Live(at)) continue;
      Accumulate<T, false, Id>(bag.table, row_bytes, {ids + at, nullptr, 1, ids}, sum + l * dim, false);
    }
    for (int64_t l = 0; l < length; ++l) Write(bag, b * bag.out_stride + l * dim, sum + l * dim);
  }

  // Nothing is added to a row, so that it keeps its bits: zeros their sign, and XLA's threads take subnormals for zeros.
  void Dense(int64_t i) {
    constexpr bool kHalf = T == RowType::kBF16 || T == RowType::kF16;
    const int64_t dim = bag.table.dim, size = kHalf ? 2 : 4;
    uint8_t* out = static_cast<uint8_t*>(bag.out) + i * bag.out_stride * size;
    if (!Live(i)) {
      std::memset(out, 0, size * dim);
    } else if constexpr (Affine(T)) {
      Accumulate<T, false, Id>(bag.table, row_bytes, {ids + i, nullptr, 1, ids}, reinterpret_cast<float*>(out), true);
    } else {
      const uint8_t* row = static_cast<const uint8_t*>(bag.table.rows) + ids[i] * row_bytes;
      if constexpr (kHalf || T == RowType::kF32) {
        std::memcpy(out, row, size * dim);
      } else {
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) {
          const Floats x = Load<T, kLanes>(bag.table, row, d);
          std::memcpy(out + 4 * d, &x, sizeof x);
        }
        for (; d < dim; ++d) {
          const float x = Element<T>(bag.table, row, d);
          std::memcpy(out + 4 * d, &x, 4);
        }
      }
    }
  }

  void Run(const Task& task) {
    const int64_t ahead = Ahead(row_bytes);
    if (task.partial) {
      task.partial[bag.table.dim] = Combine(task.begin, task.end, task.partial);
      return;
    }
    for (int64_t b = task.first_bag; b < task.last_bag; ++b) {
      if (bag.layout == Layout::kDense) {
        if (b + ahead < task.last_bag) Prefetch(bag.table, row_bytes, ids[b + ahead]);
        Dense(b);
        continue;
      }
      const int64_t begin = placed.splits[b], end = placed.splits[b + 1];
      if (bag.sequence_length) {
        Sequence(b, begin, end, task.end);
        continue;
      }
      float* sum = Sum(b * bag.out_stride);
      const float divisor = Combine(begin, end, sum);
      Scale(bag.combiner, divisor, sum, bag.table.dim);
      Write(bag, b * bag.out_stride, sum);
    }
  }
};

template <RowType T, bool kWeighted, typename Id>
int64_t RunAs(const Bag& bag, const Placed& placed, const Task& task) {
  const Id* ids = static_cast<const Id*>(bag.ids.data);
  Runner<T, kWeighted, Id> runner{bag, placed, ids, bag.table.row_bytes(), nullptr, false};
  runner.in_place = !placed.order && !(bag.prune_weights && bag.weights);
  runner.ahead_end = ids + task.end;
  Task rest = task;
  if (runner.in_place) {  // each row fetches the one so far ahead of it, so the first ones are left
    const int64_t ahead = Ahead(runner.row_bytes);
    const int64_t first = task.end - task.begin < ahead ? task.end : task.begin + ahead;
    for (int64_t i = task.begin; i < first; ++i) Prefetch(bag.table, runner.row_bytes, ids[i]);
    const bool combined = bag.layout != Layout::kDense && !bag.sequence_length && !task.partial;
    if (combined && Rows<Id>(bag.table.vocabulary).HasAll(ids, task.begin, first)) {
      rest.first_bag = TryWhole<T, kWeighted, Id>(bag, placed, task);
      if (rest.first_bag == task.last_bag) return 0;
    }
  }
  if (bag.table.type == RowType::kBF16 || bag.table.type == RowType::kF16) {
    runner.scratch = ThreadFloats(bag.table.dim * (bag.sequence_length ? bag.sequence_length : 1));
  }
  runner.Run(rest);
  return runner.bad;
}

template <RowType T>
int64_t RunTyped(const Bag& bag, const Placed& placed, const Task& task) {
  const bool weighted = bag.weights && !bag.sequence_length && bag.layout != Layout::kDense;
  if (bag.ids.wide) {
    return weighted ? RunAs<T, true, int64_t>(bag, placed, task) : RunAs<T, false, int64_t>(bag, placed, task);
  }
  return weighted ? RunAs<T, true, int32_t>(bag, placed, task) : RunAs<T, false, int32_t>(bag, placed, task);
}

}  // namespace

int64_t Run(const Bag& bag, const Placed& placed, const Task& task) {
  switch (bag.table.type) {
    case RowType::kF32: return RunTyped<RowType::kF32>(bag, placed, task);
    case RowType::kBF16: return RunTyped<RowType::kBF16>(bag, placed, task);
    case RowType::kF16: return RunTyped<RowType::kF16>(bag, placed, task);
    case RowType::kInt8: return RunTyped<RowType::kInt8>(bag, placed, task);
    case RowType::kInt4: return RunTyped<RowType::kInt4>(bag, placed, task);
    case RowType::kCodes8: return RunTyped<RowType::kCodes8>(bag, placed, task);
    case RowType::kCodes4: return RunTyped<RowType::kCodes4>(bag, placed, task);
  }
  return 0;
}

void Finish(const Bag& bag, int64_t b, float* partials, int64_t count) {
  const int64_t dim = bag.table.dim;
  for (int64_t p = 1; p < count; ++p) {
    for (int64_t d = 0; d <= dim; ++d) partials[d] += partials[p * (dim + 1) + d];
  }
  Scale(bag.combiner, partials[dim], partials, dim);
  Write(bag, b * bag.out_stride, partials);
}

}  // namespace jaxembed::JAXEMBED_ISA
