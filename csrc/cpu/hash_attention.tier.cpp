// Sums of values by code, and what codes read from such sums, without a multiplication by a feature.
//
// A code is cut into groups of bits. To sum, each group has a table with a row of sums for each of its values: a row of values
// is added to one row of every table, and halves of a table added and subtracted leave the sums of its bits. To read, each
// group has a table with what each of its values makes of S, built with one addition a row. Tables are made for blocks of
// columns, so that they stay in the first-level cache.
#include "hash_attention.h"

#include "core/integers.h"
#include "core/math.h"
#include "hash_words.h"

namespace mmk::MMK_TIER {
namespace {

// --- groups of bits -------------------------------------------------------------------------------------------------------
// The bits of a code in as few groups as possible of nearly the same size.
struct BitGroups {
  int count = 0;
  int first[32], bits[32], row[32];  // a group's first bit, its bits, and where its table begins
  int rows = 0;

  BitGroups(int64_t of_code, int most) {
    count = static_cast<int>(ceil_div(of_code, most));
    int bit = 0;
    for (int g = 0; g < count; ++g) {
      first[g] = bit;
      bits[g] = static_cast<int>((of_code - bit + (count - g) - 1) / (count - g));
      row[g] = rows;
      bit += bits[g];
      rows += 1 << bits[g];
    }
  }
};

// Where the rows of a block of codes lie in the tables, in accumulators: made in one pass of vectors for each group.
struct Offsets {
  static constexpr int64_t most = 256;
  uint16_t of_group[32][most];

  // The codes from `row` on, as many as fit; answers how many.
  int64_t fill(const BitGroups& groups, const int32_t* all, int64_t row, int64_t end) {
    const int64_t count = end - row < most ? end - row : most;
    const int32_t* codes = all + row;
    for (int g = 0; g < groups.count; ++g) {
      const int first = groups.first[g];
      const uint32_t mask = (1u << groups.bits[g]) - 1u, row = static_cast<uint32_t>(groups.row[g]);
      for (int64_t n = 0; n < count; ++n)
        of_group[g][n] = static_cast<uint16_t>((row + ((static_cast<uint32_t>(codes[n]) >> first) & mask)) * hash_table_cols);
    }
    return count;
  }
};

// The tables of one block of columns.
template <class A>
struct Tables {
  A* rows;
  explicit Tables(void* memory) : rows(static_cast<A*>(memory)) {}
  A* row(int64_t index) const { return rows + index * hash_table_cols; }
};

constexpr int64_t block_vectors(int64_t width) { return hash_table_cols / width; }

// Outputs are asked for this many rows before they are written: their stores would wait for the lines.
constexpr int64_t rows_ahead = 12;
template <class A, class T>
constexpr int64_t vectors_of_line = most(1, 64 / (Vec<A>::width * static_cast<int64_t>(sizeof(T))));

// A block of columns in registers: all of them, or the first `cols` with a tail.
template <class A, bool whole>
struct Block {
  using V = Vec<A>;
  static constexpr int64_t most = block_vectors(V::width);
  int64_t cols;
  int64_t vectors() const { return whole ? most : ceil_div(cols, V::width); }
  int64_t lanes(int64_t v) const { return whole || cols - v * V::width > V::width ? V::width : cols - v * V::width; }
};

// f.template operator()<whole>(first column, columns) over the blocks of a row.
template <class F>
inline void each_block(int64_t width, const F& f) {
  for (int64_t at = 0; at < width; at += hash_table_cols) {
    if (width - at >= hash_table_cols) {
      f.template operator()<true>(at, hash_table_cols);
    } else {
      f.template operator()<false>(at, width - at);
    }
  }
}

// --- sums -----------------------------------------------------------------------------------------------------------------
// Adds the upper half of 2^bits rows to the lower one, and so on down to the sum of all. with[bit]: of the rows with the bit.
template <int bits, class Register>
[[gnu::always_inline]] inline void add_halves(Register* rows, Register* with) {
  if constexpr (bits > 0) {
    constexpr int half = 1 << (bits - 1);
    Register high[half];
#pragma GCC unroll 8
    for (int row = 0; row < half; ++row) {
      high[row] = rows[row + half];
      rows[row] = rows[row] + high[row];
    }
#pragma GCC unroll 4
    for (int step = half / 2; step > 0; step /= 2)
#pragma GCC unroll 4
      for (int row = 0; row < step; ++row) high[row] = high[row] + high[row + step];
    with[bits - 1] = high[0];
    add_halves<bits - 1>(rows, with);
  }
}

// The sum of 2^bits rows, and store(bit, that of the rows with the bit less those without it).
template <int bits, class A, class F>
inline typename Vec<A>::Register fold_in_registers(const A* column, const F& store) {
  typename Vec<A>::Register rows[1 << bits], with[bits];
#pragma GCC unroll 16
  for (int row = 0; row < 1 << bits; ++row) rows[row] = Vec<A>::load(column + row * hash_table_cols);
  add_halves<bits>(rows, with);
#pragma GCC unroll 4
  for (int bit = 0; bit < bits; ++bit) store(bit, with[bit] + with[bit] - rows[0]);
  return rows[0];
}

// The same of a table, whose rows are overwritten.
template <class A, class F>
inline typename Vec<A>::Register fold(A* column, int bits, const F& store) {
  using V = Vec<A>;
  for (; bits > 4; --bits) {
    const int64_t half = int64_t{1} << (bits - 1);
    typename V::Register difference = V::zero();
    for (int64_t row = 0; row < half; ++row) {
      A* to = column + row * hash_table_cols;
      const typename V::Register low = V::load(to), high = V::load(to + half * hash_table_cols);
      difference = difference + (high - low);
      V::store(to, low + high);
    }
    store(bits - 1, difference);
  }
  if (bits == 4) return fold_in_registers<4, A>(column, store);
  if (bits == 3) return fold_in_registers<3, A>(column, store);
  if (bits == 2) return fold_in_registers<2, A>(column, store);
  return fold_in_registers<1, A>(column, store);
}

template <class T, bool whole>
inline void sum_block(const HashSum& call, const BitGroups& groups, int64_t begin, int64_t end, int64_t at, int64_t cols,
                      const Tables<accumulator_t<T>>& tables, accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const Block<A, whole> block{cols};
  const int64_t vectors = block.vectors();
  for (int64_t row = 0; row < groups.rows; ++row)
    for (int64_t v = 0; v < vectors; ++v) V::store(tables.row(row) + v * V::width, V::zero());
  const A* scale = static_cast<const A*>(call.scale);
  const T* values = static_cast<const T*>(call.values) + at;
  const int64_t stride = call.stride;
  const int count = groups.count;
  A* const rows = tables.rows;
  Offsets offsets;
  for (int64_t row = begin; row < end; row += Offsets::most) {
    const int64_t some = offsets.fill(groups, call.codes, row, end);
    for (int64_t i = 0; i < some; ++i) {
      const T* from = values + (row + i) * stride;
      const Register factor = V::set(scale == nullptr ? A(1) : scale[row + i]);
      Register value[Block<A, whole>::most];
      for (int64_t v = 0; v < vectors; ++v) value[v] = load_lanes<A>(from + v * V::width, block.lanes(v)) * factor;
      for (int g = 0; g < count; ++g) {
        A* to = rows + offsets.of_group[g][i];
        for (int64_t v = 0; v < vectors; ++v) V::store(to + v * V::width, V::load(to + v * V::width) + value[v]);
      }
    }
  }
  for (int g = 0; g < groups.count; ++g)
    for (int64_t v = 0; v < vectors; ++v) {
      A* column = tables.row(groups.row[g]) + v * V::width;
      A* to = sums + groups.first[g] * call.state.width + at + v * V::width;
      const Register total = fold<A>(column, groups.bits[g], [&](int bit, Register difference) {
        store_lanes<A>(to + bit * call.state.width, difference, block.lanes(v));
      });
      if (g == 0) store_lanes<A>(sums + call.state.total() + at + v * V::width, total, block.lanes(v));
    }
}

// --- one number a row -----------------------------------------------------------------------------------------------------
// Sums of weights, or where there are none of ones, each with the sign of the row's bit: as many bits at once as there are lanes.
template <class A>
inline void sum_weights(const HashSum& call, int64_t begin, int64_t end, A* counts) {
  using V = Vec<A>;
  A ones[V::width];
  V::store(ones, V::set(A(1)));
  for (int64_t first = 0; first < call.state.bits; first += V::width) {
    typename V::Register sums[V::width];
#pragma GCC unroll 16
    for (auto& sum : sums) sum = V::zero();
    for (int64_t row = begin; row < end; row += V::width) {
      const int64_t lanes = end - row < V::width ? end - row : V::width;
      const A* weight = call.weight == nullptr ? ones : static_cast<const A*>(call.weight) + row;
      const typename V::Register value = load_lanes<A>(weight, lanes);
      const Words<A> codes = load_words<A>(call.codes + row, lanes);
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::width; ++i) sums[i] = sums[i] + with_sign<A>(value, codes, first + i);
    }
    store_lanes<A>(counts + first, V::sums(sums), least(V::width, call.state.bits - first));
  }
}

template <class T>
void sum(const HashSum& call, int64_t begin, int64_t end, void* sums, void* memory) {
  using A = accumulator_t<T>;
  const BitGroups groups(call.state.bits, call.group_bits);
  const Tables<A> tables(memory);
  A* to = static_cast<A*>(sums);
  if (call.values != nullptr)
    each_block(call.state.width, [&]<bool whole>(int64_t at, int64_t cols) {
      sum_block<T, whole>(call, groups, begin, end, at, cols, tables, to);
    });
  sum_weights<A>(call, begin, end, to + call.state.counts());
}

// --- reading --------------------------------------------------------------------------------------------------------------
// What each group's values make of `sums` (a row every `stride`): -sum of all, and twice a bit's own for each bit that is set.
// `base` is added to the first group's.
template <class A, bool whole>
inline void build(const BitGroups& groups, const A* sums, int64_t stride, const A* total, A all, int64_t cols,
                  const Tables<A>& tables) {
  using V = Vec<A>;
  using Register = typename V::Register;
  const Block<A, whole> block{cols};
  for (int g = 0; g < groups.count; ++g)
    for (int64_t v = 0; v < block.vectors(); ++v) {
      A* column = tables.row(groups.row[g]) + v * V::width;
      const A* from = sums + groups.first[g] * stride + v * V::width;
      Register none = V::zero();
      if (g == 0 && total != nullptr) none = V::set(all) * load_lanes<A>(total + v * V::width, block.lanes(v));
      for (int bit = 0; bit < groups.bits[g]; ++bit) none = none - load_lanes<A>(from + bit * stride, block.lanes(v));
      V::store(column, none);
      for (int bit = 0; bit < groups.bits[g]; ++bit) {
        const Register once = load_lanes<A>(from + bit * stride, block.lanes(v)), twice = once + once;
        for (int64_t row = 0; row < int64_t{1} << bit; ++row)
          V::store(column + (row + (int64_t{1} << bit)) * hash_table_cols, V::load(column + row * hash_table_cols) + twice);
      }
    }
}

template <class A>
void denominator(const HashDenominator& call, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const A* counts = static_cast<const A*>(call.sums) + call.state.counts();
  for (int64_t row = begin; row < end; row += V::width) {
    const int64_t lanes = end - row < V::width ? end - row : V::width;
    const Words<A> codes = load_words<A>(call.codes + row, lanes);
    typename V::Register value = V::set(static_cast<A>(call.base));
    for (int64_t bit = 0; bit < call.state.bits; ++bit) value = value + with_sign<A>(V::set(counts[bit]), codes, bit);
    store_lanes<A>(static_cast<A*>(call.inverse) + row, V::set(A(1)) / value, lanes);
  }
}

// One block of columns of a row's h S.
template <class A, int64_t most>
inline void read(const A* tables, const Offsets& offsets, int64_t i, int groups, int64_t vectors,
                 typename Vec<A>::Register (&value)[most]) {
  using V = Vec<A>;
  const A* from = tables + offsets.of_group[0][i];
  for (int64_t v = 0; v < vectors; ++v) value[v] = V::load(from + v * V::width);
  for (int g = 1; g < groups; ++g) {
    from = tables + offsets.of_group[g][i];
    for (int64_t v = 0; v < vectors; ++v) value[v] = value[v] + V::load(from + v * V::width);
  }
}

// The tables of one block of columns of a call.
template <class A, bool whole>
inline void build_of(const HashOutput& call, const BitGroups& groups, int64_t at, int64_t cols, const Tables<A>& tables) {
  const A* sums = static_cast<const A*>(call.sums) + at;
  build<A, whole>(groups, sums, call.state.width, call.all == 0 ? nullptr : sums + call.state.total(),
                  static_cast<A>(call.all), cols, tables);
}

template <class T, bool whole>
inline void output_block(const HashOutput& call, const BitGroups& groups, int64_t begin, int64_t end, int64_t at, int64_t cols,
                         const Tables<accumulator_t<T>>& tables) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  build_of<A, whole>(call, groups, at, cols, tables);
  const Block<A, whole> block{cols};
  const int64_t vectors = block.vectors(), width = call.state.width, own_stride = call.own_stride;
  const A* scale = static_cast<const A*>(call.scale);
  const A* own_scale = static_cast<const A*>(call.own_scale);
  const T* own = call.own == nullptr ? nullptr : static_cast<const T*>(call.own) + at;
  T* out = static_cast<T*>(call.out) + at;
  const A self = static_cast<A>(call.self);
  const A* const rows = tables.rows;
  const int count = groups.count;
  Offsets offsets;
  for (int64_t row = begin; row < end; row += Offsets::most) {
    const int64_t some = offsets.fill(groups, call.codes, row, end);
    for (int64_t i = 0; i < some; ++i) {
      Register value[Block<A, whole>::most];
      read<A>(rows, offsets, i, count, vectors, value);
      const Register factor = V::set(scale == nullptr ? A(1) : scale[row + i]);
      for (int64_t v = 0; v < vectors; ++v) value[v] = value[v] * factor;
      if (own != nullptr) {
        const Register of_own = V::set(self * own_scale[row + i]);
        const T* from = own + (row + i) * own_stride;
        for (int64_t v = 0; v < vectors; ++v)
          value[v] = V::fma(of_own, load_lanes<A>(from + v * V::width, block.lanes(v)), value[v]);
      }
      T* to = out + (row + i) * width;
      const T* soon = to + least(rows_ahead, end - 1 - row - i) * width;
      for (int64_t v = 0; v < vectors; v += vectors_of_line<A, T>) __builtin_prefetch(soon + v * V::width, 1);
      for (int64_t v = 0; v < vectors; ++v) store_lanes<A>(to + v * V::width, value[v], block.lanes(v));
    }
  }
}

template <class T>
void output(const HashOutput& call, int64_t begin, int64_t end, void* memory) {
  const BitGroups groups(call.state.bits, call.group_bits);
  const Tables<accumulator_t<T>> tables(memory);
  each_block(call.state.width, [&]<bool whole>(int64_t at, int64_t cols) {
    output_block<T, whole>(call, groups, begin, end, at, cols, tables);
  });
}

template <class T, bool whole>
inline void slope_block(const HashSlope& call, const BitGroups& groups, int64_t begin, int64_t end, int64_t at, int64_t cols,
                        const Tables<accumulator_t<T>>& tables) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const HashOutput& of = call.numerator;
  build_of<A, whole>(of, groups, at, cols, tables);
  const Block<A, whole> block{cols};
  const int64_t vectors = block.vectors(), width = of.state.width, own_stride = of.own_stride;
  const T* own = of.own == nullptr ? nullptr : static_cast<const T*>(of.own) + at;
  const T* grad = static_cast<const T*>(call.grad) + at;
  A* slopes = static_cast<A*>(call.slope);
  const Register self = V::set(static_cast<A>(of.self));
  const A* const rows = tables.rows;
  const int count = groups.count;
  Offsets offsets;
  for (int64_t row = begin; row < end; row += Offsets::most) {
    const int64_t some = offsets.fill(groups, of.codes, row, end);
    Register products[V::width];  // of the rows that are not stored yet
    for (auto& product : products) product = V::zero();
    for (int64_t i = 0; i < some; ++i) {
      Register value[Block<A, whole>::most], product = V::zero();
      read<A>(rows, offsets, i, count, vectors, value);
      if (own != nullptr) {
        const T* from = own + (row + i) * own_stride;
        for (int64_t v = 0; v < vectors; ++v)
          value[v] = V::fma(self, load_lanes<A>(from + v * V::width, block.lanes(v)), value[v]);
      }
      const T* from = grad + (row + i) * width;
      for (int64_t v = 0; v < vectors; ++v)
        product = V::fma(value[v], load_lanes<A>(from + v * V::width, block.lanes(v)), product);
      products[i % V::width] = product;
      if (i % V::width < V::width - 1 && i + 1 < some) continue;
      const int64_t first = i - i % V::width;
      A* to = slopes + row + first;
      store_lanes<A>(to, load_lanes<A>(to, i + 1 - first) - V::sums(products), i + 1 - first);
    }
  }
}

template <class T>
void slope(const HashSlope& call, int64_t begin, int64_t end, void* memory) {
  using A = accumulator_t<T>;
  const BitGroups groups(call.numerator.state.bits, call.numerator.group_bits);
  const Tables<A> tables(memory);
  const A* inverse = static_cast<const A*>(call.inverse);
  A* slopes = static_cast<A*>(call.slope);
  for (int64_t n = begin; n < end; ++n) slopes[n] = A(0);
  each_block(call.numerator.state.width, [&]<bool whole>(int64_t at, int64_t cols) {
    slope_block<T, whole>(call, groups, begin, end, at, cols, tables);
  });
  for (int64_t n = begin; n < end; ++n) slopes[n] *= inverse[n] * inverse[n];
}

// --- pairs ----------------------------------------------------------------------------------------------------------------
inline int bits_set(uint32_t word) {
#if defined(__POPCNT__)
  return __builtin_popcount(word);
#else  // the compiler would call a function for each
  word -= (word >> 1) & 0x55555555u;
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  return static_cast<int>((((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
#endif
}

// How many of the `counted` bits differ between a query and each of the keys.
inline void count_differences(const HashPairs& call, uint32_t query, uint32_t counted, int32_t (&to)[hash_pair_keys]) {
  for (int64_t j = 0; j < call.keys; ++j) to[j] = bits_set((query ^ static_cast<uint32_t>(call.codes_k[j])) & counted);
}

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512 && !MMK_EMULATE_AVX512
// The same by AVX512_VPOPCNTDQ, which is not the tier's own.
[[gnu::target("avx512vpopcntdq")]] void count_differences_at_once(const HashPairs& call, uint32_t query, uint32_t counted,
                                                                  int32_t (&to)[hash_pair_keys]) {
  const __m512i keys = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << call.keys) - 1), call.codes_k);
  const __m512i differences = _mm512_xor_si512(keys, _mm512_set1_epi32(static_cast<int32_t>(query)));
  const __m512i kept = _mm512_and_si512(differences, _mm512_set1_epi32(static_cast<int32_t>(counted)));
  _mm512_storeu_si512(to, _mm512_popcnt_epi32(kept));
}
#else
inline void count_differences_at_once(const HashPairs& call, uint32_t query, uint32_t counted, int32_t (&to)[hash_pair_keys]) {
  count_differences(call, query, counted, to);
}
#endif

template <class T>
void pairs(const HashPairs& call) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const int bits = static_cast<int>(call.state.bits);
  const uint32_t counted = bits == 32 ? ~0u : (1u << bits) - 1u;
  const A offset = static_cast<A>(call.offset);
  for (int64_t n = 0; n < call.queries; ++n) {
    const uint32_t query = static_cast<uint32_t>(call.codes_q[n]);
    int32_t differences[hash_pair_keys];
    if (call.vector_popcount) {
      count_differences_at_once(call, query, counted, differences);
    } else {
      count_differences(call, query, counted, differences);
    }
    T* to = static_cast<T*>(call.out) + n * call.state.width;
    A denominator = offset * static_cast<A>(call.keys), weights[hash_pair_keys];
    for (int64_t j = 0; j < call.keys; ++j) {
      weights[j] = static_cast<A>(bits - 2 * differences[j]);
      denominator += weights[j];
      if (!call.own || j == n) weights[j] += offset;
    }
    const Register inverse = V::set(A(1) / denominator);
    each_block(call.state.width, [&]<bool whole>(int64_t at, int64_t cols) {
      const Block<A, whole> block{cols};
      const int64_t vectors = block.vectors();
      Register value[Block<A, whole>::most];
      for (int64_t v = 0; v < vectors; ++v) value[v] = V::zero();
      for (int64_t j = 0; j < call.keys; ++j) {
        const T* from = static_cast<const T*>(call.v) + j * call.stride + at;
        for (int64_t v = 0; v < vectors; ++v)
          value[v] = V::fma(V::set(weights[j]), load_lanes<A>(from + v * V::width, block.lanes(v)), value[v]);
      }
      for (int64_t v = 0; v < vectors; ++v) store_lanes<A>(to + at + v * V::width, value[v] * inverse, block.lanes(v));
    });
  }
}

}  // namespace

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
#define MMK_HASH_DOUBLE(kernel) kernel<double>
#else
#define MMK_HASH_DOUBLE(kernel) nullptr
#endif
#define MMK_HASH_BY_TYPE(kernel) {kernel<float>, kernel<bfloat16>, kernel<float16>, MMK_HASH_DOUBLE(kernel)}

const HashAttentionKernels hash_attention_kernels = {
    MMK_HASH_BY_TYPE(sum),
    {denominator<float>, denominator<float>, denominator<float>, MMK_HASH_DOUBLE(denominator)},
    MMK_HASH_BY_TYPE(output),
    MMK_HASH_BY_TYPE(slope),
    MMK_HASH_BY_TYPE(pairs),
};

}  // namespace mmk::MMK_TIER
