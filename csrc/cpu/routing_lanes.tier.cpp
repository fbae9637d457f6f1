// The plain kinds of routing, choice and weights in one pass: a lane for each of a vector's width of tokens, so that nothing
// depends on what a token chooses. Other kinds are routing.tier.cpp's.
#include "core/integers.h"
#include "core/math.h"
#include "core/vec.h"
#include "routing.h"

namespace mmk::MMK_TIER {
namespace {

using V = Vec<float>;
using Register = V::Register;
constexpr int width = V::width;

// lanes[e] = the logits of `count` tokens for expert e; 0 in lanes without a token.
template <class T>
inline void load_lanes_of(const RouteRows& rows, int64_t token, int64_t count, float* lanes) {
  const T* from = static_cast<const T*>(rows.logits) + token * rows.stride;
  for (int64_t first = 0; first < rows.experts; first += width) {
    const int64_t left = least(rows.experts - first, width);
    Register square[width];
    for (int64_t i = 0; i < width; ++i)
      square[i] = i < count ? load_lanes<float>(from + i * rows.stride + first, left) : V::zero();
    V::transpose(square);
    for (int64_t i = 0; i < left; ++i) V::store(lanes + (first + i) * width, square[i]);
  }
}

// A lane with an infinity or a NaN makes this NaN.
inline bool all_finite(const float* lanes, int64_t experts) {
  Register zeros = V::zero();
  for (int64_t e = 0; e < experts; ++e) zeros = V::fma(V::load(lanes + e * width), V::zero(), zeros);
  const float sum = V::sum(zeros);
  return sum == sum;
}

inline bool has_nan(const float* lanes, int64_t experts, int64_t count, int64_t* lane) {
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t i = 0; i < count; ++i)
      if (lanes[e * width + i] != lanes[e * width + i]) {
        *lane = i;
        return true;
      }
  return false;
}

// The best `slots` values of each lane and whose they are (as floats): an equal value stays behind what came before it. Empty
// slots hold NaN, behind which nothing stays.
template <int slots>
inline void best_of(const float* values, int64_t experts, Register (&best)[slots], Register (&ids)[slots]) {
  for (int s = 0; s < slots; ++s) {
    best[s] = V::set(__builtin_nanf(""));
    ids[s] = V::set(-1.0f);
  }
  for (int64_t e = 0; e < experts; ++e) {
    const Register value = V::load(values + e * width), id = V::set(static_cast<float>(e));
    auto stays = V::less_equal(value, best[slots - 1]);
#pragma GCC unroll 8
    for (int s = slots - 1; s >= 0; --s) {
      if (s == 0) {
        best[0] = V::select(stays, best[0], value);
        ids[0] = V::select(stays, ids[0], id);
        break;
      }
      const auto before = V::less_equal(value, best[s - 1]);
      best[s] = V::select(stays, best[s], V::select(before, value, best[s - 1]));
      ids[s] = V::select(stays, ids[s], V::select(before, id, ids[s - 1]));
      stays = before;
    }
  }
}

template <class T, int slots>
void route(const RouteLanes& call, int64_t begin, int64_t end, void* sums_of_chunk, void* scratch, int64_t* nan_row) {
  const RouteRows& rows = call.rows;
  const int64_t experts = rows.experts;
  const bool by_softmax = rows.score == RouteScore::softmax;
  float* lanes = static_cast<float*>(scratch);      // logits
  float* scores = lanes + experts * width;          // softmax, or sigmoids
  float* share_sums = scores + experts * width;     // of each lane
  float* sums = static_cast<float*>(sums_of_chunk);
  for (int64_t i = 0; i < experts * width; ++i) share_sums[i] = 0.0f;
  for (int64_t i = 0; i < 2 * experts + 2; ++i) sums[i] = 0.0f;
  Register z_sum = V::zero(), entropy_sum = V::zero();
  for (int64_t token = begin; token < end; token += width) {
    const int64_t count = least(end - token, width);
    load_lanes_of<T>(rows, token, count, lanes);
    int64_t lane = 0;
    if (!all_finite(lanes, experts) && has_nan(lanes, experts, count, &lane)) {
      *nan_row = token + lane;
      return;
    }
    Register top = V::load(lanes);
    for (int64_t e = 1; e < experts; ++e) top = V::max(top, V::load(lanes + e * width));
    Register sum = V::zero(), total = V::zero();
    for (int64_t e = 0; e < experts; ++e) {
      const Register power = exp_of_negative<float>(V::load(lanes + e * width) - top);
      V::store(scores + e * width, power);
      sum = sum + power;
    }
    float logs[width];
    V::store(logs, sum);
    for (int i = 0; i < width; ++i) logs[i] = log_of_positive(logs[i]);
    const Register logsumexp = top + V::load(logs);
    if (by_softmax) {
      const Register scale = V::set(1.0f) / sum;
      for (int64_t e = 0; e < experts; ++e) V::store(scores + e * width, V::load(scores + e * width) * scale);
      total = V::set(1.0f);
    } else {
      for (int64_t e = 0; e < experts; ++e) {
        const Register score = sigmoid<float>(V::load(lanes + e * width));
        V::store(scores + e * width, score);
        total = total + score;
      }
      total = total + V::set(static_cast<float>(smallest_normal));
    }
    Register best[slots], ids[slots];
    best_of<slots>(by_softmax ? lanes : scores, experts, best, ids);

    // Weights: of softmax best are logits, of sigmoids the scores themselves.
    Register weights[slots], chosen = V::zero();
    for (int s = 0; s < slots; ++s) {
      weights[s] = by_softmax ? exp_of_negative<float>(best[s] - top) : best[s];
      chosen = chosen + weights[s];
    }
    const Register divisor = call.normalize ? (by_softmax ? chosen : chosen + V::set(static_cast<float>(smallest_normal))) : by_softmax ? sum : V::set(1.0f);
    float weight_lanes[slots][width], id_lanes[slots][width];
    for (int s = 0; s < slots; ++s) {
      V::store(weight_lanes[s], weights[s] / divisor);
      V::store(id_lanes[s], ids[s]);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int s = 0; s < slots; ++s) {
        const auto id = static_cast<int64_t>(id_lanes[s][i]);
        call.ids[(token + i) * slots + s] = id;
        call.weights[(token + i) * slots + s] = weight_lanes[s][i];
        sums[experts + id] += weight_lanes[s][i];
      }

    // Sums over the tokens; lanes without a token are left out.
    float ones[width];
    for (int i = 0; i < width; ++i) ones[i] = i < count ? 1.0f : 0.0f;
    const Register there = V::load(ones);
    Register entropy = V::zero();
    for (int64_t e = 0; e < experts; ++e) {
      Register share = V::load(scores + e * width), log;
      if (by_softmax) {
        log = V::load(lanes + e * width) - logsumexp;
      } else {
        share = share / total;
        float each[width];
        V::store(each, V::select(V::less_equal(share, V::zero()), V::set(1.0f), share));
        for (int i = 0; i < width; ++i) each[i] = log_of_positive(each[i]);
        log = V::load(each);
      }
      entropy = entropy + V::select(V::less_equal(share, V::zero()), V::zero(), share * log);
      V::store(share_sums + e * width, V::fma(share, there, V::load(share_sums + e * width)));
    }
    entropy_sum = entropy_sum - entropy * there;
    z_sum = V::fma(logsumexp * logsumexp, there, z_sum);
  }
  for (int64_t e = 0; e < experts; ++e) sums[e] = V::sum(V::load(share_sums + e * width));
  sums[2 * experts] = V::sum(z_sum);
  sums[2 * experts + 1] = V::sum(entropy_sum);
}

template <class T, int slots = route_lanes_slots>
void with_slots(const RouteLanes& call, int64_t begin, int64_t end, void* sums, void* scratch, int64_t* nan_row) {
  if constexpr (slots > 1) {
    if (call.slots < slots) return with_slots<T, slots - 1>(call, begin, end, sums, scratch, nan_row);
  }
  route<T, slots>(call, begin, end, sums, scratch, nan_row);
}

}  // namespace

const RoutingLanesKernels routing_lanes_kernels = {{with_slots<float>, with_slots<bfloat16>, with_slots<float16>}};

}  // namespace mmk::MMK_TIER
