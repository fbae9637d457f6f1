// How matrix tiles make the products of a pair's panels, in place of attention_vectors.h: operands in bfloat16 as they came, sums
// in float32. The transposed layout is theirs too. With keys as rows and queries as columns (tiles.h),
//   S^T  [keys][lanes]     = K   [keys][D]        Q^T [D][lanes]
//   dP^T [keys][lanes]     = V   [keys][Dv]       dO^T [Dv][lanes]
//   O^T  [Dv][lanes]      += V^T [Dv][keys]       P^T [keys][lanes]
//   dQ^T [D][lanes]       += K^T [D][keys]        dS^T [keys][lanes]
//   dK   [keys][D]        += dS^T [keys][lanes]   Q [lanes][D]
//   dV   [keys][Dv]       += P^T [keys][lanes]    dO [lanes][Dv]
// and the weights of 32 keys, rounded, with pairs of keys side by side, are the right operand of the next product. Only weights
// and gradients of scores are rounded: scales, norms and gates are factors of what is in float32.
//
// Every operand is padded with zeros to whole panels of 32 and steps of 32, weights too, so a sum depends on Lq, Lk and the
// channels alone. Only in files that are compiled with AMX on.
#pragma once
#include "attention_factors.h"
#include "core/tiles.h"

namespace mmk::amx {
namespace {

static_assert(lanes_of<float> == panel_size);

// to [last - first][lanes] = keys (or values) times a panel of `columns`, times one factor a row and one a key where there are any.
template <int vectors>
inline void multiply_keys(const Panels& keys, const Panels& columns, int64_t panel, int64_t first, int64_t last,
                          const float* row_factors, const float* key_factors, float* to) {
  using V = Vec<float>;
  constexpr int lanes = lanes_of<float>;
  for (int64_t key = first; key < last; key += 32)
    multiply_panel(keys.at(key / 32, 0), columns.at(panel, 0), keys.steps, to + (key - first) * lanes, lanes, last - key,
                   vectors * 16, false);
  if (row_factors == nullptr && key_factors == nullptr) return;
  V::Register factors[vectors];
  for (int v = 0; v < vectors; ++v) factors[v] = row_factors ? V::load(row_factors + v * V::width) : V::set(1.0f);
  for (int64_t j = 0; j < last - first; ++j) {
    const V::Register of_key = V::set(key_factors ? key_factors[first + j] : 1.0f);
    for (int v = 0; v < vectors; ++v) {
      float* at = to + j * lanes + v * V::width;
      V::store(at, V::load(at) * factors[v] * of_key);
    }
  }
}

// Weights [count][lanes], times one factor a key where there are any, rounded to a panel of a right operand whose depth is the
// keys: pairs of them side by side, zero up to the next step.
template <int vectors>
inline void round_to_pairs(const float* weights, int64_t count, const float* key_factors, const Panels& to) {
  using V = Vec<float>;
  constexpr int lanes = lanes_of<float>;
  for (int64_t j = 0; j < rounded_up(count, 32); j += 2)
    for (int v = 0; v < vectors; ++v) {
      const auto load = [&](int64_t key) {
        if (key >= count) return V::zero();
        const V::Register weight = V::load(weights + key * lanes + v * V::width);
        return key_factors ? weight * V::set(key_factors[key]) : weight;
      };
      V::store_pair<true>(to.tile(0, j / 32, v) + j % 32 / 2 * 32, load(j), load(j + 1));
    }
}

// sums [channels][lanes] (+)= columns of the keys [first, first + count), as panels of channels, times the rounded weights.
template <int vectors>
inline void multiply_weights(const Panels& channels, int64_t count_of_channels, const Panels& weights, int64_t first, int64_t count,
                             bool accumulate, float* sums) {
  constexpr int lanes = lanes_of<float>;
  for (int64_t channel = 0; channel < count_of_channels; channel += 32)
    multiply_panel(channels.at(channel / 32, first / 32), weights.at(0, 0), in_steps(count), sums + channel * lanes, lanes,
                   count_of_channels - channel, vectors * 16, accumulate);
}

class ForwardTiles {
  using V = Vec<float>;
  static constexpr int lanes = lanes_of<float>;

 public:
  static constexpr int64_t key_unit = 32, first_unit = 32;

  ForwardTiles(const AttentionCall& c, Layout& layout, Ahead&) : call(c) {
    const int64_t block = least(rounded_up(c.len_k, key_unit), forward_keys);
    queries_at = layout.take(panels_size(group_panels * lanes, c.dim));
    factors_at = layout.take(group_panels * lanes);
    keys_at = layout.take(panels_size(c.len_k, c.dim));
    values_at = layout.take(panels_size(c.value_dim, c.len_k));
    weights_at = layout.take(panels_size(lanes, block));
    outs_at = layout.take(group_panels * rounded_up(c.value_dim, 32) * lanes);
    norms_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    gates_at = layout.take(c.gate ? c.len_k : 0);
  }

  static constexpr bool has_few = false;
  static bool takes_few(int64_t, const Pair&, const AttentionCall&) { return false; }
  static bool takes(const AttentionCall& call, const Pair& pair) { return goes_beyond(call, pair); }

  void begin(void* scratch) {
    memory = static_cast<float*>(scratch);
    queries = {memory + queries_at, in_steps(call.dim)};
    keys = {memory + keys_at, in_steps(call.dim)};
    configure_tiles();
  }
  void end() { _tile_release(); }

  void stage(const Pair& pair) {
    const int64_t len_k = pair.len_k;
    pack_rows<false>(len_k, call.dim, keys, 0, [&](int64_t j) { return pair.key<bfloat16>(call.k, j); });
    // What no row sees may be anything, and would not be multiplied by vectors either.
    const int64_t in_sight = keys_in_sight(call, pair);
    values = {memory + values_at, in_steps(len_k)};
    pack_columns<false>(len_k, call.value_dim, values, 0,
                        [&](int64_t j) { return j < in_sight ? pair.key<bfloat16>(call.v, j) : nullptr; });
    if (call.normalise > 0) stage_key_factors(call, pair, memory + norms_at, memory + norms_at);
    if (call.gate) stage_gates(call, pair, memory + gates_at);
  }

  void load_queries(const Pair& pair, const Panel<float>& panel, int64_t p) {
    const auto row = [&](int64_t lane) { return pair.at<bfloat16>(call.q, panel.head[lane], panel.query[lane], pair.first_q); };
    pack_rows<true>(panel.count, call.dim, queries, p, row);
    query_factors<float, bfloat16>(call, panel, memory + factors_at + p * lanes, row);
  }

  template <int vectors>
  void score(const Pair&, const Panel<float>&, int64_t p, int64_t first, int64_t last, float* scores) {
    multiply_keys<vectors>(keys, queries, p, first, last, memory + factors_at + p * lanes,
                           call.normalise > 0 ? memory + norms_at : nullptr, scores);
  }

  template <int vectors>
  void weigh(const Pair&, const Panel<float>&, int64_t p, int64_t first, int64_t last, const float* weights, bool started,
             const V::Register (&rescale)[vectors]) {
    float* outs = sums(p);
    const Panels rounded{memory + weights_at, in_steps(last - first)};
    if (started) rescale_sums<float>(call.value_dim, rescale, outs);
    round_to_pairs<vectors>(weights, last - first, call.gate ? memory + gates_at + first : nullptr, rounded);
    multiply_weights<vectors>(values, call.value_dim, rounded, first, last - first, started, outs);
  }

  template <class F>
  void store(const Pair&, const Panel<float>& panel, int64_t p, const float* factors, bool stream, const F& row) const {
    from_lanes<float, bfloat16>(panel.vectors(), panel.count, call.value_dim, sums(p), factors, stream, row);
  }

 private:
  float* sums(int64_t p) const { return memory + outs_at + p * rounded_up(call.value_dim, 32) * lanes; }

  const AttentionCall& call;
  int64_t queries_at, factors_at, keys_at, values_at, weights_at, outs_at, norms_at, gates_at;
  float* memory = nullptr;
  Panels queries, keys, values;
};

class BackwardTiles {
  using V = Vec<float>;
  static constexpr int lanes = lanes_of<float>;

 public:
  static constexpr int64_t key_unit = 32;

  const int64_t dim, value_dim;  // of rows of dK and dV: padded to whole panels

  BackwardTiles(const AttentionCall& c, int64_t panels, Layout& layout, Ahead&)
      : dim(rounded_up(c.dim, 32)), value_dim(rounded_up(c.value_dim, 32)), call(c), most_panels(panels) {
    const int64_t block = least(rounded_up(c.len_k, key_unit), backward_keys);
    weights_at = layout.take(block * lanes);
    grads_at = layout.take(block * lanes);
    dropped_at = c.dropout_p > 0 ? layout.take(block * lanes) : weights_at;
    keys_at = layout.take(panels_size(c.len_k, c.dim));
    key_columns_at = layout.take(panels_size(c.dim, c.len_k));
    values_at = layout.take(panels_size(c.len_k, c.value_dim));
    queries_at = layout.take(panels_size(panels * lanes, c.dim));
    query_columns_at = layout.take(panels_size(c.dim, panels * lanes));
    upstream_at = layout.take(panels_size(panels * lanes, c.value_dim));
    upstream_columns_at = layout.take(panels_size(c.value_dim, panels * lanes));
    factors_at = layout.take(panels * lanes);
    sums_at = layout.take(panels * lanes * dim);
    pairs_at = layout.take(panels_size(lanes, block));
    kept_weights_at = layout.take(panels_size(block, gathered_panels * lanes));
    kept_grads_at = layout.take(panels_size(block, gathered_panels * lanes));
    grad_keys_at = layout.take(block * dim);
    grad_values_at = layout.take(block * value_dim);
    norms_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    signed_norms_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    unit_at = layout.take(c.normalise > 0 ? dim : 0);
    gates_at = layout.take(c.gate ? c.len_k : 0);
  }

  static bool takes(const AttentionCall& call, const Pair& pair) { return goes_beyond(call, pair); }

  void begin(void* scratch) {
    memory = static_cast<float*>(scratch);
    keys = {memory + keys_at, in_steps(call.dim)};
    values = {memory + values_at, in_steps(call.value_dim)};
    queries = {memory + queries_at, in_steps(call.dim)};
    query_columns = {memory + query_columns_at, most_panels};
    upstream = {memory + upstream_at, in_steps(call.value_dim)};
    upstream_columns = {memory + upstream_columns_at, most_panels};
    kept_weights = {memory + kept_weights_at, gathered_panels};
    kept_grads = {memory + kept_grads_at, gathered_panels};
    configure_tiles();
  }
  void end() { _tile_release(); }

  void stage_keys(const Pair& pair) {
    const auto key = [&](int64_t j) { return pair.key<bfloat16>(call.k, j); };
    key_columns = {memory + key_columns_at, in_steps(pair.len_k)};
    pack_rows<false>(pair.len_k, call.dim, keys, 0, key);
    pack_columns<false>(pair.len_k, call.dim, key_columns, 0, key);
    pack_rows<false>(pair.len_k, call.value_dim, values, 0, [&](int64_t j) { return pair.key<bfloat16>(call.v, j); });
    if (call.normalise > 0) stage_key_factors(call, pair, memory + norms_at, memory + signed_norms_at);
    if (call.gate) stage_gates(call, pair, memory + gates_at);
  }

  template <class F>
  void stage_panel(const Pair& pair, const Panel<float>& panel, int64_t row, const float* factors, const F& gradient) {
    const auto query = [&](int64_t lane) { return pair.at<bfloat16>(call.q, panel.head[lane], panel.query[lane], pair.first_q); };
    const int64_t p = row / lanes;
    pack_rows<true>(panel.count, call.dim, queries, p, query);
    pack_columns<true>(panel.count, call.dim, query_columns, p, query);
    pack_rows<true>(panel.count, call.value_dim, upstream, p, gradient);
    pack_columns<true>(panel.count, call.value_dim, upstream_columns, p, gradient);
    memcpy(memory + factors_at + row, factors, lanes * sizeof(float));
    float* to = memory + sums_at + row * dim;
    for (int64_t i = 0; i < lanes * dim; ++i) to[i] = 0.0f;
  }

  // One panel at a time: what gather needs is kept apart, rounded.
  float* weights(int64_t, int64_t) const { return memory + weights_at; }
  float* grads(int64_t, int64_t) const { return memory + grads_at; }
  float* dropped(int64_t, int64_t) const { return memory + dropped_at; }

  template <int vectors>
  void score(const Pair&, const Panel<float>&, int64_t row, int64_t first, int64_t last, float* to) {
    multiply_keys<vectors>(keys, queries, row / lanes, first, last, memory + factors_at + row, norms(), to);
  }

  template <int vectors>
  void score_gradients(const Pair&, const Panel<float>&, int64_t row, int64_t first, int64_t last, float* to) {
    multiply_keys<vectors>(values, upstream, row / lanes, first, last, nullptr, call.gate ? memory + gates_at : nullptr, to);
  }

  template <int vectors>
  void weigh(const Pair&, const Panel<float>&, int64_t row, int64_t first, int64_t last, const float* grad) {
    const Panels rounded{memory + pairs_at, in_steps(last - first)};
    round_to_pairs<vectors>(grad, last - first, norms() ? norms() + first : nullptr, rounded);
    multiply_weights<vectors>(key_columns, call.dim, rounded, first, last - first, true, memory + sums_at + row * dim);
  }

  // The weights and gradients of scores of a block's p-th panel as step p of left operands whose depth is the rows.
  template <int vectors>
  void keep(const Panel<float>& panel, int64_t row, int64_t p, int64_t count) {
    keep_rows<vectors>(panel, p, count, memory + dropped_at, nullptr, kept_weights);
    keep_rows<vectors>(panel, p, count, memory + grads_at, memory + factors_at + row, kept_grads);
  }
  void keep_zeros(int64_t p, int64_t count) {
    for (int64_t panel = 0; panel < in_steps(count); ++panel)
      for (const Panels& to : {kept_weights, kept_grads}) memset(to.at(panel, p), 0, step_bytes);
  }

  void gather(int64_t row, int64_t panels, int64_t, int64_t count, bool accumulate) {
    gather_rows(kept_weights, upstream_columns, row, panels, count, call.value_dim, accumulate, grad_values(), value_dim);
    gather_rows(kept_grads, query_columns, row, panels, count, call.dim, accumulate, grad_keys(), dim);
  }
  float* grad_keys() const { return memory + grad_keys_at; }
  float* grad_values() const { return memory + grad_values_at; }

  bool few(const Pair&, const Panel<float>&) const { return false; }
  const float* sums(int64_t row) const { return memory + sums_at + row * dim; }

  const float* unit_key(const Pair& pair, int64_t key) const {
    return unit_row(pair.key<bfloat16>(call.k, key), call.dim, norms()[key], memory + unit_at);
  }
  float key_factor(int64_t key) const { return memory[signed_norms_at + key]; }

 private:
  const float* norms() const { return call.normalise > 0 ? memory + norms_at : nullptr; }

  // Lanes beyond the panel's rows are zero, whatever came of them: they are a depth that is summed over.
  template <int vectors>
  static void keep_rows(const Panel<float>& panel, int64_t p, int64_t count, const float* from, const float* factors,
                        const Panels& to) {
    V::Register last = V::set(static_cast<float>(panel.count - 1)), lane[vectors], factor[vectors];
    float numbers[lanes];
    for (int i = 0; i < lanes; ++i) numbers[i] = static_cast<float>(i);
    for (int v = 0; v < vectors; ++v) {
      lane[v] = V::load(numbers + v * V::width);
      factor[v] = factors ? V::load(factors + v * V::width) : V::set(1.0f);
    }
    for (int64_t j = 0; j < count; ++j) {
      bfloat16* row = to.tile(j / 32, p, j % 32 / 16) + j % 16 * 32;
      for (int v = 0; v < vectors; ++v) {
        const V::Register value = V::load(from + j * lanes + v * V::width) * factor[v];
        V::store(row + v * V::width, V::select(V::less_equal(lane[v], last), value, V::zero()));
      }
      if constexpr (vectors == 1) V::store(row + V::width, V::zero());
    }
  }

  // to [count][channels] (+)= what is kept of `panels` panels times their rows, which lie in `columns` from the panel of `row` on.
  void gather_rows(const Panels& kept, const Panels& columns, int64_t row, int64_t panels, int64_t count, int64_t channels,
                   bool accumulate, float* to, int64_t to_row) const {
    for (int64_t key = 0; key < count; key += 32)
      for (int64_t channel = 0; channel < channels; channel += 32)
        multiply_panel(kept.at(key / 32, 0), columns.at(channel / 32, row / lanes), panels, to + key * to_row + channel, to_row,
                       count - key, channels - channel, accumulate);
  }

  const AttentionCall& call;
  const int64_t most_panels;
  int64_t weights_at, grads_at, dropped_at, keys_at, key_columns_at, values_at, queries_at, query_columns_at, upstream_at,
      upstream_columns_at, factors_at, sums_at, pairs_at, kept_weights_at, kept_grads_at, grad_keys_at, grad_values_at, norms_at,
      signed_norms_at, unit_at, gates_at;
  float* memory = nullptr;
  Panels keys, key_columns, values, queries, query_columns, upstream, upstream_columns, kept_weights, kept_grads;
};

}  // namespace
}  // namespace mmk::amx
