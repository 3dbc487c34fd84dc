// The part of Python's stable ABI (PEP 384, as of 3.11) that is used here: one build serves every Python, and needs
// none of its headers, which Debian keeps in a package of their own.
#ifndef JAXEMBED_PYTHON_ABI_H_
#define JAXEMBED_PYTHON_ABI_H_

#include <cstdint>

extern "C" {

using Py_ssize_t = intptr_t;

struct PyObject {
  Py_ssize_t ob_refcnt;
  PyObject* ob_type;
};

struct PyMethodDef {
  const char* ml_name;
  // As ml_flags say: this is METH_FASTCALL; with METH_KEYWORDS the names of the last arguments follow, or null.
  PyObject* (*ml_meth)(PyObject* self, PyObject* const* args, Py_ssize_t count);
  int ml_flags;
  const char* ml_doc;
};

struct PyModuleDef {
  PyObject ob_base;
  PyObject* (*m_init)();
  Py_ssize_t m_index;
  PyObject* m_copy;
  const char *m_name, *m_doc;
  Py_ssize_t m_size;
  PyMethodDef* m_methods;
  void *m_slots, *m_traverse, *m_clear, *m_free;
};

constexpr int kFastCall = 0x80, kKeywords = 0x2;   // METH_FASTCALL, METH_KEYWORDS
constexpr int kAbiVersion = 3;                     // PYTHON_ABI_VERSION

PyObject* PyModule_Create2(PyModuleDef* def, int version);
PyObject* PyImport_ImportModule(const char* name);
PyObject* PyUnicode_InternFromString(const char* text);
PyObject* PyDescr_NewMethod(PyObject* type, PyMethodDef* method);
PyObject* PyObject_Call(PyObject* callable, PyObject* args, PyObject* kwargs);
PyObject* PyObject_GetAttr(PyObject* object, PyObject* name);
PyObject* PyObject_GetAttrString(PyObject* object, const char* name);
int PyObject_GenericSetAttr(PyObject* object, PyObject* name, PyObject* value);
Py_ssize_t PyObject_Size(PyObject* object);
PyObject* PyTuple_New(Py_ssize_t size);
int PyTuple_SetItem(PyObject* tuple, Py_ssize_t at, PyObject* value);  // takes the reference
PyObject* PyTuple_GetItem(PyObject* tuple, Py_ssize_t at);             // borrowed
PyObject* PyDict_New();
int PyDict_SetItem(PyObject* dict, PyObject* key, PyObject* value);
PyObject* PyList_GetItem(PyObject* list, Py_ssize_t at);  // borrowed
Py_ssize_t PyList_Size(PyObject* list);
PyObject* PyLong_FromLongLong(long long value);
long long PyLong_AsLongLong(PyObject* object);
void PyErr_Clear();
void PyErr_SetString(PyObject* type, const char* message);
extern PyObject* PyExc_TypeError;
PyObject* PyErr_Occurred();  // borrowed
void Py_IncRef(PyObject* object);
void Py_DecRef(PyObject* object);
extern PyObject _Py_NoneStruct;
struct PyThreadState;
PyThreadState* PyEval_SaveThread();
void PyEval_RestoreThread(PyThreadState* state);

}  // extern "C"

namespace jaxembed {

// What a module's PyInit function makes it of.
inline PyModuleDef ModuleOf(const char* name, PyMethodDef* methods) {
  PyModuleDef def{};
  def.ob_base.ob_refcnt = 1, def.m_name = name, def.m_size = -1, def.m_methods = methods;
  return def;
}

// The type numpy.ndarray; null, with an error set, without numpy.
inline PyObject* NdarrayType() {
  PyObject* numpy = PyImport_ImportModule("numpy");
  if (!numpy) return nullptr;
  PyObject* type = PyObject_GetAttrString(numpy, "ndarray");
  Py_DecRef(numpy);
  return type;
}

// numpy.ndarray and its dtype up to the fields that are used here, as numpy 1 and 2 have them: macros of numpy's C API read
// them in place, so they are the same for every extension. To ask for a buffer instead, by the stable ABI, takes 0.1
// microseconds an array, as numpy writes a new description of its type each time.
struct NumpyType {
  PyObject ob_base;
  PyObject* typeobj;
  char kind, type, byteorder, flags;
  int type_num;
};

struct NumpyArray {
  PyObject ob_base;
  void* data;
  int nd;
  Py_ssize_t *dimensions, *strides;
  PyObject* base;
  NumpyType* descr;
  int flags;
};

constexpr int kContiguous = 0x1, kAligned = 0x100;  // NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_ALIGNED
constexpr int kInt = 5, kLong = 7, kLongLong = 9;   // NPY_INT, NPY_LONG, NPY_LONGLONG

// A contiguous array of rank 1 of int32 or int64, which is kept for as long as this lives.
class IntArray {
 public:
  IntArray() = default;
  IntArray(IntArray&& other) noexcept
      : array_(other.array_), data_(other.data_), size_(other.size_), wide_(other.wide_) {
    other.array_ = nullptr;
  }
  IntArray(const IntArray&) = delete;
  ~IntArray() {
    if (array_) Py_DecRef(array_);
  }

  // object: a numpy.ndarray, of no subclass. False for any other kind of array.
  bool Take(PyObject* object) {
    auto* array = reinterpret_cast<NumpyArray*>(object);
    const NumpyType* type = array->descr;
    const bool integer = type->type_num == kInt || type->type_num == kLong || type->type_num == kLongLong;
    constexpr int kFlags = kContiguous | kAligned;
    if (!integer || type->byteorder != '=' || array->nd != 1 || (array->flags & kFlags) != kFlags) return false;
    wide_ = type->type_num != kInt && (type->type_num != kLong || sizeof(long) == 8);
    data_ = array->data;
    size_ = array->dimensions[0];
    Py_IncRef(object);
    array_ = object;
    return true;
  }
  bool wide() const { return wide_; }
  int64_t size() const { return size_; }
  template <typename Int>
  const Int* data() const {
    return static_cast<const Int*>(data_);
  }

 private:
  PyObject* array_ = nullptr;
  // As they were: another thread of Python may give the array another type or shape.
  const void* data_ = nullptr;
  int64_t size_ = 0;
  bool wide_ = false;
};

}  // namespace jaxembed

#endif  // JAXEMBED_PYTHON_ABI_H_
