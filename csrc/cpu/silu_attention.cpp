// Parameter-free cross-attention on the CPU: checks, tensors, and which products are made. The products are core/gemm's, and
// what happens to a row of scores between them is in silu_attention.tier.cpp.
//
// Where the processor multiplies bfloat16 itself, scores, and in backward the gradients of what was kept, are rounded to it for
// the products that read them; what is dropped is chosen by the sums before.
//
// Index glossary: B samples, L rows (tokens of x), M keys, D channels, W channels of values (`width`). Blocks of rows go
// through all products one after the other: their scores [block, M] are used while they are in the cache, and no tensor of
// all scores is made. Blocks are cut by sizes alone, since gradients of keys and values are sums over them.
#include "silu_attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../common/arguments.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tier.h"
#include "core/trace.h"
#include "linear_products.h"

namespace mmk {
namespace {

// Selection goes over a row so often that it counts as this many elements for each score.
constexpr std::int64_t selection_work = 16;


// [B, rows, cols] with a contiguous last dimension.
struct Batch {
  char* data;
  Number number;
  std::int64_t rows, cols, sample_stride, row_stride;

  Batch(const Tensor& tensor, const char* name) {
    check(tensor.dim() == 3, name, "expected three dimensions, got ", tensor.dim());
    check(tensor.size(2) <= 1 || tensor.stride(2) == 1 || tensor.numel() == 0, name,
          "the last dimension must be contiguous, got stride ", tensor.stride(2));
    data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    number = static_cast<Number>(dtype_index(tensor, name));
    rows = tensor.size(1);
    cols = tensor.size(2);
    sample_stride = tensor.stride(0);
    row_stride = tensor.stride(1);
  }

  char* at(std::int64_t sample, std::int64_t row) const {
    return data + (sample * sample_stride + row * row_stride) * static_cast<std::int64_t>(bytes_of(number));
  }
  // Rows from `row` on as rows of A, or as columns of B.
  GemmOperand by_row(std::int64_t sample, std::int64_t row) const { return {at(sample, row), number, row_stride, 1}; }
  // Columns as columns of B, over the depth of rows from `row` on.
  GemmOperand by_col(std::int64_t sample, std::int64_t row) const { return {at(sample, row), number, 1, row_stride}; }
};

struct Problem {
  Batch x, keys, values;
  std::int64_t batch;
  Number number, wide;  // of the tensors, and of accumulators
  GemmChoice how;
  bool halves;  // products read bfloat16 as it is, else everything is widened when it is packed
  Tier<SiluAttentionKernels> tier;
  std::int64_t rank;
  double scale;
  bool activates;  // silu is applied to the keys here

  Problem(const Tensor& of_x, const Tensor& of_keys, const Tensor& of_values, double drop_ratio, bool key_is_activated,
          double factor)
      : x(of_x, "x"),
        keys(of_keys, "keys"),
        values(of_values, "values"),
        batch(of_x.size(0)),
        number(x.number),
        wide(accumulators_of(number)),
        how(choose_gemm_unpacked(number)),
        halves(how.arithmetic->a_bytes < static_cast<std::int64_t>(bytes_of(wide))),
        tier(tier_for(silu_attention_kernels_tiers, wide == Number::float64)),
        scale(factor),
        activates(!key_is_activated) {
    const auto beside = [&](const Tensor& tensor, const Batch& as, const char* name) {
      check(on_one_device(tensor, of_x), name, "expected the device of x");
      check(as.number == number, name, "expected the dtype of x");
      check(tensor.size(0) == batch, name, "expected the samples of x, ", batch, ", got ", tensor.size(0));
    };
    beside(of_keys, keys, "keys");
    beside(of_values, values, "values");
    check(keys.cols == x.cols, "keys", "expected the channels of x, ", x.cols, ", got ", keys.cols);
    check(values.rows == keys.rows, "values", "expected one for each key, ", keys.rows, ", got ", values.rows);
    check(drop_ratio >= 0 && drop_ratio < 1, "drop_ratio", "expected at least 0 and below 1, got ", drop_ratio);
    rank = static_cast<std::int64_t>(std::floor(drop_ratio * static_cast<double>(keys.rows)));
  }

  int index() const { return static_cast<int>(number); }
  std::int64_t wide_bytes() const { return static_cast<std::int64_t>(bytes_of(wide)); }
  std::int64_t widest() const { return std::max({x.cols, keys.rows, values.cols}); }

  // How many blocks the rows are cut into, at whole panels: as many rows as the product of the greatest depth has at once.
  std::int64_t blocks() const {
    return std::max<std::int64_t>(1, ceil_div(x.rows, rows_at_once(*how.arithmetic, widest())));
  }
  std::int64_t begin_of(std::int64_t block) const {
    const std::int64_t panel = how.arithmetic->panel_rows;
    return std::min(ceil_div(x.rows, panel) * block / blocks() * panel, x.rows);
  }
  std::int64_t most_rows() const {
    std::int64_t most = 0;
    for (std::int64_t block = 0; block < blocks(); ++block) most = std::max(most, begin_of(block + 1) - begin_of(block));
    return most;
  }

  // --- memory ---------------------------------------------------------------------------------------------------------
  std::int64_t rows_panel_bytes(std::int64_t rows, std::int64_t depth) const {
    return ceil_div(rows, how.arithmetic->panel_rows) * how.arithmetic->a_panel_bytes(depth);
  }
  std::int64_t cols_panel_bytes(std::int64_t cols, std::int64_t depth) const {
    return packed_bytes(*how.arithmetic, cols, depth);
  }

  // --- products -------------------------------------------------------------------------------------------------------
  // Packs rows of A or columns of B, and applies silu to what is packed. The zeros that pad a panel stay zero.
  void pack(bool rows_of_a, const GemmOperand& operand, std::int64_t count, std::int64_t depth, void* panels,
            bool activate) const {
    const GemmArithmetic& arithmetic = *how.arithmetic;
    const std::int64_t lanes = rows_of_a ? arithmetic.panel_rows : arithmetic.panel_cols;
    const std::int64_t bytes = rows_of_a ? arithmetic.a_panel_bytes(depth) : arithmetic.b_panel_bytes(depth);
    const auto activate_panel = halves ? tier.kernels->activate_bfloat16 : tier.kernels->activate[index()];
    const auto pack = (rows_of_a ? arithmetic.pack_a : arithmetic.pack_b)[static_cast<int>(operand.number)];
    parallel_for(ceil_div(count, lanes), depth * lanes, [&](std::int64_t begin, std::int64_t end) {
      GemmOperand part = operand;
      part.data = static_cast<const char*>(operand.data) +
                  begin * lanes * operand.stride * static_cast<std::int64_t>(bytes_of(operand.number));
      char* to = static_cast<char*>(panels) + begin * bytes;
      pack({part, std::min(end * lanes, count) - begin * lanes, depth, to, bytes, nullptr, false});
      for (std::int64_t panel = begin; activate && panel < end; ++panel, to += bytes)
        activate_panel(to, arithmetic.padded(depth) * lanes);
    });
  }

  GemmCall product(std::int64_t rows, std::int64_t cols, std::int64_t depth, Number of_out, void* out) const {
    GemmCall call = call_of(how, of_out, rows, cols, depth);
    call.out = out;
    return call;
  }

  // out [rows, cols] = A B, with B in panels.
  void multiply(const GemmOperand& a, const void* panels, std::int64_t rows, std::int64_t cols, std::int64_t depth,
                Number of_out, void* out) const {
    GemmCall call = product(rows, cols, depth, of_out, out);
    call.a = a;
    call.up.panels = panels;
    gemm(call);
  }

  // Queries times keys, both in panels: the scores before they are scaled, in the same bits for forward and for backward.
  void score(const void* queries, const void* keys_in_panels, std::int64_t rows, void* scores) const {
    GemmCall call = product(rows, keys.rows, x.cols, wide, scores);
    call.a_panels = queries;
    call.up.panels = keys_in_panels;
    gemm(call);
  }

  // What products read of a block's scores: they themselves, or elements rounded from them.
  Number number_of_scores() const { return halves ? number : wide; }
  std::int64_t bytes_of_weights(std::int64_t rows) const {
    return halves ? rows * keys.rows * static_cast<std::int64_t>(bytes_of(number)) : 0;
  }
  // As A, or transposed as A of a sum over the block's rows.
  GemmOperand scores_by_row(const void* scores) const { return {scores, number_of_scores(), keys.rows, 1}; }
  GemmOperand scores_by_key(const void* scores) const { return {scores, number_of_scores(), 1, keys.rows}; }
};

std::tuple<Tensor, Tensor> silu_attention(Tensor x, Tensor keys, Tensor values, double drop_ratio, bool key_is_activated,
                                          double scale) {
  const Problem p(x, keys, values, drop_ratio, key_is_activated, scale);
  Tensor out = new_tensor(x, {p.batch, p.x.rows, p.values.cols}, dtype_of(x));
  const bool doubles = p.wide == Number::float64;
  Tensor threshold = new_tensor(x, {p.batch, p.x.rows}, doubles ? dtype_of(x) : aoti_torch_dtype_float32());
  trace("silu_attention", p.how.name);
  if (p.batch == 0 || p.x.rows == 0) return {out, threshold};

  const std::int64_t m = p.keys.rows, most = p.most_rows();
  Workspace memory(ScratchUse::silu_attention);
  const std::int64_t of_keys = memory.add(p.cols_panel_bytes(m, p.x.cols));
  const std::int64_t of_values = memory.add(p.cols_panel_bytes(p.values.cols, m));
  const std::int64_t of_queries = memory.add(p.rows_panel_bytes(most, p.x.cols));
  const std::int64_t of_scores = memory.add(most * m * p.wide_bytes());
  const std::int64_t of_weights = memory.add(p.bytes_of_weights(most));
  memory.allocate();
  void* weights = p.halves ? memory.at(of_weights) : nullptr;
  const Batch to(out, "out");
  for (std::int64_t sample = 0; sample < p.batch; ++sample) {
    p.pack(false, p.keys.by_row(sample, 0), m, p.x.cols, memory.at(of_keys), p.activates);
    p.pack(false, p.values.by_col(sample, 0), p.values.cols, m, memory.at(of_values), false);
    for (std::int64_t block = 0; block < p.blocks(); ++block) {
      const std::int64_t begin = p.begin_of(block), count = p.begin_of(block + 1) - begin;
      p.pack(true, p.x.by_row(sample, begin), count, p.x.cols, memory.at(of_queries), true);
      p.score(memory.at(of_queries), memory.at(of_keys), count, memory.at(of_scores));
      char* thresholds = static_cast<char*>(threshold.mutable_data_ptr()) + (sample * p.x.rows + begin) * p.wide_bytes();
      const SiluAttentionSelect call{memory.at(of_scores), weights, m, p.rank, scale, thresholds};
      parallel_for(count, m * selection_work, [&](std::int64_t first, std::int64_t last) {
        void* row = scratch(ScratchUse::rows, static_cast<std::size_t>(m * p.wide_bytes()));
        p.tier.kernels->select[p.index()](call, first, last, row);
      });
      p.multiply(p.scores_by_row(p.halves ? weights : memory.at(of_scores)), memory.at(of_values), count, p.values.cols, m, p.number,
                 to.at(sample, begin));
    }
  }
  scratch_done(ScratchUse::silu_attention);
  return {out, threshold};
}

// A gradient that is made in accumulators: in the output itself where that is their type, else in memory that is converted. One
// that a single product gives is made in the output whatever its type (`whole`).
class Gradient {
 public:
  Gradient(const Problem& p, const Tensor& like, bool needed, std::int64_t most_rows, bool whole, Workspace& memory)
      : needed(needed),
        tensor(needed ? new_tensor(like, {like.size(0), like.size(1), like.size(2)}, dtype_of(like))
                      : new_tensor(like, {0}, dtype_of(like))),
        number(whole ? p.number : p.wide),
        rows_(like.size(1)),
        cols_(like.size(2)),
        direct_(p.number == number),
        offset_(memory.add(needed && !direct_ ? most_rows * cols_ * p.wide_bytes() : 0)) {}

  const bool needed;
  Tensor tensor;
  const Number number;  // that products give it in

  void* sums(const Problem& p, const Workspace& memory, std::int64_t sample, std::int64_t row) const {
    return direct_ ? to(p, sample, row) : memory.at(offset_);
  }

  // What the accumulators hold from `row` on, through silu where `pre` is given.
  void finish(const Problem& p, const Workspace& memory, std::int64_t sample, std::int64_t row, std::int64_t count,
              const Batch* pre) const {
    if (direct_ && pre == nullptr) return;
    const SiluAttentionGradient call{sums(p, memory, sample, row), pre == nullptr ? nullptr : pre->at(sample, row),
                                     pre == nullptr ? 0 : pre->row_stride, to(p, sample, row), cols_};
    parallel_for(count, cols_, [&](std::int64_t begin, std::int64_t end) {
      p.tier.kernels->gradient[p.index()](call, begin, end);
    });
  }

 private:
  void* to(const Problem& p, std::int64_t sample, std::int64_t row) const {
    const auto bytes = static_cast<std::int64_t>(bytes_of(p.number));
    return static_cast<char*>(tensor.mutable_data_ptr()) + (sample * rows_ + row) * cols_ * bytes;
  }

  const std::int64_t rows_, cols_;
  const bool direct_;
  const std::int64_t offset_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// With S the scores, kept where they reach the threshold that forward found: P = S kept, dS = (grad V^T) kept scale;
// grad_x = (dS K) silu'(x), grad_keys = (dS^T Q) silu'(keys), grad_values = P^T grad.
Gradients silu_attention_backward(Tensor grad, Tensor x, Tensor keys, Tensor values, Tensor threshold, double drop_ratio,
                                  bool key_is_activated, double scale, bool need_x, bool need_keys, bool need_values) {
  const Problem p(x, keys, values, drop_ratio, key_is_activated, scale);
  const Batch upstream(grad, "grad");
  check(on_one_device(grad, x) && dtype_of(grad) == dtype_of(x), "grad", "expected the device and dtype of x");
  check(grad.is_contiguous() && grad.size(0) == p.batch && upstream.rows == p.x.rows && upstream.cols == p.values.cols, "grad",
        "expected a contiguous gradient of the shape of the output");
  const bool doubles = p.wide == Number::float64;
  check(on_one_device(threshold, x) && threshold.scalar_type() == (doubles ? ScalarType::Double : ScalarType::Float) &&
            threshold.is_contiguous() && threshold.dim() == 2 && threshold.size(0) == p.batch && threshold.size(1) == p.x.rows,
        "threshold", "expected the thresholds of the forward call");
  trace("silu_attention_backward", p.how.name);

  const std::int64_t m = p.keys.rows, d = p.x.cols, width = p.values.cols, most = p.most_rows();
  const bool need_scores = need_values || p.rank > 0, need_gradients = need_x || need_keys;
  Workspace memory(ScratchUse::silu_attention);
  const auto room = [&](bool needed, std::int64_t bytes) { return memory.add(needed ? bytes : 0); };
  const std::int64_t of_keys = room(need_scores, p.cols_panel_bytes(m, d));
  const std::int64_t of_keys_by_channel = room(need_x, p.cols_panel_bytes(d, m));
  const std::int64_t of_values = room(need_gradients, p.cols_panel_bytes(m, width));
  const std::int64_t of_queries = room(need_scores, p.rows_panel_bytes(most, d));
  const std::int64_t of_queries_by_channel = room(need_keys, p.cols_panel_bytes(d, most));
  const std::int64_t of_upstream = room(need_values, p.cols_panel_bytes(width, most));
  const std::int64_t of_scores = room(need_scores, most * m * p.wide_bytes());
  const std::int64_t of_gradients = room(need_gradients, most * m * p.wide_bytes());
  const std::int64_t of_weights = room(need_scores, p.bytes_of_weights(most));
  const std::int64_t of_slopes = room(need_gradients, p.bytes_of_weights(most));
  const Gradient grad_x(p, x, need_x, most, false, memory);
  const bool one_block = p.blocks() == 1;
  const Gradient grad_keys(p, keys, need_keys, m, one_block && !p.activates, memory);
  const Gradient grad_values(p, values, need_values, m, one_block, memory);
  memory.allocate();

  // gradient (+)= a^T B over a block's rows, with B in panels.
  const auto sum_over_rows = [&](const Gradient& gradient, std::int64_t sample, const void* a, std::int64_t panels,
                                 std::int64_t cols, std::int64_t rows, bool first) {
    void* sums = gradient.sums(p, memory, sample, 0);
    GemmCall call = p.product(m, cols, rows, gradient.number, sums);
    call.a = p.scores_by_key(a);
    call.up.panels = memory.at(panels);
    call.residual = first ? nullptr : sums;
    call.residual_stride = cols;
    gemm(call);
  };
  for (std::int64_t sample = 0; sample < p.batch; ++sample) {
    if (need_scores) p.pack(false, p.keys.by_row(sample, 0), m, d, memory.at(of_keys), p.activates);
    if (need_x) p.pack(false, p.keys.by_col(sample, 0), d, m, memory.at(of_keys_by_channel), p.activates);
    if (need_gradients) p.pack(false, p.values.by_row(sample, 0), m, width, memory.at(of_values), false);
    for (std::int64_t block = 0; block < p.blocks(); ++block) {
      const std::int64_t begin = p.begin_of(block), count = p.begin_of(block + 1) - begin;
      void* scores = need_scores ? memory.at(of_scores) : nullptr;
      void* gradients = need_gradients ? memory.at(of_gradients) : nullptr;
      void* weights = p.halves ? memory.at(of_weights) : scores;
      void* slopes = p.halves ? memory.at(of_slopes) : gradients;
      if (need_scores) {
        p.pack(true, p.x.by_row(sample, begin), count, d, memory.at(of_queries), true);
        p.score(memory.at(of_queries), memory.at(of_keys), count, scores);
      }
      if (need_gradients) p.multiply(upstream.by_row(sample, begin), memory.at(of_values), count, m, width, p.wide, gradients);
      const char* thresholds = static_cast<const char*>(threshold.const_data_ptr());
      thresholds += (sample * p.x.rows + begin) * p.wide_bytes();
      const SiluAttentionMask call{scores, gradients, p.halves ? weights : nullptr, p.halves ? slopes : nullptr,
                                   p.rank > 0 ? thresholds : nullptr, m, scale};
      parallel_for(count, m, [&](std::int64_t first, std::int64_t last) {
        p.tier.kernels->mask[p.index()](call, first, last);
      });
      if (need_x) {
        p.multiply(p.scores_by_row(slopes), memory.at(of_keys_by_channel), count, d, m, grad_x.number,
                   grad_x.sums(p, memory, sample, begin));
        grad_x.finish(p, memory, sample, begin, count, &p.x);
      }
      if (need_keys) {
        p.pack(false, p.x.by_col(sample, begin), d, count, memory.at(of_queries_by_channel), true);
        sum_over_rows(grad_keys, sample, slopes, of_queries_by_channel, d, count, block == 0);
      }
      if (need_values) {
        p.pack(false, upstream.by_col(sample, begin), width, count, memory.at(of_upstream), false);
        sum_over_rows(grad_values, sample, weights, of_upstream, width, count, block == 0);
      }
    }
    if (need_keys) grad_keys.finish(p, memory, sample, 0, m, p.activates ? &p.keys : nullptr);
    if (need_values) grad_values.finish(p, memory, sample, 0, m, nullptr);
  }
  scratch_done(ScratchUse::silu_attention);
  return {grad_x.tensor, grad_keys.tensor, grad_values.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("silu_attention", TORCH_BOX(&silu_attention));
  library.impl("silu_attention_backward", TORCH_BOX(&silu_attention_backward));
}

}  // namespace mmk
