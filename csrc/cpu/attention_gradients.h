// What the gradients of scores and of unit vectors become: those of a bias and of the vectors themselves. Included by *.tier.cpp
// only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_pair.h"

namespace mmk::MMK_TIER {
namespace {

// Adds a panel's gradients of scores to those of the bias, row after row: rows that share a bias are added in their order.
// A bias that is broadcast over queries or keys has long sums, kept in double.
template <class A, int vectors>
inline void add_to_bias(const AttentionBackward& back, const Pair& pair, const Panel<A>& panel, int64_t first, int64_t last,
                        int64_t chunk, const A* grad) {
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int64_t lanes = lanes_of<A>;
  const int64_t count = last - first, base = chunk * back.bias_chunk + pair.b * back.bias_batch;
  const auto row = [&](int64_t lane) {
    return base + panel.head[lane] * back.bias_head + panel.query[lane] * back.bias_row + first * back.bias_col;
  };
  if (back.bias_col == 0) {
    A sums[lanes];
    for (int v = 0; v < vectors; ++v) {
      Register chains[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (int64_t j = 0; j < count; ++j) chains[j % 4] = chains[j % 4] + V::load(grad + j * lanes + v * V::width);
      V::store(sums + v * V::width, (chains[0] + chains[1]) + (chains[2] + chains[3]));
    }
    double* to = static_cast<double*>(back.grad_bias);
    for (int64_t lane = 0; lane < panel.count; ++lane) to[row(lane)] += static_cast<double>(sums[lane]);
    return;
  }
  if (back.bias_row == 0) {
    for (int64_t begin = 0; begin < panel.count;) {  // the lanes of one head together; those beyond `count` are 0
      int64_t end = begin + 1;
      while (end < panel.count && panel.head[end] == panel.head[begin]) ++end;
      double* to = static_cast<double*>(back.grad_bias) + row(begin);
      for (int64_t j = 0; j < count; ++j) {
        A sum = A(0);
        if (begin == 0 && end == panel.count) {
          for (int v = 0; v < vectors; ++v) sum += V::sum(V::load(grad + j * lanes + v * V::width));
        } else {
          for (int64_t lane = begin; lane < end; ++lane) sum += grad[j * lanes + lane];
        }
        to[j] += static_cast<double>(sum);
      }
      begin = end;
    }
    return;
  }
  A* sums = static_cast<A*>(back.grad_bias);
  for (int v = 0; v < vectors; ++v)
    for (int64_t j = 0; j < count; j += V::width) {
      const int64_t left = least(count - j, V::width);
      Register square[V::width];
      for (int i = 0; i < V::width; ++i)
        square[i] = i < left ? V::load(grad + (j + i) * lanes + v * V::width) : V::zero();
      V::transpose(square);
      for (int i = 0; i < V::width; ++i) {
        const int64_t lane = v * V::width + i;
        if (lane >= panel.count) break;
        A* to = sums + row(lane) + j;
        store_lanes<A>(to, load_lanes<A>(to, left) + square[i], left);
      }
    }
}

// The gradient of x from that of its unit vector: what lies across it, over its norm. `unit` is x times |factor|.
template <class A>
inline void along_sphere(const A* unit, A factor, int64_t channels, A* grad) {
  using Register = typename Vec<A>::Register;
  const A along = factor > 0 ? dot<A>(unit, grad, channels) : A(0);
  const Register part = Vec<A>::set(-along), scale = Vec<A>::set(size_of(factor));
  for_each_vector<A>(channels, [&](int64_t k, int64_t width) {
    const Register across = Vec<A>::fma(part, load_lanes<A>(unit + k, width), load_lanes<A>(grad + k, width));
    store_lanes<A>(grad + k, across * scale, width);
  });
}

}  // namespace
}  // namespace mmk::MMK_TIER
