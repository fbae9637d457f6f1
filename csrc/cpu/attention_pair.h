// One pair of a call: where its queries, keys and values lie, and how they come into the layouts that the products read.
// Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
//
// A panel is as many rows (queries) as two vectors have lanes. What belongs to a panel lies with its rows side by side:
// q [D][lanes], scores [keys][lanes], out [Dv][lanes]. So a softmax over keys is arithmetic between whole vectors, and the
// weights are already what the product with the values reads.
#pragma once
#include "attention_rows.h"
#include "core/ahead.h"
#include "core/math.h"

namespace mmk::MMK_TIER {
namespace {

template <class A>
inline constexpr int lanes_of = 2 * Vec<A>::width;

// Forward: panels whose scores one block of keys meets in a row, while it is in the second-level cache; and keys of a block.
inline constexpr int64_t group_panels = 4;
inline constexpr int64_t forward_keys = 384;

// Backward: panels whose weights one product over rows takes together, and keys of a block: they fill half of a second-level
// cache.
inline constexpr int64_t gathered_panels = 4;
inline constexpr int64_t backward_keys = 256;

// A thread's working memory, handed out in whole cache lines: where each part begins, in accumulators.
struct Layout {
  int64_t end = 0;

  int64_t take(int64_t count) {
    const int64_t at = end;
    end += rounded_up(count, 16);
    return at;
  }
};

// A pair of a call, with the lengths that it has.
struct Pair {
  int64_t b, h, group, len_q, len_k, rows, first_q, first_k, sample;
  const int32_t* tokens;   // null: none
  const uint8_t* regions;  // null: all the same

  Pair() = default;
  Pair(const AttentionCall& call, int64_t batch, int64_t head) : b(batch), h(head) {
    group = call.heads / call.kv_heads;
    first_q = call.cu_q ? call.cu_q[b] : 0;
    first_k = call.cu_k ? call.cu_k[b] : 0;
    len_q = call.cu_q ? call.cu_q[b + 1] - first_q : call.len_q;
    len_k = call.cu_k ? call.cu_k[b + 1] - first_k : call.len_k;
    rows = group * len_q;
    const AttentionWindows& windows = call.windows;
    sample = windows.tokens ? b / windows.count : b;
    const int64_t window = windows.tokens ? b % windows.count : 0;
    tokens = windows.tokens ? windows.tokens + window * len_q : nullptr;
    regions = windows.regions ? windows.regions + window * len_q : nullptr;
    if (regions) {
      bool one = true;
      for (int64_t i = 1; i < len_q; ++i) one = one && regions[i] == regions[0];
      if (one) regions = nullptr;
    }
  }

  template <class T>
  T* at(const AttentionOperand& operand, int64_t head, int64_t index, int64_t first) const {
    const int64_t token = tokens ? tokens[index] : first + index;
    if (token < 0) return const_cast<T*>(static_cast<const T*>(operand.pad)) + head * operand.pad_head;
    return const_cast<T*>(static_cast<const T*>(operand.data)) + sample * operand.batch + head * operand.head + token * operand.row;
  }
  template <class T>
  T* key(const AttentionOperand& operand, int64_t j) const {
    return at<T>(operand, h, j, first_k);
  }
  bool inside(int64_t index) const { return tokens == nullptr || tokens[index] >= 0; }
};

// Forward's items: a block of rows of a pair.
struct Item {
  int64_t block;
  Pair pair;

  Item(const AttentionCall& call, int64_t number) {
    if (call.batch_inside) {
      block = number / call.batch % call.blocks;
      pair = Pair(call, number % call.batch, number / call.batch / call.blocks);
    } else {
      block = number % call.blocks;
      pair = Pair(call, number / call.blocks / call.kv_heads, number / call.blocks % call.kv_heads);
    }
  }
};

// The pairs of backward's tasks: members of groups, a run of which one task takes.
struct Members {
  const AttentionBackward& back;
  int64_t count, run_length;

  struct Run {
    int64_t group, chunk, split, begin, end;
  };

  explicit Members(const AttentionBackward& backward)
      : back(backward),
        count((back.group_batch ? back.call.batch : 1) * (back.group_heads ? back.call.kv_heads : 1)),
        run_length(ceil_div(count, back.chunks)) {}

  Run run(int64_t task) const {
    const int64_t chunk = task / back.splits % back.chunks;
    return {task / back.splits / back.chunks, chunk, task % back.splits, chunk * run_length, least((chunk + 1) * run_length, count)};
  }

  Pair pair(int64_t group, int64_t m) const {
    const AttentionCall& call = back.call;
    if (back.group_batch && back.group_heads) return Pair(call, m / call.kv_heads, m % call.kv_heads);
    if (back.group_batch) return Pair(call, m, group);
    if (back.group_heads) return Pair(call, group, m);
    return Pair(call, group / call.kv_heads, group % call.kv_heads);
  }

  // The pair after member m of a task's run, as far as tasks up to `end` have one.
  Pair next(int64_t task, const Run& of_task, int64_t m, int64_t end) const {
    if (m + 1 < of_task.end || task + 1 == end) return pair(of_task.group, least(m + 1, of_task.end - 1));
    const Run following = run(task + 1);
    return pair(following.group, least(following.begin, count - 1));
  }

  // Whether `pairs` more lie ahead, one after the other.
  bool lie_ahead(int64_t task, const Run& of_task, int64_t m, int64_t end, int64_t pairs) const {
    if (count > 1) return back.group_batch && back.group_heads && m + pairs < of_task.end;
    return back.splits == 1 && task + pairs < end;
  }
};

// The rows of a panel: which head and query each lane is. Lanes beyond `count` repeat the first.
template <class A>
struct Panel {
  int64_t count;
  int64_t head[lanes_of<A>], query[lanes_of<A>];

  Panel() = default;
  Panel(const Pair& pair, int64_t row, int64_t end) : count(least(end - row, lanes_of<A>)) {
    int64_t g = row / pair.len_q, i = row - g * pair.len_q;
    for (int64_t lane = 0; lane < lanes_of<A>; ++lane) {
      head[lane] = lane < count ? pair.h * pair.group + g : head[0];
      query[lane] = lane < count ? i : query[0];
      if (++i == pair.len_q) {
        i = 0;
        ++g;
      }
    }
  }
  int vectors() const { return count > Vec<A>::width ? 2 : 1; }
};

// Calls f with the number of a panel's vectors as a constant.
template <class F>
inline void with_vectors(int vectors, const F& f) {
  if (vectors == 1) {
    f.template operator()<1>();
  } else {
    f.template operator()<2>();
  }
}

// Rows at `row(lane)` of `depth` elements become columns: to[k * lanes + lane] = row(lane)[k] * factors[lane], without factors
// row(lane)[k]. Lanes beyond `count`, in as many vectors as there are, repeat the last.
template <class A, class T, class F>
inline void to_lanes(int vectors, int64_t count, int64_t depth, const A* factors, A* to, const F& row) {
  using V = Vec<A>;
  constexpr int width = V::width;
  for (int v = 0; v < vectors; ++v) {
    const T* from[width];
    for (int i = 0; i < width; ++i) from[i] = row(least(v * width + i, count - 1));
    const typename V::Register factor = factors ? V::load(factors + v * width) : V::set(A(1));
    for (int64_t k = 0; k < depth; k += width) {
      const int64_t left = least(depth - k, width);
      typename V::Register square[width];
      if (left == width) {
        for (int i = 0; i < width; ++i) square[i] = V::load(from[i] + k);
      } else {
        for (int i = 0; i < width; ++i) square[i] = load_part<A>(from[i] + k, left);
      }
      V::transpose(square);
      A* out = to + k * lanes_of<A> + v * width;
      if (left == width) {
        for (int i = 0; i < width; ++i) V::store(out + i * lanes_of<A>, square[i] * factor);
      } else {
        for (int64_t i = 0; i < left; ++i) V::store(out + i * lanes_of<A>, square[i] * factor);
      }
    }
  }
}

// The way back: row(lane)[k] = from[k * lanes + lane] * factors[lane], for the lanes whose row is not null. `stream`: past the
// cache, where rows are whole cache lines.
template <class A, class T, class F>
inline void from_lanes(int vectors, int64_t count, int64_t depth, const A* from, const A* factors, bool stream, const F& row) {
  using V = Vec<A>;
  constexpr int width = V::width;
  for (int v = 0; v < vectors; ++v) {
    T* to[width];
    bool all = true;
    for (int i = 0; i < width; ++i) {
      to[i] = v * width + i < count ? row(v * width + i) : nullptr;
      all = all && to[i] != nullptr;
    }
    const typename V::Register factor = V::load(factors + v * width);
    for (int64_t k = 0; k < depth; k += width) {
      const int64_t left = least(depth - k, width);
      const A* in = from + k * lanes_of<A> + v * width;
      typename V::Register square[width];
      if (left == width && all) {
        for (int i = 0; i < width; ++i) square[i] = V::load(in + i * lanes_of<A>) * factor;
        V::transpose(square);
        if (stream) {
          for (int i = 0; i < width; ++i) V::stream(to[i] + k, square[i]);
        } else {
          for (int i = 0; i < width; ++i) V::store(to[i] + k, square[i]);
        }
        continue;
      }
      for (int i = 0; i < width; ++i) square[i] = i < left ? V::load(in + i * lanes_of<A>) * factor : V::zero();
      V::transpose(square);
      for (int i = 0; i < width; ++i)
        if (to[i]) store_lanes<A>(to[i] + k, square[i], left);
    }
  }
}

// Adds the rows of a pair's operand to what is asked for ahead.
template <class T>
inline void add_rows(const Pair& pair, const AttentionOperand& operand, int64_t head, int64_t first, int64_t count, Ahead& ahead) {
  for (int64_t i = 0; i < count; ++i) ahead.add(pair.at<T>(operand, head, i, first));
}

// A pair of more rows computes long enough to wait for some of them.
inline constexpr int64_t most_ahead = 2048;

// Keys or values of a pair as accumulators: where they lie, if they lie as the products read them, else copied to `to`.
// `row_factor(j)`: each row's factor, 1 where there is none.
template <class A, class T, bool scaled, class F>
inline Staged<A> staged(const Pair& pair, const AttentionOperand& operand, int64_t channels, bool in_place, A* to,
                        const F& row_factor) {
  if constexpr (sizeof(T) == sizeof(A) && !scaled) {
    if (in_place) return {reinterpret_cast<const A*>(pair.key<T>(operand, 0)), operand.row};
  }
  for (int64_t j = 0; j < pair.len_k; ++j) {
    const T* from = pair.key<T>(operand, j);
    A* row = to + j * channels;
    if constexpr (scaled) {
      const typename Vec<A>::Register factor = Vec<A>::set(row_factor(j));
      for_each_vector<A>(channels, [&](int64_t k, int64_t lanes) {
        store_lanes<A>(row + k, load_lanes<A>(from + k, lanes) * factor, lanes);
      });
    } else {
      for_each_vector<A>(channels,
                         [&](int64_t k, int64_t lanes) { store_lanes<A>(row + k, load_lanes<A>(from + k, lanes), lanes); });
    }
  }
  return {to, channels};
}

// 1 / max(|row|, least), negative where the row is shorter: its gradient then has no part along the row.
template <class A, class T>
inline A inverse_norm(const T* row, int64_t channels, double shortest) {
  const A squares = sum_over<A>(channels, [&](typename Vec<A>::Register sum, int64_t k, int64_t lanes) {
    const typename Vec<A>::Register x = load_lanes<A>(row + k, lanes);
    return Vec<A>::fma(x, x, sum);
  });
  const A norm = square_root(squares);
  return norm < static_cast<A>(shortest) ? A(-1) / static_cast<A>(shortest) : A(1) / norm;
}

template <class A>
inline A size_of(A number) {
  return number < 0 ? -number : number;
}

template <class A>
inline A element_of(const void* data, Number number, int64_t at) {
  switch (number) {
    case Number::float32:
      return static_cast<A>(static_cast<const float*>(data)[at]);
    case Number::bfloat16:
      return static_cast<A>(widen(static_cast<const bfloat16*>(data)[at]));
    case Number::float16:
      return static_cast<A>(widen(static_cast<const float16*>(data)[at]));
    default:
      return static_cast<A>(static_cast<const double*>(data)[at]);
  }
}

// The gate of key j.
template <class A>
inline A gate_of(const AttentionCall& call, const Pair& pair, int64_t j) {
  return element_of<A>(call.gate, call.gate_number,
                       pair.b * call.gate_batch + pair.h * call.gate_head + (pair.first_k + j) * call.gate_row);
}

template <class A>
inline A scale_of(const AttentionCall& call, int64_t head) {
  return call.head_scale ? static_cast<const A*>(call.head_scale)[head] : static_cast<A>(call.scale);
}

// What the scores of a query are multiplied by, over its norm where queries are normalised.
template <class A, class T>
inline A query_factor(const AttentionCall& call, int64_t head, const T* query) {
  const A scale = scale_of<A>(call, head);
  return call.normalise > 0 ? scale * size_of(inverse_norm<A>(query, call.dim, call.normalise)) : scale;
}

// The same of a panel's lanes; row(lane): a query.
template <class A, class T, class F>
inline void query_factors(const AttentionCall& call, const Panel<A>& panel, A* factors, const F& row) {
  for (int64_t lane = 0; lane < lanes_of<A>; ++lane)
    factors[lane] = lane < panel.count ? query_factor<A, T>(call, panel.head[lane], row(lane)) : A(0);
}

// A pair's keys and values as products read them, in `to_keys` and `to_values` where they do not lie so already: few rows do
// not pay for a copy. `factors` [Lk], or null: the keys' inverse norms, where they are normalised.
template <class A, class T>
inline void stage_pair(const AttentionCall& call, const Pair& pair, A* to_keys, A* to_values, A* factors, Staged<A>& keys,
                       Staged<A>& values) {
  const auto one = [](int64_t) { return A(1); };
  const auto in_place = [&](const AttentionOperand& operand, int64_t channels) {
    return !pair.tokens && (operand.row == channels || pair.rows <= 2 * lanes_of<A>);
  };
  if (call.normalise > 0) {
    keys = staged<A, T, true>(pair, call.k, call.dim, false, to_keys, [&](int64_t j) {
      const A inverse = inverse_norm<A>(pair.key<T>(call.k, j), call.dim, call.normalise);
      if (factors) factors[j] = inverse;
      return size_of(inverse);
    });
  } else {
    keys = staged<A, T, false>(pair, call.k, call.dim, in_place(call.k, call.dim), to_keys, one);
  }
  if (call.gate) {
    values = staged<A, T, true>(pair, call.v, call.value_dim, false, to_values, [&](int64_t j) { return gate_of<A>(call, pair, j); });
  } else {
    values = staged<A, T, false>(pair, call.v, call.value_dim, in_place(call.v, call.value_dim), to_values, one);
  }
}

// Equal blocks of `most_keys` keys at most, of whole `unit`s: a call's scores are added up in an order that its Lk alone decides.
inline int64_t equal_blocks(int64_t len_k, int64_t most_keys, int64_t unit) {
  const int64_t blocks = most(ceil_div(len_k, most_keys), 1);
  return rounded_up(most(ceil_div(len_k, blocks), 1), unit);
}

}  // namespace
}  // namespace mmk::MMK_TIER
