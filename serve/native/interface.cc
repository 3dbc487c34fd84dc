// What Python calls, by ctypes.
#include <new>

#include "requests.h"

using jaxembed::Reader;
using jaxembed::Schema;
using jaxembed::Span;

struct JaxembedReader {
  Schema schema;
  Reader reader;
  // Of who made it.
  int64_t max_rows, *sizes;
  int32_t* out;
  int64_t capacity;

  explicit JaxembedReader(Schema from) : schema(std::move(from)), reader(schema) {}
};

#define JAXEMBED_EXPORT extern "C" __attribute__((visibility("default")))

// names: of ids and row splits of each feature, then of the dense inputs; dims: of all rows of these, one after the other.
// sizes: what is read is told here: rows, ids, number of spans, and up to 64 spans of what is no tensor.
// out: [capacity], where requests of at most max_rows rows are written to that have room there.
JAXEMBED_EXPORT JaxembedReader* JaxembedReaderMake(int64_t num_features, int64_t num_dense, const char* const* names,
                                                   const uint32_t* vocabularies, const int32_t* max_ids,
                                                   const int64_t* num_dims, const int64_t* dims, int64_t max_rows,
                                                   int64_t* sizes, int32_t* out, int64_t capacity) {
  try {
    Schema schema;
    for (int64_t f = 0; f < num_features; ++f) schema.features.push_back({vocabularies[f], max_ids[f]});
    for (int64_t d = 0; d < num_dense; ++d) {
      schema.dense_shapes.emplace_back(dims, dims + num_dims[d]);
      dims += num_dims[d];
    }
    for (int64_t i = 0; i < 2 * num_features + num_dense; ++i) schema.names.emplace_back(names[i]);
    auto* made = new JaxembedReader(std::move(schema));
    Schema& own = made->schema;
    for (size_t i = 0; i < own.names.size(); ++i) own.places.emplace(own.names[i], static_cast<int32_t>(i));
    made->max_rows = max_rows, made->sizes = sizes, made->out = out, made->capacity = capacity;
    return made;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

JAXEMBED_EXPORT void JaxembedReaderDelete(JaxembedReader* made) { delete made; }

// Writes the request that was read last, whose body is still there, to `out` of as many numbers as it needs.
JAXEMBED_EXPORT int32_t JaxembedReaderFill(JaxembedReader* made, int32_t* out) {
  const bool good = made->reader.Write(out);
  made->reader.Shrink();
  return good;
}

// json_size: of the JSON at the front; -1 for a message of gRPC.
// Returns 0 for what is left alone, 1 for what was read, 2 for what was read and written.
JAXEMBED_EXPORT int32_t JaxembedReaderTake(JaxembedReader* made, const uint8_t* body, int64_t json_size, int64_t size) {
  try {
    Reader& reader = made->reader;
    if (!(json_size < 0 ? reader.ReadMessage(body, size) : reader.ReadJson(body, json_size, size))) return 0;
    int64_t* at = made->sizes;
    *at++ = reader.rows();
    *at++ = reader.total();
    *at++ = static_cast<int64_t>(reader.rest().size());
    for (const Span& span : reader.rest()) {
      *at++ = span.start;
      *at++ = span.end;
    }
    if (reader.rows() > made->max_rows || reader.words() > made->capacity) return 1;
    return JaxembedReaderFill(made, made->out) ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
