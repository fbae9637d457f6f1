// What the entries of hashed binary attention share: rows of heads, chunks of rows and passes over them, the call's memory.
//
// The rows of each sample and head are cut into chunks by their number alone. A pass over chunks leaves sums of each, which
// are added up in order before the next pass, so that the bits do not depend on which thread had which chunk.
#pragma once
#include "hash_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "../common/arguments.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tier.h"

namespace mmk::hash_passes {

// --- which way ------------------------------------------------------------------------------------------------------------
inline constexpr std::int64_t chunk_rows = 512;

// Larger groups of bits take fewer additions a row, and rows of tables to be made and folded: on AVX2 4 bits win up to some
// 250 rows, 6 from there (8, whose tables leave the first-level cache, would win from some 2000 rows by a tenth of the whole).
constexpr int group_bits_of(std::int64_t rows) { return rows < 256 ? 4 : hash_group_bits; }

// --- arguments ------------------------------------------------------------------------------------------------------------
// [B, H, N, C] with a contiguous last dimension, as rows of each head (sample and head in one number).
struct HeadRows {
  char* data;
  std::int64_t batch, heads, rows, cols, sample_stride, head_stride, row_stride, bytes;

  HeadRows(const Tensor& tensor, const char* name) {
    check(tensor.dim() == 4, name, "expected four dimensions, got ", tensor.dim());
    check(tensor.size(3) <= 1 || tensor.stride(3) == 1 || tensor.numel() == 0, name,
          "the last dimension must be contiguous, got stride ", tensor.stride(3));
    dtype_index(tensor, name);
    data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    batch = tensor.size(0);
    heads = tensor.size(1);
    rows = tensor.size(2);
    cols = tensor.size(3);
    sample_stride = tensor.stride(0);
    head_stride = tensor.stride(1);
    row_stride = tensor.stride(2);
    bytes = static_cast<std::int64_t>(tensor.element_size());
  }
  char* at(std::int64_t head) const {
    return data + (head / heads * sample_stride + head % heads * head_stride) * bytes;
  }
};

// Codes [B, H, N], contiguous or not.
struct HeadCodes {
  const std::int32_t* data;
  std::int64_t heads, rows, sample_stride, head_stride;

  HeadCodes(const Tensor& codes, const char* name, const Tensor& beside, std::int64_t batch, std::int64_t of_heads) {
    check(codes.scalar_type() == ScalarType::Int, name, "expected int32");
    check(on_one_device(codes, beside), name, "expected the device of v");
    check(codes.dim() == 3 && codes.size(0) == batch && codes.size(1) == of_heads, name, "expected [", batch, ", ", of_heads,
          ", N]");
    check(codes.size(2) <= 1 || codes.stride(2) == 1 || codes.numel() == 0, name, "the last dimension must be contiguous");
    data = static_cast<const std::int32_t*>(codes.const_data_ptr());
    heads = of_heads;
    rows = codes.size(2);
    sample_stride = codes.stride(0);
    head_stride = codes.stride(1);
  }
  const std::int32_t* at(std::int64_t head) const { return data + head / heads * sample_stride + head % heads * head_stride; }
};

inline void check_attention(std::int64_t bits, double offset) {
  check(bits >= 1 && bits <= 32, "bits", "expected 1 to 32, got ", bits);
  check(offset > static_cast<double>(bits) && offset < std::numeric_limits<double>::infinity(), "offset",
        "expected more than the ", bits, " bits, got ", offset);
}

// --- chunks and passes ----------------------------------------------------------------------------------------------------
struct Chunks {
  std::int64_t rows, count;
  explicit Chunks(std::int64_t of_rows) : rows(of_rows), count(ceil_div(of_rows, chunk_rows)) {}
  // Whole tiles of every tier but for the last.
  std::int64_t begin(std::int64_t chunk) const { return std::min(rows, rounded_up(rows * chunk / count, 32)); }
  std::int64_t end(std::int64_t chunk) const { return chunk + 1 == count ? rows : begin(chunk + 1); }
  int group_bits() const { return group_bits_of(count > 0 ? rows / count : 0); }
};

// each(head, chunk) for all chunks, then whole(head).
template <class Each, class Whole>
struct Pass {
  Each each;
  Whole whole;
};
inline constexpr auto nothing = [](std::int64_t) {};

// The passes one after the other: a head to a thread where there are enough, so that its rows stay in that core's cache, else
// every chunk by itself.
template <class... Passes>
void run(std::int64_t heads, std::int64_t chunks, std::int64_t row_work, const Passes&... passes) {
  const std::int64_t chunk_work = chunk_rows * row_work;
  if (chunks <= 1 || heads >= 2 * threads()) {
    parallel_for(heads, std::max<std::int64_t>(1, chunks) * chunk_work, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t head = begin; head < end; ++head) {
        const auto one = [&](const auto& pass) {
          for (std::int64_t chunk = 0; chunk < chunks; ++chunk) pass.each(head, chunk);
          pass.whole(head);
        };
        (one(passes), ...);
      }
    });
    return;
  }
  const auto one = [&](const auto& pass) {
    parallel_for(heads * chunks, chunk_work, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) pass.each(i / chunks, i % chunks);
    });
    for (std::int64_t head = 0; head < heads; ++head) pass.whole(head);
  };
  (one(passes), ...);
}

// Sums of each chunk, added up in order into the first.
template <class A>
void add_up(A* sums, std::int64_t chunks, std::int64_t size) {
  for (std::int64_t chunk = 1; chunk < chunks; ++chunk)
    for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[chunk * size + i];
}

inline void* tables(std::int64_t accumulator_bytes) {
  return scratch(ScratchUse::hash_tables,
                 static_cast<std::size_t>(hash_table_rows * hash_table_cols * accumulator_bytes));
}

// What all calls have: the dtype's kernels and accumulators.
struct Numbers {
  int index;
  bool doubles;
  std::int64_t wide;  // bytes of an accumulator
  Tier<HashAttentionKernels> attention;
  Tier<HashCodesKernels> codes;

  explicit Numbers(const Tensor& x)
      : index(dtype_index(x)),
        doubles(index == 3),
        wide(doubles ? 8 : 4),
        attention(tier_for(hash_attention_kernels_tiers, doubles)),
        codes(tier_for(hash_codes_kernels_tiers, doubles)) {}

  void add_up(char* sums, std::int64_t chunks, std::int64_t size) const {
    if (doubles) return hash_passes::add_up(reinterpret_cast<double*>(sums), chunks, size);
    hash_passes::add_up(reinterpret_cast<float*>(sums), chunks, size);
  }
  double get(const void* from, std::int64_t index_of) const {
    return doubles ? static_cast<const double*>(from)[index_of] : double{static_cast<const float*>(from)[index_of]};
  }
  void set(void* to, std::int64_t index_of, double value) const {
    if (doubles) {
      static_cast<double*>(to)[index_of] = value;
    } else {
      static_cast<float*>(to)[index_of] = static_cast<float>(value);
    }
  }
  // NaN in every element, which all bits set are in every type.
  static void fill_with_nan(void* to, std::int64_t bytes) { std::memset(to, 0xff, static_cast<std::size_t>(bytes)); }
};

}  // namespace mmk::hash_passes
