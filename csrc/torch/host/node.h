// What nodes of autograd's graph share whose forward pass Python calls, and whose rare cases go back to Python.
#pragma once

// Else autograd's headers read every operator that there is.
#define AT_PER_OPERATOR_HEADERS
#include "torch/host/python_tensor.h"

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#if __has_include(<torch/csrc/autograd/node.h>)  // its own file since torch 2.13
#include <torch/csrc/autograd/node.h>
#else
#include <torch/csrc/autograd/function.h>
#endif
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

// Of python_variable.h. Linked at load, so that a torch without it leaves Python's twin.
PyObject* THPVariable_Wrap(const at::TensorBase& tensor);

namespace fe::host {

using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The classes whose operators are PyTorch's, from `connect_classes`.
inline PyObject *tensor_class = nullptr, *parameter_class = nullptr;

// Of torch.Tensor and torch.nn.Parameter, and a tensor; false with an error of Python set.
inline bool connect_classes(PyObject* of_tensors, PyObject* of_parameters, PyObject* example) {
  try {
    checked_tensor(example);
  } catch (const PythonError&) {
    return false;
  }
  Py_XSETREF(tensor_class, Py_NewRef(of_tensors));
  Py_XSETREF(parameter_class, Py_NewRef(of_parameters));
  return true;
}

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

// The other way round: Python's lock is given back while a kernel runs.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// PyTorch makes a RuntimeError of it. An interrupt is raised again as soon as Python runs. `function`: whose message it is, where Python gave none.
[[noreturn]] inline void throw_python_error(const char* function) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  const bool interrupted = PyErr_GivenExceptionMatches(type, PyExc_KeyboardInterrupt);
  PyObject* text = value ? PyObject_Str(value) : nullptr;
  const char* words = text ? PyUnicode_AsUTF8(text) : nullptr;
  std::string message = words ? words : std::string(function) + ": backward failed";
  if (type && !PyErr_GivenExceptionMatches(type, PyExc_RuntimeError))
    message = std::string(reinterpret_cast<PyTypeObject*>(type)->tp_name) + ": " + message;
  for (PyObject* object : {type, value, traceback, text}) Py_XDECREF(object);
  PyErr_Clear();
  if (interrupted) PyErr_SetInterrupt();
  throw std::runtime_error(message);
}

// A tuple, with None for an undefined tensor.
inline PyObject* wrapped(const variable_list& tensors) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  for (size_t i = 0; tuple && i < tensors.size(); ++i) {
    PyObject* object = tensors[i].defined() ? THPVariable_Wrap(tensors[i]) : Py_NewRef(Py_None);
    if (!object) Py_CLEAR(tuple);
    else PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), object);
  }
  return tuple;
}

inline bool has_values(const at::Tensor& tensor) { return has_values(*tensor.unsafeGetTensorImpl()); }

inline at::Tensor tensor(c10::TensorImpl& impl) {
  return at::Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(&impl));
}

// Its values are float32 in this machine's memory: every other layout, subclass, lazy negation and transform has a key.
// Those of autograd and autocast, which all have, come and go with modes.
inline bool is_plain(const c10::TensorImpl& tensor) {
  const c10::DispatchKeySet of_modes = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  const c10::DispatchKeySet keys = tensor.key_set() - of_modes;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU) && tensor.dtype() == caffe2::TypeMeta::Make<float>();
}

// The tensor of an argument, if it is one of PyTorch's own classes and plain; else nothing.
inline at::Tensor plain_operand(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_class && type != parameter_class) return {};
  c10::TensorImpl& impl = tensor_of(object);
  return is_plain(impl) ? tensor(impl) : at::Tensor();
}

// The gradients that a function of Python found, and takes over `found`: `count` of them, None for an undefined one.
inline variable_list gradients_of(PyObject* found, size_t count, const char* function) {
  variable_list results;
  try {
    for (size_t i = 0; found && i < count; ++i) {
      PyObject* gradient = PySequence_GetItem(found, static_cast<Py_ssize_t>(i));
      if (!gradient) break;
      results.push_back(gradient == Py_None ? at::Tensor() : tensor(checked_tensor(gradient)));
      Py_DECREF(gradient);
    }
  } catch (const PythonError&) {
  }
  Py_XDECREF(found);
  if (results.size() != count) throw_python_error(function);
  return results;
}

// Nodes were shared_ptr's before torch 2.13. Argument-dependent, so that the one of the two that a torch lacks is not looked
// up; deleteNode takes a long graph apart without recursion.
template <class T, class Pointer = decltype(Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::shared_ptr<T>(new T, [](auto* node) { deleteNode(node); });
  else return c10::make_intrusive<T>();
}

// For kernels that hand their results over one by one.
inline void append(void* tensors, void* handle) {
  static_cast<variable_list*>(tensors)->push_back(*static_cast<const at::Tensor*>(handle));
}

// A tensor as a handle of PyTorch's stable ABI, for a kernel that takes it over.
inline void* handle(const at::Tensor& operand) { return static_cast<void*>(new at::Tensor(operand)); }

}  // namespace fe::host
