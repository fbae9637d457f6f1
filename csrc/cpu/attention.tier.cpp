// Attention of one tier, forward. Backward is attention_backward.tier.cpp's.
#include "attention_scores.h"
#include "attention_vectors.h"
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_amx
#include "attention_tiles.h"
#elif MMK_TIER_ID(MMK_TIER) >= MMK_TIER_IS_avx512
#include "attention_short.h"
#endif

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

// One thread's walk over items: what it works in, and what it keeps from one item to the next. Pairs that Products does not take
// are another walk's.
template <class T, class Products>
class Forward {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  static constexpr int lanes = lanes_of<A>;

 public:
  explicit Forward(const AttentionCall& c) : call(c), addends(c), dropout(c), products(c, layout, ahead) {
    rows_at = layout.take(ceil_div(most_ahead * sizeof(void*), sizeof(A)));
    ahead.bytes = most(c.dim, c.value_dim) * static_cast<int64_t>(sizeof(T));
    caches = c.keeps_addends && !addends.by_key;
    cached_elements = (rounded_up(c.block_rows, lanes) + lanes) * c.len_k;
    // A shorter sequence may have a longer block.
    const int64_t block = least(rounded_up(c.len_k, Products::key_unit), forward_keys);
    scores_at = layout.take(block * lanes);
    cached_at = layout.take(caches && !c.batch_inside ? c.kv_heads : 0);
    addends_at = layout.take(!addends.any     ? 0
                             : addends.by_key ? c.len_k
                             : caches         ? cached_elements * (c.batch_inside ? 1 : c.kv_heads)
                                              : block * lanes);
    streams = rows_stream<T>(c, c.out, c.value_dim);
  }

  int64_t bytes() const { return layout.end * static_cast<int64_t>(sizeof(A)); }

  void run(int64_t begin, int64_t end, void* scratch) {
    if (!call.cu_q && !Products::takes(call, Pair(call, 0, 0))) return;
    memory = static_cast<A*>(scratch);
    products.begin(scratch);
    ahead.rows = reinterpret_cast<const void**>(memory + rows_at);
    if (caches && !call.batch_inside)
      for (int64_t h = 0; h < call.kv_heads; ++h) memory[cached_at + h] = A(0);
    Item item(call, begin);
    for (int64_t number = begin; number < end; ++number) {
      const Item next(call, number + 1 < end ? number + 1 : number);
      const int64_t row = item.block * call.block_rows;
      if (row < item.pair.rows && Products::takes(call, item.pair)) {
        if (!(item.pair.b == staged_b && item.pair.h == staged_h)) stage(item.pair);
        if (caches) keep_addends(item);
        look_ahead(next.pair, item.pair);
        run_rows(item.pair, row, least(row + call.block_rows, item.pair.rows));
      }
      item = next;
    }
    products.end();
    if (streams) stream_fence();
  }

 private:
  // Rows [begin, end) of a pair as panels, whole ones but for the last. A few rows beyond the first vector of the last one are a
  // panel of their own, where Products has products for them that cost less than a second vector.
  struct Cut {
    int64_t begin, end, panels;
    bool apart;

    Cut(const AttentionCall& call, const Pair& pair, int64_t first, int64_t last) : begin(first), end(last) {
      const int64_t beyond = (end - begin) % lanes - V::width;
      apart = beyond > 0 && Products::takes_few(beyond, pair, call);
      panels = ceil_div(end - begin, lanes) + (apart ? 1 : 0);
    }
    Panel<A> panel(const Pair& pair, int64_t index) const {
      const int64_t row = begin + index * lanes;
      if (apart && index + 2 == panels) return Panel<A>(pair, row, row + V::width);
      if (apart && index + 1 == panels) return Panel<A>(pair, row - lanes + V::width, end);
      return Panel<A>(pair, row, end);
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
    const Cut cut(call, pair, row, end);
    for (int64_t p = 0; p < cut.panels; ++p) make_addends(call, pair, cut.panel(pair, p), 0, pair.len_k, kept(pair.h, p * lanes));
  }

  // What `next` reads comes while `pair` computes.
  void look_ahead(const Pair& next, const Pair& pair) {
    ahead.count = ahead.next = 0;
    if (next.b == pair.b && next.h == pair.h) return;
    // A few rows read their keys in the order of memory, which hardware foresees.
    if (next.rows + 2 * next.len_k > most_ahead || Products::takes_few(next.rows, next, call)) return;
    for (int64_t g = 0; g < next.group; ++g) add_rows<T>(next, call.q, next.h * next.group + g, next.first_q, next.len_q, ahead);
    add_rows<T>(next, call.k, next.h, next.first_k, next.len_k, ahead);
    add_rows<T>(next, call.v, next.h, next.first_k, next.len_k, ahead);
    const int64_t panels = ceil_div(least(call.block_rows, pair.rows), lanes);
    ahead.spread(panels * (looks_of(pair.len_k, call.dim) + looks_of(call.value_dim, pair.len_k)));
  }

  void stage(const Pair& pair) {
    staged_b = pair.b;
    staged_h = pair.h;
    if (addends.by_key) make_key_addends(call, pair, memory + addends_at);
    if (pair.len_k > 0) products.stage(pair);
  }

  struct State {
    Register top[2], sum[2];
  };

  void run_rows(const Pair& pair, int64_t begin, int64_t end) {
    const int64_t block = equal_blocks(pair.len_k, forward_keys, Products::key_unit);
    const Cut cut(call, pair, begin, end);
    for (int64_t group = 0; group < cut.panels; group += group_panels) {
      const int64_t count = least(group_panels, cut.panels - group);
      State states[group_panels];
      Panel<A> panels[group_panels];
      bool started[group_panels] = {};
      for (int64_t p = 0; p < count; ++p) {
        for (int v = 0; v < 2; ++v) {
          states[p].top[v] = V::set(static_cast<A>(minus_infinity));
          states[p].sum[v] = V::zero();
        }
        panels[p] = cut.panel(pair, group + p);
        products.load_queries(pair, panels[p], p);
      }
      for (int64_t key = 0; key < pair.len_k; key += block) {
        for (int64_t p = 0; p < count; ++p) {
          const Intervals<A> intervals(call, pair, panels[p]);
          const int64_t first = most(key, intervals.first / Products::first_unit * Products::first_unit);
          const int64_t last = least(least(key + block, pair.len_k), intervals.last);
          if (key == 0) ahead.until(ahead.count * (group + p) / cut.panels);
          if (first >= last) continue;
          with_vectors(panels[p].vectors(), [&]<int vectors>() {
            run_block<vectors>(pair, panels[p], intervals, p, (group + p) * lanes, first, last, started[p], states[p]);
          });
          started[p] = true;
        }
      }
      for (int64_t p = 0; p < count; ++p) finish(pair, panels[p], p, started[p], states[p]);
    }
  }

  // Keys [first, last) of one panel: scores, softmax as far as it is known, weighted values.
  template <int vectors>
  void run_block(const Pair& pair, const Panel<A>& panel, const Intervals<A>& intervals, int64_t p, int64_t row_in_block,
                 int64_t first, int64_t last, bool started, State& state) {
    A* scores = memory + scores_at;
    const int64_t count = last - first;
    const bool changes = pair.regions || intervals.cuts(first, last);
    if constexpr (Products::has_few) {
      if (!changes && !addends.any && call.softcap == 0 && !dropout.any && products.goes_few(pair, panel))
        return run_few(pair, panel, p, first, last, started, state);
    }
    products.template score<vectors>(pair, panel, p, first, last, scores);
    if (call.softcap > 0) apply_softcap<A, vectors>(call.softcap, count, scores);
    // Four sums are more exact than one, and wait less for each other.
    Register top[vectors], rescale[vectors], chains[4][vectors];
    for (int v = 0; v < vectors; ++v) top[v] = state.top[v];
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
    products.template weigh<vectors>(pair, panel, p, first, last, scores, started, rescale);
  }

  // The same of a few rows whose scores are products alone: keys are the lanes of their softmax.
  void run_few(const Pair& pair, const Panel<A>& panel, int64_t p, int64_t first, int64_t last, bool started, State& state) {
    A* scores = memory + scores_at;
    const int64_t row_step = rounded_up(last - first, V::width);
    products.score_rows_of(pair, panel, p, first, last, scores, row_step);
    A tops[lanes], sums[lanes], rescales[lanes] = {};
    V::store(tops, state.top[0]);
    V::store(sums, state.sum[0]);
    for (int64_t r = 0; r < panel.count; ++r) {
      A* row = scores + r * row_step;
      Register top = V::set(tops[r]);
      for (int64_t j = 0; j < row_step; j += V::width) top = V::max(top, V::load(row + j));
      A lane_tops[V::width];
      V::store(lane_tops, top);
      for (int n = 1; n < V::width; ++n) lane_tops[0] = lane_tops[n] > lane_tops[0] ? lane_tops[n] : lane_tops[0];
      // A row that has seen nothing yet has no largest score: from 0 its scores of -infinity give 0.
      const A before = tops[r], from = lane_tops[0] >= lowest<A>() ? lane_tops[0] : A(0);
      A rescaled[V::width];
      V::store(rescaled, exp_of_negative<A>(V::set(before - from)));
      Register chains[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (int64_t j = 0; j < row_step; j += V::width) {
        const Register weight = exp_of_negative<A>(V::load(row + j) - V::set(from));
        chains[j / V::width % 4] = chains[j / V::width % 4] + weight;
        V::store(row + j, weight);
      }
      tops[r] = lane_tops[0];
      rescales[r] = rescaled[0];
      sums[r] = (started ? sums[r] * rescales[r] : A(0)) + V::sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
    }
    state.top[0] = V::load(tops);
    state.sum[0] = V::load(sums);
    products.weigh_rows(pair, panel, p, first, last, scores, 1, row_step, started, V::load(rescales));
  }

  void finish(const Pair& pair, const Panel<A>& panel, int64_t p, bool started, const State& state) {
    A tops[lanes], sums[lanes], logs[lanes], factors[lanes];
    for (int v = 0; v < 2; ++v) {
      V::store(tops + v * V::width, state.top[v]);
      V::store(sums + v * V::width, state.sum[v]);
    }
    for (int lane = 0; lane < lanes; ++lane) logs[lane] = log_of_positive(sums[lane]);
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
    } else {
      products.store(pair, panel, p, factors, streams, row);
    }
  }

  const AttentionCall& call;
  const Addends addends;
  const Dropout dropout;
  Layout layout;
  Ahead ahead;
  Products products;
  bool caches, streams;
  int64_t cached_elements, rows_at, scores_at, cached_at, addends_at;
  A* memory = nullptr;
  int64_t staged_b = -1, staged_h = -1, cached_h = -1, cached_block = -1;
};

#if MMK_TIER_ID(MMK_TIER) > MMK_TIER_IS_avx512
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_amx
using ForwardBeyond = ForwardTiles;
#else
using ForwardBeyond = ForwardPairs;
#endif

int64_t forward_bytes(const AttentionCall& call) {
  const int64_t bytes = most(Forward<bfloat16, ForwardBeyond>(call).bytes(), Forward<bfloat16, ForwardVectors<bfloat16>>(call).bytes());
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
  return most(bytes, ShortForward<bfloat16>(call).bytes());
#else
  return bytes;
#endif
}

// Packed sequences choose one by one: those that the others do not take, vectors do.
void forward(const AttentionCall& call, int64_t begin, int64_t end, void* scratch) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
  ShortForward<bfloat16>(call).run(begin, end, scratch);
#endif
  Forward<bfloat16, ForwardBeyond>(call).run(begin, end, scratch);
  Forward<bfloat16, ForwardVectors<bfloat16>>(call).run(begin, end, scratch);
}
#else
template <class T>
int64_t forward_bytes(const AttentionCall& call) {
  const int64_t bytes = Forward<T, ForwardVectors<T>>(call).bytes();
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512
  if constexpr (sizeof(T) == sizeof(float)) return most(bytes, ShortForward<T>(call).bytes());
#endif
  return bytes;
}

template <class T>
void forward(const AttentionCall& call, int64_t begin, int64_t end, void* scratch) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512
  if constexpr (sizeof(T) == sizeof(float)) ShortForward<T>(call).run(begin, end, scratch);
#endif
  Forward<T, ForwardVectors<T>>(call).run(begin, end, scratch);
}
#endif

}  // namespace

#if MMK_TIER_ID(MMK_TIER) > MMK_TIER_IS_avx512
const AttentionTier attention_kernels = {{
    {},
    {forward_bytes, attention_backward_bfloat16_bytes, forward, attention_backward_bfloat16, nullptr, nullptr, nullptr},
    {},
    {},
}};
#else
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
#endif

}  // namespace mmk::MMK_TIER
