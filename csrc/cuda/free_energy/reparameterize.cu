// z = mean + exp(logvar / 2) eps and its gradients. A thread makes the four elements of one Philox counter at a time, and
// makes them again for the gradient: eps is never stored.
#include "cuda/float_access.h"
#include "cuda/kernels.h"
#include "core/functions.h"
#include "core/normal.h"

namespace fe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;

struct Job {
  int64_t mean, logvar, z, grad, grad_mean, grad_logvar;
  int64_t count, samples;  // elements of one sample
  uint64_t offset;         // of the first of them in the whole batch
  NoiseKey key;
  int32_t dtype, logvar_dtype;
  bool vectors;  // four elements of one counter fit one access, in every tensor
};

// The elements first .. first + 3, of which those exist that are in [0, count).
struct Quad {
  int64_t first;
  bool vector;

  FE_DEVICE Quad(const Job& job, uint64_t block)
      : first(static_cast<int64_t>(4 * block - job.offset)),
        vector(job.vectors && first + 4 <= job.count) {}
};

FE_DEVICE void load_quad(int32_t dtype, int64_t pointer, int64_t before, int64_t count, const Quad& quad,
                         float (&values)[4]) {
  if (quad.vector) {
    load_four(dtype, pointer, before + quad.first, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t at = quad.first + k;
    values[k] = at >= 0 && at < count ? load_float(dtype, pointer, before + at) : 0.0f;
  }
}

FE_DEVICE void store_quad(int32_t dtype, int64_t pointer, int64_t before, int64_t count, const Quad& quad,
                          const float (&values)[4]) {
  if (quad.vector) {
    store_four(dtype, pointer, before + quad.first, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t at = quad.first + k;
    if (at >= 0 && at < count) store_float(dtype, pointer, before + at, values[k]);
  }
}

FE_DEVICE void make_normals(uint64_t block, NoiseKey key, int64_t sample, float (&eps)[4]) {
  key.stream += static_cast<uint32_t>(sample);
  const auto n = noise_normals<float>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key);
  eps[0] = n.x;
  eps[1] = n.y;
  eps[2] = n.z;
  eps[3] = n.w;
}

// The counters that the elements of one sample touch.
FE_HD uint64_t first_counter(const Job& job) { return job.offset / 4; }
FE_HD int64_t counters(const Job& job) {
  return static_cast<int64_t>((job.offset + job.count + 3) / 4 - first_counter(job));
}

__global__ void __launch_bounds__(kThreads) reparameterize_kernel(const Job job) {
  const int64_t blocks = counters(job);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < blocks * job.samples;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t sample = index / blocks;
    const uint64_t block = first_counter(job) + static_cast<uint64_t>(index - sample * blocks);
    const Quad quad(job, block);
    float mean[4], logvar[4], eps[4], z[4];
    load_quad(job.dtype, job.mean, 0, job.count, quad, mean);
    load_quad(job.logvar_dtype, job.logvar, 0, job.count, quad, logvar);
    make_normals(block, job.key, sample, eps);
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = Lane<float>::fma(exp<float>(0.5f * logvar[k]), eps[k], mean[k]);
    store_quad(job.dtype, job.z, sample * job.count, job.count, quad, z);
  }
}

__global__ void __launch_bounds__(kThreads) reparameterize_backward_kernel(const Job job) {
  const int64_t blocks = counters(job);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < blocks;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint64_t block = first_counter(job) + static_cast<uint64_t>(index);
    const Quad quad(job, block);
    float logvar[4], eps[4], g[4], grad_mean[4] = {}, along_eps[4] = {};
    load_quad(job.logvar_dtype, job.logvar, 0, job.count, quad, logvar);
    for (int64_t sample = 0; sample < job.samples; ++sample) {
      load_quad(job.dtype, job.grad, sample * job.count, job.count, quad, g);
      make_normals(block, job.key, sample, eps);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        grad_mean[k] = sample == 0 ? g[k] : grad_mean[k] + g[k];
        along_eps[k] = Lane<float>::fma(g[k], eps[k], along_eps[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) along_eps[k] = exp<float>(0.5f * logvar[k]) * 0.5f * along_eps[k];
    store_quad(job.dtype, job.grad_mean, 0, job.count, quad, grad_mean);
    store_quad(job.logvar_dtype, job.grad_logvar, 0, job.count, quad, along_eps);
  }
}

Job job_of(const ReparameterizeCall& call) {
  Job job{reinterpret_cast<int64_t>(call.mean),
          reinterpret_cast<int64_t>(call.logvar),
          reinterpret_cast<int64_t>(call.z),
          reinterpret_cast<int64_t>(call.grad),
          reinterpret_cast<int64_t>(call.grad_mean),
          reinterpret_cast<int64_t>(call.grad_logvar),
          call.rows * call.latents,
          call.samples,
          static_cast<uint64_t>(call.offset) * static_cast<uint64_t>(call.latents),
          noise_key(call.seed, call.step, call.stream, kLatentSample),
          call.dtype,
          call.logvar_dtype,
          true};
  for (const int64_t data : {job.mean, job.z, job.grad, job.grad_mean}) {
    job.vectors = job.vectors && takes_fours(data, job.dtype);
  }
  for (const int64_t data : {job.logvar, job.grad_logvar}) {
    job.vectors = job.vectors && takes_fours(data, job.logvar_dtype);
  }
  // A later sample begins `count` elements on.
  job.vectors = job.vectors && job.offset % 4 == 0 && (job.samples <= 1 || job.count % 4 == 0);
  return job;
}

int64_t blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

}  // namespace

extern "C" int fe_cuda_reparameterize(const ReparameterizeCall* call, void* stream) {
  const Job job = job_of(*call);
  if (job.count == 0 || job.samples == 0) return 0;
  return launch(reparameterize_kernel, blocks_for(counters(job) * job.samples), kThreads, job, stream);
}

extern "C" int fe_cuda_reparameterize_backward(const ReparameterizeCall* call, void* stream) {
  const Job job = job_of(*call);
  if (job.count == 0) return 0;
  return launch(reparameterize_backward_kernel, blocks_for(counters(job)), kThreads, job, stream);
}

}  // namespace fe::cuda
