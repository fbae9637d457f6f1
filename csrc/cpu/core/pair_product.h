// Products of pairs of bfloat16 by AVX512_BF16, with sums in float32: as lane_product.h has them, but the instruction adds two
// products to each sum, so both operands hold the depth in twos, side by side in 32 bits. The left one is broadcast, the right
// one loaded. Subnormal numbers count as zero.
//
// Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is, and only in files that are compiled with it.
#pragma once
#include "lane_product.h"

namespace mmk::MMK_TIER {
namespace {

// C[i, lane] (+)= factors * sum_k A[i, k] B[k, lane] over pairs, as LaneProduct has it. Strides in elements.
struct PairProduct {
  const bfloat16* a;  // pair (i, k) at i * a_row + k * a_step
  int64_t a_row, a_step;
  const bfloat16* b;  // pairs k of all lanes at k * b_step
  int64_t b_step;
  int64_t depth;  // in pairs
  float* c;
  int64_t c_row;
  bool accumulate;
  const float* lane_factors = nullptr;  // one a lane
  const float* row_factors = nullptr;   // one a row
  Ahead* ahead = nullptr;
};

inline int64_t in_pairs(int64_t count) { return (count + 1) / 2; }

template <int rows, int vectors, bool unit_step>
inline void multiply_block(const PairProduct& p, int64_t first) {
  using V = Vec<float>;
  V::Register sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[i][v] = V::zero();
  const bfloat16 *a = p.a + first * p.a_row, *b = p.b;
  const int64_t row = p.a_row, step = unit_step ? 2 : p.a_step;
  for (int64_t k = 0; k < p.depth; ++k) {
    __m512bh right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * 2 * V::width));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      memcpy(&pair, a + i * row, sizeof pair);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], right[v], left);
    }
    a += step;
    b += p.b_step;
    if (k % (ahead_steps / 2) == ahead_steps / 2 - 1 && p.ahead) p.ahead->some();
  }
  if (p.lane_factors) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const V::Register factor = V::load(p.lane_factors + v * V::width);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) sums[i][v] = sums[i][v] * factor;
    }
  }
  if (p.row_factors) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const V::Register factor = V::set(p.row_factors[first + i]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[i][v] = sums[i][v] * factor;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      float* to = p.c + (first + i) * p.c_row + v * V::width;
      V::store(to, p.accumulate ? V::load(to) + sums[i][v] : sums[i][v]);
    }
}

// --- laying out ---------------------------------------------------------------------------------------------------------
// Lane i of both, rounded, side by side.
inline __m512i rounded_pairs(Vec<float>::Register first, Vec<float>::Register second) {
  const __m512i order = _mm512_setr_epi32(0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006,
                                          0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d,
                                          0x001e000e, 0x001f000f);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

// Elements [at, end) of a row, 32 of them at most, the others zero. A null row is zero.
inline __m512i load_elements(const bfloat16* row, int64_t at, int64_t end) {
  if (row == nullptr) return _mm512_setzero_si512();
  if (end - at >= 32) return _mm512_loadu_si512(row + at);
  return _mm512_maskz_loadu_epi16((1u << (end - at)) - 1, row + at);
}

// Rows at row(lane) of `depth` elements, zero beyond `count`, become the pairs of a right operand: [depth / 2][lanes], a row of pairs
// every `step` elements.
template <class F>
inline void pairs_to_lanes(int64_t vectors, int64_t count, int64_t depth, bfloat16* to, int64_t step, const F& row) {
  using V = Vec<float>;
  for (int64_t v = 0; v < vectors; ++v) {
    const bfloat16* from[V::width];
    for (int i = 0; i < V::width; ++i) from[i] = v * V::width + i < count ? row(v * V::width + i) : nullptr;
    bool all = true;
    for (int i = 0; i < V::width; ++i) all = all && from[i];
    for (int64_t k = 0; k < depth; k += 32) {
      V::Register square[V::width];
      if (all && depth - k >= 32) {
        for (int i = 0; i < V::width; ++i) square[i] = _mm512_castsi512_ps(_mm512_loadu_si512(from[i] + k));
      } else {
        for (int i = 0; i < V::width; ++i) square[i] = _mm512_castsi512_ps(load_elements(from[i], k, depth));
      }
      V::transpose(square);
      const int64_t left = least(in_pairs(depth - k), V::width);
      bfloat16* out = to + k / 2 * step + v * 32;
      for (int64_t i = 0; i < left; ++i) _mm512_storeu_si512(out + i * step, _mm512_castps_si512(square[i]));
    }
  }
}

// Elements of a row of pairs of `channels` channels: whole vectors.
inline int64_t interleaved_row(int64_t channels) { return 2 * rounded_up(channels, 16); }

// Rows 2 r and 2 r + 1 of `count`, zero beyond, become row r of pairs of them.
template <class F>
inline void interleave_rows(int64_t count, int64_t channels, bfloat16* to, const F& row) {
  const __m512i low = _mm512_setr_epi32(0x00200000, 0x00210001, 0x00220002, 0x00230003, 0x00240004, 0x00250005, 0x00260006,
                                        0x00270007, 0x00280008, 0x00290009, 0x002a000a, 0x002b000b, 0x002c000c, 0x002d000d,
                                        0x002e000e, 0x002f000f);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t width = interleaved_row(channels);
  for (int64_t r = 0; r < count; r += 2, to += width) {
    const bfloat16 *first = row(r), *second = r + 1 < count ? row(r + 1) : nullptr;
    for (int64_t k = 0; k < channels; k += 32) {
      const __m512i a = load_elements(first, k, channels), b = load_elements(second, k, channels);
      _mm512_storeu_si512(to + 2 * k, _mm512_permutex2var_epi16(a, low, b));
      if (channels - k > 16) _mm512_storeu_si512(to + 2 * k + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

}  // namespace
}  // namespace mmk::MMK_TIER
