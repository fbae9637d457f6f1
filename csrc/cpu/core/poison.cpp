#include "export.h"

#include <atomic>

namespace {
std::atomic<int> poisons{0};
}

// Read by every compiled library (common/tensor.h), set by tests through mmkernels.runtime.poisoned_outputs.
MMK_EXPORT int mmk_poisons_outputs() { return poisons.load(std::memory_order_relaxed); }
MMK_EXPORT void mmk_poison_outputs(int enabled) { poisons.store(enabled); }
