// The functions of the module jaxembed_packing beside `pack`.
#pragma once

#include "../../jaxembed/native/python_abi.h"

namespace jaxembed {

// Makes the names that `MergeRows` asks for; false, with an error set, where it cannot.
bool InitMerge();

PyObject* MergeRows(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace jaxembed
