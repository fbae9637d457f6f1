// Matrix products by AMX tiles: bfloat16, and int8. Compiled with AMX on; nothing here runs before amx::usable() has asked.
// How operands lie in tiles and panels, and one product of panels: tiles.h.
#include "gemm.h"
#include "quantise.h"
#include "tiles.h"

namespace mmk::amx {
namespace {

struct Int8Product {
  static constexpr int64_t depth = 64;
  template <int block>
  static void multiply() {
    if constexpr (block == 0) _tile_dpbssd(0, 4, 6);
    if constexpr (block == 1) _tile_dpbssd(1, 4, 7);
    if constexpr (block == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (block == 3) _tile_dpbssd(3, 5, 7);
  }
};

template <class Product>
void multiply(const GemmBlock& call) {
  configure_tiles();
  const int64_t steps = ceil_div(call.depth, Product::depth);
  const int64_t stride = call.c_stride * 4;
  for (int64_t col = 0; col < call.cols; col += panel_size) {
    const char* b = static_cast<const char*>(call.b) + col / panel_size * call.b_panel_bytes;
    for (int64_t row = 0; row < call.rows; row += panel_size) {
      const char* a = static_cast<const char*>(call.a) + row / panel_size * call.a_panel_bytes;
      char* c = static_cast<char*>(call.c) + row * stride + col * 4;
      if (call.rows - row > 16) {
        multiply_panels<Product, true, true>(a, b, steps, c, stride, call.accumulate);
      } else {
        multiply_panels<Product, false, true>(a, b, steps, c, stride, call.accumulate);
      }
    }
  }
  _tile_release();
}

// --- packing ------------------------------------------------------------------------------------------------------------
// f(lane, count, tile of the panel's step 0) for every 16 rows or columns of a panel; `count` of them exist.
template <class F>
inline void for_each_half_panel(const GemmPack& call, const F& f) {
  for (int64_t lane = 0; lane < rounded_up(call.count, panel_size); lane += 16) {
    char* panel = static_cast<char*>(call.panels) + lane / panel_size * call.panel_bytes;
    const int64_t left = call.count - lane;
    f(lane, left < 0 ? 0 : left > 16 ? 16 : left, panel + lane % panel_size / 16 * tile_bytes);
  }
}

// Where the rows (columns) are contiguous instead of the depth, tiles are packed from rows that are their depth.
template <class Plain, class Transposed>
inline void pack_bfloat16(const GemmPack& call, const Plain& plain, const Transposed& transposed) {
  const GemmOperand& source = call.source;
  const bfloat16* from = static_cast<const bfloat16*>(source.data);
  for_each_half_panel(call, [&](int64_t lane, int64_t count, char* tile) {
    for (int64_t k = 0; k < call.depth; k += 32, tile += step_bytes) {
      bfloat16* to = reinterpret_cast<bfloat16*>(tile);
      const int64_t depth = call.depth - k;
      if (source.depth_stride == 1) {
        plain(count, depth, to, [&](int64_t i) { return from + (lane + i) * source.stride + k; });
      } else {
        transposed(depth, count, to, [&](int64_t i) { return from + (k + i) * source.depth_stride + lane; });
      }
    }
  });
}

void pack_a_bfloat16(const GemmPack& call) {
  pack_bfloat16(
      call, [](auto... arguments) { pack_left(arguments...); }, [](auto... arguments) { pack_left_transposed(arguments...); });
}

void pack_b_bfloat16(const GemmPack& call) {
  pack_bfloat16(
      call, [](auto... arguments) { pack_right(arguments...); }, [](auto... arguments) { pack_right_transposed(arguments...); });
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
      for (; end < rounded_up(call.depth, 64); ++end) put(end, 0);
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
  return {panel_size, panel_size, 1024, Product::depth, bytes, bytes, 0, 4, false, false, {}, {}, multiply<Product>, nullptr};
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
