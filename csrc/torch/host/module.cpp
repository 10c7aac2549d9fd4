#include "torch/host/python_tensor.h"

namespace {

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "host", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_host() {
  PyObject* module = PyModule_Create(&definition);
  if (module && (fe::host::add_group_check(module) < 0 || fe::host::add_free_energy(module) < 0)) Py_CLEAR(module);
  return module;
}
