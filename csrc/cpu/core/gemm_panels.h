// The panels of a tier's vector kernels, and the walk over them. Included by files of one tier only.
#pragma once
#include "gemm.h"
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

// The block of accumulators that the kernel keeps in registers, panel_rows x 2 vectors: as many as there are registers
// beside the two vectors of B and one broadcast element of A.
//            registers   panel_rows x panel_cols (floats)
//   generic  16 x 4      4 x 8
//   avx2     16 x 8      6 x 16
//   avx512   32 x 16     14 x 32
#if MMK_TIER_ID(MMK_TIER) >= MMK_TIER_IS_avx512
inline constexpr int panel_rows = 14;
inline constexpr int64_t depth_block = 256;  // 32 KB of B beside the panel of A in a 48 KB cache
#elif MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx2
inline constexpr int panel_rows = 6;
inline constexpr int64_t depth_block = 384;  // 24 KB of B in a 32 KB cache
#else
inline constexpr int panel_rows = 4;
inline constexpr int64_t depth_block = 256;
#endif

template <class A>
inline constexpr int panel_cols = 2 * Vec<A>::width;

// Calls f with the number of rows as a constant.
template <int rows, class F>
inline void with_rows(int64_t count, const F& f) {
  if constexpr (rows > 1) {
    if (count < rows) return with_rows<rows - 1>(count, f);
  }
  f.template operator()<rows>();
}

// The same with the number of vectors of columns, at most two.
template <class A, class F>
inline void with_tile(int64_t rows, int64_t cols, const F& f) {
  with_rows<panel_rows>(rows, [&]<int count>() {
    if (cols > Vec<A>::width) {
      f.template operator()<count, 2>();
    } else {
      f.template operator()<count, 1>();
    }
  });
}

// Where the kernel finds the elements of A: those of a depth side by side in a panel, `step` elements of every row at a time
// (pairs: 2), or in rows as they lie in memory.
template <class A, int step>
struct InPanel {
  const A* a;
  const A* at(int row) const { return a + row * step; }
  void next() { a += panel_rows * step; }
};

template <class A, int step>
struct InRows {
  const A* a;
  int64_t stride;
  const A* at(int row) const { return a + row * stride; }
  void next() { a += step; }
};

template <class A, int step, class F>
inline void with_elements_of_a(const GemmBlock& call, const char* a, const F& f) {
  if (call.a_row_bytes == 0) return f(InPanel<A, step>{reinterpret_cast<const A*>(a)});
  f(InRows<A, step>{reinterpret_cast<const A*>(a), call.a_row_bytes / static_cast<int64_t>(sizeof(A))});
}

// Panels of B outermost: one stays in the first-level cache while the panels of A pass by. `widened(panel)` makes the panel
// ready for the kernel. The next panel of B comes from the last-level cache, or from memory: a share of it is asked for with
// every panel of A, so that it lies in the second-level cache when its turn comes. `bytes` is one depth of a panel of B.
template <class F, class G>
inline void for_each_panel_pair(const GemmBlock& call, int64_t cols, int64_t bytes, const F& widened, const G& multiply) {
  constexpr int64_t line = 64;
  const int64_t share = (call.depth * bytes * panel_rows / (call.rows + panel_rows) + line) / line * line;
  for (int64_t col = 0; col < call.cols; col += cols) {
    const char* panel = static_cast<const char*>(call.b) + col / cols * call.b_panel_bytes;
    // After the last panel comes the first one's next depths.
    const char* next = col + cols < call.cols ? panel + call.b_panel_bytes : static_cast<const char*>(call.b) + call.depth * bytes;
    const auto* b = widened(panel);
    for (int64_t row = 0; row < call.rows; row += panel_rows) {
      for (const char* end = next + share; next < end; next += line) __builtin_prefetch(next, 0, 2);
      const char* a = static_cast<const char*>(call.a) + row / panel_rows * call.a_panel_bytes;
      multiply(a, b, row, col, call.rows - row < panel_rows ? call.rows - row : panel_rows);
    }
  }
}

}  // namespace
}  // namespace mmk::MMK_TIER
