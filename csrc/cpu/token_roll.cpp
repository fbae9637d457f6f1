// Token rolling on the CPU: checks, tensors, threads; the arithmetic is in token_roll.tier.cpp.
#include "token_roll.h"

#include <cstring>
#include <tuple>

#include "../common/token_roll_problem.h"
#include "core/cache.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/tier.h"
#include "core/trace.h"

namespace mmk {
namespace {

Tensor token_roll(Tensor x, std::int64_t num_frames, std::int64_t divisor, Ints ranges, bool inverse) {
  const Problem problem(x, num_frames, divisor, ranges, inverse);
  const RollShape& shape = problem.shape;
  Tensor out = new_tensor(x, {problem.rows, shape.tokens, shape.channels}, dtype_of(x));
  dtype_index(x);
  const auto tier = tier_for(token_roll_kernels_tiers, false);
  trace("token_roll", tier.name);
  if (problem.empty) return out;
  const std::int64_t element_bytes = static_cast<std::int64_t>(x.element_size());
  const bool stream = exceeds_cache(2 * problem.positions * shape.channels * element_bytes);
  const RollCopy call{shape, x.const_data_ptr(), out.mutable_data_ptr(), element_bytes, stream};
  parallel_for(problem.positions, shape.channels,
               [&](std::int64_t begin, std::int64_t end) { tier.kernels->copy(call, begin, end); });
  return out;
}

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
  const auto tier = tier_for(token_roll_kernels_tiers, is_double);
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
  const auto tier = tier_for(token_roll_kernels_tiers, is_double);
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
