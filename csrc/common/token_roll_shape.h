// Token rolling: the shape of one call. Plain data, for kernels that include no torch.
#pragma once
#include <stdint.h>

namespace mmk {

// Tokens [start, stop) of every frame t come from frame (t - shift) mod frames, 0 <= shift < frames. The segments of a
// call cover [0, tokens) in order without gaps.
struct RollSegment {
  int64_t start, stop, shift;
};

struct RollShape {
  int64_t frames, tokens, channels;
  int64_t row_stride, token_stride;  // of x, in elements; every output is contiguous
  const RollSegment* segments;
  int64_t num_segments;
};

}  // namespace mmk
