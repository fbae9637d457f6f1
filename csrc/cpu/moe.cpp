// Experts on the CPU: slots sorted by expert, each expert's rows gathered as they are packed, the results summed by token. The
// products are linear_products.h's.
//
// T tokens, K slots a token, S slots in use; E experts, C channels, H hidden channels, N outputs.
#include "moe.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../common/arguments.h"
#include "../common/matrix.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/scratch.h"
#include "core/tier.h"
#include "core/trace.h"
#include "expert_order.h"
#include "linear_operands.h"
#include "linear_products.h"

namespace mmk {
namespace {

// [T, C] with contiguous rows.
struct Tokens {
  const void* data;
  std::int64_t count, channels, stride;
  Number number;

  Tokens(const Tensor& x, const char* name) : number(static_cast<Number>(dtype_index(x, name))) {
    check(x.dim() == 2, name, "expected [T, C], got ", x.dim(), " dimensions");
    const Rows rows(x, name);
    data = x.const_data_ptr();
    count = rows.rows;
    channels = rows.cols;
    stride = rows.stride;
  }
  std::int64_t size() const { return static_cast<std::int64_t>(bytes_of(number)); }
};

const std::int64_t* ids_of(const Tensor& ids, std::int64_t dims, const char* name, const Tensor& x) {
  check(ids.scalar_type() == ScalarType::Long, name, "expected int64");
  check(ids.dim() == dims && ids.is_contiguous() && ids.size(0) == x.size(0), name, "expected one contiguous row a token");
  check(on_one_device(ids, x), name, "expected the device of x");
  return static_cast<const std::int64_t*>(ids.const_data_ptr());
}

// [E, n] biases as accumulators, one row an expert.
class Biases {
 public:
  Biases(const MaybeTensor& bias, const char* name, const Tensor& x, std::int64_t experts, std::int64_t n)
      : rows_(flat(bias, name, experts, n), name, x, experts * n), row_bytes_(n * (x.scalar_type() == ScalarType::Double ? 8 : 4)) {}

  const void* of(std::int64_t expert) const {
    return rows_.data() == nullptr ? nullptr : static_cast<const char*>(rows_.data()) + expert * row_bytes_;
  }

 private:
  static MaybeTensor flat(const MaybeTensor& bias, const char* name, std::int64_t experts, std::int64_t n) {
    if (!bias.has_value()) return std::nullopt;
    check(bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == n && bias->is_contiguous(), name,
          "expected contiguous [", experts, ", ", n, "]");
    return torch::stable::flatten(*bias);
  }

  Parameter rows_;
  std::int64_t row_bytes_;
};

// f(expert) for every expert with rows. Where all have few, an expert is one thread's; else all threads share in each. The bits
// are the same either way.
template <class F>
void each_expert(const ExpertOrder& order, std::int64_t experts, std::int64_t work_of_row, const F& f) {
  constexpr std::int64_t few_rows = 128;
  std::vector<std::int64_t> active;
  std::int64_t most = 0;
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    if (order.count(expert) == 0) continue;
    active.push_back(expert);
    most = std::max(most, order.count(expert));
  }
  const auto size = static_cast<std::int64_t>(active.size());
  if (most > few_rows || size < 2 * threads()) {
    for (const std::int64_t expert : active) f(expert);
    return;
  }
  parallel_for(size, work_of_row, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) f(active[static_cast<std::size_t>(i)]);
  });
}

struct ExpertWeights {
  Weight in, out;
  std::optional<Weight> gate;

  ExpertWeights(const Tensor& w_in, const Tensor& w_out, const MaybeTensor& w_gate, const MaybeTensor& packed_in,
                const MaybeTensor& packed_out, const MaybeTensor& packed_gate, const MaybeTensor& current, const Tensor& x,
                Number number, std::int64_t channels)
      : in(w_in, packed_in, current, 0, "w_in", x, number, 3), out(w_out, packed_out, current, 1, "w_out", x, number, 3) {
    check(in.k == channels, "w_in", "expected [E, H, ", channels, "], got [", in.matrices, ", ", in.n, ", ", in.k, "]");
    check(out.k == in.n && out.matrices == in.matrices, "w_out", "expected [", in.matrices, ", N, ", in.n, "], got [",
          out.matrices, ", ", out.n, ", ", out.k, "]");
    if (!w_gate.has_value()) return;
    gate.emplace(*w_gate, packed_gate, current, 2, "w_gate", x, number, 3);
    check(gate->n == in.n && gate->k == in.k && gate->matrices == in.matrices, "w_gate", "expected the shape of w_in");
    in.agree_with(*gate, number);
  }
};

// The kernels of the tier that multiplies: float64 has its own in the generic tier alone.
Tier<MoeKernels> kernels_for(Number number) { return tier_for(moe_kernels_tiers, number == Number::float64); }

void combine(const MoeCombine& call, Number number, std::int64_t tokens) {
  const auto kernel = kernels_for(number).kernels->combine[static_cast<int>(number)];
  parallel_for(tokens, call.cols * (call.slots + 1), [&](std::int64_t begin, std::int64_t end) { kernel(call, begin, end); });
}

const void* weights_of(const Tensor& weights, const Tensor& x, std::int64_t tokens, std::int64_t slots) {
  check(on_one_device(weights, x) && weights.is_contiguous() && weights.dim() == 2 && weights.size(0) == tokens &&
            weights.size(1) == slots &&
            weights.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        "weights", "expected contiguous accumulators, one a slot");
  return weights.const_data_ptr();
}

// Rows of a matrix, gathered.
void gather(const void* from, std::int64_t stride, const std::int64_t* rows, std::int64_t count, std::int64_t cols,
            std::int64_t size, char* to) {
  parallel_for(count, cols, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      std::memcpy(to + i * cols * size, static_cast<const char*>(from) + rows[i] * stride * size, static_cast<std::size_t>(cols * size));
  });
}

void clear_rows(Tensor& tensor, std::int64_t from) {
  if (tensor.numel() == 0) return;
  const std::int64_t row = tensor.size(1) * static_cast<std::int64_t>(tensor.element_size());
  std::memset(static_cast<char*>(tensor.mutable_data_ptr()) + from * row, 0, static_cast<std::size_t>((tensor.size(0) - from) * row));
}

std::tuple<Tensor, Tensor, Tensor> moe_mlp(Tensor x, Tensor expert_ids, Tensor weights, Tensor w_in, Tensor w_out, MaybeTensor w_gate,
                                           MaybeTensor b_in, MaybeTensor b_out, MaybeTensor b_gate, MaybeTensor packed_in,
                                           MaybeTensor packed_out, MaybeTensor packed_gate, MaybeTensor current,
                                           MaybeTensor residual, std::int64_t activation_code, std::int64_t max_slots,
                                           bool need_pre) {
  const Tokens tokens(x, "x");
  const Number number = tokens.number, sums = accumulators_of(number);
  const std::int64_t* ids = ids_of(expert_ids, 2, "expert_ids", x);
  const std::int64_t slots = expert_ids.size(1);
  const void* slot_weights = weights_of(weights, x, tokens.count, slots);
  const ExpertWeights w(w_in, w_out, w_gate, packed_in, packed_out, packed_gate, current, x, number, tokens.channels);
  const bool gated = w.gate.has_value();
  const std::int64_t experts = w.in.matrices, hidden = w.in.n, cols = w.out.n;
  check(gated || !b_gate.has_value(), "b_gate", "there is no w_gate that it could belong to");
  const Biases bias_in(b_in, "b_in", x, experts, hidden), bias_out(b_out, "b_out", x, experts, cols);
  const Biases bias_gate(b_gate, "b_gate", x, experts, hidden);
  check(!residual.has_value() || residual->dim() == 2, "residual", "expected [T, N]");
  const Residual added(residual, x, tokens.count, cols);
  const Activation activation = activation_of(activation_code);
  const ExpertOrder order(ids, tokens.count * slots, slots, experts, "expert_ids");
  check(order.used() <= max_slots, "max_slots", "expected at least the slots in use, ", order.used(), ", got ", max_slots);
  Tensor out = new_tensor(x, {tokens.count, cols}, dtype_of(x));
  Tensor pre = need_pre ? new_tensor(x, {max_slots, hidden}, dtype_of(x)) : new_tensor(x, {0}, dtype_of(x));
  Tensor pre_gate = need_pre && gated ? new_tensor(x, {max_slots, hidden}, dtype_of(x)) : new_tensor(x, {0}, dtype_of(x));
  trace("moe_mlp", w.in.how.name);
  if (need_pre) clear_rows(pre, order.used());
  if (need_pre && gated) clear_rows(pre_gate, order.used());

  // With one slot a token the experts write the output themselves; else their rows are summed by token afterwards.
  const bool direct = slots == 1 && order.used() == tokens.count;
  Workspace room(ScratchUse::experts);
  const auto size_of_sum = static_cast<std::int64_t>(bytes_of(sums));
  const std::int64_t rows_at = room.add(direct ? 0 : order.used() * cols * size_of_sum);
  const std::int64_t weights_at = room.add(direct ? order.used() * size_of_sum : 0);
  room.allocate();
  if (direct) gather(slot_weights, 1, order.order(), order.used(), 1, size_of_sum, room.at(weights_at));
  each_expert(order, experts, tokens.channels * hidden, [&](std::int64_t expert) {
    const std::int64_t begin = order.begin(expert);
    const FeedForward layer{&w.in.how,
                            &w.out.how,
                            w.in.of(expert),
                            gated ? w.gate->of(expert) : GemmWeights{},
                            w.out.of(expert),
                            gated,
                            bias_in.of(expert),
                            bias_gate.of(expert),
                            bias_out.of(expert),
                            activation,
                            tokens.channels,
                            hidden,
                            cols,
                            number};
    const auto kept = [&](Tensor& tensor) {
      return tensor.numel() == 0 ? nullptr : static_cast<char*>(tensor.mutable_data_ptr()) + begin * hidden * tokens.size();
    };
    FeedForwardRows rows{};
    rows.count = order.count(expert);
    rows.x = tokens.data;
    rows.x_stride = tokens.stride;
    rows.x_rows = order.tokens() + begin;
    rows.pre = kept(pre);
    rows.pre_gate = kept(pre_gate);
    rows.out_stride = cols;
    if (direct) {
      rows.out_number = number;
      rows.out = out.mutable_data_ptr();
      rows.out_rows = order.tokens() + begin;
      rows.row_weights = room.at(weights_at) + begin * size_of_sum;
      rows.residual = added.data;
      rows.residual_stride = added.stride;
    } else {
      rows.out_number = sums;
      rows.out = room.at(rows_at) + begin * cols * size_of_sum;
    }
    feed_forward(layer, rows);
  });
  if (!direct) {
    combine({room.at(rows_at), order.positions(), slot_weights, slots, cols, added.data, added.stride, out.mutable_data_ptr()}, number,
            tokens.count);
  }
  scratch_done(ScratchUse::experts);
  return {out, pre, pre_gate};
}

// --- gradients --------------------------------------------------------------------------------------------------------------
// Sums of an expert's rows, in the order of the rows, as the row `expert` of a gradient in its own dtype.
void sum_rows(const GemmChoice& how, Number number, const Matrix& grad, const void* row_weights, Tensor& out, std::int64_t expert) {
  if (out.numel() == 0) return;
  const auto size = static_cast<std::int64_t>(bytes_of(accumulators_of(number)));
  char* sums = scratch_of<char>(ScratchUse::partial_sums, grad.cols * size);
  how.kernels->column_sums[static_cast<int>(number)](grad.data, grad.stride, 0, grad.rows, grad.cols, row_weights, sums);
  reduce_chunks(sums, 1, grad.cols, out, expert * grad.cols);
}

Tensor gradient_of(const MaybeTensor& of, const Tensor& x, bool needed) {
  if (!of.has_value()) return new_tensor(x, {0}, dtype_of(x));
  if (!needed) return new_tensor(x, {0}, dtype_of(*of));
  std::int64_t sizes[max_dims];
  for (std::int64_t dim = 0; dim < of->dim(); ++dim) sizes[dim] = of->size(dim);
  return new_tensor(x, sizes, of->dim(), dtype_of(*of));
}

std::int64_t bytes_of_expert(const Tensor& gradient) {
  return gradient.numel() / gradient.size(0) * static_cast<std::int64_t>(gradient.element_size());
}

char* of_expert(Tensor& gradient, std::int64_t expert) {
  return static_cast<char*>(gradient.mutable_data_ptr()) + expert * bytes_of_expert(gradient);
}

// What experts without rows have for a gradient.
void clear_expert(Tensor& gradient, std::int64_t expert) {
  if (gradient.numel() > 0) std::memset(of_expert(gradient, expert), 0, static_cast<std::size_t>(bytes_of_expert(gradient)));
}

void check_rows(const Tensor& tensor, const char* name, const Tensor& x, std::int64_t rows, std::int64_t cols) {
  check(on_one_device(tensor, x) && dtype_of(tensor) == dtype_of(x) && tensor.dim() == 2 && tensor.size(0) == rows &&
            tensor.size(1) == cols && tensor.is_contiguous(),
        name, "expected ", rows, " contiguous rows of ", cols, " in the dtype of x");
}

// Which gradients moe_mlp_backward makes, by bit.
enum class MoeNeed : std::int64_t { x = 1, weights = 2, w_in = 4, w_out = 8, w_gate = 16, b_in = 32, b_out = 64, b_gate = 128 };

using MoeGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// With g = grad W_out[e], of an expert's output without its weight w: the gradient of w is <g, h> + <grad, b_out[e]>, that of
// the hidden activations w g. What went into the activation was kept; the hidden activations are computed again.
MoeGradients moe_mlp_backward(Tensor grad, Tensor x, Tensor expert_ids, Tensor weights, Tensor w_in, Tensor w_out, MaybeTensor w_gate,
                              MaybeTensor b_in, MaybeTensor b_out, MaybeTensor b_gate, Tensor pre, Tensor pre_gate,
                              std::int64_t activation_code, std::int64_t needs) {
  const Tokens tokens(x, "x");
  const Number number = tokens.number, sums = accumulators_of(number);
  const std::int64_t* ids = ids_of(expert_ids, 2, "expert_ids", x);
  const std::int64_t slots = expert_ids.size(1);
  const void* slot_weights = weights_of(weights, x, tokens.count, slots);
  const ExpertWeights w(w_in, w_out, w_gate, std::nullopt, std::nullopt, std::nullopt, std::nullopt, x, number, tokens.channels);
  const bool gated = w.gate.has_value();
  const std::int64_t experts = w.in.matrices, channels = tokens.channels, hidden = w.in.n, cols = w.out.n;
  const Biases bias_in(b_in, "b_in", x, experts, hidden), bias_out(b_out, "b_out", x, experts, cols);
  const Biases bias_gate(b_gate, "b_gate", x, experts, hidden);
  check_rows(grad, "grad", x, tokens.count, cols);
  const ExpertOrder order(ids, tokens.count * slots, slots, experts, "expert_ids");
  check(pre.dim() == 2 && pre.size(0) >= order.used(), "pre", "expected a row for each slot in use");
  check_rows(pre, "pre", x, pre.size(0), hidden);
  if (gated) check_rows(pre_gate, "pre_gate", x, pre.size(0), hidden);
  const Activation activation = activation_of(activation_code);
  const GemmChoice& how = w.in.how;
  trace("moe_mlp_backward", how.name);
  const auto need = [&](MoeNeed what) { return (needs & static_cast<std::int64_t>(what)) != 0; };

  Tensor grad_x = gradient_of(x, x, need(MoeNeed::x));
  Tensor grad_weights = gradient_of(weights, x, need(MoeNeed::weights));
  Tensor grad_w_in = gradient_of(w_in, x, need(MoeNeed::w_in));
  Tensor grad_w_out = gradient_of(w_out, x, need(MoeNeed::w_out));
  Tensor grad_w_gate = gradient_of(w_gate, x, need(MoeNeed::w_gate));
  Tensor grad_b_in = gradient_of(b_in, x, need(MoeNeed::b_in));
  Tensor grad_b_out = gradient_of(b_out, x, need(MoeNeed::b_out));
  Tensor grad_b_gate = gradient_of(b_gate, x, need(MoeNeed::b_gate));
  Tensor* of_experts[] = {&grad_w_in, &grad_w_out, &grad_w_gate, &grad_b_in, &grad_b_out, &grad_b_gate};
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    if (order.count(expert) > 0) continue;
    for (Tensor* gradient : of_experts) clear_expert(*gradient, expert);
  }

  const std::int64_t size = tokens.size(), size_of_sum = static_cast<std::int64_t>(bytes_of(sums));
  Workspace room(ScratchUse::experts);
  const std::int64_t x_slots = room.add(need(MoeNeed::x) ? order.used() * channels * size_of_sum : 0);
  const std::int64_t weights_at = room.add(order.used() * size_of_sum), dots_at = room.add(order.used() * size_of_sum);
  room.allocate();
  gather(slot_weights, 1, order.order(), order.used(), 1, size_of_sum, room.at(weights_at));
  const auto activation_gradient = how.kernels->activation_gradient[static_cast<int>(number)];
  const auto add_dots = kernels_for(number).kernels->add_dots[static_cast<int>(number)];

  each_expert(order, experts, channels * hidden, [&](std::int64_t expert) {
    const std::int64_t begin = order.begin(expert), count = order.count(expert);
    Workspace own(ScratchUse::expert_gradients);
    const std::int64_t upstream_at = own.add(count * cols * size), input_at = own.add(count * channels * size);
    const std::int64_t of_hidden_at = own.add(count * hidden * size_of_sum), before_at = own.add(count * hidden * size);
    const std::int64_t before_gate_at = own.add(gated ? count * hidden * size : 0), again_at = own.add(count * hidden * size);
    own.allocate();
    gather(grad.const_data_ptr(), cols, order.tokens() + begin, count, cols, size, own.at(upstream_at));
    const Matrix upstream{own.at(upstream_at), count, cols, cols};
    GemmCall product = grad_of_input(how, number, upstream, w.out.of(expert).operand, hidden, own.at(of_hidden_at));
    product.number = sums;  // not rounded: the gradient of a weight is a sum over the hidden units
    gemm(product);
    const auto kept = [&](const Tensor& tensor) {
      return static_cast<const char*>(tensor.const_data_ptr()) + begin * hidden * size;
    };
    char* dots = room.at(dots_at) + begin * size_of_sum;
    char* row_weights = room.at(weights_at) + begin * size_of_sum;
    ActivationGradient call{};
    call.grad = own.at(of_hidden_at);
    call.wide_grad = true;
    call.pre = gated ? kept(pre_gate) : kept(pre);
    call.up = gated ? kept(pre) : nullptr;
    call.grad_pre = own.at(gated ? before_gate_at : before_at);
    call.grad_up = gated ? own.at(before_at) : nullptr;
    call.hidden = need(MoeNeed::w_out) ? own.at(again_at) : nullptr;
    call.row_weights = row_weights;
    call.row_dots = need(MoeNeed::weights) ? dots : nullptr;
    call.grad_stride = hidden;
    call.cols = hidden;
    call.activation = activation;
    parallel_for(count, hidden, [&](std::int64_t from, std::int64_t to) { activation_gradient(call, from, to); });
    if (need(MoeNeed::weights) && bias_out.of(expert) != nullptr) {
      const MoeDots products{upstream.data, cols, cols, bias_out.of(expert), dots};
      parallel_for(count, cols, [&](std::int64_t from, std::int64_t to) { add_dots(products, from, to); });
    }
    const Matrix of_up{own.at(before_at), count, hidden, hidden}, of_gate{own.at(before_gate_at), count, hidden, hidden};
    if (need(MoeNeed::w_out))
      grad_of_weight(how, number, upstream, {own.at(again_at), count, hidden, hidden}, of_expert(grad_w_out, expert));
    sum_rows(how, number, upstream, row_weights, grad_b_out, expert);
    sum_rows(how, number, of_up, nullptr, grad_b_in, expert);
    if (gated) sum_rows(how, number, of_gate, nullptr, grad_b_gate, expert);
    const bool of_w_gate = gated && need(MoeNeed::w_gate);
    if (need(MoeNeed::w_in) || of_w_gate) {
      gather(tokens.data, tokens.stride, order.tokens() + begin, count, channels, size, own.at(input_at));
      const Matrix input{own.at(input_at), count, channels, channels};
      if (need(MoeNeed::w_in)) grad_of_weight(how, number, of_up, input, of_expert(grad_w_in, expert));
      if (of_w_gate) grad_of_weight(how, number, of_gate, input, of_expert(grad_w_gate, expert));
    }
    if (need(MoeNeed::x)) {
      product = grad_of_input(how, number, of_up, w.in.of(expert).operand, channels, nullptr);
      product.number = sums;
      product.out = room.at(x_slots) + begin * channels * size_of_sum;
      gemm(product);
      if (gated) {
        GemmCall beside = grad_of_input(how, number, of_gate, w.gate->of(expert).operand, channels, product.out);
        beside.number = sums;
        beside.residual = product.out;
        beside.residual_stride = channels;
        gemm(beside);
      }
    }
    scratch_done(ScratchUse::expert_gradients);
  });
  if (need(MoeNeed::x)) {
    combine({room.at(x_slots), order.positions(), nullptr, slots, channels, nullptr, 0, grad_x.mutable_data_ptr()}, number,
            tokens.count);
  }
  if (need(MoeNeed::weights)) {
    char* to = static_cast<char*>(grad_weights.mutable_data_ptr());
    for (std::int64_t slot = 0; slot < tokens.count * slots; ++slot) {
      const std::int64_t position = order.positions()[slot];
      if (position < 0) {
        std::memset(to + slot * size_of_sum, 0, static_cast<std::size_t>(size_of_sum));
      } else {
        std::memcpy(to + slot * size_of_sum, room.at(dots_at) + position * size_of_sum, static_cast<std::size_t>(size_of_sum));
      }
    }
  }
  scratch_done(ScratchUse::experts);
  return {grad_x, grad_weights, grad_w_in, grad_w_out, grad_w_gate, grad_b_in, grad_b_out, grad_b_gate};
}

// --- one linear layer a token -------------------------------------------------------------------------------------------------
void clear_unused_rows(const std::int64_t* ids, std::int64_t count, std::int64_t row_bytes, Tensor& out) {
  for (std::int64_t token = 0; token < count; ++token)
    if (ids[token] < 0)
      std::memset(static_cast<char*>(out.mutable_data_ptr()) + token * row_bytes, 0, static_cast<std::size_t>(row_bytes));
}

Tensor grouped_linear(Tensor x, Tensor group_ids, Tensor weight, MaybeTensor packed, MaybeTensor current, MaybeTensor bias) {
  const Tokens tokens(x, "x");
  const std::int64_t* ids = ids_of(group_ids, 1, "group_ids", x);
  const Weight w(weight, packed, current, 0, "weight", x, tokens.number, 3);
  check(w.k == tokens.channels, "weight", "expected [G, N, ", tokens.channels, "], got [", w.matrices, ", ", w.n, ", ", w.k, "]");
  const Biases biases(bias, "bias", x, w.matrices, w.n);
  const ExpertOrder order(ids, tokens.count, 1, w.matrices, "group_ids");
  Tensor out = new_tensor(x, {tokens.count, w.n}, dtype_of(x));
  trace("grouped_linear", w.how.name);
  clear_unused_rows(ids, tokens.count, w.n * tokens.size(), out);
  each_expert(order, w.matrices, w.n * w.k, [&](std::int64_t group) {
    GemmCall call = call_of(w.how, tokens.number, order.count(group), w.n, w.k);
    call.a = {tokens.data, tokens.number, tokens.stride, 1};
    call.a_rows = order.tokens() + order.begin(group);
    call.up = w.of(group);
    call.bias = biases.of(group);
    call.out = out.mutable_data_ptr();
    call.out_rows = call.a_rows;
    gemm(call);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor grad, Tensor x, Tensor group_ids, Tensor weight, MaybeTensor bias,
                                                           bool need_x, bool need_weight, bool need_bias) {
  const Tokens tokens(x, "x");
  const std::int64_t* ids = ids_of(group_ids, 1, "group_ids", x);
  const Weight w(weight, std::nullopt, std::nullopt, 0, "weight", x, tokens.number, 3);
  check(w.k == tokens.channels, "weight", "expected [G, N, ", tokens.channels, "], got [", w.matrices, ", ", w.n, ", ", w.k, "]");
  check_rows(grad, "grad", x, tokens.count, w.n);
  const ExpertOrder order(ids, tokens.count, 1, w.matrices, "group_ids");
  Tensor grad_x = gradient_of(x, x, need_x), grad_weight = gradient_of(weight, x, need_weight);
  Tensor grad_bias = need_bias ? new_tensor(x, {w.matrices, w.n}, bias.has_value() ? dtype_of(*bias) : dtype_of(x))
                               : new_tensor(x, {0}, bias.has_value() ? dtype_of(*bias) : dtype_of(x));
  trace("grouped_linear_backward", w.how.name);
  if (need_x) clear_unused_rows(ids, tokens.count, tokens.channels * tokens.size(), grad_x);
  for (std::int64_t group = 0; group < w.matrices; ++group) {
    if (order.count(group) > 0) continue;
    clear_expert(grad_weight, group);
    clear_expert(grad_bias, group);
  }
  each_expert(order, w.matrices, w.n * w.k, [&](std::int64_t group) {
    const std::int64_t count = order.count(group), size = tokens.size();
    const std::int64_t* rows = order.tokens() + order.begin(group);
    Workspace own(ScratchUse::expert_gradients);
    const std::int64_t upstream_at = own.add(count * w.n * size), input_at = own.add(need_weight ? count * w.k * size : 0);
    own.allocate();
    gather(grad.const_data_ptr(), w.n, rows, count, w.n, size, own.at(upstream_at));
    const Matrix upstream{own.at(upstream_at), count, w.n, w.n};
    if (need_x) {
      GemmCall call = grad_of_input(w.how, tokens.number, upstream, w.of(group).operand, w.k, grad_x.mutable_data_ptr());
      call.out_rows = rows;
      gemm(call);
    }
    if (need_weight) {
      gather(tokens.data, tokens.stride, rows, count, w.k, size, own.at(input_at));
      grad_of_weight(w.how, tokens.number, upstream, {own.at(input_at), count, w.k, w.k}, of_expert(grad_weight, group));
    }
    if (need_bias) sum_rows(w.how, tokens.number, upstream, nullptr, grad_bias, group);
    scratch_done(ScratchUse::expert_gradients);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("moe_mlp", TORCH_BOX(&moe_mlp));
  library.impl("moe_mlp_backward", TORCH_BOX(&moe_mlp_backward));
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  library.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward));
}

}  // namespace mmk
