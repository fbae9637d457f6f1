// Compiled for the baseline: asks for the tiles. The instructions themselves are in amx_tile.cpp, compiled with AMX on.
#include "amx.h"

#if MMK_X86_TIERS && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace mmk::amx {

namespace {

bool processor_has_tiles() {
#if MMK_EMULATE_AVX512
  return true;  // in software
#endif
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
  return (d & amx_bf16) && (d & amx_tile) && (d & amx_int8);
}

// Linux grants tile state (XCR0 bit 18) per process, on request; older kernels refuse, and so does a hypervisor that hides it.
bool kernel_grants_tiles() {
#if MMK_EMULATE_AVX512
  return true;
#endif
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}

// Small integers are exact in bf16 and their products exact in fp32, so the comparison is for equality.
bool product_is_right() {
  auto bf16 = [](int value) {
    const float f = static_cast<float>(value);
    unsigned bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return static_cast<unsigned short>(bits >> 16);
  };
  unsigned short a[16 * 32], b_pairs[32 * 16];
  float c[16 * 16];
  auto a_at = [](int i, int k) { return (3 * i + 5 * k) % 17 - 8; };
  auto b_at = [](int k, int j) { return (7 * k + 2 * j) % 13 - 6; };
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 32; ++k) a[i * 32 + k] = bf16(a_at(i, k));
  for (int k = 0; k < 32; ++k)
    for (int j = 0; j < 16; ++j) b_pairs[(k / 2) * 32 + j * 2 + k % 2] = bf16(b_at(k, j));
  for (float& value : c) value = 1.0f;
  tile_product(a, b_pairs, c);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      int sum = 1;
      for (int k = 0; k < 32; ++k) sum += a_at(i, k) * b_at(k, j);
      if (c[i * 16 + j] != static_cast<float>(sum)) return false;
    }
  return true;
}

}  // namespace

bool usable() {
  static const bool answer = processor_has_tiles() && kernel_grants_tiles() && product_is_right();
  return answer;
}

}  // namespace mmk::amx

#else

namespace mmk::amx {
bool usable() { return false; }
}  // namespace mmk::amx

#endif
