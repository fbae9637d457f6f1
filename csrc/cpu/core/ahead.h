// Rows that are needed next, asked for a few at a time while something else computes. A core keeps some two dozen lines under
// way: a burst of more holds up the loads behind it, and rows whose first columns are read first are not foreseen by hardware.
// Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "integers.h"
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

struct Ahead {
  const void** rows = nullptr;
  int64_t count = 0, next = 0;
  int64_t at_once = 1;  // rows
  int64_t bytes = 0;    // of a row

  void add(const void* row) { rows[count++] = row; }
  void until(int64_t end) {
    for (; next < end; ++next) {
      const char* row = static_cast<const char*>(rows[next]);
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 3);
    }
  }
  // All of them in so many looks.
  void spread(int64_t looks) { at_once = ceil_div(count, most(looks, 1)); }
  void some() { until(least(next + at_once, count)); }
};

// The lines of rows that are needed next, row by row, as memory likes to be read: one a look.
struct LinesAhead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;  // bytes: of a row
  int64_t at = 0;

  void look() {
    if (rows <= 0) return;
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    row += stride;
    --rows;
  }
};

}  // namespace
}  // namespace mmk::MMK_TIER
