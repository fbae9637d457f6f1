// Routing of tokens to experts: what the entry (routing.cpp) hands to a tier's kernels (routing.tier.cpp).
#pragma once
#include "core/isa.h"
#include "core/storage.h"

#include <stdint.h>

namespace mmk {

// The smallest normal float: keeps a sum of nothing from dividing by zero.
inline constexpr double smallest_normal = 1.17549435082228751e-38;

enum class RouteScore : int { softmax = 0, sigmoid = 1 };

// The rows of logits, and what they are: the probabilities of softmax, or sigmoids.
struct RouteRows {
  const void* logits;
  int64_t stride, experts;
  RouteScore score;
};

// The choice of each token's experts. Accumulators are float, or double of double logits.
struct RouteChoice {
  RouteRows rows;
  const void* selection;  // accumulators added to what is chosen by, or null
  int64_t selection_stride;
  int64_t slots;
  double top_p;            // 1: none
  int64_t groups, top_groups;
  bool top2;               // a group counts by the sum of its best two, else by its best
  int64_t* ids;            // [tokens, slots]
  int64_t* nan_row;        // set to a row with a NaN in it, where there is one
};

// Weights of the chosen experts, and sums over the tokens.
struct RouteWeights {
  RouteRows rows;
  int64_t slots;
  bool normalize;
  const int64_t* ids;
  void* weights;  // [tokens, slots]
};

// The gradient of the logits, the choice constant.
struct RouteGradient {
  RouteRows rows;
  int64_t slots;
  bool normalize;
  const int64_t* ids;
  const void* grad_weights;
  const void* grad_sums;
  void* grad;  // contiguous, of the type of logits
};

struct RoutingKernels {
  // By the type of the logits: float, bfloat16, float16, double. A tier leaves double null: only the generic tier has it.
  // `scratch` is of route_scratch rows of `experts` accumulators, each rounded up to whole vectors.
  void (*choose[4])(const RouteChoice&, int64_t begin, int64_t end, void* scratch);
  // sums: [2 experts + 2] of these tokens: of probabilities, of weights, of logsumexp^2, of entropies.
  void (*weigh[4])(const RouteWeights&, int64_t begin, int64_t end, void* sums, void* scratch);
  void (*gradient[4])(const RouteGradient&, int64_t begin, int64_t end, void* scratch);
  // [tokens, experts] probabilities of softmax, as accumulators.
  void (*probabilities[4])(const RouteRows&, int64_t begin, int64_t end, void* to, void* scratch, int64_t* nan_row);
};
inline constexpr int64_t route_scratch = 5;
inline constexpr int64_t route_width = 16;  // accumulators that every tier's vector divides

// The plain kinds, choice and weights in one pass: float32 accumulators, and at most so many slots and experts.
inline constexpr int route_lanes_slots = 8;
inline constexpr int64_t route_lanes_experts = 256;

struct RouteLanes {
  RouteRows rows;
  int64_t slots;
  bool normalize;
  int64_t* ids;    // [tokens, slots]
  float* weights;  // [tokens, slots]
};

struct RoutingLanesKernels {
  // By the type of the logits: float, bfloat16, float16. sums as of weigh; `scratch`: 3 route_width accumulators an expert.
  void (*route[3])(const RouteLanes&, int64_t begin, int64_t end, void* sums, void* scratch, int64_t* nan_row);
};

MMK_TIERS(RoutingKernels, routing_kernels)
MMK_TIERS(RoutingLanesKernels, routing_lanes_kernels)

}  // namespace mmk
