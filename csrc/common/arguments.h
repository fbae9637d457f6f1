// What families ask of their arguments, on the CPU and on CUDA: the dtype of x, parameters beside it, chunks.
#pragma once
#include "tensor.h"

namespace mmk {

using MaybeTensor = std::optional<Tensor>;

// float32, bfloat16, float16, float64 as 0 to 3: the order of the kernels' tables.
inline int dtype_index(const Tensor& x, const char* name = "x") {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    case ScalarType::Double:
      return 3;
    default:
      check(false, name, "the kernel takes float32, bfloat16, float16 or float64");
      return -1;
  }
}

// A tensor beside x: on its device, in its dtype or (beside half precision) in float32.
inline void check_beside(const Tensor& tensor, const char* name, const Tensor& x) {
  check(on_one_device(tensor, x), name, "expected the device of x");
  const ScalarType dtype = tensor.scalar_type(), of_x = x.scalar_type();
  check(dtype == of_x || (dtype == ScalarType::Float && of_x != ScalarType::Double), name,
        "expected the dtype of x, or float32 beside bfloat16 and float16");
}

inline void check_parameter(const MaybeTensor& parameter, const char* name, const Tensor& x, std::int64_t channels) {
  if (!parameter.has_value()) return;
  check_beside(*parameter, name, x);
  check(parameter->dim() == 1 && parameter->size(0) == channels, name, "expected [", channels, "]");
}

// Partial sums per chunk of positions: enough chunks for any number of threads, few enough to add up in no time.
inline std::int64_t chunks_of(std::int64_t positions) {
  return std::min<std::int64_t>(64, std::max<std::int64_t>(1, positions / 32));
}

}  // namespace mmk
