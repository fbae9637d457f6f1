// Kernels of rows in the order of the experts and back. Compiled once per tier.
#include "permute.h"

#include "core/copy.h"
#include "core/rows.h"

namespace mmk::MMK_TIER {
namespace {

void copy(const PermuteGather& call, int64_t begin, int64_t end) {
  const int64_t row_bytes = call.cols * call.element_bytes;
  char* out = static_cast<char*>(call.out) + begin * row_bytes;
  for (int64_t row = begin; row < end; ++row, out += row_bytes) {
    const int64_t slot = call.order[row];
    if (slot < 0) {
      memset(out, 0, static_cast<size_t>(row_bytes));
    } else {
      copy_bytes(out, static_cast<const char*>(call.x) + slot / call.slots * call.stride * call.element_bytes, row_bytes, call.stream);
    }
  }
  if (call.stream) stream_fence();
}

// The values of a row, each computed by value(col, lanes), past the cache where `stream` says so.
template <class T, class F>
inline void write_row(T* out, int64_t cols, bool stream, const F& value) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  if (stream) {
    for (int64_t col = 0; col < cols; col += V::width) V::stream(out + col, value(col, V::width));
  } else {
    for_each_vector<A>(cols, [&](int64_t col, int64_t lanes) { store_lanes<A>(out + col, value(col, lanes), lanes); });
  }
}

template <class T>
void gather(const PermuteGather& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  const bool stream = call.stream && rows_aligned<T>(call.out, call.cols);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = call.order[row];
    T* out = static_cast<T*>(call.out) + row * call.cols;
    if (slot < 0) {
      memset(out, 0, static_cast<size_t>(call.cols) * sizeof(T));
      continue;
    }
    const T* x = static_cast<const T*>(call.x) + slot / call.slots * call.stride;
    const auto weight = V::set(static_cast<const A*>(call.weights)[slot]);
    write_row(out, call.cols, stream, [&](int64_t col, int64_t lanes) { return load_lanes<A>(x + col, lanes) * weight; });
  }
  if (stream) stream_fence();
}

template <class T>
void combine(const PermuteCombine& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  const bool stream = call.stream && rows_aligned<T>(call.out, call.cols);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* positions = call.positions + token * call.slots;
    const A* weights = call.weights == nullptr ? nullptr : static_cast<const A*>(call.weights) + token * call.slots;
    write_row(static_cast<T*>(call.out) + token * call.cols, call.cols, stream, [&](int64_t col, int64_t lanes) {
      typename V::Register sum = V::zero();
      for (int64_t slot = 0; slot < call.slots; ++slot) {
        if (positions[slot] < 0) continue;
        const auto row = load_lanes<A>(static_cast<const T*>(call.rows) + positions[slot] * call.stride + col, lanes);
        sum = weights == nullptr ? sum + row : sum + row * V::set(weights[slot]);
      }
      return sum;
    });
  }
  if (stream) stream_fence();
}

template <class T>
void dots(const PermuteDots& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t position = call.positions[slot];
    static_cast<A*>(call.dots)[slot] =
        position < 0 ? A(0)
                     : dot<A>(static_cast<const T*>(call.grad) + slot / call.slots * call.cols,
                              static_cast<const T*>(call.rows) + position * call.stride, call.cols);
  }
}

}  // namespace

const PermuteKernels permute_kernels = {
    copy,
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {gather<float>, gather<bfloat16>, gather<float16>, gather<double>},
    {combine<float>, combine<bfloat16>, combine<float16>, combine<double>},
    {dots<float>, dots<bfloat16>, dots<float16>, dots<double>},
#else
    {gather<float>, gather<bfloat16>, gather<float16>, nullptr},
    {combine<float>, combine<bfloat16>, combine<float16>, nullptr},
    {dots<float>, dots<bfloat16>, dots<float16>, nullptr},
#endif
};

}  // namespace mmk::MMK_TIER
