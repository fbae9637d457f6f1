// Attention of binary codes on the CPU: checks, tensors, passes. The arithmetic is in hash_attention.tier.cpp.
#include "hash_passes.h"

#include "core/trace.h"

namespace mmk {
namespace {

using namespace hash_passes;

// A product of every pair is cheaper than S where there are about as many keys as bits, and few queries to use S.
constexpr bool by_pairs(std::int64_t queries, std::int64_t keys) { return queries <= 16 && keys <= hash_pair_keys; }

// --- attention of codes ---------------------------------------------------------------------------------------------------
Tensor hash_attention(Tensor v, Tensor codes_q, Tensor codes_k, std::int64_t bits, double offset, bool own) {
  const HeadRows values(v, "v");
  const HeadCodes queries(codes_q, "codes_q", v, values.batch, values.heads);
  const HeadCodes keys(codes_k, "codes_k", v, values.batch, values.heads);
  check(keys.rows == values.rows, "codes_k", "expected one for each value, ", values.rows, ", got ", keys.rows);
  check(!own || queries.rows == keys.rows, "codes_q", "expected as many as keys, ", keys.rows, ", got ", queries.rows);
  check_attention(bits, offset);
  const Numbers numbers(v);
  const HashAttentionKernels& kernels = *numbers.attention.kernels;
  const HashState state{bits, values.cols};
  Tensor out = new_tensor(v, {values.batch, values.heads, queries.rows, values.cols}, dtype_of(v));
  trace("hash_attention", numbers.attention.name);
  if (out.numel() == 0) return out;
  const std::int64_t heads = values.batch * values.heads, row_bytes = values.cols * values.bytes;
  char* to = static_cast<char*>(out.mutable_data_ptr());

  if (by_pairs(queries.rows, keys.rows)) {
    parallel_for(heads, queries.rows * keys.rows * values.cols / 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t head = begin; head < end; ++head)
        kernels.pairs[numbers.index]({state, queries.at(head), keys.at(head), queries.rows, keys.rows, values.at(head),
                                      values.row_stride, offset, own, has_vector_popcount(), to + head * queries.rows * row_bytes});
    });
    return out;
  }
  const Chunks of_keys(keys.rows), of_queries(queries.rows);
  Workspace memory(ScratchUse::hash_attention);
  const std::int64_t state_bytes = state.size() * numbers.wide, parts = std::max<std::int64_t>(1, of_keys.count);
  const std::int64_t of_sums = memory.add(heads * parts * state_bytes);
  memory.allocate();
  const auto sums = [&](std::int64_t head, std::int64_t chunk) {
    return memory.at(of_sums + (head * parts + chunk) * state_bytes);
  };
  const Pass summing{[&](std::int64_t head, std::int64_t chunk) {
                       if (chunk >= of_keys.count) return;
                       const HashSum call{state,           of_keys.group_bits(), keys.at(head), values.at(head),
                                          values.row_stride, nullptr,            nullptr};
                       kernels.sum[numbers.index](call, of_keys.begin(chunk), of_keys.end(chunk), sums(head, chunk),
                                                  tables(numbers.wide));
                     },
                     [&](std::int64_t head) {
                       if (of_keys.count == 0) std::memset(sums(head, 0), 0, static_cast<std::size_t>(state_bytes));
                       numbers.add_up(sums(head, 0), of_keys.count, state.size());
                     }};
  const Pass reading{[&](std::int64_t head, std::int64_t chunk) {
                       if (chunk >= of_queries.count) return;
                       const std::int64_t begin = of_queries.begin(chunk), end = of_queries.end(chunk);
                       void* inverse = scratch(ScratchUse::rows, static_cast<std::size_t>((end - begin) * numbers.wide));
                       const std::int32_t* codes = queries.at(head) + begin;
                       const int group_bits = of_queries.group_bits();
                       const double base = offset * static_cast<double>(keys.rows);
                       kernels.denominator[numbers.index]({state, codes, sums(head, 0), base, inverse}, 0, end - begin);
                       const char* self = own ? values.at(head) + begin * values.row_stride * values.bytes : nullptr;
                       const HashOutput call{state,   group_bits, codes,           sums(head, 0),
                                             own ? 0 : offset, own ? offset : 0, self, values.row_stride,
                                             inverse, inverse,    to + (head * queries.rows + begin) * row_bytes};
                       kernels.output[numbers.index](call, 0, end - begin, tables(numbers.wide));
                     },
                     nothing};
  run(heads, std::max(of_keys.count, of_queries.count), values.cols * 2, summing, reading);
  scratch_done(ScratchUse::hash_attention);
  return out;
}

// With g' = grad / denominator: grad v = h_k sum(h_q g'^T) + offset g' (its own, or the sum of all).
Tensor hash_attention_backward(Tensor grad, Tensor codes_q, Tensor codes_k, std::int64_t bits, double offset, bool own) {
  const HeadRows upstream(grad, "grad");
  check(grad.is_contiguous(), "grad", "expected a contiguous gradient");
  const HeadCodes queries(codes_q, "codes_q", grad, upstream.batch, upstream.heads);
  const HeadCodes keys(codes_k, "codes_k", grad, upstream.batch, upstream.heads);
  check(queries.rows == upstream.rows, "codes_q", "expected one for each gradient, ", upstream.rows, ", got ", queries.rows);
  check(!own || queries.rows == keys.rows, "codes_q", "expected as many as keys, ", keys.rows, ", got ", queries.rows);
  check_attention(bits, offset);
  const Numbers numbers(grad);
  const HashAttentionKernels& kernels = *numbers.attention.kernels;
  const HashState state{bits, upstream.cols}, only_counts{bits, 0};
  Tensor out = new_tensor(grad, {upstream.batch, upstream.heads, keys.rows, upstream.cols}, dtype_of(grad));
  trace("hash_attention_backward", numbers.attention.name);
  if (out.numel() == 0) return out;
  const std::int64_t heads = upstream.batch * upstream.heads, row_bytes = upstream.cols * upstream.bytes;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const Chunks of_keys(keys.rows), of_queries(queries.rows);
  const std::int64_t parts = std::max(of_keys.count, of_queries.count);
  Workspace memory(ScratchUse::hash_attention);
  const std::int64_t state_bytes = state.size() * numbers.wide, count_bytes = only_counts.size() * numbers.wide;
  const std::int64_t of_sums = memory.add(heads * parts * state_bytes), of_counts = memory.add(heads * parts * count_bytes);
  const std::int64_t of_inverse = memory.add(heads * queries.rows * numbers.wide);
  memory.allocate();
  const auto sums = [&](std::int64_t head, std::int64_t chunk) {
    return memory.at(of_sums + (head * parts + chunk) * state_bytes);
  };
  const auto counts = [&](std::int64_t head, std::int64_t chunk) {
    return memory.at(of_counts + (head * parts + chunk) * count_bytes);
  };
  const auto inverse = [&](std::int64_t head) { return memory.at(of_inverse + head * queries.rows * numbers.wide); };
  const Pass counting{[&](std::int64_t head, std::int64_t chunk) {
                        if (chunk >= of_keys.count) return;
                        const HashSum call{only_counts, of_keys.group_bits(), keys.at(head), nullptr, 0, nullptr, nullptr};
                        kernels.sum[numbers.index](call, of_keys.begin(chunk), of_keys.end(chunk), counts(head, chunk),
                                                   tables(numbers.wide));
                      },
                      [&](std::int64_t head) { numbers.add_up(counts(head, 0), of_keys.count, only_counts.size()); }};
  const Pass summing{[&](std::int64_t head, std::int64_t chunk) {
                       if (chunk >= of_queries.count) return;
                       const std::int64_t begin = of_queries.begin(chunk), end = of_queries.end(chunk);
                       const int group_bits = of_queries.group_bits();
                       const double base = offset * static_cast<double>(keys.rows);
                       kernels.denominator[numbers.index]({only_counts, queries.at(head), counts(head, 0), base, inverse(head)},
                                                          begin, end);
                       const HashSum call{state,         group_bits,    queries.at(head), upstream.at(head),
                                          upstream.cols, inverse(head), nullptr};
                       kernels.sum[numbers.index](call, begin, end, sums(head, chunk), tables(numbers.wide));
                     },
                     [&](std::int64_t head) {
                       if (of_queries.count == 0) std::memset(sums(head, 0), 0, static_cast<std::size_t>(state_bytes));
                       numbers.add_up(sums(head, 0), of_queries.count, state.size());
                     }};
  const Pass reading{[&](std::int64_t head, std::int64_t chunk) {
                       if (chunk >= of_keys.count) return;
                       const HashOutput call{state,
                                             of_keys.group_bits(),
                                             keys.at(head),
                                             sums(head, 0),
                                             own ? 0 : offset,
                                             own ? offset : 0,
                                             own ? upstream.at(head) : nullptr,
                                             upstream.cols,
                                             nullptr,
                                             inverse(head),
                                             to + head * keys.rows * row_bytes};
                       kernels.output[numbers.index](call, of_keys.begin(chunk), of_keys.end(chunk), tables(numbers.wide));
                     },
                     nothing};
  run(heads, parts, upstream.cols * 2, counting, summing, reading);
  scratch_done(ScratchUse::hash_attention);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("hash_attention", TORCH_BOX(&hash_attention));
  library.impl("hash_attention_backward", TORCH_BOX(&hash_attention_backward));
}

}  // namespace mmk
