// What happens to a panel's scores between the two products: softcap, bias, masks, softmax, dropout. Included by *.tier.cpp
// only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_pair.h"

namespace mmk::MMK_TIER {
namespace {

inline constexpr double minus_infinity = -__builtin_inf();

// The keys [low, high) that each row of a panel sees by causality, windows and limits.
template <class A>
struct Intervals {
  int64_t low[lanes_of<A>], high[lanes_of<A>];
  int64_t first, last;            // keys outside [first, last) are seen by no row
  int64_t all_first, all_last;    // keys inside [all_first, all_last) by every one
  bool any;                       // whether there is anything to compare

  Intervals(const AttentionCall& call, const Pair& pair, const Panel<A>& panel) {
    any = call.window_left >= 0 || call.window_right >= 0 || call.limits.data != nullptr;
    first = all_first = 0;
    last = all_last = pair.len_k;
    if (!any) return;
    first = pair.len_k;
    last = 0;
    const int64_t shift = call.bottom_right ? pair.len_k - pair.len_q : 0;
    for (int64_t lane = 0; lane < lanes_of<A>; ++lane) {
      const int64_t at = panel.query[lane] + shift;
      int64_t begin = 0, end = pair.len_k;
      if (call.window_left >= 0) begin = most(begin, at - call.window_left);
      if (call.window_right >= 0) end = least(end, at + call.window_right + 1);
      if (call.limits.data) end = least(end, call.limits.data[pair.b * call.limits.batch + pair.first_q + panel.query[lane]]);
      begin = least(begin, pair.len_k);
      end = most(end, begin);
      low[lane] = begin;
      high[lane] = end;
      if (begin < end) {
        first = least(first, begin);
        last = most(last, end);
      }
      all_first = most(all_first, begin);
      all_last = least(all_last, end);
    }
    if (last < first) first = last = 0;
  }

  bool cuts(int64_t begin, int64_t end) const { return any && (begin < all_first || end > all_last); }
};

// Keys [0, end) are all that any row of a pair sees by causality, windows and limits.
inline int64_t keys_in_sight(const AttentionCall& call, const Pair& pair) {
  if (call.window_right < 0 && !call.limits.data) return pair.len_k;
  int64_t end = 0;
  for (int64_t row = 0; row < pair.rows && end < pair.len_k; row += lanes_of<float>)
    end = most(end, Intervals<float>(call, pair, Panel<float>(pair, row, pair.rows)).last);
  return end;
}

// How bias, mask and segments are added to a call's scores.
struct Addends {
  bool any, by_key;  // by_key: one number a key for all rows of a pair

  explicit Addends(const AttentionCall& call) {
    const bool one_head = call.heads == call.kv_heads;
    const auto flat = [&](const AttentionScores& s) { return s.data == nullptr || (s.row == 0 && (s.head == 0 || one_head)); };
    const bool segments = call.segments_q.data != nullptr;
    any = call.bias.data || call.mask.data || segments;
    by_key = any && !segments && flat(call.bias) && flat(call.mask);
  }
};

template <class A, class S>
inline void bias_to_lanes(const AttentionScores& bias, const Pair& pair, const Panel<A>& panel, int64_t begin, int64_t end, A* to) {
  const S* data = static_cast<const S*>(bias.data) + pair.b * bias.batch;
  const auto row = [&](int64_t lane) { return data + panel.head[lane] * bias.head + panel.query[lane] * bias.row; };
  if (bias.col == 1) {
    return to_lanes<A, S>(panel.vectors(), panel.count, end - begin, static_cast<const A*>(nullptr), to, [&](int64_t lane) { return row(lane) + begin; });
  }
  for (int64_t lane = 0; lane < panel.vectors() * Vec<A>::width; ++lane) {
    const S* from = row(lane);
    for (int64_t j = begin; j < end; ++j) to[(j - begin) * lanes_of<A> + lane] = static_cast<A>(widen(from[j * bias.col]));
  }
}

// What is added to the scores of a panel for keys [begin, end): the bias, and -infinity where mask or segments hide a key.
template <class A>
inline void make_addends(const AttentionCall& call, const Pair& pair, const Panel<A>& panel, int64_t begin, int64_t end, A* to) {
  constexpr int lanes = lanes_of<A>;
  const int64_t used = panel.vectors() * Vec<A>::width;
  const AttentionScores& bias = call.bias;
  if (bias.data == nullptr) {
    for (int64_t i = 0; i < (end - begin) * lanes; ++i) to[i] = A(0);
  } else if (bias.number == Number::float32) {
    bias_to_lanes<A, float>(bias, pair, panel, begin, end, to);
  } else if (bias.number == Number::bfloat16) {
    bias_to_lanes<A, bfloat16>(bias, pair, panel, begin, end, to);
  } else if (bias.number == Number::float16) {
    bias_to_lanes<A, float16>(bias, pair, panel, begin, end, to);
  } else {
    if constexpr (is_double<A>) bias_to_lanes<A, double>(bias, pair, panel, begin, end, to);
  }
  const AttentionScores& mask = call.mask;
  if (mask.data) {
    const uint8_t* data = static_cast<const uint8_t*>(mask.data) + pair.b * mask.batch;
    for (int64_t lane = 0; lane < used; ++lane) {
      const uint8_t* row = data + panel.head[lane] * mask.head + panel.query[lane] * mask.row;
      for (int64_t j = begin; j < end; ++j)
        if (!row[j * mask.col]) to[(j - begin) * lanes + lane] = static_cast<A>(minus_infinity);
    }
  }
  if (call.segments_q.data) {
    const int64_t* ids = call.segments_q.data + pair.b * call.segments_q.batch + pair.first_q;
    const int64_t* key_ids = call.segments_k.data + pair.b * call.segments_k.batch + pair.first_k;
    int64_t of_row[lanes];
    for (int lane = 0; lane < lanes; ++lane) of_row[lane] = ids[panel.query[lane]];
    for (int64_t j = begin; j < end; ++j) {
      A* row = to + (j - begin) * lanes;
      const int64_t id = key_ids[j];
      for (int lane = 0; lane < lanes; ++lane) row[lane] = of_row[lane] == id ? row[lane] : static_cast<A>(minus_infinity);
    }
  }
}

// The same where it is one number a key: [Lk].
template <class A>
inline void make_key_addends(const AttentionCall& call, const Pair& pair, A* to) {
  const int64_t head = pair.h * pair.group;
  const AttentionScores &bias = call.bias, &mask = call.mask;
  for (int64_t j = 0; j < pair.len_k; ++j) {
    A value = A(0);
    if (bias.data) value = element_of<A>(bias.data, bias.number, pair.b * bias.batch + head * bias.head + j * bias.col);
    if (mask.data && !static_cast<const uint8_t*>(mask.data)[pair.b * mask.batch + head * mask.head + j * mask.col])
      value = static_cast<A>(minus_infinity);
    to[j] = value;
  }
}

// Adds `bias` where a query and a key of a window are of different regions.
template <class A, int vectors>
inline void add_regions(const Pair& pair, const Panel<A>& panel, double bias, int64_t begin, int64_t end, A* scores) {
  using V = Vec<A>;
  A of_row[lanes_of<A>];
  for (int lane = 0; lane < lanes_of<A>; ++lane) of_row[lane] = static_cast<A>(pair.regions[panel.query[lane]]);
  typename V::Register rows[vectors];
  for (int v = 0; v < vectors; ++v) rows[v] = V::load(of_row + v * V::width);
  const typename V::Register other = V::set(static_cast<A>(bias));
  for (int64_t j = begin; j < end; ++j) {
    const typename V::Register key = V::set(static_cast<A>(pair.regions[j]));
    for (int v = 0; v < vectors; ++v) {
      A* at = scores + (j - begin) * lanes_of<A> + v * V::width;
      const typename V::Register same =
          V::select(V::less_equal(rows[v], key), V::select(V::less_equal(key, rows[v]), V::zero(), other), other);
      V::store(at, V::load(at) + same);
    }
  }
}

template <class A, int vectors>
inline void apply_softcap(double softcap, int64_t keys, A* scores) {
  using V = Vec<A>;
  const typename V::Register cap = V::set(static_cast<A>(softcap)), inverse = V::set(static_cast<A>(1 / softcap));
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < vectors; ++v) {
      A* at = scores + j * lanes_of<A> + v * V::width;
      V::store(at, cap * tanh<A>(V::load(at) * inverse));
    }
}

template <class A, int vectors>
inline void apply_intervals(const Intervals<A>& intervals, int64_t begin, int64_t end, A* scores) {
  using V = Vec<A>;
  A low[lanes_of<A>], high[lanes_of<A>];
  for (int lane = 0; lane < lanes_of<A>; ++lane) {  // counted from `begin`, so that they are small
    low[lane] = static_cast<A>(most(least(intervals.low[lane], end) - begin, 0));
    high[lane] = static_cast<A>(most(least(intervals.high[lane], end) - begin, 0) - 1);
  }
  const typename V::Register hidden = V::set(static_cast<A>(minus_infinity));
  for (int64_t j = 0; j < end - begin; ++j) {
    const typename V::Register key = V::set(static_cast<A>(j));
    for (int v = 0; v < vectors; ++v) {
      A* at = scores + j * lanes_of<A> + v * V::width;
      const typename V::Register above =
          V::select(V::less_equal(V::load(low + v * V::width), key), V::load(at), hidden);
      V::store(at, V::select(V::less_equal(key, V::load(high + v * V::width)), above, hidden));
    }
  }
}

// scores += addends, [keys][lanes] or one a key; `top` becomes the largest of each lane, and of what it was.
template <class A, int vectors>
inline void add_addends(const A* addends, bool by_key, int64_t keys, A* scores, typename Vec<A>::Register (&top)[vectors]) {
  using V = Vec<A>;
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < vectors; ++v) {
      A* at = scores + j * lanes_of<A> + v * V::width;
      const typename V::Register sum =
          V::load(at) + (by_key ? V::set(addends[j]) : V::load(addends + j * lanes_of<A> + v * V::width));
      V::store(at, sum);
      top[v] = V::max(top[v], sum);
    }
}

// The lowest finite number: what is below it has seen no key.
template <class A>
inline A lowest() {
  return is_double<A> ? static_cast<A>(-__DBL_MAX__) : static_cast<A>(-__FLT_MAX__);
}

// 1 / sum, 0 where the sum is 0: of rows that see nothing.
template <class A>
inline typename Vec<A>::Register inverse_of_sum(typename Vec<A>::Register sum) {
  using V = Vec<A>;
  const typename V::Register one = V::set(A(1));
  return V::select(V::less_equal(sum, V::zero()), V::zero(), one / sum);
}

// --- dropout ------------------------------------------------------------------------------------------------------------
// The hash of mmkernels/reference/attention.py.
inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

struct Dropout {
  bool any;
  uint32_t low, high, threshold;
  double factor;  // of what is kept

  explicit Dropout(const AttentionCall& call)
      : any(call.dropout_p > 0),
        low(static_cast<uint32_t>(call.seed)),
        high(static_cast<uint32_t>(call.seed >> 32)),
        threshold(static_cast<uint32_t>(call.dropout_p * 16777216.0 + 0.5)),
        factor(1 / (1 - call.dropout_p)) {}

  // weights *= 0 or factor; written to `to`.
  template <class A>
  void apply(const AttentionCall& call, const Pair& pair, const Panel<A>& panel, int64_t begin, int64_t end, const A* weights,
             A* to) const {
    constexpr int lanes = lanes_of<A>;
    uint32_t row[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      const uint32_t head = static_cast<uint32_t>(pair.b * call.heads + panel.head[lane]);
      row[lane] = mixed(mixed(low ^ mixed(head + high)) + static_cast<uint32_t>(panel.query[lane]) * 0x9e3779b9u);
    }
    const A kept = static_cast<A>(factor);
    for (int64_t j = begin; j < end; ++j) {
      const uint32_t key = static_cast<uint32_t>(j) * 0x9e3779b9u;
      const int64_t at = (j - begin) * lanes;
      for (int lane = 0; lane < lanes; ++lane)
        to[at + lane] = (mixed(row[lane] + key) >> 8) >= threshold ? weights[at + lane] * kept : A(0);
    }
  }
};

}  // namespace
}  // namespace mmk::MMK_TIER
