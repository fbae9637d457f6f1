#include "peak.h"

#include "export.h"

// Python calls these from as many threads as it wants to load (ctypes releases the GIL) and times them.
MMK_EXPORT double mmk_peak_multiply_add(std::int64_t rounds) {
  return mmk::peak_kernels_tiers.choose().kernels->multiply_add(rounds);
}
MMK_EXPORT double mmk_peak_multiply_add_flops(std::int64_t rounds) {
  return mmk::peak_kernels_tiers.choose().kernels->multiply_add_flops(rounds);
}
MMK_EXPORT void mmk_peak_copy(float* to, const float* from, std::int64_t count) {
  mmk::peak_kernels_tiers.choose().kernels->copy(to, from, count);
}
