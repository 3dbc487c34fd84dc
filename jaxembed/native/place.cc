#include "place.h"

#include <algorithm>

namespace jaxembed {
namespace {

// A bag is shared by several tasks from two such pieces on. A constant, so that the order of summation
// does not depend on the number of threads.
constexpr int64_t kPieceBytes = 1 << 20;

// What an entry costs in bytes: a short row takes as long as all of the line of memory that it is in.
int64_t EntryCost(const Bag& bag) { return (bag.table.row_bytes() + 63) / 64 * 64 + 8; }

// Whether splits [num_bags + 1] rise within [0, num_ids]; without a branch, so that the loop vectorizes.
template <typename Int>
bool Rise(const Int* splits, int64_t num_bags, int64_t num_ids) {
  Int fall = splits[0] < 0 || splits[num_bags] > num_ids;  // as wide as its lanes, which would be packed otherwise
  for (int64_t b = 0; b < num_bags; ++b) fall |= static_cast<Int>(splits[b + 1] < splits[b]);
  return !fall;
}

std::string PlaceSparse(const Bag& bag, Scratch& scratch, Placed* placed) {
  const int64_t num_bags = bag.num_bags, n = bag.num_ids;
  scratch.splits.assign(num_bags + 1, 0);
  int32_t* splits = scratch.splits.data();
  bool sorted = true;
  int64_t last = -1, first = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = bag.bags[i];
    if (row < 0 || row >= num_bags) {
      // Padding may only be at the ends of sorted rows.
      if (row < 0 && last < 0) {
        first = i + 1;
      } else {
        last = num_bags;
      }
      continue;
    }
    sorted &= row >= last;
    last = std::max(last, row);
    ++splits[row + 1];
  }
  placed->splits = {splits, false};
  if (sorted) splits[0] = static_cast<int32_t>(first);
  for (int64_t b = 0; b < num_bags; ++b) splits[b + 1] += splits[b];
  if (sorted) return "";
  scratch.order.resize(n);
  scratch.next.assign(splits, splits + num_bags);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = bag.bags[i];
    if (row >= 0 && row < num_bags) scratch.order[scratch.next[row]++] = static_cast<int32_t>(i);
  }
  placed->order = scratch.order.data();
  return "";
}

}  // namespace

float* ThreadFloats(int64_t size) {
  thread_local std::vector<float> floats;
  if (static_cast<int64_t>(floats.size()) < size) floats.resize(size);
  return floats.data();
}

int64_t Table::row_bytes() const {
  switch (type) {
    case RowType::kF32: return 4 * dim;
    case RowType::kBF16:
    case RowType::kF16: return 2 * dim;
    case RowType::kInt8: return dim + kScaleBiasBytes;
    case RowType::kInt4: return (dim + 1) / 2 + kScaleBiasBytes;
    case RowType::kCodes8: return dim;
    case RowType::kCodes4: return (dim + 1) / 2;
  }
  return 0;
}

std::string Place(const Bag& bag, Scratch& scratch, Placed* placed) {
  if (bag.layout == Layout::kDense) return "";
  if (bag.layout == Layout::kSparse) return PlaceSparse(bag, scratch, placed);
  placed->splits = bag.bags;
  const bool rise = bag.bags.wide ? Rise(static_cast<const int64_t*>(bag.bags.data), bag.num_bags, bag.num_ids)
                                  : Rise(static_cast<const int32_t*>(bag.bags.data), bag.num_bags, bag.num_ids);
  if (rise) return "";
  int64_t before = 0;
  for (int64_t b = 0; b <= bag.num_bags; ++b) {
    const int64_t split = bag.bags[b];
    if (split < before || split > bag.num_ids) {
      return "row_splits must not decrease and lie in [0, " + std::to_string(bag.num_ids) + "], the number of ids, got " +
             std::to_string(split) + " at position " + std::to_string(b) + " after " + std::to_string(before) +
             "; make them on the host, where RaggedTensor checks them";
    }
    before = split;
  }
  return "";
}

int64_t Cost(const Bag& bag, const Placed& placed) {
  if (bag.num_bags == 0) return 0;
  const int64_t out = 4 * bag.table.dim * std::max<int64_t>(bag.sequence_length, 1);
  const int64_t entries =
      bag.layout == Layout::kDense ? bag.num_bags : placed.splits[bag.num_bags] - placed.splits[0];
  return entries * EntryCost(bag) + bag.num_bags * (out + 8);
}

void AddTasks(int32_t feature, const Bag& bag, const Placed& placed, Cut* cut, Plan* plan) {
  const bool dense = bag.layout == Layout::kDense;
  const int64_t entry_cost = EntryCost(bag);
  const int64_t bag_cost = 4 * bag.table.dim * std::max<int64_t>(bag.sequence_length, 1) + 8;
  const int64_t piece = std::max<int64_t>(kPieceBytes / entry_cost, 1);
  const auto split = [&](int64_t b) { return dense ? b : placed.splits[b]; };
  const auto add = [&](int64_t first, int64_t last) {
    if (last > first) plan->tasks.push_back({feature, first, last, split(first), split(last), nullptr});
  };
  for (int64_t first = 0; first < bag.num_bags;) {
    // The least number of bags that make up a chunk; their cost rises with them. A bag of two pieces is at
    // least a chunk, so that it can only be the last one of these.
    const int64_t begin = split(first);
    const int64_t chunk = cut->Next();
    int64_t low = first + 1, high = bag.num_bags;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      const int64_t cost = (middle - first) * bag_cost + (split(middle) - begin) * entry_cost;
      if (cost < chunk) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const int64_t last = low - 1, from = split(last), to = split(low);
    if (dense || bag.sequence_length || to - from < 2 * piece) {
      add(first, low);
    } else {
      add(first, last);
      const int64_t count = (to - from + piece - 1) / piece;
      plan->shared.push_back({feature, last, 0, count});
      for (int64_t p = 0; p < count; ++p) {
        plan->tasks.push_back({feature, last, low, from + p * piece, std::min(from + (p + 1) * piece, to),
                               reinterpret_cast<float*>(1)});
      }
    }
    cut->rest -= (low - first) * bag_cost + (to - begin) * entry_cost;
    first = low;
  }
}

void PlacePartials(const Bag* bags, Plan* plan) {
  size_t size = 0;
  for (Shared& shared : plan->shared) {
    shared.first_partial = size;
    size += shared.count * (bags[shared.feature].table.dim + 1);
  }
  plan->partials.resize(size);
  float* next = plan->partials.data();
  for (Task& task : plan->tasks) {
    if (!task.partial) continue;
    task.partial = next;
    next += bags[task.feature].table.dim + 1;
  }
}

}  // namespace jaxembed
