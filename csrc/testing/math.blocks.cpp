// One tier's elementary functions and activations (core/math.h) as plain functions on arrays, for the test extension.
#include "blocks.h"

#include "core/math.h"

namespace mmk::MMK_TIER {
namespace {

template <class A, class F>
inline void map(const A* from, A* to, int64_t count, const F& f) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::store(to + i, f(V::load(from + i)));
  if (i < count) store_part<A>(to + i, f(load_part<A>(from + i, count - i)), count - i);
}

template <class A>
void exp_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return exp<A>(x); });
}
template <class A>
void exp2_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return exp2<A>(x); });
}
template <class A>
void erf_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return erf<A>(x); });
}
template <class A>
void tanh_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return tanh<A>(x); });
}
template <class A>
void sigmoid_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return sigmoid<A>(x); });
}
template <Activation a, class A>
void activate_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return activate<a, A>(x); });
}
template <Activation a, class A>
void gradient_of(const A* from, A* to, int64_t count) {
  map(from, to, count, [](auto x) { return activate_gradient<a, A>(x); });
}

}  // namespace

#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
#define MMK_MATH_BLOCK(name, function, ...) {name, function<__VA_ARGS__ float>, function<__VA_ARGS__ double>}
#else
#define MMK_MATH_BLOCK(name, function, ...) {name, function<__VA_ARGS__ float>, nullptr}
#endif
#define MMK_ACTIVATION_BLOCKS(a) \
  MMK_MATH_BLOCK(#a, activate_of, Activation::a, ), MMK_MATH_BLOCK(#a "_gradient", gradient_of, Activation::a, )

const MathBlocks math_blocks = {{
    MMK_MATH_BLOCK("exp", exp_of),
    MMK_MATH_BLOCK("exp2", exp2_of),
    MMK_MATH_BLOCK("erf", erf_of),
    MMK_MATH_BLOCK("tanh", tanh_of),
    MMK_MATH_BLOCK("sigmoid", sigmoid_of),
    MMK_ACTIVATION_BLOCKS(none),
    MMK_ACTIVATION_BLOCKS(relu),
    MMK_ACTIVATION_BLOCKS(gelu),
    MMK_ACTIVATION_BLOCKS(gelu_tanh),
    MMK_ACTIVATION_BLOCKS(silu),
    MMK_ACTIVATION_BLOCKS(quick_gelu),
}};

}  // namespace mmk::MMK_TIER
