// RaggedTensor.__init__: requests hold one for every feature, and Python's way to check and set two arrays takes several
// times as long.
#include "python_abi.h"

namespace {

PyObject *ndarray, *values_name, *row_splits_name, *ragged, *in_python;

template <typename Int>
bool Rise(const Int* splits, int64_t size, int64_t values) {
  bool fall = splits[0] != 0 || splits[size - 1] > values;
  for (int64_t b = 1; b < size; ++b) fall |= splits[b] < splits[b - 1];
  return !fall;
}

// Whether they are numpy arrays of rank 1, and row_splits contiguous int32 or int64 that rise from 0 to at most
// len(values). Others may be right as well.
bool Usual(PyObject* values, PyObject* row_splits) {
  if (values->ob_type != ndarray || row_splits->ob_type != ndarray) return false;
  const auto* array = reinterpret_cast<const jaxembed::NumpyArray*>(values);
  jaxembed::IntArray splits;
  if (array->nd != 1 || !splits.Take(row_splits) || splits.size() < 1) return false;
  const int64_t size = array->dimensions[0];
  return splits.wide() ? Rise(splits.data<int64_t>(), splits.size(), size)
                       : Rise(splits.data<int32_t>(), splits.size(), size);
}

// Calls the __init__ in Python, which has more to say.
PyObject* InitInPython(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  PyObject *positional = PyTuple_New(1 + count), *named = PyDict_New(), *result = nullptr;
  if (positional && named) {
    for (Py_ssize_t i = 0; i <= count; ++i) {
      PyObject* value = i ? args[i - 1] : self;
      Py_IncRef(value);
      PyTuple_SetItem(positional, i, value);
    }
    const Py_ssize_t rest = names ? PyObject_Size(names) : 0;
    bool set = true;
    for (Py_ssize_t i = 0; i < rest; ++i) set &= !PyDict_SetItem(named, PyTuple_GetItem(names, i), args[count + i]);
    if (set) result = PyObject_Call(in_python, positional, named);
  }
  if (positional) Py_DecRef(positional);
  if (named) Py_DecRef(named);
  return result;
}

PyObject* Init(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  // Subclasses may check more.
  if (count != 2 || names || self->ob_type != ragged || !Usual(args[0], args[1])) return InitInPython(self, args, count, names);
  // Past the class, which is frozen.
  if (PyObject_GenericSetAttr(self, values_name, args[0])) return nullptr;
  if (PyObject_GenericSetAttr(self, row_splits_name, args[1])) return nullptr;
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

using Method = decltype(PyMethodDef::ml_meth);
PyMethodDef init = {"__init__", reinterpret_cast<Method>(reinterpret_cast<void (*)()>(Init)), kFastCall | kKeywords,
                    "__init__($self, values, row_splits)\n--\n\n"};

PyObject* InitFor(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "init_for takes a class and its __init__");
    return nullptr;
  }
  Py_IncRef(args[0]);
  Py_IncRef(args[1]);
  if (ragged) Py_DecRef(ragged);
  if (in_python) Py_DecRef(in_python);
  ragged = args[0];
  in_python = args[1];
  return PyDescr_NewMethod(args[0], &init);
}

PyMethodDef methods[] = {
    {"init_for", InitFor, kFastCall,
     "init_for(cls, init): an __init__ for `cls` that sets the attributes `values` and `row_splits` where they are what "
     "they mostly are, and calls `init` where they are not, and for subclasses."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = jaxembed::ModuleOf("jaxembed_ragged", methods);

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_jaxembed_ragged() {
  ndarray = jaxembed::NdarrayType();
  values_name = PyUnicode_InternFromString("values");
  row_splits_name = PyUnicode_InternFromString("row_splits");
  return ndarray && values_name && row_splits_name ? PyModule_Create2(&module, kAbiVersion) : nullptr;
}
