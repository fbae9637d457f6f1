// Kernels of token rolling and of rolling fused with LayerNorm. Compiled once per tier.
#include "token_roll.h"

#include "core/copy.h"
#include "core/rows.h"

namespace mmk::MMK_TIER {
namespace {

// Walks output positions [begin, end) as runs of tokens that share a row and a segment:
// visit(position, count, source_row, token).
template <class Visit>
inline void for_each_run(const RollShape& shape, int64_t begin, int64_t end, const Visit& visit) {
  int64_t row = begin / shape.tokens;
  int64_t token = begin % shape.tokens;
  const RollSegment* segment = shape.segments;
  while (begin < end) {
    while (segment->stop <= token) ++segment;
    const int64_t frame = row % shape.frames;
    const int64_t source_frame = frame >= segment->shift ? frame - segment->shift : frame - segment->shift + shape.frames;
    int64_t count = segment->stop - token;
    if (count > end - begin) count = end - begin;
    visit(begin, count, row - frame + source_frame, token);
    begin += count;
    token += count;
    if (token == shape.tokens) {
      token = 0;
      ++row;
      segment = shape.segments;
    }
  }
}

void copy(const RollCopy& call, int64_t begin, int64_t end) {
  const RollShape& shape = call.shape;
  const char* x = static_cast<const char*>(call.x);
  char* out = static_cast<char*>(call.out);
  const int64_t token_bytes = shape.channels * call.element_bytes;
  const bool packed = shape.token_stride == shape.channels;
  for_each_run(shape, begin, end, [&](int64_t position, int64_t count, int64_t row, int64_t token) {
    const char* from = x + (row * shape.row_stride + token * shape.token_stride) * call.element_bytes;
    char* to = out + position * token_bytes;
    if (packed) {
      copy_bytes(to, from, count * token_bytes, call.stream);
    } else {
      for (int64_t i = 0; i < count; ++i)
        copy_bytes(to + i * token_bytes, from + i * shape.token_stride * call.element_bytes, token_bytes, call.stream);
    }
  });
  if (call.stream) stream_fence();
}

// T: x and rolled; N: normed. Three passes over a row that stays in the first-level cache.
template <class T, class N>
void norm(const RollNorm& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const RollShape& shape = call.shape;
  const int64_t channels = shape.channels;
  const A* weight = static_cast<const A*>(call.weight);
  const A* bias = static_cast<const A*>(call.bias);
  const bool stream = call.stream && rows_aligned<N>(call.normed, channels) &&
                      (call.rolled == nullptr || rows_aligned<T>(call.rolled, channels));
  for_each_run(shape, begin, end, [&](int64_t position, int64_t count, int64_t row, int64_t token) {
    for (int64_t p = position; p < position + count; ++p, ++token) {
      const T* x = static_cast<const T*>(call.x) + row * shape.row_stride + token * shape.token_stride;
      N* normed = static_cast<N*>(call.normed) + p * channels;
      T* rolled = call.rolled == nullptr ? nullptr : static_cast<T*>(call.rolled) + p * channels;

      const A mean = sum_over<A>(channels, [&](Register sum, int64_t i, int64_t lanes) {
                       if (stream && rolled != nullptr) V::stream_raw(rolled + i, x + i);
                       return sum + load_lanes<A>(x + i, lanes);
                     }) / static_cast<A>(channels);
      const Register means = V::set(mean);
      const A variance = sum_over<A>(channels, [&](Register sum, int64_t i, int64_t lanes) {
                           __builtin_prefetch(x + shape.token_stride + i);
                           const Register centred = load_centred<A>(x + i, means, lanes);
                           return V::fma(centred, centred, sum);
                         }) / static_cast<A>(channels);
      const A rstd = A(1) / square_root(variance + static_cast<A>(call.eps));
      const Register rstds = V::set(rstd);
      if (call.mean != nullptr) {
        static_cast<A*>(call.mean)[p] = mean;
        static_cast<A*>(call.rstd)[p] = rstd;
      }

      const auto normalised = [&](int64_t i, int64_t lanes) {
        Register value = (load_lanes<A>(x + i, lanes) - means) * rstds;
        if (weight != nullptr && bias != nullptr)
          return V::fma(value, load_lanes<A>(weight + i, lanes), load_lanes<A>(bias + i, lanes));
        if (weight != nullptr) value = value * load_lanes<A>(weight + i, lanes);
        if (bias != nullptr) value = value + load_lanes<A>(bias + i, lanes);
        return value;
      };
      if (stream) {
        for (int64_t i = 0; i < channels; i += V::width) V::stream(normed + i, normalised(i, V::width));
        continue;
      }
      int64_t i = 0;
      for (; i + V::width <= channels; i += V::width) V::store(normed + i, normalised(i, V::width));
      if (i < channels) store_part<A>(normed + i, normalised(i, channels - i), channels - i);
      if (rolled != nullptr) memcpy(rolled, x, static_cast<size_t>(channels) * sizeof(T));
    }
  });
  if (stream) stream_fence();
}

// With h = (x - mean) rstd and g = grad_normed * weight:
//   grad_x = rstd (g - mean(g) - h mean(g h)) + grad_rolled,  grad_weight = sum grad_normed h,  grad_bias = sum grad_normed.
// Both means are centred as sums over the row; padding lanes are zero in g, so they add nothing.
template <class T, class N>
void backward(const RollNormBackward& call, int64_t begin_chunk, int64_t end_chunk) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  const RollShape& shape = call.shape;
  const int64_t channels = shape.channels;
  const A* weight = static_cast<const A*>(call.weight);
  const bool stream = call.stream && rows_aligned<T>(call.grad_x, channels);
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    A* sum_weight = call.partial_weight == nullptr ? nullptr : static_cast<A*>(call.partial_weight) + chunk * channels;
    A* sum_bias = call.partial_bias == nullptr ? nullptr : static_cast<A*>(call.partial_bias) + chunk * channels;
    if (sum_weight != nullptr) memset(sum_weight, 0, static_cast<size_t>(channels) * sizeof(A));
    if (sum_bias != nullptr) memset(sum_bias, 0, static_cast<size_t>(channels) * sizeof(A));

    const int64_t begin = call.positions * chunk / call.chunks;
    const int64_t end = call.positions * (chunk + 1) / call.chunks;
    for_each_run(shape, begin, end, [&](int64_t position, int64_t count, int64_t row, int64_t token) {
      for (int64_t p = position; p < position + count; ++p, ++token) {
        T* grad_x = static_cast<T*>(call.grad_x) + (row * shape.tokens + token) * channels;
        const T* grad_rolled =
            call.grad_rolled == nullptr ? nullptr : static_cast<const T*>(call.grad_rolled) + p * channels;
        if (call.grad_normed == nullptr) {
          if (grad_rolled != nullptr) {
            memcpy(grad_x, grad_rolled, static_cast<size_t>(channels) * sizeof(T));
          } else {
            memset(grad_x, 0, static_cast<size_t>(channels) * sizeof(T));
          }
          continue;
        }
        const T* x = static_cast<const T*>(call.x) + row * shape.row_stride + token * shape.token_stride;
        const N* grad_normed = static_cast<const N*>(call.grad_normed) + p * channels;
        const Register means = V::set(static_cast<const A*>(call.mean)[p]);
        const Register rstds = V::set(static_cast<const A*>(call.rstd)[p]);
        const auto gradient = [&](int64_t i, int64_t lanes) {
          const Register g = load_lanes<A>(grad_normed + i, lanes);
          return weight == nullptr ? g : g * load_lanes<A>(weight + i, lanes);
        };
        const auto normalised = [&](int64_t i, int64_t lanes) { return (load_lanes<A>(x + i, lanes) - means) * rstds; };

        const Sums<A> sums = sums_over<A>(channels, [&](Register& sum_g, Register& sum_gh, int64_t i, int64_t lanes) {
          if (grad_rolled != nullptr) __builtin_prefetch(grad_rolled + i);
          const Register g = gradient(i, lanes);
          sum_g = sum_g + g;
          sum_gh = V::fma(g, normalised(i, lanes), sum_gh);
        });
        const A mean_g = sums.first / static_cast<A>(channels), mean_gh = sums.second / static_cast<A>(channels);
        const Register mean_gs = V::set(mean_g), mean_ghs = V::set(mean_gh);
        const auto finish = [&](int64_t i, int64_t lanes) -> Register {
          __builtin_prefetch(x + shape.token_stride + i);
          __builtin_prefetch(grad_normed + channels + i);
          const Register h = normalised(i, lanes);
          const Register raw = load_lanes<A>(grad_normed + i, lanes);
          if (sum_weight != nullptr)
            store_lanes<A>(sum_weight + i, V::fma(raw, h, load_lanes<A>(sum_weight + i, lanes)), lanes);
          if (sum_bias != nullptr) store_lanes<A>(sum_bias + i, raw + load_lanes<A>(sum_bias + i, lanes), lanes);
          Register value = ((gradient(i, lanes) - mean_gs) - h * mean_ghs) * rstds;
          if (grad_rolled != nullptr) value = value + load_lanes<A>(grad_rolled + i, lanes);
          return value;
        };
        int64_t i = 0;
        if (stream) {
          for (; i < channels; i += V::width) V::stream(grad_x + i, finish(i, V::width));
        } else {
          for (; i + V::width <= channels; i += V::width) V::store(grad_x + i, finish(i, V::width));
          if (i < channels) store_part<A>(grad_x + i, finish(i, channels - i), channels - i);
        }
      }
    });
  }
  if (stream) stream_fence();
}

}  // namespace

const TokenRollKernels token_roll_kernels = {
    copy,
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {norm<float, float>, norm<bfloat16, bfloat16>, norm<float16, float16>, norm<double, double>},
    {norm<float, float>, norm<bfloat16, float>, norm<float16, float>, norm<double, double>},
    {backward<float, float>, backward<bfloat16, bfloat16>, backward<float16, float16>, backward<double, double>},
    {backward<float, float>, backward<bfloat16, float>, backward<float16, float>, backward<double, double>},
#else
    {norm<float, float>, norm<bfloat16, bfloat16>, norm<float16, float16>, nullptr},
    {norm<float, float>, norm<bfloat16, float>, norm<float16, float>, nullptr},
    {backward<float, float>, backward<bfloat16, bfloat16>, backward<float16, float16>, nullptr},
    {backward<float, float>, backward<bfloat16, float>, backward<float16, float>, nullptr},
#endif
};

}  // namespace mmk::MMK_TIER
