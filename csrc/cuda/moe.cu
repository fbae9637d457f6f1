// The slots of a routing in the order of their experts on CUDA: a stable counting sort, without a sync.
//
// Index glossary: a slot is token * K + k. Unused slots, and those of experts that there are none of, sort behind all others, as
// if they were of expert E. A chunk is kChunk slots; `table` [chunks, E + 1] has how many slots of each expert the chunk has, and
// then, how many those before it have. Atomics only count, in shared memory and in integers: the same result in any order.
#include "core/stream.h"

#include <limits>
#include <tuple>

namespace mmk {
namespace {

constexpr int kChunk = 1024;
constexpr int kBins = 4096;  // experts that one block counts: as many counters as shared memory has on every GPU
constexpr int kScanThreads = 1024;
constexpr int kAhead = 8;

struct Slots {
  const int64_t* ids;
  int64_t count, a_token, token_stride, slot_stride, experts;
  __device__ __forceinline__ int64_t key(int64_t slot) const {
    const int64_t id = ids[slot / a_token * token_stride + slot % a_token * slot_stride];
    return id >= 0 && id < experts ? id : experts;
  }
};

// Grid (chunks, passes over the experts), 256 threads.
__global__ void __launch_bounds__(256) count_kernel(const Slots slots, int64_t* table) {
  __shared__ int counts[kBins];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk, end = min(begin + kChunk, slots.count);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kBins;
  const int bins = static_cast<int>(min(static_cast<int64_t>(kBins), slots.experts + 1 - first));
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) counts[bin] = 0;
  __syncthreads();
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    const int64_t bin = slots.key(slot) - first;
    if (bin >= 0 && bin < bins) atomicAdd(&counts[bin], 1);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x)
    table[blockIdx.x * (slots.experts + 1) + first + bin] = counts[bin];
}

// The sum over the threads before this one, and over all of them; `sums` has room for one of each warp.
__device__ __forceinline__ int64_t sum_before(int64_t value, int64_t* sums, int64_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t running = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, running, offset);
    if (lane >= offset) running += other;
  }
  __syncthreads();  // sums may still be read from the pass before
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  int64_t before = running - value, all = 0;
  for (int i = 0; i < kScanThreads / 32; ++i) {
    if (i < warp) before += sums[i];
    all += sums[i];
  }
  *total = all;
  return before;
}

// One block, a thread an expert at a time: sums over the chunks before each, and over the experts before each.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* table, int64_t chunks, int64_t experts, int64_t* offsets) {
  __shared__ int64_t sums[kScanThreads / 32];
  int64_t before = 0;
  for (int64_t first = 0; first <= experts; first += kScanThreads) {
    const int64_t expert = first + threadIdx.x;
    int64_t count = 0;
    if (expert <= experts) {
      // Some cells ahead: what is stored might otherwise be what the next load reads, which then waits for it.
      for (int64_t first_chunk = 0; first_chunk < chunks; first_chunk += kAhead) {
        int64_t own[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          own[i] = first_chunk + i < chunks ? table[(first_chunk + i) * (experts + 1) + expert] : 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (first_chunk + i < chunks) table[(first_chunk + i) * (experts + 1) + expert] = count;
          count += own[i];
        }
      }
    }
    int64_t total = 0;
    const int64_t place = before + sum_before(count, sums, &total);
    if (expert <= experts) offsets[expert] = place;
    before += total;
  }
}

// A warp a chunk, 32 slots at a time in their order; grid (chunks, passes over the experts). Of one expert's slots in the warp
// each comes after those of lower lanes.
__global__ void __launch_bounds__(32)
    scatter_kernel(const Slots slots, const int64_t* table, const int64_t* offsets, int64_t* order, int64_t* positions) {
  __shared__ int counts[kBins];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk, end = min(begin + kChunk, slots.count);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kBins;
  const int bins = static_cast<int>(min(static_cast<int64_t>(kBins), slots.experts + 1 - first));
  for (int bin = threadIdx.x; bin < bins; bin += 32) counts[bin] = 0;
  __syncwarp();
  for (int64_t start = begin; start < end; start += 32) {
    const int64_t slot = start + threadIdx.x;
    const int64_t key = slot < end ? slots.key(slot) : -1, bin = key - first;
    const bool own = key >= 0 && bin >= 0 && bin < bins;
    const unsigned same = __match_any_sync(0xffffffffu, own ? static_cast<int>(bin) : -1);
    const int lower = __popc(same & ((1u << threadIdx.x) - 1));
    if (own) {
      const bool used = key < slots.experts;
      const int64_t place = offsets[key] + table[blockIdx.x * (slots.experts + 1) + key] + counts[bin] + lower;
      order[place] = used ? slot : -1;
      positions[slot] = used ? place : -1;
    }
    __syncwarp();
    if (own && lower == 0) counts[bin] += __popc(same);
    __syncwarp();
  }
}

std::tuple<Tensor, Tensor, Tensor> expert_order(Tensor expert_ids, std::int64_t num_experts) {
  check(expert_ids.scalar_type() == ScalarType::Long, "expert_ids", "expected int64");
  check(expert_ids.dim() == 2, "expert_ids", "expected [T, K]");
  check(num_experts >= 1 && num_experts <= std::numeric_limits<int>::max(), "num_experts", "expected 1 to 2^31 - 1, got ",
        num_experts);
  const int64_t tokens = expert_ids.size(0), slots_a_token = expert_ids.size(1), count = tokens * slots_a_token;
  const std::int32_t int64 = aoti_torch_dtype_int64();
  Tensor order = new_tensor(expert_ids, {count}, int64), offsets = new_tensor(expert_ids, {num_experts + 1}, int64);
  Tensor positions = new_tensor(expert_ids, {tokens, slots_a_token}, int64);
  mmk_trace_record("expert_order", "cuda");
  const OnDeviceOf device(expert_ids);
  const int64_t chunks = (count + kChunk - 1) / kChunk, passes = (num_experts + kBins) / kBins;
  check(chunks <= std::numeric_limits<int>::max() && passes <= 65535, "expert_ids", "too many slots or experts");
  Tensor table = new_tensor(expert_ids, {chunks, num_experts + 1}, int64);
  const auto data = [](const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); };
  const Slots slots{static_cast<const int64_t*>(expert_ids.const_data_ptr()), count, slots_a_token, expert_ids.stride(0),
                    expert_ids.stride(1), num_experts};
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(passes));
  if (count > 0) {
    count_kernel<<<grid, 256, 0, device.stream()>>>(slots, data(table));
    check_launch("expert_order");
  }
  scan_kernel<<<1, kScanThreads, 0, device.stream()>>>(data(table), chunks, num_experts, data(offsets));
  check_launch("expert_order");
  if (count > 0) {
    scatter_kernel<<<grid, 32, 0, device.stream()>>>(slots, data(table), data(offsets), data(order), data(positions));
    check_launch("expert_order");
  }
  return {order, offsets, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) { library.impl("expert_order", TORCH_BOX(&expert_order)); }

}  // namespace mmk
