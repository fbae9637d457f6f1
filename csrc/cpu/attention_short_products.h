// The products of short sequences (attention_short.h): how operands come to lie for them, and what becomes of their sums. Included
// by *.tier.cpp only, of tiers whose vectors have 16 lanes, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_vectors.h"
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
#include "attention_pairs.h"
#endif

namespace mmk::MMK_TIER {
namespace {

inline constexpr int64_t short_group = 16;  // rows
inline constexpr int64_t short_vectors = short_tokens / 16;

// Rows as the right operand of a product: those of depth k at data + k * row.
template <class T>
struct ShortRight {
  const T* data;
  int64_t row;
};

// What belongs to a type of operands: how many depths a step of a product takes, and how operands come to lie for it.
//   columns: [panel of 32 lanes][steps][32 lanes], rows that became columns
//   rights:  rows of whole vectors of channels, several of a step's depth interleaved
//   lefts:   rows as they are, in whole steps of channels
template <class T>
struct Short;

template <>
struct Short<float> {
  using V = Vec<float>;
  using Right = V::Register;
  static constexpr int64_t depth = 1;

  static int64_t steps(int64_t count) { return count; }
  static int64_t width(int64_t channels) { return rounded_up(channels, V::width); }  // of rows of lefts

  static Right load(const float* from) { return V::load(from); }
  static V::Register multiply_add(V::Register sum, const float* left, Right right) { return V::fma(V::set(*left), right, sum); }

  template <class F>
  static void make_columns(int64_t count, int64_t channels, float* to, const F& row) {
    to_lanes<float, float>(count > V::width ? 2 : 1, count, channels, nullptr, to, row);
  }
  static bool in_place(int64_t channels) { return channels % V::width == 0; }
  template <class F>
  static void make_lefts(int64_t count, int64_t channels, float* to, const F& row) {
    for (int64_t i = 0; i < count; ++i, to += width(channels)) {
      const float* from = row(i);  // null: zeros
      for_each_vector<float>(channels, [&](int64_t k, int64_t lanes) {
        V::store(to + k, from ? load_lanes<float>(from + k, lanes) : V::zero());
      });
    }
  }
  // Rows of lefts serve as rights.
  template <class F>
  static ShortRight<float> make_rights(int64_t, int64_t, float*, const Staged<float>& lefts, const F&) {
    return {lefts.data, lefts.row};
  }

  static void store(float* to, V::Register value, int64_t lanes) { store_lanes<float>(to, value, lanes); }
  static void store_two(float* to, V::Register a, V::Register b, bool stream) {
    if (stream) {
      V::stream(to, a);
      V::stream(to + V::width, b);
    } else {
      V::store(to, a);
      V::store(to + V::width, b);
    }
  }

  // A row of weights of `vectors` vectors as a left operand.
  template <int vectors>
  static void round(const V::Register (&weights)[vectors], float* to) {
    for (int v = 0; v < vectors; ++v) V::store(to + v * V::width, weights[v]);
  }
  // Rows of weights as a left operand whose depth is the rows: they lie so already.
  static void round_down(const float*, int64_t, int64_t, float*) {}
};

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
template <>
struct Short<bfloat16> {
  using V = Vec<float>;
  using Right = __m512bh;
  static constexpr int64_t depth = 2;

  static int64_t steps(int64_t count) { return in_pairs(count); }
  static int64_t width(int64_t channels) { return rounded_up(channels, 32); }

  static Right load(const bfloat16* from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }
  static V::Register multiply_add(V::Register sum, const bfloat16* left, Right right) {
    int32_t pair;
    memcpy(&pair, left, sizeof pair);
    return _mm512_dpbf16_ps(sum, right, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
  }

  template <class F>
  static void make_columns(int64_t count, int64_t channels, bfloat16* to, const F& row) {
    pairs_to_lanes(count > V::width ? 2 : 1, count, channels, to, panel_pairs, row);
  }
  static bool in_place(int64_t channels) { return channels % 2 == 0; }
  template <class F>
  static void make_lefts(int64_t count, int64_t channels, bfloat16* to, const F& row) {
    for (int64_t i = 0; i < count; ++i, to += width(channels))
      for (int64_t k = 0; k < channels; k += 32) _mm512_storeu_si512(to + k, load_elements(row(i), k, channels));
  }
  template <class F>
  static ShortRight<bfloat16> make_rights(int64_t count, int64_t channels, bfloat16* to, const Staged<bfloat16>&, const F& row) {
    interleave_rows(count, channels, to, row);
    return {to, interleaved_row(channels)};
  }

  static void store(bfloat16* to, V::Register value, int64_t lanes) {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << lanes) - 1), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  }
  static void store(float* to, V::Register value, int64_t lanes) { store_lanes<float>(to, value, lanes); }
  static void store_two(bfloat16* to, V::Register a, V::Register b, bool stream) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      _mm512_stream_ps(reinterpret_cast<float*>(to), _mm512_castsi512_ps(both));
    } else {
      _mm512_storeu_si512(to, both);
    }
  }
  static void store_two(float* to, V::Register a, V::Register b, bool) {
    V::store(to, a);
    V::store(to + V::width, b);
  }

  template <int vectors>
  static void round(const V::Register (&weights)[vectors], bfloat16* to) {
    for (int v = 0; v < vectors; v += 2) {
      const V::Register upper = v + 1 < vectors ? weights[v + 1 < vectors ? v + 1 : v] : V::zero();
      _mm512_storeu_si512(to + v * V::width, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(upper, weights[v])));
    }
  }
  // Rows two by two: [count / 2][keys][2].
  static void round_down(const bfloat16* rows, int64_t count, int64_t row, bfloat16* to) {
    interleave_rows(count, row, to, [&](int64_t i) { return rows + i * row; });
  }
};
#endif

// C[i, lane] = sum_k A[i, k] B[k, lane] of `vectors` vectors of lanes, handed to `emit` row by row.
template <class T, class Emit>
struct ShortProduct {
  const T* a;  // step k of row i at i * a_row + k * a_step
  int64_t a_row, a_step;
  const T* b[short_vectors];  // step k of vector v at b[v] + k * b_step
  int64_t b_step;
  int64_t steps;
  Emit emit;
};

template <int rows, int vectors, bool, class T, class Emit>
inline void multiply_block(const ShortProduct<T, Emit>& p, int64_t first) {
  using V = Vec<float>;
  V::Register sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[i][v] = V::zero();
  const T* a = p.a + first * p.a_row;
  const T* b = p.b[0];
  int64_t offset[vectors];
  for (int v = 0; v < vectors; ++v) offset[v] = p.b[v] - p.b[0];
  const int64_t row = p.a_row;
  for (int64_t k = 0; k < p.steps; ++k) {
    typename Short<T>::Right right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = Short<T>::load(b + offset[v]);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[i][v] = Short<T>::multiply_add(sums[i][v], a + i * row, right[v]);
    a += p.a_step;
    b += p.b_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) p.emit(first + i, sums[i]);
}

// Calls f with the number of vectors as a constant.
template <class F>
inline void with_short_vectors(int64_t vectors, const F& f) {
  if (vectors == 1) return f.template operator()<1>();
  if (vectors == 2) return f.template operator()<2>();
  if (vectors == 3) return f.template operator()<3>();
  f.template operator()<4>();
}

// --- what becomes of the products ---------------------------------------------------------------------------------------
// Always inline: called, they would take the sums from memory.

// Scores: scaled, what is added to them added, and the largest of each lane kept.
struct ToScores {
  float* to;  // [rows][vectors]
  const float* added;
  int64_t added_row;
  float scale;
  bool hides;   // a score to which -infinity is added may be NaN
  float* tops;  // [rows][16], or null

  template <int vectors>
  [[gnu::always_inline]] void operator()(int64_t row, const Vec<float>::Register (&sums)[vectors]) const {
    using V = Vec<float>;
    V::Register top;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const V::Register addend = V::load(added + row * added_row + v * V::width);
      V::Register score = V::fma(sums[v], V::set(scale), addend);
      if (hides) score = V::select(V::less_equal(V::set(lowest<float>()), addend), score, addend);
      V::store(to + (row * vectors + v) * V::width, score);
      top = v == 0 ? score : V::max(top, score);
    }
    if (tops) V::store(tops + row * V::width, top);
  }
};

struct ToBuffer {
  float* to;  // [rows][vectors]

  template <int vectors>
  [[gnu::always_inline]] void operator()(int64_t row, const Vec<float>::Register (&sums)[vectors]) const {
    using V = Vec<float>;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) V::store(to + (row * vectors + v) * V::width, sums[v]);
  }
};

// Rows of an output, times a factor each; those without a place are added to `pad`, if there is one.
template <class T, class To>
struct ToRows {
  To* const* rows;
  const float* factors;
  int64_t channel, channels;  // the first of these lanes, and all
  bool stream;
  float* pad;

  template <int vectors>
  [[gnu::always_inline]] void operator()(int64_t row, const Vec<float>::Register (&sums)[vectors]) const {
    using V = Vec<float>;
    const V::Register factor = V::set(factors[row]);
    To* to = rows[row];
    const auto lanes = [&](int v) { return least(channels - channel - v * V::width, V::width); };
    if (to == nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (pad == nullptr) break;
        float* at = pad + channel + v * V::width;
        store_lanes<float>(at, load_lanes<float>(at, lanes(v)) + sums[v] * factor, lanes(v));
      }
      return;
    }
    to += channel;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v += 2) {
      if (v + 1 < vectors && lanes(v + 1) == V::width) {
        Short<T>::store_two(to + v * V::width, sums[v] * factor, sums[v + 1 < vectors ? v + 1 : v] * factor, stream);
      } else {
        Short<T>::store(to + v * V::width, sums[v] * factor, lanes(v));
        if (v + 1 < vectors) Short<T>::store(to + (v + 1) * V::width, sums[v + 1 < vectors ? v + 1 : v] * factor, lanes(v + 1));
      }
    }
  }
};

// One number a row from a vector a row, [rows][16].
template <class F>
inline Vec<float>::Register join_lanes(const float* from, int64_t rows, const F& join) {
  using V = Vec<float>;
  V::Register square[V::width];
  for (int i = 0; i < V::width; ++i) square[i] = V::load(from + least(i, rows - 1) * V::width);
  V::transpose(square);
  for (int step = V::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) square[i] = join(square[i], square[i + step]);
  return square[0];
}

inline Vec<float>::Register plus(Vec<float>::Register a, Vec<float>::Register b) { return a + b; }

}  // namespace
}  // namespace mmk::MMK_TIER
