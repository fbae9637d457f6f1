// Attention: what the entries (attention.cpp, window_attention.cpp) hand to a tier's kernels (attention.tier.cpp).
//
// A "pair" is one batch entry and one head of k and v; its rows are the queries of every head that this one serves, those of
// one head after those of the other. B batch, H heads, Lq and Lk lengths, D and Dv channels of a head.
#pragma once
#include "core/gemm.h"
#include "core/isa.h"

#include <stdint.h>

namespace mmk {

// [B, H, L, channels] with contiguous channels; strides in elements. `pad` is what a token beyond the grid reads, of the same
// head stride; null where there is none.
struct AttentionOperand {
  const void* data;
  int64_t batch, head, row;
  const void* pad;
  int64_t pad_head;
};

// Broadcastable to [B, H, Lq, Lk]: strides are 0 where it is broadcast. data is null where there is none.
struct AttentionScores {
  const void* data;
  Number number;
  int64_t batch, head, row, col;
};

// One integer a token: [B or 1, L].
struct AttentionIds {
  const int64_t* data;
  int64_t batch;
};

// Windows of a grid: entries of the batch are the windows, `count` to a sample.
struct AttentionWindows {
  int64_t count;
  const int32_t* tokens;   // [count, L] where each token of a window lies in its sample, -1 for one beyond the grid; null: no
                           // windows, every token where its number says
  const uint8_t* regions;  // [count, L]; null: all the same
  double region_bias;      // added where a query and a key are of different regions
};

struct AttentionCall {
  int64_t batch, heads, kv_heads, len_q, len_k, dim, value_dim;
  const int64_t* cu_q;  // [B + 1], null: not packed. len_q and len_k are then those of the longest
  const int64_t* cu_k;
  AttentionOperand q, k, v, out;
  AttentionScores bias, mask;
  AttentionIds limits, segments_q, segments_k;
  AttentionWindows windows;
  const void* gate;  // one factor a value, null: none
  Number gate_number;
  int64_t gate_batch, gate_head, gate_row;
  double scale;
  const void* head_scale;  // [H] accumulators instead of scale, or null
  double normalise;        // q and k are divided by their norm, or by this where it is larger; 0: they are not
  double softcap;          // 0: none
  int64_t window_left, window_right;  // -1: unlimited
  bool bottom_right;
  double dropout_p;
  uint64_t seed;
  void* lse;  // [B, H, Lq] accumulators, strides below
  int64_t lse_batch, lse_head, lse_row;

  // How the rows of a pair are cut into items, and in which order items come: all the batch entries of one head and block of
  // rows in a row (what is added to their scores is then the same and laid out once), or all the blocks of one pair.
  int64_t block_rows, blocks;
  bool batch_inside;
  bool keeps_addends;  // from one batch entry to the next
  bool stream;         // the output bypasses the cache
};

// The rows of a pair in backward, in 2^n parts of equal length. dK and dV are summed part by part and the parts as a binary
// tree, whoever computes them: so their bits hang on the pair's own rows alone.
inline constexpr int64_t part_rows = 512, most_parts = 16, part_step = 128;

inline int64_t row_parts(int64_t rows) {
  int64_t parts = 1;
  while (parts < most_parts && 2 * parts * part_rows <= rows) parts *= 2;
  return parts;
}

inline int64_t part_begin(int64_t rows, int64_t part, int64_t parts) {
  return part == parts ? rows : rows * part / parts / part_step * part_step;
}

// The most rows that one of `splits` runs of parts has, of a pair of up to so many rows.
inline int64_t longest_run(int64_t rows, int64_t splits) {
  const int64_t run = rows / splits < 2 * part_rows ? 2 * part_rows : rows / splits + 1;
  return rows < run + part_step ? rows : run + part_step;
}

// Backward, by tasks: the pairs that share a gradient of the bias, in groups; a group's pairs in `chunks` runs, each with
// sums of its own; the parts of a pair's rows in `splits` runs (2^n), each with sums of dK and dV of its own. All by sizes
// alone.
struct AttentionBackward {
  AttentionCall call;
  AttentionOperand grad_out;
  const void* grad_lse;  // as lse, or null
  AttentionOperand grad_q, grad_k, grad_v;  // data is written; grad_k and grad_v only where there is one split
  bool group_batch, group_heads;  // a group runs over the batch, over the heads
  int64_t chunks, splits;
  // Accumulators: dK [splits, pairs, Lk, D] and dV [splits, pairs, Lk, Dv] where there are more splits than one.
  void* partial_k;
  void* partial_v;
  // Sums [chunks, the bias's shape], zero before the call; null: not wanted. Accumulators, or double where the bias is
  // broadcast over queries or keys. Strides are 0 where it is broadcast.
  void* grad_bias;
  int64_t bias_chunk, bias_batch, bias_head, bias_row, bias_col;
  void* grad_gate;   // accumulators [B, Hk, Lk] (packed: [T, Hk]) with strides below, null: not wanted
  int64_t grad_gate_batch, grad_gate_head, grad_gate_row;
  double* grad_scale;  // [B, H], zero before the call; null: not wanted
  void* grad_pad;    // accumulators [pairs, D + D + Dv]: the sums over the tokens beyond the grid, null: not wanted
};

struct AttentionKernels {
  // Bytes of scratch that a thread needs.
  int64_t (*forward_bytes)(const AttentionCall&);
  int64_t (*backward_bytes)(const AttentionBackward&);
  void (*forward)(const AttentionCall&, int64_t begin_item, int64_t end_item, void* scratch);
  void (*backward)(const AttentionBackward&, int64_t begin_task, int64_t end_task, void* scratch);
  // Tiny sequences (attention_tiny.tier.cpp): forward where there is no AttentionBackward.
  int64_t (*tiny_items)(const AttentionCall&, const AttentionBackward*);
  int64_t (*tiny_bytes)(const AttentionCall&, const AttentionBackward*);
  void (*tiny)(const AttentionCall&, const AttentionBackward*, int64_t begin_item, int64_t end_item, void* scratch);
};

// Of tiny sequences, at most.
inline constexpr int64_t tiny_rows = 16, tiny_keys = 32, tiny_channels = 64;  // channels of a query and a value

// Whether the kernel for tiny sequences takes a call: it has the vectors full of batch entries, and what is added to their
// scores is the same for all. Fewer queries go another way, whose sums have another order. Many channels leave the first-level
// cache, `backward` later, where the other kernels have more to lay out.
inline bool is_tiny(const AttentionCall& call, bool backward) {
  const int64_t most_channels = backward ? tiny_channels : 40;
  return call.dim + call.value_dim <= most_channels && call.cu_q == nullptr && call.windows.tokens == nullptr &&
         call.heads == call.kv_heads && call.len_q > 4 && call.len_q <= tiny_rows && call.len_k > 0 &&
         call.len_k <= tiny_keys && call.batch >= 8 && call.gate == nullptr &&
         call.normalise == 0 && call.softcap == 0 && call.dropout_p == 0 && call.limits.data == nullptr &&
         call.segments_q.data == nullptr && call.head_scale == nullptr && call.bias.batch == 0 && call.mask.batch == 0;
}

// Of short sequences (attention_short.h), at most: tokens, and channels of a head.
inline constexpr int64_t short_tokens = 64, short_channels = 128;

// Whether matrix tiles, or products of pairs of bfloat16, make the products of a pair in fewer cycles than vectors, where the
// processor has them: `rows` queries of all heads that share the pair's `keys` (attention_choice.cpp).
bool tiles_pay(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim);
bool pairs_pay(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim);

struct AttentionTier {
  AttentionKernels kernels[float_numbers];  // by the type of q; null functions in tiers without
};

MMK_TIERS(AttentionTier, attention_kernels)
#if MMK_X86_TIERS
// bfloat16 alone, without the kernels for tiny sequences.
MMK_DECLARE_TIER(amx, AttentionTier, attention_kernels)
MMK_DECLARE_TIER(avx512_bf16, AttentionTier, attention_kernels)
#endif

// The kernels of the tier in force for a call, by the type of q, and the name under which the trace knows them.
struct AttentionChoice {
  const AttentionKernels* kernels;
  const char* name;
};
AttentionChoice choose_attention(const AttentionCall& call, Number number);

}  // namespace mmk
