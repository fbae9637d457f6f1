// Linear layers and MLPs on the CPU: checks, tensors, and which products are made; the products are linear_products.h's.
#include <tuple>
#include <vector>

#include "../common/arguments.h"
#include "../common/matrix.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/scratch.h"
#include "core/trace.h"
#include "linear_operands.h"
#include "linear_products.h"

namespace mmk {
namespace {

// [..., cols] with the leading dimensions of x.
Tensor new_rows(const Tensor& x, std::int64_t cols) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(cols);
  return new_tensor(x, sizes.data(), static_cast<std::int64_t>(sizes.size()), dtype_of(x));
}

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, MaybeTensor packed, MaybeTensor current, MaybeTensor bias, MaybeTensor residual,
                 std::int64_t activation, bool need_pre) {
  const Rows rows(x, "x");
  const auto number = static_cast<Number>(dtype_index(x));
  const Weight w(weight, packed, current, 0, "weight", x, number);
  check(rows.cols == w.k, "weight", "expected [N, ", rows.cols, "], got [", w.n, ", ", w.k, "]");
  const Parameter biases(bias, "bias", x, w.n);
  const Residual added(residual, x, rows.rows, w.n);
  GemmCall call = call_of(w.how, number, rows.rows, w.n, w.k);
  call.activation = activation_of(activation);
  Tensor out = new_rows(x, w.n);
  Tensor pre = need_pre ? new_rows(x, w.n) : new_tensor(x, {0}, dtype_of(x));
  trace("linear", w.how.name);
  call.a = {x.const_data_ptr(), number, rows.stride, 1};
  call.up = w.of();
  call.bias = biases.data();
  call.residual = added.data;
  call.residual_stride = added.stride;
  call.out = out.mutable_data_ptr();
  call.pre = need_pre ? pre.mutable_data_ptr() : nullptr;
  gemm(call);
  return {out, pre};
}

// --- gradients of a layer ---------------------------------------------------------------------------------------------
// The sum of a gradient's rows, in the dtype of the bias: partial sums over runs of rows cut by their number alone.
Tensor grad_of_bias(const GemmChoice& how, Number number, const Matrix& grad, const Tensor& x, bool needed, const MaybeTensor& bias) {
  Tensor out = new_tensor(x, {needed ? grad.cols : 0}, bias.has_value() ? dtype_of(*bias) : dtype_of(x));
  if (!needed || grad.cols == 0) return out;
  const std::int64_t chunks = chunks_of(grad.rows);
  const auto size = static_cast<std::int64_t>(bytes_of(accumulators_of(number)));
  char* partial = scratch_of<char>(ScratchUse::partial_sums, chunks * grad.cols * size);
  parallel_for(chunks, grad.rows / chunks * grad.cols, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk)
      how.kernels->column_sums[static_cast<int>(number)](grad.data, grad.stride, grad.rows * chunk / chunks,
                                                         grad.rows * (chunk + 1) / chunks, grad.cols,
                                                         nullptr, partial + chunk * grad.cols * size);
  });
  reduce_chunks(partial, chunks, grad.cols, out);
  return out;
}

void check_like(const Tensor& tensor, const char* name, const Tensor& x, std::int64_t rows, std::int64_t cols) {
  check(on_one_device(tensor, x) && dtype_of(tensor) == dtype_of(x), name, "expected the device and dtype of x");
  const Rows shape(tensor, name);
  check(shape.rows == rows && shape.cols == cols && tensor.is_contiguous(), name, "expected ", rows, " contiguous rows of ", cols);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients linear_backward(Tensor grad, Tensor x, Tensor weight, MaybeTensor pre, MaybeTensor bias, std::int64_t activation_code,
                          bool need_x, bool need_weight, bool need_bias) {
  const Rows rows(x, "x");
  const auto number = static_cast<Number>(dtype_index(x));
  const Weight w(weight, std::nullopt, std::nullopt, 0, "weight", x, number);
  check(rows.cols == w.k, "weight", "expected [N, ", rows.cols, "], got [", w.n, ", ", w.k, "]");
  check_like(grad, "grad", x, rows.rows, w.n);
  check_parameter(bias, "bias", x, w.n);
  const Activation activation = activation_of(activation_code);
  check(pre.has_value() || activation == Activation::none, "pre", "is needed for the gradient of the activation");
  if (pre.has_value()) check_like(*pre, "pre", x, rows.rows, w.n);
  trace("linear_backward", w.how.name);

  Matrix upstream{grad.const_data_ptr(), rows.rows, w.n, w.n};
  std::optional<Tensor> before;  // the gradient before the activation
  if (activation != Activation::none) {
    before = new_tensor(x, {rows.rows, w.n}, dtype_of(x));
    const ActivationGradient call{grad.const_data_ptr(), false, pre->const_data_ptr(), nullptr, before->mutable_data_ptr(), nullptr,
                                  nullptr, nullptr, nullptr, w.n, w.n, activation};
    parallel_for(rows.rows, w.n, [&](std::int64_t begin, std::int64_t end) {
      w.how.kernels->activation_gradient[static_cast<int>(number)](call, begin, end);
    });
    upstream.data = before->const_data_ptr();
  }
  Tensor grad_x = need_x ? new_rows(x, w.k) : new_tensor(x, {0}, dtype_of(x));
  Tensor grad_weight = need_weight ? new_tensor(x, {w.n, w.k}, dtype_of(x)) : new_tensor(x, {0}, dtype_of(x));
  if (need_x) gemm(grad_of_input(w.how, number, upstream, w.of().operand, w.k, grad_x.mutable_data_ptr()));
  if (need_weight) {
    grad_of_weight(w.how, number, upstream, {x.const_data_ptr(), rows.rows, w.k, rows.stride}, grad_weight.mutable_data_ptr());
  }
  return {grad_x, grad_weight, grad_of_bias(w.how, number, upstream, x, need_bias, bias)};
}

// --- MLP ------------------------------------------------------------------------------------------------------------------
struct MlpWeights {
  Weight in, out;
  std::optional<Weight> gate;

  MlpWeights(const Tensor& w_in, const Tensor& w_out, const MaybeTensor& w_gate, const MaybeTensor& packed_in,
             const MaybeTensor& packed_out, const MaybeTensor& packed_gate, const MaybeTensor& current, const Tensor& x,
             Number number, std::int64_t channels)
      : in(w_in, packed_in, current, 0, "w_in", x, number), out(w_out, packed_out, current, 1, "w_out", x, number) {
    check(in.k == channels, "w_in", "expected [H, ", channels, "], got [", in.n, ", ", in.k, "]");
    check(out.k == in.n, "w_out", "expected [N, ", in.n, "], got [", out.n, ", ", out.k, "]");
    if (!w_gate.has_value()) return;
    gate.emplace(*w_gate, packed_gate, current, 2, "w_gate", x, number);
    check(gate->n == in.n && gate->k == in.k, "w_gate", "expected the shape of w_in, [", in.n, ", ", in.k, "], got [", gate->n, ", ",
          gate->k, "]");
    in.agree_with(*gate, number);
  }
};

std::tuple<Tensor, Tensor, Tensor> mlp(Tensor x, Tensor w_in, Tensor w_out, MaybeTensor w_gate, MaybeTensor b_in, MaybeTensor b_out,
                                       MaybeTensor b_gate, MaybeTensor packed_in, MaybeTensor packed_out, MaybeTensor packed_gate,
                                       MaybeTensor current, MaybeTensor residual, std::int64_t activation_code, bool need_pre) {
  const Rows rows(x, "x");
  const auto number = static_cast<Number>(dtype_index(x));
  MlpWeights w(w_in, w_out, w_gate, packed_in, packed_out, packed_gate, current, x, number, rows.cols);
  const bool gated = w.gate.has_value();
  const std::int64_t hidden = w.in.n, cols = w.out.n;
  check(gated || !b_gate.has_value(), "b_gate", "there is no w_gate that it could belong to");
  const Parameter bias_in(b_in, "b_in", x, hidden), bias_out(b_out, "b_out", x, cols), bias_gate(b_gate, "b_gate", x, hidden);
  const Residual added(residual, x, rows.rows, cols);
  const Activation activation = activation_of(activation_code);
  Tensor out = new_rows(x, cols);
  Tensor pre = need_pre ? new_rows(x, hidden) : new_tensor(x, {0}, dtype_of(x));
  Tensor pre_gate = need_pre && gated ? new_rows(x, hidden) : new_tensor(x, {0}, dtype_of(x));
  trace("mlp", w.in.how.name);
  const FeedForward layer{&w.in.how,      &w.out.how,    w.in.of(),  gated ? w.gate->of() : GemmWeights{},
                          w.out.of(),     gated,         bias_in.data(), bias_gate.data(),
                          bias_out.data(), activation,   rows.cols,  hidden,
                          cols,           number};
  feed_forward(layer, {rows.rows, x.const_data_ptr(), rows.stride, nullptr, need_pre ? pre.mutable_data_ptr() : nullptr,
                       need_pre && gated ? pre_gate.mutable_data_ptr() : nullptr, number, out.mutable_data_ptr(), cols, nullptr,
                       nullptr, added.data, added.stride});
  return {out, pre, pre_gate};
}

// Which gradients mlp_backward makes, by bit.
enum class MlpNeed : std::int64_t { x = 1, w_in = 2, w_out = 4, w_gate = 8, b_in = 16, b_out = 32, b_gate = 64 };

using MlpGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// With h = a(g) u (or a(u) without a gate), u = x W_in^T + b_in, g = x W_gate^T + b_gate, out = h W_out^T + b_out. What
// went into the activation was kept; the hidden activations are computed again.
MlpGradients mlp_backward(Tensor grad, Tensor x, Tensor w_in, Tensor w_out, MaybeTensor w_gate, MaybeTensor b_in, MaybeTensor b_out,
                          MaybeTensor b_gate, Tensor pre, Tensor pre_gate, std::int64_t activation_code, std::int64_t needs) {
  const Rows rows(x, "x");
  const auto number = static_cast<Number>(dtype_index(x));
  const MlpWeights w(w_in, w_out, w_gate, std::nullopt, std::nullopt, std::nullopt, std::nullopt, x, number, rows.cols);
  const bool gated = w.gate.has_value();
  const std::int64_t hidden = w.in.n, cols = w.out.n;
  const Activation activation = activation_of(activation_code);
  check_like(grad, "grad", x, rows.rows, cols);
  check_like(pre, "pre", x, rows.rows, hidden);
  if (gated) check_like(pre_gate, "pre_gate", x, rows.rows, hidden);
  check_parameter(b_in, "b_in", x, hidden);
  check_parameter(b_out, "b_out", x, cols);
  check_parameter(b_gate, "b_gate", x, hidden);
  const GemmChoice& how = w.in.how;
  trace("mlp_backward", how.name);
  const auto need = [&](MlpNeed what) { return (needs & static_cast<std::int64_t>(what)) != 0; };
  const auto made = [&](bool needed, std::int64_t n, std::int64_t k) {
    return needed ? new_tensor(x, {n, k}, dtype_of(x)) : new_tensor(x, {0}, dtype_of(x));
  };

  const Matrix upstream{grad.const_data_ptr(), rows.rows, cols, cols};
  const Matrix input{x.const_data_ptr(), rows.rows, rows.cols, rows.stride};
  Tensor grad_w_out = made(need(MlpNeed::w_out), cols, hidden);
  Tensor grad_w_in = made(need(MlpNeed::w_in), hidden, rows.cols);
  Tensor grad_w_gate = made(gated && need(MlpNeed::w_gate), hidden, rows.cols);
  Tensor grad_x = need(MlpNeed::x) ? new_rows(x, rows.cols) : new_tensor(x, {0}, dtype_of(x));

  // of the hidden activations, then before the activation
  Tensor of_hidden = new_tensor(x, {rows.rows, hidden}, dtype_of(x)), before = new_tensor(x, {rows.rows, hidden}, dtype_of(x));
  std::optional<Tensor> before_gate, again;
  if (gated) before_gate = new_tensor(x, {rows.rows, hidden}, dtype_of(x));
  if (need(MlpNeed::w_out)) again = new_tensor(x, {rows.rows, hidden}, dtype_of(x));
  gemm(grad_of_input(how, number, upstream, w.out.of().operand, hidden, of_hidden.mutable_data_ptr()));
  const ActivationGradient call{of_hidden.const_data_ptr(),
                                false,
                                gated ? pre_gate.const_data_ptr() : pre.const_data_ptr(),
                                gated ? pre.const_data_ptr() : nullptr,
                                gated ? before_gate->mutable_data_ptr() : before.mutable_data_ptr(),
                                gated ? before.mutable_data_ptr() : nullptr,
                                again.has_value() ? again->mutable_data_ptr() : nullptr,
                                nullptr,
                                nullptr,
                                hidden,
                                hidden,
                                activation};
  parallel_for(rows.rows, hidden, [&](std::int64_t begin, std::int64_t end) {
    how.kernels->activation_gradient[static_cast<int>(number)](call, begin, end);
  });
  const Matrix of_up{before.const_data_ptr(), rows.rows, hidden, hidden};
  const Matrix of_gate{gated ? before_gate->const_data_ptr() : nullptr, rows.rows, hidden, hidden};
  if (again.has_value()) {
    grad_of_weight(how, number, upstream, {again->const_data_ptr(), rows.rows, hidden, hidden}, grad_w_out.mutable_data_ptr());
  }
  if (need(MlpNeed::w_in)) grad_of_weight(how, number, of_up, input, grad_w_in.mutable_data_ptr());
  if (gated && need(MlpNeed::w_gate)) grad_of_weight(how, number, of_gate, input, grad_w_gate.mutable_data_ptr());
  if (need(MlpNeed::x)) {
    gemm(grad_of_input(how, number, of_up, w.in.of().operand, rows.cols, grad_x.mutable_data_ptr()));
    if (gated) {
      GemmCall beside = grad_of_input(how, number, of_gate, w.gate->of().operand, rows.cols, grad_x.mutable_data_ptr());
      beside.residual = beside.out;
      beside.residual_stride = rows.cols;
      gemm(beside);
    }
  }
  return {grad_x,
          grad_w_in,
          grad_w_out,
          grad_w_gate,
          grad_of_bias(how, number, of_up, x, need(MlpNeed::b_in), b_in),
          grad_of_bias(how, number, upstream, x, need(MlpNeed::b_out), b_out),
          grad_of_bias(how, number, of_gate, x, gated && need(MlpNeed::b_gate), b_gate)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("pack_linear", TORCH_BOX(&pack_linear));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_backward", TORCH_BOX(&linear_backward));
  library.impl("mlp", TORCH_BOX(&mlp));
  library.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace mmk
