// The products that linear layers, feed-forward layers and experts are made of, forward and backward.
#pragma once
#include "core/gemm_call.h"

namespace mmk {

// rows x cols of one product by `how`, its output contiguous.
GemmCall call_of(const GemmChoice& how, Number number, std::int64_t rows, std::int64_t cols, std::int64_t depth);

// A matrix that a gradient is made of: elements of one type, rows `stride` apart.
struct Matrix {
  const void* data;
  std::int64_t rows, cols, stride;
};

// grad_weight [N, K] = grad^T [N, rows] x [rows, K].
void grad_of_weight(const GemmChoice& how, Number number, const Matrix& grad, const Matrix& x, void* grad_weight);

// The product of which the gradient of an input is made: grad [rows, N] W [N, K].
GemmCall grad_of_input(const GemmChoice& how, Number number, const Matrix& grad, const GemmOperand& weight, std::int64_t k,
                       void* grad_x);

// A feed-forward layer: hidden = activation(x W_gate^T + b_gate) (x W_in^T + b_in), or without a gate
// activation(x W_in^T + b_in); out = hidden W_out^T + b_out.
struct FeedForward {
  const GemmChoice* how_in;
  const GemmChoice* how_out;
  GemmWeights in, gate, out;
  bool gated;
  const void* bias_in;  // accumulators, or null, as the others
  const void* bias_gate;
  const void* bias_out;
  Activation activation;
  std::int64_t channels, hidden, cols;
  Number number;  // of x, and of what is kept
};

// The rows that pass it.
struct FeedForwardRows {
  std::int64_t count;
  const void* x;
  std::int64_t x_stride;
  const std::int64_t* x_rows;  // which rows of x; null: one after the other
  void* pre;                   // contiguous, null: not kept
  void* pre_gate;
  Number out_number;  // of out and residual
  void* out;
  std::int64_t out_stride;
  const std::int64_t* out_rows;  // which rows of out and residual; null: one after the other
  const void* row_weights;       // accumulators, or null
  const void* residual;
  std::int64_t residual_stride;
};

// Groups of rows go through both products one after the other, so that a group's hidden activations are used while they are
// in the cache; no tensor of them is made.
void feed_forward(const FeedForward& layer, const FeedForwardRows& rows);

}  // namespace mmk
