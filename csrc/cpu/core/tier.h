// The kernels of the tier in force, and the name under which the trace knows them.
#pragma once
#include "isa.h"

namespace mmk {

template <class Kernels>
struct Tier {
  const Kernels* kernels;
  const char* name;
};

inline const char* kernel_name(Isa isa) {
  constexpr const char* names[isa_count] = {"cpu/generic", "cpu/avx2", "cpu/avx512", "cpu/amx"};
  return names[static_cast<int>(isa)];
}

inline constexpr const char* bf16_pairs_name = "cpu/avx512_bf16";

// double has kernels in the generic tier alone.
template <class Kernels>
Tier<Kernels> tier_for(const Tiers<Kernels>& tiers, bool is_double) {
  if (is_double) return {tiers.tables[0], kernel_name(Isa::generic)};
  const auto choice = tiers.choose();
  return {choice.kernels, kernel_name(choice.isa)};
}

}  // namespace mmk
