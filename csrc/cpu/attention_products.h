// The products of attention, panel by panel, and those of a few queries, which would leave most lanes of a panel empty.
// Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_pair.h"
#include "core/lane_product.h"

namespace mmk::MMK_TIER {
namespace {

// Up to this many rows, those of one vector, a pair's products go along the channels of each key instead of across the rows.
template <class A>
inline constexpr int64_t few_rows = Vec<A>::width < 4 ? Vec<A>::width : 4;

// Rows that are left over after many go this way too; those of the sequences that is_tiny takes do not, whose sums would then
// have two orders.
template <class A>
inline bool is_few(int64_t rows, const Pair& pair, const AttentionCall& call) {
  return rows <= few_rows<A> && (pair.rows <= few_rows<A> || pair.rows > 16) && call.dim % Vec<A>::width == 0 && call.value_dim % Vec<A>::width == 0;
}

// to [keys][lanes] = keys [keys][depth] . panel [depth][lanes]
template <class A, int vectors>
inline void score_panel(const Staged<A>& keys, int64_t begin, int64_t end, int64_t depth, const A* panel, A* to, Ahead* ahead) {
  multiply_lanes<vectors, true>(LaneProduct<A>{keys.data + begin * keys.row, keys.row, 1, panel, lanes_of<A>, depth, 1, 0, depth,
                                               to, lanes_of<A>, false, ahead},
                                end - begin);
}

// to [channels][lanes] (+)= values^T [channels][keys] . weights [keys][lanes]
template <class A, int vectors>
inline void weigh_panel(const Staged<A>& values, int64_t begin, int64_t end, int64_t channels, const A* weights, bool accumulate,
                        A* to, Ahead* ahead) {
  multiply_lanes<vectors, false>(LaneProduct<A>{values.data + begin * values.row, 1, values.row, weights, lanes_of<A>,
                                                end - begin, 1, 0, end - begin, to, lanes_of<A>, accumulate, ahead},
                                 channels);
}

// sums [channels][lanes] *= factors, one a lane
template <class A, int vectors>
inline void rescale_sums(int64_t channels, const typename Vec<A>::Register (&factors)[vectors], A* sums) {
  using V = Vec<A>;
  for (int64_t k = 0; k < channels; ++k)
    for (int v = 0; v < vectors; ++v) {
      A* at = sums + k * lanes_of<A> + v * V::width;
      V::store(at, V::load(at) * factors[v]);
    }
}

// to [keys][channels] (+)= weights^T [keys][rows] . rows [rows][channels], over panels of weights that lie `panel_stride`
// apart. Channels are padded to whole vectors in `rows` and in `to`.
template <class A>
inline void gather_panels(const A* weights, int64_t panel_stride, int64_t panels, int64_t last_count, int64_t keys, const A* rows,
                          int64_t channels, bool accumulate, A* to) {
  constexpr int width = Vec<A>::width, lanes = lanes_of<A>;
  const int64_t padded = rounded_up(channels, width);
  LaneProduct<A> product{weights, lanes, 1,      rows,   padded, lanes, panels, panel_stride, last_count,
                         to,      padded, accumulate};
  for (int64_t channel = 0; channel < padded; channel += lanes) {
    product.b = rows + channel;
    product.c = to + channel;
    if (channel + width < padded) {
      multiply_lanes<2, true>(product, keys);
    } else {
      multiply_lanes<1, true>(product, keys);
    }
  }
}

// --- a few rows ---------------------------------------------------------------------------------------------------------
// to[key * lanes + row] = key . row, rows [row_count][depth]; the other lanes of the first vector are 0.
template <int row_count, class A, class T>
inline void score_rows(const T* keys, int64_t key_stride, int64_t count, const A* rows, int64_t depth, A* to) {
  using V = Vec<A>;
  for (int64_t j = 0; j < count; ++j) {
    const T* key = keys + j * key_stride;
    typename V::Register sums[row_count];
    for (auto& sum : sums) sum = V::zero();
    for (int64_t k = 0; k < depth; k += V::width) {
      const typename V::Register x = V::load(key + k);
#pragma GCC unroll 4
      for (int r = 0; r < row_count; ++r) sums[r] = V::fma(x, V::load(rows + r * depth + k), sums[r]);
    }
    V::store(to + j * lanes_of<A>, V::zero());
#pragma GCC unroll 4
    for (int r = 0; r < row_count; ++r) to[j * lanes_of<A> + r] = V::sum(sums[r]);
  }
}

// Calls f with the number of a few rows as a constant.
template <class F>
inline void with_rows(int64_t row_count, const F& f) {
  switch (row_count) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      return f.template operator()<4>();
  }
}

template <class A, class T>
inline void score_few(const T* keys, int64_t key_stride, int64_t count, const A* rows, int64_t row_count, int64_t depth, A* to) {
  with_rows(row_count, [&]<int constant>() { score_rows<constant>(keys, key_stride, count, rows, depth, to); });
}

// to[row * to_row + key] = key . row, a vector of keys at once; those from `count` to a whole vector are -infinity.
template <int row_count, class A, class T>
inline void score_keys(const T* keys, int64_t key_stride, int64_t count, const A* rows, int64_t depth, A* to, int64_t to_row) {
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int width = V::width;
  for (int64_t j = 0; j < count; j += width) {
    const int64_t some = least(width, count - j);
    Register sums[row_count][width];
    for (int64_t n = 0; n < width; ++n) {
      const T* key = keys + (j + least(n, some - 1)) * key_stride;
      Register of_key[row_count];
      for (Register& sum : of_key) sum = V::zero();
      for (int64_t k = 0; k < depth; k += width) {
        const Register x = V::load(key + k);
#pragma GCC unroll 4
        for (int r = 0; r < row_count; ++r) of_key[r] = V::fma(x, V::load(rows + r * depth + k), of_key[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < row_count; ++r) sums[r][n] = of_key[r];
    }
    for (int r = 0; r < row_count; ++r) {
      V::transpose(sums[r]);
      for (int step = 1; step < width; step *= 2)
        for (int n = 0; n < width; n += 2 * step) sums[r][n] = sums[r][n] + sums[r][n + step];
      V::store(to + r * to_row + j, sums[r][0]);
      for (int64_t n = some; n < width; ++n) to[r * to_row + j + n] = static_cast<A>(-__builtin_inf());
    }
  }
}

// to [row][channels] (+)= sum over keys of weights[key * key_step + row * row_step] values[key]
template <class A, class T>
inline void weigh_few(const T* values, int64_t value_stride, int64_t count, const A* weights, int64_t key_step, int64_t row_step,
                      int64_t row_count, int64_t channels, bool accumulate, A* to) {
  using V = Vec<A>;
  constexpr int width = V::width;
  constexpr int64_t block = 8;  // vectors of channels in registers
  for (int64_t r = 0; r < row_count; ++r)
    for (int64_t first = 0; first < channels; first += block * width) {
      const auto part = [&]<int vectors>() {
        // Few channels in chains of keys: one chain would wait for itself.
        constexpr int chains = vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1;
        typename V::Register sums[chains][vectors];
        A* out = to + r * channels + first;
        for (int chain = 0; chain < chains; ++chain)
          for (int v = 0; v < vectors; ++v) sums[chain][v] = accumulate && chain == 0 ? V::load(out + v * width) : V::zero();
        const auto add = [&](int64_t j, int chain) {
          const typename V::Register weight = V::set(weights[j * key_step + r * row_step]);
          const T* value = values + j * value_stride + first;
          for (int v = 0; v < vectors; ++v) sums[chain][v] = V::fma(weight, V::load(value + v * width), sums[chain][v]);
        };
        int64_t j = 0;
        for (; j + chains <= count; j += chains)
          for (int chain = 0; chain < chains; ++chain) add(j + chain, chain);
        for (; j < count; ++j) add(j, 0);
        for (int step = 1; step < chains; step *= 2)
          for (int chain = 0; chain < chains; chain += 2 * step)
            for (int v = 0; v < vectors; ++v) sums[chain][v] = sums[chain][v] + sums[chain + step][v];
        for (int v = 0; v < vectors; ++v) V::store(out + v * width, sums[0][v]);
      };
      switch (least(block, (channels - first) / width)) {
        case 1:
          part.template operator()<1>();
          break;
        case 2:
          part.template operator()<2>();
          break;
        case 3:
          part.template operator()<3>();
          break;
        case 4:
          part.template operator()<4>();
          break;
        case 5:
          part.template operator()<5>();
          break;
        case 6:
          part.template operator()<6>();
          break;
        case 7:
          part.template operator()<7>();
          break;
        default:
          part.template operator()<8>();
      }
    }
}

}  // namespace
}  // namespace mmk::MMK_TIER
