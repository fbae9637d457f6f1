// Linear attention, forward: sums over keys, what queries make of them, and both in turn for causal attention.
#include "linear_attention_parts.h"

namespace mmk::MMK_TIER {
namespace {

template <class A, class T>
void sums(const LinearAttentionCall& call, int64_t begin, int64_t end, void* scratch) {
  const Shape<A> shape(call);
  NextRows<A> following(most(call.dim, call.value_dim) * static_cast<int64_t>(sizeof(T)));
  for (int64_t item = begin; item < end; ++item) {
    const Sequence sequence(call, item / call.segments);
    const Range range = Range::segment(call, sequence.len_k, item % call.segments);
    Buffers<A> buffers(scratch);
    const State<A> state(call, buffers);
    if (call.segments == 1) {
      const StateAt<A> first = StateAt<A>::pair(call, call.first_s, call.first_z, sequence.pair);
      state.load(call, first.s, first.z);
    }
    Keys<A, T> keys(call, buffers, in_down, in_down);
    const A* shift = key_shift<A, T>(call, sequence, buffers);
    for (int64_t j = range.begin; j < range.end; j += chunk_rows) {
      const int64_t count = least(chunk_rows, range.end - j);
      keys.load(call, sequence, j, count, shift);
      Ahead* ahead = following.look(j + count, least(j + count + chunk_rows, range.end), 2, count, call.dim, shape.value_dim,
                                    [&](int64_t which, int64_t i) { return sequence.key<T>(which == 0 ? call.k : call.v, i); });
      keys.add_to(call, count, state, ahead);
    }
    const StateAt<A> to = call.segments == 1 ? StateAt<A>::pair(call, call.final_s, call.final_z, sequence.pair)
                                             : StateAt<A>::segment(call, call.partial, item);
    state.store(call, to.s, to.z);
  }
}

template <class A, class T>
void queries(const LinearAttentionCall& call, int64_t begin, int64_t end, void* scratch) {
  const Shape<A> shape(call);
  const int64_t blocks = linear_attention_blocks(call.len_q), group = call.heads / call.kv_heads;
  const bool stream = rows_stream<T>(call, call.out, call.value_dim);
  NextRows<A> following(call.dim * static_cast<int64_t>(sizeof(T)));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks % call.heads;
    const Sequence sequence(call, item / blocks / call.heads * call.kv_heads + head / group);
    const Range range = Range::block(sequence.len_q, item % blocks);
    if (range.begin == range.end) continue;
    Buffers<A> buffers(scratch);
    const State<A> state(call, buffers);
    const StateAt<A> from = StateAt<A>::pair(call, call.final_s, call.final_z, sequence.pair);
    state.load(call, from.s, from.z);
    const Totals<A> totals(call, state, buffers);
    Forms<A, T> of_state(buffers, call.dim, call.value_dim, in_down), of_queries(buffers, query_rows, call.dim, in_along);
    of_state.make(state.rows(call), call.dim);
    A* features = buffers.rows(query_rows, call.dim);
    A* results = buffers.take(query_rows * shape.value_dim);
    A inverse[query_rows];
    for (int64_t i = range.begin; i < range.end; i += query_rows) {
      const int64_t count = least(query_rows, range.end - i);
      query_features<A, T>(call, sequence, head, i, count, features);
      of_queries.make({features, shape.dim}, count);
      if (totals.divides) row_dots<A>(features, shape.dim, count, totals.z, 0, inverse);
      for (int64_t r = 0; r < count; ++r) inverse[r] = totals.divides ? totals.inverse(inverse[r]) : A(1);
      Ahead* ahead = following.look(i + count, least(i + count + query_rows, range.end), 1, call.dim, count, shape.value_dim,
                                    [&](int64_t, int64_t next) { return sequence.query<T>(call.q, head, next); });
      Form<A, T>::by_rows(of_queries.along, of_state.down, call.dim, count, shape.value_dim, false, results, shape.value_dim, ahead);
      for (int64_t r = 0; r < count; ++r)
        store_row(results + r * shape.value_dim, call.value_dim, stream, sequence.query<T>(call.out, head, i + r), inverse[r]);
    }
  }
  if (stream) stream_fence();
}

template <class A, class T>
void causal(const LinearAttentionCall& call, int64_t begin, int64_t end, void* scratch) {
  using F = Form<A, T>;
  const Shape<A> shape(call);
  const int64_t group = call.heads / call.kv_heads;
  const bool stream = rows_stream<T>(call, call.out, call.value_dim);
  for (int64_t item = begin; item < end; ++item) {
    const Sequence sequence(call, item / call.segments);
    const Range range = Range::segment(call, sequence.len_k, item % call.segments);
    Buffers<A> buffers(scratch);
    const State<A> state(call, buffers);
    const StateAt<A> from = call.segments == 1 ? StateAt<A>::pair(call, call.first_s, call.first_z, sequence.pair)
                                               : StateAt<A>::segment(call, call.partial, item);
    state.load(call, from.s, from.z);
    const Totals<A> totals(call, state, buffers);
    Keys<A, T> keys(call, buffers, in_across | in_down, in_down);
    Forms<A, T> of_state(buffers, call.dim, call.value_dim, in_down), of_queries(buffers, chunk_rows, call.dim, in_along),
        of_scores(buffers, chunk_rows, chunk_rows, in_along);
    A* features = buffers.rows(chunk_rows, call.dim);
    A* results = buffers.take(chunk_rows * shape.value_dim);
    A* scores = buffers.take(chunk_rows * chunk_rows);
    A inverse[chunk_rows];
    NextChunk<A, T> following(call, sequence, nullptr);
    for (int64_t i = range.begin; i < range.end; i += chunk_rows) {
      const int64_t count = least(chunk_rows, range.end - i), next = i + count, next_end = least(next + chunk_rows, range.end);
      keys.load(call, sequence, i, count, nullptr);
      of_state.make(state.rows(call), call.dim);
      for (int64_t head = sequence.h * group; head < (sequence.h + 1) * group; ++head) {
        query_features<A, T>(call, sequence, head, i, count, features);
        of_queries.make({features, shape.dim}, count);
        triangle_scores<A, F>(of_queries.along, keys.keys.across, call.dim, count, scores);
        of_scores.make({scores, chunk_rows}, count);
        if (totals.divides) row_dots<A>(features, shape.dim, count, totals.z, 0, inverse);
        for (int64_t r = 0; r < count; ++r)
          inverse[r] = totals.divides ? totals.inverse(inverse[r] + row_sum(scores + r * chunk_rows, padded<A>(r + 1))) : A(1);
        F::by_rows(of_queries.along, of_state.down, call.dim, count, shape.value_dim, false, results, shape.value_dim,
                   following.queries(head, i, count, next, next_end, call.dim, count, shape.value_dim));
        add_seen<A, F>(of_scores.along, keys.values.down, count, shape.value_dim, results, shape.value_dim);
        for (int64_t r = 0; r < count; ++r)
          store_row(results + r * shape.value_dim, call.value_dim, stream, sequence.query<T>(call.out, head, i + r), inverse[r]);
      }
      keys.add_to(call, count, state, following.keys(next, next_end, count, call.dim, shape.value_dim));
    }
    if (call.segments == 1) {
      const StateAt<A> to = StateAt<A>::pair(call, call.final_s, call.final_z, sequence.pair);
      state.store(call, to.s, to.z);
    }
  }
  if (stream) stream_fence();
}

}  // namespace

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16
const LinearAttentionTier linear_attention_kernels = {
    {{}, {sums<float, bfloat16>, queries<float, bfloat16>, causal<float, bfloat16>}, {}, {}}};
#else
const LinearAttentionTier linear_attention_kernels = {{
    {sums<float, float>, queries<float, float>, causal<float, float>},
    {sums<float, bfloat16>, queries<float, bfloat16>, causal<float, bfloat16>},
    {sums<float, float16>, queries<float, float16>, causal<float, float16>},
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {sums<double, double>, queries<double, double>, causal<double, double>},
#else
    {},
#endif
}};
#endif

}  // namespace mmk::MMK_TIER
