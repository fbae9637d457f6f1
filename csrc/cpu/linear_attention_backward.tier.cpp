// Linear attention, backward. With S and z the state that query i sees, t_i its total (eps included) and u_i = grad_i / t_i:
//   c_i = -(phi_i . S u_i) / t_i                   the gradient of t_i
//   dphi(q_i) = S u_i + c_i z
//   dS = sum_i phi(q_i) u_i^T ,  dz = sum_i c_i phi(q_i)        over the queries that see a key
//   dphi(k_j) = dS v_j + dz ,  dv_j = dS^T phi(k_j)
// Without a division t_i = 1 and c_i = 0. Causal attention goes through the chunks twice: forward with the state, for queries;
// backward with its gradient, for keys. Within a chunk, with scores P = tril(phi(q) phi(k)^T):
//   dP = tril(u v^T + c) ,  dphi(q) += dP phi(k) ,  dphi(k) += dP^T phi(q) ,  dv += P^T u
#include "linear_attention_parts.h"

namespace mmk::MMK_TIER {
namespace {

// The inverse totals of a head's queries and their gradients, which the pass over the queries leaves to the pass over the keys.
template <class A>
struct TotalsAt {
  A* inverse;
  A* gradient;

  TotalsAt(const LinearAttentionBackward& back, const Sequence& sequence, int64_t head) {
    A* from = static_cast<A*>(back.totals) + sequence.b * back.totals_batch + head * back.totals_head;
    inverse = from + sequence.first_q;
    gradient = inverse + back.totals_part;
  }
};

template <class A>
inline void multiply_add_row(const A* x, A factor, const A* y, A weight, int64_t count, A* to) {
  using V = Vec<A>;
  for (int64_t i = 0; i < count; i += V::width)
    V::store(to + i, V::fma(V::load(x + i), V::set(factor), V::load(y + i) * V::set(weight)));
}

template <class A, class T>
void queries(const LinearAttentionBackward& back, int64_t begin, int64_t end, void* scratch) {
  using F = Form<A, T>;
  const LinearAttentionCall& call = back.call;
  const Shape<A> shape(call);
  const int64_t group = call.heads / call.kv_heads;
  const bool stream = rows_stream<T>(call, back.grad_q, call.dim);
  NextRows<A> following(most(call.dim, call.value_dim) * static_cast<int64_t>(sizeof(T)));
  for (int64_t item = begin; item < end; ++item) {
    const Sequence sequence(call, item / call.segments);
    const Range range = Range::segment(call, sequence.len_q, item % call.segments);
    Buffers<A> buffers(scratch);
    const State<A> state(call, buffers), gradient(call, buffers);
    const StateAt<A> from = StateAt<A>::pair(call, call.final_s, call.final_z, sequence.pair);
    state.load(call, from.s, from.z);
    const Totals<A> totals(call, state, buffers);
    Forms<A, T> of_state(buffers, call.dim, call.value_dim, in_across), of_features(buffers, query_rows, call.dim, in_down);
    Forms<A, T> upstream = Forms<A, T>::of_rows(buffers, query_rows, call.value_dim, in_along | in_down);
    of_state.make(state.rows(call), call.dim);
    if (call.segments == 1) {
      const StateAt<A> returned = StateAt<A>::pair(call, back.upstream_s, back.upstream_z, sequence.pair);
      gradient.load(call, returned.s, returned.z);
    }
    A* features = buffers.rows(query_rows, call.dim);
    A* results = buffers.take(query_rows * shape.dim);
    A of_totals[query_rows], inverse[query_rows];
    for (int64_t head = sequence.h * group; head < (sequence.h + 1) * group; ++head)
      for (int64_t i = range.begin; i < range.end; i += query_rows) {
        const int64_t count = least(query_rows, range.end - i);
        query_features<A, T>(call, sequence, head, i, count, features);
        upstream.make(sequence.query<T>(back.grad_out, head, i), back.grad_out.row, count);
        F::by_rows(upstream.along, of_state.across, call.value_dim, count, shape.dim, false, results, shape.dim);
        if (totals.divides) {
          row_dots<A>(features, shape.dim, count, totals.z, 0, inverse);
          row_dots<A>(features, shape.dim, count, results, shape.dim, of_totals);
        }
        for (int64_t r = 0; r < count; ++r) {
          A* row = features + r * shape.dim;
          A* result = results + r * shape.dim;
          if (totals.divides) {
            const A factor = totals.inverse(inverse[r]);
            of_totals[r] *= -factor;  // times the total: so the rows below are scaled
            multiply_add_row(result, factor, totals.z, of_totals[r] * factor, shape.dim, result);
            store_gradient(call.feature_map, result, row, call.dim, stream, sequence.query<T>(back.grad_q, head, i + r));
            scale_row(row, shape.dim, factor);
          } else {
            store_gradient(call.feature_map, result, row, call.dim, stream, sequence.query<T>(back.grad_q, head, i + r));
          }
        }
        if (totals.divides) add_columns<A>(features, shape.dim, count, of_totals, gradient.z);
        of_features.make({features, shape.dim}, count);
        Ahead* ahead = following.look(
            i + count, least(i + count + query_rows, range.end), 2, count, call.dim, shape.value_dim,
            [&](int64_t which, int64_t next) { return sequence.query<T>(which == 0 ? call.q : back.grad_out, head, next); });
        F::by_cols(of_features.down, upstream.down, count, call.dim, shape.value_dim, gradient.s, shape.value_dim, ahead);
      }
    const StateAt<A> to = call.segments == 1 ? StateAt<A>::pair(call, back.grad_s, back.grad_z, sequence.pair)
                                             : StateAt<A>::segment(call, back.partial, item);
    gradient.store(call, to.s, to.z);
  }
  if (stream) stream_fence();
}

// Stores the gradients of the keys of a chunk. Keys that do not count have none.
template <class A, class T>
class KeyGradients {
 public:
  explicit KeyGradients(const LinearAttentionBackward& backward)
      : back(backward),
        stream_keys(rows_stream<T>(back.call, back.grad_k, back.call.dim)),
        stream_values(rows_stream<T>(back.call, back.grad_v, back.call.value_dim)) {}
  KeyGradients(const KeyGradients&) = delete;
  ~KeyGradients() {
    if (stream_keys || stream_values) stream_fence();
  }

  void store(const Sequence& sequence, int64_t j, int64_t count, const A* of_keys, const A* features, const A* of_values) const {
    const LinearAttentionCall& call = back.call;
    const int64_t dim = padded<A>(call.dim), value_dim = padded<A>(call.value_dim);
    for (int64_t r = 0; r < count; ++r) {
      T* to = sequence.key<T>(back.grad_k, j + r);
      if (sequence.counts(call, j + r)) {
        store_gradient(call.feature_map, of_keys + r * dim, features + r * dim, call.dim, stream_keys, to);
      } else {
        memset(static_cast<void*>(to), 0, static_cast<size_t>(call.dim) * sizeof(T));
      }
      store_row(of_values + r * value_dim, call.value_dim, stream_values, sequence.key<T>(back.grad_v, j + r));
    }
  }

 private:
  const LinearAttentionBackward& back;
  const bool stream_keys, stream_values;
};

template <class A>
inline void fill_rows(const A* row, int64_t row_size, int64_t count, A* to) {
  for (int64_t r = 0; r < count; ++r) memcpy(to + r * row_size, row, static_cast<size_t>(row_size) * sizeof(A));
}

template <class A, class T>
void keys(const LinearAttentionBackward& back, int64_t begin, int64_t end, void* scratch) {
  using F = Form<A, T>;
  const LinearAttentionCall& call = back.call;
  const Shape<A> shape(call);
  const bool is_softmax = call.feature_map == FeatureMap::softmax;
  const int64_t blocks = is_softmax ? 1 : linear_attention_blocks(call.len_k);
  const KeyGradients<A, T> gradients(back);
  NextRows<A> following(most(call.dim, call.value_dim) * static_cast<int64_t>(sizeof(T)));
  for (int64_t item = begin; item < end; ++item) {
    const Sequence sequence(call, item / blocks);
    const Range range = is_softmax ? Range{0, sequence.len_k} : Range::block(sequence.len_k, item % blocks);
    if (range.begin == range.end) continue;
    Buffers<A> buffers(scratch);
    const State<A> gradient(call, buffers);
    const StateAt<A> from = StateAt<A>::pair(call, back.grad_s, back.grad_z, sequence.pair);
    gradient.load(call, from.s, from.z);
    Forms<A, T> of_gradient(buffers, call.dim, call.value_dim, in_across | in_down);
    of_gradient.make(gradient.rows(call), call.dim);
    Keys<A, T> at_hand(call, buffers, in_along, in_along);
    A* of_keys = buffers.take(chunk_rows * shape.dim);
    A* of_values = buffers.take(chunk_rows * shape.value_dim);
    const A* shift = key_shift<A, T>(call, sequence, buffers);
    for (int64_t j = range.begin; j < range.end; j += chunk_rows) {
      const int64_t count = least(chunk_rows, range.end - j);
      at_hand.load(call, sequence, j, count, shift);
      fill_rows(gradient.z, shape.dim, count, of_keys);
      Ahead* ahead = following.look(j + count, least(j + count + chunk_rows, range.end), 2, call.value_dim, count, shape.dim,
                                    [&](int64_t which, int64_t next) { return sequence.key<T>(which == 0 ? call.k : call.v, next); });
      F::by_rows(at_hand.values.along, of_gradient.across, call.value_dim, count, shape.dim, true, of_keys, shape.dim, ahead);
      F::by_rows(at_hand.keys.along, of_gradient.down, call.dim, count, shape.value_dim, false, of_values, shape.value_dim);
      gradients.store(sequence, j, count, of_keys, at_hand.features, of_values);
    }
  }
}

// The queries of a chunk and their upstream gradients, and what causal attention has of them: P in `scores` and grad v^T in
// `slopes`.
template <class A, class T>
struct CausalQueries {
  using F = Form<A, T>;
  A* features;
  A* scores;
  A* slopes;
  Forms<A, T> queries, upstream;

  CausalQueries(const LinearAttentionCall& call, Buffers<A>& buffers)
      : features(buffers.rows(chunk_rows, call.dim)),
        scores(buffers.take(chunk_rows * chunk_rows)),
        slopes(buffers.take(chunk_rows * chunk_rows)),
        queries(buffers, chunk_rows, call.dim, in_along),
        upstream(Forms<A, T>::of_rows(buffers, chunk_rows, call.value_dim, in_along | in_down)) {}

  void load(const LinearAttentionBackward& back, const Sequence& sequence, int64_t head, int64_t i, int64_t count,
            const Keys<A, T>& keys) {
    const LinearAttentionCall& call = back.call;
    query_features<A, T>(call, sequence, head, i, count, features);
    queries.make({features, padded<A>(call.dim)}, count);
    upstream.make(sequence.query<T>(back.grad_out, head, i), back.grad_out.row, count);
    triangle_scores<A, F>(queries.along, keys.keys.across, call.dim, count, scores);
    triangle_scores<A, F>(upstream.along, keys.values.across, call.value_dim, count, slopes);
  }

  // Row r of slopes becomes that of dP. (Beyond the diagonal they are zero.)
  void finish_slopes(int64_t r, A inverse, A of_total) const {
    using V = Vec<A>;
    A* row = slopes + r * chunk_rows;
    for (int64_t j = 0; j <= r; j += V::width) V::store(row + j, V::fma(V::load(row + j), V::set(inverse), V::set(of_total)));
    for (int64_t j = r + 1; j < padded<A>(r + 1); ++j) row[j] = A(0);
  }
};

template <class A, class T>
void causal_queries(const LinearAttentionBackward& back, int64_t begin, int64_t end, void* scratch) {
  using F = Form<A, T>;
  const LinearAttentionCall& call = back.call;
  const Shape<A> shape(call);
  const int64_t group = call.heads / call.kv_heads;
  const bool stream = rows_stream<T>(call, back.grad_q, call.dim);
  for (int64_t item = begin; item < end; ++item) {
    const Sequence sequence(call, item / call.segments);
    const Range range = Range::segment(call, sequence.len_k, item % call.segments);
    Buffers<A> buffers(scratch);
    // S is held across, [Dv][D]: nothing here reads its rows.
    const State<A> first(call, buffers), gradient(call, buffers);
    const StateAt<A> from = call.segments == 1 ? StateAt<A>::pair(call, call.first_s, call.first_z, sequence.pair)
                                               : StateAt<A>::segment(call, call.partial, item);
    first.load(call, from.s, from.z);
    A* across = buffers.rows(call.value_dim, call.dim);
    transpose_rows<A>(first.rows(call), call.dim, call.value_dim, across, shape.dim);
    const Totals<A> totals(call, first, buffers);
    Keys<A, T> keys(call, buffers, in_across | in_down, in_across | in_down);
    CausalQueries<A, T> at_hand(call, buffers);
    Forms<A, T> of_across(buffers, call.value_dim, call.dim, in_down), of_slopes(buffers, chunk_rows, chunk_rows, in_along),
        of_features(buffers, chunk_rows, call.dim, in_down);
    A* results = buffers.take(chunk_rows * shape.dim);
    NextChunk<A, T> following(call, sequence, &back.grad_out);
    for (int64_t i = range.begin; i < range.end; i += chunk_rows) {
      const int64_t count = least(chunk_rows, range.end - i), next = i + count, next_end = least(next + chunk_rows, range.end);
      keys.load(call, sequence, i, count, nullptr);
      of_across.make({across, shape.dim}, call.value_dim);
      for (int64_t head = sequence.h * group; head < (sequence.h + 1) * group; ++head) {
        const TotalsAt<A> kept(back, sequence, head);
        at_hand.load(back, sequence, head, i, count, keys);
        F::by_rows(at_hand.upstream.along, of_across.down, call.value_dim, count, shape.dim, false, results, shape.dim,
                   following.queries(head, i, count, next, next_end, call.value_dim, count, shape.dim));
        for (int64_t r = 0; r < count; ++r) {
          const A* row = at_hand.features + r * shape.dim;
          A* result = results + r * shape.dim;
          A inverse = A(1), of_total = A(0);
          if (totals.divides) {
            const int64_t seen = padded<A>(r + 1);
            const A* scores = at_hand.scores + r * chunk_rows;
            inverse = totals.inverse(dot<A>(row, totals.z, shape.dim) + row_sum(scores, seen));
            const A dots = dot<A>(row, result, shape.dim) + dot<A>(scores, at_hand.slopes + r * chunk_rows, seen);
            of_total = -dots * inverse * inverse;
            multiply_add_row(result, inverse, totals.z, of_total, shape.dim, result);
            at_hand.finish_slopes(r, inverse, of_total);
          }
          kept.inverse[i + r] = inverse;
          kept.gradient[i + r] = of_total;
        }
        of_slopes.make({at_hand.slopes, chunk_rows}, count);
        add_seen<A, F>(of_slopes.along, keys.keys.down, count, shape.dim, results, shape.dim);
        for (int64_t r = 0; r < count; ++r)
          store_gradient(call.feature_map, results + r * shape.dim, at_hand.features + r * shape.dim, call.dim, stream,
                         sequence.query<T>(back.grad_q, head, i + r));
        if (call.segments > 1) {
          if (totals.divides) {
            add_columns<A>(at_hand.features, shape.dim, count, kept.gradient + i, gradient.z);
            for (int64_t r = 0; r < count; ++r) scale_row(at_hand.features + r * shape.dim, shape.dim, kept.inverse[i + r]);
          }
          of_features.make({at_hand.features, shape.dim}, count);
          F::by_cols(of_features.down, at_hand.upstream.down, count, call.dim, shape.value_dim, gradient.s, shape.value_dim);
        }
      }
      F::by_cols(keys.values.down, keys.keys.down, count, call.value_dim, shape.dim, across, shape.dim,
                 following.keys(next, next_end, count, call.value_dim, shape.dim));
      add_columns<A>(keys.features, shape.dim, count, nullptr, first.z);
    }
    if (call.segments > 1) {
      const StateAt<A> to = StateAt<A>::segment(call, back.partial, item);
      gradient.store(call, to.s, to.z);
    }
  }
  if (stream) stream_fence();
}

template <class A, class T>
void causal_keys(const LinearAttentionBackward& back, int64_t begin, int64_t end, void* scratch) {
  using F = Form<A, T>;
  const LinearAttentionCall& call = back.call;
  const Shape<A> shape(call);
  const int64_t group = call.heads / call.kv_heads;
  const KeyGradients<A, T> gradients(back);
  for (int64_t item = begin; item < end; ++item) {
    const Sequence sequence(call, item / call.segments);
    const Range range = Range::segment(call, sequence.len_k, item % call.segments);
    Buffers<A> buffers(scratch);
    const State<A> gradient(call, buffers);
    const StateAt<A> from = call.segments == 1 ? StateAt<A>::pair(call, back.upstream_s, back.upstream_z, sequence.pair)
                                               : StateAt<A>::segment(call, back.partial, item);
    gradient.load(call, from.s, from.z);
    Keys<A, T> keys(call, buffers, in_across | in_along, in_across | in_along);
    CausalQueries<A, T> at_hand(call, buffers);
    Forms<A, T> of_gradient(buffers, call.dim, call.value_dim, in_across | in_down), of_features(buffers, chunk_rows, call.dim, in_down),
        of_scores(buffers, chunk_rows, chunk_rows, in_down), of_slopes(buffers, chunk_rows, chunk_rows, in_down);
    A* of_keys = buffers.take(chunk_rows * shape.dim);
    A* of_values = buffers.take(chunk_rows * shape.value_dim);
    const int64_t chunks = ceil_div(range.end - range.begin, chunk_rows);
    NextChunk<A, T> following(call, sequence, &back.grad_out);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t i = range.begin + chunk * chunk_rows, count = least(chunk_rows, range.end - i), next = most(i - chunk_rows, range.begin);
      keys.load(call, sequence, i, count, nullptr);
      of_gradient.make(gradient.rows(call), call.dim);
      fill_rows(gradient.z, shape.dim, count, of_keys);
      F::by_rows(keys.values.along, of_gradient.across, call.value_dim, count, shape.dim, true, of_keys, shape.dim,
                 following.keys(next, i, call.value_dim, count, shape.dim));
      F::by_rows(keys.keys.along, of_gradient.down, call.dim, count, shape.value_dim, false, of_values, shape.value_dim);
      for (int64_t head = sequence.h * group; head < (sequence.h + 1) * group; ++head) {
        const TotalsAt<A> kept(back, sequence, head);
        at_hand.load(back, sequence, head, i, count, keys);
        for (int64_t r = 0; call.normalize && r < count; ++r) {
          at_hand.finish_slopes(r, kept.inverse[i + r], kept.gradient[i + r]);
          scale_row(at_hand.scores + r * chunk_rows, padded<A>(r + 1), kept.inverse[i + r]);
        }
        of_slopes.make({at_hand.slopes, chunk_rows}, count);
        of_scores.make({at_hand.scores, chunk_rows}, count);
        of_features.make({at_hand.features, shape.dim}, count);
        add_seeing<A, F>(of_slopes.down, of_features.down, count, shape.dim, of_keys, shape.dim);
        add_seeing<A, F>(of_scores.down, at_hand.upstream.down, count, shape.value_dim, of_values, shape.value_dim);
        if (call.normalize) {
          add_columns<A>(at_hand.features, shape.dim, count, kept.gradient + i, gradient.z);
          for (int64_t r = 0; r < count; ++r) scale_row(at_hand.features + r * shape.dim, shape.dim, kept.inverse[i + r]);
          of_features.make({at_hand.features, shape.dim}, count);
        }
        F::by_cols(of_features.down, at_hand.upstream.down, count, call.dim, shape.value_dim, gradient.s, shape.value_dim,
                   following.queries(head, i, count, next, i, count, call.dim, shape.value_dim));
      }
      gradients.store(sequence, i, count, of_keys, keys.features, of_values);
    }
    if (call.segments == 1) {
      const StateAt<A> to = StateAt<A>::pair(call, back.grad_s, back.grad_z, sequence.pair);
      gradient.store(call, to.s, to.z);
    }
  }
}

}  // namespace

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
const LinearAttentionBackwardTier linear_attention_backward_kernels = {
    {{},
     {queries<float, bfloat16>, keys<float, bfloat16>, causal_queries<float, bfloat16>, causal_keys<float, bfloat16>},
     {},
     {}}};
#else
const LinearAttentionBackwardTier linear_attention_backward_kernels = {{
    {queries<float, float>, keys<float, float>, causal_queries<float, float>, causal_keys<float, float>},
    {queries<float, bfloat16>, keys<float, bfloat16>, causal_queries<float, bfloat16>, causal_keys<float, bfloat16>},
    {queries<float, float16>, keys<float, float16>, causal_queries<float, float16>, causal_keys<float, float16>},
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {queries<double, double>, keys<double, double>, causal_queries<double, double>, causal_keys<double, double>},
#else
    {},
#endif
}};
#endif

}  // namespace mmk::MMK_TIER
