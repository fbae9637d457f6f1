// Rows of channels: sums over a row in one fixed order, its tail, and the way from one row to the next through strided
// operands. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "row_layout.h"
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

// term(sum, i, lanes) over the channels: four running sums, then the tail, in one fixed order.
template <class A, class F>
inline A sum_over(int64_t channels, const F& term) {
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  typename V::Register sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * width <= channels; i += 4 * width)
    for (int j = 0; j < 4; ++j) sums[j] = term(sums[j], i + j * width, width);
  for (; i + width <= channels; i += width) sums[0] = term(sums[0], i, width);
  if (i < channels) sums[1] = term(sums[1], i, channels - i);
  return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The same by pairs of registers: pair(first, second, i) adds the 2 * width elements from i on to two sums, and
// one(sum, i, lanes) what is left.
template <class A, class Pair, class One>
inline A sum_over_pairs(int64_t channels, const Pair& pair, const One& one) {
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  typename V::Register sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * width <= channels; i += 4 * width) {
    pair(sums[0], sums[1], i);
    pair(sums[2], sums[3], i + 2 * width);
  }
  if (i + 2 * width <= channels) {
    pair(sums[0], sums[1], i);
    i += 2 * width;
  }
  if (i + width <= channels) {
    sums[0] = one(sums[0], i, width);
    i += width;
  }
  if (i < channels) sums[1] = one(sums[1], i, channels - i);
  return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Of rows of any two types.
template <class A, class X, class Y>
inline A dot(const X* x, const Y* y, int64_t channels) {
  return sum_over<A>(channels, [&](typename Vec<A>::Register sum, int64_t i, int64_t lanes) {
    return Vec<A>::fma(load_lanes<A>(x + i, lanes), load_lanes<A>(y + i, lanes), sum);
  });
}

template <class A>
struct Sums {
  A first, second;
};

// Two sums over the same data in one pass: term(first, second, i, lanes) adds to both.
template <class A, class F>
inline Sums<A> sums_over(int64_t channels, const F& term) {
  using V = Vec<A>;
  constexpr int64_t width = V::width;
  typename V::Register first[2] = {V::zero(), V::zero()}, second[2] = {V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 2 * width <= channels; i += 2 * width)
    for (int j = 0; j < 2; ++j) term(first[j], second[j], i + j * width, width);
  for (; i + width <= channels; i += width) term(first[0], second[0], i, width);
  if (i < channels) term(first[1], second[1], i, channels - i);
  return {V::sum(first[0] + first[1]), V::sum(second[0] + second[1])};
}

// (x - mean) for the lanes that exist and 0 for those that pad the tail, so that padding adds nothing to a variance.
template <class A, class T>
inline typename Vec<A>::Register load_centred(const T* x, typename Vec<A>::Register mean, int64_t count) {
  if (count == Vec<A>::width) return Vec<A>::load(x) - mean;
  A lanes[Vec<A>::width];
  Vec<A>::store(lanes, load_part<A>(x, count) - mean);
  for (int64_t i = count; i < Vec<A>::width; ++i) lanes[i] = A(0);
  return Vec<A>::load(lanes);
}

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// Whether every row of a contiguous output begins where stores of `vectors` registers that bypass the cache may go.
template <class T, int vectors = 1>
inline bool rows_aligned(const void* base, int64_t channels) {
  constexpr int64_t alignment = vectors * Vec<accumulator_t<T>>::template stream_alignment<T>();
  if constexpr (alignment == 0) {
    return false;
  } else {
    return reinterpret_cast<uintptr_t>(base) % alignment == 0 && channels * static_cast<int64_t>(sizeof(T)) % alignment == 0;
  }
}

// Where the operands of a call have their rows, one row after the other from `row` on.
template <int operands>
struct RowWalk {
  const RowLayout<operands>& layout;
  int64_t index[max_row_dims];
  int64_t offset[operands];  // of the current row, in elements

  RowWalk(const RowLayout<operands>& rows, int64_t row) : layout(rows) {
    for (int k = 0; k < operands; ++k) offset[k] = 0;
    for (int dim = layout.dims - 1; dim >= 0; --dim) {
      index[dim] = row % layout.sizes[dim];
      row /= layout.sizes[dim];
      for (int k = 0; k < operands; ++k) offset[k] += index[dim] * layout.strides[k][dim];
    }
  }

  void next() {
    for (int dim = layout.dims - 1; dim >= 0; --dim) {
      ++index[dim];
      for (int k = 0; k < operands; ++k) offset[k] += layout.strides[k][dim];
      if (index[dim] < layout.sizes[dim]) return;
      for (int k = 0; k < operands; ++k) offset[k] -= layout.sizes[dim] * layout.strides[k][dim];
      index[dim] = 0;
    }
  }
};

}  // namespace
}  // namespace mmk::MMK_TIER
