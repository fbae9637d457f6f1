// Lets kernels for Hopper run on any processor, to test their logic there: the functions of csrc/cuda/core/hopper.h, whose
// comments hold here, in software. Included before a kernel's body in the tests' extension, which no wheel has.
#pragma once
#include "hopper_block.h"

#define __device__
#define __forceinline__ inline

namespace mmk::hopper {

// --- threads ------------------------------------------------------------------------------------------------------------
inline int thread_index() { return Block::current().thread_index(); }

inline void sync_threads() { Block::current().sync_all(); }

inline int of_first_lane(int value) { return Block::current().shuffled(value, 0); }

template <class T>
T shuffle_xor(T value, int mask) {
  return Block::current().shuffled(value, thread_index() % 32 ^ mask);
}

template <int count>
void decrease_registers() {
  Block::current().take_registers(count);
}
template <int count>
void increase_registers() {
  Block::current().take_registers(count);
}

inline void named_barrier_sync(int barrier, int threads) { Block::current().named_barrier(barrier, threads, true); }
inline void named_barrier_arrive(int barrier, int threads) { Block::current().named_barrier(barrier, threads, false); }

// --- barriers in shared memory ------------------------------------------------------------------------------------------
inline void mbarrier_init(std::uint32_t barrier, int count) { Block::current().init_barrier(barrier, count); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(std::uint32_t barrier) { Block::current().arrive(barrier, 0); }
inline void mbarrier_arrive_expecting(std::uint32_t barrier, int bytes) { Block::current().arrive(barrier, bytes); }
inline void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) { Block::current().wait_barrier(barrier, parity); }

// --- tensor memory accelerator ------------------------------------------------------------------------------------------
inline void tma_prefetch(const TensorMap*) {}
inline void tma_load(std::uint32_t to, const TensorMap* map, std::uint32_t barrier, int channel, int row, int head, int batch) {
  Block::current().load(to, *map, barrier, {channel, row, head, batch});
}

// --- tensor cores -------------------------------------------------------------------------------------------------------
inline void wgmma_fence() { Block::current().fence(); }
inline void wgmma_commit() { Block::current().commit(); }
template <int groups>
void wgmma_wait() {
  Block::current().wait_products(groups);
}

template <class T, int n>
void hold_registers(T (&)[n]) {}

template <class T, bool accumulates>
void wgmma_shared(float (&d)[64], std::uint64_t a, std::uint64_t b) {
  Block::current().issue({d, 128, std::is_same_v<T, Bfloat16>, accumulates, nullptr, a, b, false});
}

template <class T, int n>
void wgmma_registers(float (&d)[n], const std::uint32_t* a, std::uint64_t b) {
  Block::current().issue({d, 2 * n, std::is_same_v<T, Bfloat16>, true, a, 0, b, true});
}

// --- numbers ------------------------------------------------------------------------------------------------------------
inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }

template <class T>
std::uint32_t pack(float first, float second) {
  constexpr bool bfloat16 = std::is_same_v<T, Bfloat16>;
  return narrow(first, bfloat16) | static_cast<std::uint32_t>(narrow(second, bfloat16)) << 16;
}

inline void store_16_bytes(void* to, const std::uint32_t (&words)[4]) {
  Block::require(reinterpret_cast<std::uintptr_t>(to) % 16 == 0, "16 bytes are stored at a multiple of 16");
  std::memcpy(to, words, 16);
}

}  // namespace mmk::hopper
