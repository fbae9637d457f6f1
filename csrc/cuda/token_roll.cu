// Token rolling on CUDA: one pass over the tokens, at the pace of memory.
//
// Index glossary: a row is one frame's tokens, a position is row * tokens + token of the output, as on the CPU. A launch
// takes the segments by value, kMaxSegments at a time, so that nothing is copied to the device and graphs can be captured.
#include "../common/token_roll_problem.h"
#include "core/numbers.h"
#include "core/stream.h"

#include <limits>
#include <tuple>

namespace mmk {
namespace {

constexpr int kMaxSegments = 256;

struct Segments {
  int count;
  int first, tokens;  // the tokens that this launch covers: [first, first + tokens)
  int stop[kMaxSegments];
  int shift[kMaxSegments];
};

struct Layout {
  int64_t frames, tokens, channels, row_stride, token_stride;
};

__device__ __forceinline__ int64_t source_row(const Segments& segments, int64_t frames, int64_t row, int token) {
  int low = 0, high = segments.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (segments.stop[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t frame = row % frames;
  const int64_t source = frame - segments.shift[low];
  return row - frame + (source < 0 ? source + frames : source);
}

// --- copy -------------------------------------------------------------------------------------------------------------
// One block moves `tile` tokens of one row, in units of V bytes; grid: (rows * tiles of a row).
template <class V>
__global__ void __launch_bounds__(256) copy_kernel(const __grid_constant__ Segments segments, Layout layout, const V* x,
                                                   V* out, int units_per_token, int tile, int tiles) {
  const int64_t row = blockIdx.x / tiles;
  const int begin = segments.first + static_cast<int>(blockIdx.x % tiles) * tile;
  const int end = min(begin + tile, segments.first + segments.tokens);
  const int units = (end - begin) * units_per_token;
  for (int i = threadIdx.x; i < units; i += blockDim.x) {
    const int token = begin + i / units_per_token, unit = i % units_per_token;
    const int64_t from = source_row(segments, layout.frames, row, token);
    out[(row * layout.tokens + token) * units_per_token + unit] =
        x[from * layout.row_stride + token * layout.token_stride + unit];
  }
}

// --- LayerNorm ----------------------------------------------------------------------------------------------------------
// The sum over a block, the same bits for every thread: lanes by halving, then the warps' sums in their order.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* warp_sums) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  __syncthreads();  // warp_sums may still be read from the sum before
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  A total = warp_sums[0];
  for (int i = 1; i < warps; ++i) total += warp_sums[i];
  return total;
}

template <class A>
struct Parameters {
  const void* weight;
  const void* bias;
  bool weight_is_a, bias_is_a;  // stored as accumulators, else in the type of x
  int64_t weight_stride, bias_stride;
};

template <class T, class A>
__device__ __forceinline__ A parameter(const void* values, bool is_a, int64_t index) {
  return is_a ? static_cast<const A*>(values)[index] : static_cast<A>(widen(static_cast<const T*>(values)[index]));
}

// One block a position; grid: rows * tokens of the launch. Three passes, the last two out of the first-level cache.
template <class T, class N, class A = typename Accumulator<T>::type>
__global__ void __launch_bounds__(1024) norm_kernel(const __grid_constant__ Segments segments, Layout layout, const T* x, Parameters<A> parameters,
                            A eps, N* normed, T* rolled, A* mean_out, A* rstd_out) {
  __shared__ A warp_sums[32];
  const int64_t row = blockIdx.x / segments.tokens;
  const int token = segments.first + static_cast<int>(blockIdx.x % segments.tokens);
  const int64_t position = row * layout.tokens + token;
  const T* from = x + source_row(segments, layout.frames, row, token) * layout.row_stride + token * layout.token_stride;
  const A count = static_cast<A>(layout.channels);

  A sum = 0;
  for (int64_t c = threadIdx.x; c < layout.channels; c += blockDim.x) sum += widen(from[c]);
  const A mean = block_sum(sum, warp_sums) / count;
  A squares = 0;
  for (int64_t c = threadIdx.x; c < layout.channels; c += blockDim.x) {
    const A centred = widen(from[c]) - mean;
    squares = fma(centred, centred, squares);
  }
  const A rstd = A(1) / sqrt(block_sum(squares, warp_sums) / count + eps);
  for (int64_t c = threadIdx.x; c < layout.channels; c += blockDim.x) {
    const T raw = from[c];
    A value = (widen(raw) - mean) * rstd;
    if (parameters.weight != nullptr)
      value *= parameter<T, A>(parameters.weight, parameters.weight_is_a, c * parameters.weight_stride);
    if (parameters.bias != nullptr)
      value += parameter<T, A>(parameters.bias, parameters.bias_is_a, c * parameters.bias_stride);
    narrow(value, normed[position * layout.channels + c]);
    if (rolled != nullptr) rolled[position * layout.channels + c] = raw;
  }
  if (threadIdx.x == 0) {
    mean_out[position] = mean;
    rstd_out[position] = rstd;
  }
}

// One block a position: grad_x at the position's source. The formula stands in csrc/cpu/token_roll.tier.cpp.
template <class T, class N, class A = typename Accumulator<T>::type>
__global__ void __launch_bounds__(1024) backward_kernel(const __grid_constant__ Segments segments, Layout layout, const N* grad_normed,
                                const T* grad_rolled, const T* x, Parameters<A> parameters, const A* mean_in,
                                const A* rstd_in, T* grad_x) {
  __shared__ A warp_sums[32];
  const int64_t row = blockIdx.x / segments.tokens;
  const int token = segments.first + static_cast<int>(blockIdx.x % segments.tokens);
  const int64_t position = row * layout.tokens + token;
  const int64_t from_row = source_row(segments, layout.frames, row, token);
  const T* from = x + from_row * layout.row_stride + token * layout.token_stride;
  T* to = grad_x + (from_row * layout.tokens + token) * layout.channels;
  const N* upstream = grad_normed == nullptr ? nullptr : grad_normed + position * layout.channels;
  const T* direct = grad_rolled == nullptr ? nullptr : grad_rolled + position * layout.channels;
  const A mean = mean_in[position], rstd = rstd_in[position], count = static_cast<A>(layout.channels);
  const auto gradient = [&](int64_t c) {
    const A g = widen(upstream[c]);
    return parameters.weight == nullptr
               ? g
               : g * parameter<T, A>(parameters.weight, parameters.weight_is_a, c * parameters.weight_stride);
  };
  A sum_g = 0, sum_gh = 0;
  if (upstream != nullptr) {
    for (int64_t c = threadIdx.x; c < layout.channels; c += blockDim.x) {
      const A g = gradient(c);
      sum_g += g;
      sum_gh = fma(g, (widen(from[c]) - mean) * rstd, sum_gh);
    }
    sum_g = block_sum(sum_g, warp_sums) / count;
    sum_gh = block_sum(sum_gh, warp_sums) / count;
  }
  for (int64_t c = threadIdx.x; c < layout.channels; c += blockDim.x) {
    A value = 0;
    if (upstream != nullptr) value = ((gradient(c) - sum_g) - ((widen(from[c]) - mean) * rstd) * sum_gh) * rstd;
    if (direct != nullptr) value += widen(direct[c]);
    narrow(value, to[c]);
  }
}

// Sums over one chunk of positions: grid (columns / blockDim, chunks), a thread a column.
template <class T, class N, class A = typename Accumulator<T>::type>
__global__ void partial_sums_kernel(const __grid_constant__ Segments segments, Layout layout, const N* grad_normed,
                                    const T* x, const A* mean_in, const A* rstd_in, int64_t rows, int64_t chunks, A* partial_weight,
                                    A* partial_bias) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= layout.channels) return;
  const int64_t positions = rows * segments.tokens;
  A weight = 0, bias = 0;
  for (int64_t i = positions * blockIdx.y / chunks; i < positions * (blockIdx.y + 1) / chunks; ++i) {
    const int64_t row = i / segments.tokens;
    const int token = segments.first + static_cast<int>(i % segments.tokens);
    const int64_t position = row * layout.tokens + token;
    const A g = widen(grad_normed[position * layout.channels + column]);
    const T raw = x[source_row(segments, layout.frames, row, token) * layout.row_stride + token * layout.token_stride + column];
    weight = fma(g, (widen(raw) - mean_in[position]) * rstd_in[position], weight);
    bias += g;
  }
  partial_weight[blockIdx.y * layout.channels + column] += weight;
  partial_bias[blockIdx.y * layout.channels + column] += bias;
}

template <class A, class P>
__global__ void reduce_kernel(const A* partial, int64_t chunks, int64_t channels, P* out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= channels) return;
  A sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * channels + column];
  narrow(sum, out[column]);
}

// --- launches -----------------------------------------------------------------------------------------------------------
Layout layout_of(const RollShape& shape) {
  return {shape.frames, shape.tokens, shape.channels, shape.row_stride, shape.token_stride};
}

// launch(segments) for kMaxSegments segments at a time.
template <class Launch>
void for_each_batch(const RollShape& shape, const Launch& launch) {
  check(shape.tokens <= std::numeric_limits<int>::max() && shape.frames <= std::numeric_limits<int>::max(), "x",
        "the CUDA kernels take at most 2^31 - 1 tokens and frames");
  for (int64_t first = 0; first < shape.num_segments; first += kMaxSegments) {
    Segments segments;
    segments.count = static_cast<int>(std::min<int64_t>(kMaxSegments, shape.num_segments - first));
    for (int i = 0; i < segments.count; ++i) {
      segments.stop[i] = static_cast<int>(shape.segments[first + i].stop);
      segments.shift[i] = static_cast<int>(shape.segments[first + i].shift);
    }
    segments.first = static_cast<int>(shape.segments[first].start);
    segments.tokens = segments.stop[segments.count - 1] - segments.first;
    launch(segments);
  }
}

unsigned grid_of(int64_t blocks) {
  check(blocks <= std::numeric_limits<int>::max(), "x", "the CUDA kernels take at most 2^31 - 1 rows times tokens");
  return static_cast<unsigned>(blocks);
}

template <class V>
void launch_copy(const Problem& problem, const void* x, void* out, int64_t element_bytes, cudaStream_t stream) {
  const RollShape& shape = problem.shape;
  const auto units = [&](int64_t elements) { return elements * element_bytes / static_cast<int64_t>(sizeof(V)); };
  Layout layout = layout_of(shape);
  layout.row_stride = units(shape.row_stride);
  layout.token_stride = units(shape.token_stride);
  const int units_per_token = static_cast<int>(units(shape.channels));
  for_each_batch(shape, [&](const Segments& segments) {
    // About eight units a thread keep enough loads in flight.
    const int tile = std::max(1, std::min(segments.tokens, 2048 / std::max(1, units_per_token)));
    const int tiles = static_cast<int>((static_cast<int64_t>(segments.tokens) + tile - 1) / tile);
    copy_kernel<V><<<grid_of(problem.rows * tiles), 256, 0, stream>>>(
        segments, layout, static_cast<const V*>(x), static_cast<V*>(out), units_per_token, tile, tiles);
    check_launch("token_roll");
  });
}

Tensor token_roll(Tensor x, std::int64_t num_frames, std::int64_t divisor, Ints ranges, bool inverse) {
  const Problem problem(x, num_frames, divisor, ranges, inverse);
  const RollShape& shape = problem.shape;
  dtype_index(x);
  Tensor out = new_tensor(x, {problem.rows, shape.tokens, shape.channels}, dtype_of(x));
  mmk_trace_record("token_roll", "cuda");
  if (problem.empty) return out;
  const OnDeviceOf device(x);
  const int64_t element_bytes = static_cast<int64_t>(x.element_size());
  check(shape.channels * element_bytes <= std::numeric_limits<int>::max(), "x", "a token takes 2 GiB or more");
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  // The widest unit that every token's start and length is a multiple of; the output's are those of a packed row.
  const uint64_t all = reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to) |
                       static_cast<uint64_t>(shape.channels * element_bytes) |
                       static_cast<uint64_t>(shape.row_stride * element_bytes) |
                       static_cast<uint64_t>(shape.token_stride * element_bytes);
  if (all % 16 == 0) {
    launch_copy<uint4>(problem, from, to, element_bytes, device.stream());
  } else if (all % 8 == 0) {
    launch_copy<uint2>(problem, from, to, element_bytes, device.stream());
  } else if (all % 4 == 0) {
    launch_copy<unsigned>(problem, from, to, element_bytes, device.stream());
  } else {
    launch_copy<unsigned short>(problem, from, to, element_bytes, device.stream());
  }
  return out;
}

template <class A>
Parameters<A> parameters_of(const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& x, int64_t channels) {
  check_parameter(weight, "weight", x, channels);
  check_parameter(bias, "bias", x, channels);
  const auto is_a = [](const MaybeTensor& p) {
    return p.has_value() && (p->scalar_type() == ScalarType::Float || p->scalar_type() == ScalarType::Double);
  };
  return {weight.has_value() ? weight->const_data_ptr() : nullptr,
          bias.has_value() ? bias->const_data_ptr() : nullptr,
          is_a(weight),
          is_a(bias),
          weight.has_value() ? weight->stride(0) : 0,
          bias.has_value() ? bias->stride(0) : 0};
}

// Enough warps that a thread handles about eight channels.
int threads_for(int64_t channels) {
  const int64_t warps = std::min<int64_t>(32, std::max<int64_t>(1, (channels + 255) / 256));
  return static_cast<int>(warps) * 32;
}

// call(types) with the kernel's x type, normed type: one place where dtypes meet template arguments.
template <class T, class N>
struct Types {
  using x = T;
  using normed = N;
  using accumulator = typename Accumulator<T>::type;
};

template <class F>
void with_types(int dtype, bool wide, const F& call) {
  switch (dtype) {
    case 0:
      return call(Types<float, float>());
    case 1:
      return wide ? call(Types<__nv_bfloat16, float>()) : call(Types<__nv_bfloat16, __nv_bfloat16>());
    case 2:
      return wide ? call(Types<__half, float>()) : call(Types<__half, __half>());
    default:
      return call(Types<double, double>());
  }
}

std::tuple<Tensor, Tensor, Tensor> token_roll_layer_norm(Tensor x, std::int64_t num_frames, std::int64_t divisor,
                                                         Ints ranges, MaybeTensor weight, MaybeTensor bias, double eps,
                                                         bool need_rolled, bool float_normed) {
  const Problem problem(x, num_frames, divisor, ranges, false);
  const RollShape& shape = problem.shape;
  const int dtype = dtype_index(x);
  const bool wide = float_normed && dtype != 3;
  const std::int32_t of_x = dtype_of(x), of_stats = dtype == 3 ? of_x : aoti_torch_dtype_float32();
  Tensor normed = new_tensor(x, {problem.rows, shape.tokens, shape.channels}, wide ? of_stats : of_x);
  Tensor rolled = need_rolled ? new_tensor(x, {problem.rows, shape.tokens, shape.channels}, of_x) : new_tensor(x, {0}, of_x);
  Tensor stats = new_tensor(x, {2, problem.rows, shape.tokens}, of_stats);
  mmk_trace_record("token_roll_layer_norm", "cuda");
  const OnDeviceOf device(x);
  with_types(dtype, wide, [&](auto types) {
    using K = decltype(types);
    using T = typename K::x;
    using N = typename K::normed;
    using A = typename K::accumulator;
    const auto parameters = parameters_of<A>(weight, bias, x, shape.channels);
    A* mean = static_cast<A*>(stats.mutable_data_ptr());
    if (problem.empty) {  // the statistics of no channels are NaN
      cudaMemsetAsync(mean, 0xff, static_cast<std::size_t>(stats.numel()) * sizeof(A), device.stream());
      return check_launch("token_roll_layer_norm");
    }
    for_each_batch(shape, [&](const Segments& segments) {
      norm_kernel<T, N><<<grid_of(problem.rows * segments.tokens), threads_for(shape.channels), 0, device.stream()>>>(
          segments, layout_of(shape), static_cast<const T*>(x.const_data_ptr()), parameters, static_cast<A>(eps),
          static_cast<N*>(normed.mutable_data_ptr()), need_rolled ? static_cast<T*>(rolled.mutable_data_ptr()) : nullptr,
          mean, mean + problem.positions);
      check_launch("token_roll_layer_norm");
    });
  });
  return {normed, rolled, stats};
}

template <class A>
void launch_reduce(const A* partial, int64_t chunks, int64_t channels, const Tensor& out, cudaStream_t stream) {
  const auto launch = [&](auto* to) {
    reduce_kernel<<<grid_of((channels + 127) / 128), 128, 0, stream>>>(partial, chunks, channels, to);
    check_launch("token_roll_layer_norm_backward");
  };
  if constexpr (std::is_same_v<A, double>) {
    launch(static_cast<double*>(out.mutable_data_ptr()));
  } else if (out.scalar_type() == ScalarType::Float) {
    launch(static_cast<float*>(out.mutable_data_ptr()));
  } else if (out.scalar_type() == ScalarType::BFloat16) {
    launch(static_cast<__nv_bfloat16*>(out.mutable_data_ptr()));
  } else {
    launch(static_cast<__half*>(out.mutable_data_ptr()));
  }
}

std::tuple<Tensor, Tensor, Tensor> token_roll_layer_norm_backward(MaybeTensor grad_normed, MaybeTensor grad_rolled,
                                                                  Tensor x, Tensor stats, std::int64_t num_frames,
                                                                  std::int64_t divisor, Ints ranges, MaybeTensor weight,
                                                                  MaybeTensor bias, bool need_weight, bool need_bias) {
  const Problem problem(x, num_frames, divisor, ranges, false);
  const RollShape& shape = problem.shape;
  const int dtype = dtype_index(x);
  const bool wide = check_backward(problem, grad_normed, grad_rolled, x, stats);
  const std::int32_t of_x = dtype_of(x);
  const int64_t channels = shape.channels;
  Tensor grad_x = new_tensor(x, {problem.rows, shape.tokens, channels}, of_x);
  const auto new_parameter_gradient = [&](bool needed, const MaybeTensor& parameter) {
    return new_tensor(x, {needed ? channels : 0}, parameter.has_value() ? dtype_of(*parameter) : of_x);
  };
  Tensor grad_weight = new_parameter_gradient(need_weight, weight);
  Tensor grad_bias = new_parameter_gradient(need_bias, bias);
  const int64_t chunks = chunks_of(problem.positions);
  Tensor partial = new_tensor(stats, {2, chunks, channels}, dtype_of(stats));
  mmk_trace_record("token_roll_layer_norm_backward", "cuda");
  const OnDeviceOf device(x);
  with_types(dtype, wide, [&](auto types) {
    using K = decltype(types);
    using T = typename K::x;
    using N = typename K::normed;
    using A = typename K::accumulator;
    const auto parameters = parameters_of<A>(weight, bias, x, channels);  // bias for its dtype, which grad_bias has
    if (channels == 0) return;
    A* partial_weight = static_cast<A*>(partial.mutable_data_ptr());
    A* partial_bias = partial_weight + chunks * channels;
    cudaMemsetAsync(partial_weight, 0, static_cast<std::size_t>(partial.numel()) * sizeof(A), device.stream());
    check_launch("token_roll_layer_norm_backward");
    if (!problem.empty) {
      const N* upstream = grad_normed.has_value() ? static_cast<const N*>(grad_normed->const_data_ptr()) : nullptr;
      const T* direct = grad_rolled.has_value() ? static_cast<const T*>(grad_rolled->const_data_ptr()) : nullptr;
      const T* from = static_cast<const T*>(x.const_data_ptr());
      const A* mean = static_cast<const A*>(stats.const_data_ptr());
      for_each_batch(shape, [&](const Segments& segments) {
        backward_kernel<T, N><<<grid_of(problem.rows * segments.tokens), threads_for(channels), 0, device.stream()>>>(
            segments, layout_of(shape), upstream, direct, from, parameters, mean, mean + problem.positions,
            static_cast<T*>(grad_x.mutable_data_ptr()));
        check_launch("token_roll_layer_norm_backward");
        if (upstream == nullptr || !(need_weight || need_bias)) return;
        const dim3 grid(grid_of((channels + 127) / 128), static_cast<unsigned>(chunks));
        partial_sums_kernel<T, N><<<grid, 128, 0, device.stream()>>>(segments, layout_of(shape), upstream, from, mean,
                                                                     mean + problem.positions, problem.rows, chunks,
                                                                     partial_weight, partial_bias);
        check_launch("token_roll_layer_norm_backward");
      });
    }
    if (need_weight) launch_reduce<A>(partial_weight, chunks, channels, grad_weight, device.stream());
    if (need_bias) launch_reduce<A>(partial_bias, chunks, channels, grad_bias, device.stream());
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) {
  library.impl("token_roll", TORCH_BOX(&token_roll));
  library.impl("token_roll_layer_norm", TORCH_BOX(&token_roll_layer_norm));
  library.impl("token_roll_layer_norm_backward", TORCH_BOX(&token_roll_layer_norm_backward));
}

}  // namespace mmk
