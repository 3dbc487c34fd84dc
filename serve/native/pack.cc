// Checks the ids of a request and packs them; what is unusual or wrong is left to Python, which has more to say.
#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "packing.h"

namespace {

using jaxembed::IntArray;

constexpr int64_t kShort = 1 << 14;  // ids that are packed without letting another thread of Python run meanwhile

PyObject *ndarray, *values_name, *row_splits_name;

struct Feature {
  IntArray ids, splits;
};

// The ids of one feature: false if one has no row.
template <typename Id>
bool CopyIds(const Id* ids, int64_t count, uint32_t vocabulary, int32_t* out) {
  using Unsigned = std::make_unsigned_t<Id>;  // a negative id is a large one
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) {
    const Id id = ids[i];  // which another thread may be changing
    bad |= static_cast<Unsigned>(id) >= vocabulary;
    out[i] = static_cast<int32_t>(id);
  }
  return !bad;
}

// The splits of one feature, behind `start` ids of others.
template <typename Split>
bool CopySplits(const Split* splits, int64_t rows, int64_t size, uint32_t max_ids, uint32_t start, int32_t* out) {
  using Unsigned = std::make_unsigned_t<Split>;  // a negative split is a large one
  bool bad = false;
  for (int64_t r = 0; r <= rows; ++r) {
    const Split split = splits[r];
    bad |= static_cast<Unsigned>(split) > static_cast<Unsigned>(size);
    out[r] = static_cast<int32_t>(start + static_cast<uint32_t>(split));
  }
  // What was written is looked at, and not what may be changing.
  bad |= static_cast<uint32_t>(out[0]) != start || static_cast<uint32_t>(out[rows]) != start + static_cast<uint32_t>(size);
  for (int64_t r = 0; r < rows; ++r) {
    bad |= static_cast<uint32_t>(out[r + 1]) - static_cast<uint32_t>(out[r]) > max_ids;
  }
  return !bad;
}

bool Pack(const std::vector<Feature>& features, const uint32_t* max_ids, const uint32_t* vocabularies, int64_t rows,
          int64_t batch, int32_t* out_ids, int32_t* out_splits) {
  int64_t start = 0;
  for (size_t f = 0; f < features.size(); ++f) {
    const auto& [ids, splits] = features[f];
    const int64_t size = ids.size();
    int32_t *out = out_splits + static_cast<int64_t>(f) * (batch + 1), *to = out_ids + start;
    const auto first = static_cast<uint32_t>(start);
    if (!(splits.wide() ? CopySplits(splits.data<int64_t>(), rows, size, max_ids[f], first, out)
                        : CopySplits(splits.data<int32_t>(), rows, size, max_ids[f], first, out))) {
      return false;
    }
    if (!(ids.wide() ? CopyIds(ids.data<int64_t>(), size, vocabularies[f], to)
                     : CopyIds(ids.data<int32_t>(), size, vocabularies[f], to))) {
      return false;
    }
    start += size;
    std::fill(out + rows + 1, out + batch + 1, static_cast<int32_t>(start));
  }
  return true;
}

bool TakeField(PyObject* leaf, PyObject* name, IntArray* array) {
  PyObject* field = PyObject_GetAttr(leaf, name);
  if (!field) {
    PyErr_Clear();
    return false;
  }
  const bool taken = field->ob_type == ndarray && array->Take(field);  // which keeps what it takes alive
  Py_DecRef(field);
  return taken;
}

// The ids of a request of the usual kind that was packed, -1 of any other.
int64_t PackLeaves(PyObject* const* args) {
  PyObject *leaves = args[0], *ragged = args[1];
  int64_t numbers[7];
  for (int i = 0; i < 7; ++i) numbers[i] = PyLong_AsLongLong(args[2 + i]);
  const int64_t count = PyList_Size(leaves), rows = numbers[2], capacity = numbers[4];
  if (PyErr_Occurred()) return -1;
  std::vector<Feature> features;
  features.reserve(static_cast<size_t>(count));
  int64_t total = 0;
  for (int64_t f = 0; f < count; ++f) {
    PyObject* leaf = PyList_GetItem(leaves, f);
    if (leaf->ob_type != ragged) return -1;
    Feature& feature = features.emplace_back();
    if (!TakeField(leaf, values_name, &feature.ids) || !TakeField(leaf, row_splits_name, &feature.splits)) return -1;
    total += feature.ids.size();
    if (feature.splits.size() != rows + 1 || total > capacity) return -1;
  }
  const auto pack = [&] {
    return Pack(features, reinterpret_cast<const uint32_t*>(numbers[0]), reinterpret_cast<const uint32_t*>(numbers[1]),
                rows, numbers[3], reinterpret_cast<int32_t*>(numbers[5]), reinterpret_cast<int32_t*>(numbers[6]));
  };
  if (total <= kShort) return pack() ? total : -1;
  PyThreadState* state = PyEval_SaveThread();
  const bool packed = pack();
  PyEval_RestoreThread(state);
  return packed ? total : -1;
}

PyObject* PackRequest(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t total = -1;
  try {
    if (count == 9) total = PackLeaves(args);
  } catch (const std::bad_alloc&) {
  }
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(total);
}

PyMethodDef methods[] = {
    {"pack", PackRequest, kFastCall,
     "pack(leaves, ragged, max_ids, vocabularies, rows, batch, capacity, ids, splits): the number of ids of a request, "
     "written to `ids` [capacity] and `splits` [len(leaves), batch + 1] int32, or -1 if it is none of the usual ones or "
     "something is wrong with it. leaves: a list, of which all must be of type `ragged` with `rows` rows of contiguous "
     "int32 or int64. max_ids, vocabularies [len(leaves)] uint32, ids and splits: addresses."},
    {"merge", jaxembed::MergeRows, kFastCall,
     "merge(parts, ids, splits, weights, dense): the number of ids of all parts, a tuple of Rows, written one part after the "
     "other to `ids` [N] int32, `splits` [F, B + 1] int32, `weights` [N] float32 or None, and the list `dense` of [B, ...] "
     "float32; -1 if they do not fit in there or are arrays of another kind."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = jaxembed::ModuleOf("jaxembed_packing", methods);

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_jaxembed_packing() {
  ndarray = jaxembed::NdarrayType();
  values_name = PyUnicode_InternFromString("values");
  row_splits_name = PyUnicode_InternFromString("row_splits");
  return ndarray && values_name && row_splits_name && jaxembed::InitMerge() ? PyModule_Create2(&module, kAbiVersion) : nullptr;
}
