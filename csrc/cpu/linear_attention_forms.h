// The forms in which the products of linear attention read their operands. The left operand of a product is broadcast, element by
// element; the right one is loaded, a vector of columns at once. Rows come as they are made:
//   along   left, the depth is a row's channels
//   down    left or right, the depth is the rows
//   across  right, the depth is a row's channels: transposed
// Vectors read rows along and down as they lie. AVX512_BF16 reads pairs of bfloat16 (core/pair_product.h): along, two channels as
// they lie; down, two rows interleaved. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_rows.h"
#include "core/lane_product.h"
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
#include "core/pair_product.h"
#endif

namespace mmk::MMK_TIER {
namespace {

template <class A>
inline int64_t padded(int64_t count) {
  return rounded_up(count, Vec<A>::width);
}

// to[col][row] = from[row][col]; rows from `count` on to a whole vector are zero.
template <class A>
inline void transpose_rows(Staged<A> from, int64_t count, int64_t cols, A* to, int64_t to_row) {
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  for (int64_t r = 0; r < count; r += width)
    for (int64_t c = 0; c < cols; c += width) {
      typename V::Register square[width];
      for (int64_t i = 0; i < width; ++i) square[i] = r + i < count ? V::load(from.data + (r + i) * from.row + c) : V::zero();
      V::transpose(square);
      for (int64_t i = 0; i < least(width, cols - c); ++i) V::store(to + (c + i) * to_row + r, square[i]);
    }
}

// Product has a multiply_block; its b and c are those of the first column.
template <bool unit_step, class Product>
inline void multiply_columns(Product product, int64_t rows, int64_t cols, int64_t elements_of_vector) {
  constexpr int64_t width = Vec<decltype(+*product.c)>::width;
  for (int64_t col = 0; col < cols; col += 2 * width) {
    if (col + width < cols) {
      multiply_lanes<2, unit_step>(product, rows);
    } else {
      multiply_lanes<1, unit_step>(product, rows);
    }
    product.b += 2 * elements_of_vector;
    product.c += 2 * width;
  }
}

// Rows of accumulators are padded with zeros to whole vectors; `to` has room for what the form keeps of them, by `room`.
template <class A, class T>
struct Form {
  using Operand = Staged<A>;
  static constexpr bool keeps = false;  // rows along and down are not copied

  static int64_t room(int64_t, int64_t) { return 0; }
  static Operand along(Staged<A> rows, int64_t, int64_t, A*) { return rows; }
  static Operand down(Staged<A> rows, int64_t, int64_t, A*) { return rows; }

  static int64_t room_across(int64_t channels, int64_t lanes) { return channels * padded<A>(lanes); }
  // [channels][lanes] of so many rows.
  static Operand across(Operand along, int64_t count, int64_t channels, int64_t lanes, A* to) {
    transpose_rows<A>(along, count, channels, to, padded<A>(lanes));
    return {to, padded<A>(lanes)};
  }

  // The rows from an even `row` on; the columns from `col` on, of a left operand.
  static Operand from(Operand along, int64_t row) { return {along.data + row * along.row, along.row}; }
  static Operand from(Operand down, int64_t row, int64_t col) { return {down.data + row * down.row + col, down.row}; }

  // c [rows][cols] (+)= a b with a along.
  static void by_rows(Operand a, Operand b, int64_t depth, int64_t rows, int64_t cols, bool accumulate, A* c, int64_t c_row,
                      Ahead* ahead = nullptr) {
    const LaneProduct<A> product{a.data, a.row, 1, b.data, b.row, depth, 1, 0, depth, c, c_row, accumulate, ahead};
    multiply_columns<true>(product, rows, cols, Vec<A>::width);
  }
  // c [rows][cols] += a b over the `depth` rows of both.
  static void by_cols(Operand a, Operand b, int64_t depth, int64_t rows, int64_t cols, A* c, int64_t c_row,
                      Ahead* ahead = nullptr) {
    const LaneProduct<A> product{a.data, 1, a.row, b.data, b.row, depth, 1, 0, depth, c, c_row, true, ahead};
    multiply_columns<false>(product, rows, cols, Vec<A>::width);
  }
};

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
template <>
struct Form<float, bfloat16> {
  using V = Vec<float>;
  using Operand = Staged<bfloat16>;
  static constexpr bool keeps = true;

  static int64_t room(int64_t count, int64_t channels) { return (count + 1) * rounded_up(channels, 32) / 2; }
  static Operand along(Staged<float> rows, int64_t count, int64_t channels, float* to) {
    bfloat16* at = reinterpret_cast<bfloat16*>(to);
    const int64_t width = rounded_up(channels, 32), whole = padded<float>(channels);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; c += 32) {
        const float* from = rows.data + r * rows.row + c;
        const V::Register upper = c + 16 < whole ? V::load(from + 16) : V::zero();
        _mm512_storeu_si512(at + r * width + c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(upper, V::load(from))));
      }
    return {at, width};
  }
  static Operand down(Staged<float> rows, int64_t count, int64_t channels, float* to) {
    bfloat16* at = reinterpret_cast<bfloat16*>(to);
    const int64_t width = interleaved_row(channels);
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t c = 0; c < channels; c += 16) {
        const float* from = rows.data + r * rows.row + c;
        const V::Register second = r + 1 < count ? V::load(from + rows.row) : V::zero();
        _mm512_storeu_si512(at + r / 2 * width + 2 * c, rounded_pairs(V::load(from), second));
      }
    return {at, width};
  }

  // Of rows in bfloat16, which are such pairs of channels as they lie where there is no odd one.
  static Operand along(const bfloat16* rows, int64_t stride, int64_t count, int64_t channels, float* to) {
    if (channels % 2 == 0) return {rows, stride};
    bfloat16* at = reinterpret_cast<bfloat16*>(to);
    const int64_t width = rounded_up(channels, 32);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; c += 32) _mm512_storeu_si512(at + r * width + c, load_elements(rows + r * stride, c, channels));
    return {at, width};
  }
  static Operand down(const bfloat16* rows, int64_t stride, int64_t count, int64_t channels, float* to) {
    bfloat16* at = reinterpret_cast<bfloat16*>(to);
    interleave_rows(count, channels, at, [&](int64_t r) { return rows + r * stride; });
    return {at, interleaved_row(channels)};
  }

  static int64_t room_across(int64_t channels, int64_t lanes) { return rounded_up(channels, 32) / 2 * padded<float>(lanes); }
  static Operand across(Operand along, int64_t count, int64_t channels, int64_t lanes, float* to) {
    bfloat16* at = reinterpret_cast<bfloat16*>(to);
    const int64_t step = 2 * padded<float>(lanes);
    pairs_to_lanes(ceil_div(count, V::width), count, channels, at, step, [&](int64_t r) { return along.data + r * along.row; });
    return {at, step};
  }

  static Operand from(Operand along, int64_t row) { return {along.data + row * along.row, along.row}; }
  static Operand from(Operand down, int64_t row, int64_t col) { return {down.data + row / 2 * down.row + 2 * col, down.row}; }

  static void by_rows(Operand a, Operand b, int64_t depth, int64_t rows, int64_t cols, bool accumulate, float* c, int64_t c_row,
                      Ahead* ahead = nullptr) {
    PairProduct product{a.data, a.row, 2, b.data, b.row, in_pairs(depth), c, c_row, accumulate};
    product.ahead = ahead;
    multiply_columns<true>(product, rows, cols, 2 * V::width);
  }
  static void by_cols(Operand a, Operand b, int64_t depth, int64_t rows, int64_t cols, float* c, int64_t c_row,
                      Ahead* ahead = nullptr) {
    PairProduct product{a.data, 2, a.row, b.data, b.row, in_pairs(depth), c, c_row, true};
    product.ahead = ahead;
    multiply_columns<false>(product, rows, cols, 2 * V::width);
  }
};
#endif

}  // namespace
}  // namespace mmk::MMK_TIER
