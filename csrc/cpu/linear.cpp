// Linear layers and MLPs on the CPU: checks, tensors, and which products are made; the products are core/gemm's.
#include <cstddef>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/arguments.h"
#include "../common/matrix.h"
#include "core/export.h"
#include "core/gemm_call.h"
#include "core/parallel.h"
#include "core/parameter.h"
#include "core/scratch.h"
#include "core/trace.h"

namespace mmk {
namespace {

Activation activation_of(std::int64_t code) {
  check(code >= 0 && code <= static_cast<std::int64_t>(Activation::silu), "activation", "expected 0 to 4, got ", code);
  return static_cast<Activation>(code);
}

// --- packed weights -----------------------------------------------------------------------------------------------------
// The bytes of a packed weight: this, the panels from the next cache line on, and the scales of int8 at the end. Python
// reads `version` (mmkernels/ops/packed_linear.py).
struct PackedHeader {
  std::uint64_t magic;
  std::int32_t tier, number;
  std::int64_t rows, cols;  // of the weight: N and K
  std::uint64_t weight;     // the address that it was packed from
  std::int64_t version;     // the weight's version counter then
};
constexpr std::uint64_t packed_magic = 0x316b6361704b4d4dULL;
constexpr std::int64_t packed_offset = 64;
static_assert(sizeof(PackedHeader) <= packed_offset && offsetof(PackedHeader, version) == 40);

// Where the scales of int8 begin: after the panels.
std::int64_t scales_offset(const GemmArithmetic& arithmetic, std::int64_t n, std::int64_t k) {
  return packed_offset + packed_bytes(arithmetic, n, k);
}

GemmOperand weight_operand(const Tensor& weight, const char* name) {
  check(weight.dim() == 2, name, "expected [N, K], got ", weight.dim(), " dimensions");
  const auto number = static_cast<Number>(dtype_index(weight, name));
  const void* data = weight.const_data_ptr();
  const std::int64_t n = weight.size(0), k = weight.size(1);
  if (k <= 1 || weight.stride(1) == 1 || n == 0) return {data, number, weight.stride(0), 1};
  check(n == 1 || weight.stride(0) == 1, name, "one of its dimensions must be contiguous, got strides (", weight.stride(0), ", ",
        weight.stride(1), ")");
  return {data, number, 1, weight.stride(1)};
}

Tensor pack_linear(Tensor weight, std::int64_t number_code, std::int64_t version) {
  const GemmOperand operand = weight_operand(weight, "weight");
  check(number_code >= 0 && number_code <= static_cast<std::int64_t>(Number::int8), "dtype", "expected 0 to 4, got ", number_code);
  const auto number = static_cast<Number>(number_code);
  check(number == Number::int8 ? operand.number != Number::float64 : operand.number == number, "dtype",
        "expected the dtype of weight, or int8 of one of at most 32 bits");
  const GemmChoice how = choose_gemm(number);
  const std::int64_t n = weight.size(0), k = weight.size(1);
  const std::int64_t offset = scales_offset(*how.arithmetic, n, k);
  const bool scaled = how.arithmetic->rescale != nullptr;
  Tensor packed = new_tensor(weight, {offset + (scaled ? n * static_cast<std::int64_t>(sizeof(float)) : 0)}, aoti_torch_dtype_uint8());
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed_offset);
  const PackedHeader header{packed_magic, static_cast<std::int32_t>(how.isa), static_cast<std::int32_t>(number), n, k,
                            reinterpret_cast<std::uint64_t>(operand.data), version};
  std::memcpy(bytes, &header, sizeof header);
  if (n > 0) {
    pack_weights(*how.arithmetic, operand, n, k, bytes + packed_offset, scaled ? reinterpret_cast<float*>(bytes + offset) : nullptr);
  }
  return packed;
}

// --- operands of a call -------------------------------------------------------------------------------------------------
// A weight [N, K] beside its packed form, which is used where it is still of this weight and of the tier in force.
// `current`, where given, says for each packed weight of a call whether its version is the one that was packed.
class Weight {
 public:
  GemmWeights weights;
  std::int64_t n = 0, k = 0;
  GemmChoice how;

  Weight(const Tensor& weight, const MaybeTensor& packed, const MaybeTensor& current, std::int64_t position, const char* name,
         const Tensor& x, Number number)
      : how(choose_gemm_unpacked(number)) {
    weights.operand = weight_operand(weight, name);
    n = weight.size(0);
    k = weight.size(1);
    check(on_one_device(weight, x), name, "expected the device of x");
    if (!packed.has_value()) {
      check(weights.operand.number == number, name, "expected the dtype of x");
      return;
    }
    check(packed->dim() == 1 && packed->is_contiguous() && packed->scalar_type() == ScalarType::Byte &&
              on_one_device(*packed, x) && packed->numel() >= packed_offset,
          "packed", "expected what pack_linear made");
    PackedHeader header;
    std::memcpy(&header, packed->const_data_ptr(), sizeof header);
    check(header.magic == packed_magic && header.rows == n && header.cols == k, "packed", "expected what pack_linear made of ", name);
    const auto kept = static_cast<Number>(header.number);
    check(kept == Number::int8 ? number != Number::float64 : kept == number, name, "was packed for another dtype than that of x");
    const GemmChoice packed_how = choose_gemm(kept);
    bool fresh = header.tier == static_cast<std::int32_t>(packed_how.isa) &&
                 header.weight == reinterpret_cast<std::uint64_t>(weights.operand.data);
    if (current.has_value()) {
      check(current->scalar_type() == ScalarType::Bool && current->is_contiguous() && current->numel() > position &&
                on_one_device(*current, x),
            "current", "expected what check_packs answered");
      fresh = fresh && static_cast<const bool*>(current->const_data_ptr())[position];
    }
    if (!fresh && kept != Number::int8) return;
    how = packed_how;
    if (!fresh) again_ = pack_linear(weight, header.number, header.version);
    use(fresh ? *packed : *again_, kept);
  }

  // Both of a gated product are packed in one way or in none.
  void agree_with(Weight& other, Number number) {
    if (how.arithmetic == other.how.arithmetic && (weights.panels == nullptr) == (other.weights.panels == nullptr)) return;
    check(weights.operand.number == number && other.weights.operand.number == number, "w_gate", "expected to be packed as w_in is");
    for (Weight* weight : {this, &other}) {
      weight->weights.panels = nullptr;
      weight->weights.scales = nullptr;
      weight->how = choose_gemm_unpacked(number);
    }
  }

  // Panels of one's own, for a call that reads the weight more than once.
  void pack_for_this_call(const Tensor& like) {
    if (weights.panels != nullptr) return;
    again_ = new_tensor(like, {packed_bytes(*how.arithmetic, n, k)}, aoti_torch_dtype_uint8());
    pack_weights(*how.arithmetic, weights.operand, n, k, again_->mutable_data_ptr(), nullptr);
    weights.panels = again_->const_data_ptr();
  }

 private:
  void use(const Tensor& packed, Number kept) {
    const std::int64_t offset = scales_offset(*how.arithmetic, n, k);
    const bool scaled = kept == Number::int8;
    check(packed.numel() >= offset + (scaled ? n * static_cast<std::int64_t>(sizeof(float)) : 0), "packed", "is too short");
    const char* bytes = static_cast<const char*>(packed.const_data_ptr());
    weights.panels = bytes + packed_offset;
    weights.scales = scaled ? reinterpret_cast<const float*>(bytes + offset) : nullptr;
  }

  MaybeTensor again_;
};

// [..., cols] with the leading dimensions of x.
Tensor new_rows(const Tensor& x, std::int64_t cols) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(cols);
  return new_tensor(x, sizes.data(), static_cast<std::int64_t>(sizes.size()), dtype_of(x));
}

struct Residual {
  const void* data = nullptr;
  std::int64_t stride = 0;

  Residual(const MaybeTensor& residual, const Tensor& x, std::int64_t rows, std::int64_t cols) {
    if (!residual.has_value()) return;
    check(on_one_device(*residual, x), "residual", "expected the device of x");
    check(dtype_of(*residual) == dtype_of(x), "residual", "expected the dtype of x");
    const Rows shape(*residual, "residual");
    check(shape.rows == rows && shape.cols == cols, "residual", "expected the shape of the output, ", rows, " rows of ", cols);
    data = residual->const_data_ptr();
    stride = shape.stride;
  }
};

GemmCall call_of(const GemmChoice& how, Number number, std::int64_t rows, std::int64_t cols, std::int64_t depth) {
  GemmCall call;
  call.kernels = how.kernels;
  call.arithmetic = how.arithmetic;
  call.number = number;
  call.rows = rows;
  call.cols = cols;
  call.depth = depth;
  call.out_stride = cols;
  return call;
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
  call.up = w.weights;
  call.bias = biases.data();
  call.residual = added.data;
  call.residual_stride = added.stride;
  call.out = out.mutable_data_ptr();
  call.pre = need_pre ? pre.mutable_data_ptr() : nullptr;
  gemm(call);
  return {out, pre};
}

// --- gradients of one product ---------------------------------------------------------------------------------------------
// A matrix that a gradient is made of: elements of one type, rows `stride` apart.
struct Matrix {
  const void* data;
  std::int64_t rows, cols, stride;
};

// grad_x [rows, K] = grad [rows, N] W [N, K], added to what is there where `add` is set.
void grad_of_input(const GemmChoice& how, Number number, const Matrix& grad, const GemmOperand& weight, std::int64_t k,
                   void* grad_x, bool add) {
  GemmCall call = call_of(how, number, grad.rows, k, grad.cols);
  call.a = {grad.data, number, grad.stride, 1};
  call.up.operand = {weight.data, number, weight.depth_stride, weight.stride};
  call.out = grad_x;
  call.residual = add ? grad_x : nullptr;
  call.residual_stride = k;
  gemm(call);
}

// grad_weight [N, K] = grad^T [N, rows] x [rows, K].
void grad_of_weight(const GemmChoice& how, Number number, const Matrix& grad, const Matrix& x, void* grad_weight) {
  GemmCall call = call_of(how, number, grad.cols, x.cols, grad.rows);
  call.a = {grad.data, number, 1, grad.stride};
  call.up.operand = {x.data, number, 1, x.stride};
  call.out = grad_weight;
  gemm(call);
}

// The sum of a gradient's rows, in the dtype of the bias: partial sums over runs of rows cut by their number alone.
Tensor grad_of_bias(const GemmChoice& how, Number number, const Matrix& grad, const Tensor& x, bool needed, const MaybeTensor& bias) {
  Tensor out = new_tensor(x, {needed ? grad.cols : 0}, bias.has_value() ? dtype_of(*bias) : dtype_of(x));
  if (!needed || grad.cols == 0) return out;
  const std::int64_t chunks = chunks_of(grad.rows);
  const std::int64_t size = number == Number::float64 ? 8 : 4;
  char* partial = scratch_of<char>(ScratchUse::partial_sums, chunks * grad.cols * size);
  parallel_for(chunks, grad.rows / chunks * grad.cols, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk)
      how.kernels->column_sums[static_cast<int>(number)](grad.data, grad.stride, grad.rows * chunk / chunks,
                                                         grad.rows * (chunk + 1) / chunks, grad.cols,
                                                         partial + chunk * grad.cols * size);
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
    const ActivationGradient call{grad.const_data_ptr(), pre->const_data_ptr(), nullptr, before->mutable_data_ptr(), nullptr,
                                  nullptr, w.n, w.n, activation};
    parallel_for(rows.rows, w.n, [&](std::int64_t begin, std::int64_t end) {
      w.how.kernels->activation_gradient[static_cast<int>(number)](call, begin, end);
    });
    upstream.data = before->const_data_ptr();
  }
  Tensor grad_x = need_x ? new_rows(x, w.k) : new_tensor(x, {0}, dtype_of(x));
  Tensor grad_weight = need_weight ? new_tensor(x, {w.n, w.k}, dtype_of(x)) : new_tensor(x, {0}, dtype_of(x));
  if (need_x) grad_of_input(w.how, number, upstream, w.weights.operand, w.k, grad_x.mutable_data_ptr(), false);
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

// Groups of rows go through both products one after the other, so that a group's hidden activations are used while they
// are in the cache; no tensor of them is made.
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
  if (rows.rows == 0) return {out, pre, pre_gate};

  const std::int64_t most = std::min(rows_at_once(*w.in.how.arithmetic, rows.cols), rows_at_once(*w.out.how.arithmetic, hidden));
  const std::int64_t groups = ceil_div(rows.rows, most);
  if (groups > 1) {
    w.in.pack_for_this_call(x);
    w.out.pack_for_this_call(x);
    if (gated) w.gate->pack_for_this_call(x);
  }
  const auto size = static_cast<std::int64_t>(x.element_size());
  const auto at = [&](const void* base, std::int64_t row, std::int64_t stride) {
    return base == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(base)) + row * stride * size;
  };
  // The hidden activations of a block go straight into the panels of the second product where they can.
  const bool direct = hidden > 0 && feeds(*w.in.how.arithmetic, *w.out.how.arithmetic);
  // Cut at whole panels, so that no group computes part of one twice.
  const std::int64_t panel = w.in.how.arithmetic->panel_rows;
  const std::int64_t panels = ceil_div(rows.rows, panel);
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::int64_t begin = panels * group / groups * panel;
    const std::int64_t count = std::min(panels * (group + 1) / groups * panel, rows.rows) - begin;
    const std::int64_t count_panels = ceil_div(count, panel);
    char* between = scratch_of<char>(
        ScratchUse::hidden, direct ? count_panels * w.out.how.arithmetic->a_panel_bytes(hidden) : count * hidden * size);
    GemmCall first = call_of(w.in.how, number, count, hidden, rows.cols);
    first.a = {at(x.const_data_ptr(), begin, rows.stride), number, rows.stride, 1};
    first.up = w.in.weights;
    first.bias = bias_in.data();
    first.gated = gated;
    if (gated) first.gate = w.gate->weights;
    first.bias_gate = bias_gate.data();
    first.activation = activation;
    if (direct) {
      first.out_panels = between;
      first.out_arithmetic = w.out.how.arithmetic;
    } else {
      first.out = between;
    }
    first.pre = need_pre ? at(pre.const_data_ptr(), begin, hidden) : nullptr;
    first.pre_gate = need_pre && gated ? at(pre_gate.const_data_ptr(), begin, hidden) : nullptr;
    gemm(first);
    GemmCall second = call_of(w.out.how, number, count, cols, hidden);
    if (direct) {
      second.a_panels = between;
    } else {
      second.a = {between, number, hidden, 1};
    }
    second.up = w.out.weights;
    second.bias = bias_out.data();
    second.residual = at(added.data, begin, added.stride);
    second.residual_stride = added.stride;
    second.out = at(out.const_data_ptr(), begin, cols);
    gemm(second);
  }
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
  grad_of_input(how, number, upstream, w.out.weights.operand, hidden, of_hidden.mutable_data_ptr(), false);
  const ActivationGradient call{of_hidden.const_data_ptr(),
                                gated ? pre_gate.const_data_ptr() : pre.const_data_ptr(),
                                gated ? pre.const_data_ptr() : nullptr,
                                gated ? before_gate->mutable_data_ptr() : before.mutable_data_ptr(),
                                gated ? before.mutable_data_ptr() : nullptr,
                                again.has_value() ? again->mutable_data_ptr() : nullptr,
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
    grad_of_input(how, number, of_up, w.in.weights.operand, rows.cols, grad_x.mutable_data_ptr(), false);
    if (gated) grad_of_input(how, number, of_gate, w.gate->weights.operand, rows.cols, grad_x.mutable_data_ptr(), true);
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
