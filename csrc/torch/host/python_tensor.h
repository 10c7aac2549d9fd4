// The module "host" of Python: what needs PyTorch's own C++ headers, whose classes change from release to release. It is
// compiled for one PyTorch and one Python, and may be missing: everything here has a twin in Python.
//
// A tensor's object is read without python_variable.h, which has pybind11 and all of ATen, a fifth of what the first use
// compiles.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>

#include <ATen/core/TensorBase.h>
#include <c10/core/TensorImpl.h>

namespace fe::host {

// Raised already in Python.
struct PythonError {};

// Where in a tensor's object its TensorImpl is, in bytes: what python_variable.h would say. Found by `_cdata`, which is its
// address.
inline Py_ssize_t impl_offset = 0;

inline uintptr_t cdata_of(PyObject* tensor) {
  PyObject* attribute = PyObject_GetAttrString(tensor, "_cdata");
  if (!attribute) throw PythonError();
  const auto address = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(attribute));
  Py_DECREF(attribute);
  if (PyErr_Occurred()) throw PythonError();
  return address;
}

inline uintptr_t word_at(PyObject* object, Py_ssize_t offset) {
  uintptr_t word;
  std::memcpy(&word, reinterpret_cast<const char*>(object) + offset, sizeof word);
  return word;
}

// Of an object that `checked_tensor` has seen, or one of the same class.
inline c10::TensorImpl& tensor_of(PyObject* object) {
  return *reinterpret_cast<c10::TensorImpl*>(word_at(object, impl_offset));
}

// The same of an object that may be none, or laid out otherwise.
inline c10::TensorImpl& checked_tensor(PyObject* object) {
  const uintptr_t address = cdata_of(object);
  if (!impl_offset) {
    const Py_ssize_t size = Py_TYPE(object)->tp_basicsize, word = sizeof(uintptr_t);
    for (Py_ssize_t at = sizeof(PyObject); at + word <= size && !impl_offset; at += word)
      if (word_at(object, at) == address) impl_offset = at;
  }
  if (!impl_offset || word_at(object, impl_offset) != address) {
    PyErr_SetString(PyExc_TypeError, "host: tensors must be laid out as in the PyTorch it was compiled for");
    throw PythonError();
  }
  return tensor_of(object);
}

// The bytes from the first element to the end of the last, of a tensor with strides.
inline size_t extent(const c10::TensorImpl& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = tensor.numel() - 1;
  if (!tensor.is_contiguous()) {
    last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.sizes()[d] - 1) * tensor.strides()[d];
  }
  return static_cast<size_t>(last + 1) * tensor.itemsize();
}

// Whether its storage has that many bytes for it. A view with an offset into freed storage has an address that is not null.
inline bool has_bytes(const c10::TensorImpl& tensor, size_t bytes) {
  if (bytes == 0) return true;
  const c10::Storage& storage = tensor.unsafe_storage();
  return storage.data() && static_cast<size_t>(tensor.storage_offset()) * tensor.itemsize() + bytes <= storage.nbytes();
}

// The same of one whose layout was not seen before: CPU or GPU, and dense.
inline bool has_values(const c10::TensorImpl& tensor) { return has_bytes(tensor, extent(tensor)); }

// What each file adds to the module; -1 where it failed, with an error of Python set.
int add_group_check(PyObject* module);
int add_free_energy(PyObject* module);
int add_reparameterize(PyObject* module);
int add_model_checks(PyObject* module);

}  // namespace fe::host
