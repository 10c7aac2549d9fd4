// Philox words, uniforms and normals into a tensor: a thread makes the four elements of one counter at a time.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "core/normal.h"

namespace fe::cuda {
namespace {

constexpr int kThreads = 256;
// Enough to fill any GPU; more blocks would only add launches to threads that can as well loop.
constexpr int64_t kMaxBlocks = 2048;

enum class Draw { kBits, kUniform, kNormal };

struct Fill {
  void* out;
  int64_t count;
  uint64_t offset;  // of out[0] in the whole draw
  NoiseKey key;
};

template <Draw kDraw>
FE_DEVICE void draw(uint64_t block, const NoiseKey& key, uint32_t bits[4]) {
  const Words<uint32_t> words = noise_words(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), key);
  bits[0] = words.x;
  bits[1] = words.y;
  bits[2] = words.z;
  bits[3] = words.w;
  if constexpr (kDraw == Draw::kUniform) {
#pragma unroll
    for (int k = 0; k < 4; ++k) bits[k] = Lane<float>::bits(uniform<float>(bits[k]));
  }
  if constexpr (kDraw == Draw::kNormal) {
    const Normals<float> normals = normals_of<float>(words);
    bits[0] = Lane<float>::bits(normals.x);
    bits[1] = Lane<float>::bits(normals.y);
    bits[2] = Lane<float>::bits(normals.z);
    bits[3] = Lane<float>::bits(normals.w);
  }
}

template <Draw kDraw>
__global__ void __launch_bounds__(kThreads) fill_kernel(const Fill fill) {
  uint32_t* out = static_cast<uint32_t*>(fill.out);
  const uint64_t first = fill.offset / 4, end = (fill.offset + fill.count + 3) / 4;
  const bool aligned = fill.offset % 4 == 0 && reinterpret_cast<uint64_t>(out) % 16 == 0;
  for (uint64_t block = first + static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; block < end;
       block += static_cast<uint64_t>(gridDim.x) * kThreads) {
    uint32_t bits[4];
    draw<kDraw>(block, fill.key, bits);
    const int64_t at = static_cast<int64_t>(block * 4 - fill.offset);  // of bits[0]; below 0 in a first, cut block
    if (aligned && at + 4 <= fill.count) {
      __stcg(reinterpret_cast<uint4*>(out + at), make_uint4(bits[0], bits[1], bits[2], bits[3]));
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (at + k >= 0 && at + k < fill.count) out[at + k] = bits[k];
      }
    }
  }
}

template <Draw kDraw>
int fill_philox(void* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step, int64_t offset,
                uint32_t purpose, void* stream) {
  if (count == 0) return 0;
  const Fill fill{out, count, static_cast<uint64_t>(offset), noise_key(seed, step, draw_stream, purpose)};
  const int64_t blocks = count / (4 * kThreads) + 1;
  return launch(fill_kernel<kDraw>, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, fill, stream);
}

}  // namespace

extern "C" int fe_cuda_philox_bits(uint32_t* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                   int64_t offset, uint32_t purpose, void* stream) {
  return fill_philox<Draw::kBits>(out, count, seed, draw_stream, step, offset, purpose, stream);
}

extern "C" int fe_cuda_philox_uniform(float* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                      int64_t offset, uint32_t purpose, void* stream) {
  return fill_philox<Draw::kUniform>(out, count, seed, draw_stream, step, offset, purpose, stream);
}

extern "C" int fe_cuda_philox_normal(float* out, int64_t count, int64_t seed, uint32_t draw_stream, uint32_t step,
                                     int64_t offset, uint32_t purpose, void* stream) {
  return fill_philox<Draw::kNormal>(out, count, seed, draw_stream, step, offset, purpose, stream);
}

}  // namespace fe::cuda
