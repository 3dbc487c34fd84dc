// Puts requests that were packed one by one together, in the buffers of a rung; other kinds of arrays are left to Python.
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "packing.h"

namespace jaxembed {
namespace {

constexpr int kFloat = 11;           // NPY_FLOAT
constexpr int64_t kShort = 1 << 16;  // numbers that are written without letting another thread of Python run meanwhile
constexpr int64_t kMaxIds = INT32_MAX;

PyObject *ndarray, *packed_name, *rows_name, *ids_name, *splits_name, *weights_name, *dense_name;

// Objects that stay while this lives.
class Held {
 public:
  Held() = default;
  Held(const Held&) = delete;
  ~Held() {
    for (PyObject* object : objects_) {
      if (object) Py_DecRef(object);
    }
  }

  // Null, with an error set, for what is not there.
  PyObject* Get(PyObject* from, PyObject* name) {
    objects_.push_back(nullptr);  // which may throw, when there is nothing to let go of yet
    return objects_.back() = PyObject_GetAttr(from, name);
  }
  PyObject* Item(PyObject* list, Py_ssize_t at) {
    objects_.push_back(nullptr);
    PyObject* object = PyList_GetItem(list, at);
    if (object) Py_IncRef(object);
    return objects_.back() = object;
  }

 private:
  std::vector<PyObject*> objects_;
};

// An array as it was: another thread of Python may give it another type or shape.
struct Array {
  char* data;
  int64_t rows;  // of the first dimension
  int64_t size;  // of one row
};

// An aligned array of int32, or of float32, with one number after the other but perhaps for gaps between its rows.
bool Take(PyObject* object, bool is_float, Array* to, int64_t* row_stride = nullptr) {
  if (!object || object->ob_type != ndarray) return false;
  const auto* array = reinterpret_cast<const NumpyArray*>(object);
  const int type = array->descr->type_num;
  const bool right = is_float ? type == kFloat : type == kInt || (type == kLong && sizeof(long) == 4);
  if (!right || array->descr->byteorder != '=' || array->nd < 1 || !(array->flags & kAligned)) return false;
  to->data = static_cast<char*>(array->data);
  to->rows = array->dimensions[0];
  to->size = 1;
  for (int d = 1; d < array->nd; ++d) to->size *= array->dimensions[d];
  if (row_stride) {
    if (array->nd != 2 || (to->size > 1 && array->strides[1] != 4)) return false;
    *row_stride = array->strides[0];
    return true;
  }
  return (array->flags & kContiguous) != 0;
}

// Whether all dimensions but the first are the same.
bool SameRows(PyObject* a, PyObject* b) {
  const auto *x = reinterpret_cast<const NumpyArray*>(a), *y = reinterpret_cast<const NumpyArray*>(b);
  return x->nd == y->nd && std::equal(x->dimensions + 1, x->dimensions + x->nd, y->dimensions + 1);
}

struct Part {
  const int32_t* ids;
  const float* weights;  // null where there is no room for any
  int64_t num_ids;       // of which there are as many weights
  const char* splits;
  int64_t stride;  // bytes from the splits of one feature to those of the next
  int64_t rows;
};

struct Dense {
  const char* data;
  int64_t rows, size;
  char* to;
};

struct Target {
  int32_t *ids, *splits;
  float* weights;
  int64_t features, batch, capacity;
};

// The ids of all, -1 where splits are of other arrays or there are more ids than there is room for.
int64_t MergeIds(const std::vector<Part>& parts, const Target& target) {
  int64_t total = 0;
  int32_t* splits = target.splits;
  for (int64_t f = 0; f < target.features; ++f) {
    int32_t* const end = splits + target.batch + 1;
    *splits++ = static_cast<int32_t>(total);
    for (const Part& part : parts) {
      const auto* from = reinterpret_cast<const int32_t*>(part.splits + f * part.stride);
      const int64_t first = from[0], count = from[part.rows] - first;
      if (first < 0 || count < 0 || first + count > part.num_ids || count > target.capacity - total) return -1;
      std::copy_n(part.ids + first, count, target.ids + total);
      if (part.weights) std::copy_n(part.weights + first, count, target.weights + total);
      const uint32_t moved = static_cast<uint32_t>(total) - static_cast<uint32_t>(first);
      for (int64_t r = 1; r <= part.rows; ++r) *splits++ = static_cast<int32_t>(static_cast<uint32_t>(from[r]) + moved);
      total += count;
    }
    std::fill(splits, end, static_cast<int32_t>(total));
    splits = end;
  }
  return total;
}

bool TakeParts(PyObject* rows_of, const Target& target, Held* held, std::vector<Part>* parts, int64_t* rows) {
  const Py_ssize_t count = PyObject_Size(rows_of);
  if (count < 1) return false;
  parts->reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* of = PyTuple_GetItem(rows_of, i);
    PyObject* packed = of ? held->Get(of, packed_name) : nullptr;
    if (!packed) return false;
    PyObject* number = held->Get(packed, rows_name);
    Array ids, splits, weights;
    Part part{};
    part.rows = number ? PyLong_AsLongLong(number) : -1;
    if (part.rows < 0 || part.rows > target.batch - *rows) return false;
    *rows += part.rows;
    if (!Take(held->Get(packed, ids_name), false, &ids) || ids.size != 1) return false;
    if (!Take(held->Get(packed, splits_name), false, &splits, &part.stride)) return false;
    if (splits.rows != target.features || splits.size < part.rows + 1) return false;
    part.ids = reinterpret_cast<const int32_t*>(ids.data);
    part.num_ids = ids.rows;
    part.splits = splits.data;
    if (target.weights) {
      if (!Take(held->Get(packed, weights_name), true, &weights) || weights.size != 1) return false;
      part.weights = reinterpret_cast<const float*>(weights.data);
      part.num_ids = std::min(part.num_ids, weights.rows);
    }
    parts->push_back(part);
  }
  return true;
}

bool TakeDense(PyObject* rows_of, PyObject* targets, const std::vector<Part>& parts, int64_t batch, Held* held,
               std::vector<Dense>* dense) {
  const Py_ssize_t inputs = PyList_Size(targets);
  if (inputs < 0) return false;
  dense->reserve(static_cast<size_t>(inputs) * parts.size());
  for (size_t p = 0; p < parts.size(); ++p) {
    PyObject* of = PyTuple_GetItem(rows_of, static_cast<Py_ssize_t>(p));
    PyObject* arrays = of ? held->Get(of, dense_name) : nullptr;
    if (!arrays || PyList_Size(arrays) != inputs) return false;
    for (Py_ssize_t d = 0; d < inputs; ++d) {
      PyObject *object = held->Item(arrays, d), *into = held->Item(targets, d);
      Array array, to;
      if (!Take(object, true, &array) || !Take(into, true, &to) || !SameRows(object, into)) return false;
      if (array.rows != parts[p].rows || to.rows != batch) return false;
      dense->push_back({array.data, array.rows, array.size, to.data});
    }
  }
  return true;
}

// One part after the other, and zeros behind them.
void MergeDense(const std::vector<Dense>& dense, size_t inputs, int64_t batch) {
  for (size_t d = 0; d < inputs; ++d) {
    char* to = dense[d].to;
    int64_t left = batch;
    for (size_t i = d; i < dense.size(); i += inputs) {
      to = std::copy_n(dense[i].data, 4 * dense[i].rows * dense[i].size, to);
      left -= dense[i].rows;
    }
    std::fill_n(to, 4 * left * dense[d].size, 0);
  }
}

int64_t Merge(PyObject* const* args) {
  PyObject *rows_of = args[0], *targets = args[4];
  Held held;
  Array ids, splits, weights;
  int64_t stride, rows = 0;
  Target target{};
  if (!Take(args[1], false, &ids) || ids.size != 1 || !Take(args[2], false, &splits, &stride)) return -1;
  if (splits.size < 1 || (splits.rows > 1 && stride != 4 * splits.size)) return -1;
  target.ids = reinterpret_cast<int32_t*>(ids.data);
  target.splits = reinterpret_cast<int32_t*>(splits.data);
  target.features = splits.rows;
  target.batch = splits.size - 1;
  target.capacity = std::min(ids.rows, kMaxIds);
  if (args[3] != &_Py_NoneStruct) {
    if (!Take(args[3], true, &weights) || weights.size != 1) return -1;
    target.weights = reinterpret_cast<float*>(weights.data);
    target.capacity = std::min(target.capacity, weights.rows);
  }
  std::vector<Part> parts;
  std::vector<Dense> dense;
  if (!TakeParts(rows_of, target, &held, &parts, &rows)) return -1;
  if (!TakeDense(rows_of, targets, parts, target.batch, &held, &dense)) return -1;
  const size_t inputs = dense.size() / parts.size();
  int64_t numbers = target.features * (target.batch + 1);
  for (const Part& part : parts) numbers += part.num_ids;
  for (size_t d = 0; d < inputs; ++d) numbers += target.batch * dense[d].size;
  PyThreadState* state = numbers > kShort ? PyEval_SaveThread() : nullptr;
  const int64_t total = MergeIds(parts, target);
  if (total >= 0) MergeDense(dense, inputs, target.batch);
  if (state) PyEval_RestoreThread(state);
  return total;
}

}  // namespace

bool InitMerge() {
  ndarray = NdarrayType();
  packed_name = PyUnicode_InternFromString("packed");
  rows_name = PyUnicode_InternFromString("rows");
  ids_name = PyUnicode_InternFromString("ids");
  splits_name = PyUnicode_InternFromString("splits");
  weights_name = PyUnicode_InternFromString("weights");
  dense_name = PyUnicode_InternFromString("dense");
  return ndarray && packed_name && rows_name && ids_name && splits_name && weights_name && dense_name;
}

PyObject* MergeRows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t total = -1;
  try {
    if (count == 5) total = Merge(args);
  } catch (const std::bad_alloc&) {
  }
  if (total < 0) PyErr_Clear();  // of what is none of the usual kind
  return PyLong_FromLongLong(total);
}

}  // namespace jaxembed
