#include "cpu/free_energy/reparameterize.h"

#include "cpu/convert.h"
#include "cpu/noise.h"
#include "core/functions.h"

namespace fe::FE_ISA {

namespace {

// Elements that lie between two multiples of kBlockElements of the global index, in buffers whose first slot has such an index.
inline constexpr int kBlockElements = 512;
static_assert(kBlockElements % kNoiseElements == 0);

struct Block {
  int64_t begin;  // first element
  int skip;       // slots before it
  int count;
  uint64_t index;  // of slot 0

  int slots() const { return skip + count; }
};

template <class Body>
void each_block(const ReparameterizeCall& call, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const uint64_t index = call.index + begin;
    const int skip = index % kBlockElements;
    const int64_t count = end - begin < kBlockElements - skip ? end - begin : kBlockElements - skip;
    body(Block{begin, skip, static_cast<int>(count), index - skip});
    begin += count;
  }
}

NoiseKey key_of_sample(const ReparameterizeCall& call, int64_t sample) {
  NoiseKey key = call.key;
  key.stream += static_cast<uint32_t>(sample);
  return key;
}

void standard_deviations(const ReparameterizeCall& call, const Block& block, float* out) {
  to_float(call.logvar, call.logvar_dtype, block.begin, block.count, out + block.skip);
  for (int i = 0; i < block.slots(); i += kLanes) store(out + i, exp<FloatV>(load(out + i) * 0.5f));
}

// Calls body(slot, normals), a vector at a time.
template <class Body>
FE_HD void each_normal(const Block& block, const NoiseKey& key, Body body) {
  for (int i = 0; i < block.slots(); i += kNoiseElements) {
    FloatV normals[kNoiseVectors];
    draw_normals((block.index + i) / 4, key, normals);
    for (int v = 0; v < kNoiseVectors; ++v) body(i + v * kLanes, normals[v]);
  }
}

}  // namespace

void reparameterize(const ReparameterizeCall& call, int64_t begin, int64_t end) {
  alignas(64) float mean[kBlockElements] = {}, deviation[kBlockElements] = {}, z[kBlockElements];
  each_block(call, begin, end, [&](const Block& block) {
    to_float(call.mean, call.dtype, block.begin, block.count, mean + block.skip);
    standard_deviations(call, block, deviation);
    for (int64_t k = 0; k < call.samples; ++k) {
      each_normal(block, key_of_sample(call, k), [&](int i, FloatV eps) {
        store(z + i, Lane<FloatV>::fma(load(deviation + i), eps, load(mean + i)));
      });
      from_float(z + block.skip, block.count, call.z, call.dtype, k * call.elements + block.begin);
    }
  });
}

void reparameterize_backward(const ReparameterizeCall& call, int64_t begin, int64_t end) {
  alignas(64) float grad[kBlockElements] = {}, deviation[kBlockElements] = {}, grad_mean[kBlockElements], along_eps[kBlockElements];
  each_block(call, begin, end, [&](const Block& block) {
    standard_deviations(call, block, deviation);
    for (int64_t k = 0; k < call.samples; ++k) {
      to_float(call.grad, call.dtype, k * call.elements + block.begin, block.count, grad + block.skip);
      each_normal(block, key_of_sample(call, k), [&](int i, FloatV eps) {
        const FloatV g = load(grad + i);
        store(grad_mean + i, k == 0 ? g : load(grad_mean + i) + g);
        store(along_eps + i, Lane<FloatV>::fma(g, eps, k == 0 ? FloatV{} : load(along_eps + i)));
      });
    }
    for (int i = 0; i < block.slots(); i += kLanes)
      store(along_eps + i, load(deviation + i) * 0.5f * load(along_eps + i));
    from_float(grad_mean + block.skip, block.count, call.grad_mean, call.dtype, block.begin);
    from_float(along_eps + block.skip, block.count, call.grad_logvar, call.logvar_dtype, block.begin);
  });
}

}  // namespace fe::FE_ISA
