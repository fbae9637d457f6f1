// Compiled with AMX on; nothing here runs before amx::usable() has asked the processor and the kernel.
#include "amx.h"

#include <immintrin.h>

namespace mmk::amx {

void tile_product(const unsigned short* a, const unsigned short* b_pairs, float* c) {
  // The tile configuration's layout is the processor's: palette, start row, 14 reserved bytes, columns in bytes, rows.
  struct alignas(64) {
    unsigned char palette, start_row, reserved[14];
    unsigned short column_bytes[16];
    unsigned char rows[16];
  } config = {};
  config.palette = 1;
  for (int tile = 0; tile < 3; ++tile) {
    config.column_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // the intrinsic tells the compiler of its first bytes alone
  _tile_loadconfig(&config);
  _tile_loadd(0, c, 64);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b_pairs, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  _tile_release();
}

}  // namespace mmk::amx
