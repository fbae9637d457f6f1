// Rows of the operands of softmax and linear attention, as their kernels read and write them. Included by *.tier.cpp only, in
// the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention.h"
#include "core/integers.h"
#include "core/rows.h"

namespace mmk::MMK_TIER {
namespace {

// [count, channels] accumulators, a row every `row`.
template <class A>
struct Staged {
  const A* data;
  int64_t row;
};

// Whether an operand's rows may be written past the cache, where the call has it so.
template <class T, class Call>
inline bool rows_stream(const Call& call, const AttentionOperand& to, int64_t channels) {
  const T* data = static_cast<const T*>(to.data);
  return call.stream && rows_aligned<T>(data, channels) && rows_aligned<T>(data, to.row) && rows_aligned<T>(data, to.head) &&
         rows_aligned<T>(data, to.batch);
}

// A row of accumulators, times a factor, as one of an operand.
template <class A, class T>
inline void store_row(const A* from, int64_t channels, bool stream, T* to, A factor = A(1)) {
  using V = Vec<A>;
  if (stream) {
    for (int64_t c = 0; c < channels; c += V::width) V::stream(to + c, V::load(from + c) * V::set(factor));
  } else {
    for_each_vector<A>(channels, [&](int64_t c, int64_t lanes) {
      store_lanes<A>(to + c, load_lanes<A>(from + c, lanes) * V::set(factor), lanes);
    });
  }
}

}  // namespace
}  // namespace mmk::MMK_TIER
