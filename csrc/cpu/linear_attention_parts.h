// What the kernels of linear attention are made of: sequences, features, states, products. Included by *.tier.cpp only, in the
// tier's own unnamed namespace as vec.h is.
//
// Rows at hand are accumulators, each padded with zeros to whole vectors: D to `Shape::dim`, Dv to `Shape::value_dim`.
#pragma once
#include "core/math.h"
#include "linear_attention.h"
#include "linear_attention_forms.h"

namespace mmk::MMK_TIER {
namespace {

inline constexpr int64_t chunk_rows = linear_attention_chunk;

// Rows of queries at hand where the state and their results share the first-level cache with them: a multiple of the rows of a
// block of accumulators.
#if MMK_TIER_ID(MMK_TIER) >= MMK_TIER_IS_avx512
inline constexpr int64_t query_rows = 56;
#else
inline constexpr int64_t query_rows = 48;
#endif
static_assert(query_rows <= chunk_rows);

// One sequence and head of k, and where its rows begin.
struct Sequence {
  int64_t b, h, pair, first_q, first_k, len_q, len_k;

  Sequence(const LinearAttentionCall& call, int64_t index) : b(index / call.kv_heads), h(index % call.kv_heads), pair(index) {
    first_q = call.cu_q ? call.cu_q[b] : 0;
    first_k = call.cu_k ? call.cu_k[b] : 0;
    len_q = call.cu_q ? call.cu_q[b + 1] - first_q : call.len_q;
    len_k = call.cu_k ? call.cu_k[b + 1] - first_k : call.len_k;
  }

  template <class T>
  T* query(const AttentionOperand& operand, int64_t head, int64_t i) const {
    return at<T>(operand, head, first_q + i);
  }
  template <class T>
  T* key(const AttentionOperand& operand, int64_t j) const {
    return at<T>(operand, h, first_k + j);
  }
  bool counts(const LinearAttentionCall& call, int64_t j) const {
    return call.mask == nullptr || call.mask[b * call.mask_batch + (first_k + j) * call.mask_row] != 0;
  }

 private:
  template <class T>
  T* at(const AttentionOperand& operand, int64_t head, int64_t token) const {
    return const_cast<T*>(static_cast<const T*>(operand.data)) + b * operand.batch + head * operand.head + token * operand.row;
  }
};

// The rows [begin, end) of an item: segment `index` of a sequence's, none where it has fewer.
struct Range {
  int64_t begin, end;

  static Range segment(const LinearAttentionCall& call, int64_t length, int64_t index) {
    if (linear_attention_segments(call, length) == 1) return {0, index == 0 ? length : 0};
    return {least(index * linear_attention_segment, length), least((index + 1) * linear_attention_segment, length)};
  }
  static Range block(int64_t length, int64_t index) {
    return {least(index * linear_attention_block, length), least((index + 1) * linear_attention_block, length)};
  }
};

template <class A>
struct Shape {
  int64_t dim, value_dim;  // padded

  explicit Shape(const LinearAttentionCall& call) : dim(padded<A>(call.dim)), value_dim(padded<A>(call.value_dim)) {}
};

// Buffers cut from an item's scratch, each in cache lines of its own.
template <class A>
class Buffers {
 public:
  explicit Buffers(void* scratch) : next_(static_cast<A*>(scratch)) {}

  A* take(int64_t count) {
    A* buffer = next_;
    next_ += rounded_up(count, 64 / sizeof(A));
    return buffer;
  }
  A* zeros(int64_t count) {
    A* buffer = take(count);
    memset(buffer, 0, static_cast<size_t>(count) * sizeof(A));
    return buffer;
  }
  // Rows of `channels` elements, padded: the padding is zero and stays so.
  A* rows(int64_t count, int64_t channels) {
    const int64_t row = padded<A>(channels);
    return row == channels ? take(count * row) : zeros(count * row);
  }

 private:
  A* next_;
};

// --- features -----------------------------------------------------------------------------------------------------------
// Of softmax: exp(x), where what x is shifted by is the caller's business.
template <FeatureMap map, class A>
inline typename Vec<A>::Register feature(typename Vec<A>::Register x) {
  using V = Vec<A>;
  if constexpr (map == FeatureMap::relu) {
    return V::max(V::zero(), x);
  } else if constexpr (map == FeatureMap::elu1) {
    return V::select(V::less_equal(x, V::zero()), quick_exp_of_negative<A>(x), x + V::set(A(1)));  // above 0 not looked at
  } else if constexpr (map == FeatureMap::softmax) {
    return exp_of_negative<A>(x);
  } else {
    return x;
  }
}

// d feature(x) / dx, by the feature.
template <FeatureMap map, class A>
inline typename Vec<A>::Register slope(typename Vec<A>::Register value) {
  using V = Vec<A>;
  if constexpr (map == FeatureMap::relu) {
    return V::select(V::less_equal(value, V::zero()), V::zero(), V::set(A(1)));
  } else if constexpr (map == FeatureMap::elu1) {
    return V::min(V::set(A(1)), value);
  } else if constexpr (map == FeatureMap::softmax) {
    return value;
  } else {
    return V::set(A(1));
  }
}

// Calls f with the feature map as a constant.
template <class F>
inline void with_map(FeatureMap map, const F& f) {
  switch (map) {
    case FeatureMap::identity:
      return f.template operator()<FeatureMap::identity>();
    case FeatureMap::relu:
      return f.template operator()<FeatureMap::relu>();
    case FeatureMap::elu1:
      return f.template operator()<FeatureMap::elu1>();
    case FeatureMap::softmax:
      return f.template operator()<FeatureMap::softmax>();
  }
}

template <class A, class T>
inline A largest_of(const T* row, int64_t channels) {
  A top = static_cast<A>(widen(row[0]));
  for (int64_t i = 1; i < channels; ++i) {
    const A value = static_cast<A>(widen(row[i]));
    top = value > top ? value : top;
  }
  return top;
}

// `count` rows of features of the queries from i on.
template <class A, class T>
inline void query_features(const LinearAttentionCall& call, const Sequence& sequence, int64_t head, int64_t i, int64_t count, A* to) {
  const int64_t row = padded<A>(call.dim);
  with_map(call.feature_map, [&]<FeatureMap map>() {
    for (int64_t r = 0; r < count; ++r, to += row) {
      const T* x = sequence.query<T>(call.q, head, i + r);
      typename Vec<A>::Register shift = Vec<A>::zero();
      if constexpr (map == FeatureMap::softmax) shift = Vec<A>::set(largest_of<A>(x, call.dim));
      for_each_vector<A>(call.dim, [&](int64_t d, int64_t lanes) {
        const typename Vec<A>::Register value = load_lanes<A>(x + d, lanes);
        store_lanes<A>(to + d, feature<map, A>(map == FeatureMap::softmax ? value - shift : value), lanes);
      });
    }
  });
}

// The same of keys from j on; `shift` [D] is that of softmax. Keys that do not count have features of 0.
template <class A, class T>
inline void key_features(const LinearAttentionCall& call, const Sequence& sequence, int64_t j, int64_t count, const A* shift, A* to) {
  const int64_t row = padded<A>(call.dim);
  with_map(call.feature_map, [&]<FeatureMap map>() {
    for (int64_t r = 0; r < count; ++r, to += row) {
      if (!sequence.counts(call, j + r)) {
        memset(to, 0, static_cast<size_t>(row) * sizeof(A));
        continue;
      }
      const T* x = sequence.key<T>(call.k, j + r);
      for_each_vector<A>(call.dim, [&](int64_t d, int64_t lanes) {
        typename Vec<A>::Register value = load_lanes<A>(x + d, lanes);
        if constexpr (map == FeatureMap::softmax) value = value - Vec<A>::load(shift + d);
        store_lanes<A>(to + d, feature<map, A>(value), lanes);
      });
    }
  });
}

// What softmax shifts keys by: the largest of each channel, of those that count. Null for other maps.
template <class A, class T>
inline const A* key_shift(const LinearAttentionCall& call, const Sequence& sequence, Buffers<A>& buffers) {
  if (call.feature_map != FeatureMap::softmax) return nullptr;
  A* top = buffers.take(padded<A>(call.dim));
  for (int64_t d = 0; d < padded<A>(call.dim); ++d) top[d] = A(-__builtin_inf());
  for (int64_t j = 0; j < sequence.len_k; ++j) {
    if (!sequence.counts(call, j)) continue;
    const T* x = sequence.key<T>(call.k, j);
    for_each_vector<A>(call.dim, [&](int64_t d, int64_t lanes) {
      store_lanes<A>(top + d, Vec<A>::max(load_lanes<A>(top + d, lanes), load_lanes<A>(x + d, lanes)), lanes);
    });
  }
  return top;
}

// --- rows ---------------------------------------------------------------------------------------------------------------
// Rows of values or of gradients: where they lie, if they lie as the products read them, else copied to `to`.
template <class A, class T>
inline Staged<A> stage(const T* from, int64_t stride, int64_t count, int64_t channels, A* to) {
  const int64_t row = padded<A>(channels);
  if constexpr (sizeof(T) == sizeof(A)) {
    if (stride == channels && row == channels) return {from, row};
  }
  for (int64_t r = 0; r < count; ++r)
    for_each_vector<A>(channels, [&](int64_t c, int64_t lanes) {
      store_lanes<A>(to + r * row + c, load_lanes<A>(from + r * stride + c, lanes), lanes);
    });
  return {to, row};
}

// sums[c] += the sum of weights[r] * rows[r][c], without weights that of the rows. In four chains: one would wait for itself.
template <class A>
inline void add_columns(const A* rows, int64_t row, int64_t count, const A* weights, A* sums) {
  using V = Vec<A>;
  using Register = typename V::Register;
  for (int64_t c = 0; c < row; c += V::width) {
    Register chains[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto add = [&](Register& chain, int64_t r) {
      const Register value = V::load(rows + r * row + c);
      chain = weights ? V::fma(value, V::set(weights[r]), chain) : chain + value;
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4)
      for (int64_t i = 0; i < 4; ++i) add(chains[i], r + i);
    for (; r < count; ++r) add(chains[0], r);
    V::store(sums + c, V::load(sums + c) + ((chains[0] + chains[1]) + (chains[2] + chains[3])));
  }
}

template <class A>
inline A row_sum(const A* row, int64_t count) {
  return sum_over<A>(count, [&](typename Vec<A>::Register sum, int64_t i, int64_t) { return sum + Vec<A>::load(row + i); });
}

// dots[r] = rows_r . others_r; others `other_row` apart, 0: all the same.
template <class A>
inline void row_dots(const A* rows, int64_t row, int64_t count, const A* others, int64_t other_row, A* dots) {
  using V = Vec<A>;
  for (int64_t r = 0; r < count; r += V::width) {
    const int64_t left = least(V::width, count - r);
    typename V::Register sums[V::width];
#pragma GCC unroll 16
    for (int64_t i = 0; i < V::width; ++i) sums[i] = V::zero();
    for (int64_t c = 0; c < row; c += V::width) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::width; ++i) {
        const int64_t at = r + least(i, left - 1);
        sums[i] = V::fma(V::load(rows + at * row + c), V::load(others + at * other_row + c), sums[i]);
      }
    }
    store_lanes<A>(dots + r, V::sums(sums), left);
  }
}

template <class A>
inline void scale_row(A* row, int64_t count, A factor) {
  for (int64_t i = 0; i < count; i += Vec<A>::width) Vec<A>::store(row + i, Vec<A>::load(row + i) * Vec<A>::set(factor));
}

// Gradients of features as those of what they were made from.
template <class A, class T>
inline void store_gradient(FeatureMap map, const A* gradients, const A* features, int64_t channels, bool stream, T* to) {
  with_map(map, [&]<FeatureMap constant>() {
    const auto value = [&](int64_t c) { return Vec<A>::load(gradients + c) * slope<constant, A>(Vec<A>::load(features + c)); };
    if (stream) {
      for (int64_t c = 0; c < channels; c += Vec<A>::width) Vec<A>::stream(to + c, value(c));
    } else {
      for_each_vector<A>(channels, [&](int64_t c, int64_t lanes) { store_lanes<A>(to + c, value(c), lanes); });
    }
  });
}

// --- forms of rows --------------------------------------------------------------------------------------------------------
// Rows at hand in the forms that the products want of them.
inline constexpr int in_along = 1, in_down = 2, in_across = 4;

template <class A, class T>
class Forms {
 public:
  using F = Form<A, T>;
  typename F::Operand along{}, down{}, across{};

  // Of accumulators.
  Forms(Buffers<A>& buffers, int64_t rows, int64_t channels, int which)
      : rows_(rows), channels_(channels), which_(which) {
    if (which & (in_along | in_across)) along_ = buffers.take(F::room(rows, channels));
    if (which & in_down) down_ = buffers.take(F::room(rows, channels));
    if (which & in_across) across_ = buffers.take(F::room_across(channels, rows));
  }
  // Of rows as they come.
  static Forms of_rows(Buffers<A>& buffers, int64_t rows, int64_t channels, int which) {
    Forms forms(buffers, rows, channels, which);
    if (!F::keeps) forms.copied_ = buffers.rows(rows, channels);
    return forms;
  }

  void make(Staged<A> rows, int64_t count) {
    if (which_ & (in_along | in_across)) along = F::along(rows, count, channels_, along_);
    if (which_ & in_down) down = F::down(rows, count, channels_, down_);
    if (which_ & in_across) across = F::across(along, count, channels_, rows_, across_);
  }
  void make(const T* rows, int64_t stride, int64_t count) {
    if constexpr (F::keeps) {
      if (which_ & (in_along | in_across)) along = F::along(rows, stride, count, channels_, along_);
      if (which_ & in_down) down = F::down(rows, stride, count, channels_, down_);
      if (which_ & in_across) across = F::across(along, count, channels_, rows_, across_);
    } else {
      make(stage<A, T>(rows, stride, count, channels_, copied_), count);
    }
  }

 private:
  int64_t rows_, channels_;
  int which_;
  A *along_ = nullptr, *down_ = nullptr, *across_ = nullptr, *copied_ = nullptr;
};

// Rows that a triangle is cut into: a block of rows i takes all columns up to the block's last.
template <class A>
inline constexpr int64_t triangle_rows = 2 * Vec<A>::width;

// c [i][j] = a_i . b_j for j <= i and 0 for the other j of a block; a along, b across.
template <class A, class F>
inline void triangle_scores(typename F::Operand a, typename F::Operand b, int64_t depth, int64_t count, A* c) {
  for (int64_t i = 0; i < count; i += triangle_rows<A>) {
    const int64_t end = least(i + triangle_rows<A>, count), cols = padded<A>(end);
    F::by_rows(F::from(a, i), b, depth, end - i, cols, false, c + i * chunk_rows, chunk_rows);
    for (int64_t r = i; r < end; ++r)
      for (int64_t j = r + 1; j < cols; ++j) c[r * chunk_rows + j] = A(0);
  }
}

// c_i += the sum over j <= i of scores_ij b_j; scores along, b down.
template <class A, class F>
inline void add_seen(typename F::Operand scores, typename F::Operand b, int64_t count, int64_t cols, A* c, int64_t c_row) {
  for (int64_t i = 0; i < count; i += triangle_rows<A>) {
    const int64_t end = least(i + triangle_rows<A>, count);
    F::by_rows(F::from(scores, i), b, end, end - i, cols, true, c + i * c_row, c_row);
  }
}

// c_j += the sum over i >= j of scores_ij b_i; both down.
template <class A, class F>
inline void add_seeing(typename F::Operand scores, typename F::Operand b, int64_t count, int64_t cols, A* c, int64_t c_row) {
  for (int64_t j = 0; j < count; j += triangle_rows<A>) {
    const int64_t rows = least(triangle_rows<A>, count - j);
    F::by_cols(F::from(scores, j, j), F::from(b, j, 0), count - j, rows, cols, c + j * c_row, c_row);
  }
}

// What is read next: the rows [begin, end) of two operands, or of one, while a product of `depth` steps and `rows` x `cols` results
// is made.
template <class A>
class NextRows {
 public:
  explicit NextRows(int64_t bytes) {
    ahead_.rows = rows_;
    ahead_.bytes = bytes;
  }
  template <class F>
  Ahead* look(int64_t begin, int64_t end, int64_t operands, int64_t depth, int64_t rows, int64_t cols, const F& row) {
    ahead_.count = ahead_.next = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t operand = 0; operand < operands; ++operand) ahead_.add(row(operand, i));
    ahead_.spread(looks_of(rows, depth) * ceil_div(cols, 2 * Vec<A>::width));
    return &ahead_;
  }

 private:
  const void* rows_[2 * chunk_rows];
  Ahead ahead_;
};

// What the chunks of causal attention read after the one at hand: the keys and values of the chunk [begin, end), and the queries (and
// upstream gradients) of the head that comes next.
template <class A, class T>
class NextChunk {
 public:
  NextChunk(const LinearAttentionCall& call, const Sequence& sequence, const AttentionOperand* grad_out)
      : call_(call), sequence_(sequence), grad_out_(grad_out), rows_(most(call.dim, call.value_dim) * static_cast<int64_t>(sizeof(T))) {}

  Ahead* keys(int64_t begin, int64_t end, int64_t depth, int64_t rows, int64_t cols) {
    return rows_.look(begin, end, 2, depth, rows, cols,
                      [&](int64_t which, int64_t j) { return sequence_.template key<T>(which == 0 ? call_.k : call_.v, j); });
  }
  // Of the rows [i, i + count) by the head after `head`; after the last one those of [begin, end) by the first.
  Ahead* queries(int64_t head, int64_t i, int64_t count, int64_t begin, int64_t end, int64_t depth, int64_t rows, int64_t cols) {
    const int64_t group = call_.heads / call_.kv_heads;
    const bool is_last = (head + 1) % group == 0;
    const int64_t next = is_last ? head + 1 - group : head + 1;
    return rows_.look(is_last ? begin : i, is_last ? end : i + count, grad_out_ ? 2 : 1, depth, rows, cols,
                      [&](int64_t which, int64_t row) { return sequence_.template query<T>(which == 0 ? call_.q : *grad_out_, next, row); });
  }

 private:
  const LinearAttentionCall& call_;
  const Sequence& sequence_;
  const AttentionOperand* grad_out_;
  NextRows<A> rows_;
};

// --- states -------------------------------------------------------------------------------------------------------------
// The state of a pair at hand: S [D][padded Dv], z [padded D].
template <class A>
struct State {
  A* s;
  A* z;

  State(const LinearAttentionCall& call, Buffers<A>& buffers)
      : s(buffers.zeros(padded<A>(call.dim) * padded<A>(call.value_dim))), z(buffers.zeros(padded<A>(call.dim))) {}

  Staged<A> rows(const LinearAttentionCall& call) const { return {s, padded<A>(call.value_dim)}; }

  // From S [D, Dv] and z [D]; null is zero.
  void load(const LinearAttentionCall& call, const A* of_s, const A* of_z) const {
    if (of_z == nullptr) return;
    for (int64_t d = 0; d < call.dim; ++d)
      memcpy(s + d * padded<A>(call.value_dim), of_s + d * call.value_dim, static_cast<size_t>(call.value_dim) * sizeof(A));
    memcpy(z, of_z, static_cast<size_t>(call.dim) * sizeof(A));
  }
  void store(const LinearAttentionCall& call, A* of_s, A* of_z) const {
    for (int64_t d = 0; d < call.dim; ++d)
      memcpy(of_s + d * call.value_dim, s + d * padded<A>(call.value_dim), static_cast<size_t>(call.value_dim) * sizeof(A));
    memcpy(of_z, z, static_cast<size_t>(call.dim) * sizeof(A));
  }
};

// What queries are divided by.
template <class A>
struct Totals {
  bool divides;
  const A* z;  // a query's total is its features . z (and, in causal attention, its scores)
  A eps;

  // Of softmax, a query's features themselves.
  Totals(const LinearAttentionCall& call, const State<A>& state, Buffers<A>& buffers)
      : divides(call.normalize || call.feature_map == FeatureMap::softmax), z(state.z), eps(static_cast<A>(call.eps)) {
    if (call.feature_map != FeatureMap::softmax) return;
    A* ones = buffers.take(padded<A>(call.dim));
    for (int64_t d = 0; d < padded<A>(call.dim); ++d) ones[d] = A(1);
    z = ones;
    eps = A(0);
  }
  A inverse(A total) const { return A(1) / (total + eps); }
};

// Where a pair has its state in [pairs, D, Dv] and [pairs, D], null where there is none, and a segment of it in a call's
// partial sums.
template <class A>
struct StateAt {
  A* s;
  A* z;

  static StateAt pair(const LinearAttentionCall& call, const void* of_s, const void* of_z, int64_t index) {
    if (of_z == nullptr) return {nullptr, nullptr};  // S may be empty
    A* s = static_cast<A*>(const_cast<void*>(of_s));
    return {s + index * call.dim * call.value_dim, static_cast<A*>(const_cast<void*>(of_z)) + index * call.dim};
  }
  static StateAt segment(const LinearAttentionCall& call, void* partial, int64_t item) {
    A* s = static_cast<A*>(partial) + item * call.dim * (call.value_dim + 1);
    return {s, s + call.dim * call.value_dim};
  }
};

// The keys of a chunk: features and values.
template <class A, class T>
struct Keys {
  using F = Form<A, T>;
  A* features;
  Forms<A, T> keys, values;

  Keys(const LinearAttentionCall& call, Buffers<A>& buffers, int of_keys, int of_values)
      : features(buffers.rows(chunk_rows, call.dim)),
        keys(buffers, chunk_rows, call.dim, of_keys),
        values(Forms<A, T>::of_rows(buffers, chunk_rows, call.value_dim, of_values)) {}

  void load(const LinearAttentionCall& call, const Sequence& sequence, int64_t j, int64_t count, const A* shift) {
    key_features<A, T>(call, sequence, j, count, shift, features);
    keys.make({features, padded<A>(call.dim)}, count);
    values.make(sequence.key<T>(call.v, j), call.v.row, count);
  }

  // S += features^T values, z += the features.
  void add_to(const LinearAttentionCall& call, int64_t count, const State<A>& state, Ahead* ahead = nullptr) const {
    F::by_cols(keys.down, values.down, count, call.dim, padded<A>(call.value_dim), state.s, padded<A>(call.value_dim), ahead);
    add_columns<A>(features, padded<A>(call.dim), count, nullptr, state.z);
  }
};

}  // namespace
}  // namespace mmk::MMK_TIER
