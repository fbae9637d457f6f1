// AVX2 tier (with FMA and F16C): 8 float lanes.
#pragma once
#include <immintrin.h>

namespace mmk::MMK_TIER {
namespace {

template <>
struct Vec<float> {
  static constexpr int width = 8;
  using Register = __m256;

  static Register set(float value) { return _mm256_set1_ps(value); }
  static Register zero() { return _mm256_setzero_ps(); }

  static Register load(const float* from) { return _mm256_loadu_ps(from); }
  static Register load(const bfloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Register load(const float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  static void store(float* to, Register value) { _mm256_storeu_ps(to, value); }
  static void store(bfloat16* to, Register value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_bfloat16(value));
  }
  static void store(float16* to, Register value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }

  static float sum(Register value) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  template <class T>
  static constexpr int64_t stream_alignment() {
    return width * sizeof(T);
  }
  static void stream(float* to, Register value) { _mm256_stream_ps(to, value); }
  static void stream(bfloat16* to, Register value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_bfloat16(value));
  }
  static void stream(float16* to, Register value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  // Moves one register's worth of elements as they are, NaN payloads included.
  static void stream_raw(float* to, const float* from) { _mm256_stream_ps(to, _mm256_loadu_ps(from)); }
  static void stream_raw(bfloat16* to, const bfloat16* from) { stream_half(to, from); }
  static void stream_raw(float16* to, const float16* from) { stream_half(to, from); }

 private:
  static void stream_half(void* to, const void* from) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }

  static __m128i to_bfloat16(Register value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), unordered);
    // packus works per 128-bit lane, so the second lane's half must be moved down.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};

inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace mmk::MMK_TIER
