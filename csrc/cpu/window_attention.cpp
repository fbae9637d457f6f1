// Attention in the shifted windows of a grid, on the CPU. Windows are batch entries whose tokens a table finds in the grid, so
// that shift, padding, partition and their reverses are addresses, and no token is moved.
#include <tuple>

#include "../common/matrix.h"
#include "attention_operands.h"
#include "core/cache.h"
#include "core/trace.h"

namespace mmk {
namespace {

using Ints = std::vector<std::int64_t>;

constexpr int most_axes = 3;

// What a call's numbers say, checked; the tables of its windows.
class Problem {
 public:
  AttentionCall call{};
  std::int64_t samples = 0, channels = 0, tokens = 1, windows = 1, window_tokens = 1, table_rows = 1;

  Problem(const Tensor& qkv, const MaybeTensor& table, const MaybeTensor& pad_value, const MaybeTensor& head_scale,
          const Ints& window, const Ints& shift, std::int64_t num_heads, double scale, const Ints& bias_window, bool pad_first, double norm_eps, double mask_value)
      : rows(qkv, "qkv") {
    const int dtype = dtype_index(qkv, "qkv");
    axes_ = static_cast<int>(qkv.dim()) - 2;
    check(axes_ == 2 || axes_ == 3, "qkv", "expected [B, *grid, 3*C] with a grid of 2 or 3 axes");
    const auto as_many = [&](const Ints& values, const char* name) {
      check(static_cast<int>(values.size()) == axes_, name, "expected one number an axis of the grid, ", axes_);
    };
    as_many(window, "window");
    as_many(shift, "shift");
    as_many(bias_window, "bias_window");
    check(num_heads > 0 && rows.cols > 0 && rows.cols % (3 * num_heads) == 0, "num_heads", "expected to divide the channels");
    channels = rows.cols / 3;
    samples = qkv.size(0);
    std::int64_t bias_tokens = 1;
    for (int axis = 0; axis < axes_; ++axis) {
      check(window[axis] > 0 && window[axis] < 1 << 20, "window", "expected positive sizes");
      check(shift[axis] >= 0 && shift[axis] < window[axis], "shift", "expected from 0 to less than the window");
      check(bias_window[axis] > 0 && bias_window[axis] < 1 << 20, "bias_window", "expected positive sizes");
      grid_[axis] = qkv.size(axis + 1);
      window_[axis] = window[axis];
      shift_[axis] = shift[axis];
      bias_window_[axis] = bias_window[axis];
      counts_[axis] = (grid_[axis] + window_[axis] - 1) / window_[axis];
      tokens *= grid_[axis];
      windows *= counts_[axis];
      window_tokens *= window_[axis];
      bias_tokens *= bias_window_[axis];
      table_rows *= 2 * bias_window_[axis] - 1;
      shifted_ = shifted_ || shift_[axis] > 0;
    }
    check(tokens < std::int64_t{1} << 31, "qkv", "a grid of more than 2^31 tokens");
    if (table.has_value()) {
      check_beside(*table, "rel_bias_table", qkv);
      check(table->dim() == 2 && table->size(0) == table_rows && table->size(1) == num_heads, "rel_bias_table", "expected [",
            table_rows, ", ", num_heads, "]");
      check(window_tokens <= bias_tokens, "bias_window", "expected as many tokens as the window has, ", window_tokens);
    }
    const std::int64_t dim = channels / num_heads;
    call.heads = call.kv_heads = num_heads;
    call.len_q = call.len_k = window_tokens;
    call.dim = call.value_dim = dim;
    call.batch = samples * windows;
    pad_.assign(static_cast<std::size_t>(3 * channels) * qkv.element_size(), 0);
    if (pad_value.has_value()) {
      check_beside(*pad_value, "pad_value", qkv);
      check(pad_value->dim() == 1 && pad_value->size(0) == 3 * channels, "pad_value", "expected [", 3 * channels, "]");
      copy_pad(*pad_value, dtype);
    }
    call.q = part(qkv.const_data_ptr(), qkv.element_size(), 0);
    call.k = part(qkv.const_data_ptr(), qkv.element_size(), 1);
    call.v = part(qkv.const_data_ptr(), qkv.element_size(), 2);
    call.scale = scale;
    if (head_scale.has_value()) {
      check(on_one_device(*head_scale, qkv), "head_scale", "expected the device of qkv");
      check(head_scale->dim() == 1 && head_scale->size(0) == num_heads && head_scale->is_contiguous() &&
                head_scale->scalar_type() == (dtype == 3 ? ScalarType::Double : ScalarType::Float),
            "head_scale", "expected contiguous float32 [", num_heads, "]");
      call.head_scale = head_scale->const_data_ptr();
    }
    call.normalise = norm_eps;
    call.window_left = call.window_right = -1;
    call.lse_batch = num_heads * window_tokens;
    call.lse_head = window_tokens;
    call.lse_row = 1;
    find_tokens(pad_first);
    call.windows = {windows, tokens_.data(), shifted_ ? regions_.data() : nullptr, mask_value};
    if (table.has_value()) spread_table(*table, dtype);
  }
  Problem(const Problem&) = delete;

  // The queries, keys or values of every head, in a tensor like qkv whose elements begin at `data`.
  AttentionOperand part(const void* data, std::size_t element, int which) const {
    const std::int64_t offset = which * channels;
    const char* first = static_cast<const char*>(data);
    return {first == nullptr ? nullptr : first + static_cast<std::size_t>(offset) * element,
            tokens * rows.stride,
            call.dim,
            rows.stride,
            pad_.data() + static_cast<std::size_t>(offset) * element,
            call.dim};
  }

  // Tokens of [B, *grid, C], contiguous, by heads.
  AttentionOperand output(const Tensor& tensor) const {
    return {tensor.const_data_ptr(), tokens * channels, call.dim, channels, pad_.data(), 0};
  }

  // Row of the table for each pair of a window's tokens, [n, n]: the tokens are counted as those of `bias_window`, in raster
  // order, which is where they are unless the window has been clipped.
  std::vector<std::int32_t> relative_positions() const {
    std::int64_t strides[most_axes], at[most_axes];
    std::int64_t stride = 1;
    for (int axis = axes_ - 1; axis >= 0; --axis) {
      strides[axis] = stride;
      stride *= 2 * bias_window_[axis] - 1;
    }
    // index(i, j) = place(i) - place(j) + middle
    std::vector<std::int64_t> places(static_cast<std::size_t>(window_tokens));
    std::int64_t middle = 0;
    for (int axis = 0; axis < axes_; ++axis) middle += (bias_window_[axis] - 1) * strides[axis];
    for (std::int64_t i = 0; i < window_tokens; ++i) {
      std::int64_t rest = i, place = 0;
      for (int axis = axes_ - 1; axis >= 0; --axis) {
        at[axis] = rest % bias_window_[axis];
        rest /= bias_window_[axis];
        place += at[axis] * strides[axis];
      }
      places[static_cast<std::size_t>(i)] = place;
    }
    std::vector<std::int32_t> result(static_cast<std::size_t>(window_tokens * window_tokens));
    for (std::int64_t i = 0; i < window_tokens; ++i)
      for (std::int64_t j = 0; j < window_tokens; ++j)
        result[static_cast<std::size_t>(i * window_tokens + j)] =
            static_cast<std::int32_t>(places[static_cast<std::size_t>(i)] - places[static_cast<std::size_t>(j)] + middle);
    return result;
  }

  const Rows rows;

 private:
  void copy_pad(const Tensor& from, int dtype) {
    const std::int64_t stride = from.stride(0);
    const auto copy = [&](const auto* source, auto* to) {
      using T = std::remove_reference_t<decltype(*to)>;
      for (std::int64_t i = 0; i < 3 * channels; ++i) to[i] = narrowed<T>(static_cast<double>(source[i * stride]));
    };
    const auto copy_to = [&](const auto* source) {
      switch (dtype) {
        case 0:
          return copy(source, reinterpret_cast<float*>(pad_.data()));
        case 1:
          return copy(source, reinterpret_cast<torch::headeronly::BFloat16*>(pad_.data()));
        case 2:
          return copy(source, reinterpret_cast<torch::headeronly::Half*>(pad_.data()));
        default:
          return copy(source, reinterpret_cast<double*>(pad_.data()));
      }
    };
    const void* data = from.const_data_ptr();
    switch (from.scalar_type()) {
      case ScalarType::Float:
        return copy_to(static_cast<const float*>(data));
      case ScalarType::BFloat16:
        return copy_to(static_cast<const torch::headeronly::BFloat16*>(data));
      case ScalarType::Half:
        return copy_to(static_cast<const torch::headeronly::Half*>(data));
      default:
        return copy_to(static_cast<const double*>(data));
    }
  }

  void find_tokens(bool pad_first) {
    tokens_.resize(static_cast<std::size_t>(windows * window_tokens) + 1);  // never empty: null means no windows
    if (shifted_) regions_.resize(static_cast<std::size_t>(windows * window_tokens) + 1);
    std::int64_t at = 0;
    for (std::int64_t w = 0; w < windows; ++w)
      for (std::int64_t i = 0; i < window_tokens; ++i, ++at) {
        std::int64_t window = w, inside = i, token = 0, stride = 1;
        int region = 0, region_stride = 1;
        bool exists = true;
        for (int axis = axes_ - 1; axis >= 0; --axis) {
          const std::int64_t padded = counts_[axis] * window_[axis];
          const std::int64_t place = window % counts_[axis] * window_[axis] + inside % window_[axis];
          window /= counts_[axis];
          inside /= window_[axis];
          std::int64_t source = place + shift_[axis];
          if (pad_first) {
            source %= padded;
          } else if (place < grid_[axis]) {
            source %= grid_[axis];
          } else {
            source = grid_[axis];
          }
          exists = exists && source < grid_[axis];
          token += source * stride;
          stride *= grid_[axis];
          if (shift_[axis] > 0) {
            const int part = place < padded - window_[axis] ? 0 : place < padded - shift_[axis] ? 1 : 2;
            region += part * region_stride;
            region_stride *= 3;
          }
        }
        tokens_[static_cast<std::size_t>(at)] = exists ? static_cast<std::int32_t>(token) : -1;
        if (shifted_) regions_[static_cast<std::size_t>(at)] = static_cast<std::uint8_t>(region);
      }
  }

  void spread_table(const Tensor& table, int dtype) {
    const std::vector<std::int32_t> index = relative_positions();
    const std::int64_t pairs = window_tokens * window_tokens, row = table.stride(0), col = table.stride(1);
    const auto spread = [&](const auto* from, auto& to) {
      to.resize(static_cast<std::size_t>(call.heads * pairs) + 1);
      for (std::int64_t h = 0; h < call.heads; ++h)
        for (std::int64_t i = 0; i < pairs; ++i)
          to[static_cast<std::size_t>(h * pairs + i)] =
              static_cast<std::remove_reference_t<decltype(to[0])>>(from[index[static_cast<std::size_t>(i)] * row + h * col]);
      call.bias.data = to.data();
    };
    const void* data = table.const_data_ptr();
    switch (table.scalar_type()) {
      case ScalarType::Float:
        spread(static_cast<const float*>(data), floats_);
        break;
      case ScalarType::BFloat16:
        spread(static_cast<const torch::headeronly::BFloat16*>(data), floats_);
        break;
      case ScalarType::Half:
        spread(static_cast<const torch::headeronly::Half*>(data), floats_);
        break;
      default:
        spread(static_cast<const double*>(data), doubles_);
    }
    call.bias.number = dtype == 3 ? Number::float64 : Number::float32;
    call.bias.head = pairs;
    call.bias.row = window_tokens;
    call.bias.col = 1;
  }

  int axes_ = 0;
  bool shifted_ = false;
  std::int64_t grid_[most_axes]{}, window_[most_axes]{}, shift_[most_axes]{}, bias_window_[most_axes]{}, counts_[most_axes]{};
  std::vector<char> pad_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::uint8_t> regions_;
  std::vector<float> floats_;
  std::vector<double> doubles_;
};

std::int32_t sums_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? dtype_of(x) : aoti_torch_dtype_float32();
}

Tensor new_tokens(const Tensor& qkv, std::int64_t channels) {
  std::int64_t sizes[max_dims];
  const std::int64_t dims = qkv.dim();
  for (std::int64_t dim = 0; dim + 1 < dims; ++dim) sizes[dim] = qkv.size(dim);
  sizes[dims - 1] = channels;
  return new_tensor(qkv, sizes, dims, dtype_of(qkv));
}

std::tuple<Tensor, Tensor> window_attention(Tensor qkv, MaybeTensor rel_bias_table, MaybeTensor pad_value, MaybeTensor head_scale,
                                            Ints window, Ints shift, std::int64_t num_heads, double scale, Ints bias_window,
                                            bool pad_first, double norm_eps, double mask_value) {
  Problem problem(qkv, rel_bias_table, pad_value, head_scale, window, shift, num_heads, scale, bias_window, pad_first, norm_eps,
                  mask_value);
  AttentionCall& call = problem.call;
  Tensor out = new_tokens(qkv, problem.channels);
  Tensor lse = new_tensor(qkv, {call.batch, num_heads, problem.window_tokens}, sums_dtype(qkv));
  const int dtype = dtype_index(qkv);
  const AttentionChoice choice = choose_attention(call, static_cast<Number>(dtype));
  const AttentionKernels& kernels = *choice.kernels;
  trace("window_attention", choice.name);
  if (lse.numel() == 0) return {out, lse};
  call.out = problem.output(out);
  call.lse = lse.mutable_data_ptr();
  const std::int64_t items = cut_into_items(call, call.bias.data != nullptr);
  call.stream = exceeds_cache(static_cast<std::int64_t>((qkv.numel() + out.numel()) * qkv.element_size()));
  run_attention(items, attention_work(call.block_rows, call.len_k, 2 * call.dim), kernels.forward_bytes(call),
                [&](std::int64_t begin, std::int64_t end, void* scratch) { kernels.forward(call, begin, end, scratch); });
  return {out, lse};
}

// A one-dimensional or contiguous result from sums in double.
void store_doubles(const std::vector<double>& from, const Tensor& to) {
  const auto store = [&](auto* out) {
    using T = std::remove_reference_t<decltype(*out)>;
    for (std::size_t i = 0; i < from.size(); ++i) out[i] = narrowed<T>(from[i]);
  };
  void* data = to.mutable_data_ptr();
  switch (to.scalar_type()) {
    case ScalarType::Double:
      return store(static_cast<double*>(data));
    case ScalarType::Float:
      return store(static_cast<float*>(data));
    case ScalarType::BFloat16:
      return store(static_cast<torch::headeronly::BFloat16*>(data));
    default:
      return store(static_cast<torch::headeronly::Half*>(data));
  }
}

// The gradient of the table [rows, H]: each head's sums over pairs of tokens, added row by row of the window.
template <class A>
std::vector<double> fold_into_table(const A* sums, const Problem& problem, std::int64_t chunks) {
  const std::vector<std::int32_t> index = problem.relative_positions();
  const std::int64_t heads = problem.call.heads, pairs = problem.window_tokens * problem.window_tokens;
  std::vector<double> result(static_cast<std::size_t>(problem.table_rows * heads), 0.0);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
    parallel_for(heads, pairs, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t h = begin; h < end; ++h) {
        const A* from = sums + (chunk * heads + h) * pairs;
        for (std::int64_t i = 0; i < pairs; ++i)
          result[static_cast<std::size_t>(index[static_cast<std::size_t>(i)] * heads + h)] += static_cast<double>(from[i]);
      }
    });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    Tensor grad_out, Tensor qkv, MaybeTensor rel_bias_table, MaybeTensor pad_value, MaybeTensor head_scale, Tensor out, Tensor lse,
    Ints window, Ints shift, std::int64_t num_heads, double scale, Ints bias_window, bool pad_first, double norm_eps,
    double mask_value, bool need_table, bool need_pad, bool need_scale) {
  Problem problem(qkv, rel_bias_table, pad_value, head_scale, window, shift, num_heads, scale, bias_window, pad_first, norm_eps,
                  mask_value);
  AttentionBackward back{};
  back.call = problem.call;
  AttentionCall& call = back.call;
  const int dtype = dtype_index(qkv);
  const bool is_double = dtype == 3;
  const auto check_output = [&](const Tensor& x, const char* name) {
    check(on_one_device(x, qkv), name, "expected the device of qkv");
    bool fits = x.is_contiguous() && x.scalar_type() == qkv.scalar_type() && x.dim() == qkv.dim();
    for (std::int64_t dim = 0; fits && dim + 1 < x.dim(); ++dim) fits = x.size(dim) == qkv.size(dim);
    check(fits && x.size(x.dim() - 1) == problem.channels, name, "expected contiguous [B, *grid, C] in the dtype of qkv");
  };
  check_output(grad_out, "grad_out");
  check_output(out, "out");
  check(on_one_device(lse, qkv) && lse.is_contiguous() && lse.numel() == call.batch * num_heads * problem.window_tokens &&
            lse.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
        "lse", "expected the sums of the forward call");
  check(!need_table || rel_bias_table.has_value(), "need_table", "expected with rel_bias_table only");
  check(!need_pad || pad_value.has_value(), "need_pad", "expected with pad_value only");
  check(!need_scale || head_scale.has_value(), "need_scale", "expected with head_scale only");
  const auto small = [&](bool needed, const MaybeTensor& like) {
    const std::int32_t dtype_of_like = like.has_value() ? dtype_of(*like) : dtype_of(qkv);
    if (!needed) return new_tensor(qkv, {0}, dtype_of_like);
    if (like->dim() == 1) return new_tensor(qkv, {like->size(0)}, dtype_of_like);
    return new_tensor(qkv, {like->size(0), like->size(1)}, dtype_of_like);
  };
  call.stream = exceeds_cache(static_cast<std::int64_t>((2 * qkv.numel() + 2 * out.numel()) * qkv.element_size()));
  Tensor grad_qkv = new_tokens(qkv, 3 * problem.channels);
  Tensor grad_table = small(need_table, rel_bias_table), grad_pad = small(need_pad, pad_value);
  Tensor grad_scale = small(need_scale, head_scale);
  const AttentionChoice choice = choose_attention(call, static_cast<Number>(dtype));
  const AttentionKernels& kernels = *choice.kernels;
  trace("window_attention_backward", choice.name);

  call.out = problem.output(out);
  call.lse = const_cast<void*>(lse.const_data_ptr());
  back.grad_out = problem.output(grad_out);
  const auto part = [&](int which) {
    AttentionOperand operand = problem.part(grad_qkv.const_data_ptr(), qkv.element_size(), which);
    operand.row = 3 * problem.channels;
    operand.batch = problem.tokens * operand.row;
    return operand;
  };
  back.grad_q = part(0);
  back.grad_k = part(1);
  back.grad_v = part(2);
  const std::int64_t pairs = problem.window_tokens * problem.window_tokens;
  const std::int64_t bias_elements = need_table ? num_heads * pairs : 0;
  back.group_batch = need_table;
  back.splits = 1;
  const std::int64_t tasks = cut_into_tasks(back, bias_elements);
  Sums sums, pads;
  std::vector<double> scales;
  if (need_table) {
    sums.zero(back.chunks, bias_elements, is_double);
    back.grad_bias = sums.data();
    back.bias_chunk = bias_elements;
    back.bias_head = pairs;
    back.bias_row = problem.window_tokens;
    back.bias_col = 1;
  }
  if (need_pad) {
    pads.zero(1, call.batch * num_heads * 2 * call.dim, is_double);
    back.grad_pad = pads.data();
  }
  if (need_scale) {
    scales.assign(static_cast<std::size_t>(call.batch * num_heads), 0.0);
    back.grad_scale = scales.data();
  }
  if (tasks > 0)
    run_attention(tasks, 2 * attention_work(call.len_q, call.len_k, 2 * call.dim), kernels.backward_bytes(back),
                  [&](std::int64_t begin, std::int64_t end, void* scratch) { kernels.backward(back, begin, end, scratch); });
  const auto number = [&](const void* data, std::int64_t i) {
    return is_double ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
  };
  if (need_table) {
    const void* data = sums.data();
    store_doubles(is_double ? fold_into_table(static_cast<const double*>(data), problem, back.chunks)
                            : fold_into_table(static_cast<const float*>(data), problem, back.chunks),
                  grad_table);
  }
  if (need_pad) {
    std::vector<double> total(static_cast<std::size_t>(3 * problem.channels), 0.0);
    for (std::int64_t b = 0; b < call.batch; ++b)
      for (std::int64_t h = 0; h < num_heads; ++h)
        for (std::int64_t i = 0; i < 2 * call.dim; ++i) {
          const std::int64_t to = (1 + i / call.dim) * problem.channels + h * call.dim + i % call.dim;
          total[static_cast<std::size_t>(to)] += number(back.grad_pad, (b * num_heads + h) * 2 * call.dim + i);
        }
    store_doubles(total, grad_pad);
  }
  if (need_scale) {
    std::vector<double> total(static_cast<std::size_t>(num_heads), 0.0);
    for (std::int64_t b = 0; b < call.batch; ++b)
      for (std::int64_t h = 0; h < num_heads; ++h) total[static_cast<std::size_t>(h)] += scales[static_cast<std::size_t>(b * num_heads + h)];
    store_doubles(total, grad_scale);
  }
  return {grad_qkv, grad_table, grad_pad, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("window_attention", TORCH_BOX(&window_attention));
  library.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace mmk
