// Softmax attention on Hopper, forward: tensor maps, checks and the launch of attention_forward.h, whose index glossary holds
// here too. An operator of its own, which mmkernels::attention calls where its backend "cuda" takes a call
// (mmkernels/ops/attention.py): the caller writes down what ran.
#include "core/hopper.h"
#include "core/stream.h"

#include "attention_forward.h"

#include <cmath>
#include <tuple>

namespace mmk {
namespace {

// Every other architecture has an empty kernel, which check_device keeps from being launched.
template <class T, int D>
__global__ void __launch_bounds__(AttentionShape<D>::kThreads, 1)
    attention_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ hopper::TensorMap q,
                     const __grid_constant__ hopper::TensorMap k, const __grid_constant__ hopper::TensorMap v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ std::uint8_t shared[];
  attention_forward<T, D>(call, &q, &k, &v, static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)),
                          static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
#endif
}

// --- host ---------------------------------------------------------------------------------------------------------------
// The driver's function, asked of it by name: the library is not linked with it, which is missing where there is no GPU.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return status == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (encoder == nullptr) throw std::runtime_error("attention_hopper: the driver has no tensor maps");
  return encoder;
}

hopper::TensorMap tensor_map(const Tensor& x, const char* name, int rows) {
  const auto aligned = [](std::int64_t size, std::int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < std::int64_t{1} << 39);
  };
  check(x.size(3) == 1 || x.stride(3) == 1, name, "the last dimension must be contiguous");
  check(reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % 16 == 0 && aligned(x.size(0), x.stride(0)) &&
            aligned(x.size(1), x.stride(1)) && aligned(x.size(2), x.stride(2)),
        name, "expected data and strides that are multiples of 16 bytes, and no expanded dimension");
  const hopper::HeadsBox box = hopper::heads_box(x.const_data_ptr(), x.size(3), x.size(2), x.size(1), x.size(0), x.stride(2),
                                                 x.stride(1), x.stride(0), rows);
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  constexpr std::uint32_t every_element[4] = {1, 1, 1, 1};
  hopper::TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(box.data),
      box.sizes, box.byte_strides, box.box, every_element, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("attention_hopper: the driver takes no tensor map of ") + name + ", error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

void check_operands(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  constexpr std::int64_t most = 1 << 30;  // coordinates are 32-bit numbers
  check(q.dim() == 4, "q", "expected [B, H, L, D], got ", q.dim(), " dimensions");
  check(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, "q", "expected bfloat16 or float16");
  check(q.size(3) == 64 || q.size(3) == 128, "q", "expected 64 or 128 channels, got ", q.size(3));
  for (const auto& [x, name] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    check(x->dim() == 4, name, "expected [B, Hk, L, D], got ", x->dim(), " dimensions");
    check(dtype_of(*x) == dtype_of(q) && on_one_device(*x, q), name, "expected the dtype and device of q");
    check(x->size(0) == q.size(0) && x->size(3) == q.size(3), name, "expected the batch and channels of q");
    check(x->size(2) >= 1 && x->size(2) <= most, name, "expected 1 to 2^30 keys, got ", x->size(2));
  }
  check(v.size(1) == k.size(1) && v.size(2) == k.size(2), "v", "expected the shape of k");
  check(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, "k", "expected heads that divide q's ", q.size(1), ", got ", k.size(1));
  check(q.size(2) <= most, "q", "expected at most 2^30 queries, got ", q.size(2));
  check(std::isfinite(scale), "scale", "expected a finite number");
}

void check_device(const Tensor& q) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, q.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, q.get_device_index());
  check(major == 9 && minor == 0, "q", "expected a GPU of compute capability 9.0, got ", major, ".", minor);
}

template <class T, int D>
void launch(AttentionCall& call, const Tensor& q, const Tensor& k, const Tensor& v, cudaStream_t stream) {
  using Shape = AttentionShape<D>;
  int processors = 0, cache = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index());
  cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, q.get_device_index());
  const std::int64_t row_tiles = (static_cast<std::int64_t>(call.len_q) + Shape::kRows - 1) / Shape::kRows;
  check(row_tiles * call.batch * call.heads <= 1 << 30, "q", "the CUDA kernel takes at most 2^30 tiles of rows");
  call.row_tiles = static_cast<int>(row_tiles);
  call.heads_at_once = attention_heads_at_once(call, D, cache / 2);  // the other half for queries and results
  constexpr auto kernel = &attention_kernel<T, D>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  kernel<<<static_cast<unsigned>(std::min(processors, call.tiles())), Shape::kThreads, Shape::kSharedBytes, stream>>>(
      call, tensor_map(q, "q", Shape::kRows), tensor_map(k, "k", Shape::kKeys), tensor_map(v, "v", Shape::kKeys));
  check_launch("attention_hopper");
}

std::tuple<Tensor, Tensor> attention_hopper(Tensor q, Tensor k, Tensor v, double scale, bool causal, bool bottom_right) {
  check_operands(q, k, v, scale);
  const std::int64_t batch = q.size(0), heads = q.size(1), len_q = q.size(2), channels = q.size(3);
  const std::int64_t sizes[4] = {batch, heads, len_q, channels};
  const std::int64_t strides[4] = {len_q * heads * channels, channels, heads * channels, 1};
  Tensor out = new_strided(q, sizes, strides, 4, dtype_of(q));
  Tensor lse = new_tensor(q, {batch, heads, len_q}, aoti_torch_dtype_float32());
  if (lse.numel() == 0) return {out, lse};
  check(batch * heads <= 1 << 30, "q", "the CUDA kernel takes at most 2^30 samples times heads");
  const OnDeviceOf device(q);
  check_device(q);
  AttentionCall call{};
  call.batch = static_cast<int>(batch);
  call.heads = static_cast<int>(heads);
  call.group = static_cast<int>(heads / k.size(1));
  call.len_q = static_cast<int>(len_q);
  call.len_k = static_cast<int>(k.size(2));
  call.causal = causal;
  call.offset = bottom_right ? call.len_k - call.len_q : 0;
  set_scale(call, scale);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  const bool bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  if (channels == 64) {
    if (bfloat16) launch<hopper::Bfloat16, 64>(call, q, k, v, device.stream());
    if (!bfloat16) launch<hopper::Float16, 64>(call, q, k, v, device.stream());
  } else {
    if (bfloat16) launch<hopper::Bfloat16, 128>(call, q, k, v, device.stream());
    if (!bfloat16) launch<hopper::Float16, 128>(call, q, k, v, device.stream());
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) { library.impl("attention_hopper", TORCH_BOX(&attention_hopper)); }

}  // namespace mmk
