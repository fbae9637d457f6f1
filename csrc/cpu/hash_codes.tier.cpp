// Codes of tokens by kernelised hashing, and the way back through them. Tiles of rows lie across the lanes, so that every
// product is one of a small matrix (supports, projection, S) with the tile, and nothing is as long as the rows.
#include "hash_attention.h"

#include "core/lane_product.h"
#include "core/math.h"
#include "core/rows.h"

namespace mmk::MMK_TIER {
namespace {

constexpr int64_t tile_rows = 2 * Vec<float>::width;  // doubles have fewer

// --- tiles ----------------------------------------------------------------------------------------------------------------
// Rows [begin, begin + count) as columns: to [channels, vectors * width]. Lanes past `count` repeat the last row.
template <class A, class T, int vectors>
inline void load_tile(const T* rows, int64_t stride, int64_t count, int64_t channels, const A* scale, A* to) {
  using V = Vec<A>;
  constexpr int64_t width = V::width, lanes = vectors * width;
  for (int64_t v = 0; v < vectors; ++v)
    for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
      typename V::Register square[width];
      for (int64_t i = 0; i < width; ++i) {
        const int64_t row = v * width + i < count ? v * width + i : count - 1;
        square[i] = load_lanes<A>(rows + row * stride + c, some);
        if (scale != nullptr) square[i] = square[i] * V::set(scale[row]);
      }
      V::transpose(square);
      for (int64_t i = 0; i < some; ++i) V::store(to + (c + i) * lanes + v * width, square[i]);
    });
}

template <class A, class T, int vectors>
inline void store_tile(T* rows, int64_t stride, int64_t count, int64_t channels, const A* from) {
  using V = Vec<A>;
  constexpr int64_t width = V::width, lanes = vectors * width;
  for (int64_t v = 0; v < vectors; ++v)
    for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
      typename V::Register square[width];
      for (int64_t i = 0; i < width; ++i) square[i] = i < some ? V::load(from + (c + i) * lanes + v * width) : V::zero();
      V::transpose(square);
      for (int64_t i = 0; i < width && v * width + i < count; ++i)
        store_lanes<A>(rows + (v * width + i) * stride + c, square[i], some);
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

// 1 / |x| of every lane.
template <class A, int vectors>
inline void inverse_lengths(const A* tile, int64_t channels, A* inverse) {
  using V = Vec<A>;
  constexpr int64_t lanes = vectors * V::width;
  each_vector<A, vectors>([&](int, int64_t at) {
    typename V::Register sum = V::zero();
    for (int64_t c = 0; c < channels; ++c) {
      const typename V::Register x = V::load(tile + c * lanes + at);
      sum = V::fma(x, x, sum);
    }
    V::store(inverse + at, sum);
  });
  for (int64_t i = 0; i < lanes; ++i) inverse[i] = A(1) / square_root(inverse[i]);
}

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

template <class T>
void units(const HashRows& call, int64_t begin, int64_t end, void* sum) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t width = V::width;
  const int64_t channels = call.function->channels;
  A* sums = static_cast<A*>(sum);
  for (int64_t c = 0; c < channels; ++c) sums[c] = A(0);
  for (int64_t row = begin; row < end; row += width) {
    const int64_t count = end - row < width ? end - row : width;
    const T* x = static_cast<const T*>(call.qk) + row * call.stride;
    Register squares[width];
    for (int64_t i = 0; i < width; ++i) squares[i] = V::zero();
    for (int64_t i = 0; i < count; ++i)
      for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
        const Register value = load_lanes<A>(x + i * call.stride + c, some);
        squares[i] = V::fma(value, value, squares[i]);
      });
    V::transpose(squares);
    for (int64_t step = width / 2; step > 0; step /= 2)
      for (int64_t i = 0; i < step; ++i) squares[i] = squares[i] + squares[i + step];
    A inverse[width];
    V::store(inverse, squares[0]);
    for (int64_t i = 0; i < width; ++i) inverse[i] = A(1) / square_root(inverse[i]);
    for_each_vector<A>(channels, [&](int64_t c, int64_t some) {
      Register total = load_lanes<A>(sums + c, some);
      for (int64_t i = 0; i < count; ++i)
        total = V::fma(load_lanes<A>(x + i * call.stride + c, some), V::set(inverse[i]), total);
      store_lanes<A>(sums + c, total, some);
    });
  }
}

// The dot products of a tile's rows with the anchors become kernels: exp(bias + dot scale), less the mean where it is given.
template <class A, int vectors>
inline void exponentials(const HashFunction& f, const A* bias, const A* scale, const A* mean, const A* dots, A* to) {
  using V = Vec<A>;
  constexpr int64_t lanes = vectors * V::width;
  for (int64_t j = 0; j < f.supports; ++j)
    each_vector<A, vectors>([&](int, int64_t at) {
      const typename V::Register dot = V::load(dots + j * lanes + at);
      const typename V::Register power = exp<A>(V::fma(dot, V::load(scale + at), V::set(bias[j])));
      V::store(to + j * lanes + at, mean == nullptr ? power : power - V::set(mean[j]));
    });
}

template <class T, int vectors>
inline bool hash_tile(const HashCodes& call, int64_t row, int64_t count, void* tile) {
  using A = accumulator_t<T>;
  constexpr int64_t lanes = vectors * Vec<A>::width;
  const HashRows& rows = call.rows;
  const HashFunction& f = *rows.function;
  A* x = static_cast<A*>(tile);
  A* kernel = x + f.channels * lanes;
  A* y = kernel + f.supports * lanes;
  A scale[lanes];
  load_tile<A, T, vectors>(static_cast<const T*>(rows.qk) + row * rows.stride, rows.stride, count, f.channels, nullptr, x);
  inverse_lengths<A, vectors>(x, f.channels, scale);
  const A inverse_sigma = static_cast<A>(1 / rows.sigma);
  for (int64_t i = 0; i < lanes; ++i) scale[i] *= inverse_sigma;
  multiply_tile<A, vectors>(static_cast<const A*>(f.anchors), f.channels, 1, x, f.supports, f.channels, kernel);
  exponentials<A, vectors>(f, static_cast<const A*>(rows.bias), scale, static_cast<const A*>(f.mean), kernel, kernel);
  multiply_tile<A, vectors>(static_cast<const A*>(f.projection), f.supports, 1, kernel, f.bits, f.supports, y);
  uint32_t codes[lanes] = {}, inside[lanes] = {}, unordered[lanes] = {};
  for (int64_t r = 0; r < f.bits; ++r)
    for (int64_t i = 0; i < lanes; ++i) {
      const A value = y[r * lanes + i];
      codes[i] |= static_cast<uint32_t>(value > A(0)) << r;
      unordered[i] |= static_cast<uint32_t>(value != value);
    }
  if (call.inside != nullptr) {
    for (int64_t r = 0; r < f.bits; ++r)
      for (int64_t i = 0; i < lanes; ++i)
        inside[i] |= static_cast<uint32_t>((y[r * lanes + i] < A(1)) & (y[r * lanes + i] > A(-1))) << r;
    memcpy(call.inside + row, inside, static_cast<size_t>(count) * sizeof(int32_t));
  }
  memcpy(call.codes + row, codes, static_cast<size_t>(count) * sizeof(int32_t));
  uint32_t any = 0;
  for (int64_t i = 0; i < lanes; ++i) any |= unordered[i];
  return any == 0;
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
  bool numbers = true;
  each_tile<accumulator_t<T>>(begin, end, [&]<int vectors>(int64_t row, int64_t count) {
    numbers &= hash_tile<T, vectors>(call, row, count, tile);
  });
  return numbers;
}

// --- backward -------------------------------------------------------------------------------------------------------------
// With e the exponentials without the mean and g' = grad / denominator:
//   grad y = S g' + t z + dS v + dz where it passes,  q = e (projection^T grad y),
//   grad qk = (P - u (u.P)) / |x| with P = anchors^T q / sigma, and sigma's part from the sum of q d / (2 sigma^2).
template <class T, int vectors>
inline accumulator_t<T> backward_tile(const HashBackward& call, int64_t row, int64_t count, void* tile) {
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

  load_tile<A, T, vectors>(static_cast<const T*>(call.grad) + row * call.width, call.width, count, call.width,
                           inverse_denominator, values);
  multiply_tile<A, vectors>(sums, call.width, 1, values, f.bits, call.width, of_y);
  load_tile<A, T, vectors>(static_cast<const T*>(call.v) + row * call.v_stride, call.v_stride, count, call.width, nullptr,
                           values);
  multiply_tile<A, vectors>(slopes, call.width, 1, values, f.bits, call.width, of_y, true);
  A slope_of[lanes], inverse[lanes], scale[lanes];
  uint32_t inside[lanes] = {};
  for (int64_t i = 0; i < lanes; ++i) slope_of[i] = slope[i < count ? i : count - 1];
  memcpy(inside, call.inside + row, static_cast<size_t>(count) * sizeof(int32_t));
  for (int64_t r = 0; r < f.bits; ++r) {
    const A z = sums[state.counts() + r], of_z = slopes[state.counts() + r];
    for (int64_t i = 0; i < lanes; ++i) {
      const A gradient = of_y[r * lanes + i] + slope_of[i] * z + of_z;
      of_y[r * lanes + i] = (inside[i] >> r & 1u) != 0 ? gradient : A(0);
    }
  }

  load_tile<A, T, vectors>(static_cast<const T*>(rows.qk) + row * rows.stride, rows.stride, count, f.channels, nullptr, x);
  inverse_lengths<A, vectors>(x, f.channels, inverse);
  const A inverse_sigma = static_cast<A>(1 / rows.sigma);
  for (int64_t i = 0; i < lanes; ++i) scale[i] = inverse[i] * inverse_sigma;
  multiply_tile<A, vectors>(static_cast<const A*>(f.anchors), f.channels, 1, x, f.supports, f.channels, dots);
  exponentials<A, vectors>(f, static_cast<const A*>(rows.bias), scale, static_cast<const A*>(nullptr), dots, kernel);
  A* of_kernel = values;  // which are done with
  multiply_tile<A, vectors>(static_cast<const A*>(f.projection), 1, f.supports, of_y, f.supports, f.bits, of_kernel);
  const A* squares = static_cast<const A*>(f.squares);
  A all_of_sigma = A(0);
  each_vector<A, vectors>([&](int v, int64_t at) {
    Register of_sigma = V::zero(), dot_sum = V::zero();
    const Register back = V::load(inverse + at) * V::set(A(-2));
    for (int64_t j = 0; j < f.supports; ++j) {
      const Register q = V::load(kernel + j * lanes + at) * V::load(of_kernel + j * lanes + at);
      const Register dot = V::load(dots + j * lanes + at);
      of_sigma = V::fma(q, V::fma(dot, back, V::set(squares[j])), of_sigma);
      dot_sum = dot_sum + dot;
      V::store(kernel + j * lanes + at, q);
    }
    A lane[V::width];
    V::store(lane, of_sigma);
    for (int64_t i = 0; i < V::width && v * V::width + i < count; ++i) all_of_sigma += lane[i];
    // u.anchor_sum / |x|^2, for `finish`
    const Register length = V::load(inverse + at);
    V::store(scale + at, dot_sum * length * length * length);
  });
  multiply_tile<A, vectors>(static_cast<const A*>(f.anchors), 1, f.channels, kernel, f.channels, f.supports, of_x);
  each_vector<A, vectors>([&](int, int64_t at) {
    const Register length = V::load(inverse + at);
    Register along = V::zero();
    for (int64_t c = 0; c < f.channels; ++c)
      along = V::fma(V::load(x + c * lanes + at), V::load(of_x + c * lanes + at), along);
    along = -along * length * length;
    const Register factor = length * V::set(inverse_sigma);
    for (int64_t c = 0; c < f.channels; ++c) {
      A* to = of_x + c * lanes + at;
      V::store(to, V::fma(V::load(x + c * lanes + at), along, V::load(to)) * factor);
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
    of_sigma += backward_tile<T, vectors>(call, row, count, tile);
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
