// Runs the CUDA sources on a CPU, for tests: `g++ -x c++` compiles a .cu file as it is, blocks run one after another, and
// the threads of a block are contexts that take turns at barriers. It is strict where a GPU is merely lucky: shared memory
// begins poisoned in every block, a wide access must be aligned and to global memory, every thread must reach every
// barrier (and every thread of a warp its exchanges), and the order in which threads and blocks run can be turned round,
// so that a missing barrier or a race changes results. It knows what the kernels use and no more: exchanges of whole warps
// alone, no dynamic shared memory, one-dimensional grids.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>  // which CUDA's own header has too

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
inline constexpr int kWarp = 32, kMaxThreads = 1024, kMaxShared = 16;

enum class Waits { kNot, kForWarp, kForBlock, kForever };  // forever: it has finished

struct Thread {
  ucontext_t context;
  jmp_buf place;  // where it waits
  bool begun = false;
  char* stack = nullptr;
  Waits waits = Waits::kNot;
  // What it gave to its latest two exchanges: none is written again before all threads of the warp have read it.
  uint64_t given[2];
  unsigned exchanges;
};

struct Shared {
  int place;  // in the source
  size_t bytes;
  char* memory;
};

struct State {
  Thread threads[kMaxThreads];
  Shared shared[kMaxShared];
  int n_shared = 0;
  void (*body)(const void*);
  const void* argument;
  ucontext_t scheduler_context;
  jmp_buf scheduler;
  sigjmp_buf outside;
  int current = 0;
  int error = cudaSuccess;
  bool backwards = false;
};
inline State state;

inline void* shared_memory(int place, size_t bytes) {
  for (int i = 0; i < state.n_shared; ++i) {
    if (state.shared[i].place == place) return state.shared[i].memory;
  }
  Shared& shared = state.shared[state.n_shared++];
  shared = {place, bytes, new char[bytes]};
  std::memset(shared.memory, 0xff, bytes);
  return shared.memory;
}

// Contexts change by setjmp, which leaves the signal mask as it is; swapcontext asks the system for it each time, which took
// most of a kernel's time. But the address sanitizer follows swapcontext alone.
#if !defined(__has_feature)
#define __has_feature(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
inline void enter(Thread& thread) { swapcontext(&state.scheduler_context, &thread.context); }
inline void leave(Thread& thread) { swapcontext(&thread.context, &state.scheduler_context); }
#else
inline void enter(Thread& thread) {
  if (_setjmp(state.scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.context);
}
inline void leave(Thread& thread) {
  if (_setjmp(thread.place) == 0) _longjmp(state.scheduler, 1);
}
#endif

inline void wait(Waits what) {
  Thread& thread = state.threads[state.current];
  thread.waits = what;
  leave(thread);
}

// What thread `lane ^ mask` of the warp gives.
inline uint64_t exchange(uint64_t value, int mask) {
  const int me = state.current;
  const unsigned turn = state.threads[me].exchanges++ % 2;
  state.threads[me].given[turn] = value;
  wait(Waits::kForWarp);
  return state.threads[me ^ mask].given[turn];
}

inline void thread_main() {
  for (;;) {
    state.body(state.argument);
    wait(Waits::kForever);  // until there is another block
  }
}

inline void start(Thread& thread) {
  const bool finished = thread.waits == Waits::kForever;  // and not ended by a signal, or left at a barrier
  thread.waits = Waits::kNot;
  thread.exchanges = 0;
  if (finished) return;
  if (!thread.stack) thread.stack = new char[kStackBytes];
  thread.begun = false;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
}

inline bool all_wait(int begin, int end, Waits what) {
  for (int i = begin; i < end; ++i) {
    if (state.threads[i].waits != what) return false;
  }
  return true;
}

// Lets the threads of a warp, or of the block, go on when all of them wait for each other.
inline bool release(int begin, int end, Waits what) {
  if (!all_wait(begin, end, what)) return false;
  for (int i = begin; i < end; ++i) state.threads[i].waits = Waits::kNot;
  return true;
}

// Takes the threads of a warp as far as they come without the rest of the block.
inline void run_warp(int begin, int end) {
  do {
    for (int turn = begin; turn < end; ++turn) {
      state.current = state.backwards ? begin + end - 1 - turn : turn;
      Thread& thread = state.threads[state.current];
      if (thread.waits != Waits::kNot) continue;
      threadIdx = {static_cast<unsigned>(state.current)};
      enter(thread);
    }
  } while (release(begin, end, Waits::kForWarp));
}

// Each round takes every warp from one barrier to the next, or to its end.
inline void run_block(int threads) {
  for (int i = 0; i < state.n_shared; ++i) delete[] state.shared[i].memory;
  state.n_shared = 0;
  for (int i = 0; i < threads; ++i) start(state.threads[i]);
  const int warps = (threads + kWarp - 1) / kWarp;
  do {
    for (int turn = 0; turn < warps; ++turn) {
      const int begin = kWarp * (state.backwards ? warps - 1 - turn : turn);
      run_warp(begin, begin + kWarp < threads ? begin + kWarp : threads);
    }
  } while (release(0, threads, Waits::kForBlock));
  if (!all_wait(0, threads, Waits::kForever)) state.error = cudaErrorLaunchFailure;  // on a GPU the barrier might hang
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

inline int launch(int64_t blocks, int threads, void (*body)(const void*), const void* argument) {
  if (threads > kMaxThreads) return cudaErrorInvalidValue;
  state.body = body;
  state.argument = argument;
  state.error = cudaSuccess;
  gridDim = {static_cast<unsigned>(blocks)};
  blockDim = {static_cast<unsigned>(threads)};
  run_blocks(blocks, threads);
  return state.error;
}

// Of an access that is for global memory alone.
inline void check_global(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) state.error = cudaErrorMisalignedAddress;
  for (int i = 0; i < state.n_shared; ++i) {
    const char* begin = state.shared[i].memory;
    if (pointer >= begin && pointer < begin + state.shared[i].bytes) state.error = cudaErrorIllegalAddress;
  }
}

}  // namespace cuda_on_cpu

#define __syncthreads() ::cuda_on_cpu::wait(::cuda_on_cpu::Waits::kForBlock)
#define __syncwarp() ::cuda_on_cpu::wait(::cuda_on_cpu::Waits::kForWarp)
inline void __threadfence() {}

template <class T>
T atomicAdd(T* pointer, T value) {
  const T before = *pointer;
  *pointer += value;
  return before;
}

template <class T>
T __shfl_xor_sync(unsigned threads, T value, int mask) {
  if (threads != 0xffffffffu) ::cuda_on_cpu::state.error = cudaErrorInvalidValue;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::cuda_on_cpu::exchange(bits, mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// As memcpy, so that a misaligned access is reported and not undefined.
template <class T>
T __ldcg(const T* pointer) {
  ::cuda_on_cpu::check_global(pointer, sizeof(T));
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <class T>
void __stcg(T* pointer, T value) {
  ::cuda_on_cpu::check_global(pointer, sizeof(T));
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
  struct Bound {
    void (*kernel)(Argument);
    const Argument& argument;
  };
  const Bound bound{kernel, argument};
  const auto run = [](const void* pointer) {
    const Bound& bound = *static_cast<const Bound*>(pointer);
    bound.kernel(bound.argument);
  };
  return ::cuda_on_cpu::launch(blocks, threads, run, &bound);
}

}  // namespace fe::cuda
