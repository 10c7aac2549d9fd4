// Rows of a few numbers per edge or variable, brought into lanes: vector s holds number s of kLanes edges.
#pragma once

#include "cpu/simd.h"

namespace fe::inline FE_ISA {

// A row's sum in double. Left to itself gcc adds four states one by one, which takes three times as long.
template <int States>
struct RowSum {
  double sum[64];

  FE_HD void add(int n, const float* row) {
    for (int s = 0; s < n; ++s) sum[s] += row[s];
  }
  FE_HD void set(int n, const float* row) {
    for (int s = 0; s < n; ++s) sum[s] = row[s];
  }
  FE_HD void store(int n, float* out) const {
    for (int s = 0; s < n; ++s) out[s] = static_cast<float>(sum[s]);
  }
  FE_HD double total(int n) const {
    double all = 0.0;
    for (int s = 0; s < n; ++s) all += sum[s];
    return all;
  }
};

template <int States, class Floats, class Doubles>
struct VectorRowSum {
  Doubles sum;

  FE_HD void add(int, const float* row) {
    Floats v;
    __builtin_memcpy(&v, row, sizeof v);
    sum += __builtin_convertvector(v, Doubles);
  }
  FE_HD void set(int, const float* row) {
    Floats v;
    __builtin_memcpy(&v, row, sizeof v);
    sum = __builtin_convertvector(v, Doubles);
  }
  FE_HD void store(int, float* out) const {
    const Floats v = __builtin_convertvector(sum, Floats);
    __builtin_memcpy(out, &v, sizeof v);
  }
  FE_HD double total(int) const {
    double all = 0.0;
    for (int s = 0; s < States; ++s) all += sum[s];
    return all;
  }
};

typedef float Float2 __attribute__((vector_size(8)));
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

template <>
struct RowSum<2> : VectorRowSum<2, Float2, Double2> {};
template <>
struct RowSum<4> : VectorRowSum<4, Float4, Double4> {};

// States: 4 and 2 by shuffles, whose order of edges `edge_of_lane` tells; 0 stands for any number of them, one by one.
template <int States>
struct EdgeTile {
  static constexpr int kRoom = 64;

  static constexpr int edge_of_lane(int lane) { return lane; }
  static void load(int n, const float* rows, FloatV* out) {
    for (int s = 0; s < n; ++s)
      for (int lane = 0; lane < kLanes; ++lane) out[s][lane] = rows[lane * n + s];
  }
  static void store(int n, float* rows, const FloatV* values) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int s = 0; s < n; ++s) rows[lane * n + s] = values[s][lane];
  }
  // Rows at these indices, which are in the order of edges.
  static void gather(int n, const float* rows, const int32_t* index, FloatV* out) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* row = rows + int64_t{index[lane]} * n;
      for (int s = 0; s < n; ++s) out[s][lane] = row[s];
    }
  }
};

template <>
struct EdgeTile<4> {
  static constexpr int kRoom = 4;

  static constexpr int edge_of_lane(int lane) { return counter_of_lane(lane); }
  static FE_HD void load(int, const float* rows, FloatV* out) {
    in_order(fe::load(rows), fe::load(rows + kLanes), fe::load(rows + 2 * kLanes), fe::load(rows + 3 * kLanes), out);
  }
  static FE_HD void store(int, float* rows, const FloatV* values) {
    FloatV out[4];
    in_order(values[0], values[1], values[2], values[3], out);
    for (int k = 0; k < 4; ++k) fe::store(rows + k * kLanes, out[k]);
  }
  static FE_HD void gather(int, const float* rows, const int32_t* index, FloatV* out) {
    FloatV by_edge[4];
    for (int k = 0; k < 4; ++k) {
      const int32_t* at = index + k * (kLanes / 4);
#if defined(__AVX512F__)
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows + 4 * int64_t{at[0]}));
      v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + 4 * int64_t{at[1]}), 1);
      v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + 4 * int64_t{at[2]}), 2);
      by_edge[k] = (FloatV)_mm512_insertf32x4(v, _mm_loadu_ps(rows + 4 * int64_t{at[3]}), 3);
#elif defined(__AVX2__)
      const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(rows + 4 * int64_t{at[0]}));
      by_edge[k] = (FloatV)_mm256_insertf128_ps(v, _mm_loadu_ps(rows + 4 * int64_t{at[1]}), 1);
#else
      by_edge[k] = fe::load(rows + 4 * int64_t{at[0]});
#endif
    }
    in_order(by_edge[0], by_edge[1], by_edge[2], by_edge[3], out);
  }
};

template <>
struct EdgeTile<2> {
  static constexpr int kRoom = 2;

  static constexpr int edge_of_lane(int lane) { return counter_of_paired_lane(lane); }
  static FE_HD void apart(FloatV first, FloatV second, FloatV* out) {
#if defined(__AVX512F__)
    out[0] = (FloatV)_mm512_shuffle_ps((__m512)first, (__m512)second, 0x88);
    out[1] = (FloatV)_mm512_shuffle_ps((__m512)first, (__m512)second, 0xdd);
#elif defined(__AVX2__)
    out[0] = (FloatV)_mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);
    out[1] = (FloatV)_mm256_shuffle_ps((__m256)first, (__m256)second, 0xdd);
#else
    out[0] = FloatV{first[0], first[2], second[0], second[2]};
    out[1] = FloatV{first[1], first[3], second[1], second[3]};
#endif
  }
  static FE_HD void load(int, const float* rows, FloatV* out) { apart(fe::load(rows), fe::load(rows + kLanes), out); }
  static FE_HD void store(int, float* rows, const FloatV* values) {
    const FloatV even = values[0], odd = values[1];
#if defined(__AVX512F__)
    fe::store(rows, (FloatV)_mm512_unpacklo_ps((__m512)even, (__m512)odd));
    fe::store(rows + kLanes, (FloatV)_mm512_unpackhi_ps((__m512)even, (__m512)odd));
#elif defined(__AVX2__)
    fe::store(rows, (FloatV)_mm256_unpacklo_ps((__m256)even, (__m256)odd));
    fe::store(rows + kLanes, (FloatV)_mm256_unpackhi_ps((__m256)even, (__m256)odd));
#else
    fe::store(rows, FloatV{even[0], odd[0], even[1], odd[1]});
    fe::store(rows + kLanes, FloatV{even[2], odd[2], even[3], odd[3]});
#endif
  }
  static FE_HD void gather(int, const float* rows, const int32_t* index, FloatV* out) {
    FloatV by_edge[2];
    for (int k = 0; k < 2; ++k) {
      const int32_t* at = index + k * (kLanes / 2);
#if defined(__AVX512F__)
      by_edge[k] = (FloatV)_mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), rows, 8);
#elif defined(__AVX2__)
      by_edge[k] = (FloatV)_mm256_i32gather_pd(reinterpret_cast<const double*>(rows),
                                               _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), 8);
#else
      const float *a = rows + 2 * int64_t{at[0]}, *b = rows + 2 * int64_t{at[1]};
      by_edge[k] = FloatV{a[0], a[1], b[0], b[1]};
#endif
    }
    apart(by_edge[0], by_edge[1], out);
  }
};

}  // namespace fe::inline FE_ISA
