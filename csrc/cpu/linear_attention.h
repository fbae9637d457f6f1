// Linear attention: what the entry (linear_attention.cpp) hands to a tier's kernels (linear_attention*.tier.cpp).
//
// A "pair" is one sequence and one head of k and v, with the state S [D, Dv], z [D] that its keys add up to; the queries of
// `heads / kv_heads` heads read it. Where there are few heads, the sequence is cut into segments, whose sums are made apart and
// joined in their order: how it is cut depends on its length and the number of heads alone, so that a sequence has the same
// bits among others as by itself.
#pragma once
#include "attention.h"
#include "core/integers.h"

namespace mmk {

enum class FeatureMap : int { identity, relu, elu1, softmax };
inline constexpr int feature_maps = 4;

struct LinearAttentionCall {
  int64_t batch, heads, kv_heads, len_q, len_k, dim, value_dim;
  const int64_t* cu_q;  // [B + 1], null: not packed. len_q and len_k are then those of the longest
  const int64_t* cu_k;
  AttentionOperand q, k, v, out;
  const uint8_t* mask;  // null: every key counts
  int64_t mask_batch, mask_row;
  FeatureMap feature_map;
  bool is_causal, normalize;
  double eps;
  int64_t segments;     // of the longest sequence
  bool stream;          // outputs bypass the cache
  // Accumulators. States are S [D, Dv] and then z [D].
  const void* first_s;  // [pairs, D, Dv] and [pairs, D]: what sums go on from, null: zero
  const void* first_z;
  void* final_s;        // the same with all keys added; of softmax, divided by z
  void* final_z;
  void* partial;        // [pairs, segments] states where there are more segments than one: sums of each segment, or what its
                        // first key finds
};

struct LinearAttentionBackward {
  LinearAttentionCall call;  // final_s and final_z are read
  AttentionOperand grad_out, grad_q, grad_k, grad_v;
  // Accumulators.
  const void* upstream_s;  // gradients of the returned state, null: zero
  const void* upstream_z;
  void* grad_s;            // [pairs, D, Dv] and [pairs, D]: of the state that queries see, and at the end of the first one
  void* grad_z;
  void* partial;           // as the call's, for these
  void* totals;            // causal, [2, B, H, Lq] (packed: [2, H, Tq]): the inverse denominators of queries, and their gradients
  int64_t totals_part, totals_batch, totals_head;
};

struct LinearAttentionKernels {
  // Items: pairs x segments, of all keys.
  void (*sums)(const LinearAttentionCall&, int64_t begin, int64_t end, void* scratch);
  // Items: sequences x heads x blocks of queries; pairs x segments.
  void (*queries)(const LinearAttentionCall&, int64_t begin, int64_t end, void* scratch);
  void (*causal)(const LinearAttentionCall&, int64_t begin, int64_t end, void* scratch);
};

struct LinearAttentionBackwardKernels {
  // Items: pairs x segments of queries; pairs x blocks of keys; causal: pairs x segments for both.
  void (*queries)(const LinearAttentionBackward&, int64_t begin, int64_t end, void* scratch);
  void (*keys)(const LinearAttentionBackward&, int64_t begin, int64_t end, void* scratch);
  void (*causal_queries)(const LinearAttentionBackward&, int64_t begin, int64_t end, void* scratch);
  void (*causal_keys)(const LinearAttentionBackward&, int64_t begin, int64_t end, void* scratch);
};

// By the type of q; null functions in tiers without.
struct LinearAttentionTier {
  LinearAttentionKernels kernels[float_numbers];
};
struct LinearAttentionBackwardTier {
  LinearAttentionBackwardKernels kernels[float_numbers];
};

MMK_TIERS(LinearAttentionTier, linear_attention_kernels)
MMK_TIERS(LinearAttentionBackwardTier, linear_attention_backward_kernels)
#if MMK_X86_TIERS
// bfloat16 alone.
MMK_DECLARE_TIER(avx512_bf16, LinearAttentionTier, linear_attention_kernels)
MMK_DECLARE_TIER(avx512_bf16, LinearAttentionBackwardTier, linear_attention_backward_kernels)
#endif

// --- how work is cut ----------------------------------------------------------------------------------------------------
inline constexpr int64_t linear_attention_chunk = 64;    // rows whose features are at hand
inline constexpr int64_t linear_attention_block = 512;   // rows of an item that shares nothing with others
inline constexpr int64_t linear_attention_segment = 1024;

inline int64_t linear_attention_blocks(int64_t length) { return ceil_div(length, linear_attention_block); }

inline int64_t linear_attention_segments(const LinearAttentionCall& call, int64_t length) {
  if (call.kv_heads >= 4 || call.feature_map == FeatureMap::softmax || length <= linear_attention_segment) return 1;
  return ceil_div(length, linear_attention_segment);
}

// Elements of scratch, enough for every kernel and the vectors of every tier.
inline int64_t linear_attention_scratch(const LinearAttentionCall& call) {
  const int64_t dim = rounded_up(call.dim, 32), value_dim = rounded_up(call.value_dim, 32);
  return 4 * (dim + 1) * value_dim + linear_attention_chunk * (6 * (dim + value_dim) + 4 * linear_attention_chunk) + 8 * dim + 1024;
}

}  // namespace mmk
