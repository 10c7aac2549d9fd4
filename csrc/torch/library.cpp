// What belongs to no family: facts of the library, the memory of large results, CUDA streams. Only this folder knows torch:
// checks, threading, and registration of the kernels under torch.ops.fekernels_native through the LibTorch stable ABI, each
// family in a file of its own. The public operators of torch.ops.fekernels are defined in Python (fekernels/ops) and call
// these.
#include "torch/registration.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"
#include "torch/large_tensors.h"

#if defined(FE_HAVE_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#if defined(FE_HAVE_CUDA)
namespace fe {

// The library is linked without libtorch_cuda, so that it also loads where torch has no CUDA.
void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}

void check_cuda(int error, const char* what) { STD_TORCH_CHECK(error == 0, what, ": CUDA error ", error); }

}  // namespace fe
#endif

namespace {

std::string isa() { return fe::cpu_kernels().isa; }

std::string set_isa(std::string name) {
  fe::select_isa(name.c_str());
  return isa();
}

std::string build_info() {
  std::string info = std::string("compiler ") + __VERSION__;
#if defined(FE_HAVE_CUDA)
  info += ", cuda";
#endif
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(fekernels_native, m) {
  m.def("advise_huge_pages(Tensor(a!) fresh) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CPU, m) { m.impl("advise_huge_pages", TORCH_BOX(&fe::advise_huge_pages)); }

// No tensor argument, hence no device's key.
STABLE_TORCH_LIBRARY_IMPL(fekernels_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
}
