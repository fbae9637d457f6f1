// Attention of one tier over sequences of at most 16 queries, forward and backward: the words of a patch, the frames of a
// token. A vector's lanes are batch entries, each with a whole problem of its own, so that nothing is padded to a panel and
// every load and store of a model's rows is a full one. Elements come out with the same bits as from the other kernels.
#include "attention_pair.h"
#include "attention_scores.h"

namespace mmk::MMK_TIER {
namespace {

// c[i][n] = sum over ascending k of a[i][k] b[n][k], lane by lane; strides in elements.
template <class A>
struct EachProduct {
  const A* a;
  int64_t a_row, a_step;
  const A* b;
  int64_t b_row, b_step;
  int64_t depth;
  A* c;
  int64_t c_row, c_col;
};

inline constexpr int each_rows = 4, each_cols = 3;

template <int rows, int cols, class A>
inline void multiply_each_block(const EachProduct<A>& p, const A* a, const A* b, A* c) {
  using V = Vec<A>;
  typename V::Register sums[rows][cols];
  for (auto& row : sums)
    for (auto& sum : row) sum = V::zero();
  for (int64_t k = 0; k < p.depth; ++k) {
    typename V::Register right[cols];
#pragma GCC unroll 4
    for (int n = 0; n < cols; ++n) right[n] = V::load(b + n * p.b_row + k * p.b_step);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const typename V::Register left = V::load(a + i * p.a_row + k * p.a_step);
#pragma GCC unroll 4
      for (int n = 0; n < cols; ++n) sums[i][n] = V::fma(left, right[n], sums[i][n]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < cols; ++n) V::store(c + i * p.c_row + n * p.c_col, sums[i][n]);
}

template <int rows, class A>
inline void multiply_each_rows(const EachProduct<A>& p, int64_t row, int64_t cols) {
  const A* a = p.a + row * p.a_row;
  A* c = p.c + row * p.c_row;
  int64_t n = 0;
  for (; n + each_cols <= cols; n += each_cols) multiply_each_block<rows, each_cols>(p, a, p.b + n * p.b_row, c + n * p.c_col);
  for (; n < cols; ++n) multiply_each_block<rows, 1>(p, a, p.b + n * p.b_row, c + n * p.c_col);
}

template <class A>
inline void multiply_each(const EachProduct<A>& p, int64_t rows, int64_t cols) {
  int64_t row = 0;
  for (; row + each_rows <= rows; row += each_rows) multiply_each_rows<each_rows>(p, row, cols);
  for (; row < rows; ++row) multiply_each_rows<1>(p, row, cols);
}

// As many heads as fill whole vectors of a token's output, which has them side by side; fewer, if those are too many to divide
// a call's heads or to lie in the first-level cache.
template <class A>
int64_t heads_together(const AttentionCall& call) {
  constexpr int64_t most_channels = 64;
  int64_t heads = 1;
  const auto whole = [&](int64_t channels) { return heads * channels % Vec<A>::width == 0; };
  while (!(whole(call.dim) && whole(call.value_dim)) && call.heads % (2 * heads) == 0 &&
         2 * heads * most(call.dim, call.value_dim) <= most_channels)
    heads *= 2;
  return heads;
}

// The heads of an item in memory, as runs of contiguous elements; and in scratch, one vector of lanes an element, those of a
// run one after the other.
struct Runs {
  int64_t count, length;      // of runs, of one
  int64_t per_head;           // runs; of all heads, where those of a token lie side by side
  int64_t step, head;         // from run to run, from head to head, in memory
  int64_t token, head_there;  // from token to token, from head to head, in scratch, in vectors

  Runs() = default;
  Runs(const AttentionOperand& operand, int64_t heads, int64_t tokens, int64_t dim) {
    const bool side_by_side = heads == 1 || operand.head == dim;
    const int64_t channels = side_by_side ? heads * dim : dim;
    const bool one_run = operand.row == channels;  // token after token
    length = one_run ? tokens * channels : channels;
    per_head = one_run ? 1 : tokens;
    count = side_by_side ? per_head : heads * per_head;
    step = operand.row;
    head = operand.head;
    token = channels;
    head_there = side_by_side ? dim : tokens * dim;
  }
  int64_t vectors() const { return count * length; }
  // Where a run begins, from the first element of the first head.
  int64_t offset(int64_t run) const { return run / per_head * head + run % per_head * step; }
};

template <class T>
class Tiny {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  static constexpr int64_t width = V::width;

 public:
  Tiny(const AttentionCall& c, const AttentionBackward* b) : call(c), back(b), addends(c), together(heads_together<A>(c)) {
    int64_t end = 0;
    const auto take = [&](int64_t vectors) {
      const int64_t at = end;
      end += vectors * width;
      return at;
    };
    const auto part = [&](const AttentionOperand& operand, int64_t tokens, int64_t dim) {
      const Runs runs(operand, together, tokens, dim);
      return Part{operand, runs, take(runs.vectors())};
    };
    q = part(c.q, c.len_q, c.dim);
    k = part(c.k, c.len_k, c.dim);
    v = part(c.v, c.len_k, c.value_dim);
    out = part(back ? back->grad_out : c.out, c.len_q, c.value_dim);
    weights_at = take(c.len_q * c.len_k);
    added_at = take(ceil_div(c.len_q * c.len_k, width));
    if (back) {
      grad_q = part(back->grad_q, c.len_q, c.dim);
      grad_k = part(back->grad_k, c.len_k, c.dim);
      grad_v = part(back->grad_v, c.len_k, c.value_dim);
      grads_at = take(c.len_q * c.len_k);
    }
    elements = end;
  }

  int64_t items() const { return ceil_div(call.batch, width) * (call.heads / together); }
  int64_t bytes() const { return elements * static_cast<int64_t>(sizeof(A)); }

  void run(int64_t begin, int64_t end, void* scratch) {
    memory = static_cast<A*>(scratch);
    const int64_t groups = call.heads / together;
    for (int64_t item = begin; item < end; ++item) {
      place(item, groups);
      last = item + 1 == end;
      next_batch = (item + 1) / groups * width;
      next_head = (item + 1) % groups * together;
      load(q);
      load(k);
      load(v);
      if (back) load(out);
      const Register scale = V::set(static_cast<A>(call.scale));
      for (int64_t i = 0; i < q.runs.vectors(); ++i) {
        A* at = memory + q.at + i * width;
        V::store(at, V::load(at) * scale);
      }
      for (int64_t g = 0; g < together; ++g) {
        if (addends.any || call.window_left >= 0 || call.window_right >= 0) add_up(head + g);
        if (back) {
          run_backward(g);
        } else {
          run_forward(g);
        }
      }
      if (back) {
        store(grad_q);
        store(grad_k);
        store(grad_v);
      } else {
        store(out);
      }
    }
  }

 private:
  // An operand, and where its heads lie in scratch.
  struct Part {
    AttentionOperand operand;
    Runs runs;
    int64_t at;

    int64_t token() const { return runs.token * width; }
    int64_t of_head(int64_t g) const { return at + g * runs.head_there * width; }
  };

  void place(int64_t item, int64_t groups) {
    batch = item / groups * width;
    count = least(call.batch - batch, width);
    head = item % groups * together;
  }

  // A share of what the next item reads: it comes while this one computes.
  void prefetch(int64_t index, int64_t parts) const {
    if (last) return;
    const auto lines = [&](const Part& part) {
      const int64_t runs = least(call.batch - next_batch, width) * part.runs.count;
      const int64_t bytes = part.runs.length * static_cast<int64_t>(sizeof(T));
      for (int64_t i = runs * index / parts; i < runs * (index + 1) / parts; ++i) {
        const char* run = reinterpret_cast<const char*>(first_of(part, next_batch + i / part.runs.count, next_head) +
                                                        part.runs.offset(i % part.runs.count));
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(run + byte, 0, 2);
      }
    };
    lines(q);
    lines(k);
    lines(v);
    if (back) lines(out);
  }

  static T* first_of(const Part& part, int64_t entry, int64_t h) {
    const AttentionOperand& operand = part.operand;
    return const_cast<T*>(static_cast<const T*>(operand.data)) + entry * operand.batch + h * operand.head;
  }

  // The elements of all lanes; lanes that do not exist repeat the last.
  void load(const Part& part) {
    const T* first[width];
    for (int64_t lane = 0; lane < width; ++lane) first[lane] = first_of(part, batch + least(lane, count - 1), head);
    A* to = memory + part.at;
    for (int64_t run = 0; run < part.runs.count; ++run) {
      const int64_t offset = part.runs.offset(run);
      for_each_vector<A>(part.runs.length, [&](int64_t k, int64_t lanes) {
        Register square[width];
        for (int64_t lane = 0; lane < width; ++lane) square[lane] = load_lanes<A>(first[lane] + offset + k, lanes);
        V::transpose(square);
        for (int64_t i = 0; i < lanes; ++i) V::store(to + (k + i) * width, square[i]);
      });
      to += part.runs.length * width;
    }
  }

  void store(const Part& part) {
    const A* from = memory + part.at;
    for (int64_t run = 0; run < part.runs.count; ++run) {
      const int64_t offset = part.runs.offset(run);
      for_each_vector<A>(part.runs.length, [&](int64_t k, int64_t lanes) {
        Register square[width];
        for (int64_t i = 0; i < width; ++i) square[i] = i < lanes ? V::load(from + (k + i) * width) : V::zero();
        V::transpose(square);
        for (int64_t lane = 0; lane < count; ++lane)
          store_lanes<A>(first_of(part, batch + lane, head) + offset + k, square[lane], lanes);
      });
      from += part.runs.length * width;
    }
  }

  // What is added to a head's scores, the same for all lanes: bias, and -infinity where a key is not seen.
  void add_up(int64_t h) {
    const int64_t shift = call.bottom_right ? call.len_k - call.len_q : 0;
    for (int64_t i = 0; i < call.len_q; ++i)
      for (int64_t j = 0; j < call.len_k; ++j) {
        A value = A(0);
        if (call.bias.data)
          value = element_of<A>(call.bias.data, call.bias.number, h * call.bias.head + i * call.bias.row + j * call.bias.col);
        if (call.mask.data && !static_cast<const uint8_t*>(call.mask.data)[h * call.mask.head + i * call.mask.row + j * call.mask.col])
          value = static_cast<A>(minus_infinity);
        if (call.window_left >= 0 && j < i + shift - call.window_left) value = static_cast<A>(minus_infinity);
        if (call.window_right >= 0 && j > i + shift + call.window_right) value = static_cast<A>(minus_infinity);
        memory[added_at + i * call.len_k + j] = value;
      }
  }

  // scores[i][j] of one of the heads, in `weights`.
  void score(int64_t g) {
    multiply_each(EachProduct<A>{memory + q.of_head(g), q.token(), width, memory + k.of_head(g), k.token(), width, call.dim,
                                 memory + weights_at, call.len_k * width, width},
                  call.len_q, call.len_k);
    if (!addends.any && call.window_left < 0 && call.window_right < 0) return;
    for (int64_t i = 0; i < call.len_q * call.len_k; ++i) {
      A* at = memory + weights_at + i * width;
      V::store(at, V::load(at) + V::set(memory[added_at + i]));
    }
  }

  A* lse_of(int64_t lane, int64_t g, int64_t i) const {
    return static_cast<A*>(call.lse) + (batch + lane) * call.lse_batch + (head + g) * call.lse_head + i * call.lse_row;
  }

  void run_forward(int64_t g) {
    score(g);
    A factors[16 * width];
    for (int64_t i = 0; i < call.len_q; ++i) {
      prefetch(g * call.len_q + i, together * call.len_q);
      A* row = memory + weights_at + i * call.len_k * width;
      Register top = V::set(static_cast<A>(minus_infinity));
      for (int64_t j = 0; j < call.len_k; ++j) top = V::max(top, V::load(row + j * width));
      const Register from = V::select(V::less_equal(V::set(lowest<A>()), top), top, V::zero());
      Register chains[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      const auto weigh = [&](int64_t j, int chain) {
        const Register weight = exp_of_negative<A>(V::load(row + j * width) - from);
        chains[chain] = chains[chain] + weight;
        V::store(row + j * width, weight);
      };
      int64_t j = 0;
      for (; j + 4 <= call.len_k; j += 4)
        for (int chain = 0; chain < 4; ++chain) weigh(j + chain, chain);
      for (int chain = 0; chain < 3; ++chain)
        if (j + chain < call.len_k) weigh(j + chain, chain);
      A sums[width], tops[width];
      V::store(sums, (chains[0] + chains[1]) + (chains[2] + chains[3]));
      V::store(tops, from);
      for (int64_t lane = 0; lane < width; ++lane) tops[lane] += log_of_positive(sums[lane]);
      for (int64_t lane = 0; lane < width; ++lane) {
        const bool nothing = sums[lane] == A(0);
        factors[i * width + lane] = nothing ? A(0) : A(1) / sums[lane];
        if (nothing) tops[lane] = static_cast<A>(minus_infinity);
      }
      for (int64_t lane = 0; lane < count; ++lane) *lse_of(lane, g, i) = tops[lane];
    }
    A* to = memory + out.of_head(g);
    multiply_each(EachProduct<A>{memory + weights_at, call.len_k * width, width, memory + v.of_head(g), width, v.token(),
                                 call.len_k, to, out.token(), width},
                  call.len_q, call.value_dim);
    for (int64_t i = 0; i < call.len_q; ++i)
      for (int64_t c = 0; c < call.value_dim; ++c) {
        A* at = to + i * out.token() + c * width;
        V::store(at, V::load(at) * V::load(factors + i * width));
      }
  }

  void run_backward(int64_t g) {
    const int64_t pairs = call.len_k * width;
    A *weights = memory + weights_at, *grads = memory + grads_at;
    score(g);
    multiply_each(EachProduct<A>{memory + out.of_head(g), out.token(), width, memory + v.of_head(g), v.token(), width,
                                 call.value_dim, grads, pairs, width},
                  call.len_q, call.len_k);
    for (int64_t i = 0; i < call.len_q; ++i) {
      prefetch(g * call.len_q + i, together * call.len_q);
      A lse[width], centre[width];
      for (int64_t lane = 0; lane < width; ++lane) row_sums(least(lane, count - 1), g, i, lse[lane], centre[lane]);
      const Register sum = V::load(lse);
      Register chains[4] = {};
      for (int64_t j = 0; j < call.len_k; ++j) {
        const int64_t at = i * pairs + j * width, chain = j % 4;
        const Register w = exp_of_negative<A>(V::load(weights + at) - sum);
        chains[chain] = chains[chain] + w;
        V::store(weights + at, w);
      }
      const Register inverse = inverse_of_sum<A>((chains[0] + chains[1]) + (chains[2] + chains[3]));
      Register centres[4] = {};
      for (int64_t j = 0; j < call.len_k; ++j) {
        const int64_t at = i * pairs + j * width;
        const Register w = V::load(weights + at) * inverse;
        centres[j % 4] = V::fma(w, V::load(grads + at), centres[j % 4]);
        V::store(weights + at, w);
      }
      const Register middle = V::load(centre) + ((centres[0] + centres[1]) + (centres[2] + centres[3]));
      for (int64_t j = 0; j < call.len_k; ++j) {
        const int64_t at = i * pairs + j * width;
        V::store(grads + at, V::load(weights + at) * (V::load(grads + at) - middle));
      }
    }
    multiply_each(EachProduct<A>{weights, width, pairs, memory + out.of_head(g), width, out.token(), call.len_q,
                                 memory + grad_v.of_head(g), grad_v.token(), width},
                  call.len_k, call.value_dim);
    multiply_each(EachProduct<A>{grads, width, pairs, memory + q.of_head(g), width, q.token(), call.len_q,
                                 memory + grad_k.of_head(g), grad_k.token(), width},
                  call.len_k, call.dim);
    A* to = memory + grad_q.of_head(g);
    multiply_each(EachProduct<A>{grads, pairs, width, memory + k.of_head(g), width, k.token(), call.len_k, to, grad_q.token(), width},
                  call.len_q, call.dim);
    const Register scale = V::set(static_cast<A>(call.scale));
    for (int64_t i = 0; i < call.len_q; ++i)
      for (int64_t c = 0; c < call.dim; ++c) {
        A* at = to + i * grad_q.token() + c * width;
        V::store(at, (V::zero() + V::load(at)) * scale);  // as the other kernels, whose sums begin at 0
      }
  }

  // What backward needs of one query: the logarithm of its sum, and what its gradient takes off the centre.
  void row_sums(int64_t lane, int64_t g, int64_t i, A& lse, A& centre) const {
    centre = A(0);
    const A* at = lse_of(lane, g, i);
    lse = *at;
    if (lse == static_cast<A>(minus_infinity)) {
      lse = static_cast<A>(-minus_infinity);
    } else if (back->grad_lse) {
      centre = -static_cast<const A*>(back->grad_lse)[at - static_cast<const A*>(call.lse)];
    }
  }

  const AttentionCall& call;
  const AttentionBackward* back;
  const Addends addends;
  const int64_t together;
  Part q, k, v, out, grad_q{}, grad_k{}, grad_v{};  // out: in backward its gradient
  int64_t weights_at, added_at, grads_at = 0, elements;
  int64_t batch = 0, count = 0, head = 0, next_batch = 0, next_head = 0;
  bool last = true;
  A* memory = nullptr;
};

}  // namespace

#define MMK_ATTENTION_TINY(type, name)                                                             \
  int64_t name##_items(const AttentionCall& call, const AttentionBackward* back) {                 \
    return Tiny<type>(call, back).items();                                                         \
  }                                                                                                \
  int64_t name##_bytes(const AttentionCall& call, const AttentionBackward* back) {                 \
    return Tiny<type>(call, back).bytes();                                                         \
  }                                                                                                \
  void name(const AttentionCall& call, const AttentionBackward* back, int64_t begin, int64_t end, void* scratch) { \
    Tiny<type>(call, back).run(begin, end, scratch);                                               \
  }
MMK_ATTENTION_TINY(float, attention_tiny_float32)
MMK_ATTENTION_TINY(bfloat16, attention_tiny_bfloat16)
MMK_ATTENTION_TINY(float16, attention_tiny_float16)
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
MMK_ATTENTION_TINY(double, attention_tiny_float64)
#endif

}  // namespace mmk::MMK_TIER
