// inference.ModelInferRequest as protobuf writes it.
#include "requests.h"

namespace jaxembed {
namespace {

constexpr uint64_t kName = 1, kDatatype = 2, kShape = 3;  // of InferInputTensor
constexpr uint64_t kInputs = 5, kRaw = 7;                 // of ModelInferRequest
constexpr uint64_t kVarint = 0, kBytes = 2;

}  // namespace

class MessageParser {
 public:
  MessageParser(Reader& reader, const uint8_t* body, int64_t size) : reader_(reader), begin_(body), end_(body + size) {}

  bool Request() {
    std::vector<Sent*> places;
    size_t num_raw = 0;
    const uint8_t* at = begin_;
    while (at < end_) {
      const uint8_t* start = at;
      uint64_t tag, size;
      if (!Varint(&at, end_, &tag) || (tag & 7) != kBytes) return false;
      if (!Varint(&at, end_, &size) || size > static_cast<uint64_t>(end_ - at)) return false;
      const uint8_t* value_end = at + size;
      if (tag >> 3 == kInputs) {
        Sent* place = Tensor(at, value_end);
        if (place == nullptr) return false;
        places.push_back(place);
      } else if (tag >> 3 == kRaw) {
        // Tensors come first, as their field has the lower number.
        if (num_raw >= places.size()) return false;
        places[num_raw]->raw = at;
        places[num_raw++]->raw_size = static_cast<int64_t>(size);
      } else {
        if (reader_.rest_.size() >= 64) return false;
        reader_.rest_.push_back({start - begin_, value_end - begin_});
      }
      at = value_end;
    }
    return num_raw == places.size();
  }

 private:
  Sent* Tensor(const uint8_t* at, const uint8_t* end) {
    Sent sent;
    std::string_view name;
    sent.num_dims = 0;
    sent.is_raw = true;
    while (at < end) {
      uint64_t tag, size;
      if (!Varint(&at, end, &tag)) return nullptr;
      if (tag == (kShape << 3 | kVarint)) {
        if (!Dim(&at, end, &sent)) return nullptr;
        continue;
      }
      if ((tag & 7) != kBytes || !Varint(&at, end, &size) || size > static_cast<uint64_t>(end - at)) return nullptr;
      const std::string_view text(reinterpret_cast<const char*>(at), size);
      const uint8_t* value_end = at + size;
      switch (tag >> 3) {
        case kName:
          name = text;
          break;
        case kDatatype:
          sent.type = TypeOf(text);
          break;
        case kShape:
          while (at < value_end) {
            if (!Dim(&at, value_end, &sent)) return nullptr;
          }
          break;
        default:  // parameters and contents
          return nullptr;
      }
      at = value_end;
    }
    Sent* place = sent.num_dims < 1 ? nullptr : reader_.Place(name);
    if (place != nullptr) *place = sent;
    return place;
  }

  static bool Dim(const uint8_t** at, const uint8_t* end, Sent* sent) {
    uint64_t size;
    if (sent->num_dims == 8 || !Varint(at, end, &size) || size >= uint64_t{1} << 31) return false;
    sent->dims[sent->num_dims++] = static_cast<int64_t>(size);
    return true;
  }

  static bool Varint(const uint8_t** at, const uint8_t* end, uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      if (*at >= end) return false;
      const uint8_t byte = *(*at)++;
      *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  Reader& reader_;
  const uint8_t* const begin_;
  const uint8_t* const end_;
};

bool Reader::ReadMessage(const uint8_t* body, int64_t size) {
  Clear();
  return MessageParser(*this, body, size).Request() && Measure();
}

}  // namespace jaxembed
