// Kernels of normalisation with what stands around it: residual and gate before, scale and shift after. Compiled once per
// tier.
#include "norm.h"

#include "core/integers.h"
#include "core/rows.h"

namespace mmk::MMK_TIER {
namespace {

// Rows that a forward kernel takes at once.
inline int64_t norm_block_rows(int64_t channels) {
  const int64_t rows = norm_block_elements / channels;
  return rows < 1 ? 1 : rows > norm_max_block_rows ? norm_max_block_rows : rows;
}

// A row of scratch in accumulators: whole cache lines.
template <class A>
inline int64_t scratch_row(int64_t channels) {
  constexpr int64_t line = 64 / sizeof(A);
  return rounded_up(channels, line);
}

// Lanes of vectors that are accumulators or of type T.
template <class T>
inline typename Vec<accumulator_t<T>>::Register load_either(const void* from, bool wide, int64_t i, int64_t lanes) {
  using A = accumulator_t<T>;
  return wide ? load_lanes<A>(static_cast<const A*>(from) + i, lanes) : load_lanes<A>(static_cast<const T*>(from) + i, lanes);
}

template <class T>
inline void store_either(void* to, bool wide, int64_t i, typename Vec<accumulator_t<T>>::Register value, int64_t lanes) {
  using A = accumulator_t<T>;
  if (wide) {
    store_lanes<A>(static_cast<A*>(to) + i, value, lanes);
  } else {
    store_lanes<A>(static_cast<T*>(to) + i, value, lanes);
  }
}

template <class T>
inline const void* row_of(const NormVectors& vectors, int64_t offset) {
  using A = accumulator_t<T>;
  if (vectors.wide) return static_cast<const A*>(vectors.data) + offset;
  return static_cast<const T*>(vectors.data) + offset;
}

// Two registers of vectors that are accumulators or of type T.
template <class T, bool split>
inline void load_either_pair(const void* from, bool wide, int64_t i, typename Vec<accumulator_t<T>>::Register& a,
                             typename Vec<accumulator_t<T>>::Register& b) {
  using A = accumulator_t<T>;
  if (wide) {
    Vec<A>::template load_pair<false>(static_cast<const A*>(from) + i, a, b);
    if constexpr (split) Vec<A>::split(a, b);
  } else {
    Vec<A>::template load_pair<split>(static_cast<const T*>(from) + i, a, b);
  }
}

// a and c of normed = h a + c, null where they are 1 and 0; `split`: their pairs of registers are. Without scale and shift
// these are weight and bias; with them they are made in scratch, once for all rows in a run that share them.
template <class T, bool split>
struct Affine {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const A* factor;
  const A* offset;
  A* made_factor;
  A* made_offset;
  int64_t scale_row = -1, shift_row = -1;

  template <class Call>
  Affine(const Call& call, A* scratch)
      : factor(static_cast<const A*>(call.weight)),
        offset(static_cast<const A*>(call.bias)),
        made_factor(scratch),
        made_offset(scratch + scratch_row<A>(call.channels)) {
    if (!split || call.scale.data != nullptr) return;
    factor = arranged(factor, made_factor, call.channels);
    offset = arranged(offset, made_offset, call.channels);
  }

  template <class Call>
  void move(const Call& call, const RowWalk<norm_operands>& at) {
    if (call.scale.data == nullptr || (scale_row == at.offset[of_scale] && shift_row == at.offset[of_shift])) return;
    scale_row = at.offset[of_scale];
    shift_row = at.offset[of_shift];
    const void* scale = row_of<T>(call.scale, scale_row);
    const void* shift = row_of<T>(call.shift, shift_row);
    const A* weight = static_cast<const A*>(call.weight);
    const A* bias = static_cast<const A*>(call.bias);
    const Register base = V::set(static_cast<A>(call.scale_offset));
    for_each_vector<A>(call.channels, [&](int64_t i, int64_t lanes) {
      const Register scaled = base + load_either<T>(scale, call.scale.wide, i, lanes);
      Register moved = load_either<T>(shift, call.shift.wide, i, lanes);
      if (bias != nullptr) moved = V::fma(load_lanes<A>(bias + i, lanes), scaled, moved);
      // Scratch is padded: whole vectors may be stored.
      V::store(made_factor + i, weight == nullptr ? scaled : load_lanes<A>(weight + i, lanes) * scaled);
      V::store(made_offset + i, moved);
    });
    factor = arranged(made_factor, made_factor, call.channels);
    offset = arranged(made_offset, made_offset, call.channels);
  }

 private:
  static const A* arranged(const A* from, A* to, int64_t channels) {
    if (!split || from == nullptr) return from;
    int64_t i = 0;
    for (; i + 2 * V::width <= channels; i += 2 * V::width) {
      Register a = V::load(from + i), b = V::load(from + i + V::width);
      V::split(a, b);
      V::store(to + i, a);
      V::store(to + i + V::width, b);
    }
    if (from != to) memcpy(to + i, from + i, static_cast<size_t>(channels - i) * sizeof(A));
    return to;
  }
};

// T: x and summed; N: normed. Rows are taken in blocks that stay in the first-level cache, in three passes over the block,
// so that short rows do not wait for one another's sums. The first pass reads from memory and leaves accumulators: each
// element is converted once. No bit depends on which rows share a block.
template <class T, class N, bool rms>
void forward(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t width = V::width;
  constexpr bool is_whole = sizeof(T) == sizeof(A);
  constexpr bool split = sizeof(T) == sizeof(N) && V::template splits<T>();
  const int64_t channels = call.channels, buffer_row = scratch_row<A>(channels);
  const int64_t block = norm_block_rows(channels);
  const bool stream = call.stream && rows_aligned<N, 1 + split>(call.normed, channels) &&
                      (call.summed == nullptr || rows_aligned<T, 1 + split>(call.summed, channels));
  A* const buffers = static_cast<A*>(scratch);
  Affine<T, split> affine(call, buffers + block * buffer_row);
  RowWalk<norm_operands> at(call.rows, begin), modulated(call.rows, begin);
  const A* values[norm_max_block_rows];
  A means[norm_max_block_rows], rstds[norm_max_block_rows];
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = end - first < block ? end - first : block;
    for (int64_t r = 0; r < count; ++r, at.next()) {
      const T* x = static_cast<const T*>(call.x) + at.offset[of_x];
      A* const buffer = buffers + r * buffer_row;
      values[r] = buffer;
      const auto accumulate = [](Register sum, Register value) { return rms ? V::fma(value, value, sum) : sum + value; };
      A total;
      if (call.residual == nullptr) {
        if constexpr (is_whole) values[r] = x;
        total = sum_over_pairs<A>(
            channels,
            [&](Register& sum_a, Register& sum_b, int64_t i) {
              Register a, b;
              V::template load_pair<split>(x + i, a, b);
              if constexpr (!is_whole) V::template store_pair<false>(buffer + i, a, b);
              sum_a = accumulate(sum_a, a);
              sum_b = accumulate(sum_b, b);
            },
            [&](Register sum, int64_t i, int64_t lanes) {
              const Register value = load_lanes<A>(x + i, lanes);
              if constexpr (!is_whole) V::store(buffer + i, value);
              return accumulate(sum, value);
            });
      } else {
        const T* residual = static_cast<const T*>(call.residual) + at.offset[of_residual];
        T* summed = static_cast<T*>(call.summed) + (first + r) * channels;
        if (is_whole && !stream) values[r] = reinterpret_cast<const A*>(summed);
        // Sums by added_pair and added: the residual and what the gate makes of x.
        const auto sum_up = [&](auto added_pair, auto added) {
          return sum_over_pairs<A>(
              channels,
              [&](Register& sum_a, Register& sum_b, int64_t i) {
                Register a, b;
                added_pair(i, a, b);
                if (stream) {
                  V::template stream_pair_rounded<split>(summed + i, a, b);
                } else {
                  V::template store_pair_rounded<split>(summed + i, a, b);
                }
                if (!is_whole || stream) V::template store_pair<false>(buffer + i, a, b);
                sum_a = accumulate(sum_a, a);
                sum_b = accumulate(sum_b, b);
              },
              [&](Register sum, int64_t i, int64_t lanes) {
                Register value = added(i, lanes);
                if (stream) {
                  value = V::stream_rounded(summed + i, value);
                } else {
                  T rounded[width];
                  value = V::store_rounded(rounded, value);
                  memcpy(summed + i, rounded, static_cast<size_t>(lanes) * sizeof(T));
                }
                if (!is_whole || stream) V::store(buffer + i, value);
                return accumulate(sum, value);
              });
        };
        const auto residual_pair = [&](int64_t i, Register& a, Register& b) {
          V::template load_pair<split>(residual + i, a, b);
        };
        if (call.gate.data == nullptr) {
          total = sum_up(
              [&](int64_t i, Register& a, Register& b) {
                Register residual_a, residual_b;
                residual_pair(i, residual_a, residual_b);
                V::template load_pair<split>(x + i, a, b);
                a = a + residual_a;
                b = b + residual_b;
              },
              [&](int64_t i, int64_t lanes) { return load_lanes<A>(x + i, lanes) + load_lanes<A>(residual + i, lanes); });
        } else {
          const void* gate = row_of<T>(call.gate, at.offset[of_gate]);
          total = sum_up(
              [&](int64_t i, Register& a, Register& b) {
                Register residual_a, residual_b, gate_a, gate_b;
                residual_pair(i, residual_a, residual_b);
                load_either_pair<T, split>(gate, call.gate.wide, i, gate_a, gate_b);
                V::template load_pair<split>(x + i, a, b);
                a = V::fma(gate_a, a, residual_a);
                b = V::fma(gate_b, b, residual_b);
              },
              [&](int64_t i, int64_t lanes) {
                return V::fma(load_either<T>(gate, call.gate.wide, i, lanes), load_lanes<A>(x + i, lanes),
                              load_lanes<A>(residual + i, lanes));
              });
        }
      }
      means[r] = total / static_cast<A>(channels);
    }

    for (int64_t r = 0; r < count; ++r) {
      A square = means[r];
      if constexpr (!rms) {
        const Register mean = V::set(means[r]);
        const A* row = values[r];
        square = sum_over<A>(channels, [&](Register sum, int64_t i, int64_t lanes) {
                   const Register centred = load_centred<A>(row + i, mean, lanes);
                   return V::fma(centred, centred, sum);
                 }) / static_cast<A>(channels);
        static_cast<A*>(call.mean)[first + r] = means[r];
      }
      rstds[r] = A(1) / square_root(square + static_cast<A>(call.eps));
      static_cast<A*>(call.rstd)[first + r] = rstds[r];
    }

    for (int64_t r = 0; r < count; ++r) {
      if (call.scale.data != nullptr) {
        affine.move(call, modulated);
        modulated.next();
      }
      const A* row = values[r];
      const A* factor = affine.factor;
      const A* offset = affine.offset;
      N* normed = static_cast<N*>(call.normed) + (first + r) * channels;
      const Register mean = V::set(means[r]), rstd = V::set(rstds[r]);
      const auto hat = [&](int64_t i, int64_t lanes) {
        const Register value = load_lanes<A>(row + i, lanes);
        return rms ? value * rstd : (value - mean) * rstd;
      };
      const auto write = [&](auto finished) {
        int64_t i = 0;
        if (stream) {
          for (; i + 2 * width <= channels; i += 2 * width)
            V::template stream_pair<split>(normed + i, finished(i, width), finished(i + width, width));
          if (i < channels) V::stream(normed + i, finished(i, width));
          return;
        }
        for (; i + 2 * width <= channels; i += 2 * width)
          V::template store_pair<split>(normed + i, finished(i, width), finished(i + width, width));
        for (; i + width <= channels; i += width) V::store(normed + i, finished(i, width));
        if (i < channels) store_part<A>(normed + i, finished(i, channels - i), channels - i);
      };
      if (factor != nullptr && offset != nullptr) {
        write([&](int64_t i, int64_t lanes) {
          return V::fma(hat(i, lanes), load_lanes<A>(factor + i, lanes), load_lanes<A>(offset + i, lanes));
        });
      } else if (factor != nullptr) {
        write([&](int64_t i, int64_t lanes) { return hat(i, lanes) * load_lanes<A>(factor + i, lanes); });
      } else if (offset != nullptr) {
        write([&](int64_t i, int64_t lanes) { return hat(i, lanes) + load_lanes<A>(offset + i, lanes); });
      } else {
        write(hat);
      }
    }
  }
  if (stream) stream_fence();
}

// With h the normalised row, g = grad_normed a:
//   LayerNorm: gradient = rstd (g - mean(g) - h mean(g h)) + grad_summed;  RMS norm: without mean(g).
// Both means are sums over the row; padding lanes are zero in g, so they add nothing.
template <class T, class N, bool rms, bool plain>
void backward_pieces(const NormBackward& call, int64_t begin_piece, int64_t end_piece, void* scratch) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const int64_t channels = call.channels;
  const bool stream = call.stream && rows_aligned<T>(call.grad_normalised, channels) &&
                      (call.grad_x == nullptr || rows_aligned<T>(call.grad_x, channels));
  const bool gated = !plain && call.gate.data != nullptr;
  const bool scaled_by_row = !plain && call.scale.data != nullptr && call.scale.by_row;
  Affine<T, false> affine(call, static_cast<A*>(scratch));
  const A* weight = static_cast<const A*>(call.weight);
  const A* bias = static_cast<const A*>(call.bias);
  const size_t row_bytes = static_cast<size_t>(channels) * sizeof(A);
  const auto sums_of = [&](void* sums, int64_t piece) {
    A* of_piece = sums == nullptr ? nullptr : static_cast<A*>(sums) + piece * channels;
    if (of_piece != nullptr) memset(of_piece, 0, row_bytes);
    return of_piece;
  };
  const auto add_to = [&](A* sums, int64_t i, Register value, int64_t lanes) {
    store_lanes<A>(sums + i, value + load_lanes<A>(sums + i, lanes), lanes);
  };
  for (int64_t piece = begin_piece; piece < end_piece; ++piece) {
    A* sum_hat = sums_of(call.sum_hat, piece);
    A* sum_plain = sums_of(call.sum_plain, piece);
    A* sum_gate = sums_of(call.sum_gate, piece);
    const int64_t first = piece / call.group_pieces * call.group_rows, part = piece % call.group_pieces;
    const int64_t begin = first + call.group_rows * part / call.group_pieces;
    const int64_t end = first + call.group_rows * (part + 1) / call.group_pieces;
    if (begin == end) continue;
    RowWalk<norm_operands> at(call.rows, begin);
    for (int64_t row = begin; row < end; ++row, at.next()) {
      const T* normalised = static_cast<const T*>(call.normalised) + at.offset[of_residual];
      const N* grad_normed = call.grad_normed == nullptr ? nullptr : static_cast<const N*>(call.grad_normed) + row * channels;
      const T* grad_summed = call.grad_summed == nullptr ? nullptr : static_cast<const T*>(call.grad_summed) + row * channels;
      T* gradient = static_cast<T*>(call.grad_normalised) + row * channels;
      const Register means = rms ? V::zero() : V::set(static_cast<const A*>(call.mean)[row]);
      const Register rstds = V::set(static_cast<const A*>(call.rstd)[row]);
      const auto hat = [&](int64_t i, int64_t lanes) {
        const Register value = load_lanes<A>(normalised + i, lanes);
        return rms ? value * rstds : (value - means) * rstds;
      };

      Register mean_gs = V::zero(), mean_ghs = V::zero();
      if (grad_normed != nullptr) {
        affine.move(call, at);
        const auto sums = [&](auto g_of) {
          return sums_over<A>(channels, [&](Register& sum_g, Register& sum_gh, int64_t i, int64_t lanes) {
            const Register g = g_of(i, lanes);
            if constexpr (!rms) sum_g = sum_g + g;
            sum_gh = V::fma(g, hat(i, lanes), sum_gh);
          });
        };
        const Sums<A> total =
            affine.factor == nullptr
                ? sums([&](int64_t i, int64_t lanes) { return load_lanes<A>(grad_normed + i, lanes); })
                : sums([&](int64_t i, int64_t lanes) {
                    return load_lanes<A>(grad_normed + i, lanes) * load_lanes<A>(affine.factor + i, lanes);
                  });
        mean_gs = V::set(total.first / static_cast<A>(channels));
        mean_ghs = V::set(total.second / static_cast<A>(channels));
      }

      const void* gate = gated ? row_of<T>(call.gate, at.offset[of_gate]) : nullptr;
      const void* scale = scaled_by_row ? row_of<T>(call.scale, at.offset[of_scale]) : nullptr;
      const T* x = gated ? static_cast<const T*>(call.x) + at.offset[of_x] : nullptr;
      const A* factor = affine.factor;
      // What came through the norm, and the sums and rows of gradients that take part in it.
      const auto through_norm = [&](int64_t i, int64_t lanes) -> Register {
        const Register h = hat(i, lanes);
        Register raw = load_lanes<A>(grad_normed + i, lanes);
        const Register g = factor == nullptr ? raw : raw * load_lanes<A>(factor + i, lanes);
        if constexpr (!plain) {
          if (call.grad_shift != nullptr) store_either<T>(call.grad_shift, call.shift.wide, row * channels + i, raw, lanes);
          if (call.grad_scale != nullptr) {
            Register affine_h = weight == nullptr ? h : h * load_lanes<A>(weight + i, lanes);
            if (bias != nullptr) affine_h = affine_h + load_lanes<A>(bias + i, lanes);
            store_either<T>(call.grad_scale, call.scale.wide, row * channels + i, raw * affine_h, lanes);
          }
          if (scale != nullptr)
            raw = raw * (V::set(static_cast<A>(call.scale_offset)) + load_either<T>(scale, call.scale.wide, i, lanes));
        }
        if (sum_hat != nullptr) store_lanes<A>(sum_hat + i, V::fma(raw, h, load_lanes<A>(sum_hat + i, lanes)), lanes);
        if (sum_plain != nullptr) add_to(sum_plain, i, raw, lanes);
        return rms ? (g - h * mean_ghs) * rstds : ((g - mean_gs) - h * mean_ghs) * rstds;
      };
      const auto finish = [&](auto value_of) {
        if constexpr (plain) {
          if (stream) {
            for (int64_t i = 0; i < channels; i += V::width) V::stream(gradient + i, value_of(i, V::width));
          } else {
            for_each_vector<A>(channels, [&](int64_t i, int64_t lanes) {
              store_lanes<A>(gradient + i, value_of(i, lanes), lanes);
            });
          }
        } else {
          T* grad_x = gated ? static_cast<T*>(call.grad_x) + row * channels : nullptr;
          for_each_vector<A>(channels, [&](int64_t i, int64_t lanes) {
            const Register value = value_of(i, lanes);
            const auto store = [&](T* to, Register of) { stream ? V::stream(to, of) : store_lanes<A>(to, of, lanes); };
            store(gradient + i, value);
            if (gated) {
              store(grad_x + i, value * load_either<T>(gate, call.gate.wide, i, lanes));
              const Register of_gate = value * load_lanes<A>(x + i, lanes);
              if (call.grad_gate != nullptr)
                store_either<T>(call.grad_gate, call.gate.wide, row * channels + i, of_gate, lanes);
              if (sum_gate != nullptr) add_to(sum_gate, i, of_gate, lanes);
            }
          });
        }
      };
      if (grad_normed != nullptr && grad_summed != nullptr) {
        finish([&](int64_t i, int64_t lanes) { return through_norm(i, lanes) + load_lanes<A>(grad_summed + i, lanes); });
      } else if (grad_normed != nullptr) {
        finish(through_norm);
      } else {
        const auto clear = [&](void* rows, bool wide) {
          if (rows == nullptr) return;
          const size_t bytes = static_cast<size_t>(channels) * (wide ? sizeof(A) : sizeof(T));
          memset(static_cast<char*>(rows) + static_cast<size_t>(row) * bytes, 0, bytes);
        };
        clear(call.grad_shift, call.shift.wide);
        clear(call.grad_scale, call.scale.wide);
        finish([&](int64_t i, int64_t lanes) {
          return grad_summed == nullptr ? V::zero() : load_lanes<A>(grad_summed + i, lanes);
        });
      }
    }
  }
  if (stream) stream_fence();
}

template <class T, class N, bool rms>
void backward(const NormBackward& call, int64_t begin_piece, int64_t end_piece, void* scratch) {
  if (call.gate.data == nullptr && !call.shift.by_row) {
    backward_pieces<T, N, rms, true>(call, begin_piece, end_piece, scratch);
  } else {
    backward_pieces<T, N, rms, false>(call, begin_piece, end_piece, scratch);
  }
}

// Adds the pieces' sums in their order, channel by channel, and makes the gradients of them:
//   shift = sum g, scale = weight sum g h + bias sum g;  over the groups, weight = (scale_offset + scale) sum g h and
//   bias = (scale_offset + scale) sum g.
template <class T>
void reduce(const NormBackward& call, const NormReduce& to, int64_t begin_tile, int64_t end_tile) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const int64_t channels = call.channels;
  const A* weight = static_cast<const A*>(call.weight);
  const A* bias = static_cast<const A*>(call.bias);
  const bool scaled = call.scale.data != nullptr && !call.scale.by_row && call.group_rows > 0;
  for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
    const int64_t first = tile * norm_reduce_tile;
    const int64_t count = channels - first < norm_reduce_tile ? channels - first : norm_reduce_tile;
    Register sums_weight[norm_reduce_tile / V::width], sums_bias[norm_reduce_tile / V::width];
    for (int64_t j = 0; j < norm_reduce_tile / V::width; ++j) sums_weight[j] = sums_bias[j] = V::zero();
    for (int64_t group = 0; group < to.groups; ++group) {
      const void* scale = nullptr;
      if (scaled) {
        const RowWalk<norm_operands> at(call.rows, group * call.group_rows);
        scale = row_of<T>(call.scale, at.offset[of_scale]);
      }
      for_each_vector<A>(count, [&](int64_t in_tile, int64_t lanes) {
        const int64_t i = first + in_tile;
        const auto sum_of = [&](const void* pieces) {
          Register sum = V::zero();
          if (pieces == nullptr) return sum;
          for (int64_t piece = group * call.group_pieces; piece < (group + 1) * call.group_pieces; ++piece)
            sum = sum + load_lanes<A>(static_cast<const A*>(pieces) + piece * channels + i, lanes);
          return sum;
        };
        const auto store = [&](const NormSums& sums, Register value) {
          if (sums.data != nullptr) store_either<T>(sums.data, sums.wide, group * channels + i, value, lanes);
        };
        const Register hat = sum_of(call.sum_hat), plain = sum_of(call.sum_plain);
        if (to.gate.data != nullptr) store(to.gate, sum_of(call.sum_gate));
        store(to.shift, plain);
        if (to.scale.data != nullptr) {
          Register value = weight == nullptr ? hat : hat * load_lanes<A>(weight + i, lanes);
          if (bias != nullptr) value = V::fma(plain, load_lanes<A>(bias + i, lanes), value);
          store(to.scale, value);
        }
        const int64_t j = in_tile / V::width;
        if (scale == nullptr) {
          sums_weight[j] = sums_weight[j] + hat;
          sums_bias[j] = sums_bias[j] + plain;
        } else {
          const Register factor = V::set(static_cast<A>(call.scale_offset)) + load_either<T>(scale, call.scale.wide, i, lanes);
          sums_weight[j] = V::fma(factor, hat, sums_weight[j]);
          sums_bias[j] = V::fma(factor, plain, sums_bias[j]);
        }
      });
    }
    for_each_vector<A>(count, [&](int64_t in_tile, int64_t lanes) {
      const auto store = [&](const NormSums& sums, const Register* values) {
        if (sums.data != nullptr) store_either<T>(sums.data, sums.wide, first + in_tile, values[in_tile / V::width], lanes);
      };
      store(to.weight, sums_weight);
      store(to.bias, sums_bias);
    });
  }
}

}  // namespace

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
#define MMK_OF_DOUBLE(...) __VA_ARGS__
#else
#define MMK_OF_DOUBLE(...) nullptr
#endif
#define MMK_BY_TYPE(kernel, rms)                                                                        \
  {                                                                                                     \
    {kernel<float, float, rms>, kernel<bfloat16, bfloat16, rms>, kernel<float16, float16, rms>,         \
     MMK_OF_DOUBLE(kernel<double, double, rms>)},                                                       \
    {kernel<float, float, rms>, kernel<bfloat16, float, rms>, kernel<float16, float, rms>,              \
     MMK_OF_DOUBLE(kernel<double, double, rms>)},                                                       \
  }

const NormKernels norm_kernels = {
    {MMK_BY_TYPE(forward, false), MMK_BY_TYPE(forward, true)},
    {MMK_BY_TYPE(backward, false), MMK_BY_TYPE(backward, true)},
    {reduce<float>, reduce<bfloat16>, reduce<float16>, MMK_OF_DOUBLE(reduce<double>)},
};

}  // namespace mmk::MMK_TIER
