// Tensors that kernels read as matrices: [..., C] as rows of C elements, weights [N, K] with one contiguous dimension.
#pragma once
#include "tensor.h"

namespace mmk {

// [..., C] as rows x cols, `stride` elements from row to row.
struct Rows {
  std::int64_t rows = 1, cols = 0, stride = 0;

  Rows(const Tensor& tensor, const char* name) {
    const std::int64_t last = tensor.dim() - 1;
    check(last >= 0 && last < max_dims, name, "expected [..., C] of 1 to ", max_dims, " dimensions, got ", last + 1);
    cols = tensor.size(last);
    stride = cols;
    bool first = true;
    std::int64_t next = 0;  // the stride that the next dimension must have for the rows to lie evenly
    bool even = true;
    for (std::int64_t i = last - 1; i >= 0; --i) {
      const std::int64_t size = tensor.size(i);
      rows *= size;
      if (size == 1) continue;
      if (first) {
        stride = tensor.stride(i);
      } else {
        even = even && tensor.stride(i) == next;
      }
      first = false;
      next = tensor.stride(i) * size;
    }
    const bool empty = rows == 0 || cols == 0;
    check(empty || cols == 1 || tensor.stride(last) == 1, name, "the last dimension must be contiguous, got stride ",
          tensor.stride(last));
    check(empty || even, name, "the leading dimensions must lie evenly in memory; call .contiguous()");
  }
};

}  // namespace mmk
