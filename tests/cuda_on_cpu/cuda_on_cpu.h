// Runs the CUDA sources on a CPU, for tests: `g++ -x c++` compiles a .cu file as it is, blocks run one after another, and
// the threads of a block are contexts that take turns at barriers. It is strict where a GPU is merely lucky: shared memory
// begins poisoned in every block, a wide access must be aligned, every thread must reach every barrier, and the order in
// which threads and blocks run can be turned round, so that a missing barrier or a race changes results.
// It knows what the kernels use and no more: no warp intrinsics, no dynamic shared memory, one-dimensional grids.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__ static
#define __launch_bounds__(...)
#define FE_DEVICE inline __attribute__((always_inline))
#define FE_SHARED(Type, name) Type& name = *static_cast<Type*>(::cuda_on_cpu::shared_memory(__COUNTER__, sizeof(Type)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};

namespace cuda_on_cpu {

inline constexpr size_t kStackBytes = 256 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool waiting, finished;
};

struct State {
  std::vector<Thread> threads;
  std::vector<std::pair<int, std::unique_ptr<char[]>>> shared;  // by place in the source
  std::function<void()> body;
  ucontext_t scheduler;
  sigjmp_buf outside;
  int current = 0;
  int error = cudaSuccess;
  bool backwards = false;
};
inline State state;

inline void* shared_memory(int place, size_t bytes) {
  for (auto& [known, memory] : state.shared) {
    if (known == place) return memory.get();
  }
  state.shared.emplace_back(place, new char[bytes]);
  std::memset(state.shared.back().second.get(), 0xff, bytes);
  return state.shared.back().second.get();
}

inline void barrier() {
  Thread& thread = state.threads[state.current];
  thread.waiting = true;
  swapcontext(&thread.context, &state.scheduler);
}

inline void thread_main() {
  state.body();
  state.threads[state.current].finished = true;
}

inline void start(Thread& thread) {
  if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
  thread.waiting = thread.finished = false;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = &state.scheduler;
  makecontext(&thread.context, thread_main, 0);
}

// Each round takes every thread from one barrier to the next, or to its end.
inline void run_block(int threads) {
  state.shared.clear();
  for (int i = 0; i < threads; ++i) start(state.threads[i]);
  for (int finished = 0; finished < threads;) {
    finished = 0;
    for (int turn = 0; turn < threads; ++turn) {
      state.current = state.backwards ? threads - 1 - turn : turn;
      Thread& thread = state.threads[state.current];
      thread.waiting = false;
      threadIdx = {static_cast<unsigned>(state.current)};
      swapcontext(&state.scheduler, &thread.context);
      finished += thread.finished;
    }
    if (finished > 0 && finished < threads) {
      state.error = cudaErrorLaunchFailure;  // on a GPU the barrier might hang
      return;
    }
  }
}

inline void leave_kernel(int) { siglongjmp(state.outside, 1); }

// A wild pointer ends the kernel, as on a GPU, and not the test run.
inline void run_blocks(int64_t blocks, int threads) {
  struct sigaction action {}, before[2];
  action.sa_handler = leave_kernel;
  sigaction(SIGSEGV, &action, &before[0]);
  sigaction(SIGBUS, &action, &before[1]);
  if (sigsetjmp(state.outside, 1) == 0) {
    for (int64_t turn = 0; turn < blocks && state.error == cudaSuccess; ++turn) {
      blockIdx = {static_cast<unsigned>(state.backwards ? blocks - 1 - turn : turn)};
      run_block(threads);
    }
  } else {
    state.error = cudaErrorIllegalAddress;
  }
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
}

inline int launch(int64_t blocks, int threads, std::function<void()> body) {
  if (static_cast<int>(state.threads.size()) < threads) state.threads.resize(threads);
  state.body = std::move(body);
  state.error = cudaSuccess;
  gridDim = {static_cast<unsigned>(blocks)};
  blockDim = {static_cast<unsigned>(threads)};
  run_blocks(blocks, threads);
  return state.error;
}

inline void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) state.error = cudaErrorMisalignedAddress;
}

}  // namespace cuda_on_cpu

#define __syncthreads() ::cuda_on_cpu::barrier()
inline void __threadfence() {}

template <class T>
T atomicAdd(T* pointer, T value) {
  const T before = *pointer;
  *pointer += value;
  return before;
}

// As memcpy, so that a misaligned access is reported and not undefined.
template <class T>
T __ldcg(const T* pointer) {
  ::cuda_on_cpu::check_alignment(pointer, sizeof(T));
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <class T>
void __stcg(T* pointer, T value) {
  ::cuda_on_cpu::check_alignment(pointer, sizeof(T));
  std::memcpy(static_cast<void*>(pointer), &value, sizeof(T));
}

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline double __hiloint2double(int high, int low) {
  const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
  return __builtin_bit_cast(double, bits);
}
inline int __double2hiint(double x) { return static_cast<int>(__builtin_bit_cast(uint64_t, x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__builtin_bit_cast(uint64_t, x)); }

namespace fe::cuda {

template <class Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, const Argument& argument, void*) {
  return ::cuda_on_cpu::launch(blocks, threads, [kernel, argument] { kernel(argument); });
}

}  // namespace fe::cuda
