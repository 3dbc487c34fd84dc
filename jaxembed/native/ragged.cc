// Checks the arrays of a RaggedTensor: Python's way to do so takes longer than all else of making one.
#include "python_abi.h"

namespace {

PyObject *ndarray, *ndim;

template <typename Int>
bool Rise(const Int* splits, int64_t size, int64_t values) {
  bool fall = splits[0] != 0 || splits[size - 1] > values;
  for (int64_t b = 1; b < size; ++b) fall |= splits[b] < splits[b - 1];
  return !fall;
}

bool IsVector(PyObject* array) {
  PyObject* rank = PyObject_GetAttr(array, ndim);
  const bool one = rank && PyLong_AsLongLong(rank) == 1;
  if (rank) Py_DecRef(rank);
  if (PyErr_Occurred()) PyErr_Clear();
  return one;
}

bool Usual(PyObject* values, PyObject* row_splits) {
  if (values->ob_type != ndarray || row_splits->ob_type != ndarray || !IsVector(values)) return false;
  jaxembed::IntArray splits;
  if (!splits.Take(row_splits) || splits.size() < 1) return false;
  const int64_t size = PyObject_Size(values);
  return splits.wide() ? Rise(splits.data<int64_t>(), splits.size(), size)
                       : Rise(splits.data<int32_t>(), splits.size(), size);
}

PyObject* IsUsual(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return PyBool_FromLong(count == 2 && Usual(args[0], args[1]));
}

PyMethodDef methods[] = {
    {"is_usual", IsUsual, kFastCall,
     "is_usual(values, row_splits): whether they are numpy arrays of rank 1, and row_splits contiguous int32 or int64 "
     "that rise from 0 to at most len(values). Others may be right as well."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = jaxembed::ModuleOf("jaxembed_ragged", methods);

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_jaxembed_ragged() {
  ndarray = jaxembed::NdarrayType();
  ndim = PyUnicode_InternFromString("ndim");
  return ndarray && ndim ? PyModule_Create2(&module, kAbiVersion) : nullptr;
}
