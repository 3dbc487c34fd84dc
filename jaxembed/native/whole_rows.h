// Bags of rows of whole vectors, whose entries follow each other and all count: nearly all that are run.
// A part of run_task.cc, which says what must not be in here.
#ifndef JAXEMBED_WHOLE_ROWS_H_
#define JAXEMBED_WHOLE_ROWS_H_

#include <cstring>

#include "bag.h"
#include "row_values.h"
#include "rows.h"
#include "sums.h"
#include "vectors.h"

namespace jaxembed::JAXEMBED_ISA {
namespace {

// acc += w * the columns from `row` on of a row that ends at `end`.
template <RowType T, int kN, int NV, bool kWeighted>
JAXEMBED_INLINE inline void AddRow(const Table& t, const uint8_t* row, const uint8_t* end, float w,
                                                  FloatsOf<kN> (&acc)[NV]) {
  float scale = 1.0f, bias = 0.0f;
  if constexpr (Affine(T)) {
    scale = AtEnd(end, 0);
    bias = AtEnd(end, 1);
  }
  EachVector<T, kN, NV>(t, row, [&](FloatsOf<kN> x, auto v) JAXEMBED_INLINE {
    if constexpr (Affine(T)) x = scale * x + bias;  // not the biases apart: two large sums would cancel
    if constexpr (kWeighted) {
      acc[v.value] += w * x;
    } else {
      acc[v.value] += x;
    }
  });
}

template <int kN, int NV>
JAXEMBED_INLINE inline void DivideAll(Combiner combiner, float divisor, FloatsOf<kN> (&acc)[NV]) {
  if (combiner == Combiner::kSum) return;
  const float by = Inverse(combiner, divisor);
  Each<NV>([&](auto v) JAXEMBED_INLINE { acc[v.value] = by == 0.0f ? FloatsOf<kN>{} : acc[v.value] / by; });
}

// The usual case: the entries of a bag follow each other and all count, and a row is NV vectors. With these known at
// compile time a row costs little more than its loads, and a bag than its stores.
//
// The first rows of the task must be there, those that each row would fetch ahead of it. The others are looked at as they
// are fetched: to run through all ids before would wait for each line of them. Returns the first bag that was not
// written, which is not the last if an id is no row.
//
// A function of its own for each, so that GCC gives the loop all registers.
template <RowType T, int kN, int NV, bool kWeighted, typename Id>
__attribute__((noinline)) int64_t RunWhole(const Bag& bag, const Placed& placed, const Task& task) {
  constexpr int64_t kBytes = BytesOf(T, NV * kN), kRow = kBytes + (Affine(T) ? kScaleBiasBytes : 0);
  constexpr int64_t kAhead = Ahead(kRow);
  const Table& t = bag.table;
  const uint8_t* const base = static_cast<const uint8_t*>(t.rows);
  const Id* const ids = static_cast<const Id*>(bag.ids.data);
  const Rows<Id> rows(t.vocabulary);
  const Combiner combiner = bag.combiner;
  const float* const weights = bag.weights;
  const int64_t fetch_end = task.end - kAhead;
  void* const out = bag.out;  // what is stored there cannot change these
  const int64_t out_stride = bag.out_stride, last_bag = task.last_bag;
  const Ints splits = placed.splits;
  int64_t end = splits[task.first_bag];
  for (int64_t b = task.first_bag; b < last_bag; ++b) {
    const int64_t begin = end;
    end = splits[b + 1];
    float divisor = 0;
    FloatsOf<kN> acc[NV];
    ClearSums<kN>(acc);
    for (int64_t i = begin; i < end; ++i) {
      if (i < fetch_end) {
        const Id id = ids[i + kAhead];
        if (__builtin_expect(!rows.Has(id), false)) return b;
        const uint8_t* row = base + id * kRow;
#pragma GCC unroll 16
        for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(row + line, 0, 3);
        // Rows that divide a line do not cross one.
        if (Affine(T) && 64 % kRow != 0) __builtin_prefetch(row + kRow - 1, 0, 3);
      }
      float w = 1.0f;
      if constexpr (kWeighted) {
        w = weights[i];
        divisor += combiner == Combiner::kSqrtn ? Square(w) : w;
      }
      const uint8_t* row = base + ids[i] * kRow;
      AddRow<T, kN, NV, kWeighted>(t, row, row + kRow, w, acc);
    }
    DivideAll<kN, NV>(combiner, kWeighted ? divisor : static_cast<float>(end - begin), acc);
    StoreAll<T, kN, NV>(out, b * out_stride, acc);
  }
  return last_bag;
}

// Entries that RunBlocks takes through all blocks of columns before the next ones. What is fetched of one block holds
// the beginning of the next, which a long bag would have lost by then; rows of float32 are whole lines.
template <RowType T>
constexpr int64_t kBlockRun = T == RowType::kF32 ? INT64_MAX : 16;

// RunWhole where a row is `blocks` times NV vectors.
template <RowType T, int kN, int NV, bool kWeighted, typename Id>
__attribute__((noinline)) int64_t RunBlocks(const Bag& bag, const Placed& placed, const Task& task, int64_t blocks) {
  constexpr int64_t kColumns = NV * kN, kBytes = BytesOf(T, kColumns);
  const Table& t = bag.table;
  const int64_t row_bytes = blocks * kBytes + (Affine(T) ? kScaleBiasBytes : 0);
  const Id* ids = static_cast<const Id*>(bag.ids.data);
  const Rows<Id> rows(t.vocabulary);
  const Combiner combiner = bag.combiner;
  const int64_t ahead = Ahead(row_bytes), fetch_end = task.end - ahead;
  void* const out = bag.out;
  const int64_t out_stride = bag.out_stride;
  constexpr int64_t run = kBlockRun<T>;
  float* const sums = run == INT64_MAX ? nullptr : ThreadFloats(blocks * kColumns);  // of a bag between its runs
  int64_t end = placed.splits[task.first_bag];
  for (int64_t b = task.first_bag; b < task.last_bag; ++b) {
    const int64_t begin = end;
    end = placed.splits[b + 1];
    float divisor = 0;
    int64_t first = begin;
    do {
      const int64_t last = end - first <= run ? end : first + run;
      for (int64_t block = 0; block < blocks; ++block) {
        const uint8_t* base = static_cast<const uint8_t*>(t.rows) + block * kBytes;
        // From the block to the end of its row.
        const int64_t to_end = row_bytes - block * kBytes;
        FloatsOf<kN> acc[NV];
        if (first == begin) {
          ClearSums<kN>(acc);
        } else {
          LoadSums<kN>(sums + block * kColumns, acc);
        }
        for (int64_t i = first; i < last; ++i) {
          if (i < fetch_end) {
            const Id id = ids[i + ahead];
            if (__builtin_expect(!rows.Has(id), false)) return b;
            const uint8_t* row = base + id * row_bytes;
#pragma GCC unroll 16
            for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(row + line, 0, 3);
            if (Affine(T) && block == 0) __builtin_prefetch(row + to_end - 1, 0, 3);
          }
          float w = 1.0f;
          if constexpr (kWeighted) {
            w = bag.weights[i];
            if (block == 0) divisor += combiner == Combiner::kSqrtn ? Square(w) : w;
          }
          const uint8_t* row = base + ids[i] * row_bytes;
          AddRow<T, kN, NV, kWeighted>(t, row, row + to_end, w, acc);
        }
        if (last != end) {
          SaveSums<kN>(acc, sums + block * kColumns);
          continue;
        }
        DivideAll<kN, NV>(combiner, kWeighted ? divisor : static_cast<float>(end - begin), acc);
        StoreAll<T, kN, NV>(out, b * out_stride + block * kColumns, acc);
      }
      first = last;
    } while (first < end);
  }
  return task.last_bag;
}

// What RunWhole returns; the task's first bag if its rows are of a width that it does not take.
template <RowType T, bool kWeighted, typename Id>
int64_t TryWhole(const Bag& bag, const Placed& placed, const Task& task) {
  const int64_t dim = bag.table.dim;
#define JAXEMBED_WHOLE(N, NV) \
  if (dim == N * NV) return RunWhole<T, N, NV, kWeighted, Id>(bag, placed, task);
#define JAXEMBED_BLOCKS(NV)          \
  if (dim % (kWholeLanes * NV) == 0) \
    return RunBlocks<T, kWholeLanes, NV, kWeighted, Id>(bag, placed, task, dim / (kWholeLanes * NV));
  JAXEMBED_WHOLE(kLanes, 1)
  if constexpr (kWholeLanes > kLanes) JAXEMBED_WHOLE(kWholeLanes, 1)
  JAXEMBED_WHOLE(kWholeLanes, 2)
  JAXEMBED_WHOLE(kWholeLanes, 4)
  JAXEMBED_WHOLE(kWholeLanes, 8)
  JAXEMBED_WHOLE(kWholeLanes, kWholeVectors)
  // Of float32 each column is a load and an addition, and takes no other register.
  if constexpr (kBlockVectors == kWholeVectors || T == RowType::kF32) JAXEMBED_BLOCKS(kWholeVectors)
  JAXEMBED_BLOCKS(8)
#undef JAXEMBED_BLOCKS
#undef JAXEMBED_WHOLE
  return task.first_bag;
}

}  // namespace
}  // namespace jaxembed::JAXEMBED_ISA

#endif  // JAXEMBED_WHOLE_ROWS_H_
