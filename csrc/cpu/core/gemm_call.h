// One product as a family asks for it: operands and results as they lie in memory. Blocks, panels and threads are gemm.cpp's.
#pragma once
#include <cstddef>

#include "gemm.h"

namespace mmk {

// B of a product: in memory, or packed before by pack_weights (then `operand` is not read).
struct GemmWeights {
  GemmOperand operand{};
  const void* panels = nullptr;
  const float* scales = nullptr;  // of int8 panels, one a column
};

// out = activation(A B_gate + bias_gate) * (A B + bias) + residual with a gate, else activation(A B + bias) + residual. Rows
// may be gathered from A and scattered to out, and have weights.
struct GemmCall {
  const GemmKernels* kernels = nullptr;
  const GemmArithmetic* arithmetic = nullptr;
  std::int64_t rows = 0, cols = 0, depth = 0;
  GemmOperand a{};
  const std::int64_t* a_rows = nullptr;  // which rows of `a`; null: one after the other
  const void* a_panels = nullptr;  // A in panels already, of the whole depth; then `a` is not read
  GemmWeights up, gate;
  bool gated = false;
  // Biases as accumulators; the others of type `number`. Rows of pre and pre_gate are `cols` elements apart.
  const void* bias = nullptr;
  const void* bias_gate = nullptr;
  Activation activation = Activation::none;
  const void* row_weights = nullptr;  // accumulators, times which a row is before the residual is added
  const void* residual = nullptr;
  std::int64_t residual_stride = 0;
  void* out = nullptr;
  std::int64_t out_stride = 0;
  const std::int64_t* out_rows = nullptr;  // which rows of `out` and `residual`; null: one after the other
  // Instead of `out`: panels for a product by `out_arithmetic` whose A this one's result is; see feeds.
  void* out_panels = nullptr;
  const GemmArithmetic* out_arithmetic = nullptr;
  Number number = Number::float32;
  void* pre = nullptr;
  void* pre_gate = nullptr;
};

void gemm(const GemmCall& call);

// The tier in force, for one kind of arithmetic.
struct GemmChoice {
  const GemmKernels* kernels;
  const GemmArithmetic* arithmetic;
  Isa isa;
  const char* name;  // for the trace
};

// For weights that are kept packed as `number`, and for those that are packed as they are multiplied.
GemmChoice choose_gemm(Number number);
GemmChoice choose_gemm_unpacked(Number number);

inline std::size_t bytes_of(Number number) {
  constexpr std::size_t bytes[] = {4, 2, 2, 8, 1};
  return bytes[static_cast<int>(number)];
}

// The type that products of this one are summed in.
inline Number accumulators_of(Number number) { return number == Number::float64 ? Number::float64 : Number::float32; }

// Whether the accumulators of one arithmetic can be packed as A of the other block by block.
bool feeds(const GemmArithmetic& first, const GemmArithmetic& second);

// How many rows of A a call packs at a time; a product of fewer rows reads B once.
std::int64_t rows_at_once(const GemmArithmetic& arithmetic, std::int64_t depth);

// The bytes of `cols` columns of B in panels, without scales.
std::int64_t packed_bytes(const GemmArithmetic& arithmetic, std::int64_t cols, std::int64_t depth);

// Packs B for later calls.
void pack_weights(const GemmArithmetic& arithmetic, const GemmOperand& operand, std::int64_t cols, std::int64_t depth,
                  void* panels, float* scales);

}  // namespace mmk
