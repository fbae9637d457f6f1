// Copies of rows. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

// Large copies by the tier's own vectors: the C library's string instructions are slower on data that is in the cache.
inline void copy_bytes(char* to, const char* from, int64_t bytes, bool stream) {
  using V = Vec<float>;
  constexpr int64_t step = V::width * static_cast<int64_t>(sizeof(float));
  if (bytes >= 4 * step) {
    const int64_t head = -reinterpret_cast<intptr_t>(to) & (step - 1);
    memcpy(to, from, static_cast<size_t>(head));
    float* aligned = reinterpret_cast<float*>(to + head);
    const float* source = reinterpret_cast<const float*>(from + head);
    const int64_t vectors = (bytes - head) / step;
    const auto move = [&](auto store) {
      int64_t i = 0;
      for (; i + 4 <= vectors; i += 4) {
        const V::Register a = V::load(source + i * V::width), b = V::load(source + (i + 1) * V::width),
                          c = V::load(source + (i + 2) * V::width), d = V::load(source + (i + 3) * V::width);
        store(aligned + i * V::width, a);
        store(aligned + (i + 1) * V::width, b);
        store(aligned + (i + 2) * V::width, c);
        store(aligned + (i + 3) * V::width, d);
      }
      for (; i < vectors; ++i) store(aligned + i * V::width, V::load(source + i * V::width));
    };
    if (stream) {
      move([](float* address, V::Register value) { V::stream(address, value); });
    } else {
      move([](float* address, V::Register value) { V::store(address, value); });
    }
    const int64_t done = head + vectors * step;
    to += done;
    from += done;
    bytes -= done;
  }
  memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace
}  // namespace mmk::MMK_TIER
