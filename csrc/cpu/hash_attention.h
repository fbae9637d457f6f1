// Hashed binary attention: what the entries (hash_attention.cpp, hash_codes.cpp) hand to a tier's kernels.
// hash_codes.tier.cpp makes codes and goes back through them, hash_attention.tier.cpp sums values by code and reads the sums.
//
// Index glossary: N rows (tokens) of one sample and head, D channels of qk, W channels of values, m supports, bits of a code
// (h in {-1, 1}^bits). "Accumulators" are float, or double beside double.
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// --- codes and what lies before them --------------------------------------------------------------------------------------
// A head's hash function, in accumulators.
struct HashFunction {
  int64_t channels, supports, bits;
  void* anchors;     // [m, D]
  void* projection;  // [bits, m]
  void* mean;        // [m]
  void* squares;     // [m]: 1 + |anchor|^2, so that a unit u lies at the distance squares - 2 u.anchor
  void* anchor_sum;  // [D]
};

inline constexpr double log2_of_e = 1.4426950408889634;

// Rows of one sample and head, row 0 first. The kernel of a row x is 2^(bias[j] + (x.anchor_j) log2(e) / (|x| sigma)) - mean[j].
struct HashRows {
  const HashFunction* function;
  const void* qk;
  int64_t stride;
  const void* bias;  // [m]: -squares / (2 sigma ln 2)
  double sigma;
};

struct HashCodes {
  HashRows rows;
  int32_t* codes;
  int32_t* inside;  // null: not needed; else the bits with -1 < y < 1
};

// Backward, rows of the same sample and head. `sums` and `slopes` are S, z and their gradients, laid out as HashState below.
struct HashBackward {
  HashRows rows;
  const void* grad;  // of the output, contiguous rows
  const void* v;
  int64_t v_stride, width;
  const int32_t* inside;
  const void *sums, *slopes;
  void* inverse;  // [N]: 1 / denominator on the way in; 1 / |x| on the way out
  void* slope;    // [N]: of the denominator; on the way out (u.anchor_sum) / |x|^2
  void* grad_qk;  // contiguous; without sigma's part, which needs all rows: `finish` adds it
};

struct HashFinish {
  const void* qk;
  int64_t stride, channels;
  const void *inverse, *slope, *anchor_sum;
  double factor;  // of sigma's part
  void* grad_qk;
};

struct HashCodesKernels {
  int64_t tile_rows;  // that hash and backward have in hand at once
  // By type: float, bfloat16, float16, double. A tier leaves double null: only the generic tier has it.
  void (*widen[4])(const void* from, int64_t count, void* accumulators);
  void (*prepare[4])(const HashFunction&);                              // squares and anchor_sum
  void (*units[4])(const HashRows&, int64_t begin, int64_t end, void* sum);  // [D]: of the rows, each divided by its length
  bool (*hash[4])(const HashCodes&, int64_t begin, int64_t end, void* tile);  // whether every y is a number
  double (*backward[4])(const HashBackward&, int64_t begin, int64_t end, void* tile);  // the rows' part of sigma's gradient
  void (*finish[4])(const HashFinish&, int64_t begin, int64_t end);
};

MMK_TIERS(HashCodesKernels, hash_codes_kernels)

// --- sums by code ---------------------------------------------------------------------------------------------------------
// S [bits, W] = sum h v^T, z [bits] = sum h w and the sum of v [W], one after the other: a head's state, in accumulators.
struct HashState {
  int64_t bits, width;
  int64_t counts() const { return bits * width; }
  int64_t total() const { return bits * width + bits; }
  int64_t size() const { return bits * width + bits + width; }
};

struct HashSum {
  HashState state;
  int group_bits;  // of a code's bits that one table has rows for, at most
  const int32_t* codes;
  const void* values;  // null: only z
  int64_t stride;
  const void* scale;   // [N] accumulators that values are multiplied by, or null
  const void* weight;  // [N] accumulators, w; null: 1
};

// 1 / (h.z + base) of each row.
struct HashDenominator {
  HashState state;
  const int32_t* codes;
  const void* sums;
  double base;
  void* inverse;
};

// out = (h S + all * sum of v) p + self own q, where p is `scale` or 1 and q is `own_scale`.
struct HashOutput {
  HashState state;
  int group_bits;
  const int32_t* codes;
  const void* sums;
  double all, self;
  const void* own;  // rows of values, or null
  int64_t own_stride;
  const void *scale, *own_scale;  // [N] accumulators; scale may be null
  void* out;                      // contiguous rows
};

// The gradients of the denominators: -((h S + all * sum of v + self v).g) inverse^2.
struct HashSlope {
  HashOutput numerator;  // `out` is not used
  const void* grad;      // contiguous rows
  const void* inverse;
  void* slope;
};

// Few queries and keys: every pair by itself, its weight made of the bits that differ.
inline constexpr int64_t hash_pair_keys = 16;

struct HashPairs {
  HashState state;
  const int32_t *codes_q, *codes_k;
  int64_t queries, keys;  // keys: hash_pair_keys at most
  const void* v;
  int64_t stride;
  double offset;
  bool own;
  bool vector_popcount;  // the processor counts the bits of a vector's words
  void* out;
};

struct HashAttentionKernels {
  void (*sum[4])(const HashSum&, int64_t begin, int64_t end, void* sums, void* tables);
  void (*denominator[4])(const HashDenominator&, int64_t begin, int64_t end);
  void (*output[4])(const HashOutput&, int64_t begin, int64_t end, void* tables);
  void (*slope[4])(const HashSlope&, int64_t begin, int64_t end, void* tables);
  void (*pairs[4])(const HashPairs&);
};

MMK_TIERS(HashAttentionKernels, hash_attention_kernels)

// Rows of tables at most: 32 bits in groups of 6 and 5, or of 4. Each is this many accumulators.
inline constexpr int64_t hash_table_rows = 256, hash_table_cols = 32;
inline constexpr int hash_group_bits = 6;

}  // namespace mmk
