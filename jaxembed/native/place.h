// Finds where each bag's entries lie, and cuts the work into tasks of similar cost.
#ifndef JAXEMBED_PLACE_H_
#define JAXEMBED_PLACE_H_

#include <string>
#include <vector>

#include "bag.h"

namespace jaxembed {

// Room for the splits and order of one sparse feature, and for where each bag's next entry goes; grows, and is used
// again by the next call.
struct Scratch {
  std::vector<int32_t> splits, order, next;
};

// Splits of the bags of `bag`. An empty string, or what is wrong with the splits.
std::string Place(const Bag& bag, Scratch& scratch, Placed* placed);

// A bag that several tasks share: `count` partial sums from `partial` on.
struct Shared {
  int32_t feature;
  int64_t bag;
  size_t first_partial;
  int64_t count;
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Shared> shared;
  std::vector<float> partials;
};

// Bytes that a feature reads and writes, roughly.
int64_t Cost(const Bag& bag, const Placed& placed);

// How large the next piece of work is: a share of what is left, so that the first ones are large, as each begins with
// rows that are not fetched yet, and the last ones small, so that all threads end together (guided self-scheduling,
// Polychronopoulos and Kuck 1987).
struct Cut {
  static constexpr int64_t kMost = 1 << 20;  // a bag that is to be shared is at least as large
  int64_t sharers;
  int64_t rest;  // the cost of what is not cut yet
  int64_t least = 1 << 16;

  int64_t Next() const {
    const int64_t share = rest / sharers < kMost ? rest / sharers : kMost;
    return share < least ? least : share;
  }
};

// Adds the tasks of one feature, each of about `cut->Next()` bytes. `Plan::partials` must be placed with
// `PlacePartials` once all features are in.
void AddTasks(int32_t feature, const Bag& bag, const Placed& placed, Cut* cut, Plan* plan);
void PlacePartials(const Bag* bags, Plan* plan);

}  // namespace jaxembed

#endif  // JAXEMBED_PLACE_H_
