// Of the walks that multiply keys and values in bfloat16 as they came (attention_tiles.h, attention_pairs.h): what belongs
// to a key beside them, in float32. Included by *.tier.cpp only, in the tier's own unnamed namespace as vec.h is.
#pragma once
#include "attention_scores.h"

namespace mmk::MMK_TIER {
namespace {

// One factor a key: over its norm, where keys are normalised. `signed_factors` as inverse_norm has them.
inline void stage_key_factors(const AttentionCall& call, const Pair& pair, float* factors, float* signed_factors) {
  for (int64_t j = 0; j < pair.len_k; ++j) {
    signed_factors[j] = inverse_norm<float>(pair.key<bfloat16>(call.k, j), call.dim, call.normalise);
    factors[j] = size_of(signed_factors[j]);
  }
}

inline void stage_gates(const AttentionCall& call, const Pair& pair, float* gates) {
  for (int64_t j = 0; j < pair.len_k; ++j) gates[j] = gate_of<float>(call, pair, j);
}

// A key over its norm.
inline const float* unit_row(const bfloat16* key, int64_t dim, float inverse, float* unit) {
  const Vec<float>::Register factor = Vec<float>::set(inverse);
  for_each_vector<float>(dim, [&](int64_t k, int64_t width) {
    store_lanes<float>(unit + k, load_lanes<float>(key + k, width) * factor, width);
  });
  return unit;
}

}  // namespace
}  // namespace mmk::MMK_TIER
