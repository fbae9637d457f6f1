// What every family's entry needs of tensors, on the CPU and on CUDA: errors that name the argument, dtypes, new tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A C++ error becomes a Python RuntimeError on its way through torch's dispatcher. Messages that begin with "mmkernels: "
// are about an argument; the eager wrapper in Python (mmkernels/ops/entry.py) turns exactly these into ValueError.
template <class... Parts>
void check(bool holds, const char* argument, const Parts&... parts) {
  if (__builtin_expect(holds, 1)) return;
  std::ostringstream message;
  message << "mmkernels: " << argument << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Whether tests asked for poisoned outputs: what a kernel forgets to write is then NaN instead of plausible old memory.
extern "C" int mmk_poisons_outputs();

inline void poison(const Tensor& tensor) {
  const std::size_t bytes = static_cast<std::size_t>(tensor.numel()) * tensor.element_size();
  if (bytes == 0) return;
#ifdef __CUDACC__
  cudaMemset(tensor.mutable_data_ptr(), 0xff, bytes);
  cudaDeviceSynchronize();  // kernels may follow on a stream that does not wait for this one
#else
  std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
#endif
}

inline constexpr std::int64_t max_dims = 16;

// A new tensor on `like`'s device, of at most max_dims dimensions, through the C shim: half the cost of a dispatcher call.
inline Tensor new_strided(const Tensor& like, const std::int64_t* sizes, const std::int64_t* strides, std::int64_t dims,
                          std::int32_t dtype) {
  std::int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  AtenTensorHandle handle = nullptr;
  const auto status = aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle);
  if (status != TORCH_SUCCESS) {  // the C shim keeps torch's own words to itself
    std::int64_t elements = 1;
    for (std::int64_t i = 0; i < dims; ++i) elements *= sizes[i];
    throw std::runtime_error("mmkernels out of memory: an output of " +
                             std::to_string(elements * static_cast<std::int64_t>(aoti_torch_dtype_element_size(dtype))) +
                             " bytes");
  }
  Tensor tensor(handle);
  if (mmk_poisons_outputs()) poison(tensor);
  return tensor;
}

// The same, contiguous.
inline Tensor new_tensor(const Tensor& like, const std::int64_t* sizes, std::int64_t dims, std::int32_t dtype) {
  std::int64_t strides[max_dims];
  std::int64_t stride = 1;
  for (std::int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<std::int64_t>(1, sizes[i]);
  }
  return new_strided(like, sizes, strides, dims, dtype);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> sizes, std::int32_t dtype) {
  return new_tensor(like, sizes.begin(), static_cast<std::int64_t>(sizes.size()), dtype);
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  std::int32_t type_of_a = 0, type_of_b = 0;
  aoti_torch_get_device_type(a.get(), &type_of_a);
  aoti_torch_get_device_type(b.get(), &type_of_b);
  return type_of_a == type_of_b && a.get_device_index() == b.get_device_index();
}

inline std::int32_t dtype_of(const Tensor& tensor) {
  std::int32_t dtype = 0;
  aoti_torch_get_dtype(tensor.get(), &dtype);
  return dtype;
}

}  // namespace mmk
