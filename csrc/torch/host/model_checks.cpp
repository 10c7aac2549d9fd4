// What a model asks at every step of its data and weights: twins of a few lines in fekernels/ops/free_energy/domains.py and
// fekernels/models/noise_counter.py, which take what is rare.

#include "torch/host/node.h"

#include <limits>

// Of its own names, as all of the module is one file for the compiler.
namespace fe::host::model_checks {

// Once, and in order, so that the compiler makes vectors of it; torch's minimum and maximum are two operators.
template <class Good>
[[gnu::always_inline]] inline bool all_of(const float* x, int64_t count, Good good) {
  constexpr int64_t kBlock = 256;
  int64_t at = 0;
  for (; at + kBlock <= count; at += kBlock) {
    int bad = 0;
    for (int64_t i = 0; i < kBlock; ++i) bad |= !good(x[at + i]);
    if (bad) return false;
  }
  for (; at < count; ++at)
    if (!good(x[at])) return false;
  return true;
}

#if defined(__x86_64__)
template <class Good>
[[gnu::target("avx2")]] bool all_avx2(const float* x, int64_t count, Good good) {
  return all_of(x, count, good);
}
#endif

// 100,000 floats in 7 us, in place of 14 by the vectors that every x86-64 has.
template <class Good>
bool all(const float* x, int64_t count, Good good) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return all_avx2(x, count, good);
#endif
  return all_of(x, count, good);
}

// all_within(x, lowest, above, highest): whether every element is finite, at least `lowest` (or above it) and at most
// `highest`; NaN is not. None where Python has to look.
PyObject* all_within(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !tensor_class) return PyErr_Format(PyExc_TypeError, "all_within takes 4 arguments, after connect; got %zd", count);
  const at::Tensor x = plain_operand(arguments[0]);
  const auto lowest = static_cast<float>(PyFloat_AsDouble(arguments[1]));
  const int above = PyObject_IsTrue(arguments[2]);
  const double bound = PyFloat_AsDouble(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  if (!x.defined() || !x.is_contiguous() || !has_values(x)) Py_RETURN_NONE;
  constexpr float kLargest = std::numeric_limits<float>::max();
  const float highest = bound < kLargest ? static_cast<float>(bound) : kLargest;
  const float* values = static_cast<const float*>(x.const_data_ptr());
  const bool within = above ? all(values, x.numel(), [=](float v) { return (v > lowest) & (v <= highest); })
                            : all(values, x.numel(), [=](float v) { return (v >= lowest) & (v <= highest); });
  return PyBool_FromLong(within);
}

struct Weights {
  uint64_t versions = 0;
  at::Tensor last;
};

// Adds up what a module and its children have; false where Python has to, or with an error set.
bool visit(PyObject* module, PyObject* own_parts, Weights& found) {
  PyObject* parts = PyObject_CallOneArg(own_parts, module);
  if (!parts) return false;
  PyObject *weights = PyTuple_GET_ITEM(parts, 0), *children = PyTuple_GET_ITEM(parts, 1), *key, *value;
  bool plain = PyDict_CheckExact(weights) && PyDict_CheckExact(children);
  for (Py_ssize_t at = 0; plain && PyDict_Next(weights, &at, &key, &value);) {
    if (value == Py_None) continue;
    const at::Tensor weight = plain_operand(value);
    plain = weight.defined() && !weight.is_inference();
    if (!plain) break;
    found.versions += weight._version();
    found.last = weight;
  }
  for (Py_ssize_t at = 0; plain && PyDict_Next(children, &at, &key, &value);)
    if (value != Py_None) plain = visit(value, own_parts, found);
  Py_DECREF(parts);
  return plain;
}

// weights_state(module, own_parts): (sum of the weights' versions, sum of the last one's elements), or None where Python has to
// look.
PyObject* weights_state(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !tensor_class) return PyErr_Format(PyExc_TypeError, "weights_state takes 2 arguments, after connect; got %zd", count);
  Weights found;
  if (!visit(arguments[0], arguments[1], found)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  constexpr int64_t kFew = 1 << 16;  // of more, torch's sum on all threads takes less
  if (!found.last.defined() || found.last.numel() > kFew || !found.last.is_contiguous() || !has_values(found.last)) Py_RETURN_NONE;
  double sum = 0.0;
  const float* values = static_cast<const float*>(found.last.const_data_ptr());
  for (int64_t i = 0; i < found.last.numel(); ++i) sum += values[i];
  return Py_BuildValue("Kd", static_cast<unsigned long long>(found.versions), sum);
}

// connect(torch.Tensor, torch.nn.Parameter, a tensor)
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject *classes[2], *example;
  if (!PyArg_ParseTuple(arguments, "OOO", &classes[0], &classes[1], &example)) return nullptr;
  if (!connect_classes(classes[0], classes[1], example)) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"all_within", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(all_within)), METH_FASTCALL, nullptr},
    {"weights_state", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(weights_state)), METH_FASTCALL, nullptr},
    {"connect_model_checks", connect, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fe::host::model_checks

int fe::host::add_model_checks(PyObject* module) { return PyModule_AddFunctions(module, model_checks::functions); }
