// The activation functions that a kernel can apply to what it computes (core/math.h evaluates them).
#pragma once

namespace mmk {

// gelu is the erf form, gelu_tanh its approximation by tanh, quick_gelu the one by a sigmoid.
enum class Activation : int { none, relu, gelu, gelu_tanh, silu, quick_gelu };
inline constexpr int activation_count = 6;

}  // namespace mmk
