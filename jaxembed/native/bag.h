// embedding_bag on CPU: the contract of the pure kernel, without XLA.
//
// For one feature, with entry i in bag b:
//
//   for each bag b:
//     acc = 0; divisor = 0
//     for each entry i of bag b:                    // layout says which
//       if prune_ids and ids[i] < 0: continue
//       if prune_weights and not weights[i] > 0: continue
//       if ids[i] is not in [0, V): bad += 1; continue
//       w = weights ? weights[i] : 1
//       acc += w * row(ids[i])                      // float32
//       divisor += w (mean) or w * w (sqrtn)
//     out[b] = sum: acc; mean: acc / divisor; sqrtn: acc / sqrt(divisor); x / 0 = 0
//
// With sequence_length L > 0 nothing is combined: out[b, l] holds the row at position l. The dense
// layout copies row ids[i] to out[i]. Entries outside of every bag are padding and are never read.
#ifndef JAXEMBED_BAG_H_
#define JAXEMBED_BAG_H_

#include <cstdint>

namespace jaxembed {

enum class Layout : int64_t { kDense = 0, kRagged = 1, kSparse = 2 };
enum class Combiner : int64_t { kSum = 0, kMean = 1, kSqrtn = 2 };
enum class RowType : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2, kInt8 = 3, kInt4 = 4, kCodes8 = 5, kCodes4 = 6 };

// An int32 or int64 array.
struct Ints {
  const void* data = nullptr;
  bool wide = false;
  __attribute__((always_inline)) int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Rows of any type. int8 and int4: code * scale + bias, which follow the codes of each row, so that a row is one
// place in memory. codes: codebook[code].
struct Table {
  const void* rows = nullptr;
  int64_t vocabulary = 0;
  int64_t dim = 0;
  RowType type = RowType::kF32;
  const float* codebook = nullptr;
  int64_t row_bytes() const;
};

constexpr bool Affine(RowType type) { return type == RowType::kInt8 || type == RowType::kInt4; }
constexpr int64_t kScaleBiasBytes = 8;  // two float32

struct Bag {
  Layout layout = Layout::kRagged;
  Combiner combiner = Combiner::kSum;
  bool prune_ids = false;
  bool prune_weights = false;
  int64_t num_bags = 0;
  int64_t sequence_length = 0;
  int64_t num_ids = 0;
  Table table;
  Ints ids;
  Ints bags;     // row splits or row ids
  Ints columns;  // sparse sequences
  const float* weights = nullptr;
  void* out = nullptr;  // float32, or the table's type where that is bfloat16 or float16
  int64_t out_stride = 0;  // values from one bag's result to the next one's: D, L D, or more
};

// A run of work on one feature: bags [first_bag, last_bag), of which entries [begin, end) only, where
// one bag is shared by several tasks; `partial` then takes D + 1 floats, else it is null.
struct Task {
  int32_t feature = 0;
  int64_t first_bag = 0, last_bag = 0;
  int64_t begin = 0, end = 0;
  float* partial = nullptr;
};

// Splits of one feature's bags: bag b has entries order[splits[b]] ... (order null: the identity).
struct Placed {
  Ints splits;
  const int32_t* order = nullptr;
};

// Runs one task; returns the number of bad ids. There is an instance for each instruction set.
using RunTask = int64_t (*)(const Bag&, const Placed&, const Task&);
int64_t RunBag(const Bag& bag, const Placed& placed, const Task& task);

// Writes a bag that several tasks shared from their partial sums, which it changes.
void FinishBag(const Bag& bag, int64_t b, float* partials, int64_t count);

// Room for `size` floats, this thread's until its next call.
float* ThreadFloats(int64_t size);

}  // namespace jaxembed

#endif  // JAXEMBED_BAG_H_
