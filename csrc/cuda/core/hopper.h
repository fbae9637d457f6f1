// The instructions of Hopper (sm_90a) that C++ has no words for, one function each. csrc/testing/hopper_in_software.h has the
// same functions in software, so that what is written with them runs, in tests, where there is no Hopper.
#pragma once
#include <cstdint>
#include <type_traits>

#include <cuda.h>

#include "hopper_tile.h"

namespace mmk::hopper {

using TensorMap = CUtensorMap;

// --- threads ------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

__device__ __forceinline__ int of_first_lane(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ __forceinline__ std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Of the warp group that calls, each thread has `count` registers from now on: fewer, which frees them for other groups,
// or more, which waits until they are free.
template <int count>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// Barriers of the block by number, for `threads` of its threads: those that wait and those that only arrive. 0 is sync_threads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- barriers in shared memory ------------------------------------------------------------------------------------------
// 8 bytes at `barrier`. A phase ends when `count` threads have arrived and all the bytes that they announced have come.
__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Lets the unit that moves tiles see barriers that were just initialised.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that will come by themselves.
__device__ __forceinline__ void mbarrier_arrive_expecting(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity, the first phase of a barrier having parity 0. Before the first phase has
// ended, a wait for parity 1 returns at once: as if a phase before it had.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "waiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra waiting;\n"
      "ended:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- tensor memory accelerator ------------------------------------------------------------------------------------------
__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads the map's box at these coordinates into shared memory, zeros where it reaches beyond the tensor. Its bytes, those
// zeros among them, are counted by the barrier.
__device__ __forceinline__ void tma_load(std::uint32_t to, const TensorMap* map, std::uint32_t barrier, int channel, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(channel), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// --- tensor cores -------------------------------------------------------------------------------------------------------
// Products of a warp group run by themselves. Registers that one reads or writes are touched by nothing else from its issue to
// the wait for its group; before the first that uses registers which other instructions have written comes a fence.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes a group of the products issued since the last.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `groups` of the groups are still on their way.
template <int groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// No instruction, but the compiler moves no use of these registers across it: it knows nothing of products on their way.
template <int n>
__device__ __forceinline__ void hold_registers(float (&values)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int n>
__device__ __forceinline__ void hold_registers(std::uint32_t (&values)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// d [64, N] of a warp group lies in its threads so: thread t of 128 has rows r = 16 (t / 32) + t % 32 / 4 and r + 8, of these
// the columns c = 8 i + 2 (t % 4) and c + 1 for i = 0 .. N / 8 - 1, and d[4 i] .. d[4 i + 3] are (r, c), (r, c + 1), (r + 8, c),
// (r + 8, c + 1). A matrix a [64, 16] in registers lies as those of d do, two numbers a register.
#define MMK_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MMK_D16(i) MMK_D4(i), MMK_D4((i) + 4), MMK_D4((i) + 8), MMK_D4((i) + 12)
#define MMK_D32 MMK_D16(0), MMK_D16(16)
#define MMK_D64 MMK_D16(0), MMK_D16(16), MMK_D16(32), MMK_D16(48)
#define MMK_REGISTERS_32 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
#define MMK_REGISTERS_64 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "

// d [64, 128] = a [64, 16] b [16, 128], or added to what d holds: both operands in shared memory, the rows of each along k.
#define MMK_WGMMA_SHARED(type)                                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                         \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MMK_REGISTERS_64    \
               "%64, %65, p, 1, 1, 0, 0;\n}"                                                        \
               : MMK_D64                                                                            \
               : "l"(a), "l"(b), "n"(accumulates))

template <class T, bool accumulates>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    MMK_WGMMA_SHARED("bf16");
  } else {
    MMK_WGMMA_SHARED("f16");
  }
}

// d [64, 64 or 128] += a [64, 16] b [16, 64 or 128]: a in registers, b in shared memory with a row for each k, which the
// instruction transposes (its last number).
#define MMK_WGMMA_REGISTERS(n, type, registers, d_operands, a0, a1, a2, a3, b_operand)                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " " registers                                \
               "{" a0 ", " a1 ", " a2 ", " a3 "}, " b_operand ", 1, 1, 1, 1;"                                              \
               : d_operands                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class T, int n>
__device__ __forceinline__ void wgmma_registers(float (&d)[n], const std::uint32_t* a, std::uint64_t b) {
  static_assert(n == 32 || n == 64);
  if constexpr (n == 32 && std::is_same_v<T, Bfloat16>) {
    MMK_WGMMA_REGISTERS("64", "bf16", MMK_REGISTERS_32, MMK_D32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (n == 32) {
    MMK_WGMMA_REGISTERS("64", "f16", MMK_REGISTERS_32, MMK_D32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (std::is_same_v<T, Bfloat16>) {
    MMK_WGMMA_REGISTERS("128", "bf16", MMK_REGISTERS_64, MMK_D64, "%64", "%65", "%66", "%67", "%68");
  } else {
    MMK_WGMMA_REGISTERS("128", "f16", MMK_REGISTERS_64, MMK_D64, "%64", "%65", "%66", "%67", "%68");
  }
}

#undef MMK_WGMMA_REGISTERS
#undef MMK_WGMMA_SHARED
#undef MMK_REGISTERS_64
#undef MMK_REGISTERS_32
#undef MMK_D64
#undef MMK_D32
#undef MMK_D16
#undef MMK_D4

// --- numbers ------------------------------------------------------------------------------------------------------------
// 2^x to 2 units in the last place, and 0 below the smallest normal number.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger, NaN where either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Two numbers side by side, the first in the low half, rounded to the nearest.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float first, float second) {
  std::uint32_t both;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
}

// 16 bytes to global memory at once.
__device__ __forceinline__ void store_16_bytes(void* to, const std::uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace mmk::hopper
