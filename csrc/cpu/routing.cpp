// Routing of tokens to experts on the CPU: checks, tensors, threads, capacity and the experts' own choice; the arithmetic is in
// routing.tier.cpp.
#include "routing.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/arguments.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/scratch.h"
#include "core/tier.h"
#include "core/trace.h"

namespace mmk {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // weights, sums, ids, counts

// Logits, the kernels for them, and what their routing is written to.
struct Problem {
  const Tensor& logits;
  int dtype;
  std::int64_t tokens, experts;
  RouteRows rows;
  Tier<RoutingKernels> tier;

  Problem(const Tensor& given, RouteScore score)
      : logits(given),
        dtype(dtype_index(given, "logits")),
        tier(tier_for(routing_kernels_tiers, dtype == 3)) {
    check(given.dim() == 2 && given.size(1) >= 1, "logits", "expected [T, E] of at least one expert");
    tokens = given.size(0);
    experts = given.size(1);
    check(experts == 1 || tokens == 0 || given.stride(1) == 1, "logits", "the last dimension must be contiguous");
    rows = {given.const_data_ptr(), given.stride(0), experts, score};
  }

  std::int32_t wide() const { return dtype == 3 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(); }
  std::int64_t wide_bytes() const { return dtype == 3 ? 8 : 4; }
  void* row_scratch() const {
    return scratch_of<char>(ScratchUse::rows, route_scratch * rounded_up(experts, route_width) * wide_bytes());
  }
};

std::int64_t* data_of(Tensor& tensor) { return static_cast<std::int64_t*>(tensor.mutable_data_ptr()); }

void refuse_nan(std::int64_t row) {
  if (row >= 0) check(false, "logits", "expected numbers, got a NaN for token ", row);
}

// f(begin, end, nan_row) over the tokens; an error where a row has a NaN in it.
template <class F>
void each_row(const Problem& problem, const F& f) {
  std::atomic<std::int64_t> found{-1};
  parallel_for(problem.tokens, 8 * problem.experts, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t nan_row = -1;
    f(begin, end, &nan_row);
    if (nan_row >= 0) found.store(nan_row);
  });
  refuse_nan(found.load());
}

void count(const std::int64_t* ids, std::int64_t tokens, std::int64_t slots, std::int64_t experts, std::int64_t* counts) {
  std::fill(counts, counts + 2 * experts, 0);
  for (std::int64_t token = 0; token < tokens; ++token, ids += slots) {
    for (std::int64_t slot = 0; slot < slots; ++slot)
      if (ids[slot] >= 0) ++counts[ids[slot]];
    if (slots > 0 && ids[0] >= 0) ++counts[experts + ids[0]];
  }
}

// All first choices keep their slots first, in the order of the tokens, then all second ones.
void drop_beyond(std::int64_t capacity, std::int64_t* ids, std::int64_t tokens, std::int64_t slots, std::int64_t experts) {
  std::vector<std::int64_t> used(static_cast<std::size_t>(experts), 0);
  for (std::int64_t slot = 0; slot < slots; ++slot)
    for (std::int64_t token = 0; token < tokens; ++token) {
      std::int64_t& id = ids[token * slots + slot];
      if (id >= 0 && used[static_cast<std::size_t>(id)]++ >= capacity) id = -1;
    }
}

// f(begin, end, sums) over runs of tokens cut by their number alone; the runs' sums are added in their order.
template <class F>
void each_chunk(const Problem& problem, Tensor& sums, const F& f) {
  const std::int64_t chunks = chunks_of(problem.tokens), length = 2 * problem.experts + 2;
  char* partial = scratch_of<char>(ScratchUse::partial_sums, chunks * length * problem.wide_bytes());
  parallel_for(chunks, problem.tokens / chunks * 8 * problem.experts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk)
      f(problem.tokens * chunk / chunks, problem.tokens * (chunk + 1) / chunks, partial + chunk * length * problem.wide_bytes());
  });
  reduce_chunks(partial, chunks, length, sums);
}

void weigh(const Problem& problem, std::int64_t slots, bool normalize, const Tensor& ids, Tensor& weights, Tensor& sums) {
  const RouteWeights call{problem.rows, slots, normalize, static_cast<const std::int64_t*>(ids.const_data_ptr()),
                          weights.mutable_data_ptr()};
  each_chunk(problem, sums, [&](std::int64_t begin, std::int64_t end, void* partial) {
    problem.tier.kernels->weigh[problem.dtype](call, begin, end, partial, problem.row_scratch());
  });
}

// The plain kinds of routing, of float logits: lanes of tokens.
void route_by_lanes(const Problem& problem, std::int64_t slots, bool normalize, Tensor& ids, Tensor& weights, Tensor& sums) {
  const RouteLanes call{problem.rows, slots, normalize, data_of(ids), static_cast<float*>(weights.mutable_data_ptr())};
  const auto kernel = routing_lanes_kernels_tiers.choose().kernels->route[problem.dtype];
  std::atomic<std::int64_t> found{-1};
  each_chunk(problem, sums, [&](std::int64_t begin, std::int64_t end, void* partial) {
    std::int64_t nan_row = -1;
    kernel(call, begin, end, partial, scratch_of<float>(ScratchUse::rows, 3 * route_width * problem.experts), &nan_row);
    if (nan_row >= 0) found.store(nan_row);
  });
  refuse_nan(found.load());
}

Results results_of(const Problem& problem, std::int64_t slots) {
  const std::int32_t int64 = aoti_torch_dtype_int64();
  return {new_tensor(problem.logits, {problem.tokens, slots}, problem.wide()),
          new_tensor(problem.logits, {2 * problem.experts + 2}, problem.wide()),
          new_tensor(problem.logits, {problem.tokens, slots}, int64), new_tensor(problem.logits, {2, problem.experts}, int64)};
}

RouteScore score_of(std::int64_t code) {
  check(code == 0 || code == 1, "score", "expected 0 or 1, got ", code);
  return static_cast<RouteScore>(code);
}

Results route(Tensor logits, MaybeTensor selection, std::int64_t top_k, std::int64_t score, bool normalize, double top_p,
              std::int64_t num_groups, std::int64_t top_groups, std::int64_t group_score, std::int64_t capacity) {
  const Problem problem(logits, score_of(score));
  check(top_k >= 1 && top_k <= problem.experts, "top_k", "expected 1 to ", problem.experts, ", got ", top_k);
  check(top_p >= 0 && top_p <= 1, "top_p", "expected 0 to 1, got ", top_p);
  check(num_groups >= 1 && problem.experts % num_groups == 0, "num_groups", "expected a divisor of ", problem.experts, ", got ",
        num_groups);
  check(top_groups >= 1 && top_groups <= num_groups, "top_groups", "expected 1 to ", num_groups, ", got ", top_groups);
  check(capacity >= -1, "capacity", "expected at least 0, got ", capacity);
  RouteChoice call{problem.rows, nullptr, 0, top_k, top_p, num_groups, top_groups, group_score == 1, nullptr, nullptr};
  if (selection.has_value()) {
    check(dtype_of(*selection) == problem.wide() && on_one_device(*selection, logits), "selection",
          "expected accumulators on the device of logits");
    const std::int64_t dims = selection->dim();
    check((dims == 1 || (dims == 2 && selection->size(0) == problem.tokens)) && selection->size(dims - 1) == problem.experts &&
              (problem.experts == 1 || selection->stride(dims - 1) == 1),
          "selection", "expected [E] or [T, E] with a contiguous last dimension");
    call.selection = selection->const_data_ptr();
    call.selection_stride = dims == 2 ? selection->stride(0) : 0;
  }
  auto [weights, sums, ids, counts] = results_of(problem, top_k);
  trace("route", problem.tier.name);
  const bool plain = !selection.has_value() && top_p >= 1 && top_groups == num_groups && capacity < 0;
  if (plain && problem.dtype != 3 && top_k <= route_lanes_slots && problem.experts <= route_lanes_experts) {
    route_by_lanes(problem, top_k, normalize, ids, weights, sums);
    count(data_of(ids), problem.tokens, top_k, problem.experts, data_of(counts));
    return {weights, sums, ids, counts};
  }
  call.ids = data_of(ids);
  each_row(problem, [&](std::int64_t begin, std::int64_t end, std::int64_t* nan_row) {
    RouteChoice own = call;
    own.nan_row = nan_row;
    problem.tier.kernels->choose[problem.dtype](own, begin, end, problem.row_scratch());
  });
  count(data_of(ids), problem.tokens, top_k, problem.experts, data_of(counts));
  if (capacity >= 0) drop_beyond(capacity, data_of(ids), problem.tokens, top_k, problem.experts);
  weigh(problem, top_k, normalize, ids, weights, sums);
  return {weights, sums, ids, counts};
}

// --- the experts' own choice --------------------------------------------------------------------------------------------------
// The `capacity` tokens with the highest of one expert's probabilities in a group: ties go to the earlier token.
template <class A>
void take_best(const A* probabilities, std::int64_t experts, std::int64_t tokens, std::int64_t capacity, char* taken) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(tokens));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  const auto before = [&](std::int64_t a, std::int64_t b) {
    const A left = probabilities[a * experts], right = probabilities[b * experts];
    return left > right || (left == right && a < b);
  };
  if (capacity < tokens) std::nth_element(order.begin(), order.begin() + capacity, order.end(), before);
  for (std::int64_t i = 0; i < capacity; ++i) taken[order[static_cast<std::size_t>(i)] * experts] = 1;
}

Results expert_choice(Tensor logits, std::int64_t slots, std::int64_t capacity, std::int64_t group) {
  const Problem problem(logits, RouteScore::softmax);
  const std::int64_t tokens = problem.tokens, experts = problem.experts;
  check(slots >= 1 && slots <= experts, "top_k", "expected 1 to ", experts, ", got ", slots);
  check(tokens == 0 || (group >= 1 && tokens % group == 0), "group_size", "expected a divisor of ", tokens, ", got ", group);
  check(capacity >= 0 && capacity <= group, "capacity", "expected 0 to ", group, ", got ", capacity);
  auto [weights, sums, ids, counts] = results_of(problem, slots);
  trace("expert_choice", problem.tier.name);
  Workspace room(ScratchUse::experts);
  const std::int64_t probabilities_at = room.add(tokens * experts * problem.wide_bytes()), taken_at = room.add(tokens * experts);
  room.allocate();
  each_row(problem, [&](std::int64_t begin, std::int64_t end, std::int64_t* nan_row) {
    problem.tier.kernels->probabilities[problem.dtype](problem.rows, begin, end, room.at(probabilities_at), problem.row_scratch(),
                                                       nan_row);
  });
  std::fill(room.at(taken_at), room.at(taken_at) + tokens * experts, char{0});
  const std::int64_t groups = tokens == 0 ? 0 : tokens / group;
  parallel_for(groups * experts, 16 * group, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t first = task / experts * group * experts + task % experts;
      char* taken = room.at(taken_at) + first;
      if (problem.dtype == 3) {
        take_best(reinterpret_cast<const double*>(room.at(probabilities_at)) + first, experts, group, capacity, taken);
      } else {
        take_best(reinterpret_cast<const float*>(room.at(probabilities_at)) + first, experts, group, capacity, taken);
      }
    }
  });
  std::int64_t* to = data_of(ids);
  for (std::int64_t token = 0; token < tokens; ++token, to += slots) {
    std::int64_t used = 0;
    for (std::int64_t expert = 0; expert < experts && used < slots; ++expert)
      if (room.at(taken_at)[token * experts + expert] != 0) to[used++] = expert;
    std::fill(to + used, to + slots, -1);
  }
  scratch_done(ScratchUse::experts);
  count(data_of(ids), tokens, slots, experts, data_of(counts));
  weigh(problem, slots, false, ids, weights, sums);
  return {weights, sums, ids, counts};
}

Tensor route_backward(Tensor grad_weights, Tensor grad_sums, Tensor logits, Tensor expert_ids, std::int64_t score, bool normalize) {
  const Problem problem(logits, score_of(score));
  check(expert_ids.dim() == 2 && expert_ids.size(0) == problem.tokens && expert_ids.is_contiguous() &&
            expert_ids.scalar_type() == ScalarType::Long,
        "expert_ids", "expected contiguous [T, K] int64");
  const std::int64_t slots = expert_ids.size(1);
  check(slots <= problem.experts, "expert_ids", "expected at most ", problem.experts, " slots, got ", slots);
  for (const auto& [gradient, name, size] : {std::tuple{&grad_weights, "grad_weights", problem.tokens * slots},
                                             std::tuple{&grad_sums, "grad_sums", 2 * problem.experts + 2}})
    check(gradient->numel() == size && gradient->is_contiguous() && dtype_of(*gradient) == problem.wide() &&
              on_one_device(*gradient, logits),
          name, "expected ", size, " contiguous accumulators");
  const auto* ids = static_cast<const std::int64_t*>(expert_ids.const_data_ptr());
  for (std::int64_t slot = 0; slot < problem.tokens * slots; ++slot)
    check(ids[slot] >= -1 && ids[slot] < problem.experts, "expert_ids", "expected -1 to ", problem.experts - 1, ", got ", ids[slot]);
  Tensor grad = new_tensor(logits, {problem.tokens, problem.experts}, dtype_of(logits));
  trace("route_backward", problem.tier.name);
  const RouteGradient call{problem.rows, slots, normalize, ids, grad_weights.const_data_ptr(), grad_sums.const_data_ptr(),
                           grad.mutable_data_ptr()};
  parallel_for(problem.tokens, 8 * problem.experts, [&](std::int64_t begin, std::int64_t end) {
    problem.tier.kernels->gradient[problem.dtype](call, begin, end, problem.row_scratch());
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("route", TORCH_BOX(&route));
  library.impl("expert_choice", TORCH_BOX(&expert_choice));
  library.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace mmk
