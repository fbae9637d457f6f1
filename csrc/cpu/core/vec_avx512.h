// AVX-512 tier (F, BW, DQ, VL): 16 float lanes.
#pragma once
#include <immintrin.h>

namespace mmk::MMK_TIER {
namespace {

template <>
struct Vec<float> {
  static constexpr int width = 16;
  using Register = __m512;
  using Mask = __mmask16;

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

  // The first `count` lanes, the others zero or left as they are.
  static Register load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
  static void store_first(float* to, Register value, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), value); }
#if !MMK_EMULATE_AVX512  // whose masked loads of 16-bit lanes read beyond the mask
  template <class T>
  static Register load_first(const T* from, int64_t count) {
    return widened(from, _mm256_maskz_loadu_epi16(first_lanes(count), from));
  }
  template <class T>
  static void store_first(T* to, Register value, int64_t count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), narrowed(to, value));
  }
#endif

  // Stores, and answers what the storage type has made of the value.
  static Register store_rounded(float* to, Register value) {
    store(to, value);
    return value;
  }
  template <class T>
  static Register store_rounded(T* to, Register value) {
    const __m256i rounded = narrowed(to, value);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    return widened(to, rounded);
  }

  // Two registers of consecutive elements; `split`: those of even and of odd index instead of the first and the second
  // half. bfloat16 is cheapest to widen to and to narrow from in that order: a shift and a mask for both.
  template <class T>
  static constexpr bool splits() {
    return false;
  }
  template <bool split, class T>
  static void load_pair(const T* from, Register& a, Register& b) {
    if constexpr (split) {
      const __m512i both = _mm512_loadu_si512(from);
      a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      b = high_halves(both);
    } else {
      a = load(from);
      b = load(from + width);
    }
  }
  template <bool split, class T>
  static void store_pair(T* to, Register a, Register b) {
    if constexpr (split) {
      _mm512_storeu_si512(to, pair(rounded_bits(a), rounded_bits(b)));
    } else {
      store(to, a);
      store(to + width, b);
    }
  }
  template <bool split, class T>
  static void store_pair_rounded(T* to, Register& a, Register& b) {
    if constexpr (split) {
      const __m512i even = rounded_bits(a), odd = rounded_bits(b);
      _mm512_storeu_si512(to, pair(even, odd));
      a = high_halves(even);
      b = high_halves(odd);
    } else {
      a = store_rounded(to, a);
      b = store_rounded(to + width, b);
    }
  }
  // Two registers in order, split.
  static void split(Register& a, Register& b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 evens = _mm512_permutex2var_ps(a, even, b);
    b = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    a = evens;
  }

  // Lane 2 i and lane 2 i + 1 change places.
  static Register swap_neighbours(Register value) { return _mm512_shuffle_ps(value, value, 0xb1); }

  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }

  // Where one operand is NaN the result is b, so a NaN in b stays.
  static Register min(Register a, Register b) { return _mm512_min_ps(a, b); }
  static Register max(Register a, Register b) { return _mm512_max_ps(a, b); }

  static Register abs(Register value) { return _mm512_andnot_ps(set(-0.0f), value); }
  static Register copysign(Register magnitude, Register sign) {
    return _mm512_or_ps(abs(magnitude), _mm512_and_ps(set(-0.0f), sign));
  }

  static Mask less_equal(Register a, Register b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static Register select(Mask mask, Register then, Register otherwise) {
    return _mm512_mask_blend_ps(mask, otherwise, then);
  }

  // The lowest 9 bits of the representation become sign and exponent, the mantissa zero.
  static Register low_bits_to_exponent(Register value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(value), 23));
  }

  static float sum(Register value) {
    const __m256 upper = _mm512_extractf32x8_ps(value, 1);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(value), upper);
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 eighth = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(eighth, _mm_movehdup_ps(eighth)));
  }

  // Lane i: the sum of row i.
  static Register sums(const Register (&rows)[width]) {
    Register pairs[8], quads[4], halves[2];
    for (int i = 0; i < 8; ++i)
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
      quads[i] = _mm512_add_ps(_mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                               _mm512_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
    // quads[i] holds, in each of its four parts of 128 bits, a part of the sums of rows 4 i to 4 i + 3.
    for (int i = 0; i < 2; ++i)
      halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
  }

  // A square of width vectors, rows to columns.
  [[gnu::always_inline]] static void transpose(Register (&rows)[width]) {
    Register pairs[16], quads[16], halves[16];
    for (int i = 0; i < 8; ++i) {
      pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
        quads[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
      }
    // quads[4 g + c] holds, in its four parts of 128 bits, columns c, c + 4, c + 8, c + 12 of rows 4 g to 4 g + 3.
    for (int c = 0; c < 4; ++c) {
      halves[c] = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
      halves[4 + c] = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xdd);
      halves[8 + c] = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
      halves[12 + c] = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0x88);
      rows[8 + c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0xdd);
      rows[4 + c] = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0x88);
      rows[12 + c] = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0xdd);
    }
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

  static Register stream_rounded(float* to, Register value) {
    stream(to, value);
    return value;
  }
  template <class T>
  static Register stream_rounded(T* to, Register value) {
    const __m256i rounded = narrowed(to, value);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), rounded);
    return widened(to, rounded);
  }

  // A split pair takes one store, and so twice the alignment.
  template <bool split, class T>
  static void stream_pair(T* to, Register a, Register b) {
    if constexpr (split) {
      _mm512_stream_ps(reinterpret_cast<float*>(to), _mm512_castsi512_ps(pair(rounded_bits(a), rounded_bits(b))));
    } else {
      stream(to, a);
      stream(to + width, b);
    }
  }
  template <bool split, class T>
  static void stream_pair_rounded(T* to, Register& a, Register& b) {
    if constexpr (split) {
      const __m512i even = rounded_bits(a), odd = rounded_bits(b);
      _mm512_stream_ps(reinterpret_cast<float*>(to), _mm512_castsi512_ps(pair(even, odd)));
      a = high_halves(even);
      b = high_halves(odd);
    } else {
      a = stream_rounded(to, a);
      b = stream_rounded(to + width, b);
    }
  }

  // Moves one register's worth of elements as they are, NaN payloads included.
  static void stream_raw(float* to, const float* from) { _mm512_stream_ps(to, _mm512_loadu_ps(from)); }
  static void stream_raw(bfloat16* to, const bfloat16* from) { stream_half(to, from); }
  static void stream_raw(float16* to, const float16* from) { stream_half(to, from); }

 private:
  static __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

  static void stream_half(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }

  static __m256i narrowed(const bfloat16*, Register value) { return to_bfloat16(value); }
  static __m256i narrowed(const float16*, Register value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
  static Register widened(const bfloat16*, __m256i value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
  }
  static Register widened(const float16*, __m256i value) { return _mm512_cvtph_ps(value); }

  static __m256i to_bfloat16(Register value) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_avx512_bf16  // where subnormal numbers count as zero
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(value), 16));
#endif
  }

  // Rounded to the upper half of each lane; the lower half is left over.
  static __m512i rounded_bits(Register value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 unordered = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, unordered, _mm512_set1_epi32(0x7fc00000));
  }

  static Register high_halves(__m512i bits) {
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static __m512i pair(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
  }
};

template <>
constexpr bool Vec<float>::splits<bfloat16>() {
  return true;
}

// 32-bit integers, made of pairs of 16-bit ones.
struct Integers {
  static constexpr int width = 16;
  using Register = __m512i;
  using Pairs = __m512i;

  static Register zero() { return _mm512_setzero_si512(); }
  static Register add(Register a, Register b) { return _mm512_add_epi32(a, b); }
  static Register load(const int32_t* from) { return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(from)); }
  static void store(int32_t* to, Register value) { _mm512_storeu_si512(reinterpret_cast<__m512i*>(to), value); }
  static Pairs load(const int16_t* from) { return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(from)); }
  static Pairs load(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store(int16_t* to, Pairs value) { _mm512_storeu_si512(reinterpret_cast<__m512i*>(to), value); }
  static Pairs set_pair(const int16_t* from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static Register multiply_add(Register sum, Pairs a, Pairs b) {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_vnni
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
  }
  static Register rounded(Vec<float>::Register value) { return _mm512_cvtps_epi32(value); }
  static Vec<float>::Register to_float(Register value) { return _mm512_cvtepi32_ps(value); }
};

inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace mmk::MMK_TIER
