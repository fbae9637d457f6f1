// Codes by kernelised hashing, and EcoFormer's attention from rows to rows, on the CPU: checks, tensors, passes. The arithmetic
// is in hash_codes.tier.cpp (rows to codes and back) and hash_attention.tier.cpp (sums by code).
#include "hash_passes.h"

#include <tuple>

#include "core/trace.h"

namespace mmk {
namespace {

using namespace hash_passes;

// --- codes ----------------------------------------------------------------------------------------------------------------
// qk and the hash functions of all its heads, in accumulators; what a sample's head needs beside is in `bias`.
class Hashing {
 public:
  const HeadRows rows;
  const Numbers numbers;
  const Chunks chunks;
  const std::int64_t heads;  // of all samples
  std::int64_t supports, bits;

  Hashing(const Tensor& qk, const Tensor& anchors, const Tensor& projection, const Tensor& mean)
      : rows(qk, "qk"),
        numbers(qk),
        chunks(rows.rows),
        heads(rows.batch * rows.heads),
        anchors_(anchors),
        projection_(projection),
        mean_(mean) {
    check(rows.cols >= 1, "qk", "expected at least one channel");
    const auto beside = [&](const Tensor& tensor, const char* name, std::int64_t dims) {
      check(tensor.dim() == dims && tensor.is_contiguous(), name, "expected a contiguous tensor of ", dims, " dimensions");
      check(tensor.size(0) == rows.heads, name, "expected one for each head, ", rows.heads, ", got ", tensor.size(0));
      check_beside(tensor, name, qk);
    };
    beside(anchors, "supports", 3);
    beside(projection, "projection", 3);
    beside(mean, "mean", 2);
    supports = anchors.size(1);
    bits = projection.size(1);
    check(supports >= 1 && anchors.size(2) == rows.cols, "supports", "expected [H, m, ", rows.cols, "] with m at least 1");
    check(bits >= 1 && bits <= 32 && projection.size(2) == supports, "projection", "expected [H, 1 to 32, ", supports, "]");
    check(mean.size(1) == supports, "mean", "expected [H, ", supports, "]");
  }

  bool empty() const { return heads == 0 || rows.rows == 0; }

  void reserve(Workspace& memory) {
    const std::int64_t wide = numbers.wide, d = rows.cols, m = supports;
    function_bytes_ = (m * d + bits * m + 2 * m + d) * wide;
    of_functions_ = memory.add(rows.heads * function_bytes_);
    of_bias_ = memory.add(heads * m * wide);
    of_sigma_ = memory.add(heads * 8);
    of_units_ = memory.add(heads * chunks.count * d * wide);
  }
  void prepare(const Workspace& memory) const {
    for (std::int64_t head = 0; head < rows.heads; ++head) {
      const HashFunction f = function(memory, head);
      const auto widen = [&](const Tensor& from, std::int64_t count, void* to) {
        const char* data = static_cast<const char*>(from.const_data_ptr());
        numbers.codes.kernels->widen[dtype_index(from)](data + head * count * static_cast<std::int64_t>(from.element_size()),
                                                        count, to);
      };
      widen(anchors_, supports * rows.cols, f.anchors);
      widen(projection_, bits * supports, f.projection);
      widen(mean_, supports, f.mean);
      numbers.codes.kernels->prepare[numbers.index](f);
    }
  }
  HashFunction function(const Workspace& memory, std::int64_t head) const {
    const std::int64_t wide = numbers.wide, d = rows.cols, m = supports;
    char* at = memory.at(of_functions_ + head % rows.heads * function_bytes_);
    char* projection = at + m * d * wide;
    char* mean = projection + bits * m * wide;
    return {d, m, bits, at, projection, mean, mean + m * wide, mean + 2 * m * wide};
  }
  HashRows rows_of(const Workspace& memory, const HashFunction& f, std::int64_t head) const {
    return {&f, rows.at(head), rows.row_stride, bias(memory, head), sigma(memory, head)};
  }
  double& sigma(const Workspace& memory, std::int64_t head) const {
    return reinterpret_cast<double*>(memory.at(of_sigma_))[head];
  }
  // -squares / (2 sigma) as a power of two, once sigma is known.
  void set_sigma(const Workspace& memory, std::int64_t head, double value) const {
    sigma(memory, head) = value;
    const HashFunction f = function(memory, head);
    const double factor = log2_of_e / (-2 * value);
    for (std::int64_t j = 0; j < supports; ++j) numbers.set(bias(memory, head), j, numbers.get(f.squares, j) * factor);
  }

  // Pass one: sigma, the mean of 1 + |a|^2 - 2 u.a over rows and supports, from the sums of u and of a.
  auto sigma_pass(const Workspace& memory) const {
    return Pass{[this, &memory](std::int64_t head, std::int64_t chunk) {
                  const HashFunction f = function(memory, head);
                  numbers.codes.kernels->units[numbers.index]({&f, rows.at(head), rows.row_stride, nullptr, 0},
                                                              chunks.begin(chunk), chunks.end(chunk),
                                                              units(memory, head, chunk));
                },
                [this, &memory](std::int64_t head) {
                  const HashFunction f = function(memory, head);
                  const double count = static_cast<double>(rows.rows) * static_cast<double>(supports);
                  double products = 0, squares = 0;
                  for (std::int64_t c = 0; c < rows.cols; ++c) {
                    double sum = 0;
                    for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk)
                      sum += numbers.get(units(memory, head, chunk), c);
                    products += sum * numbers.get(f.anchor_sum, c);
                  }
                  for (std::int64_t j = 0; j < supports; ++j) squares += numbers.get(f.squares, j);
                  set_sigma(memory, head, squares / static_cast<double>(supports) - 2 * products / count);
                }};
  }

  // Whether every y of the chunk is a number.
  bool hash(const Workspace& memory, std::int64_t head, std::int64_t chunk, std::int32_t* codes, std::int32_t* inside) const {
    const HashFunction f = function(memory, head);
    const HashCodes call{rows_of(memory, f, head), codes + head * rows.rows,
                         inside == nullptr ? nullptr : inside + head * rows.rows};
    return numbers.codes.kernels->hash[numbers.index](call, chunks.begin(chunk), chunks.end(chunk),
                                                      tile(rows.cols + supports + bits));
  }
  void* tile(std::int64_t rows_of_tile) const {
    return scratch(ScratchUse::rows,
                   static_cast<std::size_t>(rows_of_tile * numbers.codes.kernels->tile_rows * numbers.wide));
  }
  // Multiplications of a row.
  std::int64_t row_work() const { return supports * (rows.cols + bits) / 8; }

 private:
  char* bias(const Workspace& memory, std::int64_t head) const {
    return memory.at(of_bias_ + head * supports * numbers.wide);
  }
  char* units(const Workspace& memory, std::int64_t head, std::int64_t chunk) const {
    return memory.at(of_units_ + (head * chunks.count + chunk) * rows.cols * numbers.wide);
  }

  const Tensor &anchors_, &projection_, &mean_;
  std::int64_t function_bytes_ = 0, of_functions_ = 0, of_bias_ = 0, of_sigma_ = 0, of_units_ = 0;
};

Tensor hash_codes(Tensor qk, Tensor supports, Tensor projection, Tensor mean) {
  Hashing hashing(qk, supports, projection, mean);
  Tensor out = new_tensor(qk, {hashing.rows.batch, hashing.rows.heads, hashing.rows.rows}, aoti_torch_dtype_int32());
  trace("hash_codes", hashing.numbers.codes.name);
  if (hashing.empty()) return out;
  Workspace memory(ScratchUse::hash_attention);
  hashing.reserve(memory);
  memory.allocate();
  hashing.prepare(memory);
  std::int32_t* codes = static_cast<std::int32_t*>(out.mutable_data_ptr());
  const Pass making{[&](std::int64_t head, std::int64_t chunk) { hashing.hash(memory, head, chunk, codes, nullptr); }, nothing};
  run(hashing.heads, hashing.chunks.count, hashing.row_work(), hashing.sigma_pass(memory), making);
  scratch_done(ScratchUse::hash_attention);
  return out;
}

// --- both -----------------------------------------------------------------------------------------------------------------
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

HeadRows values_beside(const Tensor& v, const Tensor& qk, const HeadRows& rows) {
  const HeadRows values(v, "v");
  check(on_one_device(v, qk), "v", "expected the device of qk");
  check(dtype_of(v) == dtype_of(qk), "v", "expected the dtype of qk");
  check(values.batch == rows.batch && values.heads == rows.heads && values.rows == rows.rows, "v",
        "expected [", rows.batch, ", ", rows.heads, ", ", rows.rows, ", Dv]");
  return values;
}

FourTensors ecoformer_attention(Tensor qk, Tensor v, Tensor supports, Tensor projection, Tensor mean, double offset, bool own,
                                bool keep) {
  Hashing hashing(qk, supports, projection, mean);
  const HeadRows& rows = hashing.rows;
  const HeadRows values = values_beside(v, qk, rows);
  check_attention(hashing.bits, offset);
  const Numbers& numbers = hashing.numbers;
  const HashAttentionKernels& kernels = *numbers.attention.kernels;
  const HashState state{hashing.bits, values.cols};
  const std::int32_t integers = aoti_torch_dtype_int32();
  const std::int32_t wide_type = numbers.doubles ? dtype_of(qk) : aoti_torch_dtype_float32();
  const auto kept_codes = [&] {
    return keep ? new_tensor(qk, {rows.batch, rows.heads, rows.rows}, integers) : new_tensor(qk, {0}, integers);
  };
  Tensor out = new_tensor(v, {rows.batch, rows.heads, rows.rows, values.cols}, dtype_of(v));
  Tensor codes = kept_codes(), inside = kept_codes();
  Tensor sums = keep ? new_tensor(qk, {rows.batch, rows.heads, state.size() + 1}, wide_type) : new_tensor(qk, {0}, wide_type);
  trace("ecoformer_attention", numbers.codes.name);
  char* kept = static_cast<char*>(sums.mutable_data_ptr());
  if (hashing.empty()) {
    for (std::int64_t head = 0; keep && head < hashing.heads; ++head) {
      std::memset(kept + head * (state.size() + 1) * numbers.wide, 0, static_cast<std::size_t>(state.size() * numbers.wide));
      numbers.set(kept, head * (state.size() + 1) + state.size(), std::numeric_limits<double>::quiet_NaN());
    }
    return {out, codes, inside, sums};
  }
  const Chunks& chunks = hashing.chunks;
  const std::int64_t state_bytes = state.size() * numbers.wide, row_bytes = values.cols * values.bytes;
  Workspace memory(ScratchUse::hash_attention);
  hashing.reserve(memory);
  const std::int64_t of_sums = memory.add(hashing.heads * chunks.count * state_bytes);
  const std::int64_t of_codes = memory.add(keep ? 0 : hashing.heads * rows.rows * 4);
  const std::int64_t of_flags = memory.add(hashing.heads * chunks.count);
  memory.allocate();
  hashing.prepare(memory);
  std::int32_t* all_codes =
      keep ? static_cast<std::int32_t*>(codes.mutable_data_ptr()) : reinterpret_cast<std::int32_t*>(memory.at(of_codes));
  std::int32_t* all_inside = keep ? static_cast<std::int32_t*>(inside.mutable_data_ptr()) : nullptr;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto partial = [&](std::int64_t head, std::int64_t chunk) {
    return memory.at(of_sums + (head * chunks.count + chunk) * state_bytes);
  };
  const auto are_numbers = [&](std::int64_t head, std::int64_t chunk) -> char& {
    return *memory.at(of_flags + head * chunks.count + chunk);
  };
  const Pass summing{[&](std::int64_t head, std::int64_t chunk) {
                       are_numbers(head, chunk) = hashing.hash(memory, head, chunk, all_codes, all_inside);
                       const HashSum call{state,   chunks.group_bits(), all_codes + head * rows.rows, values.at(head),
                                          values.row_stride, nullptr,   nullptr};
                       kernels.sum[numbers.index](call, chunks.begin(chunk), chunks.end(chunk), partial(head, chunk),
                                                  tables(numbers.wide));
                     },
                     [&](std::int64_t head) {
                       numbers.add_up(partial(head, 0), chunks.count, state.size());
                       bool all = true;
                       for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) all &= are_numbers(head, chunk) != 0;
                       if (!all) hashing.sigma(memory, head) = std::numeric_limits<double>::quiet_NaN();
                       if (!keep) return;
                       char* at = kept + head * (state.size() + 1) * numbers.wide;
                       std::memcpy(at, partial(head, 0), static_cast<std::size_t>(state_bytes));
                       numbers.set(at, state.size(), hashing.sigma(memory, head));
                     }};
  const Pass reading{[&](std::int64_t head, std::int64_t chunk) {
                       const std::int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
                       char* out_rows = to + (head * rows.rows + begin) * row_bytes;
                       const double sigma = hashing.sigma(memory, head);
                       if (sigma != sigma) return Numbers::fill_with_nan(out_rows, (end - begin) * row_bytes);
                       void* inverse = scratch(ScratchUse::rows, static_cast<std::size_t>((end - begin) * numbers.wide));
                       const std::int32_t* of_rows = all_codes + head * rows.rows + begin;
                       const double base = offset * static_cast<double>(rows.rows);
                       kernels.denominator[numbers.index]({state, of_rows, partial(head, 0), base, inverse}, 0, end - begin);
                       const char* self = own ? values.at(head) + begin * values.row_stride * values.bytes : nullptr;
                       const HashOutput call{state, chunks.group_bits(), of_rows, partial(head, 0), own ? 0 : offset,
                                             own ? offset : 0, self, values.row_stride, inverse, inverse, out_rows};
                       kernels.output[numbers.index](call, 0, end - begin, tables(numbers.wide));
                     },
                     nothing};
  run(hashing.heads, chunks.count, hashing.row_work() + 2 * values.cols, hashing.sigma_pass(memory), summing, reading);
  scratch_done(ScratchUse::hash_attention);
  return {out, codes, inside, sums};
}

std::tuple<Tensor, Tensor> ecoformer_attention_backward(Tensor grad, Tensor qk, Tensor v, Tensor supports, Tensor projection,
                                                        Tensor mean, Tensor codes, Tensor inside, Tensor sums, double offset,
                                                        bool own, bool need_qk, bool need_v) {
  Hashing hashing(qk, supports, projection, mean);
  const HeadRows& rows = hashing.rows;
  const HeadRows values = values_beside(v, qk, rows);
  check_attention(hashing.bits, offset);
  const HeadRows upstream(grad, "grad");
  check(on_one_device(grad, qk) && dtype_of(grad) == dtype_of(qk) && grad.is_contiguous() && upstream.batch == rows.batch &&
            upstream.heads == rows.heads && upstream.rows == rows.rows && upstream.cols == values.cols,
        "grad", "expected a contiguous gradient of the shape of the output");
  const Numbers& numbers = hashing.numbers;
  const HashAttentionKernels& kernels = *numbers.attention.kernels;
  const HashState state{hashing.bits, values.cols};
  const auto check_codes = [&](const Tensor& of, const char* name) {
    const HeadCodes checked(of, name, qk, rows.batch, rows.heads);
    check(of.is_contiguous() && checked.rows == rows.rows, name, "expected those of the forward call");
  };
  check_codes(codes, "codes");
  check_codes(inside, "inside");
  check(on_one_device(sums, qk) && sums.is_contiguous() && sums.dim() == 3 && sums.size(0) == rows.batch &&
            sums.size(1) == rows.heads && sums.size(2) == state.size() + 1 &&
            sums.scalar_type() == (numbers.doubles ? ScalarType::Double : ScalarType::Float),
        "sums", "expected those of the forward call");
  const auto like = [&](const Tensor& tensor, bool needed) {
    return needed ? new_tensor(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, dtype_of(tensor))
                  : new_tensor(tensor, {0}, dtype_of(tensor));
  };
  Tensor grad_qk = like(qk, need_qk), grad_v = like(v, need_v);
  trace("ecoformer_attention_backward", numbers.codes.name);
  if (hashing.empty() || (!need_qk && !need_v)) return {grad_qk, grad_v};

  const Chunks& chunks = hashing.chunks;
  const std::int64_t state_bytes = state.size() * numbers.wide, row_bytes = values.cols * values.bytes;
  const std::int64_t qk_row_bytes = rows.cols * rows.bytes, heads = hashing.heads;
  Workspace memory(ScratchUse::hash_attention);
  hashing.reserve(memory);
  const std::int64_t of_slopes = memory.add(heads * chunks.count * state_bytes);
  const std::int64_t of_inverse = memory.add(heads * rows.rows * numbers.wide);
  const std::int64_t of_slope = memory.add(heads * rows.rows * numbers.wide);
  const std::int64_t of_sigma = memory.add(heads * chunks.count * 8);
  memory.allocate();
  hashing.prepare(memory);
  const auto kept = [&](std::int64_t head) {
    return static_cast<const char*>(sums.const_data_ptr()) + head * (state.size() + 1) * numbers.wide;
  };
  const auto codes_of = [&](const Tensor& of, std::int64_t head) {
    return static_cast<const std::int32_t*>(of.const_data_ptr()) + head * rows.rows;
  };
  const auto slopes = [&](std::int64_t head, std::int64_t chunk) {
    return memory.at(of_slopes + (head * chunks.count + chunk) * state_bytes);
  };
  const auto inverse = [&](std::int64_t head) { return memory.at(of_inverse + head * rows.rows * numbers.wide); };
  const auto slope = [&](std::int64_t head) { return memory.at(of_slope + head * rows.rows * numbers.wide); };
  const auto sigma_gradient = [&](std::int64_t head) {
    return reinterpret_cast<double*>(memory.at(of_sigma)) + head * chunks.count;
  };
  for (std::int64_t head = 0; head < heads; ++head) hashing.set_sigma(memory, head, numbers.get(kept(head), state.size()));

  const Pass summing{
      [&](std::int64_t head, std::int64_t chunk) {
        const std::int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
        const int group_bits = chunks.group_bits();
        const double base = offset * static_cast<double>(rows.rows);
        void* of_tables = tables(numbers.wide);
        kernels.denominator[numbers.index]({state, codes_of(codes, head), kept(head), base, inverse(head)}, begin, end);
        if (need_qk) {
          const HashOutput numerator{state, group_bits, codes_of(codes, head), kept(head), own ? 0 : offset, own ? offset : 0,
                                     own ? values.at(head) : nullptr, values.row_stride, nullptr, nullptr, nullptr};
          kernels.slope[numbers.index]({numerator, upstream.at(head), inverse(head), slope(head)}, begin, end, of_tables);
        }
        const HashSum call{state,         group_bits,    codes_of(codes, head),              upstream.at(head),
                           upstream.cols, inverse(head), need_qk ? slope(head) : nullptr};
        kernels.sum[numbers.index](call, begin, end, slopes(head, chunk), of_tables);
      },
      [&](std::int64_t head) { numbers.add_up(slopes(head, 0), chunks.count, state.size()); }};

  const auto fill_with_nan = [&](const Tensor& gradient, std::int64_t head, std::int64_t begin, std::int64_t end,
                                 std::int64_t bytes) {
    char* at = static_cast<char*>(gradient.mutable_data_ptr()) + (head * rows.rows + begin) * bytes;
    Numbers::fill_with_nan(at, (end - begin) * bytes);
  };
  const Pass reading{
      [&](std::int64_t head, std::int64_t chunk) {
        const std::int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
        sigma_gradient(head)[chunk] = 0;
        const double sigma = hashing.sigma(memory, head);
        if (sigma != sigma) {
          if (need_v) fill_with_nan(grad_v, head, begin, end, row_bytes);
          if (need_qk) fill_with_nan(grad_qk, head, begin, end, qk_row_bytes);
          return;
        }
        if (need_v) {
          const HashOutput call{state,
                                chunks.group_bits(),
                                codes_of(codes, head),
                                slopes(head, 0),
                                own ? 0 : offset,
                                own ? offset : 0,
                                own ? upstream.at(head) : nullptr,
                                upstream.cols,
                                nullptr,
                                inverse(head),
                                static_cast<char*>(grad_v.mutable_data_ptr()) + head * rows.rows * row_bytes};
          kernels.output[numbers.index](call, begin, end, tables(numbers.wide));
        }
        if (need_qk) {
          const HashFunction f = hashing.function(memory, head);
          const HashBackward call{hashing.rows_of(memory, f, head),
                                  upstream.at(head),
                                  values.at(head),
                                  values.row_stride,
                                  values.cols,
                                  codes_of(inside, head),
                                  kept(head),
                                  slopes(head, 0),
                                  inverse(head),
                                  slope(head),
                                  static_cast<char*>(grad_qk.mutable_data_ptr()) + head * rows.rows * qk_row_bytes};
          void* tile = hashing.tile(2 * rows.cols + std::max(values.cols, hashing.supports) + 2 * hashing.supports +
                                    hashing.bits);
          sigma_gradient(head)[chunk] = numbers.codes.kernels->backward[numbers.index](call, begin, end, tile);
        }
      },
      [&](std::int64_t head) {
        double* gradient = sigma_gradient(head);
        for (std::int64_t chunk = 1; chunk < chunks.count; ++chunk) gradient[0] += gradient[chunk];
      }};

  // d sigma / d u_n = -2 anchor_sum / (N m), the same for all rows but for what their lengths take away.
  const Pass finishing{
      [&](std::int64_t head, std::int64_t chunk) {
        const double sigma = hashing.sigma(memory, head);
        if (!need_qk || sigma != sigma) return;
        const double count = static_cast<double>(rows.rows) * static_cast<double>(hashing.supports);
        const double factor = -2 * sigma_gradient(head)[0] / count;
        const HashFunction f = hashing.function(memory, head);
        numbers.codes.kernels->finish[numbers.index](
            {rows.at(head), rows.row_stride, rows.cols, inverse(head), slope(head), f.anchor_sum, factor,
             static_cast<char*>(grad_qk.mutable_data_ptr()) + head * rows.rows * qk_row_bytes},
            chunks.begin(chunk), chunks.end(chunk));
      },
      nothing};
  run(heads, chunks.count, 3 * hashing.row_work() + 4 * values.cols, summing, reading, finishing);
  scratch_done(ScratchUse::hash_attention);
  return {grad_qk, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("hash_codes", TORCH_BOX(&hash_codes));
  library.impl("ecoformer_attention", TORCH_BOX(&ecoformer_attention));
  library.impl("ecoformer_attention_backward", TORCH_BOX(&ecoformer_attention_backward));
}

}  // namespace mmk
