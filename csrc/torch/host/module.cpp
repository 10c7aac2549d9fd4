#include "torch/host/python_tensor.h"

namespace {

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "host", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_host() {
  using namespace fe::host;
  PyObject* module = PyModule_Create(&definition);
  for (auto* add : {add_group_check, add_free_energy, add_reparameterize, add_model_checks})
    if (module && add(module) < 0) Py_CLEAR(module);
  return module;
}
