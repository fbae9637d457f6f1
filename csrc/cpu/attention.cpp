// Attention on the CPU: checks, tensors, threads; the arithmetic is in attention*.tier.cpp.
#include <tuple>

#include "attention_operands.h"
#include "core/cache.h"
#include "core/trace.h"

namespace mmk {
namespace {

constexpr std::int64_t longest = std::int64_t{1} << 40;  // lengths and windows; their sums fit an int64

Number number_of(const Tensor& tensor) { return static_cast<Number>(dtype_index(tensor)); }

// The arguments of a call, checked, and the call made of them.
class Problem {
 public:
  AttentionCall call{};
  bool packed = false;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, const MaybeTensor& mask,
          const MaybeTensor& limits, const MaybeTensor& segment_ids_q, const MaybeTensor& segment_ids_k,
          const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k, const MaybeTensor& value_gate,
          const MaybeTensor& seed, double scale, double softcap, double dropout_p, std::int64_t window_left,
          std::int64_t window_right, bool bottom_right) {
    packed = cu_seqlens_q.has_value();
    check(cu_seqlens_k.has_value() == packed, "cu_seqlens_k", "expected with cu_seqlens_q, or neither");
    const std::int64_t dims = packed ? 3 : 4, length = packed ? 0 : 2;
    dtype_index(q, "q");
    check(q.dim() == dims, "q", "expected ", dims, " dimensions, got ", q.dim());
    check_operand(k, "k", q);
    check_operand(v, "v", q);
    check_contiguous_rows(q, "q");
    check(packed || k.size(0) == q.size(0), "k", "expected the batch of q");
    call.dim = q.size(dims - 1);
    call.value_dim = v.size(dims - 1);
    check(k.size(dims - 1) == call.dim, "k", "expected the channels of q");
    check(call.dim > 0, "q", "expected at least one channel");
    for (std::int64_t dim = 0; dim < dims - 1; ++dim) check(v.size(dim) == k.size(dim), "v", "expected the shape of k");
    call.heads = q.size(1);
    call.kv_heads = k.size(1);
    check(call.kv_heads > 0 && call.heads % call.kv_heads == 0, "k", "expected heads that divide q's ", call.heads);
    call.len_q = q.size(length);
    call.len_k = k.size(length);
    check(call.len_q < longest && call.len_k < longest, "q", "too long");
    call.batch = packed ? read_lengths(*cu_seqlens_q, "cu_seqlens_q", q, cu_q_, call.len_q) : q.size(0);
    if (packed) {
      const std::int64_t batch = read_lengths(*cu_seqlens_k, "cu_seqlens_k", q, cu_k_, call.len_k);
      check(batch == call.batch, "cu_seqlens_k", "expected as many as cu_seqlens_q");
      call.cu_q = cu_q_.data();
      call.cu_k = cu_k_.data();
    }
    call.q = heads_operand(q, packed);
    call.k = heads_operand(k, packed);
    call.v = heads_operand(v, packed);
    call.bias = scores(bias, "bias", q);
    if (bias.has_value()) check_beside(*bias, "bias", q);
    check(!mask.has_value() || mask->scalar_type() == ScalarType::Bool, "mask", "expected bool");
    call.mask = scores(mask, "mask", q);
    call.limits = ids(limits, "limits", q, q.size(length), limits_);
    check(segment_ids_q.has_value() == segment_ids_k.has_value(), "segment_ids_q", "expected with segment_ids_k, or neither");
    call.segments_q = ids(segment_ids_q, "segment_ids_q", q, q.size(length), segments_q_);
    call.segments_k = ids(segment_ids_k, "segment_ids_k", q, k.size(length), segments_k_);
    if (value_gate.has_value()) gate(*value_gate, q, v);
    check(softcap >= 0, "softcap", "expected a positive number");
    check(dropout_p >= 0 && dropout_p < 1, "dropout_p", "expected a probability in [0, 1)");
    check(seed.has_value() || dropout_p == 0, "seed", "expected a number where dropout_p is positive");
    if (seed.has_value()) {
      check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed", "expected one int64 number");
      check(on_one_device(*seed, q), "seed", "expected the device of q");
      call.seed = static_cast<std::uint64_t>(*static_cast<const std::int64_t*>(seed->const_data_ptr()));
    }
    call.scale = scale;
    call.softcap = softcap;
    call.dropout_p = dropout_p;
    call.window_left = std::min(window_left, longest);
    call.window_right = std::min(window_right, longest);
    call.bottom_right = bottom_right;
    if (packed) {
      call.lse_head = 1;
      call.lse_row = call.heads;
    } else {
      call.lse_batch = call.heads * call.len_q;
      call.lse_head = call.len_q;
      call.lse_row = 1;
    }
  }
  Problem(const Problem&) = delete;

  void check_operand(const Tensor& x, const char* name, const Tensor& q) const {
    check(on_one_device(x, q), name, "expected the device of q");
    check(x.scalar_type() == q.scalar_type(), name, "expected the dtype of q");
    check(x.dim() == q.dim(), name, "expected ", q.dim(), " dimensions, got ", x.dim());
    check_contiguous_rows(x, name);
  }

  // Whether what is added to the scores is the same for every batch entry.
  bool shares_addends() const {
    const bool any = call.bias.data != nullptr || call.mask.data != nullptr;
    return any && !packed && call.segments_q.data == nullptr && call.bias.batch == 0 && call.mask.batch == 0;
  }

 private:
  static void check_contiguous_rows(const Tensor& x, const char* name) {
    const std::int64_t last = x.dim() - 1;
    check(x.size(last) <= 1 || x.stride(last) == 1 || x.numel() == 0, name, "the last dimension must be contiguous, got stride ",
          x.stride(last));
  }

  AttentionScores scores(const MaybeTensor& x, const char* name, const Tensor& q) const {
    if (!x.has_value()) return {};
    check(on_one_device(*x, q), name, "expected the device of q");
    check(x->dim() == 4, name, "expected 4 dimensions, got ", x->dim());
    const std::int64_t full[] = {call.batch, call.heads, call.len_q, call.len_k};
    std::int64_t strides[4];
    for (std::int64_t dim = 0; dim < 4; ++dim) {
      const std::int64_t size = x->size(dim);
      check(size == 1 || size == full[dim] || (packed && dim >= 2 && size >= full[dim]), name,
            "expected a shape broadcastable to [B, H, Lq, Lk], got ", size, " instead of ", full[dim]);
      strides[dim] = size == 1 ? 0 : x->stride(dim);
    }
    const void* data = x->const_data_ptr();
    if (data == nullptr) data = this;  // of an empty tensor, never read: null means that there is none
    const bool is_mask = x->scalar_type() == ScalarType::Bool;
    return {data, is_mask ? Number::float32 : number_of(*x), strides[0], strides[1], strides[2], strides[3]};
  }

  AttentionIds ids(const MaybeTensor& x, const char* name, const Tensor& q, std::int64_t length,
                   std::vector<std::int64_t>& to) const {
    if (!x.has_value()) return {};
    check(on_one_device(*x, q), name, "expected the device of q");
    check(is_index(*x), name, "expected int32 or int64");
    const std::int64_t dims = packed ? 1 : 2;
    check(x->dim() == dims && x->size(dims - 1) == length, name, "expected one number a token, ", length);
    check(packed || x->size(0) == 1 || x->size(0) == call.batch, name, "expected [B or 1, L]");
    to = integers_of(*x);
    return {to.data(), !packed && x->size(0) > 1 ? length : 0};
  }

  void gate(const Tensor& x, const Tensor& q, const Tensor& v) {
    check_beside(x, "value_gate", q);
    check(x.dim() == v.dim() - 1, "value_gate", "expected one number a key and head");
    for (std::int64_t dim = 0; dim < x.dim(); ++dim) check(x.size(dim) == v.size(dim), "value_gate", "expected the shape of v");
    call.gate = x.const_data_ptr();
    if (call.gate == nullptr) call.gate = this;
    call.gate_number = number_of(x);
    call.gate_batch = packed ? 0 : x.stride(0);
    call.gate_head = x.stride(1);
    call.gate_row = packed ? x.stride(0) : x.stride(2);
  }

  std::vector<std::int64_t> cu_q_, cu_k_, limits_, segments_q_, segments_k_;
};

Tensor new_lse(const Tensor& q, bool packed) {
  const std::int32_t dtype = q.scalar_type() == ScalarType::Double ? dtype_of(q) : aoti_torch_dtype_float32();
  if (packed) return new_tensor(q, {q.size(0), q.size(1)}, dtype);
  return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, dtype);
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor mask, MaybeTensor limits,
                                     MaybeTensor segment_ids_q, MaybeTensor segment_ids_k, MaybeTensor cu_seqlens_q,
                                     MaybeTensor cu_seqlens_k, MaybeTensor value_gate, MaybeTensor seed, double scale,
                                     double softcap, double dropout_p, std::int64_t window_left, std::int64_t window_right,
                                     bool bottom_right, std::int64_t, std::int64_t) {
  Problem problem(q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, cu_seqlens_q, cu_seqlens_k, value_gate, seed, scale,
                  softcap, dropout_p, window_left, window_right, bottom_right);
  AttentionCall& call = problem.call;
  Tensor out = new_heads(q, q, call.value_dim, problem.packed), lse = new_lse(q, problem.packed);
  const int dtype = dtype_index(q);
  const AttentionChoice choice = choose_attention(call, static_cast<Number>(dtype));
  const AttentionKernels& kernels = *choice.kernels;
  trace("attention", choice.name);
  if (lse.numel() == 0) return {out, lse};
  call.out = heads_operand(out, problem.packed);
  call.lse = lse.mutable_data_ptr();
  if (is_tiny(call, false)) {
    run_attention(kernels.tiny_items(call, nullptr), tiny_work(call), kernels.tiny_bytes(call, nullptr),
                  [&](std::int64_t begin, std::int64_t end, void* scratch) { kernels.tiny(call, nullptr, begin, end, scratch); });
    return {out, lse};
  }
  const std::int64_t items = cut_into_items(call, problem.shares_addends());
  call.stream = exceeds_cache(static_cast<std::int64_t>((2 * q.numel() + 2 * k.numel()) * q.element_size()));
  run_attention(items, attention_work(call.block_rows, call.len_k, call.dim + call.value_dim), kernels.forward_bytes(call),
                [&](std::int64_t begin, std::int64_t end, void* scratch) { kernels.forward(call, begin, end, scratch); });
  return {out, lse};
}

// Sums of dK or dV of every split, added as the tree of row_parts and stored where they belong.
template <class T, class A>
void add_splits(const A* partial, const AttentionBackward& back, std::int64_t channels, const AttentionOperand& to) {
  const AttentionCall& call = back.call;
  const std::int64_t pairs = call.batch * call.kv_heads, stride = pairs * call.len_k * channels;
  parallel_for(pairs * call.len_k, channels * back.splits, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t pair = i / call.len_k, j = i % call.len_k, b = pair / call.kv_heads, h = pair % call.kv_heads;
      const std::int64_t first = call.cu_k ? call.cu_k[b] : 0;
      if (call.cu_k && j >= call.cu_k[b + 1] - first) continue;
      const std::int64_t rows = call.heads / call.kv_heads * (call.cu_q ? call.cu_q[b + 1] - call.cu_q[b] : call.len_q);
      const std::int64_t splits = std::min(back.splits, row_parts(rows));
      T* out = static_cast<T*>(const_cast<void*>(to.data)) + b * to.batch + h * to.head + (first + j) * to.row;
      for (std::int64_t channel = 0; channel < channels; ++channel) {
        A sums[most_parts];
        for (std::int64_t split = 0; split < splits; ++split) sums[split] = partial[split * stride + i * channels + channel];
        for (std::int64_t step = 1; step < splits; step *= 2)
          for (std::int64_t split = 0; split < splits; split += 2 * step) sums[split] += sums[split + step];
        out[channel] = static_cast<T>(sums[0]);
      }
    }
  });
}

void add_splits(const Tensor& partial, const AttentionBackward& back, std::int64_t channels, const AttentionOperand& to, int dtype) {
  const float* floats = static_cast<const float*>(partial.const_data_ptr());
  switch (dtype) {
    case 0:
      return add_splits<float>(floats, back, channels, to);
    case 1:
      return add_splits<torch::headeronly::BFloat16>(floats, back, channels, to);
    case 2:
      return add_splits<torch::headeronly::Half>(floats, back, channels, to);
    default:
      return add_splits<double>(static_cast<const double*>(partial.const_data_ptr()), back, channels, to);
  }
}

// Runs of a pair's parts, where there are too few pairs for many threads. What a pair's rows share has one owner.
std::int64_t splits_of(const AttentionBackward& back, bool needs_bias) {
  const AttentionCall& call = back.call;
  const std::int64_t pairs = std::max<std::int64_t>(1, call.batch * call.kv_heads), group = call.heads / call.kv_heads;
  const bool shared_rows = needs_bias && (call.bias.row == 0 || (call.bias.head == 0 && group > 1));
  if (call.gate || call.normalise > 0 || shared_rows) return 1;
  const std::int64_t parts = row_parts(group * call.len_q);
  std::int64_t splits = 1;
  while (splits < parts && splits * pairs < most_parts) splits *= 2;
  return splits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, MaybeTensor grad_lse, Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor mask, MaybeTensor limits,
    MaybeTensor segment_ids_q, MaybeTensor segment_ids_k, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k,
    MaybeTensor value_gate, MaybeTensor seed, Tensor out, Tensor lse, double scale, double softcap, double dropout_p,
    std::int64_t window_left, std::int64_t window_right, bool bottom_right, std::int64_t, std::int64_t, bool need_bias,
    bool need_gate) {
  Problem problem(q, k, v, bias, mask, limits, segment_ids_q, segment_ids_k, cu_seqlens_q, cu_seqlens_k, value_gate, seed, scale,
                  softcap, dropout_p, window_left, window_right, bottom_right);
  const bool packed = problem.packed;
  AttentionBackward back{};
  back.call = problem.call;
  AttentionCall& call = back.call;
  const int dtype = dtype_index(q);
  const bool is_double = dtype == 3;
  const auto check_output = [&](const Tensor& x, const char* name) {
    problem.check_operand(x, name, q);
    for (std::int64_t dim = 0; dim + 1 < q.dim(); ++dim) check(x.size(dim) == q.size(dim), name, "expected the output's shape");
    check(x.size(x.dim() - 1) == call.value_dim, name, "expected the output's shape");
  };
  check_output(grad_out, "grad_out");
  check_output(out, "out");
  const auto check_sums = [&](const Tensor& x, const char* name) {
    check(on_one_device(x, q), name, "expected the device of q");
    check(x.is_contiguous() && x.dim() == q.dim() - 1 &&
              x.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
          name, "expected contiguous sums of the output's shape without its last dimension");
    for (std::int64_t dim = 0; dim < x.dim(); ++dim) check(x.size(dim) == q.size(dim), name, "expected the output's shape");
  };
  check_sums(lse, "lse");
  if (grad_lse.has_value()) check_sums(*grad_lse, "grad_lse");
  check(!need_bias || bias.has_value(), "need_bias", "expected with bias only");
  check(!need_gate || value_gate.has_value(), "need_gate", "expected with value_gate only");

  call.stream = exceeds_cache(static_cast<std::int64_t>(2 * (3 * q.numel() + k.numel() + v.numel()) * q.element_size()));
  Tensor grad_q = new_heads(q, q, call.dim, packed), grad_k = new_heads(q, k, call.dim, packed);
  Tensor grad_v = new_heads(q, k, call.value_dim, packed);
  const auto small = [&](bool needed, const MaybeTensor& like) {
    const std::int32_t dtype_of_like = like.has_value() ? dtype_of(*like) : dtype_of(q);
    if (!needed) return new_tensor(q, {0}, dtype_of_like);
    std::int64_t sizes[max_dims];
    for (std::int64_t dim = 0; dim < like->dim(); ++dim) sizes[dim] = like->size(dim);
    return new_tensor(q, sizes, like->dim(), dtype_of_like);
  };
  Tensor grad_bias = small(need_bias, bias), grad_gate = small(need_gate, value_gate);
  const AttentionChoice choice = choose_attention(call, static_cast<Number>(dtype));
  const AttentionKernels& kernels = *choice.kernels;
  trace("attention_backward", choice.name);

  call.out = heads_operand(out, packed);
  call.lse = const_cast<void*>(lse.const_data_ptr());
  back.grad_out = heads_operand(grad_out, packed);
  back.grad_lse = grad_lse.has_value() ? grad_lse->const_data_ptr() : nullptr;
  back.grad_q = heads_operand(grad_q, packed);
  back.grad_k = heads_operand(grad_k, packed);
  back.grad_v = heads_operand(grad_v, packed);
  if (is_tiny(call, true) && !(need_bias && grad_bias.numel() > 0)) {
    run_attention(kernels.tiny_items(call, &back), 3 * tiny_work(call), kernels.tiny_bytes(call, &back),
                  [&](std::int64_t begin, std::int64_t end, void* scratch) { kernels.tiny(call, &back, begin, end, scratch); });
    return {grad_q, grad_k, grad_v, grad_bias, grad_gate};
  }
  Sums bias_sums, gate_sums;
  const std::int64_t bias_elements = need_bias ? grad_bias.numel() : 0;
  if (bias_elements > 0) {
    back.group_batch = bias->size(0) == 1;
    back.group_heads = bias->size(1) == 1;
    // A side of one query or key is not broadcast: its sums are as those of any other length.
    const std::int64_t full[] = {2, 2, call.len_q, call.len_k};
    std::int64_t stride = 1, strides[4];
    for (int dim = 3; dim >= 0; --dim) {
      strides[dim] = bias->size(dim) == 1 && full[dim] != 1 ? 0 : stride;
      stride *= bias->size(dim);
    }
    back.bias_chunk = bias_elements;
    back.bias_batch = strides[0];
    back.bias_head = strides[1];
    back.bias_row = strides[2];
    back.bias_col = strides[3];
  }
  back.splits = splits_of(back, bias_elements > 0);
  const std::int64_t tasks = cut_into_tasks(back, bias_elements);
  if (bias_elements > 0) {
    bias_sums.zero(back.chunks, bias_elements, is_double || back.bias_row == 0 || back.bias_col == 0);
    back.grad_bias = bias_sums.data();
  }
  if (need_gate && grad_gate.numel() > 0) {
    gate_sums.zero(1, grad_gate.numel(), is_double);
    back.grad_gate = gate_sums.data();
    back.grad_gate_batch = packed ? 0 : grad_gate.stride(0);
    back.grad_gate_head = grad_gate.stride(1);
    back.grad_gate_row = grad_gate.stride(packed ? 0 : 2);
  }
  std::optional<Tensor> partial_k, partial_v;
  if (back.splits > 1) {
    const std::int64_t rows = back.splits * call.batch * call.kv_heads * call.len_k;
    partial_k = new_tensor(q, {rows, call.dim}, dtype_of(lse));
    partial_v = new_tensor(q, {rows, call.value_dim}, dtype_of(lse));
    back.partial_k = partial_k->mutable_data_ptr();
    back.partial_v = partial_v->mutable_data_ptr();
  }
  const std::int64_t rows = call.heads / call.kv_heads * call.len_q / back.splits;
  run_attention(tasks, 2 * attention_work(rows, call.len_k, call.dim + call.value_dim), kernels.backward_bytes(back),
                [&](std::int64_t begin, std::int64_t end, void* scratch) { kernels.backward(back, begin, end, scratch); });
  if (back.splits > 1) {
    add_splits(*partial_k, back, call.dim, back.grad_k, dtype);
    add_splits(*partial_v, back, call.value_dim, back.grad_v, dtype);
  }
  if (bias_elements > 0) bias_sums.store(grad_bias);
  if (back.grad_gate) gate_sums.store(grad_gate);
  return {grad_q, grad_k, grad_v, grad_bias, grad_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace mmk
