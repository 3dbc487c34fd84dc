// What Python calls, by ctypes.
#include <new>

#include "requests.h"

using jaxembed::Reader;
using jaxembed::Schema;
using jaxembed::Span;

struct JaxembedReader {
  Schema schema;
  Reader reader;

  explicit JaxembedReader(Schema from) : schema(std::move(from)), reader(schema) {}
};

#define JAXEMBED_EXPORT extern "C" __attribute__((visibility("default")))

// names: of ids and row splits of each feature, then of the dense inputs; dims: of all rows of these, one after the other.
JAXEMBED_EXPORT JaxembedReader* JaxembedReaderNew(int64_t num_features, int64_t num_dense, const char* const* names,
                                                  const uint32_t* vocabularies, const int32_t* max_ids,
                                                  const int64_t* num_dims, const int64_t* dims) {
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
    return made;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

JAXEMBED_EXPORT void JaxembedReaderDelete(JaxembedReader* made) { delete made; }

// json_size: of the JSON at the front; -1 for a message of gRPC.
// sizes: rows, ids, number of spans, and up to 64 spans of what is no tensor.
JAXEMBED_EXPORT int32_t JaxembedReaderRead(JaxembedReader* made, const uint8_t* body, int64_t json_size, int64_t size,
                                           int64_t* sizes) {
  try {
    Reader& reader = made->reader;
    if (!(json_size < 0 ? reader.ReadMessage(body, size) : reader.ReadJson(body, json_size, size))) return 0;
    sizes[0] = reader.rows();
    sizes[1] = reader.total();
    sizes[2] = static_cast<int64_t>(reader.rest().size());
    int64_t* at = sizes + 3;
    for (const Span& span : reader.rest()) {
      *at++ = span.start;
      *at++ = span.end;
    }
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

// Of the request that was read last, whose body is still there.
JAXEMBED_EXPORT int32_t JaxembedReaderWrite(JaxembedReader* made, int32_t* ids, int32_t* splits, float* const* dense) {
  const bool good = made->reader.Write(ids, splits, dense);
  made->reader.Shrink();
  return good;
}
