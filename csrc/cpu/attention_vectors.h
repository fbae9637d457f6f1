// How vectors make the products of a pair's panels, forward and backward: in accumulators, with keys and values where they lie or
// widened, and with products of their own for a few rows. attention_tiles.h and attention_pairs.h make the same ones of bfloat16 as
// it came. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_products.h"

namespace mmk::MMK_TIER {
namespace {

// Whether a pair goes to what this tier has beyond vectors (attention_tiles.h, attention_pairs.h).
inline bool goes_beyond([[maybe_unused]] const AttentionCall& call, [[maybe_unused]] const Pair& pair) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_amx
  return tiles_pay(pair.rows, pair.len_k, call.dim, call.value_dim);
#elif MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
  return pairs_pay(pair.rows, pair.len_k, call.dim, call.value_dim);
#else
  return false;
#endif
}

// Whether a pair goes to the walk over short sequences (attention_short.h) instead: where the call's scores need nothing but addends
// between the products, and what the kernel for tiny sequences may take has no other order of sums. Forward, floats of few queries
// are as fast the other way.
template <class T, bool backward = false>
inline bool goes_short(const AttentionCall& call, const Pair& pair) {
  constexpr bool floats = MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512 && sizeof(T) == sizeof(float);
  constexpr bool pairs = MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16;
  if constexpr (!floats && !pairs) {
    return false;
  } else {
    if (pairs && !goes_beyond(call, pair)) return false;
    if (floats && !backward && pair.len_q <= 16) return false;
    const bool tiny = pair.len_q <= tiny_rows && pair.len_k <= tiny_keys && call.dim + call.value_dim <= tiny_channels;
    const bool plain = call.heads == call.kv_heads && call.normalise == 0 && !call.gate && call.softcap == 0 && call.dropout_p == 0 &&
                       !call.head_scale && (!call.bias.data || (call.bias.row != 0 && call.bias.col == 1));
    return plain && !tiny && pair.len_q > 4 && pair.len_q <= short_tokens && pair.len_k > 0 && pair.len_k <= short_tokens &&
           call.dim <= short_channels && call.value_dim <= short_channels;
  }
}

// Few rows read their keys and values as they lie, widened on the way.
template <class A>
inline bool reads_directly(const AttentionCall& call, const Pair& pair) {
  return is_few<A>(pair.rows, pair, call) && !pair.tokens && pair.len_k > 0 && call.normalise == 0 && !call.gate;
}

// `memory` is the thread's, where the parts begin that were taken of the layout.
template <class T>
class ForwardVectors {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  static constexpr int lanes = lanes_of<A>;

 public:
  static constexpr int64_t key_unit = 8;  // of a block
  // What is scored of a block begins at a multiple of it, so that each key's weight goes into the same of the four sums wherever
  // the rows of a panel begin to see.
  static constexpr int64_t first_unit = 4;

  ForwardVectors(const AttentionCall& c, Layout& layout, Ahead& next) : call(c), ahead(next) {
    panels_at = layout.take(group_panels * c.dim * lanes);
    outs_at = layout.take(group_panels * c.value_dim * lanes);
    keys_at = layout.take(c.len_k * c.dim);
    values_at = layout.take(c.len_k * c.value_dim);
  }

  static bool takes(const AttentionCall& call, const Pair& pair) { return !goes_beyond(call, pair) && !goes_short<T>(call, pair); }
  static constexpr bool has_few = true;
  static bool takes_few(int64_t rows, const Pair& pair, const AttentionCall& call) { return is_few<A>(rows, pair, call); }

  void begin(void* scratch) { memory = static_cast<A*>(scratch); }
  void end() {}

  void stage(const Pair& pair) {
    direct = reads_directly<A>(call, pair);
    if (direct || pair.len_k == 0) return;
    stage_pair<A, T>(call, pair, memory + keys_at, memory + values_at, nullptr, keys, values);
  }

  void load_queries(const Pair& pair, const Panel<A>& panel, int64_t p) {
    A* to = memory + panels_at + p * call.dim * lanes;
    const auto row = [&](int64_t lane) { return pair.at<T>(call.q, panel.head[lane], panel.query[lane], pair.first_q); };
    if (goes_few(pair, panel)) {
      for (int64_t r = 0; r < panel.count; ++r) {
        const T* from = row(r);
        const Register factors = V::set(query_factor<A, T>(call, panel.head[r], from));
        for (int64_t k = 0; k < call.dim; k += V::width) V::store(to + r * call.dim + k, V::load(from + k) * factors);
      }
      return;
    }
    A factors[lanes];
    query_factors<A, T>(call, panel, factors, row);
    to_lanes<A, T>(panel.vectors(), panel.count, call.dim, factors, to, row);
  }

  // scores [last - first][lanes] of the keys [first, last) and panel p.
  template <int vectors>
  void score(const Pair& pair, const Panel<A>& panel, int64_t p, int64_t first, int64_t last, A* scores) {
    const A* queries = memory + panels_at + p * call.dim * lanes;
    const int64_t count = last - first;
    if (!goes_few(pair, panel)) {
      score_panel<A, vectors>(keys, first, last, call.dim, queries, scores, &ahead);
    } else if (direct) {
      score_few<A>(pair.key<T>(call.k, first), call.k.row, count, queries, panel.count, call.dim, scores);
    } else {
      score_few<A>(keys.data + first * keys.row, keys.row, count, queries, panel.count, call.dim, scores);
    }
  }

  // Adds the values of these keys by their weights to panel p's sums, which `rescale` multiplies first where it has `started`.
  template <int vectors>
  void weigh(const Pair& pair, const Panel<A>& panel, int64_t p, int64_t first, int64_t last, const A* weights, bool started,
             const Register (&rescale)[vectors]) {
    A* outs = memory + outs_at + p * call.value_dim * lanes;
    if (!goes_few(pair, panel)) {
      if (started) rescale_sums<A>(call.value_dim, rescale, outs);
      return weigh_panel<A, vectors>(values, first, last, call.value_dim, weights, started, outs, &ahead);
    }
    weigh_rows(pair, panel, p, first, last, weights, lanes, 1, started, rescale[0]);
  }

  // The two products of a few rows alone: scores [row][keys], rows `row_step` apart, and weights that lie so.
  void score_rows_of(const Pair& pair, const Panel<A>& panel, int64_t p, int64_t first, int64_t last, A* scores, int64_t row_step) {
    const A* queries = memory + panels_at + p * call.dim * lanes;
    with_rows(panel.count, [&]<int rows>() {
      if (direct) {
        score_keys<rows>(pair.key<T>(call.k, first), call.k.row, last - first, queries, call.dim, scores, row_step);
      } else {
        score_keys<rows>(keys.data + first * keys.row, keys.row, last - first, queries, call.dim, scores, row_step);
      }
    });
  }
  void weigh_rows(const Pair& pair, const Panel<A>& panel, int64_t p, int64_t first, int64_t last, const A* weights, int64_t key_step,
                  int64_t row_step, bool started, Register rescale) {
    A* outs = memory + outs_at + p * call.value_dim * lanes;
    const int64_t count = last - first;
    if (started) {
      A factors[lanes];
      V::store(factors, rescale);
      for (int64_t r = 0; r < panel.count; ++r)
        for (int64_t k = 0; k < call.value_dim; k += V::width) {
          A* at = outs + r * call.value_dim + k;
          V::store(at, V::load(at) * V::set(factors[r]));
        }
    }
    if (direct) {
      weigh_few<A>(pair.key<T>(call.v, first), call.v.row, count, weights, key_step, row_step, panel.count, call.value_dim, started, outs);
    } else {
      weigh_few<A>(values.data + first * values.row, values.row, count, weights, key_step, row_step, panel.count, call.value_dim, started, outs);
    }
  }

  // A panel of a few rows, or with few left over.
  bool goes_few(const Pair& pair, const Panel<A>& panel) const { return is_few<A>(panel.count, pair, call); }

  // Panel p's sums times `factors`, to row(lane).
  template <class F>
  void store(const Pair& pair, const Panel<A>& panel, int64_t p, const A* factors, bool stream, const F& row) const {
    const A* outs = memory + outs_at + p * call.value_dim * lanes;
    if (!goes_few(pair, panel)) {
      return from_lanes<A, T>(panel.vectors(), panel.count, call.value_dim, outs, factors, stream, row);
    }
    for (int64_t r = 0; r < panel.count; ++r)
      if (T* to = row(r))
        for (int64_t k = 0; k < call.value_dim; k += V::width)
          V::store(to + k, V::load(outs + r * call.value_dim + k) * V::set(factors[r]));
  }

 private:
  const AttentionCall& call;
  Ahead& ahead;
  int64_t panels_at, outs_at, keys_at, values_at;
  A* memory = nullptr;
  bool direct = false;
  Staged<A> keys{}, values{};
};

// Rows of a task are counted from its first; `row` is the first of a panel.
template <class T>
class BackwardVectors {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  static constexpr int lanes = lanes_of<A>;

 public:
  static constexpr int64_t key_unit = 8;  // of a block

  const int64_t dim, value_dim;  // of rows of dK and dV: padded to whole vectors

  // `panels`: of a task's rows at most.
  BackwardVectors(const AttentionCall& c, int64_t panels, Layout& layout, Ahead& next)
      : dim(rounded_up(c.dim, V::width)), value_dim(rounded_up(c.value_dim, V::width)), call(c), ahead(next) {
    const int64_t keys_of_block = least(rounded_up(c.len_k, key_unit), backward_keys);
    weights_at = layout.take(gathered_panels * keys_of_block * lanes);
    grads_at = layout.take(gathered_panels * keys_of_block * lanes);
    dropped_at = c.dropout_p > 0 ? layout.take(gathered_panels * keys_of_block * lanes) : weights_at;
    keys_at = layout.take(c.len_k * c.dim);
    values_at = layout.take(c.len_k * c.value_dim);
    key_factors_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    grad_keys_at = layout.take(keys_of_block * dim);
    grad_values_at = layout.take(keys_of_block * value_dim);
    query_rows_at = layout.take(panels * lanes * dim);
    out_rows_at = layout.take(panels * lanes * value_dim);
    query_panels_at = layout.take(panels * lanes * c.dim);
    out_panels_at = layout.take(panels * lanes * c.value_dim);
    grad_panels_at = layout.take(panels * lanes * c.dim);
  }

  static bool takes(const AttentionCall& call, const Pair& pair) { return !goes_beyond(call, pair) && !goes_short<T, true>(call, pair); }

  void begin(void* scratch) { memory = static_cast<A*>(scratch); }
  void end() {}

  void stage_keys(const Pair& pair) {
    direct = reads_directly<A>(call, pair);
    if (direct) return;
    stage_pair<A, T>(call, pair, memory + keys_at, memory + values_at, memory + key_factors_at, keys, values);
  }

  // Queries times their factors and gradients of the output, row by row and by panels. `upstream(lane)` of a panel: a row's
  // gradient, null where it is zero.
  template <class F>
  void stage_panel(const Pair& pair, const Panel<A>& panel, int64_t row, const A* factors, const F& upstream) {
    A *queries = memory + query_rows_at + row * dim, *grads = memory + out_rows_at + row * value_dim;
    for (int64_t lane = 0; lane < panel.count; ++lane) {
      const T* query = pair.at<T>(call.q, panel.head[lane], panel.query[lane], pair.first_q);
      for (int64_t k = 0; k < call.dim; k += V::width)
        V::store(queries + lane * dim + k, load_lanes<A>(query + k, least(call.dim - k, V::width)) * V::set(factors[lane]));
      const T* grad = upstream(lane);
      for (int64_t k = 0; k < call.value_dim; k += V::width)
        V::store(grads + lane * value_dim + k, grad ? load_lanes<A>(grad + k, least(call.value_dim - k, V::width)) : V::zero());
    }
    A* sums = memory + grad_panels_at + row * call.dim;
    for (int64_t i = 0; i < lanes * call.dim; ++i) sums[i] = A(0);
    if (few(pair, panel)) return;
    to_lanes<A, A>(panel.vectors(), panel.count, call.dim, static_cast<const A*>(nullptr), memory + query_panels_at + row * call.dim,
                   [&](int64_t lane) { return queries + lane * dim; });
    to_lanes<A, A>(panel.vectors(), panel.count, call.value_dim, static_cast<const A*>(nullptr),
                   memory + out_panels_at + row * call.value_dim, [&](int64_t lane) { return grads + lane * value_dim; });
  }

  // Weights, gradients of scores and what dropout leaves of the weights: [count][lanes], of the p-th panel that is gathered.
  A* weights(int64_t p, int64_t count) const { return memory + weights_at + p * count * lanes; }
  A* grads(int64_t p, int64_t count) const { return memory + grads_at + p * count * lanes; }
  A* dropped(int64_t p, int64_t count) const { return memory + dropped_at + p * count * lanes; }

  // Q K^T of the keys [first, last) and a panel.
  template <int vectors>
  void score(const Pair& pair, const Panel<A>& panel, int64_t row, int64_t first, int64_t last, A* to) {
    if (few(pair, panel)) {
      const A* queries = memory + query_rows_at + row * dim;
      if (direct) return score_few<A>(pair.key<T>(call.k, first), call.k.row, last - first, queries, panel.count, call.dim, to);
      return score_few<A>(keys.data + first * keys.row, keys.row, last - first, queries, panel.count, call.dim, to);
    }
    score_panel<A, vectors>(keys, first, last, call.dim, memory + query_panels_at + row * call.dim, to, &ahead);
  }

  // dO V^T of the same.
  template <int vectors>
  void score_gradients(const Pair& pair, const Panel<A>& panel, int64_t row, int64_t first, int64_t last, A* to) {
    if (few(pair, panel)) {
      const A* upstream = memory + out_rows_at + row * value_dim;
      if (direct) return score_few<A>(pair.key<T>(call.v, first), call.v.row, last - first, upstream, panel.count, call.value_dim, to);
      return score_few<A>(values.data + first * values.row, values.row, last - first, upstream, panel.count, call.value_dim, to);
    }
    score_panel<A, vectors>(values, first, last, call.value_dim, memory + out_panels_at + row * call.value_dim, to, &ahead);
  }

  // Adds dS K of these keys to a panel's sums.
  template <int vectors>
  void weigh(const Pair& pair, const Panel<A>& panel, int64_t row, int64_t first, int64_t last, const A* grad) {
    A* sums = memory + grad_panels_at + row * call.dim;
    if (few(pair, panel)) {
      if (direct)
        return weigh_few<A>(pair.key<T>(call.k, first), call.k.row, last - first, grad, lanes, 1, panel.count, call.dim, true, sums);
      return weigh_few<A>(keys.data + first * keys.row, keys.row, last - first, grad, lanes, 1, panel.count, call.dim, true, sums);
    }
    weigh_panel<A, vectors>(keys, first, last, call.dim, grad, true, sums, &ahead);
  }

  // What gather needs of the p-th panel stays where it is.
  template <int vectors>
  void keep(const Panel<A>&, int64_t, int64_t, int64_t) {}
  void keep_zeros(int64_t p, int64_t count) {
    for (A* buffer : {dropped(p, count), grads(p, count)})
      for (int64_t i = 0; i < count * lanes; ++i) buffer[i] = A(0);
  }

  // dK and dV of a block of `count` keys, from `panels` panels whose first begins at `row` and whose last has `last` rows.
  void gather(int64_t row, int64_t panels, int64_t last, int64_t count, bool accumulate) {
    gather_panels<A>(dropped(0, count), count * lanes, panels, last, count, memory + out_rows_at + row * value_dim, call.value_dim,
                     accumulate, memory + grad_values_at);
    gather_panels<A>(grads(0, count), count * lanes, panels, last, count, memory + query_rows_at + row * dim, call.dim, accumulate,
                     memory + grad_keys_at);
  }
  A* grad_keys() const { return memory + grad_keys_at; }
  A* grad_values() const { return memory + grad_values_at; }

  // Whether a panel's sums are rows [count][D] instead of [D][lanes].
  bool few(const Pair& pair, const Panel<A>& panel) const { return is_few<A>(panel.count, pair, call); }
  const A* sums(int64_t row) const { return memory + grad_panels_at + row * call.dim; }

  // A key over its norm, where keys are normalised, and its factor.
  const A* unit_key(const Pair&, int64_t key) const { return keys.data + key * keys.row; }
  A key_factor(int64_t key) const { return memory[key_factors_at + key]; }

 private:
  const AttentionCall& call;
  Ahead& ahead;
  int64_t weights_at, grads_at, dropped_at, keys_at, values_at, key_factors_at, grad_keys_at, grad_values_at, query_rows_at,
      out_rows_at, query_panels_at, out_panels_at, grad_panels_at;
  A* memory = nullptr;
  bool direct = false;
  Staged<A> keys{}, values{};
};

}  // namespace
}  // namespace mmk::MMK_TIER
