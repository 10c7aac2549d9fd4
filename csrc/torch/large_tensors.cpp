#include "torch/large_tensors.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

using torch::stable::Tensor;

namespace fe {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr size_t kLarge = size_t{128} << 10;  // malloc gives a larger block back to the system when it is freed
constexpr size_t kKept = 32;                  // several losses, with up to five large gradients each
constexpr size_t kResident = size_t{256} << 20;  // free memory beyond this may be taken by the system (at 5% of a step)

class Buffers {
 public:
  void* take(size_t bytes) {
    const size_t page = bytes < kHugePage ? kPage : kHugePage;
    bytes = (bytes + page - 1) / page * page;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {  // the youngest first: it may still be in a cache
        if (sizes_[free_[i]] != bytes) continue;
        void* found = free_[i];
        free_.erase(free_.begin() + i);
        return found;
      }
    }
    void* made = std::aligned_alloc(page, bytes);
    if (!made) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (page == kHugePage) madvise(made, bytes, MADV_HUGEPAGE);  // refused: slower, not wrong
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[made] = bytes;
    return made;
  }

  void give(void* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(buffer);
#if defined(MADV_FREE)
    size_t held = 0;
    for (void* other : free_) held += sizes_[other];
    if (held > kResident) madvise(buffer, sizes_[buffer], MADV_FREE);
#endif
    if (free_.size() <= kKept) return;
    sizes_.erase(free_.front());
    std::free(free_.front());
    free_.erase(free_.begin());
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;
  std::vector<void*> free_;  // the oldest first
};

Buffers& buffers() {
  static Buffers* const all = new Buffers;  // never destroyed: tensors may outlive this library's statics
  return *all;
}

// Of torch 2.11 and later; this library also loads on 2.10.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

bool poisoned = false;

// Every bit set: NaN in each floating dtype, and -1.
void poison(const Tensor& made) {
  const size_t bytes = made.numel() * made.element_size();
  if (bytes) std::memset(made.data_ptr(), 0xff, bytes);
}

}  // namespace

void advise_huge_pages(Tensor fresh) {
#if defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr()), end = begin + fresh.numel() * fresh.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // refused: slower, not wrong
#endif
}

void poison_empty(bool on) { poisoned = on; }

Tensor empty_cpu(int32_t dtype, torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides) {
  std::array<int64_t, 64> contiguous;  // as many dimensions as a tensor may have elsewhere in PyTorch
  STD_TORCH_CHECK(sizes.size() <= contiguous.size(), "at most ", contiguous.size(), " dimensions; got ", sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i])) contiguous[i] = stride;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides ? strides : contiguous.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  if (poisoned) poison(made);
  return made;
}

Tensor empty_large(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides) {
  static const auto from_blob = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  int32_t dtype = 0, layout = 0;
  aoti_torch_get_dtype(like.get(), &dtype);
  if (!from_blob || bytes < kLarge) return empty_cpu(dtype, sizes, strides);
  void* data = buffers().take(bytes);
  STD_TORCH_CHECK(data, "no memory for a gradient of ", bytes, " bytes");
  std::vector<int64_t> contiguous(sizes.size(), 1);
  for (size_t i = contiguous.size(); i-- > 1;) contiguous[i - 1] = contiguous[i] * sizes[i];
  AtenTensorHandle handle = nullptr;
  aoti_torch_get_layout(like.get(), &layout);
  const auto give_back = [](void* buffer, void*) { buffers().give(buffer); };
  TORCH_ERROR_CODE_CHECK(from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(),
                                   strides ? strides : contiguous.data(), 0, dtype, aoti_torch_device_type_cpu(), -1,
                                   &handle, layout, nullptr, 0, give_back, nullptr));
  Tensor made(handle);
  if (poisoned) poison(made);
  return made;
}

}  // namespace fe
