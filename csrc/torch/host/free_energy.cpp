// Most free energies from Python to the kernel and back, and their place in autograd's graph, which hands on the gradients
// that the kernel made with the values: the twin of _plain_in_python and _Terms in fekernels/ops/free_energy/autograd.py. What is
// rare it leaves to that file: other operands, gradients of gradients, second backward passes, batches of gradients.

#include "torch/host/node.h"
#include "torch/plain_free_energy.h"

#include <mutex>

#include <ATen/record_function.h>

// Of its own names, as all of the module is one file for the compiler.
namespace fe::host::free_energy_node {

constexpr size_t kOperands = 3, kTerms = 3;  // prediction, mean, logvar; free energy, energy, KL

// From `connect`: the kernel, and _again of fekernels/ops/free_energy/autograd.py.
fe::PlainFreeEnergyKernel* kernel = nullptr;
PyObject* again = nullptr;

// Nothing, or a number.
bool is_factor(const at::Tensor& scalar) {
  return !scalar.defined() || (is_plain(*scalar.unsafeGetTensorImpl()) && scalar.numel() == 1 && has_values(scalar));
}

// factor * first + second, in float as PyTorch would; `any` where there is one of them.
struct Factor {
  bool any = false;
  float value = 0.0f;

  void add(const at::Tensor& scalar, double factor) {
    if (!scalar.defined()) return;
    const float term = *static_cast<const float*>(scalar.const_data_ptr()) * static_cast<float>(factor);
    value = any ? value + term : term;
    any = true;
  }
};

struct FreeEnergyBackward final : Node {
  int64_t likelihood, reduction, needs;
  double beta;
  bool inplace;
  variable_list gradients;  // of the operands that need one, until the first backward pass
  std::vector<SavedVariable> saved;  // none with `inplace`, whose prediction is gone

  std::string name() const override { return "FreeEnergyBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    gradients.clear();
    for (SavedVariable& variable : saved) variable.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    throw std::runtime_error(
        "free_energy: compiled autograd needs to be known before the loss is computed: set"
        " torch._dynamo.config.compiled_autograd = True first");
  }

  variable_list apply(variable_list&& above) override {
    variable_list ready, operands;
    const bool differentiable = at::GradMode::is_enabled();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ready = std::exchange(gradients, {});
      if (differentiable || ready.empty())
        for (const SavedVariable& variable : saved) operands.push_back(variable.unpack(getptr()));
    }
    if (differentiable || ready.empty() || !is_factor(above[0]) || !is_factor(above[1]) || !is_factor(above[2]))
      return in_python(ready, operands, above);
    Factor of_energy, of_kl;
    of_energy.add(above[0], 1.0);
    of_energy.add(above[1], 1.0);
    of_kl.add(above[0], beta);
    of_kl.add(above[2], 1.0);
    variable_list results(kOperands);
    for (size_t i = 0, next = 0; i < kOperands; ++i) {
      if (!(needs >> i & 1)) continue;
      at::Tensor& gradient = ready[next++];
      const Factor& factor = i == 0 ? of_energy : of_kl;
      if (!factor.any) continue;
      if (factor.value != 1.0f) gradient.mul_(factor.value);
      results[i] = std::move(gradient);
    }
    return results;
  }

 private:
  variable_list in_python(const variable_list& ready, const variable_list& operands, const variable_list& above) const {
    const Gil gil;
    PyObject* lists[] = {wrapped(ready), wrapped(operands), wrapped(above)};
    PyObject* found = nullptr;
    if (lists[0] && lists[1] && lists[2])
      found = PyObject_CallFunction(again, "LLdLOOOO", static_cast<long long>(likelihood), static_cast<long long>(reduction),
                                    beta, static_cast<long long>(needs), inplace ? Py_True : Py_False, lists[0], lists[1],
                                    lists[2]);
    for (PyObject* list : lists) Py_XDECREF(list);
    return gradients_of(found, kOperands, "free_energy");
  }
};

// Whether it is, or is a view of, a tensor whose values an optimizer would step from.
bool belongs_to_leaf(const at::Tensor& prediction) {
  const at::TensorBase& base = prediction.is_view() ? prediction._base() : prediction;
  return base.is_leaf() && base.requires_grad();
}

// free_energy(prediction, target, mean, logvar, likelihood, reduction, beta, with_gradients, inplace): (free_energy, energy,
// kl), or None where Python has to look at it.
PyObject* free_energy(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 9 || !kernel) return PyErr_Format(PyExc_TypeError, "free_energy takes 9 arguments, after connect; got %zd", count);
  at::Tensor operands[4];
  for (size_t i = 0; i < 4; ++i) {
    operands[i] = plain_operand(arguments[i]);
    if (!operands[i].defined() || !has_values(operands[i])) Py_RETURN_NONE;
  }
  const int64_t likelihood = PyLong_AsLongLong(arguments[4]), reduction = PyLong_AsLongLong(arguments[5]);
  const double beta = PyFloat_AsDouble(arguments[6]);
  const int with_gradients = PyObject_IsTrue(arguments[7]), overwrite = PyObject_IsTrue(arguments[8]);
  if (PyErr_Occurred()) return nullptr;
  const auto& [prediction, target, mean, logvar] = operands;
  if (target.requires_grad()) Py_RETURN_NONE;
  const int64_t needs =
      with_gradients ? prediction.requires_grad() | mean.requires_grad() << 1 | logvar.requires_grad() << 2 : 0;
  const bool inplace = overwrite && needs & 1;
  variable_list results;
  try {
    if (inplace && belongs_to_leaf(prediction)) Py_RETURN_NONE;
    {
      RECORD_FUNCTION("fekernels::free_energy", c10::ArrayRef<const c10::IValue>{});
      const WithoutGil unlocked;
      kernel({handle(prediction), handle(target), handle(mean), handle(logvar), likelihood, reduction, beta, needs, inplace,
              &results, &append});
    }
    if (results.empty()) Py_RETURN_NONE;
    if (needs) {
      auto node = make_node<FreeEnergyBackward>();
      node->likelihood = likelihood;
      node->reduction = reduction;
      node->needs = needs;
      node->beta = beta;
      node->inplace = inplace;
      edge_list edges;
      for (const at::Tensor* operand : {&prediction, &mean, &logvar})
        edges.push_back(torch::autograd::impl::gradient_edge(*operand));
      node->set_next_edges(std::move(edges));
      if (inplace) {
        // As a tensor of its own, autograd may keep it for `.grad`; an input it would copy.
        results[kTerms] = at::Tensor(prediction.variable_data());
        prediction.unsafeGetTensorImpl()->bump_version();
      } else {
        for (const at::Tensor* operand : {&prediction, &mean, &logvar, &target}) node->saved.emplace_back(*operand, false);
      }
      for (size_t i = 0; i < kTerms; ++i)
        torch::autograd::impl::set_gradient_edge(results[i], {node, node->add_input_metadata(results[i])});
      const auto first = std::make_move_iterator(results.begin() + kTerms), last = std::make_move_iterator(results.end());
      node->gradients.assign(first, last);
      results.resize(kTerms);
    }
  } catch (const c10::Error& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what_without_backtrace());
  } catch (const std::exception& error) {
    if (PyErr_Occurred()) return nullptr;  // a hook's own, by which checkpoints end a computation
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  return wrapped(results);
}

// connect(kernel's address, again, torch.Tensor, torch.nn.Parameter, a tensor)
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject *address, *function, *classes[2], *example;
  if (!PyArg_ParseTuple(arguments, "OOOOO", &address, &function, &classes[0], &classes[1], &example)) return nullptr;
  if (!connect_classes(classes[0], classes[1], example)) return nullptr;
  kernel = reinterpret_cast<fe::PlainFreeEnergyKernel*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_XSETREF(again, Py_NewRef(function));
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"free_energy", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(free_energy)), METH_FASTCALL, nullptr},
    {"connect_free_energy", connect, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fe::host::free_energy_node

int fe::host::add_free_energy(PyObject* module) { return PyModule_AddFunctions(module, free_energy_node::functions); }
