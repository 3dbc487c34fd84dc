// The JSON of v2: {"inputs": [{"name": ..., "shape": ..., "datatype": ..., "data": ... or "parameters": ...}, ...], ...}
#include <algorithm>
#include <charconv>
#include <cstring>

#include "requests.h"

namespace jaxembed {

class JsonParser {
 public:
  JsonParser(Reader& reader, const uint8_t* body, int64_t json_size, int64_t size)
      : reader_(reader),
        begin_(reinterpret_cast<const char*>(body)),
        at_(begin_),
        end_(begin_ + json_size),
        raw_(body + json_size),
        raw_end_(body + size) {}

  bool Request() {
    bool inputs = false;
    if (!Take('{')) return false;
    do {
      Space();
      const char* start = at_;
      std::string_view key;
      if (!String(&key) || !Take(':')) return false;
      if (key == "inputs") {
        if (inputs || !Inputs()) return false;
        inputs = true;
      } else {
        if (!Skip() || reader_.rest_.size() >= 8) return false;
        reader_.rest_.push_back({start - begin_, at_ - begin_});
      }
    } while (Take(','));
    if (!Take('}')) return false;
    Space();
    return inputs && at_ == end_ && raw_ == raw_end_;
  }

 private:
  bool Inputs() {
    if (!Take('[')) return false;
    do {
      if (!Tensor()) return false;
    } while (Take(','));
    return Take(']');
  }

  bool Tensor() {
    Sent sent;
    std::string_view name;
    bool named = false, has_type = false, has_data = false;
    if (!Take('{')) return false;
    do {
      Space();
      std::string_view key;
      if (!String(&key) || !Take(':')) return false;
      Space();
      if (key == "name") {
        if (named || !String(&name)) return false;
        named = true;
      } else if (key == "datatype") {
        std::string_view type;
        if (has_type || !String(&type)) return false;
        sent.type = TypeOf(type);
        has_type = true;
      } else if (key == "shape") {
        if (sent.num_dims >= 0 || !Shape(&sent)) return false;
      } else if (key == "data") {
        if (has_data || !Data(&sent)) return false;
        has_data = true;
      } else if (key == "parameters") {
        if (has_data || !BinarySize(&sent)) return false;
        has_data = true;
      } else {
        return false;
      }
    } while (Take(','));
    if (!Take('}') || !named || !has_data || sent.num_dims < 1) return false;
    if (!sent.is_raw) {
      if (depth_ > sent.num_dims) return false;
      for (int d = 1; d < depth_; ++d) {
        if (lengths_[d] != sent.dims[d]) return false;
      }
    }
    if (sent.type == Type::kInt32 && !sent.is_raw) {
      for (int64_t i = 0; i < sent.count && !sent.is_float; ++i) {
        const int64_t value = reader_.ints_[static_cast<size_t>(sent.start + i)];
        if (value != static_cast<int32_t>(value)) return false;
      }
    }
    Sent* place = reader_.Place(name);
    if (place == nullptr) return false;
    *place = sent;
    return true;
  }

  bool Shape(Sent* sent) {
    if (!Take('[')) return false;
    int32_t dims = 0;
    do {
      Space();
      int64_t size;
      if (dims == 8 || !Integer(&size) || size < 0) return false;
      sent->dims[dims++] = size;
    } while (Take(','));
    sent->num_dims = dims;
    return Take(']');
  }

  // {"binary_data_size": N}
  bool BinarySize(Sent* sent) {
    std::string_view key;
    int64_t size;
    if (!Take('{')) return false;
    Space();
    if (!String(&key) || key != "binary_data_size" || !Take(':')) return false;
    Space();
    if (!Integer(&size) || size < 0 || size > raw_end_ - raw_ || !Take('}')) return false;
    sent->is_raw = true;
    sent->raw = raw_;
    sent->raw_size = size;
    raw_ += size;
    return true;
  }

  // Numbers, all equally deep in lists; those of one depth are as long as each other. Lists that are empty are left to
  // others, but for the outermost one.
  bool Data(Sent* sent) {
    depth_ = 0;
    int64_t lengths[8] = {};  // of the lists that are open, so far
    std::fill_n(lengths_, 8, -1);
    while (Take('[')) {
      if (++depth_ > 8) return false;
    }
    if (depth_ == 0) return false;
    sent->start = static_cast<int64_t>(reader_.ints_.size());
    if (depth_ == 1 && Take(']')) return true;
    int depth = depth_;
    while (true) {
      Space();
      if (!Number(sent)) return false;
      ++lengths[depth - 1];
      if (Take(',')) continue;
      while (depth > 0 && Take(']')) {
        --depth;
        if (lengths_[depth] >= 0 && lengths_[depth] != lengths[depth]) return false;
        lengths_[depth] = lengths[depth];
        lengths[depth] = 0;
        if (depth > 0) ++lengths[depth - 1];
      }
      if (depth == 0) break;
      if (depth == depth_ || !Take(',')) return false;
      for (; depth < depth_; ++depth) {
        if (!Take('[')) return false;
      }
    }
    return true;
  }

  bool Number(Sent* sent) {
    const char* start = at_;
    int64_t value;
    if (!sent->is_float && Integer(&value)) {
      if (at_ < end_ && *at_ != '.' && *at_ != 'e' && *at_ != 'E') {
        reader_.ints_.push_back(value);
        ++sent->count;
        return true;
      }
    }
    at_ = start;
    return Float(sent);
  }

  bool Float(Sent* sent) {
#if defined(__cpp_lib_to_chars)
    if (!sent->is_float) {  // those before it were integers
      std::vector<int64_t>& ints = reader_.ints_;
      std::vector<double>& floats = reader_.floats_;
      const auto from = static_cast<size_t>(sent->start);
      sent->start = static_cast<int64_t>(floats.size());
      for (size_t i = from; i < ints.size(); ++i) floats.push_back(static_cast<double>(ints[i]));
      ints.resize(from);
      sent->is_float = true;
    }
    // from_chars takes more than JSON: check the form first.
    const char* p = at_;
    if (p < end_ && *p == '-') ++p;
    if (p >= end_ || !Digit(*p)) return false;
    if (*p == '0' && p + 1 < end_ && Digit(p[1])) return false;
    while (p < end_ && Digit(*p)) ++p;
    if (p < end_ && *p == '.') {
      if (++p >= end_ || !Digit(*p)) return false;
      while (p < end_ && Digit(*p)) ++p;
    }
    if (p < end_ && (*p == 'e' || *p == 'E')) {
      ++p;
      if (p < end_ && (*p == '+' || *p == '-')) ++p;
      if (p >= end_ || !Digit(*p)) return false;
      while (p < end_ && Digit(*p)) ++p;
    }
    double value;
    const auto result = std::from_chars(at_, p, value);
    if (result.ec != std::errc() || result.ptr != p) return false;
    at_ = p;
    reader_.floats_.push_back(value);
    ++sent->count;
    return true;
#else
    return false;
#endif
  }

  // Of at most 18 digits, which always fit.
  bool Integer(int64_t* value) {
    const char* p = at_;
    const bool negative = p < end_ && *p == '-';
    if (negative) ++p;
    const char* first = p;
    int64_t found = 0;
    while (p < end_ && Digit(*p) && p - first < 19) found = found * 10 + (*p++ - '0');
    const auto digits = p - first;
    if (digits == 0 || digits > 18 || (*first == '0' && digits > 1)) return false;
    *value = negative ? -found : found;
    at_ = p;
    return true;
  }

  // Without escapes, of ASCII.
  bool String(std::string_view* value) {
    if (at_ >= end_ || *at_ != '"') return false;
    const char* p = at_ + 1;
    while (p < end_ && *p != '"') {
      if (*p == '\\' || static_cast<unsigned char>(*p) < 0x20 || static_cast<unsigned char>(*p) >= 0x80) return false;
      ++p;
    }
    if (p >= end_) return false;
    *value = std::string_view(at_ + 1, static_cast<size_t>(p - at_ - 1));
    at_ = p + 1;
    return true;
  }

  // Any value; whether it is one is found out by who reads it.
  bool Skip() {
    Space();
    int depth = 0;
    do {
      if (at_ >= end_) return false;
      const char c = *at_;
      if (c == '"') {
        for (++at_; at_ < end_ && *at_ != '"'; ++at_) {
          if (*at_ == '\\') ++at_;
        }
        if (at_ >= end_) return false;
        ++at_;
      } else if (c == '{' || c == '[') {
        ++depth;
        ++at_;
      } else if (c == '}' || c == ']') {
        if (--depth < 0) return false;
        ++at_;
      } else if (depth == 0) {
        const char* start = at_;
        while (at_ < end_ && std::strchr(",}] \t\r\n", *at_) == nullptr) ++at_;
        return at_ > start;
      } else {
        ++at_;
      }
    } while (depth > 0);
    return true;
  }

  static bool Digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }

  void Space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }

  bool Take(char c) {
    Space();
    if (at_ >= end_ || *at_ != c) return false;
    ++at_;
    return true;
  }

  Reader& reader_;
  const char* const begin_;
  const char* at_;
  const char* const end_;
  const uint8_t* raw_;
  const uint8_t* const raw_end_;
  int depth_ = 0;  // of the lists of the last data
  int64_t lengths_[8] = {};  // of those lists by their depth, from the outermost one on
};

bool Reader::ReadJson(const uint8_t* body, int64_t json_size, int64_t size) {
  Clear();
  return JsonParser(*this, body, json_size, size).Request() && Measure();
}

}  // namespace jaxembed
