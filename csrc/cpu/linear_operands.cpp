// Operands of linear layers: activations by number, weights plain and packed. linear_operands.h says what for.
#include "linear_operands.h"

#include <cstddef>
#include <cstring>

namespace mmk {
namespace {

// The bytes of a packed weight: this, the panels of each matrix from the next cache line on, and the scales of int8 at the
// end. Python reads `version` (mmkernels/ops/packed_linear.py).
struct PackedHeader {
  std::uint64_t magic;
  std::int32_t tier, number;
  std::int64_t rows, cols;  // of a matrix: N and K
  std::uint64_t weight;     // the address that it was packed from
  std::int64_t version;     // the weight's version counter then
  std::int64_t matrices;
};
constexpr std::uint64_t packed_magic = 0x326b6361704b4d4dULL;
constexpr std::int64_t packed_offset = 64;
static_assert(sizeof(PackedHeader) <= packed_offset && offsetof(PackedHeader, version) == 40);

// Where the scales of int8 begin: after the panels.
std::int64_t scales_offset(const GemmArithmetic& arithmetic, std::int64_t matrices, std::int64_t n, std::int64_t k) {
  return packed_offset + matrices * packed_bytes(arithmetic, n, k);
}

std::int64_t packed_total(const GemmArithmetic& arithmetic, std::int64_t matrices, std::int64_t n, std::int64_t k) {
  const bool scaled = arithmetic.rescale != nullptr;
  return scales_offset(arithmetic, matrices, n, k) + (scaled ? matrices * n * static_cast<std::int64_t>(sizeof(float)) : 0);
}

// The first of the matrices.
GemmOperand weight_operand(const Tensor& weight, const char* name, std::int64_t dims) {
  check(weight.dim() == dims, name, "expected ", dims == 2 ? "[N, K]" : "[E, N, K]", ", got ", weight.dim(), " dimensions");
  const auto number = static_cast<Number>(dtype_index(weight, name));
  const void* data = weight.const_data_ptr();
  const std::int64_t n = weight.size(dims - 2), k = weight.size(dims - 1);
  const std::int64_t of_row = weight.stride(dims - 2), of_depth = weight.stride(dims - 1);
  if (k <= 1 || of_depth == 1 || n == 0) return {data, number, of_row, 1};
  check(n == 1 || of_row == 1, name, "one of its dimensions must be contiguous, got strides (", of_row, ", ", of_depth, ")");
  return {data, number, 1, of_depth};
}

GemmOperand advanced(const GemmOperand& operand, std::int64_t elements) {
  GemmOperand result = operand;
  result.data = static_cast<const char*>(operand.data) + elements * static_cast<std::int64_t>(bytes_of(operand.number));
  return result;
}

}  // namespace

Activation activation_of(std::int64_t code) {
  check(code >= 0 && code < activation_count, "activation", "expected 0 to ", activation_count - 1, ", got ", code);
  return static_cast<Activation>(code);
}

Tensor pack_linear(Tensor weight, std::int64_t number_code, std::int64_t version) {
  const std::int64_t dims = weight.dim();
  check(dims == 2 || dims == 3, "weight", "expected [N, K] or [E, N, K], got ", dims, " dimensions");
  const GemmOperand operand = weight_operand(weight, "weight", dims);
  check(number_code >= 0 && number_code <= static_cast<std::int64_t>(Number::int8), "dtype", "expected 0 to 4, got ", number_code);
  const auto number = static_cast<Number>(number_code);
  check(number == Number::int8 ? operand.number != Number::float64 : operand.number == number, "dtype",
        "expected the dtype of weight, or int8 of one of at most 32 bits");
  const GemmChoice how = choose_gemm(number);
  const std::int64_t matrices = dims == 3 ? weight.size(0) : 1, n = weight.size(dims - 2), k = weight.size(dims - 1);
  Tensor packed = new_tensor(weight, {packed_total(*how.arithmetic, matrices, n, k)}, aoti_torch_dtype_uint8());
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed_offset);
  const PackedHeader header{packed_magic, static_cast<std::int32_t>(how.isa), static_cast<std::int32_t>(number), n, k,
                            reinterpret_cast<std::uint64_t>(operand.data), version, matrices};
  std::memcpy(bytes, &header, sizeof header);
  if (n == 0) return packed;
  float* scales = reinterpret_cast<float*>(bytes + scales_offset(*how.arithmetic, matrices, n, k));
  for (std::int64_t i = 0; i < matrices; ++i) {
    pack_weights(*how.arithmetic, dims == 3 ? advanced(operand, i * weight.stride(0)) : operand, n, k,
                 bytes + packed_offset + i * packed_bytes(*how.arithmetic, n, k),
                 how.arithmetic->rescale != nullptr ? scales + i * n : nullptr);
  }
  return packed;
}

Weight::Weight(const Tensor& weight, const MaybeTensor& packed, const MaybeTensor& current, std::int64_t position,
               const char* name, const Tensor& x, Number number, std::int64_t dims)
    : how(choose_gemm_unpacked(number)) {
  first_.operand = weight_operand(weight, name, dims);
  if (dims == 3) {
    matrices = weight.size(0);
    stride_ = weight.stride(0);
  }
  n = weight.size(dims - 2);
  k = weight.size(dims - 1);
  check(on_one_device(weight, x), name, "expected the device of x");
  if (!packed.has_value()) {
    check(first_.operand.number == number, name, "expected the dtype of x");
    return;
  }
  check(packed->dim() == 1 && packed->is_contiguous() && packed->scalar_type() == ScalarType::Byte &&
            on_one_device(*packed, x) && packed->numel() >= packed_offset,
        "packed", "expected what pack_linear made");
  PackedHeader header;
  std::memcpy(&header, packed->const_data_ptr(), sizeof header);
  check(header.magic == packed_magic && header.rows == n && header.cols == k && header.matrices == matrices, "packed",
        "expected what pack_linear made of ", name);
  const auto kept = static_cast<Number>(header.number);
  check(kept == Number::int8 ? number != Number::float64 : kept == number, name, "was packed for another dtype than that of x");
  const GemmChoice packed_how = choose_gemm(kept);
  bool fresh = header.tier == static_cast<std::int32_t>(packed_how.isa) &&
               header.weight == reinterpret_cast<std::uint64_t>(first_.operand.data);
  if (current.has_value()) {
    check(current->scalar_type() == ScalarType::Bool && current->is_contiguous() && current->numel() > position &&
              on_one_device(*current, x),
          "current", "expected what check_packs answered");
    fresh = fresh && static_cast<const bool*>(current->const_data_ptr())[position];
  }
  if (!fresh && kept != Number::int8) return;
  how = packed_how;
  if (!fresh) again_ = pack_linear(weight, header.number, header.version);
  use(fresh ? *packed : *again_, kept);
}

GemmWeights Weight::of(std::int64_t expert) const {
  GemmWeights result = first_;
  result.operand = advanced(first_.operand, expert * stride_);
  if (is_packed()) result.panels = static_cast<const char*>(first_.panels) + expert * packed_bytes(*how.arithmetic, n, k);
  if (first_.scales != nullptr) result.scales = first_.scales + expert * n;
  return result;
}

void Weight::agree_with(Weight& other, Number number) {
  if (how.arithmetic == other.how.arithmetic && is_packed() == other.is_packed()) return;
  check(first_.operand.number == number && other.first_.operand.number == number, "w_gate", "expected to be packed as w_in is");
  use_unpacked(number);
  other.use_unpacked(number);
}

void Weight::use_unpacked(Number number) {
  first_.panels = nullptr;
  first_.scales = nullptr;
  how = choose_gemm_unpacked(number);
}

void Weight::use(const Tensor& packed, Number kept) {
  check(packed.numel() >= packed_total(*how.arithmetic, matrices, n, k), "packed", "is too short");
  const char* bytes = static_cast<const char*>(packed.const_data_ptr());
  first_.panels = bytes + packed_offset;
  if (kept == Number::int8) first_.scales = reinterpret_cast<const float*>(bytes + scales_offset(*how.arithmetic, matrices, n, k));
}

}  // namespace mmk
