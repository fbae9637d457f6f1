#include "cache.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>

#include "export.h"

namespace mmk {

namespace {

// Linux first: the C library derives the size from the processor's own registers and, in virtual machines that show few
// of many cores, answered 256 MiB where a guest has 32.
std::int64_t detect() {
  for (int index = 3; index >= 2; --index) {
    char path[64], unit = 0;
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) continue;
    long long size = 0;
    const int read = std::fscanf(file, "%lld%c", &size, &unit);
    std::fclose(file);
    if (read == 2 && size > 0) return size << (unit == 'M' ? 20 : 10);
  }
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return size > 0 ? static_cast<std::int64_t>(size) : std::int64_t{32} << 20;
}

std::atomic<std::int64_t>& bytes_in_force() {
  static std::atomic<std::int64_t> bytes{detect()};
  return bytes;
}

}  // namespace

std::int64_t cache_bytes() { return bytes_in_force().load(std::memory_order_relaxed); }

}  // namespace mmk

MMK_EXPORT std::int64_t mmk_cache_bytes() { return mmk::cache_bytes(); }
MMK_EXPORT void mmk_cache_assume(std::int64_t bytes) { mmk::bytes_in_force().store(bytes); }
