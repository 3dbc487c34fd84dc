#include <cmath>
#include <cstring>

#include "requests.h"

namespace jaxembed {
namespace {

constexpr int64_t kMaxIds = int64_t{1} << 31;
constexpr size_t kKept = size_t{1} << 17;  // values whose room is kept for the next request

int64_t Width(Type type) { return type == Type::kInt64 ? 8 : 4; }

template <typename T>
T Load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

}  // namespace

Type TypeOf(std::string_view datatype) {
  if (datatype == "INT64") return Type::kInt64;
  if (datatype == "INT32") return Type::kInt32;
  if (datatype == "FP32") return Type::kFloat32;
  return Type::kNone;
}

int64_t Sent::num_values() const {
  int64_t product = 1;
  for (int i = 0; i < num_dims; ++i) {
    if (dims[i] < 0 || dims[i] >= kMaxIds) return -1;
    product *= dims[i];
    if (product >= kMaxIds) return -1;
  }
  return product;
}

void Reader::Clear() {
  for (Sent& sent : sent_) sent.num_dims = -1;
  next_ = 0;
  ints_.clear();
  floats_.clear();
  rest_.clear();
  rows_ = total_ = 0;
}

void Reader::Shrink() {
  if (ints_.capacity() > kKept) std::vector<int64_t>().swap(ints_);
  if (floats_.capacity() > kKept) std::vector<double>().swap(floats_);
}

// The place of a tensor that was not sent before.
Sent* Reader::Place(std::string_view name) {
  size_t at = next_;
  if (at >= schema_.names.size() || schema_.names[at] != name) {
    auto found = schema_.places.find(name);
    if (found == schema_.places.end()) return nullptr;
    at = static_cast<size_t>(found->second);
  }
  if (sent_[at].num_dims >= 0) return nullptr;
  next_ = at + 1;
  return &sent_[at];
}

// Rows and ids of the request, and whether all of it is there, of types and sizes that are read here.
bool Reader::Measure() {
  const size_t num_features = schema_.features.size();
  if (num_features == 0) return false;
  for (size_t i = 0; i < sent_.size(); ++i) {
    const Sent& sent = sent_[i];
    const bool dense = i >= 2 * num_features;
    if (sent.num_dims < 0) {
      if (!dense && i % 2 == 1) continue;  // a feature without row splits
      return false;
    }
    const int64_t values = sent.num_values();
    if (values < 0 || sent.type == Type::kNone || dense != (sent.type == Type::kFloat32)) return false;
    if (sent.is_raw ? values * Width(sent.type) != sent.raw_size : values != sent.count) return false;
    if (!dense && !sent.is_raw && sent.is_float) return false;
  }
  for (size_t f = 0; f < num_features; ++f) {
    const Sent &ids = sent_[2 * f], &splits = sent_[2 * f + 1];
    int64_t rows = ids.dims[0];
    if (splits.num_dims >= 0) {
      if (splits.num_dims != 1 || ids.num_dims != 1) return false;
      rows = splits.dims[0] - 1;
    } else if (ids.num_dims > 2) {
      return false;
    }
    if (f == 0) rows_ = rows;
    if (rows < 1 || rows != rows_) return false;
    total_ += ids.num_values();
  }
  for (size_t d = 0; d < schema_.dense_shapes.size(); ++d) {
    const Sent& sent = sent_[2 * num_features + d];
    const std::vector<int64_t>& shape = schema_.dense_shapes[d];
    if (sent.num_dims != static_cast<int32_t>(shape.size()) + 1 || sent.dims[0] != rows_) return false;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (sent.dims[i + 1] != shape[i]) return false;
    }
  }
  return total_ < kMaxIds;
}

int64_t Reader::Integer(const Sent& sent, int64_t at) const {
  if (!sent.is_raw) return ints_[static_cast<size_t>(sent.start + at)];
  return sent.type == Type::kInt64 ? Load<int64_t>(sent.raw + 8 * at) : Load<int32_t>(sent.raw + 4 * at);
}

bool Reader::WriteFeature(size_t feature, int32_t* ids, int32_t* splits, int64_t* at) const {
  const Sent &sent = sent_[2 * feature], &borders = sent_[2 * feature + 1];
  const Feature& limits = schema_.features[feature];
  const int64_t count = sent.num_values();
  const auto first = static_cast<int32_t>(*at);
  if (borders.num_dims < 0) {
    const int64_t length = sent.num_dims == 1 ? 1 : sent.dims[1];
    if (length > limits.max_ids) return false;
    for (int64_t row = 0; row <= rows_; ++row) splits[row] = first + static_cast<int32_t>(row * length);
  } else {
    int64_t previous = 0;
    for (int64_t row = 0; row <= rows_; ++row) {
      const int64_t border = Integer(borders, row);
      if (border < previous || border > count || border - previous > limits.max_ids || (row == 0 && border != 0)) {
        return false;
      }
      splits[row] = first + static_cast<int32_t>(border);
      previous = border;
    }
    if (previous != count) return false;
  }
  int32_t* out = ids + *at;
  uint64_t outside = 0;  // a negative id is a large one
  const uint64_t vocabulary = limits.vocabulary;
  const auto copy = [&](auto load) {
    for (int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<uint64_t>(load(i));
      outside |= id >= vocabulary;
      out[i] = static_cast<int32_t>(id);
    }
  };
  if (!sent.is_raw) {
    const int64_t* values = ints_.data() + sent.start;
    copy([values](int64_t i) { return values[i]; });
  } else if (sent.type == Type::kInt64) {
    copy([&sent](int64_t i) { return Load<int64_t>(sent.raw + 8 * i); });
  } else {
    copy([&sent](int64_t i) { return static_cast<int64_t>(Load<int32_t>(sent.raw + 4 * i)); });
  }
  *at += count;
  return outside == 0;
}

bool Reader::WriteDense(size_t input, float* out) const {
  const Sent& sent = sent_[2 * schema_.features.size() + input];
  const int64_t count = sent.num_values();
  if (sent.is_raw) {
    std::memcpy(out, sent.raw, static_cast<size_t>(4 * count));
  } else if (sent.is_float) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(floats_[static_cast<size_t>(sent.start + i)]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<float>(static_cast<double>(ints_[static_cast<size_t>(sent.start + i)]));
    }
  }
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= std::isfinite(out[i]);
  return finite;
}

int64_t Reader::words() const {
  int64_t dense = 0;
  for (size_t d = 0; d < schema_.dense_shapes.size(); ++d) dense += sent_[2 * schema_.features.size() + d].num_values();
  return total_ + static_cast<int64_t>(schema_.features.size()) * (rows_ + 1) + dense;
}

bool Reader::Write(int32_t* out) {
  int32_t* splits = out + total_;
  int64_t at = 0;
  for (size_t f = 0; f < schema_.features.size(); ++f, splits += rows_ + 1) {
    if (!WriteFeature(f, out, splits, &at)) return false;
  }
  auto* dense = reinterpret_cast<float*>(splits);
  for (size_t d = 0; d < schema_.dense_shapes.size(); ++d) {
    if (!WriteDense(d, dense)) return false;
    dense += sent_[2 * schema_.features.size() + d].num_values();
  }
  return true;
}

}  // namespace jaxembed
