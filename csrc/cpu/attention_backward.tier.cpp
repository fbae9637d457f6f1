// Attention of one tier, backward: the weights are computed again from the logarithms of their sums. With W the weights, dO
// the gradient of the output and centre = row sums of dO O - dlse = row sums of W (dO V^T) - dlse:
//   dV = W^T dO ;  dS = W (dO V^T - centre) ;  dK = dS^T Q ;  dQ = dS K ;  dbias = dS
// A task owns dK and dV of its pairs, and dQ of its rows; blocks of keys outermost, panels of rows inside.
#include "attention_gradients.h"
#include "attention_scores.h"
#include "attention_vectors.h"
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_amx
#include "attention_tiles.h"
#elif MMK_TIER_ID(MMK_TIER) >= MMK_TIER_IS_avx512
#include "attention_short.h"
#endif

namespace mmk::MMK_TIER {
namespace {

// Pairs that Products does not take are another walk's.
template <class T, class Products>
class Backward {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  static constexpr int lanes = lanes_of<A>;

 public:
  explicit Backward(const AttentionBackward& backward)
      : back(backward),
        call(backward.call),
        addends(backward.call),
        dropout(backward.call),
        most_panels(longest_run(call.heads / call.kv_heads * call.len_q, back.splits) / lanes + 2),
        products(backward.call, most_panels, layout, ahead) {
    ahead_at = layout.take(ceil_div(most_ahead * sizeof(void*), sizeof(A)));
    ahead.bytes = most(call.dim, call.value_dim) * static_cast<int64_t>(sizeof(T));
    const int64_t block = least(rounded_up(call.len_k, Products::key_unit), backward_keys) * lanes;
    capped_at = layout.take(call.softcap > 0 ? block : 0);
    lse_at = layout.take(most_panels * lanes);
    centre_at = layout.take(most_panels * lanes);
    inverse_at = layout.take(most_panels * lanes);
    row_factors_at = layout.take(most_panels * lanes);
    rows_at = layout.take(lanes * call.dim);
    unit_at = layout.take(call.dim);
    pending_step = rounded_up(block / lanes * (products.dim + products.value_dim), 16);
    int64_t levels = 0;
    for (int64_t parts = row_parts(call.heads / call.kv_heads * call.len_q) / back.splits; parts > 1; parts /= 2) ++levels;
    pending_at = layout.take(levels * pending_step);
    addends_at = layout.take(!addends.any ? 0 : addends.by_key ? call.len_k : block);
    stream_queries = rows_stream<T>(call, back.grad_q, call.dim);
    stream_keys = rows_stream<T>(call, back.grad_k, call.dim);
    stream_values = rows_stream<T>(call, back.grad_v, call.value_dim);
  }

  int64_t bytes() const { return layout.end * static_cast<int64_t>(sizeof(A)); }

  void run(int64_t begin, int64_t end, void* scratch) {
    if (!call.cu_q && !Products::takes(call, Pair(call, 0, 0))) return;
    memory = static_cast<A*>(scratch);
    products.begin(scratch);
    ahead.rows = reinterpret_cast<const void**>(memory + ahead_at);
    const Members members(back);
    for (int64_t task = begin; task < end; ++task) {
      const Members::Run run = members.run(task);
      for (int64_t m = run.begin; m < run.end; ++m) {
        const Pair pair = members.pair(run.group, m);
        if (Products::takes(call, pair)) run_pair(pair, members.next(task, run, m, end), run.chunk, run.split);
      }
    }
    products.end();
    if (stream_keys || stream_values || stream_queries) stream_fence();
  }

 private:
  // Whether a pair's keys are one block.
  static bool at_once(const Pair& pair) { return pair.len_k <= backward_keys; }

  // What `next` reads comes while a pair computes, `panels` of it.
  void look_ahead(const Pair& next, const Pair& pair, int64_t panels) {
    ahead.count = ahead.next = 0;
    if (next.b == pair.b && next.h == pair.h) return;
    const bool reads_out = !at_once(next);
    if ((reads_out ? 3 : 2) * next.rows + 2 * next.len_k > most_ahead) return;
    add_rows<T>(next, call.k, next.h, next.first_k, next.len_k, ahead);
    add_rows<T>(next, call.v, next.h, next.first_k, next.len_k, ahead);
    for (int64_t head = next.h * next.group; head < (next.h + 1) * next.group; ++head) {
      add_rows<T>(next, call.q, head, next.first_q, next.len_q, ahead);
      if (reads_out) add_rows<T>(next, call.out, head, next.first_q, next.len_q, ahead);
      add_rows<T>(next, back.grad_out, head, next.first_q, next.len_q, ahead);
    }
    ahead.spread(panels * (looks_of(pair.len_k, call.dim) + looks_of(pair.len_k, call.value_dim) + looks_of(call.dim, pair.len_k)));
  }

  void run_pair(const Pair& pair, const Pair& next, int64_t chunk, int64_t split) {
    const int64_t parts = row_parts(pair.rows), own = most(parts / back.splits, 1), first_part = split * own;
    if (first_part >= parts) return;
    const int64_t begin = part_begin(pair.rows, first_part, parts), end = part_begin(pair.rows, first_part + own, parts);
    number = pair.b * call.kv_heads + pair.h;
    look_ahead(next, pair, ceil_div(end - begin, lanes));
    if (back.grad_pad) {
      A* pad = static_cast<A*>(back.grad_pad) + number * (call.dim + call.value_dim);
      for (int64_t k = 0; k < call.dim + call.value_dim; ++k) pad[k] = A(0);
    }
    if (addends.by_key) make_key_addends(call, pair, memory + addends_at);
    if (pair.len_k > 0) products.stage_keys(pair);
    stage_rows(pair, begin, end);
    const int64_t block = equal_blocks(pair.len_k, backward_keys, Products::key_unit);
    find_huge_rows(pair, begin, end, block);
    for (int64_t key = 0; key < pair.len_k; key += block) {
      const int64_t count = least(block, pair.len_k - key);
      for (int64_t part = 0; part < own; ++part) {
        run_part(pair, begin, end, part_begin(pair.rows, first_part + part, parts),
                 part_begin(pair.rows, first_part + part + 1, parts), key, count, chunk);
        add_parts(part, own, count);
      }
      store_keys(pair, split, key, count);
    }
    for (int64_t row = begin; row < end; row += lanes) store_queries(pair, Panel<A>(pair, row, end), row - begin);
  }

  // Rows [first, last) of those that are staged, [begin, end), and a block of keys.
  void run_part(const Pair& pair, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t key, int64_t count,
                int64_t chunk) {
    bool started = false;
    for (int64_t row = first; row < last; row += gathered_panels * lanes) {
      const int64_t panels = least(gathered_panels, ceil_div(last - row, lanes));
      bool seen[gathered_panels], any = false;
      for (int64_t p = 0; p < panels; ++p) {
        const Intervals<A> intervals(call, pair, Panel<A>(pair, row + p * lanes, last));
        seen[p] = most(key, intervals.first) < least(key + count, intervals.last);
        any = any || seen[p];
      }
      if (!any) continue;
      for (int64_t p = 0; p < panels; ++p) {
        if (key == 0) ahead.until(ahead.count * ((row - begin) / lanes + p) / ceil_div(end - begin, lanes));
        if (seen[p]) {
          const Panel<A> panel(pair, row + p * lanes, last);
          with_vectors(panel.vectors(), [&]<int vectors>() {
            run_panel<vectors>(pair, panel, row - begin + p * lanes, p, key, key + count, chunk);
          });
        } else {
          products.keep_zeros(p, count);
        }
      }
      products.gather(row - begin, panels, least(last - row - (panels - 1) * lanes, lanes), count, started);
      started = true;
    }
    if (started) return;
    for (int64_t i = 0; i < count * products.dim; ++i) products.grad_keys()[i] = A(0);
    for (int64_t i = 0; i < count * products.value_dim; ++i) products.grad_values()[i] = A(0);
  }

  // The sums that run_part left of part `part` of `own`: added to the finished parts beside it, two and two, then four and four;
  // or kept until those that they are added to are finished.
  void add_parts(int64_t part, int64_t own, int64_t count) {
    const int64_t of_keys = count * products.dim, of_values = count * products.value_dim;
    A* pending = memory + pending_at;
    for (int64_t level = part; level % 2 == 1; level /= 2) {
      add_to(products.grad_keys(), pending, of_keys);
      add_to(products.grad_values(), pending + of_keys, of_values);
      pending += pending_step;
    }
    if (part + 1 == own) return;
    memcpy(pending, products.grad_keys(), static_cast<size_t>(of_keys) * sizeof(A));
    memcpy(pending + of_keys, products.grad_values(), static_cast<size_t>(of_values) * sizeof(A));
  }

  static void add_to(A* sums, const A* pending, int64_t count) {
    for_each_vector<A>(count, [&](int64_t i, int64_t width) {
      store_lanes<A>(sums + i, load_lanes<A>(pending + i, width) + load_lanes<A>(sums + i, width), width);
    });
  }

  // Queries, gradients of the output, and what else belongs to a row.
  void stage_rows(const Pair& pair, int64_t begin, int64_t end) {
    A *lse = memory + lse_at, *centre = memory + centre_at, *row_factors = memory + row_factors_at;
    for (int64_t first = begin; first < end; first += lanes) {
      const Panel<A> panel(pair, first, end);
      const auto upstream = [&](int64_t lane) -> const T* {
        if (!pair.inside(panel.query[lane])) return nullptr;
        return pair.at<T>(back.grad_out, panel.head[lane], panel.query[lane], pair.first_q);
      };
      A factors[lanes];
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t r = first - begin + lane;
        centre[r] = factors[lane] = A(0);
        if (lane >= panel.count) {
          lse[r] = static_cast<A>(-minus_infinity);
          continue;
        }
        const int64_t head = panel.head[lane], i = panel.query[lane];
        row_factors[r] = A(1);
        factors[lane] = scale_of<A>(call, head);
        if (call.normalise > 0) {
          row_factors[r] = inverse_norm<A>(pair.at<T>(call.q, head, i, pair.first_q), call.dim, call.normalise);
          factors[lane] *= size_of(row_factors[r]);
        }
        const T* grad = upstream(lane);
        if (grad && !at_once(pair)) {
          const T* out = pair.at<T>(call.out, head, i, pair.first_q);
          centre[r] = dot<A>(out, grad, call.value_dim);
        }
        const int64_t at = pair.b * call.lse_batch + head * call.lse_head + (pair.first_q + i) * call.lse_row;
        lse[r] = static_cast<const A*>(call.lse)[at];
        if (lse[r] == static_cast<A>(minus_infinity)) {
          lse[r] = static_cast<A>(-minus_infinity);
        } else if (back.grad_lse) {
          centre[r] -= static_cast<const A*>(back.grad_lse)[at];
        }
      }
      products.stage_panel(pair, panel, first - begin, factors, upstream);
    }
  }

  // Scores of one panel and the keys [first, last) as softmax takes them; before bias and masks they stay in `capped` too, where
  // there is a softcap.
  template <int vectors>
  void make_scores(const Pair& pair, const Panel<A>& panel, int64_t row, int64_t first, int64_t last, A* to) {
    const int64_t count = last - first;
    products.template score<vectors>(pair, panel, row, first, last, to);
    if (call.softcap > 0) {
      apply_softcap<A, vectors>(call.softcap, count, to);
      memcpy(memory + capped_at, to, static_cast<size_t>(count * lanes) * sizeof(A));
    }
    if (addends.any) {
      A* added = memory + addends_at;
      if (!addends.by_key) make_addends(call, pair, panel, first, last, added);
      Register top[vectors] = {};
      add_addends<A, vectors>(addends.by_key ? added + first : added, addends.by_key, count, to, top);
    }
    if (pair.regions) add_regions<A, vectors>(pair, panel, call.windows.region_bias, first, last, to);
    const Intervals<A> intervals(call, pair, panel);
    if (intervals.cuts(first, last)) apply_intervals<A, vectors>(intervals, first, last, to);
  }

  // A row whose scores are huge, as those of a row all of whose keys have the smallest of numbers added, has no logarithm of its
  // sum: the scores swallow it. Its weights are divided by their own sum instead.
  void find_huge_rows(const Pair& pair, int64_t begin, int64_t end, int64_t block) {
    constexpr A largest = 256;
    A* inverses = memory + inverse_at;
    const A* lse = memory + lse_at;
    for (int64_t row = 0; row < end - begin; row += lanes) {
      bool huge = false;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        inverses[row + lane] = A(1);
        const A size = size_of(lse[row + lane]);
        huge = huge || (size > largest && size < static_cast<A>(-minus_infinity));
      }
      if (!huge || block >= pair.len_k) continue;
      const Panel<A> panel(pair, begin + row, end);
      with_vectors(panel.vectors(), [&]<int vectors>() {
        Register sums[vectors] = {};
        for (int64_t key = 0; key < pair.len_k; key += block) {
          const int64_t count = least(block, pair.len_k - key);
          A* scores = products.weights(0, count);
          make_scores<vectors>(pair, panel, row, key, key + count, scores);
          for (int64_t j = 0; j < count; ++j)
            for (int v = 0; v < vectors; ++v) {
              const Register from = V::load(lse + row + v * V::width);
              sums[v] = sums[v] + exp_of_negative<A>(V::load(scores + j * lanes + v * V::width) - from);
            }
        }
        for (int v = 0; v < vectors; ++v) V::store(inverses + row + v * V::width, inverse_of_sum<A>(sums[v]));
      });
    }
  }

  // Weights and gradients of the scores of one panel and the keys [first, last), and what follows of them for its queries.
  template <int vectors>
  void run_panel(const Pair& pair, const Panel<A>& panel, int64_t row, int64_t p, int64_t first, int64_t last, int64_t chunk) {
    const int64_t count = last - first;
    A *weight = products.weights(p, count), *grad = products.grads(p, count);
    const A* capped = memory + capped_at;
    make_scores<vectors>(pair, panel, row, first, last, weight);
    products.template score_gradients<vectors>(pair, panel, row, first, last, grad);

    Register lse[vectors], centre[vectors];
    for (int v = 0; v < vectors; ++v) {
      lse[v] = V::load(memory + lse_at + row + v * V::width);
      centre[v] = V::load(memory + centre_at + row + v * V::width);
    }
    if (dropout.any) dropout.apply(call, pair, panel, first, last, grad, grad);
    const auto finish = [&](int64_t at, int v, Register w) {
      V::store(weight + at, w);
      V::store(grad + at, w * (V::load(grad + at) - centre[v]));
    };
    if (!at_once(pair)) {
      for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = j * lanes + v * V::width;
          finish(at, v, exp_of_negative<A>(V::load(weight + at) - lse[v]) * V::load(memory + inverse_at + row + v * V::width));
        }
    } else {
      // With all keys at hand the weights' own sum rids them of the rounding of its logarithm, and the centre of that of out.
      Register chains[4][vectors] = {}, centres[4][vectors] = {};
      for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = j * lanes + v * V::width, chain = j % 4;
          const Register w = exp_of_negative<A>(V::load(weight + at) - lse[v]);
          chains[chain][v] = chains[chain][v] + w;
          V::store(weight + at, w);
        }
      Register inverse[vectors];
      for (int v = 0; v < vectors; ++v)
        inverse[v] = inverse_of_sum<A>((chains[0][v] + chains[1][v]) + (chains[2][v] + chains[3][v]));
      for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = j * lanes + v * V::width, chain = j % 4;
          const Register w = V::load(weight + at) * inverse[v];
          centres[chain][v] = V::fma(w, V::load(grad + at), centres[chain][v]);
          V::store(weight + at, w);
        }
      for (int v = 0; v < vectors; ++v)
        centre[v] = centre[v] + ((centres[0][v] + centres[1][v]) + (centres[2][v] + centres[3][v]));
      for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = j * lanes + v * V::width;
          finish(at, v, V::load(weight + at));
        }
    }
    if (dropout.any) dropout.apply(call, pair, panel, first, last, weight, products.dropped(p, count));
    if (back.grad_bias) add_to_bias<A, vectors>(back, pair, panel, first, last, chunk, grad);
    if (call.softcap > 0) {
      const Register inverse = V::set(static_cast<A>(1 / call.softcap)), one = V::set(A(1));
      for (int64_t j = 0; j < count; ++j)
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = j * lanes + v * V::width;
          const Register ratio = V::load(capped + at) * inverse;
          V::store(grad + at, V::load(grad + at) * (one - ratio * ratio));
        }
    }
    products.template weigh<vectors>(pair, panel, row, first, last, grad);
    products.template keep<vectors>(panel, row, p, count);
  }

  // dK and dV of the keys [first, first + count), from the sums of a block.
  void store_keys(const Pair& pair, int64_t split, int64_t first, int64_t count) {
    A *of_keys = products.grad_keys(), *of_values = products.grad_values();
    const int64_t dim = products.dim, value_dim = products.value_dim;
    if (back.splits > 1) {
      const int64_t pairs = call.batch * call.kv_heads, at = (split * pairs + number) * call.len_k + first;
      A *to_keys = static_cast<A*>(back.partial_k) + at * call.dim, *to_values = static_cast<A*>(back.partial_v) + at * call.value_dim;
      for (int64_t j = 0; j < count; ++j) {
        memcpy(to_keys + j * call.dim, of_keys + j * dim, static_cast<size_t>(call.dim) * sizeof(A));
        memcpy(to_values + j * call.value_dim, of_values + j * value_dim, static_cast<size_t>(call.value_dim) * sizeof(A));
      }
      return;
    }
    A* pad = static_cast<A*>(back.grad_pad);
    if (pad) pad += number * (call.dim + call.value_dim);
    for (int64_t j = 0; j < count; ++j) {
      A *grad = of_keys + j * dim, *value_grad = of_values + j * value_dim;
      const int64_t key = first + j;
      if (call.normalise > 0) along_sphere(products.unit_key(pair, key), products.key_factor(key), call.dim, grad);
      if (call.gate) {
        const T* value = pair.key<T>(call.v, key);
        if (back.grad_gate) {
          static_cast<A*>(back.grad_gate)[pair.b * back.grad_gate_batch + pair.h * back.grad_gate_head +
                                          (pair.first_k + key) * back.grad_gate_row] = dot<A>(value, value_grad, call.value_dim);
        }
        const Register factor = V::set(gate_of<A>(call, pair, key));
        for (int64_t k = 0; k < value_dim; k += V::width) V::store(value_grad + k, V::load(value_grad + k) * factor);
      }
      if (!pair.inside(key)) {
        if (pad == nullptr) continue;
        for (int64_t k = 0; k < call.dim; ++k) pad[k] += grad[k];
        for (int64_t k = 0; k < call.value_dim; ++k) pad[call.dim + k] += value_grad[k];
        continue;
      }
      store_row(grad, call.dim, stream_keys, pair.key<T>(back.grad_k, key));
      store_row(value_grad, call.value_dim, stream_values, pair.key<T>(back.grad_v, key));
    }
  }

  void store_queries(const Pair& pair, const Panel<A>& panel, int64_t row) {
    const A* sums = products.sums(row);
    const auto to = [&](int64_t lane) -> T* {
      if (!pair.inside(panel.query[lane])) return nullptr;
      return pair.at<T>(back.grad_q, panel.head[lane], panel.query[lane], pair.first_q);
    };
    const bool few = products.few(pair, panel);
    A factors[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) factors[lane] = scale_of<A>(call, panel.head[lane]);
    if (call.normalise == 0 && back.grad_scale == nullptr && !few)
      return from_lanes<A, T>(panel.vectors(), panel.count, call.dim, sums, factors, stream_queries, to);
    A* rows = memory + rows_at;
    if (few) {
      memcpy(rows, sums, static_cast<size_t>(panel.count * call.dim) * sizeof(A));
    } else {
      A ones[lanes];
      for (A& one : ones) one = A(1);
      from_lanes<A, A>(panel.vectors(), panel.count, call.dim, sums, ones, false, [&](int64_t lane) { return rows + lane * call.dim; });
    }
    for (int64_t lane = 0; lane < panel.count; ++lane) {
      A* grad = rows + lane * call.dim;
      T* result = to(lane);
      if (result == nullptr) continue;
      const T* query = pair.at<T>(call.q, panel.head[lane], panel.query[lane], pair.first_q);
      const A factor = (memory + row_factors_at)[row + lane], size = size_of(factor);
      A* unit = memory + unit_at;
      for_each_vector<A>(call.dim, [&](int64_t k, int64_t width) {
        store_lanes<A>(unit + k, load_lanes<A>(query + k, width) * V::set(size), width);
      });
      if (back.grad_scale)
        back.grad_scale[pair.b * call.heads + panel.head[lane]] += static_cast<double>(dot<A>(unit, grad, call.dim));
      const Register scale = V::set(factors[lane]);
      for_each_vector<A>(call.dim, [&](int64_t k, int64_t width) {
        store_lanes<A>(grad + k, load_lanes<A>(grad + k, width) * scale, width);
      });
      if (call.normalise > 0) along_sphere(unit, factor, call.dim, grad);
      store_row(grad, call.dim, stream_queries, result);
    }
  }

  const AttentionBackward& back;
  const AttentionCall& call;
  const Addends addends;
  const Dropout dropout;
  int64_t number = 0;  // of the pair
  bool stream_queries, stream_keys, stream_values;
  const int64_t most_panels;  // of a task's rows
  Layout layout;
  Ahead ahead;
  Products products;
  int64_t ahead_at, capped_at, lse_at, centre_at, inverse_at, row_factors_at, rows_at, unit_at, pending_at, pending_step, addends_at;
  A* memory = nullptr;
};

}  // namespace

#if MMK_TIER_ID(MMK_TIER) > MMK_TIER_IS_avx512
namespace {

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_amx
using BackwardBeyond = BackwardTiles;
#else
using BackwardBeyond = BackwardPairs;
#endif

}  // namespace

int64_t attention_backward_bfloat16_bytes(const AttentionBackward& call) {
  const int64_t bytes = most(Backward<bfloat16, BackwardBeyond>(call).bytes(), Backward<bfloat16, BackwardVectors<bfloat16>>(call).bytes());
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
  return most(bytes, ShortBackward<bfloat16>(call).bytes());
#else
  return bytes;
#endif
}

// Packed sequences choose one by one: those that the others do not take, vectors do.
void attention_backward_bfloat16(const AttentionBackward& call, int64_t begin, int64_t end, void* scratch) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
  ShortBackward<bfloat16>(call).run(begin, end, scratch);
#endif
  Backward<bfloat16, BackwardBeyond>(call).run(begin, end, scratch);
  Backward<bfloat16, BackwardVectors<bfloat16>>(call).run(begin, end, scratch);
}
#else
namespace {

template <class T>
int64_t backward_bytes(const AttentionBackward& call) {
  const int64_t bytes = Backward<T, BackwardVectors<T>>(call).bytes();
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512
  if constexpr (sizeof(T) == sizeof(float)) return most(bytes, ShortBackward<T>(call).bytes());
#endif
  return bytes;
}

template <class T>
void backward(const AttentionBackward& call, int64_t begin, int64_t end, void* scratch) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512
  if constexpr (sizeof(T) == sizeof(float)) ShortBackward<T>(call).run(begin, end, scratch);
#endif
  Backward<T, BackwardVectors<T>>(call).run(begin, end, scratch);
}

}  // namespace

#define MMK_ATTENTION_BACKWARD(type, name)                                                                        \
  int64_t name##_bytes(const AttentionBackward& call) { return backward_bytes<type>(call); }                      \
  void name(const AttentionBackward& call, int64_t begin, int64_t end, void* scratch) { backward<type>(call, begin, end, scratch); }
MMK_ATTENTION_BACKWARD(float, attention_backward_float32)
MMK_ATTENTION_BACKWARD(bfloat16, attention_backward_bfloat16)
MMK_ATTENTION_BACKWARD(float16, attention_backward_float16)
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
MMK_ATTENTION_BACKWARD(double, attention_backward_float64)
#endif
#endif

}  // namespace mmk::MMK_TIER
