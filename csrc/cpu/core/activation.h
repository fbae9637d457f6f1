// The activation functions that a kernel can apply to what it computes (core/math.h evaluates them).
#pragma once

namespace mmk {

// gelu is the erf form, gelu_tanh its approximation by tanh.
enum class Activation : int { none, relu, gelu, gelu_tanh, silu };
inline constexpr int activation_count = 5;

}  // namespace mmk
