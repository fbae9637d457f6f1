// Which kernels a call of attention runs: matrix tiles or products of pairs of bfloat16, where they pay, or vectors.
#include "attention.h"
#include "core/integers.h"
#include "core/export.h"
#include "core/tier.h"

namespace mmk {
namespace {

// What takes pairs of a call in bfloat16 in place of vectors, as far as `pays` says so.
struct Beyond {
  const AttentionTier* tier;
  const char* name;
  bool (*pays)(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim);
};

// With tiles there are no products of pairs beside them: what tiles leave is few rows, tiny sequences and few channels.
Beyond beyond_vectors() {
#if MMK_X86_TIERS
  if (active_isa() == Isa::amx) return {&amx::attention_kernels, kernel_name(Isa::amx), tiles_pay};
#if !MMK_EMULATE_AVX512
  if (has_bf16_pairs()) return {&avx512_bf16::attention_kernels, bf16_pairs_name, pairs_pay};
#endif
#endif
  return {};
}

// Packed sequences choose one by one.
bool takes_a_pair(const Beyond& beyond, const AttentionCall& call) {
  if (beyond.tier == nullptr) return false;
  const int64_t group = call.heads / call.kv_heads;
  if (call.cu_q == nullptr) return beyond.pays(group * call.len_q, call.len_k, call.dim, call.value_dim);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t rows = group * (call.cu_q[b + 1] - call.cu_q[b]), keys = call.cu_k[b + 1] - call.cu_k[b];
    if (beyond.pays(rows, keys, call.dim, call.value_dim)) return true;
  }
  return false;
}

// Few rows read keys and values once, as they lie.
constexpr int64_t few_rows = 4;

}  // namespace

// In cycles of a core that makes a tile product in 16 and two vectors of 16 multiply-adds in one. Beside its products a tile costs
// what vectors are spared: scores leave the tiles and are scaled, weights are rounded and put in pairs, about 5 cycles for 16 rows
// and a key; values are transposed, a quarter of a cycle an element. So it is padding that decides: 6 channels fill a fifth of a
// tile. What the kernel for tiny sequences may take has one order of sums whoever takes it.
bool tiles_pay(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim) {
  if (rows <= few_rows || (rows <= tiny_rows && keys <= tiny_keys)) return false;
  const int64_t blocks = ceil_div(rows, 16);
  const int64_t products = blocks * (ceil_div(keys, 16) * ceil_div(dim, 32) + ceil_div(keys, 32) * ceil_div(value_dim, 16));
  const int64_t vectors = blocks * keys * (dim + value_dim);
  return 16 * products + 5 * blocks * keys + keys * value_dim / 4 < vectors / 2;
}

// A vector of products of pairs takes as long as one of products: half of the work is spared, but weights are rounded and put
// in pairs, about 4 vectors' time a key. What the kernel for tiny sequences may take is not taken here either.
bool pairs_pay(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim) {
  if (rows <= few_rows || (rows <= tiny_rows && keys <= tiny_keys && dim + value_dim <= tiny_channels)) return false;
  return ceil_div(dim, 2) + ceil_div(value_dim, 2) + 4 < dim + value_dim;
}

AttentionChoice choose_attention(const AttentionCall& call, Number number) {
  const int at = static_cast<int>(number);
  if (number == Number::bfloat16) {
    const Beyond beyond = beyond_vectors();
    if (takes_a_pair(beyond, call)) return {&beyond.tier->kernels[at], beyond.name};
  }
  const auto tier = tier_for(attention_kernels_tiers, number == Number::float64);
  return {&tier.kernels->kernels[at], tier.name};
}

}  // namespace mmk

// For mk.explain, which names the kernels of a call before it runs: those that take such a pair in bfloat16 in place of
// vectors, null where vectors do.
MMK_EXPORT const char* mmk_attention_beyond_vectors(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim) {
  const mmk::Beyond beyond = mmk::beyond_vectors();
  return beyond.tier && beyond.pays(rows, keys, dim, value_dim) ? beyond.name : nullptr;
}
