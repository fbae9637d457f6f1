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
  void (*sums)(const float*, float*);  // of a square's rows
  float (*fma)(float, float, float);
};

// A function of core/math.h applied to an array; doubles in the generic tier alone.
struct MathBlock {
  const char* name;
  void (*floats)(const float*, float*, int64_t);
  void (*doubles)(const double*, double*, int64_t);
};

struct MathBlocks {
  MathBlock functions[5 + 2 * activation_count];
};

#if MMK_X86_TIERS
namespace amx {
// c [rows][cols], rows `c_row` apart, (+)= a b. a is [rows][depth], or with `a_columns` [depth][rows]; b is [cols][depth], or with
// `b_columns` [depth][cols]. c is there for rows and columns up to the next 32; `memory` has floats_for_tiles, in cache lines.
void multiply_in_tiles(const bfloat16* a, const bfloat16* b, bool a_columns, bool b_columns, int64_t rows, int64_t cols,
                       int64_t depth, float* memory, float* c, int64_t c_row, bool accumulate);
int64_t floats_for_tiles(int64_t rows, int64_t cols, int64_t depth);
}  // namespace amx
#endif

MMK_TIERS(VecBlocks, vec_blocks)
MMK_TIERS(MathBlocks, math_blocks)

}  // namespace mmk
