// The test extension that runs attention on Hopper (csrc/cuda/attention_forward.h) in software.
#include "hopper_in_software.h"

#include "../cuda/attention_forward.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

using mmk::AttentionCall;
using mmk::AttentionShape;
using mmk::AttentionTile;

// Where a tensor lies: its data, and [B, H, L, D] with strides in elements.
struct Operand {
  std::uintptr_t data;
  std::array<std::int64_t, 4> sizes, strides;

  mmk::hopper::TensorMap map(int rows) const {
    return {mmk::hopper::heads_box(reinterpret_cast<const void*>(data), sizes[3], sizes[2], sizes[1], sizes[0], strides[2],
                                   strides[1], strides[0], rows)};
  }
};

AttentionCall call_of(std::array<std::int64_t, 4> sizes_of_q, std::array<std::int64_t, 4> sizes_of_k, double scale, bool causal,
                      bool bottom_right, int rows, std::int64_t cache_bytes) {
  AttentionCall call{};
  call.batch = static_cast<int>(sizes_of_q[0]);
  call.heads = static_cast<int>(sizes_of_q[1]);
  call.group = static_cast<int>(sizes_of_q[1] / sizes_of_k[1]);
  call.len_q = static_cast<int>(sizes_of_q[2]);
  call.len_k = static_cast<int>(sizes_of_k[2]);
  call.causal = causal;
  call.offset = bottom_right ? call.len_k - call.len_q : 0;
  call.row_tiles = (call.len_q + rows - 1) / rows;
  call.heads_at_once = attention_heads_at_once(call, static_cast<int>(sizes_of_q[3]), cache_bytes);
  set_scale(call, scale);
  return call;
}

template <class T, int D>
void run(const Operand& q, const Operand& k, const Operand& v, std::uintptr_t out, std::uintptr_t lse, double scale, bool causal,
         bool bottom_right, int grid, std::int64_t cache_bytes, std::uint64_t seed) {
  using Shape = AttentionShape<D>;
  AttentionCall call = call_of(q.sizes, k.sizes, scale, causal, bottom_right, Shape::kRows, cache_bytes);
  call.out = reinterpret_cast<void*>(out);
  call.lse = reinterpret_cast<float*>(lse);
  const mmk::hopper::TensorMap of_q = q.map(Shape::kRows), of_k = k.map(Shape::kKeys), of_v = v.map(Shape::kKeys);
  constexpr std::uint32_t begin = 1024 + 16;  // dynamic shared memory need not begin at a multiple of 1024
  for (int block = 0; block < grid; ++block)
    mmk::hopper::Block(Shape::kThreads, begin, Shape::kSharedBytes, seed + static_cast<std::uint64_t>(block)).run([&] {
      mmk::attention_forward<T, D>(call, &of_q, &of_k, &of_v, begin, block, grid);
    });
}

void attention(bool bfloat16, const Operand& q, const Operand& k, const Operand& v, std::uintptr_t out, std::uintptr_t lse,
               double scale, bool causal, bool bottom_right, int grid, std::int64_t cache_bytes, std::uint64_t seed) {
  using mmk::hopper::Bfloat16;
  using mmk::hopper::Float16;
  const auto function = q.sizes[3] == 64 ? (bfloat16 ? &run<Bfloat16, 64> : &run<Float16, 64>)
                                         : (bfloat16 ? &run<Bfloat16, 128> : &run<Float16, 128>);
  function(q, k, v, out, lse, scale, causal, bottom_right, grid, cache_bytes, seed);
}

template <int D>
std::vector<std::array<int, 5>> tiles_of(const AttentionCall& call) {
  std::vector<std::array<int, 5>> all;
  for (int index = 0; index < call.tiles(); ++index) {
    const AttentionTile tile = mmk::attention_tile<AttentionShape<D>>(call, index);
    all.push_back({tile.batch, tile.head, tile.row, tile.blocks, tile.whole});
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(mmkernels_hopper, module) {
  module.doc() = "attention on Hopper in software, for tests";
  py::class_<Operand>(module, "Operand")
      .def(py::init<std::uintptr_t, std::array<std::int64_t, 4>, std::array<std::int64_t, 4>>());
  module.def("attention", &attention);
  module.def("shared_bytes", [](int channels) {
    return channels == 64 ? AttentionShape<64>::kSharedBytes : AttentionShape<128>::kSharedBytes;
  });
  module.def("tiles", [](std::array<std::int64_t, 4> of_q, std::array<std::int64_t, 4> of_k, bool causal, bool bottom_right,
                         std::int64_t cache_bytes) {
    const int rows = of_q[3] == 64 ? AttentionShape<64>::kRows : AttentionShape<128>::kRows;
    const AttentionCall call = call_of(of_q, of_k, 1.0, causal, bottom_right, rows, cache_bytes);
    return of_q[3] == 64 ? tiles_of<64>(call) : tiles_of<128>(call);
  });
}
