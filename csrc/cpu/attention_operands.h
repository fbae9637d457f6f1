// What the entries of attention share: operands of a call, from tensors; and how a backward pass is cut into tasks.
#pragma once
#include <vector>

#include "../common/arguments.h"
#include "attention.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace mmk {

inline AttentionOperand heads_operand(const Tensor& x, bool packed) {
  if (packed) return {x.const_data_ptr(), 0, x.stride(1), x.stride(0), nullptr, 0};
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), nullptr, 0};
}

inline bool is_index(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long;
}

// A tensor of integers of one or two dimensions as contiguous int64.
inline std::vector<std::int64_t> integers_of(const Tensor& tensor) {
  const std::int64_t rows = tensor.dim() == 2 ? tensor.size(0) : 1, cols = tensor.size(tensor.dim() - 1);
  const std::int64_t row = tensor.dim() == 2 ? tensor.stride(0) : 0, col = tensor.stride(tensor.dim() - 1);
  std::vector<std::int64_t> result(static_cast<std::size_t>(rows * cols) + 1);  // never empty: null means none
  const auto read = [&](const auto* from) {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < cols; ++j) result[static_cast<std::size_t>(i * cols + j)] = from[i * row + j * col];
  };
  if (tensor.scalar_type() == ScalarType::Int) {
    read(static_cast<const std::int32_t*>(tensor.const_data_ptr()));
  } else {
    read(static_cast<const std::int64_t*>(tensor.const_data_ptr()));
  }
  return result;
}

// Answers the number of sequences; `longest_one` tokens come in and the length of the longest goes out.
inline std::int64_t read_lengths(const Tensor& cu, const char* name, const Tensor& q, std::vector<std::int64_t>& to,
                                 std::int64_t& longest_one) {
  check(on_one_device(cu, q), name, "expected the device of q");
  check(is_index(cu) && cu.dim() == 1 && cu.size(0) >= 1, name, "expected int32 or int64 [B + 1]");
  to = integers_of(cu);
  const std::size_t batch = static_cast<std::size_t>(cu.size(0) - 1);
  check(to[0] == 0, name, "expected to begin with 0, got ", to[0]);
  std::int64_t longest = 0;
  for (std::size_t i = 0; i < batch; ++i) {
    check(to[i + 1] >= to[i], name, "expected to ascend, got ", to[i], " before ", to[i + 1]);
    longest = std::max(longest, to[i + 1] - to[i]);
  }
  check(to[batch] == longest_one, name, "expected to end with the number of tokens, ", longest_one, ", got ", to[batch]);
  longest_one = longest;
  return static_cast<std::int64_t>(batch);
}

// A new [B, H, L, D] that lies in memory as [B, L, H, D]; packed [T, H, D].
inline Tensor new_heads(const Tensor& like, const Tensor& shape, std::int64_t channels, bool packed) {
  if (packed) return new_tensor(like, {shape.size(0), shape.size(1), channels}, dtype_of(like));
  const std::int64_t sizes[] = {shape.size(0), shape.size(1), shape.size(2), channels};
  const std::int64_t head = std::max<std::int64_t>(1, channels), row = head * std::max<std::int64_t>(1, sizes[1]);
  const std::int64_t strides[] = {row * std::max<std::int64_t>(1, sizes[2]), head, row, 1};
  return new_strided(like, sizes, strides, 4, dtype_of(like));
}

// Runs the items or tasks of a call; `work` is the cost of one in elements that are moved.
template <class F>
void run_attention(std::int64_t items, std::int64_t work, std::int64_t bytes, const F& kernel) {
  parallel_for(items, work, [&](std::int64_t begin, std::int64_t end) {
    kernel(begin, end, scratch(ScratchUse::attention, static_cast<std::size_t>(bytes)));
    scratch_done(ScratchUse::attention);
  });
}

// The cost of `rows` queries against `keys` keys, in the elements of parallel.h: a vector of products takes as long as
// moving one or two.
inline std::int64_t attention_work(std::int64_t rows, std::int64_t keys, std::int64_t channels) {
  return std::max<std::int64_t>(1, rows * keys * (channels + 16) / 16);
}

// The same of an item of tiny sequences, a vector of batch entries.
inline std::int64_t tiny_work(const AttentionCall& call) {
  return 8 * attention_work(call.len_q, call.len_k, call.dim + call.value_dim);
}

// How rows and batch entries of a forward call become items (attention.h).
inline std::int64_t cut_into_items(AttentionCall& call, bool shared_addends) {
  const std::int64_t rows = call.heads / call.kv_heads * call.len_q;
  call.block_rows = rows <= 384 ? std::max<std::int64_t>(rows, 1) : 256;
  call.blocks = ceil_div(rows, call.block_rows);
  // What all batch entries share is laid out once, for all heads if that stays in the second-level cache: their rows lie side
  // by side in memory.
  constexpr std::int64_t kept_elements = 1 << 17;
  call.keeps_addends = shared_addends && call.batch > 1;
  call.batch_inside = call.keeps_addends && (call.blocks > 1 || rows * call.len_k * call.kv_heads > kept_elements);
  return call.batch * call.kv_heads * call.blocks;
}

// Groups and chunks of a backward call whose bias gradient is summed over the batch, over the heads or over both. There are
// at least 16 tasks where sizes allow it, and no more sums than 256 MB hold.
inline std::int64_t cut_into_tasks(AttentionBackward& back, std::int64_t bias_elements) {
  constexpr std::int64_t wanted = 16, most_elements = std::int64_t{1} << 26, kept_elements = 1 << 16;
  const AttentionCall& call = back.call;
  // A small bias's sums stay in the cache for all heads, whose rows lie side by side in memory.
  if (back.group_batch && bias_elements <= kept_elements && call.batch >= wanted) back.group_heads = true;
  const std::int64_t members = (back.group_batch ? call.batch : 1) * (back.group_heads ? call.kv_heads : 1);
  const std::int64_t groups = call.batch * call.kv_heads / std::max<std::int64_t>(1, members);
  back.chunks = std::clamp<std::int64_t>(ceil_div(wanted, most(1, groups)), 1, most(1, members));
  while (back.chunks > 1 && back.chunks * bias_elements > most_elements) back.chunks /= 2;
  return groups * back.chunks * back.splits;
}

// torch's half types round from float.
template <class T, class A>
T narrowed(A value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// The gradient of a bias or of what else many tasks add to: zeroed sums for every chunk, and their sum in a result's dtype.
class Sums {
 public:
  void zero(std::int64_t chunks, std::int64_t elements, bool in_double) {
    chunks_ = chunks;
    elements_ = elements;
    if (in_double) {
      doubles_.assign(static_cast<std::size_t>(chunks * elements), 0.0);
    } else {
      floats_.assign(static_cast<std::size_t>(chunks * elements), 0.0f);
    }
  }
  void* data() { return doubles_.empty() ? static_cast<void*>(floats_.data()) : doubles_.data(); }
  void store(const Tensor& to) const {
    if (elements_ == 0) return;
    if (doubles_.empty()) {
      store_from(floats_.data(), to);
    } else {
      store_from(doubles_.data(), to);
    }
  }

 private:
  template <class A>
  void store_from(const A* sums, const Tensor& to) const {
    switch (to.scalar_type()) {
      case ScalarType::Double:
        return store_as<double>(sums, to);
      case ScalarType::Float:
        return store_as<float>(sums, to);
      case ScalarType::BFloat16:
        return store_as<torch::headeronly::BFloat16>(sums, to);
      default:
        return store_as<torch::headeronly::Half>(sums, to);
    }
  }

  template <class T, class A>
  void store_as(const A* sums, const Tensor& to) const {
    T* out = static_cast<T*>(to.mutable_data_ptr());
    parallel_for(elements_, chunks_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        A sum = sums[i];
        for (std::int64_t chunk = 1; chunk < chunks_; ++chunk) sum += sums[chunk * elements_ + i];
        out[i] = narrowed<T>(sum);
      }
    });
  }

  std::int64_t chunks_ = 0, elements_ = 0;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

}  // namespace mmk
