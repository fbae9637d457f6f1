// Threads, by torch's own pool; and how much one thread must have to do.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace mmk {

// Below this many elements a second thread costs more than it saves (torch's own grain).
inline constexpr std::int64_t grain_elements = 32768;

// f(begin, end) over [0, items), items of `item_elements` elements each. The bits that f writes must not depend on where
// the range is cut: torch cuts it by the number of threads.
template <class F>
void parallel_for(std::int64_t items, std::int64_t item_elements, const F& f) {
  const std::int64_t grain = std::max<std::int64_t>(1, grain_elements / std::max<std::int64_t>(1, item_elements));
  if (items <= grain) {
    if (items > 0) f(std::int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

// How many threads a range may be cut for. What is computed must not depend on it.
inline std::int64_t threads() { return static_cast<std::int64_t>(torch::stable::get_num_threads()); }

}  // namespace mmk
