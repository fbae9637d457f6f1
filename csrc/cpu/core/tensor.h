// What every family's entry needs of tensors: errors that name the argument, dtypes, new tensors, cache size.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace mmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A C++ error becomes a Python RuntimeError on its way through torch's dispatcher. Messages that begin with "mmkernels: "
// are about an argument; the eager wrapper in Python (mmkernels/ops/route.py) turns exactly these into ValueError.
template <class... Parts>
void check(bool holds, const char* argument, const Parts&... parts) {
  if (__builtin_expect(holds, 1)) return;
  std::ostringstream message;
  message << "mmkernels: " << argument << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A new contiguous tensor on `like`'s device, through the C shim: half the cost of a dispatcher call.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> sizes, std::int32_t dtype) {
  std::int64_t strides[8];
  std::int64_t stride = 1;
  for (std::int64_t i = static_cast<std::int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<std::int64_t>(1, sizes.begin()[i]);
  }
  std::int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

inline std::int32_t dtype_of(const Tensor& tensor) {
  std::int32_t dtype = 0;
  aoti_torch_get_dtype(tensor.get(), &dtype);
  return dtype;
}

// Stores bypass the cache where a call's traffic does not fit in the last-level cache: the lines would be evicted
// before anyone reads them, and reading them in first would cost a third of the bandwidth.
inline bool exceeds_cache(std::int64_t bytes) {
  static const std::int64_t cache = [] {
    const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return size > 0 ? static_cast<std::int64_t>(size) : std::int64_t{32} << 20;
  }();
  return bytes > cache;
}

}  // namespace mmk
