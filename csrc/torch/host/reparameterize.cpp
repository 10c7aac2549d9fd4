// A sample of a Gaussian from Python to the kernel and back, and its place in autograd's graph: the twin of _PlainReparameterize
// in fekernels/ops/free_energy/reparameterize.py. What is rare it leaves to that file: other operands, gradients of gradients,
// batches of gradients.

#include "torch/host/node.h"
#include "torch/plain_reparameterize.h"

#include <mutex>

#include <ATen/record_function.h>

// Of its own names, as all of the module is one file for the compiler.
namespace fe::host::reparameterize_node {

// From `connect`: the kernel, _again of fekernels/ops/free_energy/reparameterize.py, and the numbers that a call must be below.
fe::PlainReparameterizeKernel* kernel = nullptr;
PyObject* again = nullptr;
int64_t counters, indices, most_samples;

struct Key {
  int64_t seed, stream, step, offset;
};

variable_list run(const at::Tensor& operand, const at::Tensor& logvar, const Key& key, int64_t samples, bool backward) {
  variable_list results;
  kernel({handle(operand), handle(logvar), key.seed, key.stream, key.step, key.offset, samples, backward, &results, &append});
  return results;
}

struct ReparameterizeBackward final : Node {
  Key key;
  int64_t samples;
  SavedVariable logvar;

  std::string name() const override { return "ReparameterizeBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    logvar.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    throw std::runtime_error(
        "reparameterize: compiled autograd needs to be known before the sample is drawn: set"
        " torch._dynamo.config.compiled_autograd = True first");
  }

  variable_list apply(variable_list&& above) override {
    at::Tensor kept;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      kept = logvar.unpack(getptr());
    }
    const at::Tensor& grad = above[0];
    if (!grad.defined()) return variable_list(2);
    if (at::GradMode::is_enabled() || !is_plain(*grad.unsafeGetTensorImpl()) || !grad.is_contiguous() || !has_values(grad))
      return in_python(grad, kept);
    return run(grad.dim() == 2 ? grad.unsqueeze(0) : grad, kept, key, samples, true);
  }

 private:
  variable_list in_python(const at::Tensor& grad, const at::Tensor& kept) const {
    const Gil gil;
    PyObject* pair = wrapped({grad, kept});
    PyObject* found = pair ? PyObject_CallFunction(again, "O(LLLL)", pair, static_cast<long long>(key.seed),
                                                   static_cast<long long>(key.stream), static_cast<long long>(key.step),
                                                   static_cast<long long>(key.offset))
                           : nullptr;
    Py_XDECREF(pair);
    return gradients_of(found, 2, "reparameterize");
  }
};

// A number of Python in [0, end), or -1.
int64_t index_below(PyObject* number, int64_t end) {
  if (!PyLong_CheckExact(number)) return -1;
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
  return !overflow && value >= 0 && value < end ? value : -1;
}

// reparameterize(mean, logvar, seed, stream, step, offset, samples): z, or None where Python has to look at it. samples: None
// for one without a dimension of its own.
PyObject* reparameterize(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 7 || !kernel)
    return PyErr_Format(PyExc_TypeError, "reparameterize takes 7 arguments, after connect; got %zd", count);
  const at::Tensor mean = plain_operand(arguments[0]), logvar = plain_operand(arguments[1]);
  if (!mean.defined() || !logvar.defined()) Py_RETURN_NONE;
  if (mean.dim() != 2 || !mean.is_contiguous() || !logvar.is_contiguous() || mean.sizes() != logvar.sizes()) Py_RETURN_NONE;
  if (!mean.numel() || !has_values(mean) || !has_values(logvar)) Py_RETURN_NONE;
  if (!PyLong_CheckExact(arguments[2])) Py_RETURN_NONE;
  int overflow = 0;
  const long long seed = PyLong_AsLongLongAndOverflow(arguments[2], &overflow);
  const int64_t samples = arguments[6] == Py_None ? 1 : index_below(arguments[6], most_samples);
  if (overflow || samples < 1) Py_RETURN_NONE;
  const Key key{seed, index_below(arguments[3], counters - samples + 1), index_below(arguments[4], counters),
                index_below(arguments[5], indices / mean.size(1) - mean.size(0) + 1)};
  if (key.stream < 0 || key.step < 0 || key.offset < 0) Py_RETURN_NONE;
  variable_list results;
  try {
    RECORD_FUNCTION("fekernels::reparameterize", c10::ArrayRef<const c10::IValue>{});
    {
      const WithoutGil unlocked;
      results = run(mean, logvar, key, samples, false);
    }
    at::Tensor& z = results[0];
    if (arguments[6] == Py_None) z.unsafeGetTensorImpl()->set_sizes_contiguous(mean.sizes());
    if (at::GradMode::is_enabled() && (mean.requires_grad() || logvar.requires_grad())) {
      auto node = make_node<ReparameterizeBackward>();
      node->key = key;
      node->samples = samples;
      node->logvar = SavedVariable(logvar, false);
      node->set_next_edges({torch::autograd::impl::gradient_edge(mean), torch::autograd::impl::gradient_edge(logvar)});
      torch::autograd::impl::set_gradient_edge(z, {node, node->add_input_metadata(z)});
    }
    return THPVariable_Wrap(z);
  } catch (const c10::Error& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what_without_backtrace());
  } catch (const std::exception& error) {
    if (PyErr_Occurred()) return nullptr;  // a hook's own, by which checkpoints end a computation
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}

// connect(kernel's address, again, torch.Tensor, torch.nn.Parameter, a tensor, ends of counters, of indices and of samples)
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject *address, *function, *classes[2], *example;
  long long ends[3];
  if (!PyArg_ParseTuple(arguments, "OOOOOLLL", &address, &function, &classes[0], &classes[1], &example, &ends[0], &ends[1], &ends[2]))
    return nullptr;
  if (!connect_classes(classes[0], classes[1], example)) return nullptr;
  kernel = reinterpret_cast<fe::PlainReparameterizeKernel*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_XSETREF(again, Py_NewRef(function));
  counters = ends[0];
  indices = ends[1];
  most_samples = ends[2];
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"reparameterize", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(reparameterize)), METH_FASTCALL, nullptr},
    {"connect_reparameterize", connect, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fe::host::reparameterize_node

int fe::host::add_reparameterize(PyObject* module) { return PyModule_AddFunctions(module, reparameterize_node::functions); }
