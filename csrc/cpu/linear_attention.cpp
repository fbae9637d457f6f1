// Linear attention on the CPU: checks, tensors, threads; the arithmetic is in linear_attention*.tier.cpp.
#include "linear_attention.h"

#include <cmath>
#include <tuple>

#include "attention_operands.h"
#include "core/cache.h"
#include "core/tier.h"
#include "core/trace.h"

namespace mmk {
namespace {

// The arguments of a call, checked, and the call made of them.
class Problem {
 public:
  LinearAttentionCall call{};
  bool packed = false;
  int dtype = 0;
  std::int32_t wide = 0;  // the dtype of the state

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, const MaybeTensor& state_s,
          const MaybeTensor& state_z, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k, std::int64_t feature_map,
          bool is_causal, bool normalize, double eps) {
    packed = cu_seqlens_q.has_value();
    check(cu_seqlens_k.has_value() == packed, "cu_seqlens_k", "expected with cu_seqlens_q, or neither");
    const std::int64_t dims = packed ? 3 : 4, length = packed ? 0 : 2;
    dtype = dtype_index(q, "q");
    wide = is_double() ? dtype_of(q) : aoti_torch_dtype_float32();
    check(q.dim() == dims, "q", "expected ", dims, " dimensions, got ", q.dim());
    check_operand(q, "q", q);
    check_operand(k, "k", q);
    check_operand(v, "v", q);
    check(packed || k.size(0) == q.size(0), "k", "expected the batch of q");
    call.dim = q.size(dims - 1);
    call.value_dim = v.size(dims - 1);
    check(k.size(dims - 1) == call.dim, "k", "expected the channels of q");
    check(call.dim > 0, "q", "expected at least one channel");
    for (std::int64_t dim = 0; dim < dims - 1; ++dim) check(v.size(dim) == k.size(dim), "v", "expected the shape of k");
    call.heads = q.size(1);
    call.kv_heads = k.size(1);
    check(call.kv_heads > 0 && call.heads % call.kv_heads == 0, "k", "expected heads that divide q's ", call.heads);
    call.len_q = q.size(length);
    call.len_k = k.size(length);
    check(!is_causal || call.len_q == call.len_k, "is_causal", "expected as many keys as queries, got ", call.len_k, " and ",
          call.len_q);
    call.batch = packed ? read_lengths(*cu_seqlens_q, "cu_seqlens_q", q, cu_q_, call.len_q) : q.size(0);
    if (packed) {
      const std::int64_t batch = read_lengths(*cu_seqlens_k, "cu_seqlens_k", q, cu_k_, call.len_k);
      check(batch == call.batch, "cu_seqlens_k", "expected as many as cu_seqlens_q");
      check(!is_causal || cu_q_ == cu_k_, "cu_seqlens_k", "expected cu_seqlens_q again where attention is causal");
      call.cu_q = cu_q_.data();
      call.cu_k = cu_k_.data();
    }
    call.q = heads_operand(q, packed);
    call.k = heads_operand(k, packed);
    call.v = heads_operand(v, packed);
    if (mask.has_value()) read_mask(*mask, q, k.size(length));
    check(state_s.has_value() == state_z.has_value(), "state", "expected both sums or none");
    if (state_s.has_value()) {
      check_state(*state_s, *state_z, "state", q);
      call.first_s = state_s->const_data_ptr();
      call.first_z = state_z->const_data_ptr();
    }
    check(feature_map >= 0 && feature_map < feature_maps, "feature_map", "expected 0 to ", feature_maps - 1, ", got ", feature_map);
    call.feature_map = static_cast<FeatureMap>(feature_map);
    check(call.feature_map != FeatureMap::softmax || !(is_causal || state_s.has_value()), "feature_map",
          "softmax is neither causal nor has it a state");
    check(eps >= 0 && std::isfinite(eps), "eps", "expected a number of at least 0, got ", eps);
    call.is_causal = is_causal;
    call.normalize = normalize;
    call.eps = eps;
    call.segments = linear_attention_segments(call, call.len_k);
  }
  Problem(const Problem&) = delete;

  bool is_double() const { return dtype == 3; }
  bool is_bfloat16() const { return dtype == 1; }
  std::int64_t pairs() const { return call.batch * call.kv_heads; }
  std::int64_t scratch_bytes() const { return linear_attention_scratch(call) * (is_double() ? 8 : 4); }
  // The cost of `rows` rows of products with the state, in the elements of parallel.h.
  std::int64_t work(std::int64_t rows) const { return std::max<std::int64_t>(1, rows * call.dim * (call.value_dim + 16) / 16); }

  void check_operand(const Tensor& x, const char* name, const Tensor& q) const {
    check(on_one_device(x, q), name, "expected the device of q");
    check(x.scalar_type() == q.scalar_type(), name, "expected the dtype of q");
    check(x.dim() == q.dim(), name, "expected ", q.dim(), " dimensions, got ", x.dim());
    const std::int64_t last = x.dim() - 1;
    check(x.size(last) <= 1 || x.stride(last) == 1 || x.numel() == 0, name, "the last dimension must be contiguous, got stride ",
          x.stride(last));
  }

  // S and z of every pair, or gradients of them.
  void check_state(const Tensor& s, const Tensor& z, const char* name, const Tensor& q) const {
    const std::int64_t sizes[] = {call.batch, call.kv_heads, call.dim, call.value_dim};
    std::int64_t dims = 4;
    for (const Tensor* x : {&s, &z}) {
      check(on_one_device(*x, q) && dtype_of(*x) == wide, name, "expected the device of q and the dtype of its sums");
      check(x->dim() == dims && x->is_contiguous(), name, "expected contiguous sums (S, z)");
      for (std::int64_t dim = 0; dim < dims; ++dim)
        check(x->size(dim) == sizes[dim], name, "expected S [B, Hk, D, Dv] and z [B, Hk, D], got ", x->size(dim), " instead of ",
              sizes[dim]);
      --dims;
    }
  }

  Tensor new_state(const Tensor& q, bool sums_of_values) const {
    if (sums_of_values) return new_tensor(q, {call.batch, call.kv_heads, call.dim, call.value_dim}, wide);
    return new_tensor(q, {call.batch, call.kv_heads, call.dim}, wide);
  }
  // States of every segment, where there are several.
  std::optional<Tensor> new_partial(const Tensor& q) const {
    if (call.segments == 1) return std::nullopt;
    return new_tensor(q, {pairs() * call.segments, call.dim * (call.value_dim + 1)}, wide);
  }

 private:
  void read_mask(const Tensor& mask, const Tensor& q, std::int64_t keys) {
    check(on_one_device(mask, q), "mask", "expected the device of q");
    check(mask.scalar_type() == ScalarType::Bool, "mask", "expected bool");
    const std::int64_t dims = packed ? 1 : 2;
    check(mask.dim() == dims && mask.size(dims - 1) == keys, "mask", "expected one a key, ", keys);
    check(packed || mask.size(0) == 1 || mask.size(0) == call.batch, "mask", "expected [B or 1, Lk]");
    if (mask.numel() == 0) return;
    call.mask = static_cast<const std::uint8_t*>(mask.const_data_ptr());
    call.mask_batch = packed || mask.size(0) == 1 ? 0 : mask.stride(0);
    call.mask_row = mask.stride(dims - 1);
  }

  std::vector<std::int64_t> cu_q_, cu_k_;
};

// Kernels and the name that the trace has for them.
template <class Kernels>
Tier<Kernels> tier_of(const Problem& problem, const Tiers<Kernels>& tiers, const Kernels* pairs) {
  if (pairs != nullptr && problem.is_bfloat16() && has_bf16_pairs(/*without_tiles=*/true)) return {pairs, bf16_pairs_name};
  return tier_for(tiers, problem.is_double());
}
#if MMK_X86_TIERS && !MMK_EMULATE_AVX512
#define MMK_PAIRS(name) &avx512_bf16::name
#else
#define MMK_PAIRS(name) nullptr
#endif
Tier<LinearAttentionTier> forward_tier(const Problem& problem) {
  return tier_of<LinearAttentionTier>(problem, linear_attention_kernels_tiers, MMK_PAIRS(linear_attention_kernels));
}
Tier<LinearAttentionBackwardTier> backward_tier(const Problem& problem) {
  return tier_of<LinearAttentionBackwardTier>(problem, linear_attention_backward_kernels_tiers,
                                              MMK_PAIRS(linear_attention_backward_kernels));
}
#undef MMK_PAIRS

template <class Kernel, class Call>
void run(const Problem& problem, const Call& call, std::int64_t items, std::int64_t work, Kernel kernel) {
  run_attention(items, work, problem.scratch_bytes(),
                [&](std::int64_t begin, std::int64_t end, void* scratch) { kernel(call, begin, end, scratch); });
}

// Calls f with a null pointer to the type of accumulators.
template <class F>
void with_accumulators(const Problem& problem, const F& f) {
  if (problem.is_double()) {
    f(static_cast<double*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// Adds the sums of all segments, in their order or against it, to `first` (null: zero). A segment's sums become what those
// before it add up to; the total goes to s and z where these are not null.
template <class A>
void join(const Problem& problem, void* partial, const void* first_s, const void* first_z, void* s, void* z, bool reversed) {
  const LinearAttentionCall& call = problem.call;
  const std::int64_t of_s = call.dim * call.value_dim, elements = of_s + call.dim;
  parallel_for(problem.pairs(), call.segments * elements, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> running(static_cast<std::size_t>(elements));
    for (std::int64_t pair = begin; pair < end; ++pair) {
      const auto each = [&](const void* at_s, const void* at_z, const auto& visit) {
        visit(static_cast<A*>(const_cast<void*>(at_s)) + pair * of_s, std::int64_t{0}, of_s);
        visit(static_cast<A*>(const_cast<void*>(at_z)) + pair * call.dim, of_s, call.dim);
      };
      std::fill(running.begin(), running.end(), A(0));
      if (first_z != nullptr)
        each(first_s, first_z, [&](const A* from, std::int64_t at, std::int64_t count) {
          std::copy(from, from + count, running.data() + at);
        });
      for (std::int64_t i = 0; i < call.segments; ++i) {
        const std::int64_t segment = reversed ? call.segments - 1 - i : i;
        A* own = static_cast<A*>(partial) + (pair * call.segments + segment) * elements;
        for (std::int64_t e = 0; e < elements; ++e) {
          const A before = running[static_cast<std::size_t>(e)];
          running[static_cast<std::size_t>(e)] = before + own[e];
          own[e] = before;
        }
      }
      if (z != nullptr)
        each(s, z, [&](A* to, std::int64_t at, std::int64_t count) {
          std::copy(running.data() + at, running.data() + at + count, to);
        });
    }
  });
}

void join(const Problem& problem, void* partial, const void* first_s, const void* first_z, void* s, void* z, bool reversed) {
  with_accumulators(problem, [&]<class A>(A*) { join<A>(problem, partial, first_s, first_z, s, z, reversed); });
}

// Softmax over keys: S / z, where any key counts.
void divide_state(const Problem& problem) {
  const LinearAttentionCall& call = problem.call;
  with_accumulators(problem, [&]<class A>(A*) {
    A* s = static_cast<A*>(call.final_s);
    const A* z = static_cast<const A*>(call.final_z);
    for (std::int64_t d = 0; d < problem.pairs() * call.dim; ++d)
      for (std::int64_t e = 0; z[d] != 0 && e < call.value_dim; ++e) s[d * call.value_dim + e] /= z[d];
  });
}

// The gradient of S / z becomes those of S and of z.
void divide_gradient(const Problem& problem, const LinearAttentionBackward& back) {
  const LinearAttentionCall& call = problem.call;
  with_accumulators(problem, [&]<class A>(A*) {
    const A* s = static_cast<const A*>(call.final_s);
    const A* z = static_cast<const A*>(call.final_z);
    A* grad_s = static_cast<A*>(back.grad_s);
    for (std::int64_t d = 0; d < problem.pairs() * call.dim; ++d) {
      const A divisor = z[d] == 0 ? A(1) : z[d];
      A sum = 0;
      for (std::int64_t e = d * call.value_dim; e < (d + 1) * call.value_dim; ++e) {
        sum += grad_s[e] * s[e];
        grad_s[e] /= divisor;
      }
      static_cast<A*>(back.grad_z)[d] = -sum / divisor;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor state_s,
                                                    MaybeTensor state_z, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
                                                    std::int64_t feature_map, bool is_causal, bool normalize, double eps) {
  Problem problem(q, k, v, mask, state_s, state_z, cu_seqlens_q, cu_seqlens_k, feature_map, is_causal, normalize, eps);
  LinearAttentionCall& call = problem.call;
  Tensor out = new_heads(q, q, call.value_dim, problem.packed);
  Tensor final_s = problem.new_state(q, true), final_z = problem.new_state(q, false);
  const auto tier = forward_tier(problem);
  trace("linear_attention", tier.name);
  if (problem.pairs() == 0) return {out, final_s, final_z};
  call.out = heads_operand(out, problem.packed);
  call.final_s = final_s.mutable_data_ptr();
  call.final_z = final_z.mutable_data_ptr();
  call.stream = exceeds_cache((q.numel() + k.numel() + v.numel() + out.numel()) * static_cast<std::int64_t>(q.element_size()));
  const auto partial = problem.new_partial(q);
  if (partial.has_value()) call.partial = partial->mutable_data_ptr();
  const LinearAttentionKernels& kernels = tier.kernels->kernels[problem.dtype];
  const std::int64_t items = problem.pairs() * call.segments, group = call.heads / call.kv_heads;
  const std::int64_t rows = std::min(call.len_k, call.segments > 1 ? linear_attention_segment : call.len_k);
  if (!is_causal || call.segments > 1) run(problem, call, items, problem.work(rows), kernels.sums);
  if (call.segments > 1) join(problem, call.partial, call.first_s, call.first_z, call.final_s, call.final_z, false);
  if (is_causal) {
    run(problem, call, items, problem.work(2 * (1 + group) * rows), kernels.causal);
    return {out, final_s, final_z};
  }
  if (call.feature_map == FeatureMap::softmax) divide_state(problem);
  run(problem, call, call.batch * call.heads * linear_attention_blocks(call.len_q),
      problem.work(std::min(call.len_q, linear_attention_block)), kernels.queries);
  return {out, final_s, final_z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    Tensor grad_out, MaybeTensor grad_s, MaybeTensor grad_z, Tensor q, Tensor k, Tensor v, MaybeTensor mask, MaybeTensor state_s,
    MaybeTensor state_z, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, Tensor final_s, Tensor final_z,
    std::int64_t feature_map, bool is_causal, bool normalize, double eps) {
  Problem problem(q, k, v, mask, state_s, state_z, cu_seqlens_q, cu_seqlens_k, feature_map, is_causal, normalize, eps);
  const bool packed = problem.packed;
  LinearAttentionBackward back{};
  back.call = problem.call;
  LinearAttentionCall& call = back.call;
  problem.check_operand(grad_out, "grad_out", q);
  for (std::int64_t dim = 0; dim + 1 < q.dim(); ++dim)
    check(grad_out.size(dim) == q.size(dim), "grad_out", "expected the output's shape");
  check(grad_out.size(q.dim() - 1) == call.value_dim, "grad_out", "expected the output's shape");
  problem.check_state(final_s, final_z, "final_s", q);
  if (grad_s.has_value()) problem.check_state(*grad_s, final_z, "grad_s", q);
  if (grad_z.has_value()) problem.check_state(final_s, *grad_z, "grad_z", q);

  Tensor grad_q = new_heads(q, q, call.dim, packed), grad_k = new_heads(q, k, call.dim, packed);
  Tensor grad_v = new_heads(q, k, call.value_dim, packed);
  Tensor grad_state_s = problem.new_state(q, true), grad_state_z = problem.new_state(q, false);
  const auto tier = backward_tier(problem);
  trace("linear_attention_backward", tier.name);
  const std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results{grad_q, grad_k, grad_v, grad_state_s, grad_state_z};
  if (problem.pairs() == 0) return results;

  call.final_s = const_cast<void*>(final_s.const_data_ptr());
  call.final_z = const_cast<void*>(final_z.const_data_ptr());
  back.grad_out = heads_operand(grad_out, packed);
  back.grad_q = heads_operand(grad_q, packed);
  back.grad_k = heads_operand(grad_k, packed);
  back.grad_v = heads_operand(grad_v, packed);
  back.grad_s = grad_state_s.mutable_data_ptr();
  back.grad_z = grad_state_z.mutable_data_ptr();
  call.stream = exceeds_cache(2 * (q.numel() + k.numel() + v.numel()) * static_cast<std::int64_t>(q.element_size()));
  // The kernels take both or none.
  std::optional<Tensor> zeros;
  const auto upstream = [&](const MaybeTensor& given, bool of_s) -> const void* {
    if (given.has_value()) return given->const_data_ptr();
    if (!grad_s.has_value() && !grad_z.has_value()) return nullptr;
    zeros = problem.new_state(q, of_s);
    std::memset(zeros->mutable_data_ptr(), 0, static_cast<std::size_t>(zeros->numel()) * zeros->element_size());
    return zeros->const_data_ptr();
  };
  back.upstream_s = upstream(grad_s, true);
  back.upstream_z = upstream(grad_z, false);

  const LinearAttentionBackwardKernels& kernels = tier.kernels->kernels[problem.dtype];
  const std::int64_t group = call.heads / call.kv_heads;
  const auto segment_rows = [](std::int64_t segments, std::int64_t length) {
    return segments > 1 ? linear_attention_segment : length;
  };
  if (!is_causal) {
    call.segments = linear_attention_segments(call, call.len_q);
    problem.call.segments = call.segments;
    const auto partial = problem.new_partial(q);
    if (partial.has_value()) back.partial = partial->mutable_data_ptr();
    run(problem, back, problem.pairs() * call.segments, problem.work(2 * group * segment_rows(call.segments, call.len_q)),
        kernels.queries);
    if (call.segments > 1) join(problem, back.partial, back.upstream_s, back.upstream_z, back.grad_s, back.grad_z, false);
    if (call.feature_map == FeatureMap::softmax) {
      problem.call.final_s = call.final_s;
      problem.call.final_z = call.final_z;
      divide_gradient(problem, back);
    }
    const bool whole = call.feature_map == FeatureMap::softmax;
    run(problem, back, problem.pairs() * (whole ? 1 : linear_attention_blocks(call.len_k)),
        problem.work(2 * (whole ? call.len_k : std::min(call.len_k, linear_attention_block))), kernels.keys);
    return results;
  }

  const std::int64_t rows = packed ? 2 * call.heads * q.size(0) : 2 * call.batch * call.heads * call.len_q;
  Tensor totals = new_tensor(q, {rows}, problem.wide);
  back.totals = totals.mutable_data_ptr();
  back.totals_part = rows / 2;
  back.totals_head = packed ? q.size(0) : call.len_q;
  back.totals_batch = packed ? 0 : call.heads * call.len_q;
  const auto partial = problem.new_partial(q), partial_gradients = problem.new_partial(q);
  const std::int64_t items = problem.pairs() * call.segments, length = segment_rows(call.segments, call.len_k);
  if (call.segments > 1) {
    call.partial = partial->mutable_data_ptr();
    back.partial = partial_gradients->mutable_data_ptr();
    const LinearAttentionKernels& forward = forward_tier(problem).kernels->kernels[problem.dtype];
    run(problem, call, items, problem.work(length), forward.sums);
    join(problem, call.partial, call.first_s, call.first_z, nullptr, nullptr, false);
  }
  run(problem, back, items, problem.work(4 * group * length), kernels.causal_queries);
  if (call.segments > 1) join(problem, back.partial, back.upstream_s, back.upstream_z, back.grad_s, back.grad_z, true);
  run(problem, back, items, problem.work(4 * group * length), kernels.causal_keys);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("linear_attention", TORCH_BOX(&linear_attention));
  library.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
}

}  // namespace mmk
