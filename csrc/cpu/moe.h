// Experts: what the entry (moe.cpp) hands to a tier's kernels (moe.tier.cpp).
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// out[t] = sum_k weights[t, k] rows[positions[t, k]] + residual[t], summed in the order of k in accumulators; positions below 0
// are left out.
struct MoeCombine {
  const void* rows;  // accumulators, `cols` of them a row
  const int64_t* positions;
  const void* weights;  // accumulators, or null
  int64_t slots, cols;  // slots of a token
  const void* residual;
  int64_t residual_stride;
  void* out;  // contiguous
};

// dots[i] += <rows[i], vector>, accumulators.
struct MoeDots {
  const void* rows;
  int64_t stride, cols;
  const void* vector;  // accumulators
  void* dots;
};

struct MoeKernels {
  // By type: float, bfloat16, float16, double. A tier leaves double null: only the generic tier has it.
  void (*combine[4])(const MoeCombine&, int64_t begin_token, int64_t end_token);
  void (*add_dots[4])(const MoeDots&, int64_t begin, int64_t end);
};

MMK_TIERS(MoeKernels, moe_kernels)

}  // namespace mmk
