// Reads what XLA passes for one feature, and refuses what the kernel could not run in bounds.
#ifndef JAXEMBED_DECODE_H_
#define JAXEMBED_DECODE_H_

#include <string>

#include "bag.h"
#include "xla/ffi/api/ffi.h"

namespace jaxembed {

// The static half of a feature, as `bag_native.py` writes it. Those from kRows on are positions of
// arguments, or -1. Row splits may be the row kSplitsRow of those of many features. With kVocabulary, which else is
// -1, kRows holds the addresses of many tables, of which this one's are the row kTableRow. The result goes to the
// output kOut, from its column kColumn on.
enum Field : int {
  kLayout, kCombiner, kPruneIds, kPruneWeights, kNumBags, kSequenceLength, kRowType, kDim, kSplitsRow,
  kVocabulary, kTableRow, kOut, kColumn, kRows, kCodebook, kIds, kBags, kColumns, kWeights, kFields
};

// Fills `bag`; `outs` is the number of outputs that may be written. An empty string, or what is wrong.
std::string Decode(const int64_t* meta, const xla::ffi::RemainingArgs& args, xla::ffi::RemainingRets& rets,
                   int64_t outs, Bag* bag);

}  // namespace jaxembed

#endif  // JAXEMBED_DECODE_H_
