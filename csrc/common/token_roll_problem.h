// Token rolling: the checks that every compiled entry makes before a kernel runs, and what they leave.
#pragma once
#include <vector>

#include "arguments.h"
#include "token_roll_shape.h"

namespace mmk {

using Ints = std::vector<std::int64_t>;

// The shape of one call; owns the segments that RollShape points to.
struct Problem {
  std::vector<RollSegment> segments;
  RollShape shape{};
  std::int64_t rows = 0, positions = 0;
  bool empty = false;

  // divisor > 0: the system's own two ranges, f = tokens / divisor tokens after the first and the last f. divisor 0:
  // `ranges`, a start, stop and shift each, ascending and disjoint. What no range names does not move.
  Problem(const Tensor& x, std::int64_t frames, std::int64_t divisor, const Ints& ranges, bool inverse) {
    check(x.dim() == 3, "x", "expected [B*T, N, C], got ", x.dim(), " dimensions");
    rows = x.size(0);
    shape.tokens = x.size(1);
    shape.channels = x.size(2);
    shape.frames = frames;
    shape.row_stride = x.stride(0);
    shape.token_stride = x.stride(1);
    check(shape.channels <= 1 || x.stride(2) == 1 || x.numel() == 0, "x", "the last dimension must be contiguous, got stride ", x.stride(2));
    check(frames >= 1 && rows % frames == 0, "num_frames", "must divide the ", rows, " rows of x, got ", frames);
    if (divisor > 0) {
      const std::int64_t fold = shape.tokens / divisor;
      check(2 * fold < shape.tokens || fold == 0, "divisor", "must leave the first token and two disjoint ranges of ",
            shape.tokens, " tokens, got ", divisor);
      if (fold > 0) {
        add(1, 1 + fold, 1, inverse);
        add(shape.tokens - fold, shape.tokens, -1, inverse);
      }
    } else {
      check(ranges.size() % 3 == 0, "ranges", "expected (start, stop, shift) triples, got ", ranges.size(), " numbers");
      for (std::size_t i = 0; i < ranges.size(); i += 3) add(ranges[i], ranges[i + 1], ranges[i + 2], inverse);
    }
    if (end() < shape.tokens) segments.push_back({end(), shape.tokens, 0});
    shape.segments = segments.data();
    shape.num_segments = static_cast<std::int64_t>(segments.size());
    positions = rows * shape.tokens;
    empty = positions == 0 || shape.channels == 0;
  }

 private:
  std::int64_t end() const { return segments.empty() ? 0 : segments.back().stop; }

  void add(std::int64_t start, std::int64_t stop, std::int64_t shift, bool inverse) {
    if (start == stop && start >= 0 && stop <= shape.tokens) return;  // names no token, so it overlaps nothing
    check(end() <= start && start <= stop && stop <= shape.tokens, "ranges", "(", start, ", ", stop,
          ") must be ascending, disjoint and within the ", shape.tokens, " tokens of x");
    if (end() < start) segments.push_back({end(), start, 0});
    const std::int64_t forward = (shift % shape.frames + shape.frames) % shape.frames;
    segments.push_back({start, stop, inverse && forward != 0 ? shape.frames - forward : forward});
  }
};

// Answers whether grad_normed is float32 beside a half-precision x.
inline bool check_backward(const Problem& problem, const MaybeTensor& grad_normed, const MaybeTensor& grad_rolled,
                           const Tensor& x, const Tensor& stats) {
  const RollShape& shape = problem.shape;
  const auto check_gradient = [&](const MaybeTensor& gradient, const char* name) {
    if (!gradient.has_value()) return;
    check(gradient->is_contiguous() && gradient->dim() == 3 && gradient->size(0) == problem.rows &&
              gradient->size(1) == shape.tokens && gradient->size(2) == shape.channels,
          name, "expected a contiguous gradient of the shape of x");
    check(on_one_device(*gradient, x), name, "expected the device of x");
  };
  check_gradient(grad_normed, "grad_normed");
  check_gradient(grad_rolled, "grad_rolled");
  const bool wide = grad_normed.has_value() && dtype_of(*grad_normed) != dtype_of(x);
  check(!wide || (grad_normed->scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double), "grad_normed",
        "expected the dtype of x or float32");
  check(!grad_rolled.has_value() || dtype_of(*grad_rolled) == dtype_of(x), "grad_rolled", "expected the dtype of x");
  check(on_one_device(stats, x), "stats", "expected the device of x");
  check(stats.is_contiguous() && stats.numel() == 2 * problem.positions &&
            stats.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        "stats", "expected the [2, B*T, N] statistics of the forward call");
  return wide;
}

}  // namespace mmk
