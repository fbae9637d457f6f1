// Normalisation on the CPU: checks, tensors, threads; the arithmetic is in norm.tier.cpp.
#include "norm.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../common/arguments.h"
#include "core/cache.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/scratch.h"
#include "core/tier.h"
#include "core/trace.h"

namespace mmk {
namespace {

static_assert(max_row_dims >= max_dims);

void check_last_dimension(const Tensor& tensor, const char* name) {
  const std::int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0, name,
        "the last dimension must be contiguous, got stride ", tensor.stride(last));
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (std::int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) != b.size(dim)) return false;
  return true;
}

// The shape of one call, and its operands.
struct Problem {
  std::int64_t sizes[max_dims];
  std::int64_t dims = 0, rows = 1, channels = 0;
  NormRows layout{};
  bool by_sample = false;  // some vector is one a sample

  explicit Problem(const Tensor& x, const char* name) : dims(x.dim()) {
    check(dims >= 1 && dims <= max_dims, name, "expected [..., C] of 1 to ", max_dims, " dimensions, got ", dims);
    for (std::int64_t dim = 0; dim < dims; ++dim) sizes[dim] = x.size(dim);
    channels = sizes[dims - 1];
    layout.dims = static_cast<int>(dims - 1);
    for (int dim = 0; dim < layout.dims; ++dim) {
      layout.sizes[dim] = sizes[dim];
      rows *= sizes[dim];
    }
  }

  bool empty() const { return rows == 0 || channels == 0; }

  void operand(NormOperand operand, const Tensor& tensor, const char* name) {
    check_last_dimension(tensor, name);
    for (int dim = 0; dim < layout.dims; ++dim) layout.strides[operand][dim] = tensor.stride(dim);
  }

  // [B, C] or [B, 1, ..., C]: one vector a sample; the shape of x: one a row.
  NormVectors vectors(NormOperand operand, const MaybeTensor& tensor, const char* name, const Tensor& x) {
    if (!tensor.has_value()) return {nullptr, false, false};
    check_beside(*tensor, name, x);
    const ScalarType dtype = tensor->scalar_type();
    const bool wide = dtype == ScalarType::Float || dtype == ScalarType::Double;
    const void* data = tensor->const_data_ptr();
    if (data == nullptr) data = this;  // of an empty tensor, never read: null means that there is none
    if (same_sizes(*tensor, x)) {
      this->operand(operand, *tensor, name);
      return {data, wide, true};
    }
    const std::int64_t last = tensor->dim() - 1;
    bool fits = dims > 1 && (last == 1 || last == dims - 1) && tensor->size(0) == sizes[0] && tensor->size(last) == channels;
    for (std::int64_t dim = 1; dim < last; ++dim) fits = fits && tensor->size(dim) == 1;
    check(fits, name, "expected one vector a sample, [B, C] or [B, 1, C], or one a token, the shape of x");
    check_last_dimension(*tensor, name);
    layout.strides[operand][0] = tensor->stride(0);  // the other strides stay 0
    by_sample = true;
    return {data, wide, false};
  }
};

void check_pair(const NormVectors& shift, const NormVectors& scale) {
  check((shift.data == nullptr) == (scale.data == nullptr), "scale", "expected with shift, or neither");
  check(shift.by_row == scale.by_row, "scale", "expected one vector a sample as shift, or one a token as shift");
}

void check_like_x(const Tensor& tensor, const char* name, const Tensor& x) {
  check(on_one_device(tensor, x), name, "expected the device of x");
  check(tensor.scalar_type() == x.scalar_type(), name, "expected the dtype of x");
  check(same_sizes(tensor, x), name, "expected the shape of x");
}

std::size_t scratch_bytes(std::int64_t channels, bool is_double) {
  const std::size_t row = static_cast<std::size_t>(channels) * (is_double ? sizeof(double) : sizeof(float));
  const std::int64_t block = std::clamp<std::int64_t>(norm_block_elements / channels, 1, norm_max_block_rows);
  return static_cast<std::size_t>(block + 2) * rounded_up(row, 64);
}

std::tuple<Tensor, Tensor, Tensor> norm(Tensor x, MaybeTensor residual, MaybeTensor gate, MaybeTensor weight,
                                        MaybeTensor bias, MaybeTensor shift, MaybeTensor scale, double eps,
                                        double scale_offset, bool rms, bool float_normed) {
  Problem problem(x, "x");
  const int dtype = dtype_index(x);
  problem.operand(of_x, x, "x");
  if (residual.has_value()) {
    check_like_x(*residual, "residual", x);
    problem.operand(of_residual, *residual, "residual");
  }
  check(!gate.has_value() || residual.has_value(), "gate", "expected with residual only");
  NormCall call{};
  call.gate = problem.vectors(of_gate, gate, "gate", x);
  call.shift = problem.vectors(of_shift, shift, "shift", x);
  call.scale = problem.vectors(of_scale, scale, "scale", x);
  check_pair(call.shift, call.scale);
  const Parameter weights(weight, "weight", x, problem.channels), biases(bias, "bias", x, problem.channels);
  const bool is_double = dtype == 3, wide = float_normed && !is_double;
  const std::int32_t dtype_of_x = dtype_of(x), dtype_of_stats = is_double ? dtype_of_x : aoti_torch_dtype_float32();
  Tensor normed = new_tensor(x, problem.sizes, problem.dims, wide ? dtype_of_stats : dtype_of_x);
  Tensor summed =
      residual.has_value() ? new_tensor(x, problem.sizes, problem.dims, dtype_of_x) : new_tensor(x, {0}, dtype_of_x);
  Tensor stats = new_tensor(x, {rms ? 1 : 2, problem.rows}, dtype_of_stats);
  const auto tier = tier_for(norm_kernels_tiers, is_double);
  trace("norm", tier.name);
  if (problem.empty()) {  // the statistics of no channels are NaN
    if (stats.numel() > 0)
      std::memset(stats.mutable_data_ptr(), 0xff, static_cast<std::size_t>(stats.numel()) * stats.element_size());
    return {normed, summed, stats};
  }
  problem.layout.merge();
  call.rows = problem.layout;
  call.channels = problem.channels;
  call.x = x.const_data_ptr();
  call.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  call.weight = weights.data();
  call.bias = biases.data();
  call.eps = eps;
  call.scale_offset = scale_offset;
  call.normed = normed.mutable_data_ptr();
  call.summed = residual.has_value() ? summed.mutable_data_ptr() : nullptr;
  char* const first = static_cast<char*>(stats.mutable_data_ptr());
  call.mean = rms ? nullptr : first;
  call.rstd = rms ? first : first + problem.rows * static_cast<std::int64_t>(stats.element_size());
  const std::size_t moved = x.element_size() * (residual.has_value() ? 3 : 1) + normed.element_size();
  call.stream = exceeds_cache(problem.rows * problem.channels * static_cast<std::int64_t>(moved));
  const auto kernel = tier.kernels->forward[rms][wide][dtype];
  const std::size_t bytes = scratch_bytes(problem.channels, is_double);
  parallel_for(problem.rows, problem.channels, [&](std::int64_t begin, std::int64_t end) {
    kernel(call, begin, end, scratch(ScratchUse::rows, bytes));
  });
  return {normed, summed, stats};
}

// Pieces of one group of rows: enough pieces for any number of threads, few enough to add up in no time.
std::int64_t pieces_of(std::int64_t groups, std::int64_t group_rows) {
  return std::min<std::int64_t>(chunks_of(group_rows), std::max<std::int64_t>(1, 64 / std::max<std::int64_t>(1, groups)));
}

// Gradients of the row that was normalised (so of the residual, and without a gate of x too), of x where there is a gate,
// and of the others, each in its own dtype and shape; an empty tensor where none is needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    MaybeTensor grad_normed, MaybeTensor grad_summed, Tensor normalised, Tensor stats, MaybeTensor x, MaybeTensor gate,
    MaybeTensor weight, MaybeTensor bias, MaybeTensor shift, MaybeTensor scale, double scale_offset, bool rms, bool need_gate,
    bool need_weight, bool need_bias, bool need_modulation) {
  Problem problem(normalised, "normalised");
  const int dtype = dtype_index(normalised);
  const bool is_double = dtype == 3;
  const std::int64_t channels = problem.channels;
  problem.operand(of_residual, normalised, "normalised");
  check(x.has_value() == gate.has_value(), "x", "expected with gate only");
  if (x.has_value()) {
    check_like_x(*x, "x", normalised);
    problem.operand(of_x, *x, "x");
  }
  NormBackward call{};
  call.gate = problem.vectors(of_gate, gate, "gate", normalised);
  call.shift = problem.vectors(of_shift, shift, "shift", normalised);
  call.scale = problem.vectors(of_scale, scale, "scale", normalised);
  check_pair(call.shift, call.scale);
  const Parameter weights(weight, "weight", normalised, channels), biases(bias, "bias", normalised, channels);
  const auto check_gradient = [&](const MaybeTensor& gradient, const char* name) {
    if (!gradient.has_value()) return;
    check(gradient->is_contiguous() && same_sizes(*gradient, normalised), name,
          "expected a contiguous gradient of the shape of x");
    check(on_one_device(*gradient, normalised), name, "expected the device of x");
  };
  check_gradient(grad_normed, "grad_normed");
  check_gradient(grad_summed, "grad_summed");
  const ScalarType stats_type = is_double ? ScalarType::Double : ScalarType::Float;
  const bool wide = grad_normed.has_value() && dtype_of(*grad_normed) != dtype_of(normalised);
  check(!wide || (grad_normed->scalar_type() == ScalarType::Float && !is_double), "grad_normed",
        "expected the dtype of x or float32");
  check(!grad_summed.has_value() || dtype_of(*grad_summed) == dtype_of(normalised), "grad_summed", "expected the dtype of x");
  check(on_one_device(stats, normalised), "stats", "expected the device of x");
  check(stats.is_contiguous() && stats.numel() == (rms ? 1 : 2) * problem.rows && stats.scalar_type() == stats_type, "stats",
        "expected the statistics of the forward call");

  const std::int32_t dtype_of_x = dtype_of(normalised);
  const auto new_gradient = [&](bool needed, const MaybeTensor& like) {
    const std::int32_t dtype_of_like = like.has_value() ? dtype_of(*like) : dtype_of_x;
    if (!needed || !like.has_value()) return new_tensor(normalised, {0}, dtype_of_like);
    std::int64_t sizes[max_dims];
    for (std::int64_t dim = 0; dim < like->dim(); ++dim) sizes[dim] = like->size(dim);
    return new_tensor(normalised, sizes, like->dim(), dtype_of_like);
  };
  const MaybeTensor like_x(normalised);
  Tensor grad_normalised = new_gradient(true, like_x), grad_x = new_gradient(gate.has_value(), like_x);
  Tensor grad_gate = new_gradient(need_gate, gate), grad_weight = new_gradient(need_weight, weight),
         grad_bias = new_gradient(need_bias, bias), grad_shift = new_gradient(need_modulation, shift),
         grad_scale = new_gradient(need_modulation, scale);
  const auto tier = tier_for(norm_kernels_tiers, is_double);
  trace("norm_backward", tier.name);
  const auto results = [&] {
    return std::make_tuple(grad_normalised, grad_x, grad_gate, grad_weight, grad_bias, grad_shift, grad_scale);
  };
  if (channels == 0) return results();

  const std::int64_t groups = problem.by_sample ? problem.sizes[0] : 1;
  call.group_rows = groups == 0 ? 0 : problem.rows / groups;
  call.group_pieces = pieces_of(groups, call.group_rows);
  const std::int64_t pieces = groups * call.group_pieces;
  const bool sum_gate = need_gate && gate.has_value() && !call.gate.by_row;
  const bool sum_modulation = need_modulation && shift.has_value() && !call.shift.by_row;
  const bool sum_hat = (need_weight && weight.has_value()) || sum_modulation;
  const bool sum_plain = (need_bias && bias.has_value()) || sum_modulation;
  const std::int64_t kinds = (sum_gate ? 1 : 0) + (sum_hat ? 1 : 0) + (sum_plain ? 1 : 0);
  Tensor sums = new_tensor(stats, {kinds, pieces, channels}, dtype_of(stats));
  char* next = pieces > 0 && sums.numel() > 0 ? static_cast<char*>(sums.mutable_data_ptr()) : nullptr;
  const auto take = [&](bool needed) {
    void* taken = needed ? next : nullptr;
    if (taken != nullptr) next += pieces * channels * static_cast<std::int64_t>(sums.element_size());
    return taken;
  };
  call.sum_hat = take(sum_hat);
  call.sum_plain = take(sum_plain);
  call.sum_gate = take(sum_gate);

  const auto data_of = [](const MaybeTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; };
  const auto by_row = [](const NormVectors& vectors, const Tensor& gradient) {
    return vectors.by_row && gradient.numel() > 0 ? gradient.mutable_data_ptr() : nullptr;
  };
  problem.layout.merge();
  call.rows = problem.layout;
  call.channels = channels;
  call.grad_normed = data_of(grad_normed);
  call.grad_summed = data_of(grad_summed);
  call.x = data_of(x);
  call.normalised = normalised.const_data_ptr();
  call.weight = weights.data();
  call.bias = biases.data();
  call.scale_offset = scale_offset;
  const char* first = static_cast<const char*>(stats.const_data_ptr());
  call.mean = rms ? nullptr : first;
  call.rstd = rms ? first : first + problem.rows * static_cast<std::int64_t>(stats.element_size());
  call.grad_normalised = grad_normalised.mutable_data_ptr();
  call.grad_x = gate.has_value() ? grad_x.mutable_data_ptr() : nullptr;
  call.grad_gate = by_row(call.gate, grad_gate);
  call.grad_shift = by_row(call.shift, grad_shift);
  call.grad_scale = by_row(call.scale, grad_scale);
  const std::int64_t moved =
      2 + (grad_normed.has_value() ? 1 : 0) + (grad_summed.has_value() ? 1 : 0) + (gate.has_value() ? 2 : 0);
  call.stream = exceeds_cache(moved * normalised.numel() * static_cast<std::int64_t>(normalised.element_size()));
  const auto kernel = tier.kernels->backward[rms][wide][dtype];
  const std::size_t bytes = scratch_bytes(channels, is_double);
  if (pieces > 0) {
    parallel_for(pieces, problem.rows / pieces * channels, [&](std::int64_t begin, std::int64_t end) {
      kernel(call, begin, end, scratch(ScratchUse::rows, bytes));
    });
  }

  const auto sums_to = [&](bool needed, const Tensor& gradient) {
    const bool is_whole = gradient.scalar_type() == ScalarType::Float || gradient.scalar_type() == ScalarType::Double;
    return NormSums{needed && gradient.numel() > 0 ? gradient.mutable_data_ptr() : nullptr, is_whole};
  };
  const NormReduce to{groups,
                      sums_to(need_weight, grad_weight),
                      sums_to(need_bias, grad_bias),
                      sums_to(sum_modulation, grad_shift),
                      sums_to(sum_modulation, grad_scale),
                      sums_to(sum_gate, grad_gate)};
  if (sum_gate || sum_hat || sum_plain) {
    const auto reduce = tier.kernels->reduce[dtype];
    parallel_for(ceil_div(channels, norm_reduce_tile), pieces * norm_reduce_tile,
                 [&](std::int64_t begin, std::int64_t end) { reduce(call, to, begin, end); });
  }
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("norm", TORCH_BOX(&norm));
  library.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace mmk
