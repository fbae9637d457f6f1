// Arithmetic of sizes. In an unnamed namespace, because the files of every tier use it: what one tier compiles never serves
// another. For the same reason: no STL here.
#pragma once
#include <stdint.h>

namespace mmk {
namespace {

inline constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
inline constexpr int64_t ceil_div(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
inline constexpr int64_t rounded_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

}  // namespace
}  // namespace mmk
