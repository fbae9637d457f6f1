// Memory that kernels work in and nobody else sees. Fresh pages cost more than the work that is done in them, so a thread
// keeps what it has used: one buffer per use, which grows and stays until the thread ends.
#pragma once
#include <cstddef>
#include <cstdint>

#include "integers.h"

namespace mmk {

// Who a buffer is for. Two uses that are alive at once on one thread have slots of their own.
enum class ScratchUse : int {
  gemm_a,
  gemm_b,
  gemm_accumulators,
  gemm_block,
  gemm_scales,
  gemm_gathered,
  hidden,
  feed_forward_weights,
  experts,
  expert_gradients,
  partial_sums,
  rows,
  attention,
  silu_attention,
  hash_tables,
  hash_attention,
};
inline constexpr int scratch_uses = 16;

// At least `bytes` bytes, aligned to a cache line, with whatever was last written there. Belongs to the calling thread, and
// is valid until its next call for the same use. Throws where there is no memory.
void* scratch(ScratchUse use, std::size_t bytes);

// Gives the calling thread's buffer for `use` back where it is larger than what is worth keeping.
void scratch_done(ScratchUse use);

template <class T>
T* scratch_of(ScratchUse use, std::int64_t count) {
  return static_cast<T*>(scratch(use, static_cast<std::size_t>(count) * sizeof(T)));
}

// One such buffer, cut into parts in cache lines of their own.
class Workspace {
 public:
  explicit Workspace(ScratchUse use) : use_(use) {}

  std::int64_t add(std::int64_t bytes) {
    const std::int64_t offset = bytes_;
    bytes_ += rounded_up(bytes, 64);
    return offset;
  }
  void allocate() { base_ = scratch_of<char>(use_, bytes_); }
  char* at(std::int64_t offset) const { return base_ + offset; }

 private:
  ScratchUse use_;
  std::int64_t bytes_ = 0;
  char* base_ = nullptr;
};

}  // namespace mmk
