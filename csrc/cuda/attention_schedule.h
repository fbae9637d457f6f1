// Which block of the grid computes what of an attention, and where that lies in shared memory: plain numbers, the same on the
// host, on the device, and in the tests' software Hopper. Index glossary: attention_forward.h.
#pragma once
#include "core/hopper_tile.h"

namespace mmk {

// One call, as the kernel is given it.
struct AttentionCall {
  int batch, heads, group;  // `group` heads of q for one of k
  int len_q, len_k;
  bool causal;
  int offset;  // a causal query i sees the keys up to i + offset
  int row_tiles, heads_at_once;
  float scale, sign;  // of the products, in powers of 2: sign * scale, scale > 0 and sign -1, 0 or 1
  void* out;          // [batch, len_q, heads, channels]
  float* lse;         // [batch, heads, len_q]

  MMK_HOST_DEVICE int tiles() const { return row_tiles * heads * batch; }

  // Query i sees the keys [0, keys_of(i)).
  MMK_HOST_DEVICE int keys_of(int i) const {
    if (!causal) return len_k;
    const int keys = i + offset + 1;
    return keys < 0 ? 0 : keys < len_k ? keys : len_k;
  }
};

// Sizes for heads of D channels. The tensor cores of a warp group take 64 rows; what 128 keys leave of its registers for
// accumulators decides how many groups there can be: 65536 registers are 168 a thread for 3 groups, 128 for 4, and
// setmaxnreg gives those that compute what the one that loads does not need.
template <int D>
struct AttentionShape {
  static_assert(D == 64 || D == 128);
  static constexpr int kConsumers = D == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = D == 64 ? 32 : 24;
  static constexpr int kConsumerRegisters = D == 64 ? 160 : 240;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = 128;
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr int kColumns = D / hopper::kTileChannels;  // tiles of 64 channels side by side

  static constexpr int kQueryBytes = kRows * D * 2;
  static constexpr int kKeyBytes = kKeys * D * 2;
  static constexpr int kKeysAt = kQueryBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kKeyBytes;
  static constexpr int kBarriers = 2 + 4 * kStages;
  // Dynamic shared memory begins where it likes, tiles do not.
  static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers + hopper::kSwizzleBytes;
};

// A row tile of one head: queries [row, row + kRows), blocks of keys [0, blocks), of which all queries see all the keys of
// [0, whole).
struct AttentionTile {
  int batch, head, row, blocks, whole;
};

// Tiles in the order in which they are begun. The blocks of the grid work on as many heads at once as have their keys and values
// in the L2 cache together; of these the last rows, which see the most keys where it is causal, come first, so that the tiles
// left for the end are short.
template <class Shape>
MMK_HOST_DEVICE AttentionTile attention_tile(const AttentionCall& call, int index) {
  const int all_heads = call.batch * call.heads;
  const int turn = index / (call.heads_at_once * call.row_tiles);
  const int first_head = turn * call.heads_at_once;
  const int heads = call.heads_at_once < all_heads - first_head ? call.heads_at_once : all_heads - first_head;
  const int within = index - first_head * call.row_tiles;
  const int head = first_head + within % heads;
  AttentionTile tile;
  tile.batch = head / call.heads;
  tile.head = head % call.heads;
  tile.row = (call.row_tiles - 1 - within / heads) * Shape::kRows;
  const int end = tile.row + Shape::kRows < call.len_q ? tile.row + Shape::kRows : call.len_q;
  tile.blocks = (call.keys_of(end - 1) + Shape::kKeys - 1) / Shape::kKeys;
  tile.whole = call.keys_of(tile.row) / Shape::kKeys;
  return tile;
}

// How many neighbouring heads of q have their keys and values in `cache_bytes`; at least one.
inline int attention_heads_at_once(const AttentionCall& call, int channels, std::int64_t cache_bytes) {
  const std::int64_t of_one = static_cast<std::int64_t>(call.len_k) * channels * 4;
  const std::int64_t heads = std::max<std::int64_t>(1, cache_bytes / of_one) * call.group;
  return static_cast<int>(std::min<std::int64_t>(heads, static_cast<std::int64_t>(call.batch) * call.heads));
}

// The factor of the products as a power of 2, split so that a running maximum stays one: of the products as they are where it
// is positive, of their negatives, or of zeros. What float32 cannot hold becomes the nearest that it can.
inline void set_scale(AttentionCall& call, double scale) {
  constexpr double largest = 3.4028234663852886e38, smallest = 1.1754943508222875e-38, log2_e = 1.4426950408889634;
  const double size = (scale < 0 ? -scale : scale) * log2_e;
  call.sign = size < smallest ? 0.0f : scale < 0 ? -1.0f : 1.0f;
  call.scale = size < smallest ? 1.0f : static_cast<float>(std::min(size, largest));
}

}  // namespace mmk
