// Rows in the order of the experts and back: what the entry (permute.cpp) hands to a tier's kernels (permute.tier.cpp).
//
// A slot is token * slots + k; `order` has the slot of each row, `positions` the row of each slot, -1 where there is none.
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// out[i] = x[order[i] / slots], times the weight of the slot where there are weights; 0 where order[i] is below 0.
struct PermuteGather {
  const void* x;
  int64_t stride, cols, slots, element_bytes;
  const int64_t* order;
  const void* weights;  // accumulators, or null
  void* out;            // contiguous
  bool stream;          // stores bypass the cache
};

// out[t] = sum_k weights[t, k] rows[positions[t, k]], summed in the order of k; positions below 0 are left out.
struct PermuteCombine {
  const void* rows;
  int64_t stride, cols, slots;
  const int64_t* positions;
  const void* weights;  // accumulators, or null
  void* out;            // contiguous
  bool stream;
};

// dots[t, k] = <grad[t], rows[positions[t, k]]>, 0 where the position is below 0.
struct PermuteDots {
  const void* grad;  // contiguous
  const void* rows;
  int64_t stride, cols, slots;
  const int64_t* positions;
  void* dots;  // accumulators
};

struct PermuteKernels {
  void (*copy)(const PermuteGather&, int64_t begin_row, int64_t end_row);
  // By type: float, bfloat16, float16, double. A tier leaves double null: only the generic tier has it.
  void (*gather[4])(const PermuteGather&, int64_t begin_row, int64_t end_row);
  void (*combine[4])(const PermuteCombine&, int64_t begin_token, int64_t end_token);
  void (*dots[4])(const PermuteDots&, int64_t begin_slot, int64_t end_slot);
};

MMK_TIERS(PermuteKernels, permute_kernels)

}  // namespace mmk
