// Hashed binary attention on CUDA: codes, and attention of codes. The formulas stand in csrc/cpu/hash_attention.h; what differs
// is that sums by code are made by signs, one warp for four bits, since a table of sums would be written by all threads at once.
//
// Index glossary: a head is one sample's, N its rows, D channels, W columns of values, m supports. Rows are cut into chunks by
// their number alone, whose sums are added up in order: no atomics but for flags, and the same bits from run to run.
#include "../common/arguments.h"
#include "core/numbers.h"
#include "core/stream.h"

#include <limits>
#include <tuple>

namespace mmk {
namespace {

constexpr int kChunkRows = 256;
constexpr int kUnitWarps = 8;
constexpr int kThreads = 128;  // of kernels with a row or a number a thread
constexpr int kMaxBits = 32;
constexpr int kBitsOfWarp = 4;
constexpr int kRowsOfBlock = 64;  // that output_kernel reads with one copy of S

// Of [B, H, N, C]: where a head's rows begin.
struct Heads {
  int64_t heads, sample_stride, head_stride, row_stride;
  __host__ __device__ int64_t at(int64_t head) const { return head / heads * sample_stride + head % heads * head_stride; }
};

// A block's head and which part of it, heads having so many parts one after the other: in one dimension of the grid, the only
// one that is as long as sizes may be.
struct Part {
  int64_t head, index;
};

__host__ __device__ __forceinline__ int64_t parts_of(int64_t items, int64_t a_part) { return (items + a_part - 1) / a_part; }

__device__ __forceinline__ Part part_of(int64_t items, int64_t a_part) {
  const unsigned parts = static_cast<unsigned>(parts_of(items, a_part));
  return {blockIdx.x / parts, blockIdx.x % parts};
}

// --- hash functions -----------------------------------------------------------------------------------------------------
// A support's row in accumulators: the anchor, padded; its column of the projection, padded to 32 bits; 1 + |a|^2; the mean.
struct Table {
  int channels, padded, supports, bits;
  __host__ __device__ int64_t row() const { return padded + kMaxBits + 2; }
};

template <class T, class A>
__device__ __forceinline__ A parameter(const void* values, bool is_a, int64_t index) {
  return is_a ? static_cast<const A*>(values)[index] : static_cast<A>(widen(static_cast<const T*>(values)[index]));
}

struct Functions {
  const void *anchors, *projection, *mean;
  bool anchors_are_a, projection_is_a, mean_is_a;
};

// A block a support; grid (H * m).
template <class T, class A>
__global__ void __launch_bounds__(32) prepare_kernel(const Table table, const Functions f, A* out) {
  const auto [head, j] = part_of(table.supports, 1);
  A* to = out + (head * table.supports + j) * table.row();
  A square = 0;
  for (int c = threadIdx.x; c < table.padded; c += 32) {
    const A value = c < table.channels
                        ? parameter<T, A>(f.anchors, f.anchors_are_a, (head * table.supports + j) * table.channels + c)
                        : A(0);
    to[c] = value;
    square = fma(value, value, square);
  }
  for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
  const int r = threadIdx.x;
  to[table.padded + r] =
      r < table.bits ? parameter<T, A>(f.projection, f.projection_is_a, (head * table.bits + r) * table.supports + j) : A(0);
  if (r == 0) {
    to[table.padded + kMaxBits] = A(1) + square;
    to[table.padded + kMaxBits + 1] = parameter<T, A>(f.mean, f.mean_is_a, head * table.supports + j);
  }
}

// Sums of u over a chunk's rows; grid (heads * chunks). First a warp makes the inverse length of a row at a time; then the
// warps share the rows, a lane a column, and their sums are added up in the warps' order.
template <class T, class A>
__global__ void __launch_bounds__(32 * kUnitWarps)
    units_kernel(const Heads heads, const T* qk, int64_t rows, int channels, A* sums) {
  __shared__ A inverse[kChunkRows];
  __shared__ A of_warps[kUnitWarps][32];
  const auto [head, chunk] = part_of(rows, kChunkRows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int count = static_cast<int>(min(rows - chunk * kChunkRows, static_cast<int64_t>(kChunkRows)));
  const T* from = qk + heads.at(head) + chunk * kChunkRows * heads.row_stride;
  for (int row = warp; row < count; row += kUnitWarps) {
    const T* x = from + row * heads.row_stride;
    A square = 0;
    for (int c = lane; c < channels; c += 32) square = fma(A(widen(x[c])), A(widen(x[c])), square);
    for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (lane == 0) inverse[row] = A(1) / sqrt(square);
  }
  __syncthreads();
  for (int first = 0; first < channels; first += 32) {
    const int c = first + lane;
    A sum = 0;
    if (c < channels)
      for (int row = warp; row < count; row += kUnitWarps)
        sum = fma(A(widen(from[row * heads.row_stride + c])), inverse[row], sum);
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < channels) {
      for (int i = 1; i < kUnitWarps; ++i) sum += of_warps[i][lane];
      sums[static_cast<int64_t>(blockIdx.x) * channels + c] = sum;
    }
    __syncthreads();
  }
}

// sigma, the mean of 1 + |a|^2 - 2 u.a: one warp a head.
template <class A>
__global__ void __launch_bounds__(32) sigma_kernel(const Table table, const A* tables, int64_t of_one_sample, const A* sums,
                                                   int64_t chunks, int64_t rows, A* sigma, int* flags) {
  const int64_t head = blockIdx.x;
  const A* anchors = tables + head % of_one_sample * table.supports * table.row();
  double squares = 0, products = 0;
  for (int j = threadIdx.x; j < table.supports; j += 32) squares += anchors[j * table.row() + table.padded + kMaxBits];
  for (int c = threadIdx.x; c < table.channels; c += 32) {
    double of_units = 0, of_anchors = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) of_units += sums[(head * chunks + chunk) * table.channels + c];
    for (int j = 0; j < table.supports; ++j) of_anchors += anchors[j * table.row() + c];
    products += of_units * of_anchors;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    products += __shfl_xor_sync(0xffffffffu, products, offset);
  }
  if (threadIdx.x == 0) {
    const double count = static_cast<double>(table.supports);
    sigma[head] = static_cast<A>(squares / count - 2 * products / (count * static_cast<double>(rows)));
    flags[head] = 0;
  }
}

// A thread a row, its channels in registers where they are at most `held` (0: read again for every support).
template <class T, class A, int held>
__global__ void __launch_bounds__(kThreads) hash_kernel(const Heads heads, const T* qk, int64_t rows, const Table table,
                                                   const A* tables, const A* sigmas, int32_t* codes, int32_t* inside,
                                                   int* flags) {
  const auto [head, block] = part_of(rows, kThreads);
  const int64_t row = block * kThreads + threadIdx.x;
  if (row >= rows) return;
  const T* x = qk + heads.at(head) + row * heads.row_stride;
  constexpr int registers = held > 0 ? held : 1;
  A channel[registers];
  A square = 0;
  if constexpr (held > 0) {
#pragma unroll
    for (int c = 0; c < held; ++c) {
      channel[c] = c < table.channels ? A(widen(x[c])) : A(0);
      square = fma(channel[c], channel[c], square);
    }
  } else {
    for (int c = 0; c < table.channels; ++c) square = fma(A(widen(x[c])), A(widen(x[c])), square);
  }
  const A sigma = sigmas[head], scale = A(1) / (sqrt(square) * sigma), half = A(-0.5) / sigma;
  A y[kMaxBits];
#pragma unroll
  for (int r = 0; r < kMaxBits; ++r) y[r] = A(0);
  const A* support = tables + head % heads.heads * table.supports * table.row();
  for (int j = 0; j < table.supports; ++j, support += table.row()) {
    A dot = 0;
    if constexpr (held > 0) {
#pragma unroll
      for (int c = 0; c < held; ++c) dot = fma(channel[c], support[c], dot);
    } else {
      for (int c = 0; c < table.channels; ++c) dot = fma(A(widen(x[c])), support[c], dot);
    }
    const A* projection = support + table.padded;
    const A kernel = exp(fma(dot, scale, projection[kMaxBits] * half)) - projection[kMaxBits + 1];
#pragma unroll
    for (int r = 0; r < kMaxBits; ++r) y[r] = fma(kernel, projection[r], y[r]);
  }
  unsigned code = 0, passes = 0;
  bool numbers = true;
#pragma unroll
  for (int r = 0; r < kMaxBits; ++r) {
    if (r >= table.bits) continue;
    code |= static_cast<unsigned>(y[r] > A(0)) << r;
    passes |= static_cast<unsigned>(y[r] > A(-1) && y[r] < A(1)) << r;
    numbers = numbers && y[r] == y[r];
  }
  codes[head * rows + row] = static_cast<int32_t>(code);
  if (inside != nullptr) inside[head * rows + row] = static_cast<int32_t>(passes);
  if (!numbers) flags[head] = 1;  // every thread that writes writes the same
}

// --- sums by code -------------------------------------------------------------------------------------------------------
// S [bits, W], z [bits] and the sum of values [W] of a head lie one after the other.
struct State {
  int bits;
  int64_t width;
  __host__ __device__ int64_t counts() const { return bits * width; }
  __host__ __device__ int64_t total() const { return bits * width + bits; }
  __host__ __device__ int64_t size() const { return bits * width + bits + width; }
};

// Over one chunk of rows: a lane a column, a warp four bits; grid (heads * chunks, blocks of 32 columns; one where W is 0).
// `values` may be null, and so may `scale`, which rows are multiplied by. Two blocks a multiprocessor are asked for since ptxas
// by itself spills for the sake of more.
template <class T, class A>
__global__ void __launch_bounds__(256, 2) sum_kernel(const State state, const Heads of_codes, const int32_t* codes,
                                                  const Heads heads, const T* values, const A* scale, int64_t rows, A* sums) {
  const auto [head, chunk] = part_of(rows, kChunkRows);
  const int64_t column = static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x % 32;
  const int first = static_cast<int>(threadIdx.x / 32) * kBitsOfWarp;
  const int64_t begin = chunk * kChunkRows, end = min(rows, begin + kChunkRows);
  const bool reads = values != nullptr && column < state.width;
  const int32_t* code = codes + of_codes.at(head);
  const T* from = reads ? values + heads.at(head) + column : nullptr;
  A sum[kBitsOfWarp] = {}, total = 0;
  int count[kBitsOfWarp] = {};
  for (int64_t row = begin; row < end; ++row) {
    const unsigned bits = static_cast<unsigned>(code[row]) >> first;
    A value = reads ? A(widen(from[row * heads.row_stride])) : A(0);
    if (scale != nullptr) value *= scale[head * rows + row];
    total += value;
#pragma unroll
    for (int r = 0; r < kBitsOfWarp; ++r) {
      const bool set = (bits >> r & 1u) != 0;
      sum[r] += set ? value : -value;
      count[r] += set ? 1 : -1;
    }
  }
  A* to = sums + static_cast<int64_t>(blockIdx.x) * state.size();
#pragma unroll
  for (int r = 0; r < kBitsOfWarp; ++r) {
    if (first + r >= state.bits) continue;
    if (reads) to[(first + r) * state.width + column] = sum[r];
    if (column == 0) to[state.counts() + first + r] = static_cast<A>(count[r]);
  }
  if (reads && first == 0) to[state.total() + column] = total;
}

// Chunks in order; grid (heads * blocks of the state). `stride` from head to head of the result; behind a state of a
// forward pass that is kept comes sigma, NaN where a flag says that some y was.
template <class A>
__global__ void __launch_bounds__(kThreads) add_up_kernel(const A* sums, int64_t chunks, int64_t size, A* out, int64_t stride,
                                                     const A* sigma, const int* flags) {
  const auto [head, block] = part_of(size, kThreads);
  const int64_t i = block * kThreads + threadIdx.x;
  if (i < size) {
    A total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[(head * chunks + chunk) * size + i];
    out[head * stride + i] = total;
  }
  if (i == 0 && sigma != nullptr) out[head * stride + size] = flags[head] != 0 ? static_cast<A>(NAN) : sigma[head];
}

// --- reading ------------------------------------------------------------------------------------------------------------
// 1 / (h.z + base) for each row; grid (heads * blocks of rows).
template <class A>
__global__ void __launch_bounds__(kThreads) denominator_kernel(const State state, const Heads of_codes, const int32_t* codes,
                                                          const A* sums, int64_t stride, A base, int64_t rows, A* inverse) {
  const auto [head, block] = part_of(rows, kThreads);
  const int64_t row = block * kThreads + threadIdx.x;
  if (row >= rows) return;
  const unsigned code = static_cast<unsigned>(codes[of_codes.at(head) + row]);
  const A* counts = sums + head * stride + state.counts();
  A value = base;
  for (int r = 0; r < state.bits; ++r) value += (code >> r & 1u) != 0 ? counts[r] : -counts[r];
  inverse[head * rows + row] = A(1) / value;
}

// out = (h S + all sum of v) p + self own q with q = inverse and p = inverse or 1. A lane a column, a warp a row at a time;
// grid (heads * blocks of rows, blocks of 32 columns).
template <class T, class A>
__global__ void __launch_bounds__(256) output_kernel(const State state, const Heads of_codes, const int32_t* codes,
                                                     const A* sums, int64_t stride, A all, A self, const Heads heads,
                                                     const T* own, const A* inverse, bool divides, const int* flags,
                                                     int64_t rows, T* out) {
  __shared__ A shared[kMaxBits][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto [head, block] = part_of(rows, kRowsOfBlock);
  const int64_t column = static_cast<int64_t>(blockIdx.y) * 32 + lane;
  const A* of_head = sums + head * stride;
  const bool writes = column < state.width;
  for (int r = warp; r < state.bits; r += 8) shared[r][lane] = writes ? of_head[r * state.width + column] : A(0);
  __syncthreads();
  if (!writes) return;
  const A base = all != A(0) ? all * of_head[state.total() + column] : A(0);
  const bool numbers = flags == nullptr || flags[head] == 0;
  const int64_t begin = block * kRowsOfBlock, end = min(rows, begin + kRowsOfBlock);
  for (int64_t row = begin + warp; row < end; row += 8) {
    const unsigned code = static_cast<unsigned>(codes[of_codes.at(head) + row]);
    A value = base;
    for (int r = 0; r < state.bits; ++r) value += (code >> r & 1u) != 0 ? shared[r][lane] : -shared[r][lane];
    const A scale = inverse != nullptr ? inverse[head * rows + row] : A(1);
    if (divides) value *= scale;
    if (own != nullptr) value = fma(self * scale, A(widen(own[heads.at(head) + row * heads.row_stride + column])), value);
    if (!numbers) value = static_cast<A>(NAN);
    narrow(value, out[(head * rows + row) * state.width + column]);
  }
}

// --- launches -----------------------------------------------------------------------------------------------------------
unsigned grid_of(int64_t heads, int64_t items, int64_t a_part) {
  const int64_t parts = parts_of(items, a_part);
  check(parts <= std::numeric_limits<int>::max() / std::max<int64_t>(1, heads), "v",
        "the CUDA kernels take at most 2^31 - 1 blocks of rows, got ", heads, " heads of ", parts);
  return static_cast<unsigned>(heads * parts);
}

unsigned grid_of_columns(int64_t width) {
  check(width <= 32 * 65535, "v", "the CUDA kernels take at most 2097120 channels, got ", width);
  return static_cast<unsigned>(std::max<int64_t>(1, (width + 31) / 32));
}

Heads heads_of(const Tensor& tensor, const char* name, int64_t dims) {
  check(tensor.dim() == dims, name, "expected ", dims, " dimensions, got ", tensor.dim());
  check(tensor.size(dims - 1) <= 1 || tensor.stride(dims - 1) == 1 || tensor.numel() == 0, name,
        "the last dimension must be contiguous");
  return {tensor.size(1), tensor.stride(0), tensor.stride(1), dims == 4 ? tensor.stride(2) : 1};
}

void check_codes(const Tensor& codes, const char* name, const Tensor& v) {
  check(codes.scalar_type() == ScalarType::Int, name, "expected int32");
  check(on_one_device(codes, v), name, "expected the device of v");
  check(codes.dim() == 3 && codes.size(0) == v.size(0) && codes.size(1) == v.size(1), name, "expected [B, H, N] beside v");
}

void check_attention(std::int64_t bits, double offset) {
  check(bits >= 1 && bits <= kMaxBits, "bits", "expected 1 to 32, got ", bits);
  check(offset > static_cast<double>(bits) && offset < std::numeric_limits<double>::infinity(), "offset",
        "expected more than the ", bits, " bits, got ", offset);
}

template <class T>
struct Type {
  using storage = T;
  using accumulator = typename Accumulator<T>::type;
};

template <class F>
void with_type(int dtype, const F& call) {
  switch (dtype) {
    case 0:
      return call(Type<float>());
    case 1:
      return call(Type<__nv_bfloat16>());
    case 2:
      return call(Type<__half>());
    default:
      return call(Type<double>());
  }
}

std::int32_t wide_type(const Tensor& x) { return dtype_index(x) == 3 ? dtype_of(x) : aoti_torch_dtype_float32(); }

// The sums of all chunks, added up: [heads, stride], by default the state alone.
template <class T, class A = typename Accumulator<T>::type>
void launch_sum(const State& state, const Heads& of_codes, const int32_t* codes, const Heads& heads, const T* values,
                const A* scale, int64_t all_heads, int64_t rows, A* partial, A* out, int64_t stride, const A* sigma,
                const int* flags, cudaStream_t stream) {
  const int64_t chunks = parts_of(rows, kChunkRows);
  const int warps = (state.bits + kBitsOfWarp - 1) / kBitsOfWarp;
  if (chunks > 0) {
    const dim3 grid(grid_of(all_heads, rows, kChunkRows), grid_of_columns(state.width));
    sum_kernel<T, A><<<grid, 32 * warps, 0, stream>>>(state, of_codes, codes, heads, values, scale, rows, partial);
    check_launch("hash_attention");
  }
  add_up_kernel<A><<<grid_of(all_heads, state.size(), kThreads), kThreads, 0, stream>>>(
      partial, chunks, state.size(), out, stride, sigma, flags);
  check_launch("hash_attention");
}

template <class A>
void launch_denominator(const State& state, const Heads& of_codes, const int32_t* codes, const A* sums, int64_t stride,
                        double base, int64_t all_heads, int64_t rows, A* inverse, cudaStream_t stream) {
  denominator_kernel<A><<<grid_of(all_heads, rows, kThreads), kThreads, 0, stream>>>(
      state, of_codes, codes, sums, stride, static_cast<A>(base), rows, inverse);
  check_launch("hash_attention");
}

template <class T, class A = typename Accumulator<T>::type>
void launch_output(const State& state, const Heads& of_codes, const int32_t* codes, const A* sums, int64_t stride,
                   double offset, const Heads& heads, const T* own, const A* inverse, bool divides, const int* flags,
                   int64_t all_heads, int64_t rows, T* out, cudaStream_t stream) {
  const dim3 grid(grid_of(all_heads, rows, kRowsOfBlock), grid_of_columns(state.width));
  output_kernel<T, A><<<grid, 256, 0, stream>>>(state, of_codes, codes, sums, stride,
                                                own == nullptr ? static_cast<A>(offset) : A(0), static_cast<A>(offset), heads,
                                                own, inverse, divides, flags, rows, out);
  check_launch("hash_attention");
}

// --- attention of codes -------------------------------------------------------------------------------------------------
Tensor hash_attention(Tensor v, Tensor codes_q, Tensor codes_k, std::int64_t bits, double offset, bool own) {
  const int dtype = dtype_index(v, "v");
  const Heads values = heads_of(v, "v", 4);
  check_codes(codes_q, "codes_q", v);
  check_codes(codes_k, "codes_k", v);
  const Heads of_queries = heads_of(codes_q, "codes_q", 3), of_keys = heads_of(codes_k, "codes_k", 3);
  const int64_t heads = v.size(0) * v.size(1), queries = codes_q.size(2), keys = v.size(2);
  check(codes_k.size(2) == keys, "codes_k", "expected one for each value, ", keys, ", got ", codes_k.size(2));
  check(!own || queries == keys, "codes_q", "expected as many as keys, ", keys, ", got ", queries);
  check_attention(bits, offset);
  const State state{static_cast<int>(bits), v.size(3)};
  Tensor out = new_tensor(v, {v.size(0), v.size(1), queries, state.width}, dtype_of(v));
  mmk_trace_record("hash_attention", "cuda");
  if (out.numel() == 0) return out;
  const OnDeviceOf device(v);
  Tensor partial = new_tensor(v, {heads, parts_of(keys, kChunkRows), state.size()}, wide_type(v));
  Tensor sums = new_tensor(v, {heads, state.size()}, wide_type(v)), inverses = new_tensor(v, {heads, queries}, wide_type(v));
  const auto* query = static_cast<const int32_t*>(codes_q.const_data_ptr());
  const auto* key = static_cast<const int32_t*>(codes_k.const_data_ptr());
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::storage;
    using A = typename decltype(type)::accumulator;
    const T* from = static_cast<const T*>(v.const_data_ptr());
    A* all = static_cast<A*>(sums.mutable_data_ptr());
    A* inverse = static_cast<A*>(inverses.mutable_data_ptr());
    launch_sum<T>(state, of_keys, key, values, from, static_cast<const A*>(nullptr), heads, keys,
                  static_cast<A*>(partial.mutable_data_ptr()), all, state.size(), static_cast<const A*>(nullptr), nullptr,
                  device.stream());
    launch_denominator<A>(state, of_queries, query, all, state.size(), offset * static_cast<double>(keys), heads, queries,
                          inverse, device.stream());
    launch_output<T>(state, of_queries, query, all, state.size(), offset, values, own ? from : nullptr, inverse, true, nullptr,
                     heads, queries, static_cast<T*>(out.mutable_data_ptr()), device.stream());
  });
  return out;
}

Tensor hash_attention_backward(Tensor grad, Tensor codes_q, Tensor codes_k, std::int64_t bits, double offset, bool own) {
  const int dtype = dtype_index(grad, "grad");
  const Heads upstream = heads_of(grad, "grad", 4);
  check(grad.is_contiguous(), "grad", "expected a contiguous gradient");
  check_codes(codes_q, "codes_q", grad);
  check_codes(codes_k, "codes_k", grad);
  const Heads of_queries = heads_of(codes_q, "codes_q", 3), of_keys = heads_of(codes_k, "codes_k", 3);
  const int64_t heads = grad.size(0) * grad.size(1), queries = grad.size(2), keys = codes_k.size(2);
  check(codes_q.size(2) == queries, "codes_q", "expected one for each gradient, ", queries, ", got ", codes_q.size(2));
  check(!own || queries == keys, "codes_q", "expected as many as keys, ", keys, ", got ", queries);
  check_attention(bits, offset);
  const State state{static_cast<int>(bits), grad.size(3)}, only_counts{state.bits, 0};
  Tensor out = new_tensor(grad, {grad.size(0), grad.size(1), keys, state.width}, dtype_of(grad));
  mmk_trace_record("hash_attention_backward", "cuda");
  if (out.numel() == 0) return out;
  const OnDeviceOf device(grad);
  const auto room = [&](int64_t a, int64_t b, int64_t c) { return new_tensor(grad, {a, b, c}, wide_type(grad)); };
  Tensor partial_counts = room(heads, parts_of(keys, kChunkRows), only_counts.size());
  Tensor counts = room(heads, 1, only_counts.size());
  Tensor partial = room(heads, parts_of(queries, kChunkRows), state.size()), sums = room(heads, 1, state.size());
  Tensor inverses = room(heads, 1, queries);
  const auto* query = static_cast<const int32_t*>(codes_q.const_data_ptr());
  const auto* key = static_cast<const int32_t*>(codes_k.const_data_ptr());
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::storage;
    using A = typename decltype(type)::accumulator;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    const auto data = [](const Tensor& tensor) { return static_cast<A*>(tensor.mutable_data_ptr()); };
    const A* none = nullptr;
    launch_sum<T>(only_counts, of_keys, key, upstream, static_cast<const T*>(nullptr), none, heads, keys, data(partial_counts),
                  data(counts), only_counts.size(), none, nullptr, device.stream());
    if (queries > 0)
      launch_denominator<A>(only_counts, of_queries, query, data(counts), only_counts.size(),
                            offset * static_cast<double>(keys), heads, queries, data(inverses), device.stream());
    launch_sum<T>(state, of_queries, query, upstream, from, static_cast<const A*>(data(inverses)), heads, queries,
                  data(partial), data(sums), state.size(), none, nullptr, device.stream());
    launch_output<T>(state, of_keys, key, data(sums), state.size(), offset, upstream, own ? from : nullptr,
                     own ? data(inverses) : nullptr, false, nullptr, heads, keys, static_cast<T*>(out.mutable_data_ptr()),
                     device.stream());
  });
  return out;
}

// --- codes --------------------------------------------------------------------------------------------------------------
struct Hashed {
  Table table;
  int64_t heads, rows;

  Hashed(const Tensor& qk, const Tensor& anchors, const Tensor& projection, const Tensor& mean) {
    check(qk.dim() == 4 && qk.size(3) >= 1, "qk", "expected [B, H, N, D] with at least one channel");
    const auto beside = [&](const Tensor& tensor, const char* name, int64_t dims) {
      check(tensor.dim() == dims && tensor.is_contiguous(), name, "expected a contiguous tensor of ", dims, " dimensions");
      check(tensor.size(0) == qk.size(1), name, "expected one for each head, ", qk.size(1), ", got ", tensor.size(0));
      check_beside(tensor, name, qk);
    };
    beside(anchors, "supports", 3);
    beside(projection, "projection", 3);
    beside(mean, "mean", 2);
    const int64_t channels = qk.size(3), supports = anchors.size(1), bits = projection.size(1);
    check(supports >= 1 && supports <= std::numeric_limits<int>::max() && anchors.size(2) == channels, "supports",
          "expected [H, m, ", channels, "] with m at least 1");
    check(bits >= 1 && bits <= kMaxBits && projection.size(2) == supports, "projection", "expected [H, 1 to 32, ", supports, "]");
    check(mean.size(1) == supports, "mean", "expected [H, ", supports, "]");
    check(channels <= 1 << 20, "qk", "the CUDA kernels take at most 2^20 channels, got ", channels);
    table.channels = static_cast<int>(channels);
    table.padded = held() > 0 ? held() : table.channels;
    table.supports = static_cast<int>(supports);
    table.bits = static_cast<int>(bits);
    heads = qk.size(0) * qk.size(1);
    rows = qk.size(2);
  }
  // The channels that a thread holds in registers: the least of a few numbers.
  int held() const {
    for (const int count : {32, 64, 128})
      if (table.channels <= count) return count;
    return 0;
  }
};

// Codes and what lies beside them, and sigma and the flags of NaN of every head.
template <class T, class A = typename Accumulator<T>::type>
void launch_hash(const Hashed& hashed, const Tensor& qk, const Tensor& anchors, const Tensor& projection, const Tensor& mean,
                 int32_t* codes, int32_t* inside, A* sigma, int* flags, cudaStream_t stream) {
  const Table& table = hashed.table;
  const int64_t chunks = parts_of(hashed.rows, kChunkRows), of_one_sample = qk.size(1);
  const Heads heads = heads_of(qk, "qk", 4);
  Tensor tables = new_tensor(qk, {of_one_sample, table.supports, table.row()}, wide_type(qk));
  Tensor units = new_tensor(qk, {hashed.heads, chunks, table.channels}, wide_type(qk));
  const auto is_a = [](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
  };
  const Functions functions{anchors.const_data_ptr(), projection.const_data_ptr(), mean.const_data_ptr(),
                            is_a(anchors),            is_a(projection),            is_a(mean)};
  A* of_tables = static_cast<A*>(tables.mutable_data_ptr());
  A* of_units = static_cast<A*>(units.mutable_data_ptr());
  const T* from = static_cast<const T*>(qk.const_data_ptr());
  prepare_kernel<T, A><<<grid_of(of_one_sample, table.supports, 1), 32, 0, stream>>>(table, functions, of_tables);
  check_launch("hash_codes");
  units_kernel<T, A><<<grid_of(hashed.heads, hashed.rows, kChunkRows), 32 * kUnitWarps, 0, stream>>>(
      heads, from, hashed.rows, table.channels, of_units);
  check_launch("hash_codes");
  sigma_kernel<A><<<grid_of(hashed.heads, 1, 1), 32, 0, stream>>>(table, of_tables, of_one_sample, of_units, chunks,
                                                                  hashed.rows, sigma, flags);
  check_launch("hash_codes");
  const auto launch = [&](auto kernel) {
    kernel<<<grid_of(hashed.heads, hashed.rows, kThreads), kThreads, 0, stream>>>(
        heads, from, hashed.rows, table, of_tables, sigma, codes, inside, flags);
    check_launch("hash_codes");
  };
  if (hashed.held() == 32) return launch(&hash_kernel<T, A, 32>);
  if constexpr (sizeof(A) == 4) {  // registers hold half as many doubles
    if (hashed.held() == 64) return launch(&hash_kernel<T, A, 64>);
    if (hashed.held() == 128) return launch(&hash_kernel<T, A, 128>);
  }
  launch(&hash_kernel<T, A, 0>);
}

Tensor hash_codes(Tensor qk, Tensor supports, Tensor projection, Tensor mean) {
  const int dtype = dtype_index(qk, "qk");
  const Hashed hashed(qk, supports, projection, mean);
  Tensor codes = new_tensor(qk, {qk.size(0), qk.size(1), qk.size(2)}, aoti_torch_dtype_int32());
  mmk_trace_record("hash_codes", "cuda");
  if (codes.numel() == 0) return codes;
  const OnDeviceOf device(qk);
  Tensor sigma = new_tensor(qk, {hashed.heads}, wide_type(qk)), flags = new_tensor(qk, {hashed.heads}, aoti_torch_dtype_int32());
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::storage;
    using A = typename decltype(type)::accumulator;
    launch_hash<T>(hashed, qk, supports, projection, mean, static_cast<int32_t*>(codes.mutable_data_ptr()), nullptr,
                   static_cast<A*>(sigma.mutable_data_ptr()), static_cast<int*>(flags.mutable_data_ptr()), device.stream());
  });
  return codes;
}

// --- both ---------------------------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor, Tensor> ecoformer_attention(Tensor qk, Tensor v, Tensor supports, Tensor projection,
                                                               Tensor mean, double offset, bool own, bool keep) {
  const int dtype = dtype_index(qk, "qk");
  const Hashed hashed(qk, supports, projection, mean);
  const Heads values = heads_of(v, "v", 4);
  check(on_one_device(v, qk) && dtype_of(v) == dtype_of(qk), "v", "expected the device and dtype of qk");
  check(v.size(0) == qk.size(0) && v.size(1) == qk.size(1) && v.size(2) == qk.size(2), "v", "expected [B, H, N, Dv] beside qk");
  check_attention(hashed.table.bits, offset);
  const State state{hashed.table.bits, v.size(3)};
  const std::int32_t integers = aoti_torch_dtype_int32();
  Tensor out = new_tensor(v, {v.size(0), v.size(1), v.size(2), v.size(3)}, dtype_of(v));
  Tensor codes = new_tensor(qk, {qk.size(0), qk.size(1), qk.size(2)}, integers);
  Tensor inside = keep ? new_tensor(qk, {qk.size(0), qk.size(1), qk.size(2)}, integers) : new_tensor(qk, {0}, integers);
  Tensor sums = new_tensor(qk, {qk.size(0), qk.size(1), state.size() + 1}, wide_type(qk));
  const auto kept = [&](const Tensor& tensor) { return keep ? tensor : new_tensor(qk, {0}, dtype_of(tensor)); };
  mmk_trace_record("ecoformer_attention", "cuda");
  const OnDeviceOf device(qk);
  if (codes.numel() == 0) {  // sums over no rows are 0, and sigma, a mean of none, NaN
    with_type(dtype, [&](auto type) {
      using A = typename decltype(type)::accumulator;
      if (hashed.heads == 0) return;
      Tensor sigma = new_tensor(qk, {hashed.heads}, wide_type(qk)), flags = new_tensor(qk, {hashed.heads}, integers);
      cudaMemsetAsync(sigma.mutable_data_ptr(), 0xff, static_cast<std::size_t>(hashed.heads) * sizeof(A), device.stream());
      cudaMemsetAsync(flags.mutable_data_ptr(), 0, static_cast<std::size_t>(hashed.heads) * sizeof(int), device.stream());
      add_up_kernel<A><<<grid_of(hashed.heads, state.size(), kThreads), kThreads, 0, device.stream()>>>(
          nullptr, 0, state.size(), static_cast<A*>(sums.mutable_data_ptr()), state.size() + 1,
          static_cast<const A*>(sigma.const_data_ptr()), static_cast<const int*>(flags.const_data_ptr()));
      check_launch("ecoformer_attention");
    });
    return {out, kept(codes), inside, kept(sums)};
  }
  const int64_t rows = hashed.rows, heads = hashed.heads, stride = state.size() + 1;
  Tensor sigma = new_tensor(qk, {heads}, wide_type(qk)), flags = new_tensor(qk, {heads}, integers);
  Tensor partial = new_tensor(qk, {heads, parts_of(rows, kChunkRows), state.size()}, wide_type(qk));
  Tensor inverses = new_tensor(qk, {heads, rows}, wide_type(qk));
  const Heads of_codes = heads_of(codes, "codes", 3);
  auto* code = static_cast<int32_t*>(codes.mutable_data_ptr());
  auto* flag = static_cast<int*>(flags.mutable_data_ptr());
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::storage;
    using A = typename decltype(type)::accumulator;
    const T* from = static_cast<const T*>(v.const_data_ptr());
    const auto data = [](const Tensor& tensor) { return static_cast<A*>(tensor.mutable_data_ptr()); };
    launch_hash<T>(hashed, qk, supports, projection, mean, code,
                   keep ? static_cast<int32_t*>(inside.mutable_data_ptr()) : nullptr, data(sigma), flag, device.stream());
    launch_sum<T>(state, of_codes, code, values, from, static_cast<const A*>(nullptr), heads, rows, data(partial), data(sums),
                  stride, static_cast<const A*>(data(sigma)), flag, device.stream());
    if (out.numel() == 0) return;
    launch_denominator<A>(state, of_codes, code, data(sums), stride, offset * static_cast<double>(rows), heads, rows,
                          data(inverses), device.stream());
    launch_output<T>(state, of_codes, code, data(sums), stride, offset, values, own ? from : nullptr, data(inverses), true,
                     flag, heads, rows, static_cast<T*>(out.mutable_data_ptr()), device.stream());
  });
  return {out, kept(codes), inside, kept(sums)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) {
  library.impl("hash_codes", TORCH_BOX(&hash_codes));
  library.impl("hash_attention", TORCH_BOX(&hash_attention));
  library.impl("hash_attention_backward", TORCH_BOX(&hash_attention_backward));
  library.impl("ecoformer_attention", TORCH_BOX(&ecoformer_attention));
}

}  // namespace mmk
