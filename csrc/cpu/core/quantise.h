// Floats as 8-bit integers times a scale, one scale a row or column. Included by files of one tier only.
#pragma once
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

// A row or column is quantised to integers of at most 127 in magnitude, value = integer * scale. The scale of one with an
// infinity or NaN in it is NaN, and so is all that comes of it.
template <class T>
inline float scale_of(const T* from, int64_t step, int64_t depth) {
  using V = Vec<float>;
  float largest = 0.0f;
  bool finite = true;
  const auto see = [&](float value) {
    const float magnitude = __builtin_fabsf(value);
    finite = finite && magnitude < __builtin_inff();
    if (magnitude > largest) largest = magnitude;
  };
  if (step == 1) {
    V::Register most = V::zero(), sum = V::zero();
    int64_t k = 0;
    for (; k + V::width <= depth; k += V::width) {
      const V::Register value = V::load(from + k);
      most = V::max(most, V::abs(value));
      sum = V::fma(value, V::zero(), sum);  // NaN where one is not finite
    }
    float lanes[V::width];
    V::store(lanes, most);
    for (const float lane : lanes) see(lane);
    finite = finite && V::sum(sum) == 0.0f;
    for (; k < depth; ++k) see(widen(from[k]));
  } else {
    for (int64_t k = 0; k < depth; ++k) see(widen(from[k * step]));
  }
  return finite ? largest / 127.0f : __builtin_nanf("");
}

inline float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }  // also where the scale is NaN

// put(k, integer) for every element of a row or column of `depth` elements, `step` apart.
template <class T, class F>
inline void quantise(const T* from, int64_t step, int64_t depth, float scale, const F& put) {
  using V = Vec<float>;
  const float inverse = inverse_of(scale);
  int64_t k = 0;
  if (step == 1 && inverse > 0.0f) {
    const V::Register factor = V::set(inverse);
    for (; k + V::width <= depth; k += V::width) {
      int32_t integers[V::width];
      Integers::store(integers, Integers::rounded(V::load(from + k) * factor));
      for (int i = 0; i < V::width; ++i) put(k + i, integers[i]);
    }
  }
  for (; k < depth; ++k) put(k, inverse > 0.0f ? static_cast<int32_t>(__builtin_rintf(widen(from[k * step]) * inverse)) : 0);
}

void rescale_int8(void* c, int64_t c_stride, int64_t rows, int64_t cols, const float* row_scales, const float* col_scales) {
  using V = Vec<float>;
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* from = static_cast<int32_t*>(c) + row * c_stride;
    float* to = static_cast<float*>(c) + row * c_stride;
    const V::Register scale = V::set(row_scales[row]);
    for (int64_t col = 0; col < cols; col += V::width) {
      const int64_t lanes = cols - col < V::width ? cols - col : V::width;
      V::store(to + col, Integers::to_float(Integers::load(from + col)) * (scale * load_lanes<float>(col_scales + col, lanes)));
    }
  }
}

}  // namespace
}  // namespace mmk::MMK_TIER
