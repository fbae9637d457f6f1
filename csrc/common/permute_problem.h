// Rows in the order of the experts and back: the checks that every compiled entry makes before a kernel runs.
#pragma once
#include "arguments.h"
#include "matrix.h"

namespace mmk {

// Where the slots of T tokens, `slots` a token, lie among the rows.
struct PermuteProblem {
  const std::int64_t* order;      // [T slots]
  const std::int64_t* positions;  // [T, slots]
  std::int64_t tokens, slots;

  PermuteProblem(const Tensor& order_, const Tensor& positions_, const Tensor& beside) {
    const auto is_index = [&](const Tensor& tensor, std::int64_t dims) {
      return tensor.scalar_type() == ScalarType::Long && tensor.dim() == dims && tensor.is_contiguous() && on_one_device(tensor, beside);
    };
    check(is_index(order_, 1) && is_index(positions_, 2) && order_.numel() == positions_.numel(), "dispatch",
          "expected order [T K] and positions [T, K], contiguous, int64, on the device of the rows");
    order = static_cast<const std::int64_t*>(order_.const_data_ptr());
    positions = static_cast<const std::int64_t*>(positions_.const_data_ptr());
    tokens = positions_.size(0);
    slots = positions_.size(1);
  }
  std::int64_t count() const { return tokens * slots; }

  // [T, C] of a row a token.
  Rows tokens_of(const Tensor& x, const char* name) const {
    check(x.dim() == 2 && x.size(0) == tokens, name, "expected [", tokens, ", C], a row for each token of dispatch");
    return {x, name};
  }

  // [S, C] of a row a slot in use, and maybe others.
  Rows rows_of(const Tensor& rows) const {
    check(rows.dim() == 2 && rows.size(0) <= count(), "rows", "expected [S, C] of at most ", count(), " rows, as many as there are slots");
    return {rows, "rows"};
  }
};

inline const void* weights_of_slots(const MaybeTensor& weights, const Tensor& beside, const PermuteProblem& problem) {
  if (!weights.has_value()) return nullptr;
  check(on_one_device(*weights, beside) && weights->is_contiguous() && weights->dim() == 2 && weights->size(0) == problem.tokens &&
            weights->size(1) == problem.slots &&
            weights->scalar_type() == (beside.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        "weights", "expected contiguous accumulators, one a slot");
  return weights->const_data_ptr();
}

}  // namespace mmk
