// Short sequences, of at most 64 queries and as many keys: windows, the frames of a token. A pair's keys are the lanes of up to
// four vectors, so its scores lie row by row: weights leave them as the rows that the next products broadcast, outputs and
// gradients as the rows that are stored, and only keys (in backward values too) are transposed.
//   S  [rows][keys] = Q   K^T      O  [rows][Dv] = P    V
//   dP [rows][keys] = dO  V^T      dQ [rows][D]  = dS   K
//   dV [keys][Dv]   = P^T dO       dK [keys][D]  = dS^T Q
// Rows go through in groups of at most 16, whose scores stay in the first-level cache and whose sums over lanes are made at once
// by transposing. Operands are floats, or with AVX512_BF16 pairs of bfloat16 along the depth as in attention_pairs.h, of which
// only weights and gradients of scores are rounded. Included by *.tier.cpp only, of tiers whose vectors have 16 lanes, in the
// tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_short_addends.h"
#include "attention_short_products.h"

namespace mmk::MMK_TIER {
namespace {

// What forward and backward share: where operands lie, and their products.
template <class T, bool backward>
class ShortOperands {
 protected:
  using V = Vec<float>;
  using Register = V::Register;

  ShortOperands(const AttentionCall& c) : call(c), addends(c, layout) {
    ahead_at = layout.take(ceil_div(most_ahead * sizeof(void*), sizeof(float)));
  }

  int64_t take(int64_t elements) { return layout.take(ceil_div(elements * static_cast<int64_t>(sizeof(T)), sizeof(float))); }
  int64_t take_columns(int64_t channels) { return take(short_tokens * Short<T>::steps(channels) * Short<T>::depth); }
  int64_t take_rows(int64_t channels) { return take(short_tokens * Short<T>::width(channels)); }
  T* elements(int64_t at) const { return reinterpret_cast<T*>(memory + at); }

  void begin(void* scratch) {
    memory = static_cast<float*>(scratch);
    ahead.rows = reinterpret_cast<const void**>(memory + ahead_at);
    addends.begin(memory);
  }

  // What is read next comes while `pair` computes: a share of the rows of all heads that the batch entry after this one has, in
  // the order of memory, where `entry` says that all of it comes; else the rows of `next`.
  void look_ahead(const Pair& pair, const Pair& next, bool entry, std::initializer_list<AttentionOperand> of_keys,
                  std::initializer_list<AttentionOperand> of_queries) {
    ahead.count = ahead.next = 0;
    const int64_t heads = call.heads;
    bool side_by_side = entry && call.dim == call.value_dim;
    for (const auto& operands : {of_keys, of_queries})
      for (const AttentionOperand& operand : operands) side_by_side = side_by_side && operand.head == call.dim;
    const Pair other = side_by_side ? Pair(call, pair.b + 1, 0) : next;
    if ((other.b == pair.b && other.h == pair.h) || !goes_short<T, backward>(call, other)) return;
    ahead.bytes = (side_by_side ? heads * call.dim : most(call.dim, call.value_dim)) * static_cast<int64_t>(sizeof(T));
    const auto add = [&](const AttentionOperand& operand, int64_t count, int64_t first) {
      const int64_t begin = side_by_side ? count * pair.h / heads : 0, end = side_by_side ? count * (pair.h + 1) / heads : count;
      for (int64_t i = begin; i < end; ++i) ahead.add(other.at<T>(operand, other.h, i, first));
    };
    for (const AttentionOperand& operand : of_keys) add(operand, other.len_k, other.first_k);
    for (const AttentionOperand& operand : of_queries) add(operand, other.len_q, other.first_q);
  }

  // Where the rows of an operand are.
  struct Places {
    const T* rows[short_tokens];

    Places(const Pair& pair, const AttentionOperand& operand, int64_t count, int64_t first, bool inside_only) {
      if (pair.tokens) {
        for (int64_t i = 0; i < count; ++i)
          rows[i] = inside_only && !pair.inside(i) ? nullptr : pair.at<T>(operand, pair.h, i, first);
      } else {
        const T* row = pair.at<T>(operand, pair.h, 0, first);
        for (int64_t i = 0; i < count; ++i, row += operand.row) rows[i] = row;
      }
    }
    const T* operator()(int64_t i) const { return rows[i]; }
  };

  // Rows become columns; vector v of them is at `column(at, channels, v)`.
  template <class F>
  void make_columns(int64_t count, int64_t channels, int64_t at, const F& row) {
    for (int64_t first = 0; first < count; first += lanes_of<float>)
      Short<T>::make_columns(least(count - first, lanes_of<float>), channels, column(at, channels, first / 16),
                             [&](int64_t lane) { return row(first + lane); });
  }
  T* column(int64_t at, int64_t channels, int64_t vector) const {
    constexpr int64_t lanes = lanes_of<float> * Short<T>::depth;
    return elements(at) + vector / 2 * Short<T>::steps(channels) * lanes + vector % 2 * lanes / 2;
  }

  // Rows where they lie, or copied: of an operand that may have no rows for some tokens, or has them in the order of a window.
  template <class F>
  Staged<T> lefts(const Pair& pair, int64_t count, const AttentionOperand& operand, int64_t channels, int64_t at, const F& row) {
    if (!pair.tokens && Short<T>::in_place(channels)) return {row(0), operand.row};
    Short<T>::make_lefts(count, channels, elements(at), row);
    return {elements(at), Short<T>::width(channels)};
  }

  // Rows [begin, begin + count) of `rows` times columns.
  template <class Emit>
  void multiply_columns(const Staged<T>& rows, int64_t begin, int64_t count, int64_t channels, int64_t columns, int64_t vectors,
                        const Emit& emit) {
    ShortProduct<T, Emit> product{rows.data + begin * rows.row, rows.row, Short<T>::depth, {}, lanes_of<float> * Short<T>::depth,
                                  Short<T>::steps(channels), emit};
    for (int64_t v = 0; v < vectors; ++v) product.b[v] = column(columns, channels, v);
    with_short_vectors(vectors, [&]<int constant>() { multiply_lanes<constant, false>(product, count); });
  }

  // to [count][channels] = A times rows: step k of A's row i at i * a_row + k * a_step.
  template <class To>
  void multiply_rows(const T* a, int64_t a_row, int64_t a_step, int64_t count, int64_t depth, const ShortRight<T>& rights,
                     int64_t channels, To* const* to, const float* factors, bool stream, float* pad) {
    for (int64_t channel = 0; channel < channels; channel += short_tokens) {
      const int64_t vectors = ceil_div(least(channels - channel, short_tokens), V::width);
      ShortProduct<T, ToRows<T, To>> product{a, a_row, a_step, {}, rights.row, Short<T>::steps(depth),
                                             {to, factors, channel, channels, stream, pad}};
      for (int64_t v = 0; v < vectors; ++v) product.b[v] = rights.data + (channel + v * V::width) * Short<T>::depth;
      with_short_vectors(vectors, [&]<int constant>() { multiply_lanes<constant, false>(product, count); });
    }
  }

  // Nearly equal groups of an even number of rows, but for the last.
  static int64_t groups_of(int64_t rows) { return ceil_div(rows, short_group); }
  static int64_t group_begin(int64_t rows, int64_t group) {
    return group == groups_of(rows) ? rows : (rows + 1) / 2 * group / groups_of(rows) * 2;
  }

  const AttentionCall& call;
  Layout layout;
  Ahead ahead;
  ShortAddends addends;
  int64_t ahead_at;
  float* memory = nullptr;
};

template <class T>
class ShortForward : ShortOperands<T, false> {
  using Base = ShortOperands<T, false>;
  using V = Vec<float>;
  using Register = V::Register;
  using Places = typename Base::Places;
  using Base::addends, Base::ahead, Base::call, Base::elements, Base::layout, Base::memory;

 public:
  explicit ShortForward(const AttentionCall& c) : Base(c) {
    queries_at = this->take_rows(c.dim);
    keys_at = this->take_columns(c.dim);
    value_rows_at = this->take_rows(c.value_dim);
    values_at = this->take_rows(c.value_dim);
    scores_at = layout.take(short_group * short_tokens);
    lanes_at = layout.take(short_group * V::width);
    weights_at = this->take(short_group * short_tokens);
    streams = rows_stream<T>(c, c.out, c.value_dim);
  }

  int64_t bytes() const { return layout.end * static_cast<int64_t>(sizeof(float)); }

  void run(int64_t begin, int64_t end, void* scratch) {
    if (!call.cu_q && !goes_short<T>(call, Pair(call, 0, 0))) return;
    Base::begin(scratch);
    Item item(call, begin);
    for (int64_t number = begin; number < end; ++number) {
      const Item next(call, number + 1 < end ? number + 1 : number);
      // The first block has all rows.
      if (item.block == 0 && goes_short<T>(call, item.pair)) {
        this->look_ahead(item.pair, next.pair, !call.batch_inside && number + call.heads < end, {call.k, call.v}, {call.q});
        run_pair(item.pair);
      }
      item = next;
    }
    if (streams) stream_fence();
  }

 private:
  void run_pair(const Pair& pair) {
    const Places key(pair, call.k, pair.len_k, pair.first_k, false), query(pair, call.q, pair.len_q, pair.first_q, false);
    const Places of_value(pair, call.v, pair.len_k, pair.first_k, false);
    // What no row sees may be anything, and would not be multiplied by other kernels either.
    const int64_t in_sight = keys_in_sight(call, pair);
    const auto value = [&](int64_t j) -> const T* { return j < in_sight ? of_value(j) : nullptr; };
    this->make_columns(pair.len_k, call.dim, keys_at, key);
    const Staged<T> queries = this->lefts(pair, pair.len_q, call.q, call.dim, queries_at, query);
    ahead.until(ahead.count / 8);
    const Staged<float> added = addends.of(pair);
    ShortRight<T> values{};
    const int64_t groups = this->groups_of(pair.len_q);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = this->group_begin(pair.len_q, group), count = this->group_begin(pair.len_q, group + 1) - first;
      const auto look = [&](int64_t eighths) { ahead.until(ahead.count * (8 * group + eighths) / (8 * groups)); };
      with_short_vectors(ceil_div(pair.len_k, V::width), [&]<int vectors>() {
        run_group<vectors>(pair, first, count, queries, {added.data + first * added.row, added.row}, look);
      });
      if (group == 0) values = rights_of_values(pair, value, in_sight);
      look(6);
      T* rows[short_group];
      for (int64_t i = 0; i < count; ++i)
        rows[i] = pair.inside(first + i) ? pair.at<T>(call.out, pair.h, first + i, pair.first_q) : nullptr;
      this->multiply_rows(elements(weights_at), Short<T>::width(pair.len_k), Short<T>::depth, count, pair.len_k, values,
                          call.value_dim, rows, factors, streams, nullptr);
      look(8);
    }
  }

  template <class F>
  ShortRight<T> rights_of_values(const Pair& pair, const F& value, int64_t in_sight) {
    Staged<T> rows{};
    if constexpr (Short<T>::depth == 1) {
      if (in_sight == pair.len_k) {
        rows = this->lefts(pair, pair.len_k, call.v, call.value_dim, value_rows_at, value);
      } else {
        Short<T>::make_lefts(pair.len_k, call.value_dim, elements(value_rows_at), value);
        rows = {elements(value_rows_at), Short<T>::width(call.value_dim)};
      }
    }
    return Short<T>::make_rights(pair.len_k, call.value_dim, elements(values_at), rows, value);
  }

  // Weights of a group of rows, and what its outputs are multiplied by.
  template <int vectors, class F>
  void run_group(const Pair& pair, int64_t first, int64_t count, const Staged<T>& queries, const Staged<float>& added,
                 const F& look) {
    float *scores = memory + scores_at, *lanes = memory + lanes_at;
    this->multiply_columns(queries, first, count, call.dim, keys_at, vectors,
                           ToScores{scores, added.data, added.row, static_cast<float>(call.scale), addends.hides(), lanes});
    look(3);
    const Register top = join_lanes(lanes, count, V::max);
    float tops[short_group], sums[short_group], logs[short_group];
    V::store(tops, V::select(V::less_equal(V::set(lowest<float>()), top), top, V::zero()));
    for (int64_t i = 0; i < count; ++i) {
      const Register from = V::set(tops[i]);
      Register weights[vectors], sum;
      for (int v = 0; v < vectors; ++v) {
        weights[v] = exp_of_negative<float>(V::load(scores + (i * vectors + v) * V::width) - from);
        sum = v == 0 ? weights[v] : sum + weights[v];
      }
      V::store(lanes + i * V::width, sum);
      Short<T>::round(weights, elements(weights_at) + i * Short<T>::width(pair.len_k));
    }
    look(4);
    const Register sum = join_lanes(lanes, count, plus);
    V::store(sums, sum);
    V::store(factors, inverse_of_sum<float>(sum));
    for (int i = 0; i < short_group; ++i) logs[i] = log_of_positive(sums[i]);
    float* lse = static_cast<float*>(call.lse) + pair.b * call.lse_batch + pair.h * call.lse_head + (pair.first_q + first) * call.lse_row;
    for (int64_t i = 0; i < count; ++i)
      lse[i * call.lse_row] = sums[i] == 0.0f ? static_cast<float>(minus_infinity) : tops[i] + logs[i];
  }

  bool streams;
  int64_t queries_at, keys_at, value_rows_at, values_at, scores_at, lanes_at, weights_at;
  float factors[short_group];
};

// Weights are made again from the logarithms of their sums, as attention_backward.tier.cpp has it of a pair whose keys are at hand
// at once.
template <class T>
class ShortBackward : ShortOperands<T, true> {
  using Base = ShortOperands<T, true>;
  using V = Vec<float>;
  using Register = V::Register;
  using Places = typename Base::Places;
  using Base::addends, Base::ahead, Base::call, Base::elements, Base::layout, Base::memory;

 public:
  explicit ShortBackward(const AttentionBackward& backward) : Base(backward.call), back(backward) {
    for (int64_t* at : {&queries_at, &query_rights_at, &key_rows_at, &key_rights_at}) *at = this->take_rows(call.dim);
    for (int64_t* at : {&grads_at, &grad_rights_at}) *at = this->take_rows(call.value_dim);
    keys_at = this->take_columns(call.dim);
    values_at = this->take_columns(call.value_dim);
    scores_at = layout.take(short_group * short_tokens);
    slopes_at = layout.take(short_group * short_tokens);
    lanes_at = layout.take(2 * short_group * V::width);
    for (int64_t* at : {&weight_rows_at, &slope_rows_at}) *at = this->take(short_tokens * short_tokens);
    for (int64_t* at : {&weight_pairs_at, &slope_pairs_at}) *at = this->take(Short<T>::depth > 1 ? short_tokens * short_tokens : 0);
    stream_queries = rows_stream<T>(call, back.grad_q, call.dim);
    stream_keys = rows_stream<T>(call, back.grad_k, call.dim);
    stream_values = rows_stream<T>(call, back.grad_v, call.value_dim);
  }

  int64_t bytes() const { return layout.end * static_cast<int64_t>(sizeof(float)); }

  void run(int64_t begin, int64_t end, void* scratch) {
    if (!call.cu_q && !goes_short<T, true>(call, Pair(call, 0, 0))) return;
    Base::begin(scratch);
    const Members members(back);
    for (int64_t task = begin; task < end; ++task) {
      const Members::Run run = members.run(task);
      if (run.split > 0) continue;  // a short pair's rows are one part
      for (int64_t m = run.begin; m < run.end; ++m) {
        const Pair pair = members.pair(run.group, m);
        if (!goes_short<T, true>(call, pair)) continue;
        this->look_ahead(pair, members.next(task, run, m, end), members.lie_ahead(task, run, m, end, call.heads),
                         {call.k, call.v}, {call.q, back.grad_out});
        run_pair(pair, run.chunk);
      }
    }
    if (stream_keys || stream_values || stream_queries) stream_fence();
  }

 private:
  void run_pair(const Pair& pair, int64_t chunk) {
    const Places key(pair, call.k, pair.len_k, pair.first_k, false), value(pair, call.v, pair.len_k, pair.first_k, false);
    const Places query(pair, call.q, pair.len_q, pair.first_q, false), upstream(pair, back.grad_out, pair.len_q, pair.first_q, true);
    this->make_columns(pair.len_k, call.dim, keys_at, key);
    this->make_columns(pair.len_k, call.value_dim, values_at, value);
    const Staged<T> queries = this->lefts(pair, pair.len_q, call.q, call.dim, queries_at, query);
    const Staged<T> grads = this->lefts(pair, pair.len_q, back.grad_out, call.value_dim, grads_at, upstream);
    Staged<T> key_rows{};
    if constexpr (Short<T>::depth == 1) key_rows = this->lefts(pair, pair.len_k, call.k, call.dim, key_rows_at, key);
    const ShortRight<T> of_keys = Short<T>::make_rights(pair.len_k, call.dim, elements(key_rights_at), key_rows, key);
    const ShortRight<T> of_queries = Short<T>::make_rights(pair.len_q, call.dim, elements(query_rights_at), queries, query);
    const ShortRight<T> of_grads = Short<T>::make_rights(pair.len_q, call.value_dim, elements(grad_rights_at), grads, upstream);
    const Staged<float> added = addends.of(pair);
    float scales[short_tokens], ones[short_tokens];
    for (int64_t i = 0; i < short_tokens; ++i) {
      scales[i] = static_cast<float>(call.scale);
      ones[i] = 1.0f;
    }
    const int64_t width = Short<T>::width(pair.len_k);
    T* rows[short_tokens];
    for (int64_t i = 0; i < pair.len_q; ++i)
      rows[i] = pair.inside(i) ? pair.at<T>(back.grad_q, pair.h, i, pair.first_q) : nullptr;
    const int64_t groups = this->groups_of(pair.len_q);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = this->group_begin(pair.len_q, group), count = this->group_begin(pair.len_q, group + 1) - first;
      const auto look = [&](int64_t eighths) { ahead.until(ahead.count * (8 * group + eighths) / (8 * groups + 4)); };
      with_short_vectors(ceil_div(pair.len_k, V::width), [&]<int vectors>() {
        run_group<vectors>(pair, first, count, queries, grads, {added.data + first * added.row, added.row}, chunk, look);
      });
      look(6);
      this->multiply_rows(elements(slope_rows_at) + first * width, width, Short<T>::depth, count, pair.len_k, of_keys, call.dim,
                          rows + first, scales, stream_queries, nullptr);
      look(8);
    }
    float* pad = static_cast<float*>(back.grad_pad);
    if (pad) {
      pad += (pair.b * call.kv_heads + pair.h) * (call.dim + call.value_dim);
      for (int64_t k = 0; k < call.dim + call.value_dim; ++k) pad[k] = 0.0f;
    }
    gather(pair, weight_rows_at, weight_pairs_at, of_grads, call.value_dim, back.grad_v, back.partial_v, ones, stream_values,
           pad ? pad + call.dim : nullptr);
    ahead.until(ahead.count);
    gather(pair, slope_rows_at, slope_pairs_at, of_queries, call.dim, back.grad_k, back.partial_k, scales, stream_keys, pad);
  }

  // Weights and gradients of scores of a group of rows.
  template <int vectors, class F>
  void run_group(const Pair& pair, int64_t first, int64_t count, const Staged<T>& queries, const Staged<T>& grads,
                 const Staged<float>& added, int64_t chunk, const F& look) {
    float *scores = memory + scores_at, *slopes = memory + slopes_at, *sums = memory + lanes_at, *dots = sums + short_group * V::width;
    this->multiply_columns(queries, first, count, call.dim, keys_at, vectors,
                           ToScores{scores, added.data, added.row, static_cast<float>(call.scale), addends.hides(), nullptr});
    this->multiply_columns(grads, first, count, call.value_dim, values_at, vectors, ToBuffer{slopes});
    look(3);
    float inverses[short_group], centres[short_group], less[short_group] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = pair.b * call.lse_batch + pair.h * call.lse_head + (pair.first_q + first + i) * call.lse_row;
      const float lse = static_cast<const float*>(call.lse)[at];
      const bool nothing = lse == static_cast<float>(minus_infinity);
      if (!nothing && back.grad_lse) less[i] = static_cast<const float*>(back.grad_lse)[at];
      const Register from = V::set(nothing ? static_cast<float>(-minus_infinity) : lse);
      Register sum, product;
      for (int v = 0; v < vectors; ++v) {
        float* weight = scores + (i * vectors + v) * V::width;
        const Register w = exp_of_negative<float>(V::load(weight) - from), slope = V::load(slopes + (i * vectors + v) * V::width);
        V::store(weight, w);
        sum = v == 0 ? w : sum + w;
        product = v == 0 ? w * slope : V::fma(w, slope, product);
      }
      V::store(sums + i * V::width, sum);
      V::store(dots + i * V::width, product);
    }
    // With all keys at hand the weights' own sum rids them of the rounding of its logarithm.
    const Register inverse = inverse_of_sum<float>(join_lanes(sums, count, plus));
    V::store(inverses, inverse);
    V::store(centres, V::fma(join_lanes(dots, count, plus), inverse, -V::load(less)));
    for (int64_t i = 0; i < count; ++i) {
      const Register factor = V::set(inverses[i]), centre = V::set(centres[i]);
      Register weights[vectors], gradients[vectors];
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = (i * vectors + v) * V::width;
        weights[v] = V::load(scores + at) * factor;
        gradients[v] = weights[v] * (V::load(slopes + at) - centre);
      }
      Short<T>::round(weights, elements(weight_rows_at) + (first + i) * Short<T>::width(pair.len_k));
      Short<T>::round(gradients, elements(slope_rows_at) + (first + i) * Short<T>::width(pair.len_k));
      if (back.grad_bias) {
        float* to = static_cast<float*>(back.grad_bias) + chunk * back.bias_chunk + pair.b * back.bias_batch + pair.h * back.bias_head +
                    (first + i) * back.bias_row;
        for (int v = 0; v < vectors; ++v, to += V::width) {
          const int64_t lanes = least(pair.len_k - v * V::width, V::width);
          store_lanes<float>(to, load_lanes<float>(to, lanes) + gradients[v], lanes);
        }
      }
    }
  }

  // A gradient of keys or values: the rows that belong to queries, times their weights or gradients of scores.
  void gather(const Pair& pair, int64_t rows_at, int64_t pairs_at, const ShortRight<T>& rights, int64_t channels,
              const AttentionOperand& to, void* partial, const float* factors, bool stream, float* pad) {
    const int64_t width = Short<T>::width(pair.len_k);
    Short<T>::round_down(elements(rows_at), pair.len_q, width, elements(pairs_at));
    const T* a = elements(Short<T>::depth > 1 ? pairs_at : rows_at);
    constexpr int64_t step = Short<T>::depth;
    if (back.splits > 1) {
      float* at = static_cast<float*>(partial) + (pair.b * call.kv_heads + pair.h) * call.len_k * channels;
      float* rows[short_tokens];
      for (int64_t j = 0; j < pair.len_k; ++j) rows[j] = at + j * channels;
      return this->multiply_rows(a, step, step * width, pair.len_k, pair.len_q, rights, channels, rows, factors, false, pad);
    }
    T* rows[short_tokens];
    for (int64_t j = 0; j < pair.len_k; ++j) rows[j] = pair.inside(j) ? pair.key<T>(to, j) : nullptr;
    this->multiply_rows(a, step, step * width, pair.len_k, pair.len_q, rights, channels, rows, factors, stream, pad);
  }

  const AttentionBackward& back;
  bool stream_queries, stream_keys, stream_values;
  int64_t queries_at, query_rights_at, key_rows_at, key_rights_at, grads_at, grad_rights_at, keys_at, values_at, scores_at, slopes_at,
      lanes_at, weight_rows_at, slope_rows_at, weight_pairs_at, slope_pairs_at;
};

}  // namespace
}  // namespace mmk::MMK_TIER
