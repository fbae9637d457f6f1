// Slots of tokens in the order of their experts: a stable counting sort, the same for any number of threads.
#pragma once
#include <cstdint>
#include <vector>

namespace mmk {

// What the sort is written to; null where it is not wanted.
struct ExpertOrderOut {
  std::int64_t* order;      // [slots]: the slot at each place; -1 beyond those in use
  std::int64_t* offsets;    // [experts + 1]
  std::int64_t* positions;  // [slots]: the place of each slot; -1 of unused ones
  std::int64_t* tokens;     // [slots]: the token of the slot at each place
};

// ids: [slots], -1 for unused ones; else they name an argument of this name that is out of range.
void order_by_expert(const std::int64_t* ids, std::int64_t slots, std::int64_t slots_a_token, std::int64_t experts,
                     const char* name, const ExpertOrderOut& out);

// One that a call keeps for itself.
class ExpertOrder {
 public:
  ExpertOrder(const std::int64_t* ids, std::int64_t slots, std::int64_t slots_a_token, std::int64_t experts, const char* name);

  std::int64_t used() const { return offsets_.back(); }
  std::int64_t begin(std::int64_t expert) const { return offsets_[static_cast<std::size_t>(expert)]; }
  std::int64_t count(std::int64_t expert) const { return begin(expert + 1) - begin(expert); }
  const std::int64_t* order() const { return order_.data(); }
  const std::int64_t* positions() const { return positions_.data(); }
  const std::int64_t* tokens() const { return tokens_.data(); }

 private:
  std::vector<std::int64_t> order_, offsets_, positions_, tokens_;
};

}  // namespace mmk
