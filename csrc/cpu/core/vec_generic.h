// Generic tier: the compiler's own 16-byte vectors, which every target has in some form.
#pragma once

namespace mmk::MMK_TIER {
namespace {

template <class A>
struct GenericVec {
  static constexpr int width = 16 / sizeof(A);
  using Register __attribute__((vector_size(16))) = A;

  static Register set(A value) {
    Register result;
    for (int i = 0; i < width; ++i) result[i] = value;
    return result;
  }
  static Register zero() { return set(A(0)); }

  template <class T>
  static Register load(const T* from) {
    Register result;
    for (int i = 0; i < width; ++i) result[i] = widen(from[i]);
    return result;
  }
  template <class T>
  static void store(T* to, Register value) {
    for (int i = 0; i < width; ++i) narrow(value[i], to[i]);
  }

  static Register fma(Register a, Register b, Register c) { return a * b + c; }

  static A sum(Register value) {
    A result = value[0];
    for (int i = 1; i < width; ++i) result += value[i];
    return result;
  }

  // Stores that bypass the cache need an aligned address; 0 where the tier has none.
  template <class T>
  static constexpr int64_t stream_alignment() {
    return 0;
  }
  template <class T>
  static void stream(T* to, Register value) {
    store(to, value);
  }
  template <class T>
  static void stream_raw(T* to, const T* from) {
    memcpy(to, from, width * sizeof(T));
  }
};

template <>
struct Vec<float> : GenericVec<float> {};
template <>
struct Vec<double> : GenericVec<double> {};

inline void stream_fence() {}

}  // namespace
}  // namespace mmk::MMK_TIER
