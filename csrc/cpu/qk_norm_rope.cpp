// Norm and rotary embedding of queries and keys on the CPU: checks, tensors, threads; the arithmetic is in
// qk_norm_rope.tier.cpp.
#include "qk_norm_rope.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../common/arguments.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/scratch.h"
#include "core/tier.h"
#include "core/trace.h"

namespace mmk {
namespace {

void check_last_dimension(const Tensor& tensor, const char* name) {
  const std::int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0, name,
        "the last dimension must be contiguous, got stride ", tensor.stride(last));
}

void check_heads(const Tensor& tensor, const char* name, const Tensor& q) {
  check(tensor.dim() == 4, name, "expected [B, H, L, D], got ", tensor.dim(), " dimensions");
  check(on_one_device(tensor, q), name, "expected the device of q");
  check(tensor.scalar_type() == q.scalar_type(), name, "expected the dtype of q");
  check_last_dimension(tensor, name);
}

// The weight of a side, which only a norm has.
Parameter weight_of(const MaybeTensor& weight, const char* name, const Tensor& q, std::int64_t norm) {
  check(norm != 0 || !weight.has_value(), name, "expected none without a norm");
  return Parameter(weight, name, q, q.size(3));
}

HeadRows head_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The shape of one call, its angles and its norm; the sides are added to `call`.
struct Problem {
  QkNormRope call{};
  int dtype;
  bool is_double;

  Problem(const Tensor& q, const Tensor& k, const MaybeTensor& cos, const MaybeTensor& sin, double eps, std::int64_t norm)
      : dtype(dtype_index(q, "q")), is_double(dtype == 3) {
    check_heads(q, "q", q);
    check_heads(k, "k", q);
    check(k.size(0) == q.size(0) && k.size(3) == q.size(3), "k", "expected B = ", q.size(0), " and D = ", q.size(3),
          " of q, got ", k.size(0), " and ", k.size(3));
    check(norm >= 0 && norm <= static_cast<std::int64_t>(QkNorm::layer), "norm", "expected 0 to 3, got ", norm);
    call.channels = q.size(3);
    call.norm = static_cast<QkNorm>(norm);
    call.eps = eps;
    call.block_rows =
        std::clamp<std::int64_t>(qk_block_elements / std::max<std::int64_t>(1, call.channels), 1, qk_max_block_rows);
    const std::int64_t line = 64 / (is_double ? sizeof(double) : sizeof(float));
    call.scratch_row = rounded_up(call.channels, line);
    check(cos.has_value() == sin.has_value(), "sin", "expected with cos, or neither");
    if (!cos.has_value() || !sin.has_value()) return;
    check(k.size(2) == q.size(2), "k", "expected the ", q.size(2), " tokens of q, which cos and sin are for, got ",
          k.size(2));
    call.cos = angles(*cos, "cos", q);
    call.sin = angles(*sin, "sin", q);
    check(sin->scalar_type() == cos->scalar_type(), "sin", "expected the dtype of cos");
    call.pairs = cos->size(cos->dim() - 1);
    check(sin->size(sin->dim() - 1) == call.pairs, "sin", "expected the ", call.pairs, " pairs of cos, got ",
          sin->size(sin->dim() - 1));
    const ScalarType dtype_of_angles = cos->scalar_type();
    call.wide_angles = dtype_of_angles == ScalarType::Float || dtype_of_angles == ScalarType::Double;
  }

  void add(const Tensor& x, const void* weight, const Tensor& out) {
    call.side[call.sides++] = {x.size(1), head_rows(x), {}, weight, out.mutable_data_ptr(), nullptr};
    call.length = x.size(2);
    call.tokens = x.size(0) * call.length;
  }

  // Elements of a token: its heads of all sides.
  std::int64_t token_elements() const {
    std::int64_t heads = 0;
    for (int s = 0; s < call.sides; ++s) heads += call.side[s].heads;
    return heads * call.channels;
  }

  std::size_t scratch_bytes() const {
    return static_cast<std::size_t>(2 * (qk_run_tokens + call.block_rows) * call.scratch_row) *
           (is_double ? sizeof(double) : sizeof(float));
  }

 private:
  RopeAngles angles(const Tensor& tensor, const char* name, const Tensor& q) const {
    check_beside(tensor, name, q);
    const std::int64_t dims = tensor.dim();
    check(dims == 2 || dims == 3, name, "expected [L, P] or [B, L, P], got ", dims, " dimensions");
    check(tensor.size(dims - 2) == q.size(2) && tensor.size(dims - 1) <= call.channels / 2, name, "expected L = ", q.size(2),
          " and at most ", call.channels / 2, " pairs, got ", tensor.size(dims - 2), " and ", tensor.size(dims - 1));
    const bool by_sample = dims == 3 && tensor.size(0) != 1;
    check(!by_sample || tensor.size(0) == q.size(0), name, "expected ", q.size(0), " samples or 1, got ", tensor.size(0));
    check_last_dimension(tensor, name);
    return {tensor.const_data_ptr(), by_sample ? tensor.stride(0) : 0, tensor.stride(dims - 2)};
  }
};

Tensor new_like(const Tensor& x) {
  const std::int64_t sizes[4] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  return new_tensor(x, sizes, 4, dtype_of(x));
}

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor q, Tensor k, MaybeTensor cos, MaybeTensor sin, MaybeTensor q_weight,
                                        MaybeTensor k_weight, double eps, std::int64_t norm, bool interleaved) {
  Problem problem(q, k, cos, sin, eps, norm);
  const Parameter q_weights = weight_of(q_weight, "q_weight", q, norm), k_weights = weight_of(k_weight, "k_weight", q, norm);
  Tensor q_out = new_like(q), k_out = new_like(k);
  const auto tier = tier_for(qk_norm_rope_kernels_tiers, problem.is_double);
  trace("qk_norm_rope", tier.name);
  const auto kernel = tier.kernels->forward[interleaved][problem.dtype];
  const auto run = [&] {
    parallel_for(problem.call.tokens, problem.token_elements(), [&](std::int64_t begin, std::int64_t end) {
      kernel(problem.call, begin, end, scratch(ScratchUse::rows, problem.scratch_bytes()));
    });
    problem.call.sides = 0;
  };
  problem.add(q, q_weights.data(), q_out);
  if (k.size(2) != q.size(2)) run();
  problem.add(k, k_weights.data(), k_out);
  run();
  return {q_out, k_out};
}

// Gradients of q, k and their weights; an empty tensor where none is needed, or where no gradient came for that side.
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(MaybeTensor grad_q, MaybeTensor grad_k, Tensor q, Tensor k,
                                                                 MaybeTensor cos, MaybeTensor sin, MaybeTensor q_weight,
                                                                 MaybeTensor k_weight, double eps, std::int64_t norm,
                                                                 bool interleaved, bool need_q_weight, bool need_k_weight) {
  Problem problem(q, k, cos, sin, eps, norm);
  const std::int64_t channels = q.size(3);
  const Parameter q_weights = weight_of(q_weight, "q_weight", q, norm), k_weights = weight_of(k_weight, "k_weight", q, norm);
  const auto tier = tier_for(qk_norm_rope_kernels_tiers, problem.is_double);
  trace("qk_norm_rope_backward", tier.name);
  const auto kernel = tier.kernels->backward[interleaved][problem.dtype];
  const std::int32_t dtype_of_sums = problem.is_double ? dtype_of(q) : aoti_torch_dtype_float32();

  struct Side {
    const MaybeTensor& gradient;
    const Tensor& x;
    const MaybeTensor& weight;
    const void* weights;
    bool need_weight;
    Tensor grad_x, grad_weight;
    std::optional<Tensor> sums;
  };
  const auto side_of = [&](const MaybeTensor& gradient, const char* name, const Tensor& x, const MaybeTensor& weight,
                           const void* weights, bool need_weight) {
    const bool has = gradient.has_value();
    if (has) {
      check_heads(*gradient, name, q);
      for (std::int64_t dim = 0; dim < 4; ++dim)
        check(gradient->size(dim) == x.size(dim), name, "expected ", x.size(dim), " in dimension ", dim, ", got ",
              gradient->size(dim));
    }
    const bool needed = has && need_weight && weight.has_value();
    const std::int32_t dtype_of_weight = weight.has_value() ? dtype_of(*weight) : dtype_of(x);
    return Side{gradient, x, weight, weights, needed, has ? new_like(x) : new_tensor(x, {0}, dtype_of(x)),
                new_tensor(x, {needed ? channels : 0}, dtype_of_weight), std::nullopt};
  };
  Side sides[2] = {side_of(grad_q, "grad_q", q, q_weight, q_weights.data(), need_q_weight),
                   side_of(grad_k, "grad_k", k, k_weight, k_weights.data(), need_k_weight)};

  const auto run = [&](int first, int last) {
    QkNormRope& call = problem.call;
    call.sides = 0;
    Side* taking_part[2];
    for (int s = first; s <= last; ++s) {
      if (!sides[s].gradient.has_value()) continue;
      problem.add(sides[s].x, sides[s].weights, sides[s].grad_x);
      call.side[call.sides - 1].gradient = head_rows(*sides[s].gradient);
      taking_part[call.sides - 1] = &sides[s];
    }
    if (call.sides == 0) return;
    const std::int64_t rows = call.tokens * (channels > 0 ? problem.token_elements() / channels : 0);
    call.pieces = std::max<std::int64_t>(1, std::min(call.tokens, chunks_of(rows)));
    for (int s = 0; s < call.sides; ++s) {
      if (!taking_part[s]->need_weight) continue;
      taking_part[s]->sums = new_tensor(q, {call.pieces, channels}, dtype_of_sums);
      call.side[s].sum_weight = taking_part[s]->sums->mutable_data_ptr();
    }
    const std::int64_t piece_elements = call.tokens * problem.token_elements() / call.pieces;
    parallel_for(call.pieces, piece_elements, [&](std::int64_t begin, std::int64_t end) {
      kernel(call, begin, end, scratch(ScratchUse::rows, problem.scratch_bytes()));
    });
    for (int s = 0; s < call.sides; ++s)
      if (taking_part[s]->need_weight && channels > 0)
        reduce_chunks(call.side[s].sum_weight, call.pieces, channels, taking_part[s]->grad_weight);
  };
  if (q.size(2) == k.size(2)) {
    run(0, 1);
  } else {
    run(0, 0);
    run(1, 1);
  }
  return {sides[0].grad_x, sides[1].grad_x, sides[0].grad_weight, sides[1].grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}

}  // namespace mmk
