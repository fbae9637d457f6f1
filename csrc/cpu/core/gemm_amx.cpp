// Matrix products by AMX tiles: bfloat16, and int8. Compiled with AMX on; nothing here runs before amx::usable() has asked.
//
// A block of C is 2 x 2 tiles of 16 x 16 accumulators; each step of the depth loads two tiles of A and two of B, and
// multiplies every pair of them:
//
//            B0   B1        a tile of A: 16 rows x 64 bytes of depth (32 bfloat16, 64 int8)
//      A0    C0   C1        a tile of B: 16 rows of depth x 16 columns x 4 bytes (2 bfloat16, 4 int8 that follow in depth)
//      A1    C2   C3
//
// Panels are 32 rows (columns) of such tiles, each a contiguous kilobyte: rows of a tile that lie apart cost 40 %.
#include <immintrin.h>

#include "gemm.h"
#include "quantise.h"

namespace mmk::amx {
namespace {

constexpr int64_t panel_size = 32;  // rows of A, columns of B
constexpr int64_t tile_bytes = 1024;

// The tile configuration, in the processor's own layout: every tile 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Bfloat16Product {
  static constexpr int64_t depth = 32;  // of a tile
  static void multiply_top() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void multiply_bottom() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct Int8Product {
  static constexpr int64_t depth = 64;
  static void multiply_top() {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  }
  static void multiply_bottom() {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
};

// One panel of A times one of B into 32 x 32 accumulators of 4 bytes, `stride` bytes from row to row; 16 rows without
// `bottom`, which spares a short panel half of the work.
template <class Product, bool bottom>
inline void multiply_panels(const char* a, const char* b, int64_t steps, char* c, int64_t stride, bool accumulate) {
  if (accumulate) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 64, stride);
    if constexpr (bottom) {
      _tile_loadd(2, c + 16 * stride, stride);
      _tile_loadd(3, c + 16 * stride + 64, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (bottom) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_loadd(7, b + tile_bytes, 64);
    Product::multiply_top();
    if constexpr (bottom) {
      _tile_loadd(5, a + tile_bytes, 64);
      Product::multiply_bottom();
    }
    a += 2 * tile_bytes;
    b += 2 * tile_bytes;
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 64, stride);
  if constexpr (bottom) {
    _tile_stored(2, c + 16 * stride, stride);
    _tile_stored(3, c + 16 * stride + 64, stride);
  }
}

template <class Product>
void multiply(const GemmBlock& call) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t steps = (call.depth + Product::depth - 1) / Product::depth;
  const int64_t stride = call.c_stride * 4;
  for (int64_t col = 0; col < call.cols; col += panel_size) {
    const char* b = static_cast<const char*>(call.b) + col / panel_size * call.b_panel_bytes;
    for (int64_t row = 0; row < call.rows; row += panel_size) {
      const char* a = static_cast<const char*>(call.a) + row / panel_size * call.a_panel_bytes;
      char* c = static_cast<char*>(call.c) + row * stride + col * 4;
      if (call.rows - row > 16) {
        multiply_panels<Product, true>(a, b, steps, c, stride, call.accumulate);
      } else {
        multiply_panels<Product, false>(a, b, steps, c, stride, call.accumulate);
      }
    }
  }
  _tile_release();
}

// --- packing ------------------------------------------------------------------------------------------------------------
// f(lane, count, tile of the panel's step 0) for every 16 rows or columns of a panel; `count` of them exist.
template <class F>
inline void for_each_half_panel(const GemmPack& call, const F& f) {
  for (int64_t lane = 0; lane < (call.count + panel_size - 1) / panel_size * panel_size; lane += 16) {
    char* panel = static_cast<char*>(call.panels) + lane / panel_size * call.panel_bytes;
    const int64_t left = call.count - lane;
    f(lane, left < 0 ? 0 : left > 16 ? 16 : left, panel + lane % panel_size / 16 * tile_bytes);
  }
}

// The first `count` elements of 32, the others zero.
inline __m512i load_row(const bfloat16* from, int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(from);
  bfloat16 padded[32] = {};
  if (count > 0) memcpy(padded, from, static_cast<size_t>(count) * sizeof(bfloat16));
  return _mm512_loadu_si512(padded);
}

// A: rows of 32 elements of depth. Where the rows are contiguous instead of the depth, squares are transposed.
void pack_a_bfloat16(const GemmPack& call) {
  using V = Vec<float>;
  const GemmOperand& source = call.source;
  const bfloat16* from = static_cast<const bfloat16*>(source.data);
  for_each_half_panel(call, [&](int64_t lane, int64_t count, char* tile) {
    for (int64_t k = 0; k < call.depth; k += 32, tile += 2 * tile_bytes) {
      bfloat16* to = reinterpret_cast<bfloat16*>(tile);
      if (source.depth_stride == 1) {
        for (int64_t i = 0; i < 16; ++i) {
          _mm512_storeu_si512(to + i * 32, i < count ? load_row(from + (lane + i) * source.stride + k, call.depth - k)
                                                     : _mm512_setzero_si512());
        }
        continue;
      }
      for (int64_t half = 0; half < 32; half += 16) {
        V::Register square[16];
        for (int64_t i = 0; i < 16; ++i) {
          square[i] = V::zero();
          if (k + half + i < call.depth && count > 0) {
            square[i] = load_lanes<float>(from + (k + half + i) * source.depth_stride + lane, count);
          }
        }
        V::transpose(square);
        for (int64_t i = 0; i < 16; ++i) V::store(to + i * 32 + half, square[i]);
      }
    }
  });
}

// B: 16 pairs of depth of 16 columns. A pair is one 32-bit lane, so contiguous depth is a square of lanes to be transposed.
void pack_b_bfloat16(const GemmPack& call) {
  using V = Vec<float>;
  const GemmOperand& source = call.source;
  const bfloat16* from = static_cast<const bfloat16*>(source.data);
  for_each_half_panel(call, [&](int64_t lane, int64_t count, char* tile) {
    for (int64_t k = 0; k < call.depth; k += 32, tile += 2 * tile_bytes) {
      V::Register square[16];
      if (source.depth_stride == 1) {
        for (int64_t i = 0; i < 16; ++i) {
          square[i] = i < count ? _mm512_castsi512_ps(load_row(from + (lane + i) * source.stride + k, call.depth - k)) : V::zero();
        }
        V::transpose(square);
      } else {
        const auto depth_row = [&](int64_t at) {
          bfloat16 padded[16] = {};
          if (at < call.depth && count > 0) {
            memcpy(padded, from + at * source.depth_stride + lane, static_cast<size_t>(count) * sizeof(bfloat16));
          }
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
        };
        for (int64_t i = 0; i < 16; ++i) {
          square[i] = _mm512_castsi512_ps(
              _mm512_or_si512(depth_row(k + 2 * i), _mm512_slli_epi32(depth_row(k + 2 * i + 1), 16)));
        }
      }
      for (int64_t i = 0; i < 16; ++i) V::store(reinterpret_cast<float*>(tile) + i * 16, square[i]);
    }
  });
}

// One row of a panel of A, or column of one of B, quantised; zero beyond `count` and beyond the depth. at(k) is an element's
// place in the panel.
template <class T, class F>
inline void pack_int8(const GemmPack& call, const F& at) {
  const GemmOperand& source = call.source;
  for_each_half_panel(call, [&](int64_t lane, int64_t count, char* tile) {
    for (int64_t i = 0; i < 16; ++i) {
      int64_t end = 0;
      const auto put = [&](int64_t k, int32_t value) { tile[at(i, k)] = static_cast<char>(value); };
      if (i < count) {
        const T* from = static_cast<const T*>(source.data) + (lane + i) * source.stride;
        call.scales[lane + i] = scale_of(from, source.depth_stride, call.depth);
        quantise(from, source.depth_stride, call.depth, call.scales[lane + i], put);
        end = call.depth;
      }
      for (; end < (call.depth + 63) / 64 * 64; ++end) put(end, 0);
    }
  });
}

template <class T>
void pack_a_int8(const GemmPack& call) {
  pack_int8<T>(call, [](int64_t i, int64_t k) { return k / 64 * 2 * tile_bytes + i * 64 + k % 64; });
}

template <class T>
void pack_b_int8(const GemmPack& call) {
  pack_int8<T>(call, [](int64_t i, int64_t k) { return k / 64 * 2 * tile_bytes + k % 64 / 4 * 64 + i * 4 + k % 4; });
}

template <class Product>
constexpr GemmArithmetic arithmetic_of(int64_t bytes) {
  // Deep blocks: accumulators leave their tiles once a block, which takes as long as two steps of the depth.
  return {panel_size, panel_size, 1024, Product::depth, bytes, bytes, 0, 4, false, {}, {}, multiply<Product>, nullptr};
}

constexpr GemmArithmetic bfloat16_tiles() {
  GemmArithmetic result = arithmetic_of<Bfloat16Product>(2);
  result.pack_a[1] = pack_a_bfloat16;
  result.pack_b[1] = pack_b_bfloat16;
  return result;
}

constexpr GemmArithmetic int8_tiles() {
  GemmArithmetic result = arithmetic_of<Int8Product>(1);
  result.pack_a[0] = pack_a_int8<float>;
  result.pack_a[1] = pack_a_int8<bfloat16>;
  result.pack_a[2] = pack_a_int8<float16>;
  result.pack_b[0] = pack_b_int8<float>;
  result.pack_b[1] = pack_b_int8<bfloat16>;
  result.pack_b[2] = pack_b_int8<float16>;
  result.rescale = rescale_int8;
  return result;
}

}  // namespace

const GemmTiles gemm_tiles = {bfloat16_tiles(), int8_tiles()};

}  // namespace mmk::amx
