// The products of linear_products.h.
#include "linear_products.h"

#include <algorithm>

#include "core/scratch.h"

namespace mmk {

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

GemmCall grad_of_input(const GemmChoice& how, Number number, const Matrix& grad, const GemmOperand& weight, std::int64_t k,
                       void* grad_x) {
  GemmCall call = call_of(how, number, grad.rows, k, grad.cols);
  call.a = {grad.data, number, grad.stride, 1};
  call.up.operand = {weight.data, number, weight.depth_stride, weight.stride};
  call.out = grad_x;
  return call;
}

void grad_of_weight(const GemmChoice& how, Number number, const Matrix& grad, const Matrix& x, void* grad_weight) {
  GemmCall call = call_of(how, number, grad.cols, x.cols, grad.rows);
  call.a = {grad.data, number, 1, grad.stride};
  call.up.operand = {x.data, number, 1, x.stride};
  call.out = grad_weight;
  gemm(call);
}

namespace {

// Panels of a layer's weights, for a call that reads them more than once.
class PanelsOfThisCall {
 public:
  PanelsOfThisCall(const FeedForward& layer) : layer_(layer) {
    Workspace room(ScratchUse::feed_forward_weights);
    const std::int64_t of_in = packed_bytes(*layer.how_in->arithmetic, layer.hidden, layer.channels);
    const std::int64_t in = room.add(of_in), gate = room.add(layer.gated ? of_in : 0);
    const std::int64_t out = room.add(packed_bytes(*layer.how_out->arithmetic, layer.cols, layer.hidden));
    room.allocate();
    pack(layer_.in, *layer.how_in, layer.hidden, layer.channels, room.at(in));
    if (layer.gated) pack(layer_.gate, *layer.how_in, layer.hidden, layer.channels, room.at(gate));
    pack(layer_.out, *layer.how_out, layer.cols, layer.hidden, room.at(out));
  }
  ~PanelsOfThisCall() { scratch_done(ScratchUse::feed_forward_weights); }

  const FeedForward& layer() const { return layer_; }

 private:
  static void pack(GemmWeights& weights, const GemmChoice& how, std::int64_t cols, std::int64_t depth, void* panels) {
    if (weights.panels != nullptr) return;
    pack_weights(*how.arithmetic, weights.operand, cols, depth, panels, nullptr);
    weights.panels = panels;
  }

  FeedForward layer_;
};

// One group of rows, [begin, begin + count).
void pass(const FeedForward& layer, const FeedForwardRows& rows, std::int64_t begin, std::int64_t count) {
  const auto at = [&](auto* base, std::int64_t stride, Number number) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>, const char, char>;
    return base == nullptr ? nullptr : static_cast<Byte*>(base) + begin * stride * static_cast<std::int64_t>(bytes_of(number));
  };
  const GemmArithmetic& arithmetic_in = *layer.how_in->arithmetic;
  const GemmArithmetic& arithmetic_out = *layer.how_out->arithmetic;
  // The hidden activations of a block go straight into the panels of the second product where they can.
  const bool direct = layer.hidden > 0 && feeds(arithmetic_in, arithmetic_out);
  const std::int64_t panels = ceil_div(count, arithmetic_in.panel_rows);
  char* between = scratch_of<char>(
      ScratchUse::hidden, direct ? panels * arithmetic_out.a_panel_bytes(layer.hidden)
                                 : count * layer.hidden * static_cast<std::int64_t>(bytes_of(layer.number)));
  GemmCall first = call_of(*layer.how_in, layer.number, count, layer.hidden, layer.channels);
  first.a = {rows.x_rows == nullptr ? at(rows.x, rows.x_stride, layer.number) : rows.x, layer.number, rows.x_stride, 1};
  first.a_rows = rows.x_rows == nullptr ? nullptr : rows.x_rows + begin;
  first.up = layer.in;
  first.bias = layer.bias_in;
  first.gated = layer.gated;
  first.gate = layer.gate;
  first.bias_gate = layer.bias_gate;
  first.activation = layer.activation;
  if (direct) {
    first.out_panels = between;
    first.out_arithmetic = &arithmetic_out;
  } else {
    first.out = between;
  }
  first.pre = at(rows.pre, layer.hidden, layer.number);
  first.pre_gate = at(rows.pre_gate, layer.hidden, layer.number);
  gemm(first);
  GemmCall second = call_of(*layer.how_out, rows.out_number, count, layer.cols, layer.hidden);
  if (direct) {
    second.a_panels = between;
  } else {
    second.a = {between, layer.number, layer.hidden, 1};
  }
  second.up = layer.out;
  second.bias = layer.bias_out;
  second.row_weights = rows.row_weights == nullptr
                           ? nullptr
                           : static_cast<const char*>(rows.row_weights) + begin * arithmetic_out.accumulator_bytes;
  const bool scattered = rows.out_rows != nullptr;
  second.out_rows = scattered ? rows.out_rows + begin : nullptr;
  second.residual = scattered ? rows.residual : at(rows.residual, rows.residual_stride, rows.out_number);
  second.residual_stride = rows.residual_stride;
  second.out = scattered ? rows.out : at(rows.out, rows.out_stride, rows.out_number);
  second.out_stride = rows.out_stride;
  gemm(second);
}

}  // namespace

void feed_forward(const FeedForward& layer, const FeedForwardRows& rows) {
  if (rows.count == 0) return;
  const std::int64_t panel = layer.how_in->arithmetic->panel_rows;
  const std::int64_t most = std::min(rows_at_once(*layer.how_in->arithmetic, layer.channels),
                                     rows_at_once(*layer.how_out->arithmetic, layer.hidden));
  const std::int64_t groups = ceil_div(rows.count, most);
  if (groups == 1) return pass(layer, rows, 0, rows.count);
  const PanelsOfThisCall packed(layer);
  // Cut at whole panels, so that no group computes part of one twice.
  const std::int64_t panels = ceil_div(rows.count, panel);
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::int64_t begin = panels * group / groups * panel;
    pass(packed.layer(), rows, begin, std::min(panels * (group + 1) / groups * panel, rows.count) - begin);
  }
}

}  // namespace mmk
