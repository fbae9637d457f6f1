// Words of bits, codes or masks, one a lane. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "core/vec.h"

namespace mmk::MMK_TIER {
namespace {

// Integers as wide as A: of a word the lowest 32 bits count.
template <class A>
using Words = decltype(typename Vec<A>::Register{} <= typename Vec<A>::Register{});

// The first `count`, the others 0.
template <class A>
inline Words<A> load_words(const int32_t* from, int64_t count) {
  int32_t lanes[Vec<A>::width] = {};
  memcpy(lanes, from, static_cast<size_t>(count) * sizeof(int32_t));
  Words<A> result;
  for (int i = 0; i < Vec<A>::width; ++i) result[i] = lanes[i];
  return result;
}

template <class A>
inline void store_words(int32_t* to, Words<A> words, int64_t count) {
  int32_t lanes[Vec<A>::width];
  for (int i = 0; i < Vec<A>::width; ++i) lanes[i] = static_cast<int32_t>(words[i]);
  memcpy(to, lanes, static_cast<size_t>(count) * sizeof(int32_t));
}

// `value` where the lane's bit is set, else -value.
template <class A>
inline typename Vec<A>::Register with_sign(typename Vec<A>::Register value, Words<A> words, int64_t bit) {
  using Register = typename Vec<A>::Register;
  const Words<A> sign = ~(words << (8 * sizeof(A) - 1 - static_cast<uint64_t>(bit))) & reinterpret_cast<Words<A>>(Vec<A>::set(A(-0.0)));
  return reinterpret_cast<Register>(reinterpret_cast<Words<A>>(value) ^ sign);
}

}  // namespace
}  // namespace mmk::MMK_TIER
