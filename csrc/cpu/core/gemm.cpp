// Cuts a product into blocks, packs, and hands the blocks to threads. The bits do not depend on any cut made here: gemm.h
// says why.
#include "gemm_call.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "parallel.h"
#include "scratch.h"
#include "tier.h"

namespace mmk {

namespace {

// Panels of A that all threads read lie in the last-level cache together; one block of A, of B and of accumulators lie
// in a core's own second-level cache.
constexpr std::int64_t shared_a_bytes = std::int64_t{6} << 20;
constexpr std::int64_t shared_b_bytes = std::int64_t{16} << 20;
constexpr std::int64_t block_rows = 112, block_cols = 128;
// Deeper products are done in pieces, which add to accumulators that are there for all of C.
constexpr std::int64_t piece_depth = 8192;
// Rows of A as short as this are multiplied where they lie.
constexpr std::int64_t in_place_bytes = 512;
// With so many blocks of rows for every thread, each keeps to its own.
constexpr std::int64_t owned_blocks = 3;
// Blocks that a thread gets at least, where columns are there to be cut: the last one finished is waited for.
constexpr std::int64_t blocks_of_a_thread = 4;


// [0, count) panels cut into nearly equal runs of at most `most` panels.
struct Cut {
  std::int64_t panels, pieces;

  Cut(std::int64_t count, std::int64_t most) : panels(count), pieces(std::max<std::int64_t>(1, ceil_div(count, most))) {}
  std::int64_t begin(std::int64_t piece) const { return panels * piece / pieces; }
};

// The operand from row (or column) `first` and `depth` on.
GemmOperand part_of(const GemmOperand& operand, std::int64_t first, std::int64_t depth) {
  const std::int64_t offset = first * operand.stride + depth * operand.depth_stride;
  GemmOperand part = operand;
  part.data = static_cast<const char*>(operand.data) + offset * static_cast<std::int64_t>(bytes_of(operand.number));
  return part;
}

class Product {
 public:
  explicit Product(const GemmCall& call)
      : call_(call),
        how_(*call.arithmetic),
        row_panels_(ceil_div(call.rows, how_.panel_rows)),
        col_panels_(ceil_div(call.cols, how_.panel_cols)),
        // Accumulators that are the result already, but for columns beside whole panels; gradients of weights are such.
        writes_sums_(how_.rows_exact && bytes_of(call.number) == static_cast<std::size_t>(how_.accumulator_bytes) && !call.gated &&
                     call.out_panels == nullptr && call.bias == nullptr && call.activation == Activation::none &&
                     call.residual == nullptr && call.pre == nullptr && call.row_weights == nullptr && call.out_rows == nullptr),
        a_row_bytes_(reads_rows() ? call.a.stride * how_.a_bytes : 0),
        row_scales_(how_.rescale == nullptr ? nullptr : scratch_of<float>(ScratchUse::gemm_scales, call.rows)) {}

  void run() {
    const bool whole = how_.rescale != nullptr || call_.depth <= piece_depth;
    const std::int64_t pieces = whole ? 1 : ceil_div(call_.depth, piece_depth);
    const std::int64_t step = whole ? call_.depth : ceil_div(ceil_div(call_.depth, pieces), how_.depth_block) * how_.depth_block;
    if (!whole) {
      all_stride_ = col_panels_ * how_.panel_cols;
      all_ = scratch_of<char>(ScratchUse::gemm_accumulators,
                              (call_.gated ? 2 : 1) * padded_rows() * all_stride_ * how_.accumulator_bytes);
    }
    std::int64_t begin = 0;
    do {
      depth_begin_ = begin;
      depth_ = std::min(step, call_.depth - begin);
      piece();
      begin += step;
    } while (begin < call_.depth);
    if (!whole) scratch_done(ScratchUse::gemm_accumulators);
  }

 private:
  // Few depths are read where they are: packing them would take as long as multiplying them. Rows further apart than a panel
  // of them covers would share lines of the first-level cache.
  bool reads_rows() const {
    const bool same = static_cast<std::int64_t>(bytes_of(call_.a.number)) == how_.a_bytes;
    return how_.reads_rows && same && call_.a_panels == nullptr && call_.a_rows == nullptr && call_.a.depth_stride == 1 &&
           call_.depth % how_.depth_step == 0 && call_.depth * how_.a_bytes <= in_place_bytes && call_.a.stride > 0 &&
           call_.a.stride * how_.a_bytes <= 2 * in_place_bytes;
  }

  std::int64_t padded_rows() const { return row_panels_ * how_.panel_rows; }

  // One piece of the depth.
  void piece() {
    const bool packed = call_.up.panels != nullptr;
    const std::int64_t at_once = std::max<std::int64_t>(1, rows_at_once(how_, depth_) / how_.panel_rows);
    const Cut rows(row_panels_, at_once);
    // B that only one group of rows reads is packed by the task that reads it; else once, for all groups.
    const bool alone = rows.pieces == 1;
    const std::int64_t b_bytes = how_.b_panel_bytes(depth_) * (call_.gated ? 2 : 1);
    const Cut cols(col_panels_, packed || alone ? col_panels_ : std::max<std::int64_t>(1, shared_b_bytes / b_bytes));
    for (std::int64_t j = 0; j < cols.pieces; ++j) {
      const std::int64_t first = cols.begin(j), count = cols.begin(j + 1) - first;
      if (packed) {
        shared_ = {panels_of(call_.up), call_.gated ? panels_of(call_.gate) : nullptr, how_.b_panel_bytes(call_.depth), 0};
      } else if (!alone) {
        shared_ = cols_from(first, count);
        parallel_for(count, depth_ * how_.panel_cols, [&](std::int64_t begin, std::int64_t end) {
          pack_cols(shared_, first + begin, first + end);
        });
      }
      if ((packed || !alone) && row_panels_ * how_.panel_rows >= owned_blocks * block_rows * threads()) {
        blocks_of_own_rows(first, count);
        continue;
      }
      for (std::int64_t i = 0; i < rows.pieces; ++i) {
        const std::int64_t first_row = rows.begin(i), row_count = rows.begin(i + 1) - first_row;
        const Rows a = rows_from(first_row, row_count);
        parallel_for(row_count, depth_ * how_.panel_rows, [&](std::int64_t begin, std::int64_t end) {
          pack_rows(a, first_row + begin, first_row + end);
        });
        blocks(a, row_count, first, count, !packed && alone);
      }
    }
  }

  // Where the panels of B are, from `first_panel` on.
  struct Panels {
    const char* up;
    const char* gate;
    std::int64_t bytes, first_panel;
  };

  const char* panels_of(const GemmWeights& weights) const {
    return static_cast<const char*>(weights.panels) + depth_begin_ * how_.panel_cols * how_.b_bytes;
  }

  // Room of the calling thread's, for pack_cols to fill.
  Panels cols_from(std::int64_t first, std::int64_t count) const {
    const std::int64_t bytes = how_.b_panel_bytes(depth_);
    const char* up = scratch_of<char>(ScratchUse::gemm_b, count * bytes * (call_.gated ? 2 : 1));
    return {up, call_.gated ? up + count * bytes : nullptr, bytes, first};
  }

  // Packs panels [begin, end) of those that `cols` has room for.
  void pack_cols(const Panels& cols, std::int64_t begin, std::int64_t end) const {
    const std::int64_t col = begin * how_.panel_cols, count = std::min(end * how_.panel_cols, call_.cols) - col;
    const auto pack = [&](const GemmWeights& weights, const char* panels) {
      const GemmOperand& source = weights.operand;
      char* to = const_cast<char*>(panels) + (begin - cols.first_panel) * cols.bytes;
      how_.pack_b[static_cast<int>(source.number)](
          {part_of(source, col, depth_begin_), count, depth_, to, cols.bytes, nullptr, false});
    };
    pack(call_.up, cols.up);
    if (cols.gate != nullptr) pack(call_.gate, cols.gate);
  }

  // Where the panels of A are, from `first_panel` on.
  struct Rows {
    const char* panels;
    std::int64_t bytes, first_panel;
  };

  // In panels from the start, in place, or in room of the calling thread's that pack_rows fills.
  Rows rows_from(std::int64_t first, std::int64_t count) const {
    if (a_row_bytes_ != 0) {
      const char* a = static_cast<const char*>(call_.a.data) + first * how_.panel_rows * a_row_bytes_;
      return {a, how_.panel_rows * a_row_bytes_, first};
    }
    if (call_.a_panels != nullptr) {
      const std::int64_t bytes = how_.a_panel_bytes(call_.depth), offset = depth_begin_ * how_.panel_rows * how_.a_bytes;
      return {static_cast<const char*>(call_.a_panels) + first * bytes + offset, bytes, first};
    }
    const std::int64_t bytes = how_.a_panel_bytes(depth_);
    return {scratch_of<char>(ScratchUse::gemm_a, count * bytes), bytes, first};
  }

  // Packs panels [begin, end) of those that `rows` has room for.
  void pack_rows(const Rows& rows, std::int64_t begin, std::int64_t end) const {
    if (call_.a_panels != nullptr || a_row_bytes_ != 0) return;
    const GemmOperand& source = call_.a;
    const auto pack = how_.pack_a[static_cast<int>(source.number)];
    // Gathered rows are copied a panel at a time, which the packing then finds in a core's own cache.
    const std::int64_t step = call_.a_rows == nullptr ? end - begin : 1;
    for (std::int64_t panel = begin; panel < end; panel += step) {
      const std::int64_t row = panel * how_.panel_rows, count = std::min((panel + step) * how_.panel_rows, call_.rows) - row;
      char* to = const_cast<char*>(rows.panels) + (panel - rows.first_panel) * rows.bytes;
      float* scales = row_scales_ == nullptr ? nullptr : row_scales_ + row;
      pack({call_.a_rows == nullptr ? part_of(source, row, depth_begin_) : gathered(row, count), count, depth_, to, rows.bytes,
            scales, false});
    }
  }

  GemmOperand gathered(std::int64_t row, std::int64_t count) const {
    const std::int64_t bytes = depth_ * static_cast<std::int64_t>(bytes_of(call_.a.number));
    char* to = scratch_of<char>(ScratchUse::gemm_gathered, count * bytes);
    for (std::int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * bytes, part_of(call_.a, call_.a_rows[row + i], depth_begin_).data, bytes);
    return {to, call_.a.number, depth_, 1};
  }

  // Many rows: a task packs a block of them for itself and goes through all columns with it, so that no thread waits for
  // another before the end. The blocks are as many for each thread.
  void blocks_of_own_rows(std::int64_t first_col, std::int64_t col_count) {
    const std::int64_t most = block_rows / how_.panel_rows;
    const std::int64_t pieces = ceil_div(ceil_div(row_panels_, most), threads()) * threads();
    const Cut rows(row_panels_, ceil_div(row_panels_, pieces));
    const Cut cols(col_count, std::max<std::int64_t>(1, block_cols / how_.panel_cols));
    parallel_for(rows.pieces, block_rows * col_count * how_.panel_cols * depth_ / 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = rows.begin(i), height = rows.begin(i + 1) - row;
        const Rows a = rows_from(row, height);
        pack_rows(a, row, row + height);
        for (std::int64_t j = 0; j < cols.pieces; ++j)
          block(a, row, height, first_col + cols.begin(j), cols.begin(j + 1) - cols.begin(j), shared_);
      }
    });
  }

  // Blocks of rows [first_row, ...) x columns [first_col, ...), counted in panels, to threads: runs of blocks that share
  // their columns, so that a thread reads its part of B from memory once.
  void blocks(const Rows& a, std::int64_t row_count, std::int64_t first_col, std::int64_t col_count, bool pack) {
    const Cut rows(row_count, std::max<std::int64_t>(1, block_rows / how_.panel_rows));
    const std::int64_t wanted = ceil_div(blocks_of_a_thread * threads(), pack ? 1 : rows.pieces);
    const std::int64_t most = std::max<std::int64_t>(1, std::min(block_cols / how_.panel_cols, col_count / wanted));
    const Cut cols(col_count, most);
    const std::int64_t runs = pack ? 1 : rows.pieces;  // a task that packs its columns does all rows
    const std::int64_t work = ceil_div(row_count, runs) * how_.panel_rows * most * how_.panel_cols * depth_ / 16;
    parallel_for(cols.pieces * runs, work, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t j = task / runs;
        const std::int64_t col = first_col + cols.begin(j), width = cols.begin(j + 1) - cols.begin(j);
        Panels b = shared_;
        if (pack) {
          b = cols_from(col, width);
          pack_cols(b, col, col + width);
        }
        const std::int64_t from = pack ? 0 : task % runs, to = pack ? rows.pieces : from + 1;
        for (std::int64_t i = from; i < to; ++i) {
          const std::int64_t row = a.first_panel + rows.begin(i), height = rows.begin(i + 1) - rows.begin(i);
          block(a, row, height, col, width, b);
        }
      }
    });
  }

  // `height` x `width` panels of C.
  void block(const Rows& rows_of_a, std::int64_t row_panel, std::int64_t height, std::int64_t col_panel, std::int64_t width,
             const Panels& b) const {
    const std::int64_t row = row_panel * how_.panel_rows, col = col_panel * how_.panel_cols;
    const std::int64_t rows = std::min(height * how_.panel_rows, call_.rows - row);
    const std::int64_t cols = std::min(width * how_.panel_cols, call_.cols - col);
    char* up;
    char* gate;
    std::int64_t stride;
    const char* a = rows_of_a.panels + (row_panel - rows_of_a.first_panel) * rows_of_a.bytes;
    const std::int64_t b_offset = (col_panel - b.first_panel) * b.bytes;
    if (all_ == nullptr && writes_sums_ && cols == width * how_.panel_cols) {
      const std::int64_t size = how_.accumulator_bytes;
      char* out = static_cast<char*>(call_.out) + (row * call_.out_stride + col) * size;
      multiply(a, rows_of_a.bytes, b.up + b_offset, b.bytes, rows, cols, cols, out, call_.out_stride);
      return;
    }
    if (all_ != nullptr) {
      stride = all_stride_;
      up = all_ + (row * stride + col) * how_.accumulator_bytes;
      gate = call_.gated ? up + padded_rows() * stride * how_.accumulator_bytes : nullptr;
    } else {
      stride = width * how_.panel_cols;
      const std::int64_t bytes = height * how_.panel_rows * stride * how_.accumulator_bytes;
      up = scratch_of<char>(ScratchUse::gemm_block, bytes * (call_.gated ? 2 : 1));
      gate = call_.gated ? up + bytes : nullptr;
    }
    multiply(a, rows_of_a.bytes, b.up + b_offset, b.bytes, rows, width * how_.panel_cols, cols, up, stride);
    if (gate != nullptr)
      multiply(a, rows_of_a.bytes, b.gate + b_offset, b.bytes, rows, width * how_.panel_cols, cols, gate, stride);
    if (depth_begin_ + depth_ < call_.depth) return;
    if (how_.rescale != nullptr) {
      how_.rescale(up, stride, rows, cols, row_scales_ + row, call_.up.scales + col);
      if (gate != nullptr) how_.rescale(gate, stride, rows, cols, row_scales_ + row, call_.gate.scales + col);
    }
    finish(up, gate, stride, row, rows, col, cols);
  }

  void multiply(const char* a, std::int64_t a_bytes, const char* b, std::int64_t b_bytes, std::int64_t rows,
                std::int64_t cols, std::int64_t used_cols, char* c, std::int64_t stride) const {
    std::int64_t k = 0;
    do {  // once at least: a product of no depth is zero
      const std::int64_t depth = std::min(how_.depth_block, depth_ - k);
      how_.multiply({a + k * how_.panel_rows * how_.a_bytes, a_bytes, a_row_bytes_, b + k * how_.panel_cols * how_.b_bytes, b_bytes, rows,
                     cols, depth, used_cols, c, stride, depth_begin_ + k > 0});
      k += depth;
    } while (k < depth_);
  }

  void finish(char* up, char* gate, std::int64_t stride, std::int64_t row, std::int64_t rows, std::int64_t col,
              std::int64_t cols) const {
    const auto size = static_cast<std::int64_t>(bytes_of(call_.number));
    const std::int64_t* out_rows = call_.out_rows == nullptr ? nullptr : call_.out_rows + row;
    // The first row and column of a block in a matrix whose rows the block's are one after the other, or scattered.
    const auto scattered = [&](auto* base, std::int64_t base_stride) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>, const char, char>;
      return base == nullptr ? nullptr : static_cast<Byte*>(base) + ((out_rows == nullptr ? row * base_stride : 0) + col) * size;
    };
    const auto at = [&](auto* base, std::int64_t base_stride) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>, const char, char>;
      return base == nullptr ? nullptr : static_cast<Byte*>(base) + (row * base_stride + col) * size;
    };
    const auto bias = [&](const void* base) {
      return base == nullptr ? nullptr : static_cast<const char*>(base) + col * how_.accumulator_bytes;
    };
    call_.kernels->epilogue[static_cast<int>(call_.number)](
        {up, gate, stride, rows, cols, bias(call_.bias), bias(call_.bias_gate), call_.activation,
         call_.row_weights == nullptr ? nullptr : static_cast<const char*>(call_.row_weights) + row * how_.accumulator_bytes,
         scattered(call_.residual, call_.residual_stride), call_.residual_stride, scattered(call_.out, call_.out_stride),
         call_.out_stride, out_rows, at(call_.pre, call_.cols), at(call_.pre_gate, call_.cols), call_.cols});
    if (call_.out_panels == nullptr) return;
    // The next product's A: what the epilogue left in the accumulators, at these rows and, as its depth, these columns.
    const GemmArithmetic& next = *call_.out_arithmetic;
    const std::int64_t bytes = next.a_panel_bytes(call_.cols);
    const int number = how_.accumulator_bytes == 8 ? static_cast<int>(Number::float64) : static_cast<int>(Number::float32);
    char* to = static_cast<char*>(call_.out_panels) + row / next.panel_rows * bytes + col * next.panel_rows * next.a_bytes;
    next.pack_a[number]({{up, static_cast<Number>(number), stride, 1}, rows, cols, to, bytes, nullptr, true});
  }

  const GemmCall& call_;
  const GemmArithmetic& how_;
  const std::int64_t row_panels_, col_panels_;
  const bool writes_sums_;
  const std::int64_t a_row_bytes_;  // 0: A is packed
  float* const row_scales_;
  char* all_ = nullptr;  // accumulators of all of C, where the depth is done in pieces
  std::int64_t all_stride_ = 0;
  std::int64_t depth_begin_ = 0, depth_ = 0;
  Panels shared_{};
};

}  // namespace

std::int64_t rows_at_once(const GemmArithmetic& arithmetic, std::int64_t depth) {
  const std::int64_t panels = std::max<std::int64_t>(1, shared_a_bytes / arithmetic.a_panel_bytes(depth));
  return std::max<std::int64_t>(panels * arithmetic.panel_rows, block_rows / arithmetic.panel_rows * arithmetic.panel_rows);
}

bool feeds(const GemmArithmetic& first, const GemmArithmetic& second) {
  const bool doubles = first.accumulator_bytes == 8;
  return second.rescale == nullptr && first.panel_rows == second.panel_rows && first.panel_cols % second.depth_step == 0 &&
         second.depth_step == 1 && second.pack_a[static_cast<int>(doubles ? Number::float64 : Number::float32)] != nullptr;
}

std::int64_t packed_bytes(const GemmArithmetic& arithmetic, std::int64_t cols, std::int64_t depth) {
  return ceil_div(cols, arithmetic.panel_cols) * arithmetic.b_panel_bytes(depth);
}

void pack_weights(const GemmArithmetic& arithmetic, const GemmOperand& operand, std::int64_t cols, std::int64_t depth,
                  void* panels, float* scales) {
  const std::int64_t bytes = arithmetic.b_panel_bytes(depth);
  parallel_for(ceil_div(cols, arithmetic.panel_cols), depth * arithmetic.panel_cols, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t col = begin * arithmetic.panel_cols, count = std::min(end * arithmetic.panel_cols, cols) - col;
    char* to = static_cast<char*>(panels) + begin * bytes;
    arithmetic.pack_b[static_cast<int>(operand.number)](
        {part_of(operand, col, 0), count, depth, to, bytes, scales == nullptr ? nullptr : scales + col, false});
  });
}

namespace {

GemmChoice chosen(Isa isa, const GemmKernels* kernels, const GemmArithmetic& arithmetic) {
  return {kernels, &arithmetic, isa, kernel_name(isa)};
}

}  // namespace

GemmChoice choose_gemm(Number number) {
  if (number == Number::float64) {  // double has kernels in the generic tier alone
    const GemmKernels* kernels = gemm_kernels_tiers.tables[0];
    return chosen(Isa::generic, kernels, kernels->doubles);
  }
  const auto [kernels, isa] = gemm_kernels_tiers.choose();
#if MMK_X86_TIERS
  if (active_isa() == Isa::amx) {
    if (number == Number::bfloat16) return chosen(Isa::amx, kernels, amx::gemm_tiles.bfloat16);
    if (number == Number::int8) return chosen(Isa::amx, kernels, amx::gemm_tiles.int8);
  }
#if !MMK_EMULATE_AVX512
  if (number == Number::bfloat16 && has_bf16_pairs()) return {kernels, &avx512_bf16::gemm_pairs, isa, bf16_pairs_name};
#endif
  if (isa == Isa::avx512 && number == Number::int8 && has_vnni()) {
    static const GemmArithmetic with_vnni = [](GemmArithmetic arithmetic) {
      arithmetic.multiply = vnni::multiply_int8;
      return arithmetic;
    }(kernels->int8_weights);
    return chosen(isa, kernels, with_vnni);
  }
#endif
  switch (number) {
    case Number::bfloat16:
      return chosen(isa, kernels, kernels->bfloat16_weights);
    case Number::float16:
      return chosen(isa, kernels, kernels->float16_weights);
    case Number::int8:
      return chosen(isa, kernels, kernels->int8_weights);
    default:
      return chosen(isa, kernels, kernels->floats);
  }
}

GemmChoice choose_gemm_unpacked(Number number) {
  // Half precision is widened when it is packed, unless its own products are multiplied.
  const bool own = number == Number::bfloat16 && (active_isa() == Isa::amx || has_bf16_pairs());
  const bool half = number == Number::bfloat16 || number == Number::float16;
  return choose_gemm(half && !own ? Number::float32 : number);
}

void gemm(const GemmCall& call) {
  if (call.rows > 0 && call.cols > 0) Product(call).run();
}

}  // namespace mmk
