// How AVX512_BF16 makes the products of a pair's panels, in place of attention_vectors.h: operands in bfloat16 as they came,
// sums in float32. Its instruction adds two products to each sum, so both operands hold the depth in twos, side by side in
// 32 bits:
//   S^T  [keys][lanes]     = K   [keys][D/2]      Q^T [D/2][lanes]
//   dP^T [keys][lanes]     = V   [keys][Dv/2]     dO^T [Dv/2][lanes]
//   O^T  [Dv][lanes]      += V^T [Dv][keys/2]     P^T [keys/2][lanes]
//   dQ^T [D][lanes]       += K^T [D][keys/2]      dS^T [keys/2][lanes]
//   dK   [keys][D]        += dS^T [keys][lanes/2] Q [lanes/2][D]
//   dV   [keys][Dv]       += P^T [keys][lanes/2]  dO [lanes/2][Dv]
// The left one is broadcast, the right one loaded. Rows of keys and values are such pairs of channels as they lie; two rows
// interleaved are pairs of keys or of queries. Only weights and gradients of scores are rounded, as for tiles: scales, norms
// and gates are factors of what is in float32. The instruction takes subnormal numbers for zero.
//
// Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is, and only in files that are compiled with it.
#pragma once
#include "attention_factors.h"
#include "attention_vectors.h"
#include "core/pair_product.h"

namespace mmk::MMK_TIER {
namespace {

// Elements of the two vectors of a panel's pairs.
inline constexpr int64_t panel_pairs = 2 * lanes_of<float>;

// Rows of an operand that can be read in pairs of channels: where they lie, or copied to `to`, an odd one beside a zero.
inline Staged<bfloat16> staged_pairs(const Pair& pair, const AttentionOperand& operand, int64_t channels, bfloat16* to) {
  const bool in_place = operand.row == channels || pair.rows <= 2 * lanes_of<float>;
  if (in_place && !pair.tokens && channels % 2 == 0) return {pair.key<bfloat16>(operand, 0), operand.row};
  const int64_t width = 2 * in_pairs(channels);
  for (int64_t j = 0; j < pair.len_k; ++j) {
    const bfloat16* from = pair.key<bfloat16>(operand, j);
    for (int64_t k = 0; k < width; k += 32) {
      const __m512i elements = load_elements(from, k, channels);
      bfloat16* at = to + j * width + k;
      if (width - k >= 32) {
        _mm512_storeu_si512(at, elements);
      } else {
        _mm512_mask_storeu_epi16(at, (1u << (width - k)) - 1, elements);
      }
    }
  }
  return {to, width};
}

// Weights [count][lanes], times one factor a key where there are any, rounded to pairs of keys: [count / 2][lanes].
template <int vectors>
inline void round_to_pairs(const float* weights, int64_t count, const float* key_factors, bfloat16* to) {
  using V = Vec<float>;
  constexpr int lanes = lanes_of<float>;
  const auto load = [&](int64_t key, int v) {
    const V::Register weight = V::load(weights + key * lanes + v * V::width);
    return key_factors ? weight * V::set(key_factors[key]) : weight;
  };
  for (int64_t j = 0; j < count; j += 2)
    for (int v = 0; v < vectors; ++v) {
      const V::Register second = j + 1 < count ? load(j + 1, v) : V::zero();
      _mm512_storeu_si512(to + j / 2 * panel_pairs + v * 32, rounded_pairs(load(j, v), second));
    }
}

// --- products -----------------------------------------------------------------------------------------------------------
// to [last - first][lanes] = keys (or values) times a panel of queries, times one factor a lane and one a key where there
// are any.
template <int vectors>
inline void multiply_keys(const Staged<bfloat16>& keys, int64_t first, int64_t last, int64_t channels, const bfloat16* panel,
                          const float* lane_factors, const float* key_factors, float* to, Ahead& ahead) {
  PairProduct product{keys.data + first * keys.row, keys.row, 2, panel, panel_pairs, in_pairs(channels), to, lanes_of<float>,
                      false};
  product.lane_factors = lane_factors;
  product.row_factors = key_factors ? key_factors + first : nullptr;
  product.ahead = &ahead;
  multiply_lanes<vectors, true>(product, last - first);
}

// sums [channels][lanes] (+)= the rows of `count` keys from the even `first` on, interleaved, times the rounded weights.
template <int vectors>
inline void multiply_weights(const bfloat16* rows, int64_t channels, const bfloat16* weights, int64_t first, int64_t count,
                             bool accumulate, float* sums, Ahead& ahead) {
  const int64_t width = interleaved_row(channels);
  PairProduct product{rows + first / 2 * width, 2, width, weights, panel_pairs, in_pairs(count), sums, lanes_of<float>,
                      accumulate};
  product.ahead = &ahead;
  multiply_lanes<vectors, false>(product, channels);
}

class ForwardPairs {
  using V = Vec<float>;
  static constexpr int lanes = lanes_of<float>;

 public:
  static constexpr int64_t key_unit = 8, first_unit = 4;

  ForwardPairs(const AttentionCall& c, Layout& layout, Ahead& next) : call(c), ahead(next) {
    const int64_t block = least(rounded_up(c.len_k, key_unit), forward_keys);
    queries_at = layout.take(group_panels * in_pairs(c.dim) * lanes);
    factors_at = layout.take(group_panels * lanes);
    keys_at = layout.take(c.len_k * in_pairs(c.dim));
    values_at = layout.take(in_pairs(c.len_k) * interleaved_row(c.value_dim) / 2);
    weights_at = layout.take(in_pairs(block) * lanes);
    outs_at = layout.take(group_panels * c.value_dim * lanes);
    norms_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    gates_at = layout.take(c.gate ? c.len_k : 0);
  }

  static constexpr bool has_few = false;
  static bool takes_few(int64_t, const Pair&, const AttentionCall&) { return false; }
  static bool takes(const AttentionCall& call, const Pair& pair) { return goes_beyond(call, pair) && !goes_short<bfloat16>(call, pair); }

  void begin(void* scratch) { memory = static_cast<float*>(scratch); }
  void end() {}

  void stage(const Pair& pair) {
    keys = staged_pairs(pair, call.k, call.dim, elements(keys_at));
    // What no row sees may be anything, and would not be multiplied by vectors either.
    const int64_t in_sight = keys_in_sight(call, pair);
    interleave_rows(pair.len_k, call.value_dim, elements(values_at),
                    [&](int64_t j) { return j < in_sight ? pair.key<bfloat16>(call.v, j) : nullptr; });
    if (call.normalise > 0) stage_key_factors(call, pair, memory + norms_at, memory + norms_at);
    if (call.gate) stage_gates(call, pair, memory + gates_at);
  }

  void load_queries(const Pair& pair, const Panel<float>& panel, int64_t p) {
    const auto row = [&](int64_t lane) {
      return pair.at<bfloat16>(call.q, panel.head[lane], panel.query[lane], pair.first_q);
    };
    pairs_to_lanes(panel.vectors(), panel.count, call.dim, queries(p), panel_pairs, row);
    query_factors<float, bfloat16>(call, panel, memory + factors_at + p * lanes, row);
  }

  template <int vectors>
  void score(const Pair&, const Panel<float>&, int64_t p, int64_t first, int64_t last, float* scores) {
    multiply_keys<vectors>(keys, first, last, call.dim, queries(p), memory + factors_at + p * lanes,
                           call.normalise > 0 ? memory + norms_at : nullptr, scores, ahead);
  }

  template <int vectors>
  void weigh(const Pair&, const Panel<float>&, int64_t p, int64_t first, int64_t last, const float* weights, bool started,
             const V::Register (&rescale)[vectors]) {
    float* outs = sums(p);
    bfloat16* rounded = elements(weights_at);
    if (started) rescale_sums<float>(call.value_dim, rescale, outs);
    round_to_pairs<vectors>(weights, last - first, call.gate ? memory + gates_at + first : nullptr, rounded);
    multiply_weights<vectors>(elements(values_at), call.value_dim, rounded, first, last - first, started, outs, ahead);
  }

  template <class F>
  void store(const Pair&, const Panel<float>& panel, int64_t p, const float* factors, bool stream, const F& row) const {
    from_lanes<float, bfloat16>(panel.vectors(), panel.count, call.value_dim, sums(p), factors, stream, row);
  }

 private:
  bfloat16* elements(int64_t at) const { return reinterpret_cast<bfloat16*>(memory + at); }
  bfloat16* queries(int64_t p) const { return elements(queries_at + p * in_pairs(call.dim) * lanes); }
  float* sums(int64_t p) const { return memory + outs_at + p * call.value_dim * lanes; }

  const AttentionCall& call;
  Ahead& ahead;
  int64_t queries_at, factors_at, keys_at, values_at, weights_at, outs_at, norms_at, gates_at;
  float* memory = nullptr;
  Staged<bfloat16> keys{};
};

class BackwardPairs {
  using V = Vec<float>;
  static constexpr int lanes = lanes_of<float>;

 public:
  static constexpr int64_t key_unit = 8;

  const int64_t dim, value_dim;  // of rows of dK and dV: padded to whole vectors

  BackwardPairs(const AttentionCall& c, int64_t panels, Layout& layout, Ahead& next)
      : dim(rounded_up(c.dim, V::width)), value_dim(rounded_up(c.value_dim, V::width)), call(c), ahead(next) {
    const int64_t block = least(rounded_up(c.len_k, key_unit), backward_keys);
    weights_at = layout.take(block * lanes);
    grads_at = layout.take(block * lanes);
    dropped_at = c.dropout_p > 0 ? layout.take(block * lanes) : weights_at;
    keys_at = layout.take(c.len_k * in_pairs(c.dim));
    key_pairs_at = layout.take(in_pairs(c.len_k) * dim);
    values_at = layout.take(c.len_k * in_pairs(c.value_dim));
    queries_at = layout.take(panels * lanes * in_pairs(c.dim));
    query_pairs_at = layout.take(panels * lanes / 2 * dim);
    upstream_at = layout.take(panels * lanes * in_pairs(c.value_dim));
    upstream_pairs_at = layout.take(panels * lanes / 2 * value_dim);
    factors_at = layout.take(panels * lanes);
    sums_at = layout.take(panels * lanes * c.dim);
    pairs_at = layout.take(in_pairs(block) * lanes);
    kept_weights_at = layout.take(block * kept_row / 2);
    kept_grads_at = layout.take(block * kept_row / 2);
    grad_keys_at = layout.take(block * dim);
    grad_values_at = layout.take(block * value_dim);
    norms_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    signed_norms_at = layout.take(c.normalise > 0 ? c.len_k : 0);
    unit_at = layout.take(c.normalise > 0 ? dim : 0);
    gates_at = layout.take(c.gate ? c.len_k : 0);
  }

  static bool takes(const AttentionCall& call, const Pair& pair) { return goes_beyond(call, pair) && !goes_short<bfloat16, true>(call, pair); }

  void begin(void* scratch) { memory = static_cast<float*>(scratch); }
  void end() {}

  void stage_keys(const Pair& pair) {
    keys = staged_pairs(pair, call.k, call.dim, elements(keys_at));
    values = staged_pairs(pair, call.v, call.value_dim, elements(values_at));
    interleave_rows(pair.len_k, call.dim, elements(key_pairs_at), [&](int64_t j) { return pair.key<bfloat16>(call.k, j); });
    if (call.normalise > 0) stage_key_factors(call, pair, memory + norms_at, memory + signed_norms_at);
    if (call.gate) stage_gates(call, pair, memory + gates_at);
  }

  template <class F>
  void stage_panel(const Pair& pair, const Panel<float>& panel, int64_t row, const float* factors, const F& gradient) {
    const auto query = [&](int64_t lane) {
      return pair.at<bfloat16>(call.q, panel.head[lane], panel.query[lane], pair.first_q);
    };
    pairs_to_lanes(panel.vectors(), panel.count, call.dim, queries(row), panel_pairs, query);
    interleave_rows(panel.count, call.dim, elements(query_pairs_at + row / 2 * dim), query);
    pairs_to_lanes(panel.vectors(), panel.count, call.value_dim, upstream(row), panel_pairs, gradient);
    interleave_rows(panel.count, call.value_dim, elements(upstream_pairs_at + row / 2 * value_dim), gradient);
    memcpy(memory + factors_at + row, factors, lanes * sizeof(float));
    float* to = memory + sums_at + row * call.dim;
    for (int64_t i = 0; i < lanes * call.dim; ++i) to[i] = 0.0f;
  }

  // One panel at a time: what gather needs is kept apart, rounded.
  float* weights(int64_t, int64_t) const { return memory + weights_at; }
  float* grads(int64_t, int64_t) const { return memory + grads_at; }
  float* dropped(int64_t, int64_t) const { return memory + dropped_at; }

  template <int vectors>
  void score(const Pair&, const Panel<float>&, int64_t row, int64_t first, int64_t last, float* to) {
    multiply_keys<vectors>(keys, first, last, call.dim, queries(row), memory + factors_at + row, norms(), to, ahead);
  }

  template <int vectors>
  void score_gradients(const Pair&, const Panel<float>&, int64_t row, int64_t first, int64_t last, float* to) {
    multiply_keys<vectors>(values, first, last, call.value_dim, upstream(row), nullptr,
                           call.gate ? memory + gates_at : nullptr, to, ahead);
  }

  template <int vectors>
  void weigh(const Pair&, const Panel<float>&, int64_t row, int64_t first, int64_t last, const float* grad) {
    bfloat16* rounded = elements(pairs_at);
    round_to_pairs<vectors>(grad, last - first, norms() ? norms() + first : nullptr, rounded);
    multiply_weights<vectors>(elements(key_pairs_at), call.dim, rounded, first, last - first, true,
                              memory + sums_at + row * call.dim, ahead);
  }

  // The weights and gradients of scores of a block's p-th panel as a piece of the rows of left operands.
  template <int vectors>
  void keep(const Panel<float>& panel, int64_t row, int64_t p, int64_t count) {
    keep_rows<vectors>(panel, count, memory + dropped_at, nullptr, elements(kept_weights_at) + p * lanes);
    keep_rows<vectors>(panel, count, memory + grads_at, memory + factors_at + row, elements(kept_grads_at) + p * lanes);
  }
  void keep_zeros(int64_t p, int64_t count) {
    for (bfloat16* kept : {elements(kept_weights_at), elements(kept_grads_at)})
      for (int64_t j = 0; j < count; ++j) memset(kept + j * kept_row + p * lanes, 0, lanes * sizeof(bfloat16));
  }

  void gather(int64_t row, int64_t panels, int64_t last, int64_t count, bool accumulate) {
    const int64_t rows = (panels - 1) * lanes + last;
    gather_rows(elements(kept_weights_at), elements(upstream_pairs_at + row / 2 * value_dim), rows, count, value_dim,
                accumulate, grad_values());
    gather_rows(elements(kept_grads_at), elements(query_pairs_at + row / 2 * dim), rows, count, dim, accumulate,
                grad_keys());
  }
  float* grad_keys() const { return memory + grad_keys_at; }
  float* grad_values() const { return memory + grad_values_at; }

  bool few(const Pair&, const Panel<float>&) const { return false; }
  const float* sums(int64_t row) const { return memory + sums_at + row * call.dim; }

  const float* unit_key(const Pair& pair, int64_t key) const {
    return unit_row(pair.key<bfloat16>(call.k, key), call.dim, norms()[key], memory + unit_at);
  }
  float key_factor(int64_t key) const { return memory[signed_norms_at + key]; }

 private:
  static constexpr int64_t kept_row = gathered_panels * lanes;

  bfloat16* elements(int64_t at) const { return reinterpret_cast<bfloat16*>(memory + at); }
  bfloat16* queries(int64_t row) const { return elements(queries_at + row * in_pairs(call.dim)); }
  bfloat16* upstream(int64_t row) const { return elements(upstream_at + row * in_pairs(call.value_dim)); }
  const float* norms() const { return call.normalise > 0 ? memory + norms_at : nullptr; }

  // Lanes beyond the panel's rows are zero, whatever came of them: an odd last row is summed beside one.
  template <int vectors>
  static void keep_rows(const Panel<float>& panel, int64_t count, const float* from, const float* factors, bfloat16* to) {
    const uint32_t used = panel.count == lanes ? 0xffffffffu : (1u << panel.count) - 1;
    V::Register factor[2] = {};
    for (int v = 0; v < vectors; ++v) factor[v] = factors ? V::load(factors + v * V::width) : V::set(1.0f);
    const auto load = [&](int64_t j, int v) {
      const __mmask16 rows = static_cast<__mmask16>(used >> (v * V::width));
      return _mm512_maskz_mul_ps(rows, V::load(from + j * lanes + v * V::width), factor[v]);
    };
    for (int64_t j = 0; j < count; ++j) {
      const V::Register upper = vectors == 2 ? load(j, 1) : V::zero();
      _mm512_storeu_si512(to + j * kept_row, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(upper, load(j, 0))));
    }
  }

  // to [count][channels] (+)= what is kept of `rows` rows times these rows, interleaved. Channels are whole vectors.
  static void gather_rows(const bfloat16* kept, const bfloat16* from, int64_t rows, int64_t count, int64_t channels,
                          bool accumulate, float* to) {
    PairProduct product{kept, kept_row, 2, from, 2 * channels, in_pairs(rows), to, channels, accumulate};
    for (int64_t channel = 0; channel < channels; channel += lanes) {
      product.b = from + 2 * channel;
      product.c = to + channel;
      if (channel + V::width < channels) {
        multiply_lanes<2, true>(product, count);
      } else {
        multiply_lanes<1, true>(product, count);
      }
    }
  }

  const AttentionCall& call;
  Ahead& ahead;
  int64_t weights_at, grads_at, dropped_at, keys_at, key_pairs_at, values_at, queries_at, query_pairs_at, upstream_at,
      upstream_pairs_at, factors_at, sums_at, pairs_at, kept_weights_at, kept_grads_at, grad_keys_at, grad_values_at,
      norms_at, signed_norms_at, unit_at, gates_at;
  float* memory = nullptr;
  Staged<bfloat16> keys{}, values{};
};

}  // namespace
}  // namespace mmk::MMK_TIER
