// Which instruction-set tiers this processor offers, which one is in force, and how a family picks its kernels.
#pragma once
#include <atomic>

namespace mmk {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, amx = 3 };
inline constexpr int isa_count = 4;

const char* isa_name(Isa isa);

// The highest tier that the processor and the operating system offer.
Isa best_isa();

// Whether AVX-512 comes with its integer multiply-adds (VNNI), which processors with AMX always have.
bool has_vnni();

// AVX512_VPOPCNTDQ: the bits of 16 words counted at once. The AVX-512 tier takes it where it is there.
bool has_vector_popcount();

extern std::atomic<int> isa_in_force;

inline Isa active_isa() {
  return static_cast<Isa>(isa_in_force.load(std::memory_order_relaxed));
}

// Whether products of pairs of bfloat16 (AVX512_BF16) are in force: where the AVX-512 tier is, and comes with them. Not where it
// is emulated, and not where matrix tiles are in force, but for families without kernels of tiles: `without_tiles`.
bool has_bf16_pairs(bool without_tiles = false);

// One family's kernels, one table per tier. A tier without kernels of its own (nullptr) uses the next lower one:
// a copy gains nothing from matrix tiles, so an AMX machine runs its AVX-512 kernels.
template <class Kernels>
struct Tiers {
  const Kernels* tables[isa_count];

  struct Choice {
    const Kernels* kernels;
    Isa isa;
  };

  Choice choose() const {
    int isa = isa_in_force.load(std::memory_order_relaxed);
    while (isa > 0 && tables[isa] == nullptr) --isa;
    return {tables[isa], static_cast<Isa>(isa)};
  }
};

}  // namespace mmk

// Names one tier's table of a family: `tier::family_kernels`, defined in <family>.tier.cpp, which is compiled once per tier.
#define MMK_DECLARE_TIER(tier, Kernels, name) \
  namespace tier {                            \
  extern const Kernels name;                  \
  }

#if MMK_X86_TIERS
#define MMK_TIERS(Kernels, name)                                              \
  MMK_DECLARE_TIER(generic, Kernels, name)                                    \
  MMK_DECLARE_TIER(avx2, Kernels, name)                                       \
  MMK_DECLARE_TIER(avx512, Kernels, name)                                     \
  inline constexpr Tiers<Kernels> name##_tiers{                               \
      {&generic::name, &avx2::name, &avx512::name, nullptr}};
#else
#define MMK_TIERS(Kernels, name)           \
  MMK_DECLARE_TIER(generic, Kernels, name) \
  inline constexpr Tiers<Kernels> name##_tiers{{&generic::name, nullptr, nullptr, nullptr}};
#endif
