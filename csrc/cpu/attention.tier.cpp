// Attention of one tier, forward. Backward is attention_backward.tier.cpp's.
#include "attention_products.h"
#include "attention_scores.h"

namespace mmk::MMK_TIER {

// Of the other files.
#define MMK_ATTENTION_PASSES(type)                                                        \
  int64_t attention_backward_##type##_bytes(const AttentionBackward&);                    \
  void attention_backward_##type(const AttentionBackward&, int64_t, int64_t, void*);      \
  int64_t attention_tiny_##type##_items(const AttentionCall&, const AttentionBackward*);  \
  int64_t attention_tiny_##type##_bytes(const AttentionCall&, const AttentionBackward*);  \
  void attention_tiny_##type(const AttentionCall&, const AttentionBackward*, int64_t, int64_t, void*);
MMK_ATTENTION_PASSES(float32)
MMK_ATTENTION_PASSES(bfloat16)
MMK_ATTENTION_PASSES(float16)
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
MMK_ATTENTION_PASSES(float64)
#endif

namespace {

// Panels whose scores one block of keys meets in a row, while it is in the second-level cache.
inline constexpr int64_t group_panels = 4;
inline constexpr int64_t forward_keys = 384;

// One thread's walk over items: what it works in, and what it keeps from one item to the next.
template <class T>
class Forward {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  static constexpr int lanes = lanes_of<A>;

 public:
  explicit Forward(const AttentionCall& c) : call(c), addends(c), dropout(c) {
    caches = c.keeps_addends && !addends.by_key;
    cached_elements = (c.block_rows + lanes - 1) / lanes * lanes * c.len_k;
    const int64_t block = least((c.len_k + 7) / 8 * 8, forward_keys);  // a shorter sequence may have a longer one
    int64_t end = 0;
    const auto take = [&](int64_t count) {
      const int64_t at = end;
      end += (count + 15) / 16 * 16;
      return at;
    };
    scores_at = take(block * lanes);
    panels_at = take(group_panels * c.dim * lanes);
    outs_at = take(group_panels * c.value_dim * lanes);
    keys_at = take(c.len_k * c.dim);
    values_at = take(c.len_k * c.value_dim);
    cached_at = take(caches && !c.batch_inside ? c.kv_heads : 0);
    addends_at = take(!addends.any     ? 0
                      : addends.by_key ? c.len_k
                      : caches         ? cached_elements * (c.batch_inside ? 1 : c.kv_heads)
                                       : block * lanes);
    elements = end;
    streams = rows_stream<T>(c, c.out, c.value_dim);
  }

  int64_t bytes() const { return elements * static_cast<int64_t>(sizeof(A)); }

  void run(int64_t begin, int64_t end, void* scratch) {
    memory = static_cast<A*>(scratch);
    if (caches && !call.batch_inside)
      for (int64_t h = 0; h < call.kv_heads; ++h) memory[cached_at + h] = A(0);
    Item item(call, begin);
    for (int64_t number = begin; number < end; ++number) {
      const Item next(call, number + 1 < end ? number + 1 : number);
      const int64_t row = item.block * call.block_rows;
      if (row < item.pair.rows) {
        if (!(item.pair.b == staged_b && item.pair.h == staged_h)) stage(item.pair);
        if (caches) keep_addends(item);
        following = next.pair.b != item.pair.b || next.pair.h != item.pair.h ? &next.pair : nullptr;
        run_rows(item.pair, row, least(row + call.block_rows, item.pair.rows));
      }
      item = next;
    }
    if (streams) stream_fence();
  }

 private:
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

  A* kept(int64_t h, int64_t row) const {
    return memory + addends_at + (call.batch_inside ? 0 : h * cached_elements) + row * call.len_k;
  }

  void keep_addends(const Item& item) {
    const Pair& pair = item.pair;
    if (call.batch_inside) {
      if (pair.h == cached_h && item.block == cached_block) return;
      cached_h = pair.h;
      cached_block = item.block;
    } else {
      if (memory[cached_at + pair.h] != A(0)) return;
      memory[cached_at + pair.h] = A(1);
    }
    const int64_t row = item.block * call.block_rows, end = least(row + call.block_rows, pair.rows);
    for (int64_t r = row; r < end; r += lanes) make_addends(call, pair, Panel<A>(pair, r, end), 0, pair.len_k, kept(pair.h, r - row));
  }

  // A share of what the next item reads: it comes while this one computes.
  void prefetch(int64_t index, int64_t parts) const {
    if (following == nullptr) return;
    const Pair& pair = *following;
    prefetch_rows<T>(pair, call.k, pair.h, pair.first_k, pair.len_k, call.dim, index, parts);
    prefetch_rows<T>(pair, call.v, pair.h, pair.first_k, pair.len_k, call.value_dim, index, parts);
    for (int64_t g = 0; g < pair.group; ++g)
      prefetch_rows<T>(pair, call.q, pair.h * pair.group + g, pair.first_q, pair.len_q, call.dim, index, parts);
  }

  void stage(const Pair& pair) {
    staged_b = pair.b;
    staged_h = pair.h;
    if (addends.by_key) make_key_addends(call, pair, memory + addends_at);
    // Few rows read their keys once, as they lie.
    direct = is_few<A>(pair.rows, pair, call) && !pair.tokens && pair.len_k > 0 && call.normalise == 0 && !call.gate;
    if (direct || pair.len_k == 0) return;
    stage_pair<A, T>(call, pair, memory + keys_at, memory + values_at, nullptr, keys, values);
  }

  struct State {
    Register top[2], sum[2];
  };

  void run_rows(const Pair& pair, int64_t begin, int64_t end) {
    const int64_t block = equal_blocks(pair.len_k, forward_keys), steps = (end - begin + lanes - 1) / lanes;
    for (int64_t group = begin; group < end; group += group_panels * lanes) {
      const int64_t count = least(group_panels, (end - group + lanes - 1) / lanes);
      State states[group_panels];
      Panel<A> panels[group_panels];
      bool started[group_panels] = {};
      for (int64_t p = 0; p < count; ++p) {
        for (int v = 0; v < 2; ++v) {
          states[p].top[v] = V::set(static_cast<A>(minus_infinity));
          states[p].sum[v] = V::zero();
        }
        panels[p] = Panel<A>(pair, group + p * lanes, end);
        load_queries(pair, panels[p], memory + panels_at + p * call.dim * lanes);
      }
      for (int64_t key = 0; key < pair.len_k; key += block) {
        for (int64_t p = 0; p < count; ++p) {
          const Intervals<A> intervals(call, pair, panels[p]);
          // From a multiple of four on, so that each key's weight goes into the same of the four sums wherever the rows of a
          // panel begin to see.
          const int64_t first = most(key, intervals.first / 4 * 4), last = least(least(key + block, pair.len_k), intervals.last);
          if (key == 0) prefetch((group - begin) / lanes + p, steps);
          if (first >= last) continue;
          with_vectors(panels[p].vectors(), [&]<int vectors>() {
            run_block<vectors>(pair, panels[p], intervals, p, group - begin + p * lanes, first, last, started[p], states[p]);
          });
          started[p] = true;
        }
      }
      for (int64_t p = 0; p < count; ++p) finish(pair, panels[p], p, started[p], states[p]);
    }
  }

  // A panel of a few rows, or with few left over.
  bool goes_few(const Pair& pair, const Panel<A>& panel) const { return is_few<A>(panel.count, pair, call); }

  void load_queries(const Pair& pair, const Panel<A>& panel, A* to) {
    const auto row = [&](int64_t lane) { return pair.at<T>(call.q, panel.head[lane], panel.query[lane], pair.first_q); };
    if (goes_few(pair, panel)) {
      for (int64_t r = 0; r < panel.count; ++r) {
        const T* from = row(r);
        A factor = scale_of<A>(call, panel.head[r]);
        if (call.normalise > 0) factor *= size_of(inverse_norm<A>(from, call.dim, call.normalise));
        const Register factors = V::set(factor);
        for (int64_t k = 0; k < call.dim; k += V::width) V::store(to + r * call.dim + k, V::load(from + k) * factors);
      }
      return;
    }
    A factors[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      factors[lane] = scale_of<A>(call, panel.head[lane]);
      if (call.normalise > 0 && lane < panel.count) factors[lane] *= size_of(inverse_norm<A>(row(lane), call.dim, call.normalise));
    }
    to_lanes<A, T>(panel.vectors(), panel.count, call.dim, factors, to, row);
  }

  // Keys [first, last) of one panel: scores, softmax as far as it is known, weighted values.
  template <int vectors>
  void run_block(const Pair& pair, const Panel<A>& panel, const Intervals<A>& intervals, int64_t p, int64_t row_in_block,
                 int64_t first, int64_t last, bool started, State& state) {
    A* scores = memory + scores_at;
    const A* queries = memory + panels_at + p * call.dim * lanes;
    A* outs = memory + outs_at + p * call.value_dim * lanes;
    const int64_t count = last - first;
    const bool few = goes_few(pair, panel);
    if (!few) {
      score_panel<A, vectors>(keys, first, last, call.dim, queries, scores);
    } else if (direct) {
      score_few<A>(pair.key<T>(call.k, first), call.k.row, count, queries, panel.count, call.dim, scores);
    } else {
      score_few<A>(keys.data + first * keys.row, keys.row, count, queries, panel.count, call.dim, scores);
    }
    if (call.softcap > 0) apply_softcap<A, vectors>(call.softcap, count, scores);
    // Four sums are more exact than one, and wait less for each other.
    Register top[vectors], rescale[vectors], chains[4][vectors];
    for (int v = 0; v < vectors; ++v) top[v] = state.top[v];
    const bool changes = pair.regions || intervals.cuts(first, last);
    if (addends.any) {
      const A* added = memory + addends_at;
      if (addends.by_key) {
        added += first;
      } else if (caches) {
        added = kept(pair.h, row_in_block) + first * lanes;
      } else {
        make_addends(call, pair, panel, first, last, memory + addends_at);
      }
      Register unmasked[vectors] = {};
      add_addends<A, vectors>(added, addends.by_key, count, scores, changes ? unmasked : top);
    }
    if (pair.regions) add_regions<A, vectors>(pair, panel, call.windows.region_bias, first, last, scores);
    if (intervals.cuts(first, last)) apply_intervals<A, vectors>(intervals, first, last, scores);
    if (changes || !addends.any) {
      for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < vectors; ++v) top[v] = V::max(top[v], V::load(scores + j * lanes + v * V::width));
    }
    for (int v = 0; v < vectors; ++v) {
      // Rows that have seen nothing yet have no largest score: from 0 their scores of -infinity give 0.
      const Register before = state.top[v];
      state.top[v] = top[v];
      top[v] = V::select(V::less_equal(V::set(lowest<A>()), top[v]), top[v], V::zero());
      rescale[v] = exp_of_negative<A>(before - top[v]);
      chains[0][v] = started ? state.sum[v] * rescale[v] : V::zero();
      for (int chain = 1; chain < 4; ++chain) chains[chain][v] = V::zero();
    }
    const auto weigh = [&](int64_t j, int chain) {
      for (int v = 0; v < vectors; ++v) {
        A* at = scores + j * lanes + v * V::width;
        const Register weight = exp_of_negative<A>(V::load(at) - top[v]);
        chains[chain][v] = chains[chain][v] + weight;
        V::store(at, weight);
      }
    };
    int64_t next = 0;
    for (; next + 4 <= count; next += 4)
      for (int chain = 0; chain < 4; ++chain) weigh(next + chain, chain);
    for (int chain = 0; chain < 3; ++chain)
      if (next + chain < count) weigh(next + chain, chain);
    for (int v = 0; v < vectors; ++v) state.sum[v] = (chains[0][v] + chains[1][v]) + (chains[2][v] + chains[3][v]);
    if (dropout.any) dropout.apply(call, pair, panel, first, last, scores, scores);

    if (few) {
      if (started) {
        A factors[lanes];
        V::store(factors, rescale[0]);
        for (int64_t r = 0; r < panel.count; ++r)
          for (int64_t k = 0; k < call.value_dim; k += V::width) {
            A* at = outs + r * call.value_dim + k;
            V::store(at, V::load(at) * V::set(factors[r]));
          }
      }
      if (direct) {
        weigh_few<A>(pair.key<T>(call.v, first), call.v.row, count, scores, panel.count, call.value_dim, started, outs);
      } else {
        weigh_few<A>(values.data + first * values.row, values.row, count, scores, panel.count, call.value_dim, started, outs);
      }
      return;
    }
    if (started) {
      for (int64_t k = 0; k < call.value_dim; ++k)
        for (int v = 0; v < vectors; ++v) {
          A* at = outs + k * lanes + v * V::width;
          V::store(at, V::load(at) * rescale[v]);
        }
    }
    weigh_panel<A, vectors>(values, first, last, call.value_dim, scores, started, outs);
  }

  void finish(const Pair& pair, const Panel<A>& panel, int64_t p, bool started, const State& state) {
    A tops[lanes], sums[lanes], logs[lanes], factors[lanes];
    for (int v = 0; v < 2; ++v) {
      V::store(tops + v * V::width, state.top[v]);
      V::store(sums + v * V::width, state.sum[v]);
    }
    for (int lane = 0; lane < lanes; ++lane) logs[lane] = log_of_positive(sums[lane]);
    const A* outs = memory + outs_at + p * call.value_dim * lanes;
    A* lse = static_cast<A*>(call.lse);
    for (int64_t lane = 0; lane < panel.count; ++lane) {
      const bool nothing = !started || sums[lane] == A(0);
      factors[lane] = nothing ? A(0) : A(1) / sums[lane];
      lse[pair.b * call.lse_batch + panel.head[lane] * call.lse_head + (pair.first_q + panel.query[lane]) * call.lse_row] =
          nothing ? static_cast<A>(minus_infinity) : tops[lane] + logs[lane];
    }
    for (int64_t lane = panel.count; lane < lanes; ++lane) factors[lane] = A(0);
    const auto row = [&](int64_t lane) -> T* {
      if (!pair.inside(panel.query[lane])) return nullptr;
      return pair.at<T>(call.out, panel.head[lane], panel.query[lane], pair.first_q);
    };
    if (!started) {
      for (int64_t lane = 0; lane < panel.count; ++lane)
        if (T* to = row(lane)) memset(to, 0, static_cast<size_t>(call.value_dim) * sizeof(T));
    } else if (goes_few(pair, panel)) {
      for (int64_t r = 0; r < panel.count; ++r)
        if (T* to = row(r))
          for (int64_t k = 0; k < call.value_dim; k += V::width)
            V::store(to + k, V::load(outs + r * call.value_dim + k) * V::set(factors[r]));
    } else {
      from_lanes<A, T>(panel.vectors(), panel.count, call.value_dim, outs, factors, streams, row);
    }
  }

  const AttentionCall& call;
  const Addends addends;
  const Dropout dropout;
  bool caches, streams, direct = false;
  int64_t cached_elements, scores_at, panels_at, outs_at, keys_at, values_at, cached_at, addends_at, elements;
  const Pair* following = nullptr;
  A* memory = nullptr;
  int64_t staged_b = -1, staged_h = -1, cached_h = -1, cached_block = -1;
  Staged<A> keys{}, values{};
};

template <class T>
int64_t forward_bytes(const AttentionCall& call) {
  return Forward<T>(call).bytes();
}

template <class T>
void forward(const AttentionCall& call, int64_t begin, int64_t end, void* scratch) {
  Forward<T>(call).run(begin, end, scratch);
}

}  // namespace

#define MMK_ATTENTION_KERNELS(storage, type)                                                                     \
  {                                                                                                              \
    forward_bytes<storage>, attention_backward_##type##_bytes, forward<storage>, attention_backward_##type,      \
        attention_tiny_##type##_items, attention_tiny_##type##_bytes, attention_tiny_##type                      \
  }

const AttentionTier attention_kernels = {{
    MMK_ATTENTION_KERNELS(float, float32),
    MMK_ATTENTION_KERNELS(bfloat16, bfloat16),
    MMK_ATTENTION_KERNELS(float16, float16),
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    MMK_ATTENTION_KERNELS(double, float64),
#else
    {},
#endif
}};

}  // namespace mmk::MMK_TIER
