// Checks the ids of a request and packs them; what is unusual or wrong is left to Python, which has more to say.
#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace {

// The ids of one feature: false if one has no row.
template <typename Id>
bool CopyIds(const Id* ids, int64_t count, uint32_t vocabulary, int32_t* out) {
  using Unsigned = std::make_unsigned_t<Id>;  // a negative id is a large one
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) {
    bad |= static_cast<Unsigned>(ids[i]) >= vocabulary;
    out[i] = static_cast<int32_t>(ids[i]);
  }
  return !bad;
}

// The splits of one feature, behind `start` ids of others.
template <typename Split>
bool CopySplits(const Split* splits, int64_t rows, int64_t size, uint32_t max_ids, uint32_t start, int32_t* out) {
  if (splits[0] != 0 || splits[rows] != size) return false;
  using Unsigned = std::make_unsigned_t<Split>;  // a negative length is a large one
  bool bad = false;
  out[0] = static_cast<int32_t>(start);
  for (int64_t r = 0; r < rows; ++r) {
    bad |= static_cast<Unsigned>(splits[r + 1]) - static_cast<Unsigned>(splits[r]) > max_ids;
    out[r + 1] = static_cast<int32_t>(start + static_cast<uint32_t>(splits[r + 1]));
  }
  return !bad;
}

template <typename Id, typename Split>
bool Pack(const Id* ids, const Split* splits, const int64_t* sizes, const uint32_t* max_ids, const uint32_t* vocabularies,
          int64_t features, int64_t rows, int64_t batch, int32_t* out_ids, int32_t* out_splits) {
  int64_t start = 0;
  for (int64_t f = 0; f < features; ++f) {
    int32_t* out = out_splits + f * (batch + 1);
    if (!CopySplits(splits + f * (rows + 1), rows, sizes[f], max_ids[f], static_cast<uint32_t>(start), out)) return false;
    if (!CopyIds(ids + start, sizes[f], vocabularies[f], out_ids + start)) return false;
    start += sizes[f];
    std::fill(out + rows + 1, out + batch + 1, static_cast<int32_t>(start));
  }
  return true;
}

}  // namespace

// ids: of all features, one after the other, sizes[f] of each, fewer than 2^31 in all; may be `out_ids` itself.
// splits: [features, rows + 1], each from 0 to sizes[f]. wide: int64 and not int32.
// out_splits: [features, batch + 1], where the bags lie in out_ids; those beyond `rows` are empty.
extern "C" __attribute__((visibility("default"))) int32_t JaxembedPack(
    const void* ids, int32_t wide_ids, const void* splits, int32_t wide_splits, const int64_t* sizes,
    const uint32_t* max_ids, const uint32_t* vocabularies, int64_t features, int64_t rows, int64_t batch,
    int32_t* out_ids, int32_t* out_splits) {
  const auto pack = [&](const auto* typed_ids, const auto* typed_splits) {
    return Pack(typed_ids, typed_splits, sizes, max_ids, vocabularies, features, rows, batch, out_ids, out_splits);
  };
  const auto with_splits = [&](const auto* typed_ids) {
    return wide_splits ? pack(typed_ids, static_cast<const int64_t*>(splits))
                       : pack(typed_ids, static_cast<const int32_t*>(splits));
  };
  return wide_ids ? with_splits(static_cast<const int64_t*>(ids)) : with_splits(static_cast<const int32_t*>(ids));
}
