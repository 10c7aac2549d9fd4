// How a kernel that runs in several phases puts the tasks of each onto the caller's threads.
#pragma once

#include <cstdint>

namespace fe {

// Runs body(context, begin, end) over ranges that make up 0 .. tasks - 1, each of at least `grain` tasks, and returns
// when all are done. Null runs all in the calling thread.
using ParallelFor = void (*)(int64_t tasks, int64_t grain, void* context,
                             void (*body)(void* context, int64_t begin, int64_t end));

template <class Body>
void in_parallel(ParallelFor parallel_for, int64_t tasks, int64_t grain, Body body) {
  if (tasks <= 0) return;
  if (!parallel_for || tasks <= grain) return body(int64_t{0}, tasks);
  parallel_for(tasks, grain, &body,
               [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); });
}

}  // namespace fe
