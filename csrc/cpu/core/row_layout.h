// How the rows of several operands lie in memory. Plain data, shared by entries and kernels.
#pragma once
#include <stdint.h>

namespace mmk {

inline constexpr int max_row_dims = 16;

// The leading dimensions of one shape, and each operand's strides over them in elements; 0 where it is broadcast.
template <int operands>
struct RowLayout {
  int dims;
  int64_t sizes[max_row_dims];
  int64_t strides[operands][max_row_dims];

  // Drops a dimension of one row and merges neighbours that every operand walks in one stride.
  void merge() {
    int kept = 0;
    for (int dim = 0; dim < dims; ++dim) {
      if (sizes[dim] == 1) continue;
      bool merges = kept > 0;
      for (int k = 0; k < operands && merges; ++k) merges = strides[k][kept - 1] == strides[k][dim] * sizes[dim];
      const int to = merges ? kept - 1 : kept++;
      sizes[to] = merges ? sizes[to] * sizes[dim] : sizes[dim];
      for (int k = 0; k < operands; ++k) strides[k][to] = strides[k][dim];
    }
    dims = kept;
  }
};

}  // namespace mmk
