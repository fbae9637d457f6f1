// Elementary functions and activations of one tier's vectors, float or (generic tier) double. Included by *.tier.cpp only
// and by the rules of vec.h: everything in the unnamed namespace, no STL, products and sums fused only by fma.
// Doubles go lane by lane through the C library: they serve checks in float64, not speed.
//
// Largest errors in units in the last place of the true result, over all floats (python_tests/test_math.py, measured on
// AVX2; after the semicolon the generic tier, which has no fma: there tanh and sigmoid were only sampled beyond 32 and 128):
//   exp 1.49; 1.84   exp2 2.02; 2.24 (sampled)   erf 1.17; 1.47   tanh 1.52; 1.46   sigmoid 2.56; 2.49
#pragma once
#include "activation.h"
#include "vec.h"

namespace mmk::MMK_TIER {
namespace {

template <class A>
inline constexpr bool is_double = sizeof(A) == 8;

template <class A, class F>
inline typename Vec<A>::Register by_lane(typename Vec<A>::Register x, const F& f) {
  for (int i = 0; i < Vec<A>::width; ++i) x[i] = f(x[i]);
  return x;
}

// c0 + c1 x + c2 x^2 + ... by Horner's rule.
template <class A>
inline typename Vec<A>::Register polynomial(typename Vec<A>::Register, A last) {
  return Vec<A>::set(last);
}
template <class A, class... Rest>
inline typename Vec<A>::Register polynomial(typename Vec<A>::Register x, A first, Rest... rest) {
  return Vec<A>::fma(polynomial<A>(x, rest...), x, Vec<A>::set(first));
}

// exp(x) for -88 <= x <= 89, the range in which the exponent of 2 fits its bits. With k = floor(x / ln 2), exp(x) is
// 2^k p(x - k ln 2), where p approximates exp on [0, ln 2]. Since p is in [1, 2], the result is normal exactly where 2^k
// is: k = 128 gives infinity, and k = -127, all bits zero, gives 0.
template <class A>
inline typename Vec<A>::Register exp_in_range(typename Vec<A>::Register x) {
  static_assert(!is_double<A>, "the constants are float's");
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr A shift = 0x1.8p23f + 127;  // a float this large holds integers: the sum leaves k + 127 in its lowest bits
  // A floor by rounding to nearest: not quite a half is taken off, so that k is 0 at 0 and exp(0) is p(0) = 1.
  const Register shifted = V::fma(x, V::set(1.44269504f), V::set(-0.49999997f)) + V::set(shift);
  const Register k = shifted - V::set(shift);
  // ln 2 in two parts; the first has so few bits that its product with k is exact.
  Register r = V::fma(k, V::set(-0.693145752f), x);
  r = V::fma(k, V::set(-1.42860677e-06f), r);
  const Register p = polynomial<A>(r, 1.0f, 0.999999702f, 0.500007093f, 0.166601881f, 0.0419397019f, 0.00775910588f,
                                   0.00196510367f);
  return p * V::low_bits_to_exponent(shifted);
}

// Infinity above 88.7228, 0 below -87.3365 (where the true result would be subnormal).
template <class A>
inline typename Vec<A>::Register exp(typename Vec<A>::Register x) {
  using V = Vec<A>;
  if constexpr (is_double<A>) {
    return by_lane<A>(x, [](A v) { return __builtin_exp(v); });
  } else {
    return exp_in_range<A>(V::max(V::set(-88.0f), V::min(V::set(89.0f), x)));
  }
}

// exp(x) for x <= 0, as softmax needs it: 0 below -87.3365, and at -infinity.
template <class A>
inline typename Vec<A>::Register exp_of_negative(typename Vec<A>::Register x) {
  if constexpr (is_double<A>) {
    return exp<A>(x);
  } else {
    return exp_in_range<A>(Vec<A>::max(Vec<A>::set(-88.0f), x));
  }
}

// 2^x for -127 <= x <= 128. What is exp(y) is 2^(y / ln 2), which takes four products fewer where the factor is part of one that
// is there anyway.
template <class A>
inline typename Vec<A>::Register exp2_in_range(typename Vec<A>::Register x) {
  static_assert(!is_double<A>, "the constants are float's");
  using V = Vec<A>;
  constexpr A shift = 0x1.8p23f + 127;  // as in exp_in_range
  const typename V::Register shifted = x + V::set(shift);
  const typename V::Register r = x - (shifted - V::set(shift));  // -1/2 to 1/2
  const typename V::Register p = polynomial<A>(r, 1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f);
  return p * V::low_bits_to_exponent(shifted);
}

// Infinity from 127.5 on (where the true result is finite yet), 0 below -126.5 (where it would be subnormal, as below -126).
template <class A>
inline typename Vec<A>::Register exp2(typename Vec<A>::Register x) {
  using V = Vec<A>;
  if constexpr (is_double<A>) {
    return by_lane<A>(x, [](A v) { return __builtin_exp2(v); });
  } else {
    return exp2_in_range<A>(V::max(V::set(-127.0f), V::min(V::set(128.0f), x)));
  }
}

// exp(x) for x <= 0 in fewer products than exp_of_negative, for what is added to numbers around 1: the error, relative to the true
// result, grows by half a unit in the last place with every -1 of x.
template <class A>
inline typename Vec<A>::Register quick_exp_of_negative(typename Vec<A>::Register x) {
  if constexpr (is_double<A>) {
    return exp<A>(x);
  } else {
    return exp2_in_range<A>(Vec<A>::max(Vec<A>::set(-127.0f), x * Vec<A>::set(1.44269504f)));
  }
}

// log(x) of a positive normal number, one lane: x = 2^k m with m around 1, and log(m) = r + r^2 p(r), r = m - 1. Loops over
// arrays of these become vectors by the compiler's own hand.
inline double log_of_positive(double x) { return __builtin_log(x); }
[[gnu::always_inline]] inline float log_of_positive(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t centred = bits - 0x3f3504f3u;  // sqrt(1/2): m lies between it and its double
  const float k = static_cast<float>(static_cast<int32_t>(centred) >> 23);
  const uint32_t mantissa = (centred & 0x007fffffu) + 0x3f3504f3u;
  float m;
  memcpy(&m, &mantissa, sizeof m);
  const float r = m - 1.0f, square = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float tail = p * r * square + k * -2.12194440e-4f - 0.5f * square;
  return (r + tail) + k * 0.693359375f + (x - x);  // the last term keeps a NaN
}

// x + x p(x^2) near 0, 1 - exp(q(x)) further out, where q approximates log(erfc(x)).
template <class A>
inline typename Vec<A>::Register erf(typename Vec<A>::Register x) {
  using V = Vec<A>;
  using Register = typename V::Register;
  if constexpr (is_double<A>) {
    return by_lane<A>(x, [](A v) { return __builtin_erf(v); });
  } else {
    const Register t = V::min(V::set(4.0f), V::abs(x));
    const Register p = polynomial<A>(t * t, 0.128379154f, -0.376125233f, 0.112821409f, -0.0267789091f, 0.00501196302f,
                                     -0.000609036051f);
    const Register q = polynomial<A>(t, -0.000177503275f, -1.12774952f, -0.637059831f, -0.104037283f, 0.0222770453f,
                                     -0.00305559576f, 0.00019718038f);
    const Register far = V::set(1.0f) - exp_in_range<A>(q);
    return V::copysign(V::select(V::less_equal(t, V::set(0.9f)), V::fma(p, t, t), far), x);
  }
}

// x + x^3 p(x^2) near 0, 1 - 2 / (1 + exp(2 x)) further out.
template <class A>
inline typename Vec<A>::Register tanh(typename Vec<A>::Register x) {
  using V = Vec<A>;
  using Register = typename V::Register;
  if constexpr (is_double<A>) {
    return by_lane<A>(x, [](A v) { return __builtin_tanh(v); });
  } else {
    const Register t = V::min(V::set(10.0f), V::abs(x));
    const Register s = t * t;
    const Register p = polynomial<A>(s, -0.33333298f, 0.133319241f, -0.0537838304f, 0.0207959718f, -0.00589515805f);
    const Register one = V::set(1.0f);
    const Register far = one - V::set(2.0f) / (one + exp_in_range<A>(t + t));
    return V::copysign(V::select(V::less_equal(t, V::set(0.6f)), V::fma(p * s, t, t), far), x);
  }
}

// 0 below -88.7228, where exp(-x) is infinite.
template <class A>
inline typename Vec<A>::Register sigmoid(typename Vec<A>::Register x) {
  const typename Vec<A>::Register one = Vec<A>::set(A(1));
  return one / (one + exp<A>(-x));
}

// sigmoid(x) and its derivative, both small without cancellation.
template <class A>
struct Sigmoid {
  typename Vec<A>::Register value, gradient;
};
template <class A>
inline Sigmoid<A> sigmoid_and_gradient(typename Vec<A>::Register x) {
  using V = Vec<A>;
  using Register = typename V::Register;
  const Register one = V::set(A(1));
  const Register power = exp<A>(-V::abs(x));
  const Register above = one / (one + power), below = power * above;
  return {V::select(V::less_equal(V::zero(), x), above, below), above * below};
}

// gelu_tanh(x) = x (1 + tanh(y / 2)) / 2 = x sigmoid(y) with y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline constexpr double gelu_tanh_linear = 1.5957691216057308, gelu_tanh_cubic = 0.07135481627260025;

// silu and quick_gelu are x sigmoid(factor x).
template <Activation a>
inline constexpr double sigmoid_factor = 0;
template <>
inline constexpr double sigmoid_factor<Activation::silu> = 1;
template <>
inline constexpr double sigmoid_factor<Activation::quick_gelu> = 1.702;

// At -infinity gelu, gelu_tanh, silu and quick_gelu are NaN, as torch's are; elsewhere far below 0 they are 0.
template <Activation a, class A>
inline typename Vec<A>::Register activate(typename Vec<A>::Register x) {
  using V = Vec<A>;
  using Register = typename V::Register;
  if constexpr (a == Activation::relu) {
    return V::max(V::zero(), x);
  } else if constexpr (a == Activation::gelu) {
    const Register half = x * V::set(A(0.5));
    return V::fma(half, erf<A>(x * V::set(A(0.70710678118654752))), half);
  } else if constexpr (a == Activation::gelu_tanh) {
    const Register y = x * V::fma(x * x, V::set(A(gelu_tanh_cubic)), V::set(A(gelu_tanh_linear)));
    const Register one = V::set(A(1));
    return x / (one + exp<A>(-y));
  } else if constexpr (sigmoid_factor<a> != 0) {
    const Register one = V::set(A(1));
    return x / (one + exp<A>(x * V::set(A(-sigmoid_factor<a>))));
  } else {
    static_assert(a == Activation::none);
    return x;
  }
}

// d activate(x) / dx. As in torch, relu has 0 at 0 and 1 at NaN, and the others are NaN at both infinities.
template <Activation a, class A>
inline typename Vec<A>::Register activate_gradient(typename Vec<A>::Register x) {
  using V = Vec<A>;
  using Register = typename V::Register;
  if constexpr (a == Activation::relu) {
    return V::select(V::less_equal(x, V::zero()), V::zero(), V::set(A(1)));
  } else if constexpr (a == Activation::gelu) {
    const Register half = V::set(A(0.5));
    const Register distribution = V::fma(half, erf<A>(x * V::set(A(0.70710678118654752))), half);
    const Register density = exp<A>(x * x * V::set(A(-0.5))) * V::set(A(0.39894228040143268));
    return V::fma(x, density, distribution);
  } else if constexpr (a == Activation::gelu_tanh) {
    // Beyond |x| = 100 nothing changes, and the square must not overflow, lest 0 times infinity make NaN of a finite x.
    const Register square = V::min(V::set(A(1e4)), x * x);
    const Register y = x * V::fma(square, V::set(A(gelu_tanh_cubic)), V::set(A(gelu_tanh_linear)));
    const Register slope = V::fma(square, V::set(A(3 * gelu_tanh_cubic)), V::set(A(gelu_tanh_linear)));
    const Sigmoid<A> s = sigmoid_and_gradient<A>(y);
    return V::fma(x * s.gradient, slope, s.value);
  } else if constexpr (sigmoid_factor<a> != 0) {
    const Register factor = V::set(A(sigmoid_factor<a>));
    const Sigmoid<A> s = sigmoid_and_gradient<A>(x * factor);
    return V::fma(x, s.gradient * factor, s.value);  // x * factor may be infinite, and its slope there is 0
  } else {
    static_assert(a == Activation::none);
    return V::set(A(1));
  }
}

}  // namespace
}  // namespace mmk::MMK_TIER
