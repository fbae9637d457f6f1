// Matrix products in bfloat16 by AVX512_BF16, whose instruction adds two products to each 32-bit sum: panels of the AVX-512 tier
// with the depth in pairs. Compiled with it on; nothing here runs before has_bf16_pairs() has asked. Subnormal numbers count as zero.
#include "ahead.h"
#include "gemm_panels.h"

namespace mmk::MMK_TIER {
namespace {

using V = Vec<float>;
inline constexpr int cols = panel_cols<float>;
inline constexpr int64_t pair_bytes = 2 * sizeof(bfloat16);

template <int rows, int vectors, class Elements>
inline void multiply_panels(Elements a, const char* b, int64_t pairs, float* c, int64_t c_stride, bool accumulate) {
  V::Register sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = V::zero();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh of_b[vectors];
    for (int j = 0; j < vectors; ++j) of_b[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + j * V::width * pair_bytes));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      memcpy(&pair, a.at(i), sizeof pair);
      const __m512bh element = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], element, of_b[j]);
    }
    a.next();
    b += cols * pair_bytes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    float* to = c + i * c_stride;
    for (int j = 0; j < vectors; ++j)
      V::store(to + j * V::width, accumulate ? V::load(to + j * V::width) + sums[i][j] : sums[i][j]);
  }
}

void multiply(const GemmBlock& call) {
  for_each_panel_pair(
      call, cols, cols * static_cast<int64_t>(sizeof(bfloat16)), [](const char* panel) { return panel; },
      [&](const char* a, const char* b, int64_t row, int64_t col, int64_t count) {
        with_elements_of_a<bfloat16, 2>(call, a, [&](auto elements) {
          with_tile<float>(count, call.used_cols - col, [&]<int rows, int vectors>() {
            multiply_panels<rows, vectors>(elements, b, ceil_div(call.depth, 2),
                                           static_cast<float*>(call.c) + row * call.c_stride + col, call.c_stride,
                                           call.accumulate);
          });
        });
      });
}

// The pairs of rows whose depth is contiguous are there already: squares of them are transposed. The first `lanes` of a row are
// stored, zeros beyond `count`.
inline void pack_pairs(const bfloat16* from, int64_t stride, int64_t count, int64_t depth, int lanes, char* to, int64_t step,
                       LinesAhead ahead) {
  const __mmask16 stored = static_cast<__mmask16>((1u << lanes) - 1);
  for (int64_t k = 0; k < depth; k += 2 * V::width, to += V::width * step) {
    const int64_t left = least(depth - k, 2 * V::width);
    const __mmask32 there = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    V::Register rows[V::width];
    for (int64_t i = 0; i < V::width; ++i) {
      rows[i] = i < count ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, from + i * stride + k)) : V::zero();
      ahead.look();
    }
    V::transpose(rows);
    for (int64_t i = 0; i < ceil_div(left, 2); ++i) _mm512_mask_storeu_ps(to + i * step, stored, rows[i]);
  }
}

// Two lines of contiguous rows become pairs.
inline void pack_lines(const bfloat16* from, int64_t stride, int64_t count, int64_t depth, int lanes, char* to, int64_t step) {
  const __mmask16 stored = static_cast<__mmask16>((1u << lanes) - 1);
  const __mmask16 there = count >= V::width ? 0xffff : static_cast<__mmask16>((1u << most(count, 0)) - 1);
  const auto line = [&](int64_t k) {
    return k < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + k * stride)) : _mm512_setzero_si512();
  };
  for (int64_t k = 0; k < depth; k += 2, to += step)
    _mm512_mask_storeu_epi32(to, stored, _mm512_or_si512(line(k), _mm512_slli_epi32(line(k + 1), 16)));
}

template <int panel>
void pack(const GemmPack& call) {
  const GemmOperand& source = call.source;
  const bfloat16* from = static_cast<const bfloat16*>(source.data);
  for (int64_t first = 0; first < call.count; first += panel)
    for (int64_t lane = 0; lane < panel; lane += V::width) {
      char* to = static_cast<char*>(call.panels) + first / panel * call.panel_bytes + lane * pair_bytes;
      const int lanes = static_cast<int>(least(panel - lane, V::width));
      const int64_t count = least(call.count - first - lane, lanes);
      if (source.depth_stride == 1) {
        const bfloat16* rows = from + (first + lane) * source.stride;
        // Those that come next, from memory where this one's tiles touch only the beginnings of lines far apart.
        const LinesAhead ahead{reinterpret_cast<const char*>(rows + V::width * source.stride),
                               source.stride * static_cast<int64_t>(sizeof(bfloat16)),
                               call.depth * static_cast<int64_t>(sizeof(bfloat16)), call.count - first - lane - V::width};
        pack_pairs(rows, source.stride, count, call.depth, lanes, to, panel * pair_bytes, ahead);
      } else {
        pack_lines(from + first + lane, source.depth_stride, count, call.depth, lanes, to, panel * pair_bytes);
      }
    }
}

constexpr GemmArithmetic pairs() {
  GemmArithmetic result{panel_rows,        cols, 2 * depth_block, 2,    sizeof(bfloat16), sizeof(bfloat16), 0,
                        sizeof(float), true, true,            {},   {},               multiply, nullptr};
  result.pack_a[1] = pack<panel_rows>;
  result.pack_b[1] = pack<cols>;
  return result;
}

}  // namespace

const GemmArithmetic gemm_pairs = pairs();

}  // namespace mmk::MMK_TIER
