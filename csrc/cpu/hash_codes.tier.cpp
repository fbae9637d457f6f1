// Codes of tokens by kernelised hashing, and the way back through them. Tiles of rows lie across the lanes, so that every
// product is one of a small matrix (supports, projection, S) with the tile, and nothing is as long as the rows.
#include "hash_attention.h"

#include "core/ahead.h"
#include "core/lane_product.h"
#include "core/math.h"
#include "core/rows.h"
#include "hash_words.h"

namespace mmk::MMK_TIER {
namespace {

constexpr int64_t tile_rows = 2 * Vec<float>::width;  // doubles have fewer

// --- tiles ----------------------------------------------------------------------------------------------------------------
// Rows [begin, begin + count) as columns, times one factor a lane where there are any: to [channels, vectors * width]. Lanes past
// `count` repeat the last row.
template <class A, class T, int vectors>
inline void load_tile(const T* rows, int64_t stride, int64_t count, int64_t channels, const A* factors, A* to) {
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t width = V::width, lanes = vectors * width;
  for (int64_t v = 0; v < vectors; ++v) {
    const bool all = count >= (v + 1) * width;
    const Register factor = factors == nullptr ? V::zero() : V::load(factors + v * width);
    for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
      Register square[width];
      if (all && some == width) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < width; ++i) square[i] = V::load(rows + (v * width + i) * stride + c);
      } else {
        for (int64_t i = 0; i < width; ++i)
          square[i] = load_lanes<A>(rows + (v * width + i < count ? v * width + i : count - 1) * stride + c, some);
      }
      V::transpose(square);
      A* at = to + c * lanes + v * width;
      if (factors == nullptr) {
        for (int64_t i = 0; i < some; ++i) V::store(at + i * lanes, square[i]);
      } else {
        for (int64_t i = 0; i < some; ++i) V::store(at + i * lanes, square[i] * factor);
      }
    });
  }
}

template <class A, class T, int vectors>
inline void store_tile(T* rows, int64_t stride, int64_t count, int64_t channels, const A* from) {
  using V = Vec<A>;
  constexpr int64_t width = V::width, lanes = vectors * width;
  for (int64_t v = 0; v < vectors; ++v)
    for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
      typename V::Register square[width];
      const A* at = from + c * lanes + v * width;
      T* to = rows + v * width * stride + c;
      if (some == width && count >= (v + 1) * width) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < width; ++i) square[i] = V::load(at + i * lanes);
        V::transpose(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < width; ++i) V::store(to + i * stride, square[i]);
        return;
      }
      for (int64_t i = 0; i < width; ++i) square[i] = i < some ? V::load(at + i * lanes) : V::zero();
      V::transpose(square);
      for (int64_t i = 0; i < width && v * width + i < count; ++i) store_lanes<A>(to + i * stride, square[i], some);
    });
}

// to [rows, lanes] (+)= matrix x tile [depth, lanes], element (i, k) of the matrix at i * row + k * step.
template <class A, int vectors>
inline void multiply_tile(const A* matrix, int64_t row, int64_t step, const A* tile, int64_t rows, int64_t depth, A* to,
                          bool accumulate = false) {
  constexpr int64_t lanes = vectors * Vec<A>::width;
  const LaneProduct<A> product{matrix, row, step, tile, lanes, depth, 1, 0, depth, to, lanes, accumulate};
  if (step == 1) return multiply_lanes<vectors, true>(product, rows);
  multiply_lanes<vectors, false>(product, rows);
}

// f(vector, lane offset) over the vectors of a tile.
template <class A, int vectors, class F>
inline void each_vector(const F& f) {
  for (int v = 0; v < vectors; ++v) f(v, v * Vec<A>::width);
}

// 1 / |x| of every lane. In four chains: one would wait for itself.
template <class A, int vectors>
inline void inverse_lengths(const A* tile, int64_t channels, A* inverse) {
  using V = Vec<A>;
  constexpr int64_t lanes = vectors * V::width;
  each_vector<A, vectors>([&](int, int64_t at) {
    typename V::Register sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto add = [&](typename V::Register& sum, int64_t c) {
      const typename V::Register x = V::load(tile + c * lanes + at);
      sum = V::fma(x, x, sum);
    };
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4)
      for (int64_t i = 0; i < 4; ++i) add(sums[i], c + i);
    for (; c < channels; ++c) add(sums[0], c);
    V::store(inverse + at, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
  for (int64_t i = 0; i < lanes; ++i) inverse[i] = A(1) / square_root(inverse[i]);
}

// The rows that the next tile reads and writes, asked for while this one's exponentials are made.
class TileAhead {
 public:
  explicit TileAhead(int64_t rows) : rows_(rows) {}
  void add(const void* first, int64_t stride, int64_t bytes) {
    operands_[operands_count_++] = {static_cast<const char*>(first), stride, bytes};
  }
  // One of so many looks.
  void look(int64_t looks) {
    for (int64_t left = least(ceil_div(rows_, looks), rows_ - at_); left > 0; --left, ++at_)
      for (int operand = 0; operand < operands_count_; ++operand) {
        Operand& of = operands_[operand];
        for (int64_t byte = 0; byte < of.bytes; byte += 64) __builtin_prefetch(of.row + byte, 0, 2);
        of.row += of.stride;
      }
  }

 private:
  struct Operand {
    const char* row;
    int64_t stride, bytes;  // in bytes; of a row
  };
  Operand operands_[4];
  int operands_count_ = 0;
  int64_t rows_, at_ = 0;  // of every operand
};

// --- forward --------------------------------------------------------------------------------------------------------------
template <class T>
void widen_all(const void* from, int64_t count, void* to) {
  using A = accumulator_t<T>;
  for (int64_t i = 0; i < count; ++i) static_cast<A*>(to)[i] = widen(static_cast<const T*>(from)[i]);
}

template <class A>
void prepare(const HashFunction& f) {
  A* sums = static_cast<A*>(f.anchor_sum);
  for (int64_t c = 0; c < f.channels; ++c) sums[c] = A(0);
  for (int64_t j = 0; j < f.supports; ++j) {
    const A* anchor = static_cast<const A*>(f.anchors) + j * f.channels;
    A square = A(0);
    for (int64_t c = 0; c < f.channels; ++c) {
      square += anchor[c] * anchor[c];
      sums[c] += anchor[c];
    }
    static_cast<A*>(f.squares)[j] = A(1) + square;
  }
}

// Adds rows, each divided by its length, to sums: `count` of them, a vector's lanes at most.
template <bool all, class A, class T>
inline void add_units(const T* x, int64_t stride, int64_t count, int64_t channels, A* sums) {
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t width = V::width;
  Register squares[width];
#pragma GCC unroll 16
  for (int64_t i = 0; i < width; ++i) squares[i] = V::zero();
  const auto add_squares = [&](int64_t c, int64_t some) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < width; ++i) {
      if (!all && i >= count) continue;
      const Register value = load_lanes<A>(x + i * stride + c, some);
      squares[i] = V::fma(value, value, squares[i]);
    }
  };
  for_each_vector<A>(channels, add_squares);
  A inverse[width];
  V::store(inverse, V::sums(squares));
  for (int64_t i = 0; i < width; ++i) inverse[i] = A(1) / square_root(inverse[i]);
  for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
    Register chains[2] = {load_lanes<A>(sums + c, some), V::zero()};
#pragma GCC unroll 16
    for (int64_t i = 0; i < width; ++i) {
      if (!all && i >= count) continue;
      chains[i % 2] = V::fma(load_lanes<A>(x + i * stride + c, some), V::set(inverse[i]), chains[i % 2]);
    }
    store_lanes<A>(sums + c, chains[0] + chains[1], some);
  });
}

template <class T>
void units(const HashRows& call, int64_t begin, int64_t end, void* sum) {
  using A = accumulator_t<T>;
  constexpr int64_t width = Vec<A>::width;
  const int64_t channels = call.function->channels;
  A* sums = static_cast<A*>(sum);
  for (int64_t c = 0; c < channels; ++c) sums[c] = A(0);
  constexpr int64_t rows_ahead = 48;  // hardware asks for no row of the next page, and this loop is soon there
  for (int64_t row = begin; row < end; row += width) {
    const T* x = static_cast<const T*>(call.qk) + row * call.stride;
    LinesAhead ahead{reinterpret_cast<const char*>(x + rows_ahead * call.stride), call.stride * static_cast<int64_t>(sizeof(T)),
                     channels * static_cast<int64_t>(sizeof(T)), least(width, end - row - rows_ahead)};
    while (ahead.rows > 0) ahead.look();
    if (end - row >= width) {
      add_units<true>(x, call.stride, width, channels, sums);
    } else {
      add_units<false>(x, call.stride, end - row, channels, sums);
    }
  }
}

// The dot products of a tile's rows with the anchors become kernels: 2^(bias + dot scale), less the mean where it is given.
template <class A, int vectors>
inline void exponentials(const HashFunction& f, const A* bias, const A* scale, const A* mean, const A* dots, A* to,
                         TileAhead* ahead = nullptr) {
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t lanes = vectors * V::width;
  Register scales[vectors];
  each_vector<A, vectors>([&](int v, int64_t at) { scales[v] = V::load(scale + at); });
  for (int64_t j = 0; j < f.supports; ++j) {
    const Register added = V::set(bias[j]), taken = mean == nullptr ? V::zero() : V::set(mean[j]);
    each_vector<A, vectors>([&](int v, int64_t at) {
      const Register power = exp2<A>(V::fma(V::load(dots + j * lanes + at), scales[v], added));
      V::store(to + j * lanes + at, power - taken);
    });
    if (ahead) ahead->look(f.supports);
  }
}

// The words whose bits are `is_set` of the rows of a tile, of its first `count` lanes.
template <class A, int vectors, class F>
inline void store_bits(const A* tile, int64_t bits, int64_t count, int32_t* to, const F& is_set) {
  using V = Vec<A>;
  constexpr int64_t lanes = vectors * V::width;
  each_vector<A, vectors>([&](int, int64_t at) {
    Words<A> words{}, bit = words + 1;
    for (int64_t r = 0; r < bits; ++r) {
      words |= is_set(V::load(tile + r * lanes + at)) & bit;
      bit += bit;
    }
    if (at < count) store_words<A>(to + at, words, count - at < V::width ? count - at : V::width);
  });
}

// `unordered` becomes all bits in a lane that had a y that is no number.
template <class T, int vectors>
inline void hash_tile(const HashCodes& call, int64_t row, int64_t count, void* tile, Words<accumulator_t<T>>& unordered) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = vectors * V::width;
  const HashRows& rows = call.rows;
  const HashFunction& f = *rows.function;
  A* x = static_cast<A*>(tile);
  A* kernel = x + f.channels * lanes;
  A* y = kernel + f.supports * lanes;
  A scale[lanes];
  load_tile<A, T, vectors>(static_cast<const T*>(rows.qk) + row * rows.stride, rows.stride, count, f.channels, nullptr, x);
  inverse_lengths<A, vectors>(x, f.channels, scale);
  const A per_sigma = static_cast<A>(log2_of_e / rows.sigma);
  for (int64_t i = 0; i < lanes; ++i) scale[i] *= per_sigma;
  multiply_tile<A, vectors>(static_cast<const A*>(f.anchors), f.channels, 1, x, f.supports, f.channels, kernel);
  exponentials<A, vectors>(f, static_cast<const A*>(rows.bias), scale, static_cast<const A*>(f.mean), kernel, kernel);
  multiply_tile<A, vectors>(static_cast<const A*>(f.projection), f.supports, 1, kernel, f.bits, f.supports, y);
  store_bits<A, vectors>(y, f.bits, count, call.codes + row, [&](const typename V::Register& value) {
    unordered |= value != value;
    return value > V::zero();
  });
  if (call.inside != nullptr)
    store_bits<A, vectors>(y, f.bits, count, call.inside + row, [](const typename V::Register& value) {
      return (value < V::set(A(1))) & (value > V::set(A(-1)));
    });
}

// f(row, count, vectors) over tiles of two vectors, the last of one where its rows fit.
template <class A, class F>
inline void each_tile(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t width = Vec<A>::width;
  for (int64_t row = begin; row < end; row += 2 * width) {
    const int64_t count = end - row < 2 * width ? end - row : 2 * width;
    if (count > width) {
      f.template operator()<2>(row, count);
    } else {
      f.template operator()<1>(row, count);
    }
  }
}

template <class T>
bool hash(const HashCodes& call, int64_t begin, int64_t end, void* tile) {
  using A = accumulator_t<T>;
  Words<A> unordered{};
  each_tile<A>(begin, end, [&]<int vectors>(int64_t row, int64_t count) {
    hash_tile<T, vectors>(call, row, count, tile, unordered);
  });
  bool numbers = true;
  for (int i = 0; i < Vec<A>::width; ++i) numbers = numbers && unordered[i] == 0;
  return numbers;
}

// --- backward -------------------------------------------------------------------------------------------------------------
// With e the exponentials without the mean and g' = grad / denominator:
//   grad y = S g' + t z + dS v + dz where it passes,  q = e (projection^T grad y),
//   grad qk = (P - u (u.P)) / |x| with P = anchors^T q / sigma, and sigma's part from the sum of q d / (2 sigma^2).
template <class T, int vectors>
inline accumulator_t<T> backward_tile(const HashBackward& call, int64_t row, int64_t count, int64_t end, void* tile) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t lanes = vectors * V::width;
  const HashRows& rows = call.rows;
  const HashFunction& f = *rows.function;
  const HashState state{f.bits, call.width};
  A* x = static_cast<A*>(tile);
  A* values = x + f.channels * lanes;
  A* dots = values + (call.width > f.supports ? call.width : f.supports) * lanes;
  A* kernel = dots + f.supports * lanes;
  A* of_y = kernel + f.supports * lanes;
  A* of_x = of_y + f.bits * lanes;
  A* inverse_denominator = static_cast<A*>(call.inverse) + row;
  A* slope = static_cast<A*>(call.slope) + row;
  const A* sums = static_cast<const A*>(call.sums);
  const A* slopes = static_cast<const A*>(call.slopes);

  // Of every lane, those past `count` as the last.
  A slope_of[lanes], inverse[lanes], scale[lanes];
  int32_t inside[lanes];
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t at = i < count ? i : count - 1;
    slope_of[i] = slope[at];
    inverse[i] = inverse_denominator[at];
    inside[i] = call.inside[row + at];
  }
  load_tile<A, T, vectors>(static_cast<const T*>(call.grad) + row * call.width, call.width, count, call.width, inverse, values);
  multiply_tile<A, vectors>(sums, call.width, 1, values, f.bits, call.width, of_y);
  load_tile<A, T, vectors>(static_cast<const T*>(call.v) + row * call.v_stride, call.v_stride, count, call.width, nullptr,
                           values);
  multiply_tile<A, vectors>(slopes, call.width, 1, values, f.bits, call.width, of_y, true);
  each_vector<A, vectors>([&](int, int64_t at) {
    const Words<A> words = load_words<A>(inside + at, V::width);
    const Register of_slope = V::load(slope_of + at);
    Words<A> bit = Words<A>{} + 1;
    for (int64_t r = 0; r < f.bits; ++r) {
      A* to = of_y + r * lanes + at;
      const Register gradient = V::fma(of_slope, V::set(sums[state.counts() + r]), V::load(to)) + V::set(slopes[state.counts() + r]);
      const Words<A> passes = (words & bit) != 0;
      V::store(to, reinterpret_cast<Register>(reinterpret_cast<Words<A>>(gradient) & passes));
      bit += bit;
    }
  });

  TileAhead ahead(most(0, least(lanes, end - row - lanes)));
  const auto add = [&](const void* rows_of_head, int64_t stride, int64_t channels) {
    constexpr int64_t bytes = sizeof(T);
    ahead.add(static_cast<const char*>(rows_of_head) + (row + lanes) * stride * bytes, stride * bytes, channels * bytes);
  };
  add(call.grad, call.width, call.width);
  add(call.v, call.v_stride, call.width);
  add(rows.qk, rows.stride, f.channels);
  add(call.grad_qk, f.channels, f.channels);
  load_tile<A, T, vectors>(static_cast<const T*>(rows.qk) + row * rows.stride, rows.stride, count, f.channels, nullptr, x);
  inverse_lengths<A, vectors>(x, f.channels, inverse);
  const A inverse_sigma = static_cast<A>(1 / rows.sigma), per_sigma = static_cast<A>(log2_of_e / rows.sigma);
  for (int64_t i = 0; i < lanes; ++i) scale[i] = inverse[i] * per_sigma;
  multiply_tile<A, vectors>(static_cast<const A*>(f.anchors), f.channels, 1, x, f.supports, f.channels, dots);
  exponentials<A, vectors>(f, static_cast<const A*>(rows.bias), scale, static_cast<const A*>(nullptr), dots, kernel, &ahead);
  A* of_kernel = values;  // which are done with
  multiply_tile<A, vectors>(static_cast<const A*>(f.projection), 1, f.supports, of_y, f.supports, f.bits, of_kernel);
  const A* squares = static_cast<const A*>(f.squares);
  // Vector beside vector, in chains that do not wait for each other.
  Register of_sigma[vectors], dot_sum[vectors], back[vectors], length[vectors], along[vectors][2];
  each_vector<A, vectors>([&](int v, int64_t at) {
    of_sigma[v] = dot_sum[v] = along[v][0] = along[v][1] = V::zero();
    length[v] = V::load(inverse + at);
    back[v] = length[v] * V::set(A(-2));
  });
  for (int64_t j = 0; j < f.supports; ++j)
    each_vector<A, vectors>([&](int v, int64_t at) {
      const Register q = V::load(kernel + j * lanes + at) * V::load(of_kernel + j * lanes + at);
      const Register dot = V::load(dots + j * lanes + at);
      of_sigma[v] = V::fma(q, V::fma(dot, back[v], V::set(squares[j])), of_sigma[v]);
      dot_sum[v] = dot_sum[v] + dot;
      V::store(kernel + j * lanes + at, q);
    });
  A all_of_sigma = A(0);
  each_vector<A, vectors>([&](int v, int64_t at) {
    A lane[V::width];
    V::store(lane, of_sigma[v]);
    for (int64_t i = 0; i < V::width && at + i < count; ++i) all_of_sigma += lane[i];
    V::store(scale + at, dot_sum[v] * length[v] * length[v] * length[v]);  // u.anchor_sum / |x|^2, for `finish`
  });
  multiply_tile<A, vectors>(static_cast<const A*>(f.anchors), 1, f.channels, kernel, f.channels, f.supports, of_x);
  const auto add_along = [&](int64_t c, int chain) {
    each_vector<A, vectors>([&](int v, int64_t at) {
      along[v][chain] = V::fma(V::load(x + c * lanes + at), V::load(of_x + c * lanes + at), along[v][chain]);
    });
  };
  int64_t c = 0;
  for (; c + 2 <= f.channels; c += 2) {
    add_along(c, 0);
    add_along(c + 1, 1);
  }
  if (c < f.channels) add_along(c, 0);
  each_vector<A, vectors>([&](int v, int64_t at) {
    const Register of_row = -(along[v][0] + along[v][1]) * length[v] * length[v], factor = length[v] * V::set(inverse_sigma);
    for (int64_t i = 0; i < f.channels; ++i) {
      A* to = of_x + i * lanes + at;
      V::store(to, V::fma(V::load(x + i * lanes + at), of_row, V::load(to)) * factor);
    }
  });
  store_tile<A, T, vectors>(static_cast<T*>(call.grad_qk) + row * f.channels, f.channels, count, f.channels, of_x);
  memcpy(inverse_denominator, inverse, static_cast<size_t>(count) * sizeof(A));
  memcpy(slope, scale, static_cast<size_t>(count) * sizeof(A));
  return all_of_sigma;
}

template <class T>
double backward(const HashBackward& call, int64_t begin, int64_t end, void* tile) {
  double of_sigma = 0;
  each_tile<accumulator_t<T>>(begin, end, [&]<int vectors>(int64_t row, int64_t count) {
    of_sigma += backward_tile<T, vectors>(call, row, count, end, tile);
  });
  return of_sigma / (2 * call.rows.sigma * call.rows.sigma);
}

template <class T>
void finish(const HashFinish& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  const A* sums = static_cast<const A*>(call.anchor_sum);
  const A factor = static_cast<A>(call.factor);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.qk) + row * call.stride;
    T* to = static_cast<T*>(call.grad_qk) + row * call.channels;
    const typename V::Register of_sum = V::set(factor * static_cast<const A*>(call.inverse)[row]);
    const typename V::Register of_x = V::set(-factor * static_cast<const A*>(call.slope)[row]);
    for_each_vector<A>(call.channels, [&](int64_t c, int64_t some) {
      const typename V::Register part = V::fma(of_x, load_lanes<A>(x + c, some), of_sum * load_lanes<A>(sums + c, some));
      store_lanes<A>(to + c, load_lanes<A>(to + c, some) + part, some);
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

const HashCodesKernels hash_codes_kernels = {
    tile_rows,
    MMK_HASH_BY_TYPE(widen_all),
    {prepare<float>, prepare<float>, prepare<float>, MMK_HASH_DOUBLE(prepare)},
    MMK_HASH_BY_TYPE(units),
    MMK_HASH_BY_TYPE(hash),
    MMK_HASH_BY_TYPE(backward),
    MMK_HASH_BY_TYPE(finish),
};

}  // namespace mmk::MMK_TIER
