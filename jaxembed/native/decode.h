// Reads what XLA passes for one feature, and refuses what the kernel could not run in bounds.
#ifndef JAXEMBED_DECODE_H_
#define JAXEMBED_DECODE_H_

#include <string>

#include "bag.h"
#include "xla/ffi/api/ffi.h"

namespace jaxembed {

// The static half of a feature, as `bag_native.py` writes it. Those from kRows on are positions of
// arguments, or -1.
enum Field : int {
  kLayout, kCombiner, kPruneIds, kPruneWeights, kNumBags, kSequenceLength, kRowType, kDim,
  kRows, kScaleBias, kCodebook, kIds, kBags, kColumns, kWeights, kFields
};

// Fills `bag`. An empty string, or what is wrong.
std::string Decode(const int64_t* meta, const xla::ffi::RemainingArgs& args, xla::ffi::AnyBuffer out, Bag* bag);

}  // namespace jaxembed

#endif  // JAXEMBED_DECODE_H_
