// Normalisation: what the entry (norm.cpp) hands to a tier's kernels (norm.tier.cpp).
#pragma once
#include "core/isa.h"
#include "core/row_layout.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// The strided operands, in the order of their strides in a RowLayout. Every output is contiguous.
enum NormOperand { of_x, of_residual, of_gate, of_shift, of_scale, norm_operands };
using NormRows = RowLayout<norm_operands>;

// Vectors over the channels, one a sample or one a row, as NormRows strides them.
struct NormVectors {
  const void* data;  // null: none
  bool wide;         // accumulators (float; double for double x), else the type of x
  bool by_row;       // one a row: its gradient is written row by row, instead of summed over a sample
};

// summed = residual + gate x, rounded to the type of x; normed = norm(summed) a + c, where weight and bias, scale and
// shift together make a = weight (scale_offset + scale) and c = bias (scale_offset + scale) + shift.
struct NormCall {
  NormRows rows;
  int64_t channels;
  const void* x;
  const void* residual;  // null: x itself is normalised
  NormVectors gate, shift, scale;
  const void* weight;  // [channels] accumulators, or null
  const void* bias;    // [channels] accumulators, or null
  double eps, scale_offset;
  void* normed;
  void* summed;  // null where residual is
  void* mean;    // [rows] accumulators; null for the RMS norm
  void* rstd;    // [rows] accumulators
  bool stream;   // stores bypass the cache
};

// The rows are cut into groups of `group_rows`, one for each sample where a vector is one a sample, else one for all; and
// a group into pieces, by sizes alone. Sums over the rows are kept for each piece: with h the normalised row and g the
// gradient of normed (times scale_offset + scale where that is one a row) they are sum g h and sum g, from which the
// gradients of weight, bias, scale and shift all follow.
struct NormBackward {
  NormRows rows;  // of_residual: the row that was normalised, x or summed
  int64_t channels;
  const void* grad_normed;  // contiguous, null: no gradient came
  const void* grad_summed;  // contiguous, null: no gradient came
  const void* x;            // null without a gate
  const void* normalised;   // the row that was normalised
  NormVectors gate, shift, scale;
  const void* weight;
  const void* bias;
  double scale_offset;
  const void* mean;
  const void* rstd;
  void* grad_normalised;  // contiguous; of the residual, and without a gate of x too
  void* grad_x;           // contiguous; null without a gate
  void* grad_gate;        // where it is one a row: contiguous in its type, null: not wanted
  void* grad_shift;       // as grad_gate
  void* grad_scale;       // as grad_gate
  void* sum_hat;          // [pieces, channels] accumulators, null: not wanted
  void* sum_plain;        // [pieces, channels] accumulators, null: not wanted
  void* sum_gate;         // [pieces, channels] accumulators, null: not wanted
  int64_t group_rows, group_pieces;
  bool stream;
};

// Where the sums of a NormBackward go: gradients in the type that `wide` says, null: not wanted.
struct NormSums {
  void* data;
  bool wide;
};

struct NormReduce {
  int64_t groups;
  NormSums weight, bias;        // [channels]
  NormSums shift, scale, gate;  // [groups, channels]
};

struct NormKernels {
  using Forward = void (*)(const NormCall&, int64_t begin, int64_t end, void* scratch);
  using Backward = void (*)(const NormBackward&, int64_t begin_piece, int64_t end_piece, void* scratch);
  using Reduce = void (*)(const NormBackward&, const NormReduce&, int64_t begin_tile, int64_t end_tile);

  // [rms][wide][type]: by whether it is the RMS norm, whether normed is float beside half precision, and the type of x:
  // float, bfloat16, float16, double. A tier leaves double null: only the generic tier has it.
  Forward forward[2][2][4];
  Backward backward[2][2][4];
  Reduce reduce[4];
};

// A kernel's scratch: rows of accumulators, each in cache lines of its own, for a and c behind a block of rows. A block has
// as many as make norm_block_elements channels, at least one and at most norm_max_block_rows.
inline constexpr int64_t norm_block_elements = 2048;
inline constexpr int64_t norm_max_block_rows = 16;
inline constexpr int64_t norm_reduce_tile = 64;  // channels that a Reduce takes as one tile

MMK_TIERS(NormKernels, norm_kernels)

}  // namespace mmk
