// Experts, one tier's own work: sums over the slots of a token, and products of rows with a bias.
#include "moe.h"

#include "core/rows.h"
#include "core/vec.h"

namespace mmk::MMK_TIER {
namespace {

template <class T>
void combine(const MoeCombine& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* positions = call.positions + token * call.slots;
    const A* weights = call.weights == nullptr ? nullptr : static_cast<const A*>(call.weights) + token * call.slots;
    const T* residual = call.residual == nullptr ? nullptr : static_cast<const T*>(call.residual) + token * call.residual_stride;
    T* out = static_cast<T*>(call.out) + token * call.cols;
    for_each_vector<A>(call.cols, [&](int64_t col, int64_t lanes) {
      typename V::Register sum = V::zero();
      for (int64_t slot = 0; slot < call.slots; ++slot) {
        if (positions[slot] < 0) continue;
        const auto row = load_lanes<A>(static_cast<const A*>(call.rows) + positions[slot] * call.cols + col, lanes);
        sum = weights == nullptr ? sum + row : sum + row * V::set(weights[slot]);
      }
      if (residual != nullptr) sum = sum + load_lanes<A>(residual + col, lanes);
      store_lanes<A>(out + col, sum, lanes);
    });
  }
}

template <class T>
void add_dots(const MoeDots& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  for (int64_t row = begin; row < end; ++row)
    static_cast<A*>(call.dots)[row] +=
        dot<A>(static_cast<const T*>(call.rows) + row * call.stride, static_cast<const A*>(call.vector), call.cols);
}

}  // namespace

const MoeKernels moe_kernels = {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {combine<float>, combine<bfloat16>, combine<float16>, combine<double>},
    {add_dots<float>, add_dots<bfloat16>, add_dots<float16>, add_dots<double>},
#else
    {combine<float>, combine<bfloat16>, combine<float16>, nullptr},
    {add_dots<float>, add_dots<bfloat16>, add_dots<float16>, nullptr},
#endif
};

}  // namespace mmk::MMK_TIER
