// Kernels of the norm and the rotary embedding of queries and keys. Compiled once per tier.
#include "qk_norm_rope.h"

#include "core/rows.h"

namespace mmk::MMK_TIER {
namespace {

// Accumulators of a row: x itself, or its conversion in scratch, padded with zeros to whole vectors.
template <class A, class T>
inline const A* accumulators(const T* x, A* scratch, int64_t channels) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return x;
  } else {
    for_each_vector<A>(channels, [&](int64_t i, int64_t lanes) { Vec<A>::store(scratch + i, load_lanes<A>(x + i, lanes)); });
    return scratch;
  }
}

// A run of tokens: where they are, and their angles in accumulators. `interleaved`: cos is there twice and sin too, first
// negative, as the two channels of a pair take them.
template <class T, bool interleaved>
struct Run {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  const QkNormRope& call;
  A* const scratch;
  int64_t sample[qk_run_tokens], token[qk_run_tokens];

  Run(const QkNormRope& problem, void* memory) : call(problem), scratch(static_cast<A*>(memory)) {}

  A* cos(int64_t t) const { return row(2 * t); }
  A* sin(int64_t t) const { return row(2 * t + 1); }
  A* x(int64_t r) const { return row(2 * (qk_run_tokens + r)); }
  A* gradient(int64_t r) const { return row(2 * (qk_run_tokens + r) + 1); }

  // visit(side, head, first, count) for each block of rows of the tokens: those of `count` tokens of a run from `first` on.
  template <class F>
  void for_each_block(int64_t begin, int64_t end, const F& visit) {
    for (int64_t from = begin; from < end; from += qk_run_tokens) {
      const int64_t tokens = end - from < qk_run_tokens ? end - from : qk_run_tokens;
      move(from, tokens);
      for (int s = 0; s < call.sides; ++s)
        for (int64_t head = 0; head < call.side[s].heads; ++head)
          for (int64_t first = 0; first < tokens; first += call.block_rows)
            visit(s, head, first, tokens - first < call.block_rows ? tokens - first : call.block_rows);
    }
  }

  int64_t offset(const HeadRows& rows, int64_t t, int64_t head) const {
    return sample[t] * rows.sample + head * rows.head + token[t] * rows.token;
  }

  // Of a contiguous [B, H, L, D].
  int64_t offset_out(int64_t heads, int64_t t, int64_t head) const {
    return ((sample[t] * heads + head) * call.length + token[t]) * call.channels;
  }

 private:
  void move(int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      sample[t] = (first + t) / call.length;
      token[t] = (first + t) % call.length;
      if (call.pairs == 0) continue;
      if (call.wide_angles) {
        arrange<A>(t);
      } else {
        arrange<T>(t);
      }
    }
  }

  A* row(int64_t index) const { return scratch + index * call.scratch_row; }

  template <class Angle>
  const Angle* angles_of(const RopeAngles& angles, int64_t t) const {
    return static_cast<const Angle*>(angles.data) + sample[t] * angles.sample + token[t] * angles.token;
  }

  template <class Angle>
  void arrange(int64_t t) const {
    const Angle* from_cos = angles_of<Angle>(call.cos, t);
    const Angle* from_sin = angles_of<Angle>(call.sin, t);
    A* to_cos = cos(t);
    A* to_sin = sin(t);
    if constexpr (interleaved) {
      for (int64_t i = 0; i < call.pairs; ++i) {
        to_cos[2 * i] = to_cos[2 * i + 1] = widen(from_cos[i]);
        to_sin[2 * i + 1] = widen(from_sin[i]);
        to_sin[2 * i] = -to_sin[2 * i + 1];
      }
    } else {
      for_each_vector<A>(call.pairs, [&](int64_t i, int64_t lanes) {
        V::store(to_cos + i, load_lanes<A>(from_cos + i, lanes));
        V::store(to_sin + i, load_lanes<A>(from_sin + i, lanes));
      });
    }
  }
};

// normed = (x - mean) rstd; `share`: the gradient of x loses `share` times sum(g normed) along normed.
template <class A>
struct Statistics {
  A mean[qk_max_block_rows], rstd[qk_max_block_rows], share[qk_max_block_rows];
};

// Of `count` rows, in passes over all of them, so that no row waits for its own sums.
template <class A>
inline void measure(const QkNormRope& call, const A* const* x, int64_t count, Statistics<A>& of) {
  using V = Vec<A>;
  using Register = typename V::Register;
  const int64_t channels = call.channels;
  const A size = static_cast<A>(channels), eps = static_cast<A>(call.eps);
  for (int64_t r = 0; r < count; ++r) {
    of.mean[r] = of.share[r] = A(0);
    of.rstd[r] = A(1);
  }
  if (call.norm == QkNorm::none) return;
  A squares[qk_max_block_rows];
  if (call.norm == QkNorm::layer) {
    for (int64_t r = 0; r < count; ++r) {
      of.mean[r] = sum_over<A>(channels, [&](Register sum, int64_t i, int64_t lanes) {
        return sum + load_lanes<A>(x[r] + i, lanes);
      });
    }
    for (int64_t r = 0; r < count; ++r) of.mean[r] /= size;
    for (int64_t r = 0; r < count; ++r) {
      const Register mean = V::set(of.mean[r]);
      squares[r] = sum_over<A>(channels, [&](Register sum, int64_t i, int64_t lanes) {
        const Register value = load_centred<A>(x[r] + i, mean, lanes);
        return V::fma(value, value, sum);
      });
    }
  } else {
    for (int64_t r = 0; r < count; ++r) {
      squares[r] = sum_over<A>(channels, [&](Register sum, int64_t i, int64_t lanes) {
        const Register value = load_lanes<A>(x[r] + i, lanes);
        return V::fma(value, value, sum);
      });
    }
  }
  if (call.norm == QkNorm::l2) {
    for (int64_t r = 0; r < count; ++r) {
      const A length = square_root(squares[r]);
      const bool clamped = length < eps;
      of.rstd[r] = A(1) / (clamped ? eps : length);
      of.share[r] = clamped ? A(0) : A(1);
    }
  } else {
    for (int64_t r = 0; r < count; ++r) {
      of.rstd[r] = A(1) / square_root(squares[r] / size + eps);
      of.share[r] = A(1) / size;
    }
  }
}

// store_lanes, which GCC 12 would call as a function for each vector of half precision: a third of the forward pass.
template <class A, class T>
__attribute__((always_inline)) inline void put(T* to, typename Vec<A>::Register value, int64_t lanes) {
  if (lanes == Vec<A>::width) {
    Vec<A>::store(to, value);
  } else {
    store_part<A>(to, value, lanes);
  }
}

// Turns the pairs of a row, or (`back`) turns them back: read(i, lanes) gives its channels, write(i, value, lanes) takes
// what becomes of them. Channels that are not rotated pass.
template <bool interleaved, bool back, class A, class Read, class Write>
inline void rotate(const QkNormRope& call, const A* cos, const A* sin, const Read& read, const Write& write) {
  using V = Vec<A>;
  using Register = typename V::Register;
  const int64_t pairs = call.pairs;
  if constexpr (interleaved) {
    for_each_vector<A>(2 * pairs, [&](int64_t i, int64_t lanes) {
      const Register value = read(i, lanes);
      const Register kept = value * load_lanes<A>(cos + i, lanes);
      const Register turned = V::swap_neighbours(value) * load_lanes<A>(sin + i, lanes);
      write(i, back ? kept - turned : kept + turned, lanes);
    });
  } else {
    for_each_vector<A>(pairs, [&](int64_t i, int64_t lanes) {
      const Register first = read(i, lanes), second = read(pairs + i, lanes);
      const Register c = load_lanes<A>(cos + i, lanes), s = load_lanes<A>(sin + i, lanes);
      write(i, back ? first * c + second * s : first * c - second * s, lanes);
      write(pairs + i, back ? second * c - first * s : second * c + first * s, lanes);
    });
  }
  for_each_vector<A>(call.channels - 2 * pairs, [&](int64_t i, int64_t lanes) {
    write(2 * pairs + i, read(2 * pairs + i, lanes), lanes);
  });
}

// Passes over each block of rows. No bit depends on which rows share a block.
template <class T, bool interleaved>
void forward(const QkNormRope& call, int64_t begin, int64_t end, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  Run<T, interleaved> run(call, scratch);
  const A* x[qk_max_block_rows];
  Statistics<A> of;
  run.for_each_block(begin, end, [&](int s, int64_t head, int64_t first, int64_t count) {
    const QkSide& side = call.side[s];
    const A* weight = static_cast<const A*>(side.weight);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = static_cast<const T*>(side.x.data) + run.offset(side.x, first + r, head);
      x[r] = accumulators<A>(row, run.x(r), call.channels);
    }
    measure<A>(call, x, count, of);
    for (int64_t r = 0; r < count; ++r) {
      T* out = static_cast<T*>(side.out) + run.offset_out(side.heads, first + r, head);
      const A* row = x[r];
      const Register mean = V::set(of.mean[r]), rstd = V::set(of.rstd[r]);
      const auto rotate_row = [&](auto hat) {
        const A* cos = run.cos(first + r);
        const A* sin = run.sin(first + r);
        const auto write = [&](int64_t i, Register value, int64_t lanes) { put<A>(out + i, value, lanes); };
        const auto weighted = [&](int64_t i, int64_t lanes) { return hat(i, lanes) * load_lanes<A>(weight + i, lanes); };
        if (weight == nullptr) {
          rotate<interleaved, false>(call, cos, sin, hat, write);
        } else {
          rotate<interleaved, false>(call, cos, sin, weighted, write);
        }
      };
      if (call.norm == QkNorm::layer) {
        rotate_row([&](int64_t i, int64_t lanes) { return (load_lanes<A>(row + i, lanes) - mean) * rstd; });
      } else {
        rotate_row([&](int64_t i, int64_t lanes) { return load_lanes<A>(row + i, lanes) * rstd; });
      }
    }
  });
}

// With h the normalised row, u the gradient turned back and g = u weight:
//   gradient of x = rstd (g - share h sum(g h)), for LayerNorm also less rstd mean(g);  gradient of weight = sum u h.
template <class T, bool interleaved>
void backward(const QkNormRope& call, int64_t begin_piece, int64_t end_piece, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const int64_t channels = call.channels;
  Run<T, interleaved> run(call, scratch);
  const A* x[qk_max_block_rows];
  Statistics<A> of;
  Sums<A> sums[qk_max_block_rows];
  for (int64_t piece = begin_piece; piece < end_piece; ++piece) {
    A* sum_weight[2] = {nullptr, nullptr};
    for (int s = 0; s < call.sides; ++s) {
      if (call.side[s].sum_weight == nullptr) continue;
      sum_weight[s] = static_cast<A*>(call.side[s].sum_weight) + piece * channels;
      memset(sum_weight[s], 0, static_cast<size_t>(channels) * sizeof(A));
    }
    const int64_t begin = call.tokens * piece / call.pieces, end = call.tokens * (piece + 1) / call.pieces;
    run.for_each_block(begin, end, [&](int s, int64_t head, int64_t first, int64_t count) {
      const QkSide& side = call.side[s];
      const A* weight = static_cast<const A*>(side.weight);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = static_cast<const T*>(side.x.data) + run.offset(side.x, first + r, head);
        const T* upstream = static_cast<const T*>(side.gradient.data) + run.offset(side.gradient, first + r, head);
        x[r] = accumulators<A>(row, run.x(r), channels);
        A* u = run.gradient(r);
        rotate<interleaved, true>(
            call, run.cos(first + r), run.sin(first + r),
            [&](int64_t i, int64_t lanes) { return load_lanes<A>(upstream + i, lanes); },
            [&](int64_t i, Register value, int64_t lanes) { store_lanes<A>(u + i, value, lanes); });
      }
      measure<A>(call, x, count, of);
      for (int64_t r = 0; r < count; ++r) {
        const Register mean = V::set(of.mean[r]), rstd = V::set(of.rstd[r]);
        const A* u = run.gradient(r);
        sums[r] = sums_over<A>(channels, [&](Register& sum_g, Register& sum_gh, int64_t i, int64_t lanes) {
          Register g = load_lanes<A>(u + i, lanes);
          if (weight != nullptr) g = g * load_lanes<A>(weight + i, lanes);
          sum_g = sum_g + g;
          sum_gh = V::fma(g, (load_lanes<A>(x[r] + i, lanes) - mean) * rstd, sum_gh);
        });
      }
      for (int64_t r = 0; r < count; ++r) {
        T* out = static_cast<T*>(side.out) + run.offset_out(side.heads, first + r, head);
        const A* u = run.gradient(r);
        const Register mean = V::set(of.mean[r]), rstd = V::set(of.rstd[r]);
        const Register mean_g = V::set(call.norm == QkNorm::layer ? sums[r].first * of.share[r] : A(0));
        const Register along = V::set(sums[r].second * of.share[r]);
        for_each_vector<A>(channels, [&](int64_t i, int64_t lanes) {
          const Register h = (load_lanes<A>(x[r] + i, lanes) - mean) * rstd, raw = load_lanes<A>(u + i, lanes);
          const Register g = weight == nullptr ? raw : raw * load_lanes<A>(weight + i, lanes);
          if (sum_weight[s] != nullptr) {
            A* sum = sum_weight[s] + i;
            store_lanes<A>(sum, V::fma(raw, h, load_lanes<A>(sum, lanes)), lanes);
          }
          put<A>(out + i, ((g - mean_g) - h * along) * rstd, lanes);
        });
      }
    });
  }
}

}  // namespace

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
#define MMK_OF_DOUBLE(...) __VA_ARGS__
#else
#define MMK_OF_DOUBLE(...) nullptr
#endif
#define MMK_BY_TYPE(kernel, interleaved)                                                           \
  {                                                                                                \
    kernel<float, interleaved>, kernel<bfloat16, interleaved>, kernel<float16, interleaved>,       \
        MMK_OF_DOUBLE(kernel<double, interleaved>)                                                 \
  }

const QkNormRopeKernels qk_norm_rope_kernels = {
    {MMK_BY_TYPE(forward, false), MMK_BY_TYPE(forward, true)},
    {MMK_BY_TYPE(backward, false), MMK_BY_TYPE(backward, true)},
};

}  // namespace mmk::MMK_TIER
