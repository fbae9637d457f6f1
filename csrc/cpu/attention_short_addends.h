// What is added to the scores of short sequences (attention_short.h). Included by *.tier.cpp only, in the tier's own unnamed
// namespace as vec.h is.
#pragma once
#include "attention_scores.h"

namespace mmk::MMK_TIER {
namespace {

// Rows of [keys in whole vectors]: bias, and -infinity for a key that is not seen or not there. Made once for all pairs that
// share them, as far as they fit.
class ShortAddends {
  using V = Vec<float>;

 public:
  ShortAddends(const AttentionCall& c, Layout& layout) : call(c) {
    none = !c.bias.data && !c.mask.data && !hides() && !c.segments_q.data;
    by_batch = c.cu_q || c.segments_q.data || c.limits.data || c.bias.batch != 0 || c.mask.batch != 0;
    by_head = c.bias.head != 0 || c.mask.head != 0;
    const int64_t rows = none ? 1 : least(c.len_q, short_tokens);
    elements = rows * rounded_up(least(c.len_k, short_tokens), V::width);
    constexpr int64_t most_elements = 1 << 17;  // of a second-level cache
    slots = !by_batch && by_head && c.heads * elements <= most_elements ? c.heads : 1;
    at = layout.take(slots * elements);
    made_at = layout.take(slots);
    regions_at = layout.take(c.windows.regions ? elements * (none ? least(c.len_q, short_tokens) : 1) : 0);
  }

  void begin(float* scratch) {
    memory = scratch;
    for (int64_t slot = 0; slot < slots; ++slot) memory[made_at + slot] = -1.0f;
  }

  // Whether keys are hidden by their places: what they are does not matter then.
  bool hides() const { return call.window_left >= 0 || call.window_right >= 0 || call.limits.data; }

  // The addends of a pair, and how far apart its rows' are.
  Staged<float> of(const Pair& pair) {
    const int64_t width = rounded_up(pair.len_k, V::width), slot = slots > 1 ? pair.h : 0;
    float* to = memory + at + slot * elements;
    const float made = by_head ? static_cast<float>(pair.h) : 0.0f;
    if (by_batch || memory[made_at + slot] != made) {
      make(pair, width, to);
      memory[made_at + slot] = made;
    }
    const Staged<float> shared{to, none ? 0 : width};
    return pair.regions ? with_regions(pair, width, shared) : shared;
  }

 private:
  void make(const Pair& pair, int64_t width, float* to) const {
    const float hidden = static_cast<float>(minus_infinity);
    const AttentionScores &bias = call.bias, &mask = call.mask;
    const int64_t rows = none ? 1 : pair.len_q;
    for (int64_t first = 0; first < rows; first += lanes_of<float>) {
      const Panel<float> panel(pair, first, pair.rows);
      const Intervals<float> intervals(call, pair, panel);
      for (int64_t lane = 0; lane < least(rows - first, panel.count); ++lane) {
        const int64_t i = first + lane;
        float* row = to + i * width;
        for (int64_t j = 0; j < width; ++j) row[j] = j < pair.len_k ? 0.0f : hidden;
        if (bias.data) load_bias(pair.b * bias.batch + pair.h * bias.head + i * bias.row, pair.len_k, row);
        if (mask.data) {
          const auto* from = static_cast<const uint8_t*>(mask.data) + pair.b * mask.batch + pair.h * mask.head + i * mask.row;
          for (int64_t j = 0; j < pair.len_k; ++j)
            if (!from[j * mask.col]) row[j] = hidden;
        }
        if (call.segments_q.data) {
          const int64_t id = call.segments_q.data[pair.b * call.segments_q.batch + pair.first_q + i];
          const int64_t* ids = call.segments_k.data + pair.b * call.segments_k.batch + pair.first_k;
          for (int64_t j = 0; j < pair.len_k; ++j)
            if (ids[j] != id) row[j] = hidden;
        }
        if (!intervals.any) continue;
        for (int64_t j = 0; j < intervals.low[lane]; ++j) row[j] = hidden;
        for (int64_t j = intervals.high[lane]; j < pair.len_k; ++j) row[j] = hidden;
      }
    }
  }

  void load_bias(int64_t offset, int64_t count, float* row) const {
    const auto load = [&](const auto* from) {
      for_each_vector<float>(count, [&](int64_t j, int64_t lanes) {
        store_lanes<float>(row + j, load_lanes<float>(from + j, lanes), lanes);
      });
    };
    if (call.bias.number == Number::float32) return load(static_cast<const float*>(call.bias.data) + offset);
    if (call.bias.number == Number::bfloat16) return load(static_cast<const bfloat16*>(call.bias.data) + offset);
    load(static_cast<const float16*>(call.bias.data) + offset);
  }

  // The same of a window that lies in more regions than one.
  Staged<float> with_regions(const Pair& pair, int64_t width, const Staged<float>& shared) const {
    float* to = memory + regions_at;
    float of_key[short_tokens];
    for (int64_t j = 0; j < width; ++j) of_key[j] = j < pair.len_k ? static_cast<float>(pair.regions[j]) : 0.0f;
    const V::Register other = V::set(static_cast<float>(call.windows.region_bias));
    for (int64_t i = 0; i < pair.len_q; ++i) {
      const V::Register own = V::set(static_cast<float>(pair.regions[i]));
      for (int64_t j = 0; j < width; j += V::width) {
        const V::Register key = V::load(of_key + j), added = V::load(shared.data + i * shared.row + j);
        const V::Register upper = V::select(V::less_equal(key, own), added, added + other);
        V::store(to + i * width + j, V::select(V::less_equal(own, key), upper, added + other));
      }
    }
    return {to, width};
  }

  const AttentionCall& call;
  bool none, by_batch, by_head;
  int64_t elements, slots, at, made_at, regions_at;
  float* memory = nullptr;
};

}  // namespace
}  // namespace mmk::MMK_TIER
