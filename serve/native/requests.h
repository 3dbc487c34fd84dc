// Reads v2 inference requests, and packs them.
//
// Two steps: Read() finds the tensors and says how much room they need, Write() checks and copies them. Whatever is
// unusual or wrong makes them return false: Python then reads the request again, slowly, and says what is wrong.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace jaxembed {

enum class Kind : uint8_t { kIds, kSplits, kDense };
enum class Type : uint8_t { kNone, kInt32, kInt64, kFloat32 };

struct Feature {
  uint32_t vocabulary;
  int32_t max_ids;  // of a row
};

// What a request must hold.
struct Schema {
  std::vector<Feature> features;
  std::vector<std::vector<int64_t>> dense_shapes;  // of a row
  std::vector<std::string> names;                  // ids and splits of each feature, then the dense inputs
  std::unordered_map<std::string_view, int32_t> places;
};

// A tensor as it was sent.
struct Sent {
  Type type = Type::kNone;
  int32_t num_dims = -1;  // -1: not sent yet
  int64_t dims[8];
  const uint8_t* raw = nullptr;  // little-endian bytes, or
  int64_t raw_size = 0;
  int64_t start = 0, count = 0;  // values in `ints` or `floats`
  bool is_raw = false, is_float = false;

  int64_t num_values() const;
};

struct Span {
  int64_t start, end;
};

// One request at a time.
class Reader {
 public:
  explicit Reader(const Schema& schema) : schema_(schema), sent_(schema.names.size()) {}

  // JSON of `json_size` bytes, and behind it the bytes of tensors.
  bool ReadJson(const uint8_t* body, int64_t json_size, int64_t size);
  // inference.ModelInferRequest of gRPC.
  bool ReadMessage(const uint8_t* body, int64_t size);
  // Writes int32 ids [total()], int32 splits [F, rows() + 1] and the float32 dense inputs, one after the other.
  bool Write(int32_t* out);

  int64_t rows() const { return rows_; }
  int64_t total() const { return total_; }
  // Numbers that Write() writes.
  int64_t words() const;
  // Where the members or fields other than the tensors lie.
  const std::vector<Span>& rest() const { return rest_; }
  // Gives back what an unusually large request took.
  void Shrink();

 private:
  friend class JsonParser;
  friend class MessageParser;

  void Clear();
  Sent* Place(std::string_view name);
  bool Measure();
  int64_t Integer(const Sent& sent, int64_t at) const;
  bool WriteFeature(size_t feature, int32_t* ids, int32_t* splits, int64_t* at) const;
  bool WriteDense(size_t input, float* out) const;

  const Schema& schema_;
  std::vector<Sent> sent_;
  size_t next_ = 0;  // where the next tensor is expected
  std::vector<int64_t> ints_;
  std::vector<double> floats_;
  std::vector<Span> rest_;
  int64_t rows_ = 0, total_ = 0;
};

Type TypeOf(std::string_view datatype);

}  // namespace jaxembed
