// Softmax attention on Hopper, forward: the body of one thread block, as in "FlashAttention-3: Fast and Accurate Attention with
// Asynchrony and Low-precision" (2024). Included after core/hopper.h, or after csrc/testing/hopper_in_software.h, in which the
// tests run this very source: it has no instruction of its own.
//
// One warp group, the producer, has tiles of q, k and v loaded into shared memory; two or three, the consumers, compute 64 rows
// each. A consumer issues the products q k^T of the next block of keys and the products p v of the last, and while those run
// makes the softmax of the former; consumers take turns at issuing, so that one's softmax runs beside another's products.
//
// Index glossary: B samples, H heads of q, i query, j key, D channels of q, k and v. A row tile is kRows queries of one head,
// 64 a consumer; a block is kKeys keys; a stage is room for one block. Blocks are taken from the last to the first, so that those
// with hidden keys come first. Thread t of a consumer has the rows r = 16 (t / 32) + t % 32 / 4 and r + 8 ("its two rows"), and
// of these the columns that core/hopper.h says.
#pragma once
#include <math.h>

#include "attention_schedule.h"

namespace mmk {
namespace {

// --- pipeline -----------------------------------------------------------------------------------------------------------
// Where the pieces lie. A barrier "full" is waited for by consumers, "empty" by the producer.
template <class Shape>
struct AttentionShared {
  std::uint32_t base;

  __device__ __forceinline__ explicit AttentionShared(std::uint32_t begin)
      : base((begin + hopper::kSwizzleBytes - 1) / hopper::kSwizzleBytes * hopper::kSwizzleBytes) {}
  __device__ __forceinline__ std::uint32_t queries() const { return base; }
  __device__ __forceinline__ std::uint32_t keys(int stage) const { return base + Shape::kKeysAt + stage * Shape::kKeyBytes; }
  __device__ __forceinline__ std::uint32_t values(int stage) const {
    return base + Shape::kValuesAt + stage * Shape::kKeyBytes;
  }
  __device__ __forceinline__ std::uint32_t barrier(int number) const { return base + Shape::kBarriersAt + 8 * number; }
  __device__ __forceinline__ std::uint32_t queries_full() const { return barrier(0); }
  __device__ __forceinline__ std::uint32_t queries_empty() const { return barrier(1); }
  __device__ __forceinline__ std::uint32_t keys_full(int stage) const { return barrier(2 + 4 * stage); }
  __device__ __forceinline__ std::uint32_t keys_empty(int stage) const { return barrier(3 + 4 * stage); }
  __device__ __forceinline__ std::uint32_t values_full(int stage) const { return barrier(4 + 4 * stage); }
  __device__ __forceinline__ std::uint32_t values_empty(int stage) const { return barrier(5 + 4 * stage); }
};

// Stages go round; with every round the parity of their barriers' phases changes.
template <int stages>
struct AttentionRing {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- producer -----------------------------------------------------------------------------------------------------------
template <class Shape>
__device__ __forceinline__ void load_rows(std::uint32_t to, const hopper::TensorMap* map, std::uint32_t barrier, int rows,
                                          int row, int head, int batch) {
#pragma unroll
  for (int column = 0; column < Shape::kColumns; ++column)
    hopper::tma_load(to + column * rows * hopper::kTileRowBytes, map, barrier, column * hopper::kTileChannels, row, head, batch);
}

// One thread. Keys go ahead of values by a block, in the order in which consumers ask for them.
template <class Shape>
__device__ __forceinline__ void produce(const AttentionCall& call, const hopper::TensorMap* q, const hopper::TensorMap* k,
                                        const hopper::TensorMap* v, const AttentionShared<Shape>& shared, int block,
                                        int grid) {
  AttentionRing<Shape::kStages> of_keys, of_values;
  std::uint32_t parity = 0;
  for (int index = block; index < call.tiles(); index += grid) {
    const AttentionTile tile = attention_tile<Shape>(call, index);
    if (tile.blocks == 0) continue;
    const int head = tile.head / call.group;
    hopper::mbarrier_wait(shared.queries_empty(), parity ^ 1);
    hopper::mbarrier_arrive_expecting(shared.queries_full(), Shape::kQueryBytes);
    load_rows<Shape>(shared.queries(), q, shared.queries_full(), Shape::kRows, tile.row, tile.head, tile.batch);
    parity ^= 1;
    for (int n = tile.blocks - 1; n >= -1; --n) {
      if (n >= 0) {
        const int stage = of_keys.stage;
        hopper::mbarrier_wait(shared.keys_empty(stage), of_keys.parity ^ 1);
        hopper::mbarrier_arrive_expecting(shared.keys_full(stage), Shape::kKeyBytes);
        load_rows<Shape>(shared.keys(stage), k, shared.keys_full(stage), Shape::kKeys, n * Shape::kKeys, head, tile.batch);
        of_keys.advance();
      }
      if (n + 1 < tile.blocks) {
        const int stage = of_values.stage;
        hopper::mbarrier_wait(shared.values_empty(stage), of_values.parity ^ 1);
        hopper::mbarrier_arrive_expecting(shared.values_full(stage), Shape::kKeyBytes);
        load_rows<Shape>(shared.values(stage), v, shared.values_full(stage), Shape::kKeys, (n + 1) * Shape::kKeys, head,
                         tile.batch);
        of_values.advance();
      }
    }
  }
}

// --- consumers: products ------------------------------------------------------------------------------------------------
// Issues scores = q k^T, [64, kKeys].
template <class T, int D, class Shape>
__device__ __forceinline__ void issue_scores(float (&scores)[64], std::uint32_t queries, std::uint32_t keys) {
  hopper::wgmma_fence();
#pragma unroll
  for (int c = 0; c < D; c += 16) {
    const int column = c / hopper::kTileChannels, bytes = c % hopper::kTileChannels * 2;
    const auto matrix = [&](std::uint32_t tile, int rows) {
      return hopper::matrix_descriptor(tile + column * rows * hopper::kTileRowBytes + bytes, hopper::kNoLeading,
                                       hopper::kSwizzleBytes);
    };
    const std::uint64_t a = matrix(queries, Shape::kRows), b = matrix(keys, Shape::kKeys);
    if (c == 0) {
      hopper::wgmma_shared<T, false>(scores, a, b);
    } else {
      hopper::wgmma_shared<T, true>(scores, a, b);
    }
  }
  hopper::wgmma_commit();
}

// Issues out += weights v, [64, D].
template <class T, int D, class Shape>
__device__ __forceinline__ void issue_values(float (&out)[D / 2], const std::uint32_t (&weights)[32], std::uint32_t values) {
  hopper::wgmma_fence();
#pragma unroll
  for (int j = 0; j < Shape::kKeys; j += 16)
    hopper::wgmma_registers<T>(out, weights + j / 4,
                               hopper::matrix_descriptor(values + j * hopper::kTileRowBytes,
                                                         Shape::kKeys * hopper::kTileRowBytes, hopper::kSwizzleBytes));
  hopper::wgmma_commit();
}

// --- consumers: softmax -------------------------------------------------------------------------------------------------
// Of a thread's two rows: the largest score so far, and the sum of exponentials over the thread's own columns.
struct AttentionRows {
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
};

// -inf in place of scores from column seen[row] on, counted from the thread's first column.
__device__ __forceinline__ void hide(float (&scores)[64], const int (&seen)[2]) {
#pragma unroll
  for (int c = 0; c < 16; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * c + i % 2 >= seen[i / 2]) scores[4 * c + i] = -INFINITY;
}

// Exponentials in place of scores, relative to the new largest; factor[row] is what those before must be multiplied with. NaN
// and +inf make a row NaN, as they do in the formula. A product and a difference in one rounding, by name: the file is compiled
// without contraction, and here it is meant, for speed and since scale * (score - top) would cancel no better.
__device__ __forceinline__ void exponentials(float (&scores)[64], AttentionRows& rows, float (&factor)[2], float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = rows.top[r];
#pragma unroll
    for (int c = 0; c < 16; ++c)
      top = hopper::max_or_nan(top, hopper::max_or_nan(scores[4 * c + 2 * r], scores[4 * c + 2 * r + 1]));
    top = hopper::max_or_nan(top, hopper::shuffle_xor(top, 1));
    top = hopper::max_or_nan(top, hopper::shuffle_xor(top, 2));
    // A row that has seen nothing has only -inf, which must become 0 and not the NaN of a difference.
    const float base = top == -INFINITY ? 0.0f : top * scale;
    factor[r] = hopper::exp2_approximate(fmaf(rows.top[r], scale, -base));
    rows.top[r] = top;
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < 16; ++c)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[4 * c + i] = hopper::exp2_approximate(fmaf(scores[4 * c + i], scale, -base));
        total += scores[4 * c + i];
      }
    rows.total[r] = fmaf(rows.total[r], factor[r], total);
  }
}

// What a block's scores go through: their sign, which keys are seen, exponentials.
template <class Shape>
__device__ __forceinline__ void soften(float (&scores)[64], AttentionRows& rows, float (&factor)[2], const AttentionCall& call,
                                       const AttentionTile& tile, int n, int row, int lane) {
  if (call.sign != 1.0f) {
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] *= call.sign;
  }
  if (n >= tile.whole) {
    const int first = n * Shape::kKeys + lane % 4 * 2;
    const int seen[2] = {call.keys_of(row) - first, call.keys_of(row + 8) - first};
    hide(scores, seen);
  }
  exponentials(scores, rows, factor, call.scale);
}

template <int D>
__device__ __forceinline__ void rescale(float (&out)[D / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < D / 2; ++i) out[i] *= factor[i / 2 % 2];
}

template <class T>
__device__ __forceinline__ void round_weights(const float (&scores)[64], std::uint32_t (&weights)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) weights[i] = hopper::pack<T>(scores[2 * i], scores[2 * i + 1]);
}

// --- consumers: results -------------------------------------------------------------------------------------------------
// One step of transposing 4 x 4 words between four neighbouring threads: words whose numbers differ in the bit `step` change
// places with those of the thread whose number does.
template <int step>
__device__ __forceinline__ void swap_quarters(std::uint32_t (&words)[4], int quarter) {
  const bool upper = (quarter & step) != 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int low = step == 1 ? 2 * i : i, high = low + step;
    const std::uint32_t given = hopper::shuffle_xor(upper ? words[low] : words[high], step);
    words[low] = upper ? given : words[low];
    words[high] = upper ? words[high] : given;
  }
}

// out / total and the logarithm. The four threads that share a row swap what they have of 32 columns, so that each has 8 columns
// side by side, and stores them at once.
template <class T, int D>
__device__ __forceinline__ void store_rows(const float (&out)[D / 2], AttentionRows& rows, const AttentionCall& call,
                                           const AttentionTile& tile, int row, int lane) {
  const int quarter = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = rows.total[r];
    total += hopper::shuffle_xor(total, 1);
    total += hopper::shuffle_xor(total, 2);
    const float top = rows.top[r], inverse = top == -INFINITY ? 0.0f : 1.0f / total;
    const int i = row + 8 * r;
    const bool writes = i < call.len_q;
    if (writes && quarter == 0) {
      const float lse = top == -INFINITY || top == INFINITY ? top : fmaf(top * call.scale, 0.693147181f, logf(total));
      call.lse[(static_cast<std::int64_t>(tile.batch) * call.heads + tile.head) * call.len_q + i] = lse;
    }
    std::uint16_t* to = static_cast<std::uint16_t*>(call.out) +
                        ((static_cast<std::int64_t>(tile.batch) * call.len_q + i) * call.heads + tile.head) * D;
#pragma unroll
    for (int c = 0; c < D; c += 32) {
      std::uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int at = c / 2 + 4 * w + 2 * r;
        words[w] = hopper::pack<T>(out[at] * inverse, out[at + 1] * inverse);
      }
      swap_quarters<1>(words, quarter);
      swap_quarters<2>(words, quarter);
      if (writes) hopper::store_16_bytes(to + c + 8 * quarter, words);
    }
  }
}

// --- consumers ----------------------------------------------------------------------------------------------------------
// Consumers issue products in turns, each when the one before has: a barrier of two warp groups stands before each turn. The
// last consumer opens the first turn, and the first closes the last, so that no barrier is left half full.
template <class Shape>
struct AttentionTurns {
  int consumer;

  __device__ __forceinline__ void begin() const {
    if (consumer == Shape::kConsumers - 1) pass();
  }
  __device__ __forceinline__ void take() const { hopper::named_barrier_sync(1 + consumer, 256); }
  __device__ __forceinline__ void pass() const {
    hopper::named_barrier_arrive(consumer == Shape::kConsumers - 1 ? 1 : 2 + consumer, 256);
  }
  __device__ __forceinline__ void end() const {
    if (consumer == 0) take();
  }
};

template <class T, int D, class Shape>
__device__ __forceinline__ void consume(const AttentionCall& call, const AttentionShared<Shape>& shared, int block, int grid) {
  // The same in all threads of a warp, and known to be: addresses of matrices then stay out of the threads' registers.
  const int warp = hopper::of_first_lane((hopper::thread_index() - 128) / 32);
  const int consumer = warp / 4, lane = hopper::thread_index() % 32;
  const AttentionTurns<Shape> turns{consumer};
  const std::uint32_t queries = shared.queries() + consumer * 64 * hopper::kTileRowBytes;
  AttentionRing<Shape::kStages> of_keys, of_values;
  std::uint32_t parity = 0;
  // One arrival a warp says that it has read: a barrier "empty" counts warps.
  const auto release = [lane](std::uint32_t barrier) {
    if (lane == 0) hopper::mbarrier_arrive(barrier);
  };

  turns.begin();
  for (int index = block; index < call.tiles(); index += grid) {
    const AttentionTile tile = attention_tile<Shape>(call, index);
    const int row = tile.row + 16 * warp + lane / 4;
    AttentionRows rows;
    float out[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    if (tile.blocks > 0) {
      float factor[2];
      std::uint32_t weights[32];
      {
        float scores[64];
        hopper::mbarrier_wait(shared.queries_full(), parity);
        hopper::mbarrier_wait(shared.keys_full(of_keys.stage), of_keys.parity);
        issue_scores<T, D, Shape>(scores, queries, shared.keys(of_keys.stage));
        hopper::wgmma_wait<0>();
        hopper::hold_registers(scores);
        release(shared.keys_empty(of_keys.stage));
        of_keys.advance();
        soften<Shape>(scores, rows, factor, call, tile, tile.blocks - 1, row, lane);
        round_weights<T>(scores, weights);
      }
#pragma unroll 1
      for (int n = tile.blocks - 2; n >= 0; --n) {
        float scores[64];
        hopper::mbarrier_wait(shared.keys_full(of_keys.stage), of_keys.parity);
        turns.take();
        hopper::hold_registers(out);
        hopper::hold_registers(weights);
        issue_scores<T, D, Shape>(scores, queries, shared.keys(of_keys.stage));
        hopper::mbarrier_wait(shared.values_full(of_values.stage), of_values.parity);
        issue_values<T, D, Shape>(out, weights, shared.values(of_values.stage));
        turns.pass();
        hopper::wgmma_wait<1>();
        hopper::hold_registers(scores);
        release(shared.keys_empty(of_keys.stage));
        of_keys.advance();
        soften<Shape>(scores, rows, factor, call, tile, n, row, lane);
        hopper::wgmma_wait<0>();
        hopper::hold_registers(out);
        hopper::hold_registers(weights);
        release(shared.values_empty(of_values.stage));
        of_values.advance();
        round_weights<T>(scores, weights);
        rescale<D>(out, factor);
      }
      release(shared.queries_empty());
      parity ^= 1;
      hopper::mbarrier_wait(shared.values_full(of_values.stage), of_values.parity);
      hopper::hold_registers(out);
      hopper::hold_registers(weights);
      issue_values<T, D, Shape>(out, weights, shared.values(of_values.stage));
      hopper::wgmma_wait<0>();
      hopper::hold_registers(out);
      hopper::hold_registers(weights);
      release(shared.values_empty(of_values.stage));
      of_values.advance();
    }
    store_rows<T, D>(out, rows, call, tile, row, lane);
  }
  turns.end();
}

// --- the thread block ---------------------------------------------------------------------------------------------------
// Block `block` of `grid`; dynamic shared memory begins at `begin`.
template <class T, int D>
__device__ __forceinline__ void attention_forward(const AttentionCall& call, const hopper::TensorMap* q,
                                                  const hopper::TensorMap* k, const hopper::TensorMap* v, std::uint32_t begin,
                                                  int block, int grid) {
  using Shape = AttentionShape<D>;
  const AttentionShared<Shape> shared(begin);
  if (hopper::thread_index() == 0) {
    for (const hopper::TensorMap* map : {q, k, v}) hopper::tma_prefetch(map);
    constexpr int warps = 4 * Shape::kConsumers;
    hopper::mbarrier_init(shared.queries_full(), 1);
    hopper::mbarrier_init(shared.queries_empty(), warps);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      hopper::mbarrier_init(shared.keys_full(stage), 1);
      hopper::mbarrier_init(shared.keys_empty(stage), warps);
      hopper::mbarrier_init(shared.values_full(stage), 1);
      hopper::mbarrier_init(shared.values_empty(stage), warps);
    }
    hopper::mbarrier_init_fence();
  }
  hopper::sync_threads();
  if (hopper::of_first_lane(hopper::thread_index() / 128) == 0) {
    hopper::decrease_registers<Shape::kProducerRegisters>();
    if (hopper::thread_index() == 0) produce<Shape>(call, q, k, v, shared, block, grid);
  } else {
    hopper::increase_registers<Shape::kConsumerRegisters>();
    consume<T, D, Shape>(call, shared, block, grid);
  }
}

}  // namespace
}  // namespace mmk
