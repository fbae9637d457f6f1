// Row-wise work around the products of parameter-free cross-attention: silu, the threshold of a row, the mask, gradients.
#include "silu_attention.h"

#include "core/math.h"

namespace mmk::MMK_TIER {
namespace {

// --- order statistics -----------------------------------------------------------------------------------------------------
// Floating-point numbers as integers of the same order. As torch sorts, every NaN comes after infinity.
template <class A>
struct Ordered;
template <>
struct Ordered<float> {
  using Integer = int32_t;
  static constexpr Integer last = INT32_MAX;
};
template <>
struct Ordered<double> {
  using Integer = int64_t;
  static constexpr Integer last = INT64_MAX;
};

template <class A>
inline typename Ordered<A>::Integer integer_of(A value) {
  using Integer = typename Ordered<A>::Integer;
  Integer bits;
  memcpy(&bits, &value, sizeof bits);
  bits ^= (bits >> (8 * sizeof bits - 1)) & Ordered<A>::last;  // the larger a negative number's magnitude, the smaller it is
  return value == value ? bits : Ordered<A>::last;
}

template <class A>
inline A number_of(typename Ordered<A>::Integer ordered) {
  ordered ^= (ordered >> (8 * sizeof ordered - 1)) & Ordered<A>::last;
  A value;
  memcpy(&value, &ordered, sizeof value);
  return value;
}

// How many of the integers are at most `limit`.
template <class Integer>
inline int64_t count_up_to(const Integer* values, int64_t count, Integer limit) {
  constexpr int64_t block = 1 << 20;  // counted in lanes as wide as the integers
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = begin + block < count ? begin + block : count;
    Integer found = 0;
    for (int64_t i = begin; i < end; ++i) found += values[i] <= limit;
    total += found;
  }
  return total;
}

// The integer of rank `rank` in ascending order, by bisection of the range that they lie in: every step is one pass of
// vector comparisons over numbers in the first-level cache, with no branch that depends on them.
template <class Integer>
inline Integer of_rank(const Integer* values, int64_t count, int64_t rank) {
  Integer low = values[0], high = values[0];
  for (int64_t i = 1; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  while (low < high) {
    const Integer middle = (low & high) + ((low ^ high) >> 1);  // their mean, rounded down, without overflow
    if (count_up_to(values, count, middle) > rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The threshold of a row: halfway from the greatest number below the one of rank `rank` up to this, or this itself where
// there is nothing between. So scores that are made again with other rounding fall on the same side, but for near ties.
template <class A>
inline A threshold_of(const typename Ordered<A>::Integer* values, int64_t count, int64_t rank) {
  using Integer = typename Ordered<A>::Integer;
  const Integer lowest_kept = of_rank(values, count, rank);
  Integer dropped = integer_of<A>(-static_cast<A>(__builtin_inf()));
  for (int64_t i = 0; i < count; ++i) dropped = values[i] < lowest_kept && values[i] > dropped ? values[i] : dropped;
  const A below = number_of<A>(dropped), above = number_of<A>(lowest_kept);
  const A middle = below * A(0.5) + above * A(0.5);
  return middle > below && middle <= above ? middle : above;
}

// --- forward --------------------------------------------------------------------------------------------------------------
// silu of what lies in panels as `Stored`, rounded to T.
template <class T, class Stored = accumulator_t<T>>
void activate_in_place(void* elements, int64_t count) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  Stored* values = static_cast<Stored*>(elements);
  T rounded[V::width];
  for_each_vector<A>(count, [&](int64_t i, int64_t lanes) {
    const typename V::Register value = activate<Activation::silu, A>(load_lanes<A>(values + i, lanes));
    store_lanes<A>(values + i, V::store_rounded(rounded, value), lanes);
  });
}

// 1 where a score is at least the threshold, else 0. What is dropped is multiplied by it, so that NaN stays.
template <class A>
inline typename Vec<A>::Register kept(typename Vec<A>::Register threshold, typename Vec<A>::Register score) {
  return Vec<A>::select(Vec<A>::less_equal(threshold, score), Vec<A>::set(A(1)), Vec<A>::zero());
}

// Stores results of a row: in the place of the accumulators, or as elements of T where there is room for them.
template <class T>
inline void put(accumulator_t<T>* accumulators, void* elements, int64_t at, typename Vec<accumulator_t<T>>::Register value,
                int64_t lanes) {
  if (elements == nullptr) {
    store_lanes<accumulator_t<T>>(accumulators + at, value, lanes);
  } else {
    store_lanes<accumulator_t<T>>(static_cast<T*>(elements) + at, value, lanes);
  }
}

template <class T>
inline void* row_of(void* elements, int64_t row, int64_t keys) {
  return elements == nullptr ? nullptr : static_cast<T*>(elements) + row * keys;
}

template <class T>
void select(const SiluAttentionSelect& call, int64_t begin, int64_t end, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  auto* ordered = static_cast<typename Ordered<A>::Integer*>(scratch);
  const typename V::Register scale = V::set(static_cast<A>(call.scale));
  for (int64_t row = begin; row < end; ++row) {
    A* scores = static_cast<A*>(call.scores) + row * call.keys;
    void* weights = row_of<T>(call.weights, row, call.keys);
    A& threshold = static_cast<A*>(call.thresholds)[row];
    if (call.rank == 0) {
      for_each_vector<A>(call.keys, [&](int64_t i, int64_t lanes) {
        put<T>(scores, weights, i, load_lanes<A>(scores + i, lanes) * scale, lanes);
      });
      threshold = A(0);
      continue;
    }
    for_each_vector<A>(call.keys, [&](int64_t i, int64_t lanes) {
      store_lanes<A>(scores + i, load_lanes<A>(scores + i, lanes) * scale, lanes);
    });
    for (int64_t i = 0; i < call.keys; ++i) ordered[i] = integer_of<A>(scores[i]);
    threshold = threshold_of<A>(ordered, call.keys, call.rank);
    const typename V::Register limit = V::set(threshold);
    for_each_vector<A>(call.keys, [&](int64_t i, int64_t lanes) {
      const typename V::Register score = load_lanes<A>(scores + i, lanes);
      put<T>(scores, weights, i, score * kept<A>(limit, score), lanes);
    });
  }
}

// --- backward -------------------------------------------------------------------------------------------------------------
// The scores are scaled as `select` scales them: they meet the threshold with the bits that it was chosen by.
template <class T>
void mask(const SiluAttentionMask& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const Register scale = V::set(static_cast<A>(call.scale));
  for (int64_t row = begin; row < end; ++row) {
    A* scores = call.scores == nullptr ? nullptr : static_cast<A*>(call.scores) + row * call.keys;
    A* gradients = call.gradients == nullptr ? nullptr : static_cast<A*>(call.gradients) + row * call.keys;
    void* weights = row_of<T>(call.weights, row, call.keys);
    void* slopes = row_of<T>(call.slopes, row, call.keys);
    const bool drops = call.thresholds != nullptr;
    const Register limit = drops ? V::set(static_cast<const A*>(call.thresholds)[row]) : V::zero();
    for_each_vector<A>(call.keys, [&](int64_t i, int64_t lanes) {
      Register keep = V::set(A(1));
      if (scores != nullptr) {
        const Register score = load_lanes<A>(scores + i, lanes) * scale;
        if (drops) keep = kept<A>(limit, score);
        put<T>(scores, weights, i, score * keep, lanes);
      }
      if (gradients != nullptr) put<T>(gradients, slopes, i, load_lanes<A>(gradients + i, lanes) * keep * scale, lanes);
    });
  }
}

template <class T>
void gradient(const SiluAttentionGradient& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const A* from = static_cast<const A*>(call.from) + row * call.cols;
    const T* pre = call.pre == nullptr ? nullptr : static_cast<const T*>(call.pre) + row * call.pre_stride;
    T* to = static_cast<T*>(call.to) + row * call.cols;
    for_each_vector<A>(call.cols, [&](int64_t i, int64_t lanes) {
      typename Vec<A>::Register value = load_lanes<A>(from + i, lanes);
      if (pre != nullptr) value = value * activate_gradient<Activation::silu, A>(load_lanes<A>(pre + i, lanes));
      store_lanes<A>(to + i, value, lanes);
    });
  }
}

}  // namespace

const SiluAttentionKernels silu_attention_kernels = {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {activate_in_place<float>, activate_in_place<bfloat16>, activate_in_place<float16>, activate_in_place<double>},
    activate_in_place<bfloat16, bfloat16>,
    {select<float>, select<bfloat16>, select<float16>, select<double>},
    {mask<float>, mask<bfloat16>, mask<float16>, mask<double>},
    {gradient<float>, gradient<bfloat16>, gradient<float16>, gradient<double>},
#else
    {activate_in_place<float>, activate_in_place<bfloat16>, activate_in_place<float16>, nullptr},
    activate_in_place<bfloat16, bfloat16>,
    {select<float>, select<bfloat16>, select<float16>, nullptr},
    {mask<float>, mask<bfloat16>, mask<float16>, nullptr},
    {gradient<float>, gradient<bfloat16>, gradient<float16>, nullptr},
#endif
};

}  // namespace mmk::MMK_TIER
