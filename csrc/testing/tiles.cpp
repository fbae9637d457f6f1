// Panels of tiles (core/tiles.h), for the test extension: compiled with AMX on.
#include "core/tiles.h"

#include "blocks.h"

namespace mmk::amx {

void multiply_in_tiles(const bfloat16* a, const bfloat16* b, bool a_columns, bool b_columns, int64_t rows, int64_t cols,
                       int64_t depth, float* memory, float* c, int64_t c_row, bool accumulate) {
  const Panels left{memory, in_steps(depth)}, right{memory + panels_size(rows, depth), in_steps(depth)};
  if (a_columns) {
    pack_columns<false>(depth, rows, left, 0, [&](int64_t k) { return a + k * rows; });
  } else {
    pack_rows<false>(rows, depth, left, 0, [&](int64_t i) { return a + i * depth; });
  }
  if (b_columns) {
    pack_columns<true>(depth, cols, right, 0, [&](int64_t k) { return b + k * cols; });
  } else {
    pack_rows<true>(cols, depth, right, 0, [&](int64_t i) { return b + i * depth; });
  }
  configure_tiles();
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t col = 0; col < cols; col += 32)
      multiply_panel(left.at(row / 32, 0), right.at(col / 32, 0), left.steps, c + row * c_row + col, c_row, rows - row, cols - col,
                     accumulate);
  _tile_release();
}

int64_t floats_for_tiles(int64_t rows, int64_t cols, int64_t depth) { return panels_size(rows, depth) + panels_size(cols, depth); }

}  // namespace mmk::amx
