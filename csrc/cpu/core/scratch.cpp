#include "scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmk {

namespace {

constexpr std::size_t kept_bytes = std::size_t{64} << 20;
constexpr std::size_t huge_page = std::size_t{2} << 20;

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;

  ~Buffer() { std::free(data); }

  void* grow(std::size_t needed) {
    if (needed <= bytes) return data;
    // Large buffers lie on huge pages where the system has any: panels are read by strides that small pages punish.
    const std::size_t page = needed >= huge_page ? huge_page : 4096;
    const std::size_t rounded = (needed + page - 1) / page * page;
    void* fresh = std::aligned_alloc(page, rounded);
    if (fresh == nullptr) {
      throw std::runtime_error("mmkernels out of memory: working memory of " + std::to_string(rounded) + " bytes");
    }
#ifdef MADV_HUGEPAGE
    if (page == huge_page) madvise(fresh, rounded, MADV_HUGEPAGE);
#endif
    std::free(data);
    data = fresh;
    bytes = rounded;
    return data;
  }
};

Buffer& buffer_of(ScratchUse use) {
  thread_local Buffer buffers[scratch_uses];
  return buffers[static_cast<int>(use)];
}

}  // namespace

void* scratch(ScratchUse use, std::size_t bytes) { return buffer_of(use).grow(bytes == 0 ? 1 : bytes); }

void scratch_done(ScratchUse use) {
  Buffer& buffer = buffer_of(use);
  if (buffer.bytes <= kept_bytes) return;
  std::free(buffer.data);
  buffer.data = nullptr;
  buffer.bytes = 0;
}

}  // namespace mmk
