#include "isa.h"

#include "amx.h"
#include "export.h"

namespace mmk {

std::atomic<int> isa_in_force{0};

const char* isa_name(Isa isa) {
  static constexpr const char* names[isa_count] = {"generic", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

namespace {

Isa detect() {
#if MMK_X86_TIERS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::generic;
#if MMK_EMULATE_AVX512
  return amx::usable() ? Isa::amx : Isa::avx512;
#endif
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  return amx::usable() ? Isa::amx : Isa::avx512;
#else
  return Isa::generic;
#endif
}

// Detection runs once, when the library is loaded; MMKERNELS_ISA is read in Python, which can raise a clear error.
const bool initialised = [] {
  isa_in_force.store(static_cast<int>(best_isa()));
  return true;
}();

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

bool has_vnni() {
#if MMK_EMULATE_AVX512
  return true;
#elif MMK_X86_TIERS
  static const bool answer = __builtin_cpu_supports("avx512vnni");
  return answer;
#else
  return false;
#endif
}

bool has_vector_popcount() {
#if MMK_X86_TIERS && !MMK_EMULATE_AVX512
  static const bool answer = __builtin_cpu_supports("avx512vpopcntdq");
  return answer;
#else
  return false;
#endif
}

bool has_bf16_pairs([[maybe_unused]] bool without_tiles) {
#if MMK_X86_TIERS && !MMK_EMULATE_AVX512
  static const bool offered = __builtin_cpu_supports("avx512bf16");
  return offered && (active_isa() == Isa::avx512 || (without_tiles && active_isa() == Isa::amx));
#else
  return false;
#endif
}

}  // namespace mmk

// For mk.explain.
MMK_EXPORT int mmk_has_bf16_pairs(int without_tiles) { return mmk::has_bf16_pairs(without_tiles != 0) ? 1 : 0; }
MMK_EXPORT int mmk_isa_best() { return static_cast<int>(mmk::best_isa()); }
MMK_EXPORT int mmk_isa_active() { return static_cast<int>(mmk::active_isa()); }

// Puts a tier in force; answers 0, or -1 (and changes nothing) where the processor does not offer it.
MMK_EXPORT int mmk_isa_force(int isa) {
  if (isa < 0 || isa > static_cast<int>(mmk::best_isa())) return -1;
  mmk::isa_in_force.store(isa);
  return 0;
}
