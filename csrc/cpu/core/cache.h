// The size of the processor's last-level cache, and what follows from it.
#pragma once
#include <unistd.h>

#include <cstdint>

namespace mmk {

// Stores bypass the cache where a call's traffic does not fit in the last-level cache: the lines would be evicted
// before anyone reads them, and reading them in first would cost a third of the bandwidth.
inline bool exceeds_cache(std::int64_t bytes) {
  static const std::int64_t cache = [] {
    const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return size > 0 ? static_cast<std::int64_t>(size) : std::int64_t{32} << 20;
  }();
  return bytes > cache;
}

}  // namespace mmk
