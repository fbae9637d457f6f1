// Routing of tokens to experts in one tier: a row of logits at a time, widened to accumulators in scratch.
#include "routing.h"

#include "core/integers.h"
#include "core/math.h"
#include "core/rows.h"
#include "core/vec.h"

namespace mmk::MMK_TIER {
namespace {

template <class A>
inline constexpr A infinity = static_cast<A>(__builtin_inf());

// A row of `experts` accumulators and lanes of padding after them, which hold minus infinity and do not count.
template <class A>
struct Row {
  A* values;
  int64_t experts, padded;

  A maximum() const {
    using V = Vec<A>;
    typename V::Register top = V::set(-infinity<A>);
    for (int64_t i = 0; i < padded; i += V::width) top = V::max(top, V::load(values + i));
    A lanes[V::width];
    V::store(lanes, top);
    A best = lanes[0];
    for (int i = 1; i < V::width; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
  }
};

// Widens row `row` into `to`. Whether it has a NaN in it.
template <class T, class A = accumulator_t<T>>
inline bool widen(const RouteRows& rows, int64_t row, A* to, int64_t padded) {
  using V = Vec<A>;
  const T* from = static_cast<const T*>(rows.logits) + row * rows.stride;
  int64_t i = 0;
  for (; i + V::width <= rows.experts; i += V::width) V::store(to + i, V::load(from + i));
  if (i < rows.experts) V::store(to + i, load_part<A>(from + i, rows.experts - i));
  for (int64_t j = rows.experts; j < padded; ++j) to[j] = -infinity<A>;
  bool any = false;
  for (int64_t j = 0; j < rows.experts; ++j) any |= to[j] != to[j];
  return any;
}

template <class A>
struct Softmax {
  A maximum, sum;
};

// powers = exp(values - maximum), and their sum; the padding's are zero.
template <class A>
inline Softmax<A> softmax(const Row<A>& row, A* powers) {
  using V = Vec<A>;
  const A top = row.maximum();
  typename V::Register sum = V::zero();
  for (int64_t i = 0; i < row.padded; i += V::width) {
    typename V::Register power = exp_of_negative<A>(V::load(row.values + i) - V::set(top));
    V::store(powers + i, power);
  }
  for (int64_t i = row.experts; i < row.padded; ++i) powers[i] = A(0);
  for (int64_t i = 0; i < row.padded; i += V::width) sum = sum + V::load(powers + i);
  return {top, V::sum(sum)};
}

// The probabilities of softmax, or the sigmoids; zero in the padding.
template <class A>
inline void scores_of(const RouteRows& rows, const Row<A>& row, A* to) {
  using V = Vec<A>;
  if (rows.score == RouteScore::softmax) {
    const Softmax<A> whole = softmax(row, to);
    for (int64_t i = 0; i < row.padded; i += V::width) V::store(to + i, V::load(to + i) / V::set(whole.sum));
    return;
  }
  for (int64_t i = 0; i < row.padded; i += V::width) V::store(to + i, sigmoid<A>(V::load(row.values + i)));
  for (int64_t i = row.experts; i < row.padded; ++i) to[i] = A(0);
}

inline int64_t padded_of(int64_t experts) { return (experts + route_width - 1) / route_width * route_width; }

// --- choosing -------------------------------------------------------------------------------------------------------------
// The best `slots` of values[first, last) by insertion: an equal value stays behind what came before it.
template <class A>
inline int64_t insert_best(const A* values, int64_t first, int64_t last, int64_t slots, int64_t count, A* best, int64_t* ids) {
  for (int64_t i = first; i < last; ++i) {
    const A value = values[i];
    if (count == slots && !(value > best[count - 1])) continue;
    int64_t at = count < slots ? count++ : slots - 1;
    for (; at > 0 && value > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = value;
    ids[at] = i;
  }
  return count;
}

// Marks the groups that may be chosen from, the first of equal ones. `worth` and `marks` have room for all groups.
template <class A>
inline void mark_groups(const RouteChoice& call, const A* values, A* worth, A* marks) {
  const int64_t size = call.rows.experts / call.groups;
  for (int64_t group = 0; group < call.groups; ++group) {
    A first = -infinity<A>, second = -infinity<A>;
    for (int64_t i = group * size; i < (group + 1) * size; ++i) {
      if (values[i] > first) {
        second = first;
        first = values[i];
      } else if (values[i] > second) {
        second = values[i];
      }
    }
    worth[group] = call.top2 && size > 1 ? first + second : first;
    marks[group] = A(0);
  }
  for (int64_t chosen = 0; chosen < call.top_groups; ++chosen) {
    int64_t best = -1;
    for (int64_t group = 0; group < call.groups; ++group)
      if (marks[group] == A(0) && (best < 0 || worth[group] > worth[best])) best = group;
    marks[best] = A(1);
  }
}

template <class T>
void choose(const RouteChoice& call, int64_t begin, int64_t end, void* scratch) {
  using A = accumulator_t<T>;
  const int64_t experts = call.rows.experts, padded = padded_of(experts);
  A* values = static_cast<A*>(scratch);
  A* scores = values + padded;
  A* best = scores + padded;
  A* worth = best + padded;
  A* marks = worth + padded;
  const bool by_score = call.rows.score == RouteScore::sigmoid, by_part = call.top_p < 1;
  for (int64_t row = begin; row < end; ++row) {
    if (widen<T>(call.rows, row, values, padded)) {
      *call.nan_row = row;
      return;
    }
    if (by_score || by_part) scores_of<A>(call.rows, {values, experts, padded}, scores);
    const A* chosen_by = by_score ? scores : values;
    if (call.selection != nullptr) {
      const A* added = static_cast<const A*>(call.selection) + row * call.selection_stride;
      for (int64_t i = 0; i < experts; ++i) values[i] = chosen_by[i] + added[i];
      chosen_by = values;
    }
    int64_t* ids = call.ids + row * call.slots;
    int64_t count = 0;
    if (call.top_groups < call.groups) {
      const int64_t size = experts / call.groups;
      mark_groups(call, chosen_by, worth, marks);
      for (int64_t group = 0; group < call.groups; ++group)
        if (marks[group] != A(0))
          count = insert_best(chosen_by, group * size, (group + 1) * size, call.slots, count, best, ids);
    } else {
      count = insert_best(chosen_by, 0, experts, call.slots, 0, best, ids);
    }
    if (by_part) {
      A before = A(0);
      for (int64_t slot = 0; slot < count; ++slot) {
        if (slot > 0 && before >= static_cast<A>(call.top_p)) {
          count = slot;
          break;
        }
        before += scores[ids[slot]];
      }
    }
    for (int64_t slot = count; slot < call.slots; ++slot) ids[slot] = -1;
  }
}

// --- weights and sums -----------------------------------------------------------------------------------------------------
// The weights of a row's slots. `values` are its logits, `scores` what they make.
template <class A>
inline void weights_of(const RouteRows& rows, const A* values, const A* scores, bool normalize, const int64_t* ids, int64_t slots,
                       A* weights) {
  if (!normalize) {
    for (int64_t slot = 0; slot < slots; ++slot) weights[slot] = ids[slot] < 0 ? A(0) : scores[ids[slot]];
    return;
  }
  A sum = A(0);
  if (rows.score == RouteScore::softmax) {  // from the logits themselves, so that the chosen may all be improbable
    A top = -infinity<A>;
    for (int64_t slot = 0; slot < slots; ++slot)
      if (ids[slot] >= 0 && values[ids[slot]] > top) top = values[ids[slot]];
    if (top == infinity<A> || top == -infinity<A>) top = A(0);
    constexpr int width = Vec<A>::width;
    for (int64_t first = 0; first < slots; first += width) {
      A lanes[width];
      const int64_t count = least(slots - first, width);
      for (int64_t i = 0; i < width; ++i)
        lanes[i] = i < count && ids[first + i] >= 0 ? values[ids[first + i]] - top : -infinity<A>;
      Vec<A>::store(lanes, exp_of_negative<A>(Vec<A>::load(lanes)));
      for (int64_t i = 0; i < count; ++i) {
        weights[first + i] = lanes[i];
        sum += lanes[i];
      }
    }
    if (!(sum >= static_cast<A>(smallest_normal))) sum = sum != sum ? sum : static_cast<A>(smallest_normal);
  } else {
    for (int64_t slot = 0; slot < slots; ++slot) {
      weights[slot] = ids[slot] < 0 ? A(0) : scores[ids[slot]];
      sum += weights[slot];
    }
    sum += static_cast<A>(smallest_normal);
  }
  for (int64_t slot = 0; slot < slots; ++slot) weights[slot] = weights[slot] / sum;
}

// Scores as the shares that a token's losses are made of: the probabilities themselves, or the sigmoids as parts of their sum.
template <class A>
inline void to_shares(const RouteRows& rows, A* scores, int64_t padded) {
  using V = Vec<A>;
  if (rows.score == RouteScore::softmax) return;
  typename V::Register sum = V::zero();
  for (int64_t i = 0; i < padded; i += V::width) sum = sum + V::load(scores + i);
  const A total = V::sum(sum) + static_cast<A>(smallest_normal);
  for (int64_t i = 0; i < padded; i += V::width) V::store(scores + i, V::load(scores + i) / V::set(total));
}

// The logarithms of the shares, 0 where a share is 0.
template <class A>
inline void logs_of(const RouteRows& rows, const A* values, const A* shares, A logsumexp, A* logs) {
  if (rows.score == RouteScore::softmax) {
    for (int64_t i = 0; i < rows.experts; ++i) logs[i] = shares[i] > 0 ? values[i] - logsumexp : A(0);
  } else {
    for (int64_t i = 0; i < rows.experts; ++i) logs[i] = log_of_positive(shares[i] > 0 ? shares[i] : A(1));
  }
}

template <class T>
void weigh(const RouteWeights& call, int64_t begin, int64_t end, void* sums_of_chunk, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  const int64_t experts = call.rows.experts, padded = padded_of(experts);
  A* values = static_cast<A*>(scratch);
  A* scores = values + padded;
  A* logs = scores + padded;
  A* powers = logs + padded;
  A* sums = static_cast<A*>(sums_of_chunk);
  for (int64_t i = 0; i < 2 * experts + 2; ++i) sums[i] = A(0);
  for (int64_t row = begin; row < end; ++row) {
    widen<T>(call.rows, row, values, padded);
    const Row<A> whole{values, experts, padded};
    const Softmax<A> softmax_of_row = softmax(whole, powers);
    const A logsumexp = softmax_of_row.maximum + log_of_positive(softmax_of_row.sum);
    if (call.rows.score == RouteScore::softmax) {
      for (int64_t i = 0; i < padded; i += V::width) V::store(scores + i, V::load(powers + i) / V::set(softmax_of_row.sum));
    } else {
      scores_of<A>(call.rows, whole, scores);
    }
    const int64_t* ids = call.ids + row * call.slots;
    A* weights = static_cast<A*>(call.weights) + row * call.slots;
    weights_of<A>(call.rows, values, scores, call.normalize, ids, call.slots, weights);
    for (int64_t slot = 0; slot < call.slots; ++slot)
      if (ids[slot] >= 0) sums[experts + ids[slot]] += weights[slot];
    to_shares<A>(call.rows, scores, padded);
    logs_of<A>(call.rows, values, scores, logsumexp, logs);
    A entropy = A(0);
    for (int64_t i = 0; i < experts; ++i) {
      sums[i] += scores[i];
      entropy -= scores[i] * logs[i];
    }
    sums[2 * experts] += logsumexp * logsumexp;
    sums[2 * experts + 1] += entropy;
  }
}

// --- gradient -------------------------------------------------------------------------------------------------------------
template <class T>
void gradient(const RouteGradient& call, int64_t begin, int64_t end, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  const int64_t experts = call.rows.experts, padded = padded_of(experts);
  const bool softmax_scores = call.rows.score == RouteScore::softmax;
  A* values = static_cast<A*>(scratch);
  A* scores = values + padded;
  A* of_score = scores + padded;
  A* powers = of_score + padded;
  A* weights = powers + padded;
  const A* grad_sums = static_cast<const A*>(call.grad_sums);
  const A of_z = grad_sums[2 * experts], of_entropy = grad_sums[2 * experts + 1];
  for (int64_t row = begin; row < end; ++row) {
    widen<T>(call.rows, row, values, padded);
    const Row<A> whole{values, experts, padded};
    const Softmax<A> softmax_of_row = softmax(whole, powers);
    const A logsumexp = softmax_of_row.maximum + log_of_positive(softmax_of_row.sum);
    for (int64_t i = 0; i < padded; i += V::width) V::store(powers + i, V::load(powers + i) / V::set(softmax_of_row.sum));
    A total = A(1);
    if (softmax_scores) {
      for (int64_t i = 0; i < padded; i += V::width) V::store(scores + i, V::load(powers + i));
    } else {
      scores_of<A>(call.rows, whole, scores);
      A sum = A(0);
      for (int64_t i = 0; i < experts; ++i) sum += scores[i];
      total = sum + static_cast<A>(smallest_normal);
    }
    // Of the shares, which are the scores over `total`; then of the scores.
    A mean = A(0);
    for (int64_t i = 0; i < experts; ++i) {
      const A share = scores[i] / total;
      const A log = !(share > 0) ? A(0) : softmax_scores ? values[i] - logsumexp : log_of_positive(share);
      of_score[i] = grad_sums[i] - of_entropy * (log + A(1));
      mean += of_score[i] * share;
    }
    if (!softmax_scores)
      for (int64_t i = 0; i < experts; ++i) of_score[i] = (of_score[i] - mean) / total;
    const int64_t* ids = call.ids + row * call.slots;
    const A* grad_weights = static_cast<const A*>(call.grad_weights) + row * call.slots;
    const auto of_weight = [&](int64_t slot) { return grad_weights[slot] + grad_sums[experts + ids[slot]]; };
    if (!call.normalize) {
      for (int64_t slot = 0; slot < call.slots; ++slot)
        if (ids[slot] >= 0) of_score[ids[slot]] += of_weight(slot);
    }
    // Through the scores to the logits, in `values`; logsumexp comes last.
    if (softmax_scores) {
      A dot = A(0);
      for (int64_t i = 0; i < experts; ++i) dot += of_score[i] * scores[i];
      for (int64_t i = 0; i < experts; ++i) of_score[i] = scores[i] * (of_score[i] - dot);
    } else {
      for (int64_t i = 0; i < experts; ++i) of_score[i] = of_score[i] * scores[i] * (A(1) - scores[i]);
    }
    if (call.normalize) {
      // Each weight is a part of a sum: by the logarithm of a weight, which of softmax is a logit but for a constant.
      weights_of<A>(call.rows, values, scores, true, ids, call.slots, weights);
      A dot = A(0);
      for (int64_t slot = 0; slot < call.slots; ++slot)
        if (ids[slot] >= 0) dot += of_weight(slot) * weights[slot];
      for (int64_t slot = 0; slot < call.slots; ++slot) {
        if (ids[slot] < 0) continue;
        const A of_log = weights[slot] * (of_weight(slot) - dot);
        of_score[ids[slot]] += softmax_scores ? of_log : of_log * (A(1) - scores[ids[slot]]);
      }
    }
    T* out = static_cast<T*>(call.grad) + row * experts;
    const A scale = A(2) * of_z * logsumexp;
    for_each_vector<A>(experts, [&](int64_t i, int64_t lanes) {
      store_lanes<A>(out + i, V::fma(V::set(scale), V::load(powers + i), V::load(of_score + i)), lanes);
    });
  }
}

template <class T>
void probabilities(const RouteRows& rows, int64_t begin, int64_t end, void* to, void* scratch, int64_t* nan_row) {
  using A = accumulator_t<T>;
  const int64_t experts = rows.experts, padded = padded_of(experts);
  A* values = static_cast<A*>(scratch);
  A* scores = values + padded;
  for (int64_t row = begin; row < end; ++row) {
    if (widen<T>(rows, row, values, padded)) {
      *nan_row = row;
      return;
    }
    scores_of<A>(rows, {values, experts, padded}, scores);
    memcpy(static_cast<A*>(to) + row * experts, scores, static_cast<size_t>(experts) * sizeof(A));
  }
}

}  // namespace

const RoutingKernels routing_kernels = {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {choose<float>, choose<bfloat16>, choose<float16>, choose<double>},
    {weigh<float>, weigh<bfloat16>, weigh<float16>, weigh<double>},
    {gradient<float>, gradient<bfloat16>, gradient<float16>, gradient<double>},
    {probabilities<float>, probabilities<bfloat16>, probabilities<float16>, probabilities<double>},
#else
    {choose<float>, choose<bfloat16>, choose<float16>, nullptr},
    {weigh<float>, weigh<bfloat16>, weigh<float16>, nullptr},
    {gradient<float>, gradient<bfloat16>, gradient<float16>, nullptr},
    {probabilities<float>, probabilities<bfloat16>, probabilities<float16>, nullptr},
#endif
};

}  // namespace mmk::MMK_TIER
