// The size of the processor's last-level cache, and what follows from it.
#pragma once
#include <cstdint>

namespace mmk {

// Bytes, as Linux describes the first processor; tests assume another size (mmk_cache_assume).
std::int64_t cache_bytes();

// Stores bypass the cache where a call's traffic does not fit in it: the lines would be evicted before anyone reads them,
// and reading them in first would cost a third of the bandwidth.
inline bool exceeds_cache(std::int64_t bytes) { return bytes > cache_bytes(); }

}  // namespace mmk
