// What this processor can do at most, for the benchmark's floors: multiply-adds in registers, and streaming copies.
#include "peak.h"

#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

// Enough independent chains to cover the latency of a multiply-add on two ports; the result is returned so that no
// compiler can leave the work out.
double multiply_add(int64_t rounds) {
  using V = Vec<float>;
  constexpr int chains = 12;
  V::Register sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = V::set(static_cast<float>(i) * 1e-3f);
  const V::Register a = V::set(0.999f), b = V::set(1e-3f);
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < chains; ++i) sums[i] = V::fma(sums[i], a, b);
  double total = 0.0;
  for (int i = 0; i < chains; ++i) total += V::sum(sums[i]);
  return total;
}

double multiply_add_flops(int64_t rounds) { return 2.0 * 12 * Vec<float>::width * static_cast<double>(rounds); }

void copy(float* to, const float* from, int64_t count) {
  using V = Vec<float>;
  for (int64_t i = 0; i + V::width <= count; i += V::width) V::stream(to + i, V::load(from + i));
  stream_fence();
}

}  // namespace

const PeakKernels peak_kernels = {multiply_add, multiply_add_flops, copy};

}  // namespace mmk::MMK_TIER
