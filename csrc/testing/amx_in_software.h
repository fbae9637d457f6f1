// Lets the AMX kernels run on a processor without tiles, to test their logic there: eight tiles a thread, in memory. Included
// after avx512_on_avx2.h in a build with -DMMK_EMULATE_AVX512=ON, which no wheel is.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace mmk_emulated {

struct Tile {
  unsigned char rows[16][64];
};

inline Tile& tile(int index) {
  thread_local Tile tiles[8];
  return tiles[index];
}

inline void tile_load(int index, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(tile(index).rows[i], static_cast<const char*>(from) + i * stride, 64);
}

inline void tile_store(int index, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, tile(index).rows[i], 64);
}

// Pairs of bfloat16 into fp32 sums, as the instruction rounds: denormals are flushed, products of a pair added in order.
inline void tile_dpbf16(int c, int a, int b) {
  const auto widened = [](const unsigned char* bytes) {
    uint16_t half;
    memcpy(&half, bytes, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum;
      memcpy(&sum, tile(c).rows[i] + 4 * j, 4);
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sum += widened(tile(a).rows[i] + 4 * k + 2 * half) * widened(tile(b).rows[k] + 4 * j + 2 * half);
      memcpy(tile(c).rows[i] + 4 * j, &sum, 4);
    }
}

inline void tile_dpbssd(int c, int a, int b) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      int32_t sum;
      memcpy(&sum, tile(c).rows[i] + 4 * j, 4);
      for (int k = 0; k < 16; ++k)
        for (int part = 0; part < 4; ++part)
          sum += static_cast<int8_t>(tile(a).rows[i][4 * k + part]) * static_cast<int8_t>(tile(b).rows[k][4 * j + part]);
      memcpy(tile(c).rows[i] + 4 * j, &sum, 4);
    }
}

}  // namespace mmk_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_loadd(index, from, stride) mmk_emulated::tile_load(index, from, stride)
#define _tile_stored(index, to, stride) mmk_emulated::tile_store(index, to, stride)
#define _tile_zero(index) memset(&mmk_emulated::tile(index), 0, sizeof(mmk_emulated::Tile))
#define _tile_dpbf16ps(c, a, b) mmk_emulated::tile_dpbf16(c, a, b)
#define _tile_dpbssd(c, a, b) mmk_emulated::tile_dpbssd(c, a, b)
