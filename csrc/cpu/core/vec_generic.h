// Generic tier: the compiler's own 16-byte vectors, which every target has in some form.
#pragma once

namespace mmk::MMK_TIER {
namespace {

template <class A>
struct GenericVec {
  static constexpr int width = 16 / sizeof(A);
  using Register __attribute__((vector_size(16))) = A;
  using Mask = decltype(Register{} <= Register{});  // integers as wide as A

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

  // Stores, and answers what the storage type has made of the value.
  template <class T>
  static Register store_rounded(T* to, Register value) {
    store(to, value);
    return load(to);
  }

  // Two registers of consecutive elements; `split`: those of even and of odd index instead of the first and the second
  // half, which is what bfloat16 is cheapest to widen to and to narrow from on x86. Here nothing is.
  template <class T>
  static constexpr bool splits() {
    return false;
  }
  template <bool split, class T>
  static void load_pair(const T* from, Register& a, Register& b) {
    a = load(from);
    b = load(from + width);
  }
  template <bool split, class T>
  static void store_pair(T* to, Register a, Register b) {
    store(to, a);
    store(to + width, b);
  }
  template <bool split, class T>
  static void store_pair_rounded(T* to, Register& a, Register& b) {
    a = store_rounded(to, a);
    b = store_rounded(to + width, b);
  }
  static void split(Register&, Register&) {}

  // Lane 2 i and lane 2 i + 1 change places.
  static Register swap_neighbours(Register value) {
    Register result;
    for (int i = 0; i < width; ++i) result[i] = value[i ^ 1];
    return result;
  }

  static Register fma(Register a, Register b, Register c) { return a * b + c; }

  // Where one operand is NaN the result is b, so a NaN in b stays.
  static Register min(Register a, Register b) { return a < b ? a : b; }
  static Register max(Register a, Register b) { return a > b ? a : b; }

  static Register abs(Register value) { return reinterpret_cast<Register>(bits(value) & ~sign_bits()); }
  static Register copysign(Register magnitude, Register sign) {
    return reinterpret_cast<Register>((bits(magnitude) & ~sign_bits()) | (bits(sign) & sign_bits()));
  }

  static Mask less_equal(Register a, Register b) { return a <= b; }
  static Register select(Mask mask, Register then, Register otherwise) { return mask ? then : otherwise; }

  // The lowest bits of the representation become sign and exponent, the mantissa zero.
  static Register low_bits_to_exponent(Register value) {
    return reinterpret_cast<Register>(bits(value) << (sizeof(A) == 4 ? 23 : 52));
  }

  static A sum(Register value) {
    A result = value[0];
    for (int i = 1; i < width; ++i) result += value[i];
    return result;
  }

  // Lane i: the sum of row i.
  static Register sums(const Register (&rows)[width]) {
    Register result;
    for (int i = 0; i < width; ++i) result[i] = sum(rows[i]);
    return result;
  }

  // A square of width vectors, rows to columns.
  static void transpose(Register (&rows)[width]) {
    for (int i = 0; i < width; ++i)
      for (int j = i + 1; j < width; ++j) {
        const A kept = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = kept;
      }
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
  static Register stream_rounded(T* to, Register value) {
    return store_rounded(to, value);
  }
  template <bool split, class T>
  static void stream_pair(T* to, Register a, Register b) {
    store_pair<split>(to, a, b);
  }
  template <bool split, class T>
  static void stream_pair_rounded(T* to, Register& a, Register& b) {
    store_pair_rounded<split>(to, a, b);
  }
  template <class T>
  static void stream_raw(T* to, const T* from) {
    memcpy(to, from, width * sizeof(T));
  }

 private:
  static Mask bits(Register value) { return reinterpret_cast<Mask>(value); }
  static Mask sign_bits() { return bits(set(A(-0.0))); }
};

template <>
struct Vec<float> : GenericVec<float> {};
template <>
struct Vec<double> : GenericVec<double> {};

// 32-bit integers, made of pairs of 16-bit ones.
struct Integers {
  static constexpr int width = 4;
  using Register __attribute__((vector_size(16))) = int32_t;
  using Pairs __attribute__((vector_size(16))) = int16_t;

  static Register zero() { return Register{}; }
  static Register add(Register a, Register b) { return a + b; }
  static Register load(const int32_t* from) { return copy<Register>(from); }
  static void store(int32_t* to, Register value) { memcpy(to, &value, sizeof value); }
  static Pairs load(const int16_t* from) { return copy<Pairs>(from); }
  static Pairs load(const int8_t* from) {
    Pairs result;
    for (int i = 0; i < 8; ++i) result[i] = from[i];
    return result;
  }
  static void store(int16_t* to, Pairs value) { memcpy(to, &value, sizeof value); }
  static Pairs set_pair(const int16_t* from) {
    const int16_t a = from[0], b = from[1];
    return Pairs{a, b, a, b, a, b, a, b};
  }
  static Register multiply_add(Register sum, Pairs a, Pairs b) {
    for (int i = 0; i < 4; ++i) sum[i] += int32_t{a[2 * i]} * b[2 * i] + int32_t{a[2 * i + 1]} * b[2 * i + 1];
    return sum;
  }
  static Register rounded(Vec<float>::Register value) {
    Register result;
    for (int i = 0; i < 4; ++i) result[i] = static_cast<int32_t>(__builtin_rintf(value[i]));
    return result;
  }
  static Vec<float>::Register to_float(Register value) { return __builtin_convertvector(value, Vec<float>::Register); }

 private:
  template <class R>
  static R copy(const void* from) {
    R result;
    memcpy(&result, from, sizeof result);
    return result;
  }
};

inline void stream_fence() {}

}  // namespace
}  // namespace mmk::MMK_TIER
