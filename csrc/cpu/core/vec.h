// Vectors of one tier: a register of accumulators (float, or double in the generic tier), loaded from and stored to any
// storage type. Included by *.tier.cpp only; everything is inside the tier's own unnamed namespace, so that no inline
// function compiled for AVX-512 can be linked into the generic path. For the same reason: no STL here.
#pragma once
#include <stdint.h>
#include <string.h>

#include "storage.h"

#if !defined(MMK_TIER)
#error "vec.h is for *.tier.cpp, which are compiled once per tier with MMK_TIER set"
#endif

namespace mmk::MMK_TIER {
namespace {

// Scalar conversions, for tails and for the generic tier.
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(float16 value) {
  // Shift exponent and mantissa into float's place, then rescale by 2^112 (the difference of the biases); a float
  // product does subnormals exactly. Infinity and NaN need the full exponent put back.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  float scaled;
  memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof bits);
  if (magnitude >= 0x0f800000u) bits = 0x7f800000u | (magnitude & 0x007fffffu);
  bits |= sign;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

// Round to nearest, ties to even; NaN becomes the quiet NaN that torch writes.
inline void narrow(float value, bfloat16& out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  out.bits = value != value ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float value, float16& out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out.bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal halves: a float sum with 0.5 aligns and rounds them
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    absolute += 0.5f;
    uint32_t aligned;
    memcpy(&aligned, &absolute, sizeof aligned);
    out.bits = sign | static_cast<uint16_t>(aligned - 0x3f000000u);
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out.bits = sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
  }
}

template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

template <class A>
struct Vec;

}  // namespace
}  // namespace mmk::MMK_TIER

#define MMK_TIER_IS_generic 1
#define MMK_TIER_IS_avx2 2
#define MMK_TIER_IS_avx512 3
#define MMK_TIER_IS_vnni 4
#define MMK_TIER_IS_amx 5
#define MMK_TIER_IS_avx512_bf16 6
#define MMK_TIER_ID_(tier) MMK_TIER_IS_##tier
#define MMK_TIER_ID(tier) MMK_TIER_ID_(tier)

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx2
#include "vec_avx2.h"
#elif MMK_TIER_ID(MMK_TIER) >= MMK_TIER_IS_avx512
#include "vec_avx512.h"
#else
#include "vec_generic.h"
#endif

namespace mmk::MMK_TIER {
namespace {

// Copies fewer than 64 bytes in pieces of powers of two: a call of memcpy costs more than they do.
inline void copy_short(void* to, const void* from, size_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const auto piece = [&]<size_t size>() {
    if (!(bytes & size)) return;
    memcpy(target, source, size);
    target += size;
    source += size;
  };
  piece.template operator()<32>();
  piece.template operator()<16>();
  piece.template operator()<8>();
  piece.template operator()<4>();
  piece.template operator()<2>();
}

// The first `count` lanes, fewer than all, the others zero.
template <class A, class T>
inline typename Vec<A>::Register load_part(const T* from, int64_t count) {
  if constexpr (requires { Vec<A>::load_first(from, count); }) return Vec<A>::load_first(from, count);
  T lanes[Vec<A>::width] = {};
  copy_short(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return Vec<A>::load(lanes);
}

template <class A, class T>
inline void store_part(T* to, typename Vec<A>::Register value, int64_t count) {
  if constexpr (requires { Vec<A>::store_first(to, value, count); }) return Vec<A>::store_first(to, value, count);
  T lanes[Vec<A>::width];
  Vec<A>::store(lanes, value);
  copy_short(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

// Whole vectors where there are `width` lanes left, the padded tail otherwise. Lanes past the end load as zero.
template <class A, class T>
inline typename Vec<A>::Register load_lanes(const T* from, int64_t count) {
  return count == Vec<A>::width ? Vec<A>::load(from) : load_part<A>(from, count);
}

template <class A, class T>
inline void store_lanes(T* to, typename Vec<A>::Register value, int64_t count) {
  if (count == Vec<A>::width) {
    Vec<A>::store(to, value);
  } else {
    store_part<A>(to, value, count);
  }
}

// visit(i, lanes) over `count` elements; `lanes` is a constant but for the tail.
template <class A, class F>
inline void for_each_vector(int64_t count, const F& visit) {
  constexpr int64_t width = Vec<A>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) visit(i, width);
  if (i < count) visit(i, count - i);
}

}  // namespace
}  // namespace mmk::MMK_TIER
