// Lets the AVX-512 tier run on a processor that has AVX2 alone, to test its logic there: SIMDe stands in for the
// instructions. Included before everything else in a build with -DMMK_EMULATE_AVX512=ON, which no wheel is.
#pragma once
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What SIMDe lacks, or the compiler's own header would claim.
namespace mmk_emulated {

inline simde__m512i cvtepu16_epi32(__m256i value) {
  simde__m512i_private result;
  result.m256i[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(value));
  result.m256i[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(value, 1));
  return simde__m512i_from_private(result);
}

inline __m256i cvtepi32_epi16(simde__m512i value) {
  const simde__m512i_private lanes = simde__m512i_to_private(value);
  alignas(32) short result[16];
  for (int i = 0; i < 16; ++i) result[i] = static_cast<short>(lanes.i32[i]);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(result));
}

inline simde__m512 cvtph_ps(__m256i value) {
  simde__m512_private result;
  result.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(value));
  result.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(value, 1));
  return simde__m512_from_private(result);
}

inline __m256i cvtps_ph(simde__m512 value) {
  const simde__m512_private halves = simde__m512_to_private(value);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.m256[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves.m256[0], _MM_FROUND_TO_NEAREST_INT));
}

inline __m256 extractf32x8_ps(simde__m512 value, int half) { return simde__m512_to_private(value).m256[half]; }

inline simde__m512 shuffle_f32x4(simde__m512 a, simde__m512 b, int parts) {
  const simde__m512_private of_a = simde__m512_to_private(a), of_b = simde__m512_to_private(b);
  simde__m512_private result;
  for (int i = 0; i < 4; ++i) result.m128[i] = (i < 2 ? of_a : of_b).m128[parts >> (2 * i) & 3];
  return simde__m512_from_private(result);
}

inline simde__m512i cvtps_epi32(simde__m512 value) {
  const simde__m512_private lanes = simde__m512_to_private(value);
  simde__m512i_private result;
  for (int i = 0; i < 2; ++i) result.m256i[i] = _mm256_cvtps_epi32(lanes.m256[i]);
  return simde__m512i_from_private(result);
}

inline simde__m512 cvtepi32_ps(simde__m512i value) {
  const simde__m512i_private lanes = simde__m512i_to_private(value);
  simde__m512_private result;
  for (int i = 0; i < 2; ++i) result.m256[i] = _mm256_cvtepi32_ps(lanes.m256i[i]);
  return simde__m512_from_private(result);
}

inline simde__m512 maskz_loadu_ps(unsigned mask, const float* from) {
  simde__m512_private result;
  for (int i = 0; i < 16; ++i) result.f32[i] = mask >> i & 1 ? from[i] : 0.0f;
  return simde__m512_from_private(result);
}

inline void mask_storeu_ps(float* to, unsigned mask, simde__m512 value) {
  const simde__m512_private lanes = simde__m512_to_private(value);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) to[i] = lanes.f32[i];
}

}  // namespace mmk_emulated

#undef _mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_madd_epi16
#undef _mm512_shuffle_f32x4
#undef _mm512_cvtepi32_epi16
#undef _mm512_extractf32x8_ps
#define _mm512_maskz_loadu_ps mmk_emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps mmk_emulated::mask_storeu_ps
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_shuffle_f32x4 mmk_emulated::shuffle_f32x4
#define _mm512_cvtps_epi32 mmk_emulated::cvtps_epi32
#define _mm512_cvtepi32_ps mmk_emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 mmk_emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 mmk_emulated::cvtepi32_epi16
#define _mm512_cvtph_ps mmk_emulated::cvtph_ps
#define _mm512_cvtps_ph(value, rounding) mmk_emulated::cvtps_ph(value)
#define _mm512_extractf32x8_ps mmk_emulated::extractf32x8_ps
#define _mm512_stream_ps(address, value) simde_mm512_storeu_ps(address, value)
