// One tier's vectors (core/vec.h) as plain functions on arrays, for the test extension.
#include "blocks.h"

#include "core/vec.h"

namespace mmk::MMK_TIER {
namespace {

// Through a register of accumulators, tail and all.
template <class From, class To>
void convert(const From* from, To* to, int64_t count) {
  using V = Vec<float>;
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::store(to + i, V::load(from + i));
  if (i < count) store_part<float>(to + i, load_part<float>(from + i, count - i), count - i);
}

// The scalar conversions, which the generic tier's vectors and every tier's tails are made of.
template <class T>
void widen_scalars(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <class T>
void narrow_scalars(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

float sum_register(const float* from) { return Vec<float>::sum(Vec<float>::load(from)); }

void sums_of_rows(const float* from, float* to) {
  using V = Vec<float>;
  V::Register rows[V::width];
  for (int i = 0; i < V::width; ++i) rows[i] = V::load(from + i * V::width);
  V::store(to, V::sums(rows));
}

float fma_lane(float a, float b, float c) {
  using V = Vec<float>;
  float lanes[V::width];
  V::store(lanes, V::fma(V::set(a), V::set(b), V::set(c)));
  return lanes[V::width - 1];
}

}  // namespace

const VecBlocks vec_blocks = {
    Vec<float>::width,
    convert<bfloat16, float>, convert<float16, float>, convert<float, bfloat16>, convert<float, float16>,
    widen_scalars<bfloat16>, widen_scalars<float16>, narrow_scalars<bfloat16>, narrow_scalars<float16>,
    sum_register,            sums_of_rows,                fma_lane,
};

}  // namespace mmk::MMK_TIER
