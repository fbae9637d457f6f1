// What linear layers, feed-forward layers and experts take: an activation by its number, a residual, and weights, a matrix
// [N, K] or one for each expert [E, N, K]; these also packed, as pack_linear packs them for many calls.
#pragma once
#include <optional>

#include "../common/arguments.h"
#include "../common/matrix.h"
#include "core/gemm_call.h"

namespace mmk {

Activation activation_of(std::int64_t code);

// What is added to an output of rows x cols.
struct Residual {
  const void* data = nullptr;
  std::int64_t stride = 0;

  Residual(const MaybeTensor& residual, const Tensor& x, std::int64_t rows, std::int64_t cols) {
    if (!residual.has_value()) return;
    check(on_one_device(*residual, x), "residual", "expected the device of x");
    check(dtype_of(*residual) == dtype_of(x), "residual", "expected the dtype of x");
    const Rows shape(*residual, "residual");
    check(shape.rows == rows && shape.cols == cols, "residual", "expected the shape of the output, ", rows, " rows of ", cols);
    data = residual->const_data_ptr();
    stride = shape.stride;
  }
};

Tensor pack_linear(Tensor weight, std::int64_t number, std::int64_t version);

// A weight beside its packed form, which is used where it is still of this weight and of the tier in force. `current`, where
// given, says for each packed weight of a call whether its version is the one that was packed.
class Weight {
 public:
  std::int64_t matrices = 1, n = 0, k = 0;
  GemmChoice how;

  // `dims`: 2 for one matrix, 3 for one an expert.
  Weight(const Tensor& weight, const MaybeTensor& packed, const MaybeTensor& current, std::int64_t position, const char* name,
         const Tensor& x, Number number, std::int64_t dims = 2);

  // The matrix of one expert.
  GemmWeights of(std::int64_t expert = 0) const;
  bool is_packed() const { return first_.panels != nullptr; }

  // Both of a gated product are packed in one way or in none.
  void agree_with(Weight& other, Number number);

 private:
  void use(const Tensor& packed, Number kept);
  void use_unpacked(Number number);

  GemmWeights first_;
  std::int64_t stride_ = 0;  // from matrix to matrix, in elements
  MaybeTensor again_;
};

}  // namespace mmk
