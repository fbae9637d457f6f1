// Matrix tiles of AMX: their layout in memory, products of them, and packing of bfloat16 into them. Included only by files that
// are compiled with AMX on; nothing here runs before amx::usable() has asked.
//
// A tile of a left operand is 16 rows of 64 bytes of depth (32 bfloat16, 64 int8); one of a right operand is 16 rows of depth,
// each 16 columns of 4 bytes that follow each other in depth (2 bfloat16, 4 int8). A panel is 32 rows (columns): for each step
// of the depth the tile of its first 16 and that of its second, each a contiguous kilobyte, since rows of a tile that lie apart
// cost 40 %.
#pragma once
#include <immintrin.h>

#include "vec.h"

namespace mmk::amx {
namespace {

constexpr int64_t panel_size = 32;  // rows of A, columns of B
constexpr int64_t tile_bytes = 1024;
constexpr int64_t step_bytes = 2 * tile_bytes;  // of a panel

// The tile configuration, in the processor's own layout: every tile 16 rows of 64 bytes. It belongs to the thread.
struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

// The intrinsics that load do not tell the compiler that they read memory: what was stored before must have been.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Products of tiles as multiply_panels has them; the intrinsics take tiles by literal numbers alone.
struct Bfloat16Product {
  static constexpr int64_t depth = 32;  // of a tile
  template <int block>
  static void multiply() {
    if constexpr (block == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (block == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (block == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (block == 3) _tile_dpbf16ps(3, 5, 7);
  }
};

// One panel of A times one of B into 32 x 32 accumulators of 4 bytes, `stride` bytes from row to row: 2 x 2 tiles, so that each
// step loads two tiles of A and two of B and multiplies every pair of them. Without `bottom` it is the first 16 rows alone,
// without `right` the first 16 columns, which spares a short panel half of the work.
//
//            B6   B7
//      A4    C0   C1
//      A5    C2   C3
template <class Product, bool bottom, bool right>
inline void multiply_panels(const char* a, const char* b, int64_t steps, char* c, int64_t stride, bool accumulate) {
  char* lower = c + 16 * stride;
  finish_stores();
  if (accumulate) {
    _tile_loadd(0, c, stride);
    if constexpr (right) _tile_loadd(1, c + 64, stride);
    if constexpr (bottom) _tile_loadd(2, lower, stride);
    if constexpr (bottom && right) _tile_loadd(3, lower + 64, stride);
  } else {
    _tile_zero(0);
    if constexpr (right) _tile_zero(1);
    if constexpr (bottom) _tile_zero(2);
    if constexpr (bottom && right) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    Product::template multiply<0>();
    if constexpr (right) {
      _tile_loadd(7, b + tile_bytes, 64);
      Product::template multiply<1>();
    }
    if constexpr (bottom) {
      _tile_loadd(5, a + tile_bytes, 64);
      Product::template multiply<2>();
      if constexpr (right) Product::template multiply<3>();
    }
    a += step_bytes;
    b += step_bytes;
  }
  _tile_stored(0, c, stride);
  if constexpr (right) _tile_stored(1, c + 64, stride);
  if constexpr (bottom) _tile_stored(2, lower, stride);
  if constexpr (bottom && right) _tile_stored(3, lower + 64, stride);
}

// --- packing of bfloat16 ------------------------------------------------------------------------------------------------
// The first `count` elements of 32, the others zero; a null row is zero.
inline __m512i load_row(const bfloat16* from, int64_t count) {
  if (from == nullptr) return _mm512_setzero_si512();
  if (count >= 32) return _mm512_loadu_si512(from);
  bfloat16 padded[32] = {};
  if (count > 0) memcpy(padded, from, static_cast<size_t>(count) * sizeof(bfloat16));
  return _mm512_loadu_si512(padded);
}

// Each pack_ function makes one tile of `count` rows of 16 or 32, row i beginning at row(i), `width` elements of it; the rest is
// zero. `rows` are those of the operand in memory, whichever side of them is the depth.

// A: rows of 32 elements of depth, as they lie.
template <class F>
inline void pack_left(int64_t count, int64_t width, bfloat16* tile, const F& row) {
  for (int64_t i = 0; i < 16; ++i)
    _mm512_storeu_si512(tile + i * 32, i < count ? load_row(row(i), width) : _mm512_setzero_si512());
}

// B: 16 pairs of depth of 16 columns, from 16 rows that are its columns. A pair is one 32-bit lane, so that contiguous depth is a
// square of lanes to be transposed.
template <class F>
inline void pack_right(int64_t count, int64_t width, bfloat16* tile, const F& row) {
  using V = Vec<float>;
  V::Register square[16];
  for (int64_t i = 0; i < 16; ++i) square[i] = i < count ? _mm512_castsi512_ps(load_row(row(i), width)) : V::zero();
  V::transpose(square);
  for (int64_t i = 0; i < 16; ++i) V::store(reinterpret_cast<float*>(tile) + i * 16, square[i]);
}

// 16 elements of rows 2 i and 2 i + 1 of 32, side by side.
template <class F>
inline __m512i load_row_pair(int64_t i, int64_t count, int64_t width, const F& row) {
  const auto half = [&](int64_t at) {
    const bfloat16* from = at < count && width > 0 ? row(at) : nullptr;
    if (from == nullptr) return _mm512_setzero_si512();
    if (width >= 16) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    bfloat16 padded[16] = {};
    memcpy(padded, from, static_cast<size_t>(width) * sizeof(bfloat16));
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
  };
  return _mm512_or_si512(half(2 * i), _mm512_slli_epi32(half(2 * i + 1), 16));
}

// A: from 32 rows that are its depth, of 16 elements each.
template <class F>
inline void pack_left_transposed(int64_t count, int64_t width, bfloat16* tile, const F& row) {
  using V = Vec<float>;
  V::Register square[16];
  for (int64_t i = 0; i < 16; ++i) square[i] = _mm512_castsi512_ps(load_row_pair(i, count, width, row));
  V::transpose(square);
  for (int64_t i = 0; i < 16; ++i) V::store(reinterpret_cast<float*>(tile) + i * 16, square[i]);
}

// B: from 32 rows that are its depth, of 16 elements each.
template <class F>
inline void pack_right_transposed(int64_t count, int64_t width, bfloat16* tile, const F& row) {
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * 32, load_row_pair(i, count, width, row));
}

// --- panels -------------------------------------------------------------------------------------------------------------
// Operands of whole panels, in a thread's memory. A panel has 32 rows (columns) and a step 32 of the depth: one count for both.
inline int64_t in_steps(int64_t count) { return (count + 31) / 32; }
constexpr int64_t step_floats = step_bytes / static_cast<int64_t>(sizeof(float));

// c [rows][cols] (+)= a panel of A times one of B over `steps` steps, at most 32 of each; c is there for whole tiles.
inline void multiply_panel(const void* a, const void* b, int64_t steps, float* c, int64_t c_row, int64_t rows, int64_t cols,
                           bool accumulate) {
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  char* to = reinterpret_cast<char*>(c);
  const int64_t stride = c_row * static_cast<int64_t>(sizeof(float));
  if (rows > 16) {
    if (cols > 16) return multiply_panels<Bfloat16Product, true, true>(left, right, steps, to, stride, accumulate);
    return multiply_panels<Bfloat16Product, true, false>(left, right, steps, to, stride, accumulate);
  }
  if (cols > 16) return multiply_panels<Bfloat16Product, false, true>(left, right, steps, to, stride, accumulate);
  multiply_panels<Bfloat16Product, false, false>(left, right, steps, to, stride, accumulate);
}

struct Panels {
  float* data = nullptr;
  int64_t steps = 0;

  float* at(int64_t panel, int64_t step) const { return data + (panel * steps + step) * step_floats; }
  bfloat16* tile(int64_t panel, int64_t step, int64_t half) const {
    return reinterpret_cast<bfloat16*>(at(panel, step)) + half * (tile_bytes / static_cast<int64_t>(sizeof(bfloat16)));
  }
};

inline int64_t panels_size(int64_t rows, int64_t depth) { return in_steps(rows) * in_steps(depth) * step_floats; }

// Rows [0, count), `depth` elements each, as panels of rows; right: of columns of a right operand.
template <bool right, class F>
inline void pack_rows(int64_t count, int64_t depth, const Panels& to, int64_t first_panel, const F& row) {
  for (int64_t first = 0; first < in_steps(count) * 32; first += 16)
    for (int64_t step = 0; step < in_steps(depth); ++step) {
      bfloat16* tile = to.tile(first_panel + first / 32, step, first % 32 / 16);
      const auto from = [&](int64_t i) {
        const bfloat16* start = row(first + i);
        return start ? start + step * 32 : nullptr;
      };
      if constexpr (right) {
        pack_right(count - first, depth - step * 32, tile, from);
      } else {
        pack_left(count - first, depth - step * 32, tile, from);
      }
    }
}

// The same rows as steps of the depth, from `first_step` on, of panels of their channels.
template <bool right, class F>
inline void pack_columns(int64_t count, int64_t channels, const Panels& to, int64_t first_step, const F& row) {
  for (int64_t first = 0; first < count; first += 32)
    for (int64_t channel = 0; channel < in_steps(channels) * 32; channel += 16) {
      bfloat16* tile = to.tile(channel / 32, first_step + first / 32, channel % 32 / 16);
      const auto from = [&](int64_t i) {
        const bfloat16* start = row(first + i);
        return start ? start + channel : nullptr;
      };
      if constexpr (right) {
        pack_right_transposed(count - first, channels - channel, tile, from);
      } else {
        pack_left_transposed(count - first, channels - channel, tile, from);
      }
    }
}

}  // namespace
}  // namespace mmk::amx
