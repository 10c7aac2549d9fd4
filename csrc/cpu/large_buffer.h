// Memory of a kernel's own that is gone through again and again: on huge pages where it fills them. With pages of 4 KB a walk
// through it waits for the page tables, and its first writing takes five times as long.
#pragma once

#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fe::inline FE_ISA {

template <class T>
class LargeBuffer {
  static constexpr int64_t kHuge = int64_t{1} << 21;

 public:
  explicit LargeBuffer(int64_t size)
      : alignment_{static_cast<size_t>(size * static_cast<int64_t>(sizeof(T)) >= kHuge ? kHuge : 64)},
        data_(static_cast<T*>(::operator new(size * sizeof(T), alignment_))) {
#if defined(__linux__)
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    if (bytes >= kHuge) madvise(data_, bytes / kHuge * kHuge, MADV_HUGEPAGE);  // advice: nothing depends on it
#endif
  }
  ~LargeBuffer() { ::operator delete(data_, alignment_); }
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;
  operator T*() const { return data_; }

 private:
  std::align_val_t alignment_;
  T* data_;
};

}  // namespace fe::inline FE_ISA
