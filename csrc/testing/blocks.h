// The CPU core's building blocks, per tier, as the test extension (blocks.cpp) shows them to pytest.
#pragma once
#include "core/activation.h"
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

struct VecBlocks {
  int width;
  void (*widen_bfloat16)(const bfloat16*, float*, int64_t);
  void (*widen_float16)(const float16*, float*, int64_t);
  void (*narrow_bfloat16)(const float*, bfloat16*, int64_t);
  void (*narrow_float16)(const float*, float16*, int64_t);
  void (*widen_bfloat16_scalars)(const bfloat16*, float*, int64_t);
  void (*widen_float16_scalars)(const float16*, float*, int64_t);
  void (*narrow_bfloat16_scalars)(const float*, bfloat16*, int64_t);
  void (*narrow_float16_scalars)(const float*, float16*, int64_t);
  float (*sum)(const float*);
  float (*fma)(float, float, float);
};

// A function of core/math.h applied to an array; doubles in the generic tier alone.
struct MathBlock {
  const char* name;
  void (*floats)(const float*, float*, int64_t);
  void (*doubles)(const double*, double*, int64_t);
};

struct MathBlocks {
  MathBlock functions[4 + 2 * activation_count];
};

MMK_TIERS(VecBlocks, vec_blocks)
MMK_TIERS(MathBlocks, math_blocks)

}  // namespace mmk
