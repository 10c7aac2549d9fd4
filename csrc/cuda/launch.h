// What a kernel file needs from its compiler: nvcc, or a host compiler with the CUDA-on-CPU shim of the tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FE_DEVICE __device__ __forceinline__

// A variable shared by the block. The shim gives each block fresh, poisoned memory instead.
#define FE_SHARED(Type, name) __shared__ Type name

namespace fe::cuda {

// Returns the launch's own error, not one left behind by earlier work on the device.
template <class Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, const Argument& argument, void* stream) {
  void* arguments[] = {const_cast<Argument*>(&argument)};
  return static_cast<int>(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                           dim3(threads), arguments, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace fe::cuda

#else

#include "cuda_on_cpu.h"  // tests/support/cuda_on_cpu

#endif
