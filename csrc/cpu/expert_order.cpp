// The counting sort of expert_order.h: a histogram of each chunk of slots, the chunks' and experts' prefixes, the scatter.
#include "expert_order.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../common/arguments.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "core/trace.h"

namespace mmk {

void order_by_expert(const std::int64_t* ids, std::int64_t slots, std::int64_t slots_a_token, std::int64_t experts,
                     const char* name, const ExpertOrderOut& out) {
  constexpr std::int64_t chunk_slots = 8192;
  const std::int64_t chunks = std::max<std::int64_t>(1, ceil_div(slots, chunk_slots));
  const auto each_chunk = [&](const auto& f) {
    parallel_for(chunks, chunk_slots, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t chunk = begin; chunk < end; ++chunk)
        f(chunk, chunk * chunk_slots, std::min((chunk + 1) * chunk_slots, slots));
    });
  };
  std::vector<std::int64_t> places(static_cast<std::size_t>(chunks * experts));
  std::atomic<std::int64_t> wrong{-1};
  each_chunk([&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
    std::int64_t* counts = places.data() + chunk * experts;
    for (std::int64_t slot = begin; slot < end; ++slot) {
      const std::int64_t id = ids[slot];
      if (id >= 0 && id < experts) {
        ++counts[id];
      } else if (id != -1) {
        wrong.store(slot, std::memory_order_relaxed);
      }
    }
  });
  if (const std::int64_t slot = wrong.load(); slot >= 0)
    check(false, name, "expected -1 to ", experts - 1, ", got ", ids[slot], " for token ", slot / slots_a_token);
  std::int64_t place = 0;
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    out.offsets[expert] = place;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::int64_t& first = places[static_cast<std::size_t>(chunk * experts + expert)];
      const std::int64_t count = first;
      first = place;
      place += count;
    }
  }
  out.offsets[experts] = place;
  each_chunk([&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
    std::int64_t* next = places.data() + chunk * experts;
    for (std::int64_t slot = begin; slot < end; ++slot) {
      const std::int64_t id = ids[slot], at = id < 0 ? -1 : next[id]++;
      if (out.positions != nullptr) out.positions[slot] = at;
      if (at < 0) continue;
      if (out.order != nullptr) out.order[at] = slot;
      if (out.tokens != nullptr) out.tokens[at] = slot / slots_a_token;
    }
  });
  if (out.order != nullptr) std::fill(out.order + place, out.order + slots, -1);
}

ExpertOrder::ExpertOrder(const std::int64_t* ids, std::int64_t slots, std::int64_t slots_a_token, std::int64_t experts,
                         const char* name)
    : order_(static_cast<std::size_t>(slots)),
      offsets_(static_cast<std::size_t>(experts + 1)),
      positions_(static_cast<std::size_t>(slots)),
      tokens_(static_cast<std::size_t>(slots)) {
  order_by_expert(ids, slots, slots_a_token, experts, name, {order_.data(), offsets_.data(), positions_.data(), tokens_.data()});
}

namespace {

std::tuple<Tensor, Tensor, Tensor> expert_order(Tensor expert_ids, std::int64_t num_experts) {
  check(expert_ids.scalar_type() == ScalarType::Long, "expert_ids", "expected int64");
  check(expert_ids.dim() == 2 && expert_ids.is_contiguous(), "expert_ids", "expected contiguous [T, K]");
  check(num_experts >= 1, "num_experts", "expected at least 1, got ", num_experts);
  const std::int64_t tokens = expert_ids.size(0), slots_a_token = expert_ids.size(1), slots = tokens * slots_a_token;
  const std::int32_t int64 = aoti_torch_dtype_int64();
  Tensor order = new_tensor(expert_ids, {slots}, int64), offsets = new_tensor(expert_ids, {num_experts + 1}, int64);
  Tensor positions = new_tensor(expert_ids, {tokens, slots_a_token}, int64);
  trace("expert_order", "cpu/generic");
  const auto data = [](Tensor& tensor) { return static_cast<std::int64_t*>(tensor.mutable_data_ptr()); };
  order_by_expert(static_cast<const std::int64_t*>(expert_ids.const_data_ptr()), slots, slots_a_token, num_experts, "expert_ids",
                  {data(order), data(offsets), data(positions), nullptr});
  return {order, offsets, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) { library.impl("expert_order", TORCH_BOX(&expert_order)); }

}  // namespace mmk
