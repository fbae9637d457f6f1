// Token rolling: what the entry (token_roll.cpp) hands to a tier's kernels (token_roll.tier.cpp).
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include "../common/token_roll_shape.h"

#include <stdint.h>

namespace mmk {

// A "position" is one token of one row, counted through the output: row * tokens + token.
struct RollCopy {
  RollShape shape;
  const void* x;
  void* out;
  int64_t element_bytes;
  bool stream;  // stores bypass the cache
};

// All pointers but x, normed, rolled: accumulators (float; double for double x).
struct RollNorm {
  RollShape shape;
  const void* x;
  const void* weight;  // [channels] or null
  const void* bias;    // [channels] or null
  double eps;
  void* normed;
  void* rolled;  // null: not wanted
  void* mean;    // [positions], null: not wanted
  void* rstd;    // [positions], null where mean is
  bool stream;
};

// Position p of the output received x[source(p)], so it sends its gradient to grad_x[source(p)]: every element of grad_x
// has exactly one writer. The weights' gradients are sums over all positions: `chunks` partial sums, cut by size alone.
struct RollNormBackward {
  RollShape shape;           // of x
  const void* grad_normed;   // contiguous [positions, channels], null: no gradient came
  const void* grad_rolled;   // contiguous [positions, channels], null: no gradient came
  const void* x;
  const void* weight;
  const void* mean;
  const void* rstd;
  void* grad_x;              // contiguous
  void* partial_weight;      // [chunks, channels], null: not wanted
  void* partial_bias;        // [chunks, channels], null: not wanted
  int64_t positions, chunks;
  bool stream;
};

struct TokenRollKernels {
  using Copy = void (*)(const RollCopy&, int64_t begin, int64_t end);
  using Norm = void (*)(const RollNorm&, int64_t begin, int64_t end);
  using Backward = void (*)(const RollNormBackward&, int64_t begin_chunk, int64_t end_chunk);

  Copy copy;
  // By the type of x: float, bfloat16, float16, double; `wide` stores (and in backward reads) normed as float.
  // A tier leaves double null: only the generic tier has it.
  Norm norm[4], norm_wide[4];
  Backward backward[4], backward_wide[4];
};

MMK_TIERS(TokenRollKernels, token_roll_kernels)

}  // namespace mmk
