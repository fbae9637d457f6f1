#include "trace.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

#include "export.h"

namespace mmk {

namespace {

constexpr std::int64_t capacity = 256;

struct Entry {
  const char* op;
  const char* kernel;
};

Entry ring[capacity];
std::int64_t written = 0;
std::mutex ring_mutex;

const char* kept(const char* name) {
  static std::set<std::string> names;
  return names.insert(name).first->c_str();
}

}  // namespace

void trace(const char* op, const char* kernel) {
  const std::lock_guard<std::mutex> lock(ring_mutex);
  ring[written++ % capacity] = {op, kernel};
}

}  // namespace mmk

// Kernels outside this library (Triton, the reference) report here, so that one list is in order of running.
MMK_EXPORT void mmk_trace_record(const char* op, const char* kernel) {
  const std::lock_guard<std::mutex> lock(mmk::ring_mutex);
  mmk::ring[mmk::written++ % mmk::capacity] = {mmk::kept(op), mmk::kept(kernel)};
}

MMK_EXPORT void mmk_trace_clear() {
  const std::lock_guard<std::mutex> lock(mmk::ring_mutex);
  mmk::written = 0;
}

// Writes "op kernel\n" lines, oldest first, into buffer; answers the number of bytes that a whole copy takes.
MMK_EXPORT std::int64_t mmk_trace_read(char* buffer, std::int64_t size) {
  const std::lock_guard<std::mutex> lock(mmk::ring_mutex);
  std::string text;
  for (std::int64_t i = std::max<std::int64_t>(0, mmk::written - mmk::capacity); i < mmk::written; ++i) {
    const mmk::Entry& entry = mmk::ring[i % mmk::capacity];
    text.append(entry.op).append(" ").append(entry.kernel).append("\n");
  }
  const std::int64_t bytes = static_cast<std::int64_t>(text.size());
  if (buffer != nullptr && bytes <= size) std::memcpy(buffer, text.data(), text.size());
  return bytes;
}
