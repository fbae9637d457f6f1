// Which kernels a call of attention runs: matrix tiles, where they pay, or vectors.
#include "attention.h"
#include "core/integers.h"
#include "core/export.h"
#include "core/tier.h"

namespace mmk {
namespace {

// Whether a call has a pair that goes to tiles; packed sequences choose one by one.
bool has_pair_for_tiles(const AttentionCall& call) {
  const int64_t group = call.heads / call.kv_heads;
  if (call.cu_q == nullptr) return tiles_pay(group * call.len_q, call.len_k, call.dim, call.value_dim);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t rows = group * (call.cu_q[b + 1] - call.cu_q[b]), keys = call.cu_k[b + 1] - call.cu_k[b];
    if (tiles_pay(rows, keys, call.dim, call.value_dim)) return true;
  }
  return false;
}

}  // namespace

// In cycles of a core that makes a tile product in 16 and two vectors of 16 multiply-adds in one. Beside its products a tile costs
// what vectors are spared: scores leave the tiles and are scaled, weights are rounded and put in pairs, about 5 cycles for 16 rows
// and a key; values are transposed, a quarter of a cycle an element. So it is padding that decides: 6 channels fill a fifth of a
// tile. Few rows read keys and values once, as they lie, and what the kernel for tiny sequences may take has one order of sums
// whoever takes it.
bool tiles_pay(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim) {
  constexpr int64_t few_rows = 4;
  if (rows <= few_rows || (rows <= tiny_rows && keys <= tiny_keys)) return false;
  const int64_t blocks = ceil_div(rows, 16);
  const int64_t products = blocks * (ceil_div(keys, 16) * ceil_div(dim, 32) + ceil_div(keys, 32) * ceil_div(value_dim, 16));
  const int64_t vectors = blocks * keys * (dim + value_dim);
  return 16 * products + 5 * blocks * keys + keys * value_dim / 4 < vectors / 2;
}

AttentionChoice choose_attention(const AttentionCall& call, Number number) {
  const int at = static_cast<int>(number);
#if MMK_X86_TIERS
  if (number == Number::bfloat16 && active_isa() == Isa::amx && has_pair_for_tiles(call))
    return {&amx::attention_kernels.kernels[at], kernel_name(Isa::amx)};
#endif
  const auto tier = tier_for(attention_kernels_tiers, number == Number::float64);
  return {&tier.kernels->kernels[at], tier.name};
}

}  // namespace mmk

// For mk.explain, which names the kernels of a call before it runs.
MMK_EXPORT int mmk_attention_tiles_pay(int64_t rows, int64_t keys, int64_t dim, int64_t value_dim) {
  return mmk::tiles_pay(rows, keys, dim, value_dim) ? 1 : 0;
}
