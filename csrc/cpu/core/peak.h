// Measured ceilings of this processor, per tier (peak.tier.cpp).
#pragma once
#include "isa.h"

#include <stdint.h>

namespace mmk {

struct PeakKernels {
  double (*multiply_add)(int64_t rounds);
  double (*multiply_add_flops)(int64_t rounds);  // what multiply_add(rounds) computes
  void (*copy)(float* to, const float* from, int64_t count);  // both aligned to 64 bytes
};

MMK_TIERS(PeakKernels, peak_kernels)

}  // namespace mmk
