// AVX2 tier (with FMA and F16C): 8 float lanes.
#pragma once
#include <immintrin.h>

namespace mmk::MMK_TIER {
namespace {

template <>
struct Vec<float> {
  static constexpr int width = 8;
  using Register = __m256;
  using Mask = __m256;

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

  // The first `count` lanes, the others zero. (Stores under a mask are slow on some processors.)
  static Register load_first(const float* from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }

  // Stores, and answers what the storage type has made of the value.
  static Register store_rounded(float* to, Register value) {
    store(to, value);
    return value;
  }
  static Register store_rounded(bfloat16* to, Register value) {
    const __m256i rounded = round_to_bfloat16(value);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pack(rounded));
    return _mm256_castsi256_ps(_mm256_slli_epi32(rounded, 16));
  }
  static Register store_rounded(float16* to, Register value) {
    const __m128i rounded = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), rounded);
    return _mm256_cvtph_ps(rounded);
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
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      b = high_halves(both);
    } else {
      a = load(from);
      b = load(from + width);
    }
  }
  template <bool split, class T>
  static void store_pair(T* to, Register a, Register b) {
    if constexpr (split) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pair(rounded_bits(a), rounded_bits(b)));
    } else {
      store(to, a);
      store(to + width, b);
    }
  }
  template <bool split, class T>
  static void store_pair_rounded(T* to, Register& a, Register& b) {
    if constexpr (split) {
      const __m256i even = rounded_bits(a), odd = rounded_bits(b);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pair(even, odd));
      a = high_halves(even);
      b = high_halves(odd);
    } else {
      a = store_rounded(to, a);
      b = store_rounded(to + width, b);
    }
  }
  // Two registers in order, split.
  static void split(Register& a, Register& b) {
    const __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);  // per 128-bit lane
    a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
  }

  // Lane 2 i and lane 2 i + 1 change places.
  static Register swap_neighbours(Register value) { return _mm256_shuffle_ps(value, value, 0xb1); }

  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }

  // Where one operand is NaN the result is b, so a NaN in b stays.
  static Register min(Register a, Register b) { return _mm256_min_ps(a, b); }
  static Register max(Register a, Register b) { return _mm256_max_ps(a, b); }

  static Register abs(Register value) { return _mm256_andnot_ps(set(-0.0f), value); }
  static Register copysign(Register magnitude, Register sign) {
    return _mm256_or_ps(abs(magnitude), _mm256_and_ps(set(-0.0f), sign));
  }

  static Mask less_equal(Register a, Register b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  static Register select(Mask mask, Register then, Register otherwise) { return _mm256_blendv_ps(otherwise, then, mask); }

  // The lowest 9 bits of the representation become sign and exponent, the mantissa zero.
  static Register low_bits_to_exponent(Register value) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(value), 23));
  }

  static float sum(Register value) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  // Lane i: the sum of row i.
  static Register sums(const Register (&rows)[width]) {
    Register pairs[4], quads[2];
    for (int i = 0; i < 4; ++i)
      pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
      quads[i] = _mm256_add_ps(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
    return _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }

  // A square of width vectors, rows to columns.
  static void transpose(Register (&rows)[width]) {
    Register pairs[8], quads[8];
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
        quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
      }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
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

  static Register stream_rounded(float* to, Register value) {
    stream(to, value);
    return value;
  }
  static Register stream_rounded(bfloat16* to, Register value) {
    const __m256i rounded = round_to_bfloat16(value);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), pack(rounded));
    return _mm256_castsi256_ps(_mm256_slli_epi32(rounded, 16));
  }
  static Register stream_rounded(float16* to, Register value) {
    const __m128i rounded = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), rounded);
    return _mm256_cvtph_ps(rounded);
  }

  // A split pair takes one store, and so twice the alignment.
  template <bool split, class T>
  static void stream_pair(T* to, Register a, Register b) {
    if constexpr (split) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), pair(rounded_bits(a), rounded_bits(b)));
    } else {
      stream(to, a);
      stream(to + width, b);
    }
  }
  template <bool split, class T>
  static void stream_pair_rounded(T* to, Register& a, Register& b) {
    if constexpr (split) {
      const __m256i even = rounded_bits(a), odd = rounded_bits(b);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), pair(even, odd));
      a = high_halves(even);
      b = high_halves(odd);
    } else {
      a = stream_rounded(to, a);
      b = stream_rounded(to + width, b);
    }
  }

  // Moves one register's worth of elements as they are, NaN payloads included.
  static void stream_raw(float* to, const float* from) { _mm256_stream_ps(to, _mm256_loadu_ps(from)); }
  static void stream_raw(bfloat16* to, const bfloat16* from) { stream_half(to, from); }
  static void stream_raw(float16* to, const float16* from) { stream_half(to, from); }

 private:
  static void stream_half(void* to, const void* from) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }

  static __m128i to_bfloat16(Register value) { return pack(round_to_bfloat16(value)); }

  static __m256i round_to_bfloat16(Register value) { return _mm256_srli_epi32(rounded_bits(value), 16); }

  // Rounded to the upper half of each lane; the lower half is left over.
  static __m256i rounded_bits(Register value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), unordered);
  }

  static __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Register high_halves(__m256i bits) {
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static __m256i pair(__m256i even, __m256i odd) { return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa); }

  static __m128i pack(__m256i halves) {
    return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  }
};

template <>
constexpr bool Vec<float>::splits<bfloat16>() {
  return true;
}

// 32-bit integers, made of pairs of 16-bit ones.
struct Integers {
  static constexpr int width = 8;
  using Register = __m256i;
  using Pairs = __m256i;

  static Register zero() { return _mm256_setzero_si256(); }
  static Register add(Register a, Register b) { return _mm256_add_epi32(a, b); }
  static Register load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store(int32_t* to, Register value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static Pairs load(const int16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Pairs load(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store(int16_t* to, Pairs value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static Pairs set_pair(const int16_t* from) {
    int32_t both;
    memcpy(&both, from, sizeof both);
    return _mm256_set1_epi32(both);
  }
  static Register multiply_add(Register sum, Pairs a, Pairs b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static Register rounded(Vec<float>::Register value) { return _mm256_cvtps_epi32(value); }
  static Vec<float>::Register to_float(Register value) { return _mm256_cvtepi32_ps(value); }
};

inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace mmk::MMK_TIER
