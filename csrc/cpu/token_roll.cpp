// Token rolling on the CPU: checks, tensors, threads; the arithmetic is in token_roll.tier.cpp.
#include "token_roll.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "../common/token_roll_problem.h"
#include "core/cache.h"
#include "core/parallel.h"
#include "core/trace.h"

namespace mmk {
namespace {

struct Tier {
  const TokenRollKernels* kernels;
  const char* name;
};

// double has kernels in the generic tier alone.
Tier tier_for(bool is_double) {
  static constexpr const char* names[isa_count] = {"cpu/generic", "cpu/avx2", "cpu/avx512", "cpu/amx"};
  if (is_double) return {token_roll_kernels_tiers.tables[0], names[0]};
  const auto choice = token_roll_kernels_tiers.choose();
  return {choice.kernels, names[static_cast<int>(choice.isa)]};
}

Tensor token_roll(Tensor x, std::int64_t num_frames, std::int64_t divisor, Ints ranges, bool inverse) {
  const Problem problem(x, num_frames, divisor, ranges, inverse);
  const RollShape& shape = problem.shape;
  Tensor out = new_tensor(x, {problem.rows, shape.tokens, shape.channels}, dtype_of(x));
  dtype_index(x);
  const Tier tier = tier_for(false);
  trace("token_roll", tier.name);
  if (problem.empty) return out;
  const std::int64_t element_bytes = static_cast<std::int64_t>(x.element_size());
  const bool stream = exceeds_cache(2 * problem.positions * shape.channels * element_bytes);
  const RollCopy call{shape, x.const_data_ptr(), out.mutable_data_ptr(), element_bytes, stream};
  parallel_for(problem.positions, shape.channels,
               [&](std::int64_t begin, std::int64_t end) { tier.kernels->copy(call, begin, end); });
  return out;
}

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

std::tuple<Tensor, Tensor, Tensor> token_roll_layer_norm(Tensor x, std::int64_t num_frames, std::int64_t divisor,
                                                         Ints ranges, MaybeTensor weight, MaybeTensor bias, double eps,
                                                         bool need_rolled, bool float_normed) {
  const Problem problem(x, num_frames, divisor, ranges, false);
  const RollShape& shape = problem.shape;
  const int dtype = dtype_index(x);
  const bool is_double = dtype == 3;
  const std::int32_t of_x = dtype_of(x), of_stats = is_double ? of_x : aoti_torch_dtype_float32();
  const bool wide = float_normed && !is_double;
  const Parameter weights(weight, "weight", x, shape.channels), biases(bias, "bias", x, shape.channels);
  Tensor normed = new_tensor(x, {problem.rows, shape.tokens, shape.channels}, wide ? of_stats : of_x);
  Tensor rolled = need_rolled ? new_tensor(x, {problem.rows, shape.tokens, shape.channels}, of_x) : new_tensor(x, {0}, of_x);
  Tensor stats = new_tensor(x, {2, problem.rows, shape.tokens}, of_stats);
  const Tier tier = tier_for(is_double);
  trace("token_roll_layer_norm", tier.name);
  if (problem.empty) {  // the statistics of no channels are NaN
    std::memset(stats.mutable_data_ptr(), 0xff, static_cast<std::size_t>(stats.numel()) * stats.element_size());
    return {normed, rolled, stats};
  }
  const std::int64_t elements = problem.positions * shape.channels;
  const std::int64_t traffic = elements * static_cast<std::int64_t>(x.element_size() * (need_rolled ? 2 : 1) +
                                                                    normed.element_size());
  char* mean = static_cast<char*>(stats.mutable_data_ptr());
  const RollNorm call{shape,
                      x.const_data_ptr(),
                      weights.data(),
                      biases.data(),
                      eps,
                      normed.mutable_data_ptr(),
                      need_rolled ? rolled.mutable_data_ptr() : nullptr,
                      mean,
                      mean + problem.positions * static_cast<std::int64_t>(stats.element_size()),
                      exceeds_cache(traffic)};
  const auto kernel = wide ? tier.kernels->norm_wide[dtype] : tier.kernels->norm[dtype];
  parallel_for(problem.positions, shape.channels,
               [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
  return {normed, rolled, stats};
}

// Adds the chunks' sums in their order and stores them in the parameter's dtype.
template <class T, class A>
void reduce_chunks(const A* partial, std::int64_t chunks, std::int64_t channels, void* to) {
  std::vector<A> sums(partial, partial + channels);
  for (std::int64_t chunk = 1; chunk < chunks; ++chunk)
    for (std::int64_t i = 0; i < channels; ++i) sums[static_cast<std::size_t>(i)] += partial[chunk * channels + i];
  T* out = static_cast<T*>(to);
  for (std::int64_t i = 0; i < channels; ++i) out[i] = static_cast<T>(sums[static_cast<std::size_t>(i)]);
}

void reduce_chunks(const void* partial, std::int64_t chunks, std::int64_t channels, const Tensor& to) {
  void* out = to.mutable_data_ptr();
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

// Gradients of x, weight and bias, each in its own dtype; an empty tensor where none is needed.
std::tuple<Tensor, Tensor, Tensor> token_roll_layer_norm_backward(MaybeTensor grad_normed, MaybeTensor grad_rolled,
                                                                  Tensor x, Tensor stats, std::int64_t num_frames,
                                                                  std::int64_t divisor, Ints ranges, MaybeTensor weight,
                                                                  MaybeTensor bias, bool need_weight, bool need_bias) {
  const Problem problem(x, num_frames, divisor, ranges, false);
  const RollShape& shape = problem.shape;
  const int dtype = dtype_index(x);
  const bool is_double = dtype == 3;
  const std::int32_t of_x = dtype_of(x);
  const bool wide = check_backward(problem, grad_normed, grad_rolled, x, stats);
  const Parameter weights(weight, "weight", x, shape.channels);
  check_parameter(bias, "bias", x, shape.channels);  // its dtype is that of grad_bias

  const std::int64_t channels = shape.channels;
  Tensor grad_x = new_tensor(x, {problem.rows, shape.tokens, channels}, of_x);
  const auto new_parameter_gradient = [&](bool needed, const MaybeTensor& parameter) {
    return new_tensor(x, {needed ? channels : 0}, parameter.has_value() ? dtype_of(*parameter) : of_x);
  };
  Tensor grad_weight = new_parameter_gradient(need_weight, weight);
  Tensor grad_bias = new_parameter_gradient(need_bias, bias);
  const Tier tier = tier_for(is_double);
  trace("token_roll_layer_norm_backward", tier.name);

  const std::int64_t chunks = chunks_of(problem.positions);
  Tensor partial = new_tensor(stats, {2, chunks, channels}, dtype_of(stats));
  char* partial_weight = static_cast<char*>(partial.mutable_data_ptr());
  char* partial_bias = partial_weight + chunks * channels * static_cast<std::int64_t>(partial.element_size());
  const bool sums_needed = (need_weight || need_bias) && channels > 0;
  if (problem.empty || !grad_normed.has_value()) {
    std::memset(partial_weight, 0, static_cast<std::size_t>(partial.numel()) * partial.element_size());
  }
  if (!problem.empty) {
    const char* mean = static_cast<const char*>(stats.const_data_ptr());
    const std::int64_t gradients = (grad_normed.has_value() ? 1 : 0) + (grad_rolled.has_value() ? 1 : 0);
    const std::int64_t traffic = (2 + gradients) * x.numel() * static_cast<std::int64_t>(x.element_size());
    const RollNormBackward call{shape,
                                grad_normed.has_value() ? grad_normed->const_data_ptr() : nullptr,
                                grad_rolled.has_value() ? grad_rolled->const_data_ptr() : nullptr,
                                x.const_data_ptr(),
                                weights.data(),
                                mean,
                                mean + problem.positions * static_cast<std::int64_t>(stats.element_size()),
                                grad_x.mutable_data_ptr(),
                                need_weight ? partial_weight : nullptr,
                                need_bias ? partial_bias : nullptr,
                                problem.positions,
                                chunks,
                                exceeds_cache(traffic)};
    const auto kernel = wide ? tier.kernels->backward_wide[dtype] : tier.kernels->backward[dtype];
    const std::int64_t chunk_elements = problem.positions / chunks * channels;
    parallel_for(chunks, chunk_elements, [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
  }
  if (sums_needed && need_weight) reduce_chunks(partial_weight, chunks, channels, grad_weight);
  if (sums_needed && need_bias) reduce_chunks(partial_bias, chunks, channels, grad_bias);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("token_roll", TORCH_BOX(&token_roll));
  library.impl("token_roll_layer_norm", TORCH_BOX(&token_roll_layer_norm));
  library.impl("token_roll_layer_norm_backward", TORCH_BOX(&token_roll_layer_norm_backward));
}

}  // namespace mmk
