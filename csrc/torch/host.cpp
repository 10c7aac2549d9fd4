// Whether a parameter group's tensors still are what its pointer table says, and where this step's gradients lie: the
// check of fekernels/optim/_table_cache.py, in 8 us instead of 200 for 200 parameters with 600 states. It is made at every
// step, because a table holds addresses, and anybody may give a parameter other data, gradients or states.
//
// The only file against PyTorch's own C++ headers, whose classes change from release to release: it is compiled for one
// PyTorch and one Python, and without it the Python check serves.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include <c10/core/DispatchKeySet.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

namespace py = pybind11;

namespace {

// All that a kernel takes for granted of a tensor. The dispatch keys say that its memory is plain: device, layout,
// subclasses with a dispatch of their own, lazy negation and conjugation, transforms are keys. Autograd's are not looked
// at, which come and go with inference mode.
struct Facts {
  const void* address = nullptr;
  caffe2::TypeMeta dtype;
  c10::DispatchKeySet keys;
  bool contiguous = false;
  std::vector<int64_t> sizes, strides;

  static c10::DispatchKeySet plain_keys(const c10::TensorImpl& tensor) {
    return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  }

  static Facts of(const c10::TensorImpl& tensor) {
    return {tensor.data(), tensor.dtype(), plain_keys(tensor), tensor.is_contiguous(), tensor.sizes().vec(),
        tensor.strides().vec()};
  }

  // All but the address. The strides of dimensions of one element do not matter.
  bool laid_out(const c10::TensorImpl& tensor) const {
    return tensor.dtype() == dtype && plain_keys(tensor) == keys && tensor.sizes() == c10::IntArrayRef(sizes) &&
           (contiguous ? tensor.is_contiguous() : tensor.strides() == c10::IntArrayRef(strides));
  }
  bool hold_of(const c10::TensorImpl& tensor) const { return tensor.data() == address && laid_out(tensor); }
};

const c10::TensorImpl& tensor_of(PyObject* object) { return *THPVariable_Unpack(object).unsafeGetTensorImpl(); }

class GroupCheck {
 public:
  // params: the group's; live: those with a gradient, whose rows are params_of_rows and grads; states: their states,
  // with all values in order, of which tensors are those with memory of their own.
  GroupCheck(py::list params, py::list live, py::list grads, py::list states, py::list values, py::list tensors)
      : params_(params), states_(states), values_(values), tensors_(tensors) {
    size_t next = 0;
    for (const py::handle param : params) {
      const bool has = next < live.size() && py::object(live[next]).ptr() == param.ptr();
      missing_.push_back(!has);
      if (!has) continue;
      rows_.push_back(Facts::of(tensor_of(param.ptr())));
      gradients_.push_back(Facts::of(tensor_of(py::object(grads[next]).ptr())));
      ++next;
    }
    if (next != live.size()) throw py::value_error("GroupCheck: live must be some of params, in their order");
    for (const py::handle tensor : tensors) state_facts_.push_back(Facts::of(tensor_of(tensor.ptr())));
    addresses_.resize(rows_.size());
  }

  bool holds(const py::list& params) {
    try {
      return same_params(params) && same_states() && point(params);
    } catch (const std::exception&) {  // of tensors without sizes, strides or memory
      return false;
    }
  }

  py::list addresses() const {
    py::list result(addresses_.size());
    for (size_t i = 0; i < addresses_.size(); ++i) result[i] = py::int_(addresses_[i]);
    return result;
  }

  // Into one column of a table of 64-bit words.
  void write(uintptr_t column, size_t pitch) const {
    auto* word = reinterpret_cast<int64_t*>(column);
    for (size_t i = 0; i < addresses_.size(); ++i) word[i * pitch] = static_cast<int64_t>(addresses_[i]);
  }

 private:
  bool same_params(const py::list& params) const {
    const size_t count = missing_.size();
    if (params.size() != count || params_.size() != count) return false;
    for (size_t i = 0; i < count; ++i) {
      if (PyList_GET_ITEM(params.ptr(), i) != PyList_GET_ITEM(params_.ptr(), i)) return false;
    }
    return true;
  }

  bool same_states() const {
    size_t at = 0;
    for (const py::handle state : states_) {
      if (!PyDict_Check(state.ptr())) return false;
      PyObject *key, *value;
      for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value); ++at) {
        if (at >= values_.size() || PyList_GET_ITEM(values_.ptr(), at) != value) return false;
      }
    }
    if (at != values_.size()) return false;
    for (size_t i = 0; i < state_facts_.size(); ++i) {
      if (!state_facts_[i].hold_of(tensor_of(PyList_GET_ITEM(tensors_.ptr(), i)))) return false;
    }
    return true;
  }

  bool point(const py::list& params) {
    size_t row = 0;
    for (size_t i = 0; i < missing_.size(); ++i) {
      const c10::TensorImpl& param = tensor_of(PyList_GET_ITEM(params.ptr(), i));
      const at::TensorBase& gradient = param.grad();
      if (gradient.defined() == missing_[i]) return false;
      if (missing_[i]) continue;
      const c10::TensorImpl& grad = *gradient.unsafeGetTensorImpl();
      const void* address = grad.data();
      if (!rows_[row].hold_of(param) || !gradients_[row].laid_out(grad)) return false;
      if (address == nullptr && gradients_[row].address != nullptr) return false;
      addresses_[row++] = reinterpret_cast<uintptr_t>(address);
    }
    return true;
  }

  py::list params_, states_, values_, tensors_;
  std::vector<bool> missing_;
  std::vector<Facts> rows_, gradients_, state_facts_;
  std::vector<uintptr_t> addresses_;
};

}  // namespace

PYBIND11_MODULE(host, module) {
  py::class_<GroupCheck>(module, "GroupCheck")
      .def(py::init<py::list, py::list, py::list, py::list, py::list, py::list>())
      .def("holds", &GroupCheck::holds)
      .def("addresses", &GroupCheck::addresses)
      .def("write", &GroupCheck::write);
}
