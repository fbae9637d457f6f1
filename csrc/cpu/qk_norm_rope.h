// Norm and rotary embedding of queries and keys: what the entry (qk_norm_rope.cpp) hands to a tier's kernels
// (qk_norm_rope.tier.cpp).
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// As the operators number them.
enum class QkNorm : int64_t { none, rms, l2, layer };

// [B, H, L, D] with a contiguous last dimension; strides in elements.
struct HeadRows {
  const void* data;
  int64_t sample, head, token;
};

// cos or sin, [B, L, P] with a contiguous last dimension; a stride is 0 where it is broadcast.
struct RopeAngles {
  const void* data;
  int64_t sample, token;
};

// The queries or the keys.
struct QkSide {
  int64_t heads;
  HeadRows x;
  HeadRows gradient;   // backward: of what forward wrote
  const void* weight;  // [channels] accumulators, or null
  void* out;           // contiguous [B, H, L, D]: what forward writes; backward: the gradient of x
  void* sum_weight;    // backward: [pieces, channels] accumulators, null: not wanted
};

// Tokens are counted through the batch: token = sample * length + position. A token's heads of all sides are one unit of
// work, and share its angles.
struct QkNormRope {
  QkSide side[2];
  int sides;
  int64_t tokens, length, channels;
  int64_t pairs;  // rotated channels / 2
  RopeAngles cos, sin;
  bool wide_angles;  // accumulators (float; double for double x), else the type of x
  QkNorm norm;
  double eps;
  int64_t pieces;       // backward: parts of the tokens, cut by sizes alone, that each keep their own sum_weight
  int64_t block_rows;   // at most qk_max_block_rows
  int64_t scratch_row;  // channels in whole cache lines of accumulators; scratch has 2 rows for each token of a run and
                        // 2 for each row of a block
};

struct QkNormRopeKernels {
  using Forward = void (*)(const QkNormRope&, int64_t begin_token, int64_t end_token, void* scratch);
  using Backward = void (*)(const QkNormRope&, int64_t begin_piece, int64_t end_piece, void* scratch);

  // [interleaved][type]: by whether a pair's channels are neighbours, and the type of x: float, bfloat16, float16, double.
  // A tier leaves double null: only the generic tier has it.
  Forward forward[2][4];
  Backward backward[2][4];
};

// Tokens are taken in runs, whose angles lie in scratch as accumulators, and of a run the rows of each head in blocks of
// about this many channels, which stay in the first-level cache.
inline constexpr int64_t qk_run_tokens = 64;
inline constexpr int64_t qk_block_elements = 1024;
inline constexpr int64_t qk_max_block_rows = 16;

MMK_TIERS(QkNormRopeKernels, qk_norm_rope_kernels)

}  // namespace mmk
