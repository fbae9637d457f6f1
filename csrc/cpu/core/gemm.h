// Matrix products: what every family that multiplies matrices stands on. C[m, n] = sum_k A[m, k] B[k, n].
//
// Operands are packed into panels first: A in panels of `panel_rows` rows, B in panels of `panel_cols` columns, each panel
// holding for every k its rows (or columns) side by side, so that the kernel reads both in order. A tier multiplies one
// block of panels into a block of accumulators; what becomes of the accumulators is the epilogue's business.
//
// Every element of C is summed in one order, whatever block, batch or thread it falls into: k ascending within blocks of
// `depth_block`, each block from zero, the blocks added in their order (matrix tiles go on from the block before). So the
// bits depend on the tier and on K alone.
#pragma once
#include "activation.h"
#include "integers.h"
#include "isa.h"
#include "storage.h"

#include <stdint.h>

namespace mmk {

// Types of elements in memory, in the order of every table of kernels.
enum class Number : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3, int8 = 4 };
inline constexpr int float_numbers = 4;

// One operand as it lies in memory: element (i, k) at i * stride + k * depth_stride, one of the strides 1. i counts the
// rows of A or the columns of B.
struct GemmOperand {
  const void* data;
  Number number;
  int64_t stride, depth_stride;
};

// Packs `count` rows (or columns) by `depth` of a source into panels. `scales` is for arithmetics that quantise.
struct GemmPack {
  GemmOperand source;
  int64_t count, depth;
  void* panels;
  int64_t panel_bytes;
  float* scales;
  bool exact;  // nothing is written beyond the last depth, where another block's may lie already
};

// One block of accumulators: rows x cols of C over `depth`, from the first of the panels on. `cols` is whole panels, and the
// accumulators are there for whole panels of rows too.
struct GemmBlock {
  const void* a;
  int64_t a_panel_bytes;
  int64_t a_row_bytes;  // 0: panels; else A lies as in memory, its rows so far apart and each one's depths side by side
  const void* b;
  int64_t b_panel_bytes;
  int64_t rows, cols, depth;
  int64_t used_cols;  // the others are padding, whose accumulators need not be written
  void* c;
  int64_t c_stride;
  bool accumulate;  // add to what is there
};

// How a tier multiplies operands of one kind.
struct GemmArithmetic {
  using Pack = void (*)(const GemmPack&);

  int64_t panel_rows, panel_cols;
  int64_t depth_block;    // a multiple of depth_step
  int64_t depth_step;     // panels are padded with zeros to a multiple of it
  int64_t a_bytes, b_bytes;  // an element, in the panels
  int64_t a_slack;        // bytes after a panel of A that packing writes over
  int64_t accumulator_bytes;
  bool rows_exact;        // the kernel writes no accumulators of rows beyond the block's
  bool reads_rows;        // the kernel takes rows of A as they lie in memory, of elements as in the panels and of whole steps
  Pack pack_a[float_numbers], pack_b[float_numbers];  // by the source's type; null: not this way
  void (*multiply)(const GemmBlock&);
  // Where accumulators are integers: makes floats of them, in place.
  void (*rescale)(void* c, int64_t c_stride, int64_t rows, int64_t cols, const float* row_scales, const float* col_scales);

  int64_t padded(int64_t depth) const { return rounded_up(depth, depth_step); }
  // Whole cache lines, one at least.
  int64_t a_panel_bytes(int64_t depth) const { return (padded(depth) * panel_rows * a_bytes + a_slack) / 64 * 64 + 64; }
  int64_t b_panel_bytes(int64_t depth) const { return padded(depth) * panel_cols * b_bytes / 64 * 64 + 64; }
};

// What becomes of a block of accumulators: with two products v = gate, up, else v = up:
//   pre = v + bias ;  out = activation(pre) [* (up + bias_up) where there is a gate] * row weight + residual
struct GemmEpilogue {
  void* up;        // accumulators
  void* gate;      // accumulators, or null
  int64_t stride;  // of both
  int64_t rows, cols;
  const void* bias;       // [cols] accumulators, or null
  const void* bias_gate;  // the same of the gate
  Activation activation;
  const void* row_weights;  // [rows] accumulators that the result is multiplied by before the residual, or null
  const void* residual;     // elements of the output's type, or null
  int64_t residual_stride;
  void* out;  // null: the result stays in `up`, as accumulators
  int64_t out_stride;
  const int64_t* out_rows;  // [rows]: which rows of out and residual they are; null: one after the other
  void* pre;       // elements of the output's type, or null: up + bias
  void* pre_gate;  // the same of the gate
  int64_t pre_stride;
};

// Elementwise and column work around the products, for gradients. Matrices are [rows, cols] with rows `stride` apart.
struct ActivationGradient {
  const void* grad;      // of the activated output; accumulators where `wide_grad`
  bool wide_grad;
  const void* pre;       // what the activation was applied to: up, or the gate where there is one
  const void* up;        // null where there is no gate
  void* grad_pre;        // contiguous, [rows, cols]
  void* grad_up;         // contiguous, null where there is no gate
  void* hidden;          // contiguous, the activated output again; null: not wanted
  const void* row_weights;  // accumulators, one a row, that all three results are multiplied by; null: none
  void* row_dots;           // accumulators: <grad, activated output> of each row; null: not wanted
  int64_t grad_stride, cols;
  Activation activation;
};

struct GemmKernels {
  GemmArithmetic floats;            // every type of at most 32 bits, widened when it is packed
  GemmArithmetic bfloat16_weights;  // the same with B kept in bfloat16
  GemmArithmetic float16_weights;   // or in float16
  GemmArithmetic int8_weights;      // B quantised by column, A by row when it is packed
  GemmArithmetic doubles;           // panel_rows is 0 in tiers without

  void (*epilogue[float_numbers])(const GemmEpilogue&);
  void (*activation_gradient[float_numbers])(const ActivationGradient&, int64_t begin_row, int64_t end_row);
  // sums[cols] = the sum of rows [begin, end) of a matrix, each times its weight (accumulators, or null), as accumulators, in
  // the order of the rows.
  void (*column_sums[float_numbers])(const void* from, int64_t stride, int64_t begin, int64_t end, int64_t cols,
                                     const void* row_weights, void* sums);
};

MMK_TIERS(GemmKernels, gemm_kernels)

#if MMK_X86_TIERS
// What processors beyond the AVX-512 tier do better than it; the rest of GemmKernels is that tier's own.
struct GemmTiles {
  GemmArithmetic bfloat16, int8;
};
namespace amx {
extern const GemmTiles gemm_tiles;
}
namespace avx512_bf16 {
extern const GemmArithmetic gemm_pairs;  // bfloat16
}
namespace vnni {
void multiply_int8(const GemmBlock&);
}
#endif

}  // namespace mmk
