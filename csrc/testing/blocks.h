// The CPU core's building blocks, per tier, as the test extension (blocks.cpp) shows them to pytest.
#pragma once
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

MMK_TIERS(VecBlocks, vec_blocks)

}  // namespace mmk
