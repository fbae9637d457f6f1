// Parameters on their way into a kernel and their gradients on the way out of it: kernels see accumulators alone.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../../common/arguments.h"

namespace mmk {

// A parameter as contiguous accumulators: borrowed where it is that already, else converted.
class Parameter {
 public:
  Parameter(const MaybeTensor& tensor, const char* name, const Tensor& x, std::int64_t channels) {
    check_parameter(tensor, name, x, channels);
    if (!tensor.has_value()) return;
    const ScalarType dtype = tensor->scalar_type();
    const bool whole = dtype == ScalarType::Float || dtype == ScalarType::Double;
    const std::int64_t stride = tensor->stride(0);
    if (whole && (stride == 1 || channels <= 1)) {
      data_ = tensor->const_data_ptr();
    } else if (dtype == ScalarType::Double) {
      convert<double, double>(*tensor, stride, channels, doubles_);
    } else if (dtype == ScalarType::Float) {
      convert<float, float>(*tensor, stride, channels, floats_);
    } else if (dtype == ScalarType::BFloat16) {
      convert<torch::headeronly::BFloat16, float>(*tensor, stride, channels, floats_);
    } else {
      convert<torch::headeronly::Half, float>(*tensor, stride, channels, floats_);
    }
  }

  const void* data() const { return data_; }

 private:
  template <class T, class A>
  void convert(const Tensor& tensor, std::int64_t stride, std::int64_t channels, std::vector<A>& to) {
    const T* from = static_cast<const T*>(tensor.const_data_ptr());
    to.resize(static_cast<std::size_t>(channels));
    for (std::int64_t i = 0; i < channels; ++i) to[static_cast<std::size_t>(i)] = static_cast<A>(from[i * stride]);
    data_ = to.data();
  }

  const void* data_ = nullptr;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

// Adds the chunks' sums in their order and stores them in the parameter's dtype.
template <class T, class A>
void reduce_chunks(const A* partial, std::int64_t chunks, std::int64_t channels, void* to) {
  std::vector<A> sums(partial, partial + channels);
  for (std::int64_t chunk = 1; chunk < chunks; ++chunk)
    for (std::int64_t i = 0; i < channels; ++i) sums[static_cast<std::size_t>(i)] += partial[chunk * channels + i];
  T* out = static_cast<T*>(to);
  for (std::int64_t i = 0; i < channels; ++i) out[i] = static_cast<T>(sums[static_cast<std::size_t>(i)]);
}

// `first`: the element of `to` that they begin at.
inline void reduce_chunks(const void* partial, std::int64_t chunks, std::int64_t channels, const Tensor& to, std::int64_t first = 0) {
  void* out = static_cast<char*>(to.mutable_data_ptr()) + first * static_cast<std::int64_t>(to.element_size());
  switch (to.scalar_type()) {
    case ScalarType::Double:
      return reduce_chunks<double>(static_cast<const double*>(partial), chunks, channels, out);
    case ScalarType::Float:
      return reduce_chunks<float>(static_cast<const float*>(partial), chunks, channels, out);
    case ScalarType::BFloat16:
      return reduce_chunks<torch::headeronly::BFloat16>(static_cast<const float*>(partial), chunks, channels, out);
    default:
      return reduce_chunks<torch::headeronly::Half>(static_cast<const float*>(partial), chunks, channels, out);
  }
}

}  // namespace mmk
