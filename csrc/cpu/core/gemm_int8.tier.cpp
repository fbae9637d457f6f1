// The kernel over int8 panels: A in pairs of 16 bits, B widened to the same a panel at a time. Compiled once per tier, and once
// more for processors whose multiply-adds add to their sums themselves (AVX512-VNNI).
#include "gemm_panels.h"

namespace mmk::MMK_TIER {
namespace {

// Pairs of depths, multiplied and added two by two: rows x 2 vectors of 32-bit sums.
template <int rows>
inline void multiply_pairs(const int16_t* a, const int16_t* b, int64_t pairs, int32_t* c, int64_t c_stride, bool accumulate) {
  using I = Integers;
  I::Register sums[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = I::zero();
  for (int64_t k = 0; k < pairs; ++k) {
    const I::Pairs left = I::load(b), right = I::load(b + 2 * I::width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const I::Pairs element = I::set_pair(a + 2 * i);
      sums[i][0] = I::multiply_add(sums[i][0], element, left);
      sums[i][1] = I::multiply_add(sums[i][1], element, right);
    }
    a += 2 * panel_rows;
    b += 4 * I::width;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    int32_t* to = c + i * c_stride;
    if (accumulate) {
      sums[i][0] = I::add(I::load(to), sums[i][0]);
      sums[i][1] = I::add(I::load(to + I::width), sums[i][1]);
    }
    I::store(to, sums[i][0]);
    I::store(to + I::width, sums[i][1]);
  }
}

}  // namespace

void multiply_int8(const GemmBlock& call) {
  using I = Integers;
  constexpr int cols = panel_cols<float>;
  alignas(64) int16_t panel[depth_block * cols];
  const int64_t pairs = (call.depth + 1) / 2;
  for_each_panel_pair(
      call, cols, cols * static_cast<int64_t>(sizeof(int8_t)),
      [&](const char* from) {
        const int8_t* narrow = reinterpret_cast<const int8_t*>(from);
        for (int64_t i = 0; i < pairs * 2 * cols; i += 2 * I::width) I::store(panel + i, I::load(narrow + i));
        return static_cast<const int16_t*>(panel);
      },
      [&](const char* a, const int16_t* b, int64_t row, int64_t col, int64_t count) {
        with_rows<panel_rows>(count, [&]<int rows>() {
          multiply_pairs<rows>(reinterpret_cast<const int16_t*>(a), b, pairs,
                               static_cast<int32_t*>(call.c) + row * call.c_stride + col, call.c_stride, call.accumulate);
        });
      });
}

}  // namespace mmk::MMK_TIER
