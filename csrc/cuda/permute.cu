// Rows in the order of the experts and back, on CUDA: at the pace of memory, a warp or more a row, and no atomics.
//
// Index glossary as in csrc/cpu/permute.h. A unit is as many elements as one load takes, 16 bytes where every row begins at a
// multiple of them; a segment is the units of a row that one warp has at once. Indices that name nothing are left out: to raise
// would need a sync.
#include "../common/permute_problem.h"
#include "core/numbers.h"
#include "core/stream.h"

#include <limits>
#include <tuple>

namespace mmk {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kUnits = 4;  // that a lane loads before it waits for the first
constexpr int kSegment = 32 * kUnits;

template <class T, int N>
struct alignas(N * sizeof(T)) Unit {
  T values[N];
};

struct Slots {
  const int64_t* order;
  const int64_t* positions;
  int64_t count, of_token;
};

// The work of this warp: a segment of a row.
struct Piece {
  int64_t row, unit;  // the first unit of this lane
  __device__ __forceinline__ explicit Piece(int64_t segments) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    row = item / segments;
    unit = item % segments * kSegment + threadIdx.x % 32;
  }
};

// --- kernels ------------------------------------------------------------------------------------------------------------
// out[i] = x[order[i] / K], or 0; grid: (rows * segments of a row, a warp each).
template <class V>
__global__ void __launch_bounds__(kThreads) copy_kernel(const V* x, int64_t stride, Slots slots, V* out, int64_t rows, int64_t units,
                                                        int64_t segments) {
  const Piece piece(segments);
  if (piece.row >= rows) return;
  const int64_t slot = slots.order[piece.row];
  const bool used = slot >= 0 && slot < slots.count;
  const V* from = x + (used ? slot / slots.of_token * stride : 0);
  V values[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const int64_t unit = piece.unit + 32 * j;
    values[j] = used && unit < units ? from[unit] : V{};
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const int64_t unit = piece.unit + 32 * j;
    if (unit < units) out[piece.row * units + unit] = values[j];
  }
}

// The same times the weight of the slot.
template <class T, int N, class A = typename Accumulator<T>::type>
__global__ void __launch_bounds__(kThreads) gather_kernel(const T* x, int64_t stride, Slots slots, const A* weights, T* out, int64_t rows,
                                                          int64_t units, int64_t segments) {
  using U = Unit<T, N>;
  const Piece piece(segments);
  if (piece.row >= rows) return;
  const int64_t slot = slots.order[piece.row];
  const bool used = slot >= 0 && slot < slots.count;
  const A weight = used ? weights[slot] : A(0);
  const U* from = reinterpret_cast<const U*>(x + (used ? slot / slots.of_token * stride : 0));
  U* to = reinterpret_cast<U*>(out) + piece.row * units;
  U values[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const int64_t unit = piece.unit + 32 * j;
    if (used && unit < units) values[j] = from[unit];
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const int64_t unit = piece.unit + 32 * j;
    if (unit >= units) continue;
    U result;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(used ? widen(values[j].values[i]) * weight : A(0), result.values[i]);
    to[unit] = result;
  }
}

// out[t] = sum_k weights[t, k] rows[positions[t, k]] in the order of k; grid: (tokens * segments of a row, a warp each).
template <class T, int N, class A = typename Accumulator<T>::type>
__global__ void __launch_bounds__(kThreads) combine_kernel(const T* rows, int64_t stride, int64_t num_rows, Slots slots, const A* weights,
                                                           T* out, int64_t tokens, int64_t units, int64_t segments) {
  using U = Unit<T, N>;
  const Piece piece(segments);
  if (piece.row >= tokens) return;
  A sums[kUnits][N];
#pragma unroll
  for (int j = 0; j < kUnits; ++j)
#pragma unroll
    for (int i = 0; i < N; ++i) sums[j][i] = A(0);
  for (int64_t slot = piece.row * slots.of_token; slot < (piece.row + 1) * slots.of_token; ++slot) {
    const int64_t position = slots.positions[slot];
    if (position < 0 || position >= num_rows) continue;
    const A weight = weights == nullptr ? A(1) : weights[slot];
    const U* from = reinterpret_cast<const U*>(rows + position * stride);
    U values[kUnits];
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      const int64_t unit = piece.unit + 32 * j;
      if (unit < units) values[j] = from[unit];
    }
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      if (piece.unit + 32 * j >= units) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) sums[j][i] += widen(values[j].values[i]) * weight;
    }
  }
  U* to = reinterpret_cast<U*>(out) + piece.row * units;
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    const int64_t unit = piece.unit + 32 * j;
    if (unit >= units) continue;
    U result;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(sums[j][i], result.values[i]);
    to[unit] = result;
  }
}

// dots[t, k] = <grad[t], rows[positions[t, k]]>, or 0; grid: (slots, a warp each). A lane sums its own units, then all by halves.
template <class T, int N, class A = typename Accumulator<T>::type>
__global__ void __launch_bounds__(kThreads) dots_kernel(const T* grad, const T* rows, int64_t stride, int64_t num_rows, Slots slots,
                                                        A* dots, int64_t units) {
  using U = Unit<T, N>;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (slot >= slots.count) return;
  const int64_t position = slots.positions[slot];
  A sum = 0;
  if (position >= 0 && position < num_rows) {
    const U* left = reinterpret_cast<const U*>(grad) + slot / slots.of_token * units;
    const U* right = reinterpret_cast<const U*>(rows + position * stride);
    for (int64_t unit = threadIdx.x % 32; unit < units; unit += 32) {
      const U a = left[unit], b = right[unit];
#pragma unroll
      for (int i = 0; i < N; ++i) sum = fma(static_cast<A>(widen(a.values[i])), static_cast<A>(widen(b.values[i])), sum);
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) dots[slot] = sum;
}

// --- launches -----------------------------------------------------------------------------------------------------------
Slots slots_of(const PermuteProblem& problem) { return {problem.order, problem.positions, problem.count(), problem.slots}; }

// Blocks for so many warps.
unsigned blocks_of(int64_t warps) {
  const int64_t blocks = (warps + kWarps - 1) / kWarps;
  check(blocks <= std::numeric_limits<int>::max(), "dispatch", "too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

int64_t segments_of(int64_t units) { return (units + kSegment - 1) / kSegment; }

uint64_t bits(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }
uint64_t bits(const Tensor& x, int64_t elements) { return static_cast<uint64_t>(elements) * x.element_size(); }

template <class T_, int N_>
struct Kind {
  using T = T_;
  using A = typename Accumulator<T>::type;
  static constexpr int N = N_;
};

// call(kind): the dtype, and how many elements of it a unit has. `all`: the bits of every address that a row may begin at.
template <class F>
void with_kind(int number, uint64_t all, const F& call) {
  const auto of = [&]<class T>() {
    if (all % 16 == 0) {
      call(Kind<T, 16 / sizeof(T)>());
    } else {
      call(Kind<T, 1>());
    }
  };
  switch (number) {
    case 0:
      return of.template operator()<float>();
    case 1:
      return of.template operator()<__nv_bfloat16>();
    case 2:
      return of.template operator()<__half>();
    default:
      return of.template operator()<double>();
  }
}

void launch_copy(const Tensor& x, const Rows& from, const PermuteProblem& problem, const Tensor& out, int64_t rows, cudaStream_t stream,
                 const char* op) {
  if (rows == 0 || from.cols == 0) return;
  const uint64_t all = bits(x.const_data_ptr()) | bits(out.mutable_data_ptr()) | bits(x, from.cols) | bits(x, from.stride);
  const auto launch = [&]<class V>() {
    const auto units = [&](int64_t elements) { return elements * static_cast<int64_t>(x.element_size()) / static_cast<int64_t>(sizeof(V)); };
    const int64_t segments = segments_of(units(from.cols));
    copy_kernel<V><<<blocks_of(rows * segments), kThreads, 0, stream>>>(static_cast<const V*>(x.const_data_ptr()), units(from.stride),
                                                                       slots_of(problem), static_cast<V*>(out.mutable_data_ptr()), rows,
                                                                       units(from.cols), segments);
    check_launch(op);
  };
  if (all % 16 == 0) {
    launch.template operator()<uint4>();
  } else if (all % 8 == 0) {
    launch.template operator()<uint2>();
  } else if (all % 4 == 0) {
    launch.template operator()<unsigned>();
  } else {
    launch.template operator()<unsigned short>();
  }
}

void check_most(const PermuteProblem& problem, std::int64_t max_slots) {
  check(max_slots >= 0 && max_slots <= problem.count(), "max_slots", "expected 0 to ", problem.count(), ", got ", max_slots);
}

Tensor permute_tokens(Tensor x, Tensor order, Tensor positions, std::int64_t max_slots) {
  const PermuteProblem problem(order, positions, x);
  const Rows from = problem.tokens_of(x, "x");
  dtype_index(x);
  check_most(problem, max_slots);
  Tensor out = new_tensor(x, {max_slots, from.cols}, dtype_of(x));
  mmk_trace_record("permute_tokens", "cuda");
  const OnDeviceOf device(x);
  launch_copy(x, from, problem, out, max_slots, device.stream(), "permute_tokens");
  return out;
}

Tensor unpermute_tokens(Tensor rows, Tensor order, Tensor positions, MaybeTensor weights) {
  const PermuteProblem problem(order, positions, rows);
  const Rows from = problem.rows_of(rows);
  const int number = dtype_index(rows, "rows");
  const void* of_slots = weights_of_slots(weights, rows, problem);
  Tensor out = new_tensor(rows, {problem.tokens, from.cols}, dtype_of(rows));
  mmk_trace_record("unpermute_tokens", "cuda");
  if (out.numel() == 0) return out;
  const OnDeviceOf device(rows);
  const uint64_t all =
      bits(rows.const_data_ptr()) | bits(out.mutable_data_ptr()) | bits(rows, from.cols) | bits(rows, from.stride);
  with_kind(number, all, [&](auto kind) {
    using K = decltype(kind);
    using T = typename K::T;
    const int64_t units = from.cols / K::N, segments = segments_of(units);
    combine_kernel<T, K::N><<<blocks_of(problem.tokens * segments), kThreads, 0, device.stream()>>>(
        static_cast<const T*>(rows.const_data_ptr()), from.stride, from.rows, slots_of(problem), static_cast<const typename K::A*>(of_slots),
        static_cast<T*>(out.mutable_data_ptr()), problem.tokens, units, segments);
    check_launch("unpermute_tokens");
  });
  return out;
}

// Without `rows`, the gradient of the weights is not wanted.
std::tuple<Tensor, Tensor> unpermute_tokens_backward(Tensor grad, MaybeTensor rows, Tensor order, Tensor positions, MaybeTensor weights,
                                                     std::int64_t max_slots, bool need_rows) {
  const PermuteProblem problem(order, positions, grad);
  const Rows upstream = problem.tokens_of(grad, "grad");
  const int number = dtype_index(grad, "grad");
  check(grad.is_contiguous(), "grad", "expected contiguous rows");
  check_most(problem, max_slots);
  const void* of_slots = weights_of_slots(weights, grad, problem);
  Tensor grad_rows = need_rows ? new_tensor(grad, {max_slots, upstream.cols}, dtype_of(grad)) : new_tensor(grad, {0}, dtype_of(grad));
  const std::int32_t sums = number == 3 ? dtype_of(grad) : aoti_torch_dtype_float32();
  Tensor grad_weights = rows.has_value() ? new_tensor(grad, {problem.tokens, problem.slots}, sums) : new_tensor(grad, {0}, sums);
  mmk_trace_record("unpermute_tokens_backward", "cuda");
  const OnDeviceOf device(grad);
  const uint64_t of_grad = bits(grad.const_data_ptr()) | bits(grad, upstream.cols);
  if (need_rows && of_slots == nullptr) {
    launch_copy(grad, upstream, problem, grad_rows, max_slots, device.stream(), "unpermute_tokens_backward");
  } else if (grad_rows.numel() > 0) {
    with_kind(number, of_grad | bits(grad_rows.mutable_data_ptr()), [&](auto kind) {
      using K = decltype(kind);
      using T = typename K::T;
      const int64_t units = upstream.cols / K::N, segments = segments_of(units);
      gather_kernel<T, K::N><<<blocks_of(max_slots * segments), kThreads, 0, device.stream()>>>(
          static_cast<const T*>(grad.const_data_ptr()), upstream.cols, slots_of(problem), static_cast<const typename K::A*>(of_slots),
          static_cast<T*>(grad_rows.mutable_data_ptr()), max_slots, units, segments);
      check_launch("unpermute_tokens_backward");
    });
  }
  if (rows.has_value()) {
    const Rows from = problem.rows_of(*rows);
    check(dtype_of(*rows) == dtype_of(grad) && on_one_device(*rows, grad) && from.cols == upstream.cols, "rows",
          "expected the dtype, device and channels of grad");
    if (problem.count() == 0) return {grad_rows, grad_weights};
    with_kind(number, of_grad | bits(rows->const_data_ptr()) | bits(grad, from.stride), [&](auto kind) {
      using K = decltype(kind);
      using T = typename K::T;
      dots_kernel<T, K::N><<<blocks_of(problem.count()), kThreads, 0, device.stream()>>>(
          static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(rows->const_data_ptr()), from.stride, from.rows,
          slots_of(problem), static_cast<typename K::A*>(grad_weights.mutable_data_ptr()), from.cols / K::N);
      check_launch("unpermute_tokens_backward");
    });
  }
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) {
  library.impl("permute_tokens", TORCH_BOX(&permute_tokens));
  library.impl("unpermute_tokens", TORCH_BOX(&unpermute_tokens));
  library.impl("unpermute_tokens_backward", TORCH_BOX(&unpermute_tokens_backward));
}

}  // namespace mmk
