// Products of small matrices whose columns are the lanes of one vector or a few: C[i, lane] = sum_k A[i, k] B[k, lane], with A
// and B where they lie. Nothing is packed, so a product pays from the first row on: this is the core of attention, whose
// matrices are small, many and used once. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
//
// Every element of C is one sum from zero over ascending k, whatever block it falls into, then added to what was there.
#pragma once
#include "ahead.h"
#include "integers.h"
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

// The rows of A that one block of accumulators holds, beside so many vectors of B and one broadcast element of A.
#if MMK_TIER_ID(MMK_TIER) >= MMK_TIER_IS_avx512
inline constexpr int rows_of_vectors[] = {0, 16, 14, 9, 6};
#elif MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx2
inline constexpr int rows_of_vectors[] = {0, 12, 6};
#else
inline constexpr int rows_of_vectors[] = {0, 10, 6};
#endif

// Steps of k between one look ahead and the next.
inline constexpr int64_t ahead_steps = 8;

// Looks that a product takes by two vectors of lanes.
inline int64_t looks_of(int64_t rows, int64_t depth) { return ceil_div(rows, rows_of_vectors[2]) * (depth / ahead_steps); }

template <class A>
struct LaneProduct {
  const A* a;  // element (i, k) at i * a_row + k * a_step
  int64_t a_row, a_step;
  const A* b;  // row k at k * b_step
  int64_t b_step;
  int64_t depth;
  // Depth in segments: after `depth` elements A goes on at a_segment, B is read on.
  int64_t segments, a_segment, last_depth;
  A* c;
  int64_t c_row;
  bool accumulate;  // add to what is there
  Ahead* ahead = nullptr;  // asked for on the way
};

// Rows from `first` on.
template <int rows, int vectors, bool unit_step, class A>
inline void multiply_block(const LaneProduct<A>& p, int64_t first) {
  using V = Vec<A>;
  using Register = typename V::Register;
  Register sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[i][v] = V::zero();
  const A *a = p.a + first * p.a_row, *b = p.b;
  const int64_t row = p.a_row, step = unit_step ? 1 : p.a_step;
  for (int64_t segment = 0; segment < p.segments; ++segment) {
    const A* at = a + segment * p.a_segment;
    const int64_t depth = segment + 1 < p.segments ? p.depth : p.last_depth;
    for (int64_t k = 0; k < depth; ++k) {
      Register right[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) right[v] = V::load(b + v * V::width);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Register element = V::set(at[i * row]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[i][v] = V::fma(element, right[v], sums[i][v]);
      }
      at += step;
      b += p.b_step;
      if (k % ahead_steps == ahead_steps - 1 && p.ahead) p.ahead->some();
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      A* to = p.c + (first + i) * p.c_row + v * V::width;
      V::store(to, p.accumulate ? V::load(to) + sums[i][v] : sums[i][v]);
    }
}

// Rows in blocks of nearly the same size: a short last block would wait for its own sums. Product has a multiply_block.
template <int vectors, bool unit_step, int rows, class Product>
inline void multiply_rows(const Product& p, int64_t first, int64_t count) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<vectors, unit_step, rows - 1>(p, first, count);
  }
  multiply_block<rows, vectors, unit_step>(p, first);
}

template <int vectors, bool unit_step, class Product>
inline void multiply_lanes(const Product& p, int64_t rows) {
  constexpr int most = rows_of_vectors[vectors];
  const int64_t blocks = ceil_div(rows, most);
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t count = (rows - row) / (blocks - block);
    multiply_rows<vectors, unit_step, most>(p, row, count);
    row += count;
  }
}

}  // namespace
}  // namespace mmk::MMK_TIER
