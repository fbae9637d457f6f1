// AVX-512 tier (F, BW, DQ, VL): 16 float lanes.
#pragma once
#include <immintrin.h>

namespace mmk::MMK_TIER {
namespace {

template <>
struct Vec<float> {
  static constexpr int width = 16;
  using Register = __m512;

  static Register set(float value) { return _mm512_set1_ps(value); }
  static Register zero() { return _mm512_setzero_ps(); }

  static Register load(const float* from) { return _mm512_loadu_ps(from); }
  static Register load(const bfloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Register load(const float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  static void store(float* to, Register value) { _mm512_storeu_ps(to, value); }
  static void store(bfloat16* to, Register value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
  }
  static void store(float16* to, Register value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }

  static float sum(Register value) {
    const __m256 upper = _mm512_extractf32x8_ps(value, 1);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(value), upper);
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 eighth = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(eighth, _mm_movehdup_ps(eighth)));
  }

  template <class T>
  static constexpr int64_t stream_alignment() {
    return width * sizeof(T);
  }
  static void stream(float* to, Register value) { _mm512_stream_ps(to, value); }
  static void stream(bfloat16* to, Register value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
  }
  static void stream(float16* to, Register value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  // Moves one register's worth of elements as they are, NaN payloads included.
  static void stream_raw(float* to, const float* from) { _mm512_stream_ps(to, _mm512_loadu_ps(from)); }
  static void stream_raw(bfloat16* to, const bfloat16* from) { stream_half(to, from); }
  static void stream_raw(float16* to, const float16* from) { stream_half(to, from); }

 private:
  static void stream_half(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }

  static __m256i to_bfloat16(Register value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 unordered = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, unordered, _mm512_set1_epi32(0x7fc0)));
  }
};

inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace mmk::MMK_TIER
