#include "cpu/free_energy/reparameterize.h"

#include "cpu/convert.h"
#include "cpu/noise.h"
#include "core/functions.h"

namespace fe::FE_ISA {

namespace {

// Elements that lie between two multiples of kTurn of the global index, in buffers whose first slot has such an index.
inline constexpr int kTurn = 512;
static_assert(kTurn % kNoiseElements == 0);

struct Turn {
  int64_t begin;  // first element
  int skip;       // slots before it
  int count;
  uint64_t index;  // of slot 0

  int slots() const { return skip + count; }
};

template <class Body>
void turns(const ReparameterizeCall& call, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const uint64_t index = call.index + begin;
    const int skip = index % kTurn;
    const int64_t count = end - begin < kTurn - skip ? end - begin : kTurn - skip;
    body(Turn{begin, skip, static_cast<int>(count), index - skip});
    begin += count;
  }
}

NoiseKey key_of_sample(const ReparameterizeCall& call, int64_t sample) {
  NoiseKey key = call.key;
  key.stream += static_cast<uint32_t>(sample);
  return key;
}

void standard_deviations(const ReparameterizeCall& call, const Turn& turn, float* out) {
  to_float(call.logvar, call.logvar_dtype, turn.begin, turn.count, out + turn.skip);
  for (int i = 0; i < turn.slots(); i += kLanes) store(out + i, exp<FloatV>(load(out + i) * 0.5f));
}

// Runs body(slot, normals) per vector at a time.
template <class Body>
FE_HD void each_normal(const Turn& turn, const NoiseKey& key, Body body) {
  for (int i = 0; i < turn.slots(); i += kNoiseElements) {
    FloatV normals[kNoiseVectors];
    draw_normals((turn.index + i) / 4, key, normals);
    for (int v = 0; v < kNoiseVectors; ++v) body(i + v * kLanes, normals[v]);
  }
}

}  // namespace

void reparameterize(const ReparameterizeCall& call, int64_t begin, int64_t end) {
  alignas(64) float mean[kTurn] = {}, deviation[kTurn] = {}, z[kTurn];
  turns(call, begin, end, [&](const Turn& turn) {
    to_float(call.mean, call.dtype, turn.begin, turn.count, mean + turn.skip);
    standard_deviations(call, turn, deviation);
    for (int64_t k = 0; k < call.samples; ++k) {
      each_normal(turn, key_of_sample(call, k), [&](int i, FloatV eps) {
        store(z + i, Lane<FloatV>::fma(load(deviation + i), eps, load(mean + i)));
      });
      from_float(z + turn.skip, turn.count, call.z, call.dtype, k * call.elements + turn.begin);
    }
  });
}

void reparameterize_backward(const ReparameterizeCall& call, int64_t begin, int64_t end) {
  alignas(64) float grad[kTurn] = {}, deviation[kTurn] = {}, grad_mean[kTurn], along_eps[kTurn];
  turns(call, begin, end, [&](const Turn& turn) {
    standard_deviations(call, turn, deviation);
    for (int64_t k = 0; k < call.samples; ++k) {
      to_float(call.grad, call.dtype, k * call.elements + turn.begin, turn.count, grad + turn.skip);
      each_normal(turn, key_of_sample(call, k), [&](int i, FloatV eps) {
        const FloatV g = load(grad + i);
        store(grad_mean + i, k == 0 ? g : load(grad_mean + i) + g);
        store(along_eps + i, Lane<FloatV>::fma(g, eps, k == 0 ? FloatV{} : load(along_eps + i)));
      });
    }
    for (int i = 0; i < turn.slots(); i += kLanes)
      store(along_eps + i, load(deviation + i) * 0.5f * load(along_eps + i));
    from_float(grad_mean + turn.skip, turn.count, call.grad_mean, call.dtype, turn.begin);
    from_float(along_eps + turn.skip, turn.count, call.grad_logvar, call.logvar_dtype, turn.begin);
  });
}

}  // namespace fe::FE_ISA
