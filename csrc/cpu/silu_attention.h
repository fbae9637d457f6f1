// Parameter-free cross-attention: what the entry (silu_attention.cpp) hands to a tier's kernels (silu_attention.tier.cpp).
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// Rows of products with the keys, [rows, keys] contiguous accumulators. They are scaled, and what is below the element of rank
// `rank` in ascending order becomes zero. Each row's threshold separates what is dropped from what is kept. The result takes
// the place of the products, or goes to `weights` as contiguous elements of the call's type: A of the product with the values.
struct SiluAttentionSelect {
  void* scores;
  void* weights;  // null: in place
  int64_t keys, rank;
  double scale;
  void* thresholds;  // [rows] accumulators; 0 where rank is 0
};

// The same rows again in backward, and the gradients of what was kept: the scores are masked by the thresholds of forward,
// the gradients too, and these are scaled. Both are [rows, keys] contiguous accumulators; the results take their places, or go
// where they are elements of the call's type, as in SiluAttentionSelect.
struct SiluAttentionMask {
  void* scores;            // null: not needed, and everything is kept
  void* gradients;         // null: not needed
  void* weights;           // of the scores; null: in place
  void* slopes;            // of the gradients; null: in place
  const void* thresholds;  // [rows] accumulators, null: everything is kept
  int64_t keys;
  double scale;
};

// Rows of accumulators as gradients of an input: times silu's derivative where `pre` is what silu was applied to.
struct SiluAttentionGradient {
  const void* from;  // contiguous accumulators; `to` itself where that is their type
  const void* pre;   // of the type of `to`, or null
  int64_t pre_stride;
  void* to;  // contiguous
  int64_t cols;
};

struct SiluAttentionKernels {
  // By type: float, bfloat16, float16, double. A tier leaves double null: only the generic tier has it.
  void (*activate[4])(void* accumulators, int64_t count);  // silu in place, rounded to the type
  void (*activate_bfloat16)(void* elements, int64_t count);  // the same of elements of bfloat16
  void (*select[4])(const SiluAttentionSelect&, int64_t begin, int64_t end, void* scratch);  // scratch: a row of scores
  void (*mask[4])(const SiluAttentionMask&, int64_t begin, int64_t end);
  void (*gradient[4])(const SiluAttentionGradient&, int64_t begin, int64_t end);
};

MMK_TIERS(SiluAttentionKernels, silu_attention_kernels)

}  // namespace mmk
