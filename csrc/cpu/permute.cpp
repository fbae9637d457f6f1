// Rows in the order of the experts and back, on the CPU: checks, tensors, threads; the arithmetic is in permute.tier.cpp.
#include "permute.h"

#include <tuple>

#include "../common/permute_problem.h"
#include "core/cache.h"
#include "core/parallel.h"
#include "core/tier.h"
#include "core/trace.h"

namespace mmk {
namespace {

// Indices that nobody else has looked at: a Dispatch may be anyone's.
void check_indices(const std::int64_t* indices, std::int64_t count, std::int64_t limit, const char* name, const char* what) {
  for (std::int64_t i = 0; i < count; ++i)
    if (indices[i] < -1 || indices[i] >= limit) check(false, name, what, " -1 to ", limit - 1, ", got ", indices[i]);
}

void check_order(const PermuteProblem& problem) {
  check_indices(problem.order, problem.count(), problem.count(), "dispatch", "expected an order of");
}

void check_positions(const PermuteProblem& problem, const Rows& rows) {
  check_indices(problem.positions, problem.count(), rows.rows, "rows", "expected a row for each slot in use, which dispatch has as");
}

void gather(const PermuteKernels& kernels, const PermuteGather& call, int number, std::int64_t rows) {
  const auto kernel = call.weights == nullptr ? kernels.copy : kernels.gather[number];
  parallel_for(rows, call.cols, [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
}

Tensor permute_tokens(Tensor x, Tensor order, Tensor positions, std::int64_t max_slots) {
  const PermuteProblem problem(order, positions, x);
  const Rows from = problem.tokens_of(x, "x");
  const int number = dtype_index(x);
  check(max_slots >= 0 && max_slots <= problem.count(), "max_slots", "expected 0 to ", problem.count(), ", got ", max_slots);
  check_order(problem);
  for (std::int64_t row = max_slots; row < problem.count(); ++row)
    check(problem.order[row] < 0, "max_slots", "expected at least the slots in use, got ", max_slots);
  Tensor out = new_tensor(x, {max_slots, from.cols}, dtype_of(x));
  const auto tier = tier_for(permute_kernels_tiers, false);
  trace("permute_tokens", tier.name);
  const auto bytes = static_cast<std::int64_t>(x.element_size());
  const bool stream = exceeds_cache((x.numel() + out.numel()) * bytes);
  gather(*tier.kernels,
         {x.const_data_ptr(), from.stride, from.cols, problem.slots, bytes, problem.order, nullptr, out.mutable_data_ptr(), stream},
         number, max_slots);
  return out;
}

Tensor unpermute_tokens(Tensor rows, Tensor order, Tensor positions, MaybeTensor weights) {
  const PermuteProblem problem(order, positions, rows);
  const Rows from = problem.rows_of(rows);
  const int number = dtype_index(rows, "rows");
  const void* of_slots = weights_of_slots(weights, rows, problem);
  check_positions(problem, from);
  Tensor out = new_tensor(rows, {problem.tokens, from.cols}, dtype_of(rows));
  const auto tier = tier_for(permute_kernels_tiers, number == 3);
  trace("unpermute_tokens", tier.name);
  const PermuteCombine call{rows.const_data_ptr(), from.stride, from.cols, problem.slots, problem.positions, of_slots, out.mutable_data_ptr(),
                            exceeds_cache((rows.numel() + out.numel()) * static_cast<std::int64_t>(rows.element_size()))};
  parallel_for(problem.tokens, from.cols * (problem.slots + 1),
               [&](std::int64_t begin, std::int64_t end) { tier.kernels->combine[number](call, begin, end); });
  return out;
}

// Without `rows`, the gradient of the weights is not wanted.
std::tuple<Tensor, Tensor> unpermute_tokens_backward(Tensor grad, MaybeTensor rows, Tensor order, Tensor positions, MaybeTensor weights,
                                                     std::int64_t max_slots, bool need_rows) {
  const PermuteProblem problem(order, positions, grad);
  const Rows upstream = problem.tokens_of(grad, "grad");
  const int number = dtype_index(grad, "grad");
  check(grad.is_contiguous(), "grad", "expected contiguous rows");
  check(max_slots >= 0 && max_slots <= problem.count(), "max_slots", "expected 0 to ", problem.count(), ", got ", max_slots);
  const void* of_slots = weights_of_slots(weights, grad, problem);
  Tensor grad_rows = need_rows ? new_tensor(grad, {max_slots, upstream.cols}, dtype_of(grad)) : new_tensor(grad, {0}, dtype_of(grad));
  const std::int32_t sums = number == 3 ? dtype_of(grad) : aoti_torch_dtype_float32();
  Tensor grad_weights =
      rows.has_value() ? new_tensor(grad, {problem.tokens, problem.slots}, sums) : new_tensor(grad, {0}, sums);
  const auto tier = tier_for(permute_kernels_tiers, number == 3);
  trace("unpermute_tokens_backward", tier.name);
  if (need_rows) {
    check_order(problem);
    const auto bytes = static_cast<std::int64_t>(grad.element_size());
    const bool stream = exceeds_cache((grad.numel() + grad_rows.numel()) * bytes);
    gather(*tier.kernels,
           {grad.const_data_ptr(), upstream.cols, upstream.cols, problem.slots, bytes, problem.order, of_slots, grad_rows.mutable_data_ptr(),
            stream},
           number, max_slots);
  }
  if (rows.has_value()) {
    const Rows from = problem.rows_of(*rows);
    check(dtype_of(*rows) == dtype_of(grad) && on_one_device(*rows, grad) && from.cols == upstream.cols, "rows",
          "expected the dtype, device and channels of grad");
    check_positions(problem, from);
    const PermuteDots call{grad.const_data_ptr(), rows->const_data_ptr(), from.stride,           from.cols,
                           problem.slots,         problem.positions,      grad_weights.mutable_data_ptr()};
    parallel_for(problem.count(), from.cols, [&](std::int64_t begin, std::int64_t end) { tier.kernels->dots[number](call, begin, end); });
  }
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("permute_tokens", TORCH_BOX(&permute_tokens));
  library.impl("unpermute_tokens", TORCH_BOX(&unpermute_tokens));
  library.impl("unpermute_tokens_backward", TORCH_BOX(&unpermute_tokens_backward));
}

}  // namespace mmk
