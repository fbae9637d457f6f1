// The test extension: building blocks of the CPU core, for pytest alone. Never part of the wheel.
#include "blocks.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/amx.h"

namespace py = pybind11;

namespace {

using Bits = py::array_t<std::uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

template <class Blocks>
const Blocks& table_of(const mmk::Tiers<Blocks>& tiers, const std::string& tier) {
  for (int i = 0; i < mmk::isa_count; ++i)
    if (tier == mmk::isa_name(static_cast<mmk::Isa>(i)) && tiers.tables[i] != nullptr) {
      if (i > static_cast<int>(mmk::best_isa())) throw std::invalid_argument("this processor does not offer " + tier);
      return *tiers.tables[i];
    }
  throw std::invalid_argument("no vectors of tier " + tier);
}

const mmk::VecBlocks& blocks_of(const std::string& tier) { return table_of(mmk::vec_blocks_tiers, tier); }

// The named function of core/math.h, through the member for T.
template <class T>
py::array_t<T> apply(void (*mmk::MathBlock::*member)(const T*, T*, std::int64_t), const std::string& tier,
                     const std::string& name, const py::array_t<T, py::array::c_style>& values) {
  for (const mmk::MathBlock& block : table_of(mmk::math_blocks_tiers, tier).functions)
    if (name == block.name && block.*member != nullptr) {
      py::array_t<T> out(values.size());
      (block.*member)(values.data(), out.mutable_data(), values.size());
      return out;
    }
  throw std::invalid_argument("no function " + name + " of this type in tier " + tier);
}

template <class T>
Floats widen(void (*convert)(const T*, float*, std::int64_t), const Bits& bits) {
  Floats out(bits.size());
  convert(reinterpret_cast<const T*>(bits.data()), out.mutable_data(), bits.size());
  return out;
}

template <class T>
Bits narrow(void (*convert)(const float*, T*, std::int64_t), const Floats& values) {
  Bits out(values.size());
  convert(values.data(), reinterpret_cast<T*>(out.mutable_data()), values.size());
  return out;
}

}  // namespace

PYBIND11_MODULE(mmkernels_blocks, module) {
  module.doc() = "building blocks of mmkernels' CPU core, for tests";
  module.def("width", [](const std::string& tier) { return blocks_of(tier).width; });
  module.def("widen", [](const std::string& tier, const std::string& type, bool scalars, const Bits& bits) {
    const mmk::VecBlocks& blocks = blocks_of(tier);
    if (type == "bfloat16") return widen(scalars ? blocks.widen_bfloat16_scalars : blocks.widen_bfloat16, bits);
    return widen(scalars ? blocks.widen_float16_scalars : blocks.widen_float16, bits);
  });
  module.def("narrow", [](const std::string& tier, const std::string& type, bool scalars, const Floats& values) {
    const mmk::VecBlocks& blocks = blocks_of(tier);
    if (type == "bfloat16") return narrow(scalars ? blocks.narrow_bfloat16_scalars : blocks.narrow_bfloat16, values);
    return narrow(scalars ? blocks.narrow_float16_scalars : blocks.narrow_float16, values);
  });
  module.def("sum", [](const std::string& tier, const Floats& values) {
    const mmk::VecBlocks& blocks = blocks_of(tier);
    if (values.size() < blocks.width) throw std::invalid_argument("fewer values than lanes");
    return blocks.sum(values.data());
  });
  module.def("sums", [](const std::string& tier, const Floats& square) {
    const mmk::VecBlocks& blocks = blocks_of(tier);
    if (square.size() != blocks.width * blocks.width) throw std::invalid_argument("not a square of lanes");
    Floats out(blocks.width);
    blocks.sums(square.data(), out.mutable_data());
    return out;
  });
  module.def("fma", [](const std::string& tier, float a, float b, float c) { return blocks_of(tier).fma(a, b, c); });
  module.def("math", [](const std::string& tier, const std::string& name, const Floats& values) {
    return apply<float>(&mmk::MathBlock::floats, tier, name, values);
  });
  module.def("math_of_doubles", [](const std::string& tier, const std::string& name,
                                   const py::array_t<double, py::array::c_style>& values) {
    return apply<double>(&mmk::MathBlock::doubles, tier, name, values);
  });
  module.def("amx_usable", &mmk::amx::usable);
#if MMK_X86_TIERS
  module.def("amx_tile_product", [](const Bits& a, const Bits& b_pairs, const Floats& c) {
    if (!mmk::amx::usable()) throw std::invalid_argument("this processor does not offer amx");
    if (a.size() != 512 || b_pairs.size() != 512 || c.size() != 256) throw std::invalid_argument("a tile is 16 x 64 bytes");
    Floats out(c.size());
    std::copy(c.data(), c.data() + c.size(), out.mutable_data());
    mmk::amx::tile_product(a.data(), b_pairs.data(), out.mutable_data());
    return out;
  });
  // `c` is [rows up to the next 32][columns up to the next 32], and comes back with the product added, or in its place.
  module.def("amx_panel_product", [](const Bits& a, const Bits& b, bool a_columns, bool b_columns, std::int64_t rows,
                                     std::int64_t cols, const Floats& c, bool accumulate) {
    if (!mmk::amx::usable()) throw std::invalid_argument("this processor does not offer amx");
    const std::int64_t depth = a.size() / rows, c_row = (cols + 31) / 32 * 32;
    if (b.size() != depth * cols || c.size() != (rows + 31) / 32 * 32 * c_row) throw std::invalid_argument("sizes do not fit");
    Floats out(c.size());
    std::copy(c.data(), c.data() + c.size(), out.mutable_data());
    const std::size_t bytes = static_cast<std::size_t>(mmk::amx::floats_for_tiles(rows, cols, depth)) * sizeof(float);
    const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, bytes), std::free);
    mmk::amx::multiply_in_tiles(reinterpret_cast<const mmk::bfloat16*>(a.data()), reinterpret_cast<const mmk::bfloat16*>(b.data()),
                                a_columns, b_columns, rows, cols, depth, static_cast<float*>(memory.get()), out.mutable_data(),
                                c_row, accumulate);
    return out;
  });
#endif
}
