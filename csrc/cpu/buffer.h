// Memory of a kernel's own, aligned to vectors. Untouched parts cost nothing.
#pragma once

#include <cstdint>
#include <new>

namespace fe::inline FE_ISA {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace fe::inline FE_ISA
