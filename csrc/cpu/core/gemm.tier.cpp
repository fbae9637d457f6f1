// Matrix products of one tier: packing, the kernel over panels, the epilogue. gemm.h says what each is for.
#include "gemm.h"

#include "ahead.h"
#include "gemm_panels.h"
#include "math.h"
#include "quantise.h"

namespace mmk::MMK_TIER {

void multiply_int8(const GemmBlock&);  // gemm_int8.tier.cpp

namespace {

// --- packing ------------------------------------------------------------------------------------------------------------
// Packs `lanes` rows of a source whose depth is contiguous, `lanes` at most a vector's width, into to[k * step + row]: a
// vector of every row is loaded and the square transposed. Whole vectors are stored, so up to width - lanes elements after
// the last are written over, but for the last depth, which is stored as `last` lanes; rows beyond `lanes` are zero. As many
// lines of `ahead` are looked at as lines are read.
template <class A, class T, class S>
inline void pack_rows(const T* from, int64_t stride, int64_t lanes, int64_t depth, S* to, int64_t step, int64_t last,
                      LinesAhead ahead = {}) {
  using V = Vec<A>;
  using Register = typename V::Register;
  constexpr int width = V::width;
  int64_t k = 0;
  for (; k + width <= depth; k += width) {
    Register rows[width];
    constexpr int rows_of_line = width * sizeof(T) >= 64 ? 1 : 64 / (width * sizeof(T));
    for (int i = 0; i < width; ++i) {
      rows[i] = i < lanes ? V::load(from + i * stride + k) : V::zero();
      if (i % rows_of_line == 0) ahead.look();
    }
    V::transpose(rows);
    for (int i = 0; i < width - 1; ++i) V::store(to + (k + i) * step, rows[i]);
    store_lanes<A>(to + (k + width - 1) * step, rows[width - 1], k + width == depth ? last : width);
  }
  if (k < depth) {
    Register rows[width];
    for (int i = 0; i < width; ++i) rows[i] = i < lanes ? load_part<A>(from + i * stride + k, depth - k) : V::zero();
    V::transpose(rows);
    for (int64_t i = 0; k + i < depth; ++i) store_lanes<A>(to + (k + i) * step, rows[i], k + i + 1 == depth ? last : width);
  }
}

// Packs a source whose rows (or columns) are contiguous: nothing is to be transposed. `lanes` of them go into each panel, one
// `step` a depth. The source is read a few of its own lines at a time, so that neither they nor the panels' heads leave the
// first-level cache before they are done.
template <class A, class T, class S>
inline void pack_lines(const GemmPack& call, int64_t lanes, int64_t step) {
  using V = Vec<A>;
  constexpr int64_t group = 24, lines = 16;
  const T* from = static_cast<const T*>(call.source.data);
  const int64_t panels = ceil_div(call.count, lanes);
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t last = first + group < panels ? first + group : panels;
    for (int64_t begin = 0; begin < call.depth; begin += lines) {
      const int64_t end = begin + lines < call.depth ? begin + lines : call.depth;
      for (int64_t panel = first; panel < last; ++panel) {
        S* to = reinterpret_cast<S*>(static_cast<char*>(call.panels) + panel * call.panel_bytes);
        const int64_t left = call.count - panel * lanes;
        for (int64_t k = begin; k < end; ++k) {
          const T* line = from + k * call.source.depth_stride + panel * lanes;
          for (int64_t i = 0; i < lanes; i += V::width) {
            // A whole vector may reach beyond the panel, where the next depth is written over it, but not beyond the source.
            if (i + V::width <= left) {
              V::store(to + k * step + i, V::load(line + i));
            } else {
              V::store(to + k * step + i, load_part<A>(line + i, left > i ? left - i : 0));
            }
          }
        }
      }
    }
  }
}

template <class A, class T>
void pack_a(const GemmPack& call) {
  const GemmOperand& source = call.source;
  if (source.depth_stride != 1) return pack_lines<A, T, A>(call, panel_rows, panel_rows);
  const T* from = static_cast<const T*>(source.data);
  for (int64_t row = 0; row < call.count; row += panel_rows) {
    A* panel = reinterpret_cast<A*>(static_cast<char*>(call.panels) + row / panel_rows * call.panel_bytes);
    const int64_t lanes = call.count - row < panel_rows ? call.count - row : panel_rows;
    for (int64_t i = 0; i < lanes; i += Vec<A>::width) {
      const int64_t part = lanes - i < Vec<A>::width ? lanes - i : Vec<A>::width;
      pack_rows<A>(from + (row + i) * source.stride, source.stride, part, call.depth, panel + i, panel_rows,
                   call.exact && i + Vec<A>::width > panel_rows ? panel_rows - i : Vec<A>::width);
    }
  }
}

// S: what the panels hold, accumulators or the half precision that the source has.
template <class A, class T, class S = A>
void pack_b(const GemmPack& call) {
  constexpr int width = Vec<A>::width;
  const GemmOperand& source = call.source;
  if (source.depth_stride != 1) return pack_lines<A, T, S>(call, panel_cols<A>, panel_cols<A>);
  const T* from = static_cast<const T*>(source.data);
  // Half a panel at a time; where the columns end in a first half, the second is zero.
  const int64_t halves = (call.count + panel_cols<A> - 1) / panel_cols<A> * 2;
  for (int64_t half = 0; half < halves; ++half) {
    const int64_t col = half * width, left = call.count - col;
    S* to = reinterpret_cast<S*>(static_cast<char*>(call.panels) + half / 2 * call.panel_bytes) + half % 2 * width;
    const T* columns = from + col * source.stride;
    // Those of the next half come from memory, where this one's tiles touch only the beginnings of lines far apart.
    const LinesAhead ahead{reinterpret_cast<const char*>(columns + width * source.stride),
                           source.stride * static_cast<int64_t>(sizeof(T)), call.depth * static_cast<int64_t>(sizeof(T)),
                           least(left - width, width)};
    pack_rows<A>(columns, source.stride, left < 0 ? 0 : least(left, width), call.depth, to, panel_cols<A>, width, ahead);
  }
}

// --- the kernel ---------------------------------------------------------------------------------------------------------
// One panel of A times one of B: rows x 2 vectors of accumulators in registers, or x 1 where the second has no columns.
// `Elements` says where those of A are.
template <int rows, int vectors, class A, class Elements>
inline void multiply_panels(Elements a, const A* b, int64_t depth, A* c, int64_t c_stride, bool accumulate) {
  using V = Vec<A>;
  using Register = typename V::Register;
  Register sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = V::zero();
  for (int64_t k = 0; k < depth; ++k) {
    Register of_b[vectors];
    for (int j = 0; j < vectors; ++j) of_b[j] = V::load(b + j * V::width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Register element = V::set(*a.at(i));
      for (int j = 0; j < vectors; ++j) sums[i][j] = V::fma(element, of_b[j], sums[i][j]);
    }
    a.next();
    b += panel_cols<A>;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    A* to = c + i * c_stride;
    for (int j = 0; j < vectors; ++j)
      V::store(to + j * V::width, accumulate ? V::load(to + j * V::width) + sums[i][j] : sums[i][j]);
  }
}

template <class A>
void multiply(const GemmBlock& call) {
  for_each_panel_pair(
      call, panel_cols<A>, panel_cols<A> * static_cast<int64_t>(sizeof(A)), [](const char* panel) { return reinterpret_cast<const A*>(panel); },
      [&](const char* a, const A* b, int64_t row, int64_t col, int64_t count) {
        with_elements_of_a<A, 1>(call, a, [&](auto elements) {
          with_tile<A>(count, call.used_cols - col, [&]<int rows, int vectors>() {
            multiply_panels<rows, vectors, A>(elements, b, call.depth, static_cast<A*>(call.c) + row * call.c_stride + col,
                                              call.c_stride, call.accumulate);
          });
        });
      });
}

// B in half precision is widened a panel at a time, into the first-level cache.
template <class T>
void multiply_half(const GemmBlock& call) {
  using V = Vec<float>;
  constexpr int cols = panel_cols<float>;
  alignas(64) float panel[depth_block * cols];
  for_each_panel_pair(
      call, cols, cols * static_cast<int64_t>(sizeof(T)),
      [&](const char* from) {
        const T* half = reinterpret_cast<const T*>(from);
        for (int64_t i = 0; i < call.depth * cols; i += V::width) V::store(panel + i, V::load(half + i));
        return static_cast<const float*>(panel);
      },
      [&](const char* a, const float* b, int64_t row, int64_t col, int64_t count) {
        with_tile<float>(count, call.used_cols - col, [&]<int rows, int vectors>() {
          multiply_panels<rows, vectors, float>(InPanel<float, 1>{reinterpret_cast<const float*>(a)}, b, call.depth,
                                                static_cast<float*>(call.c) + row * call.c_stride + col, call.c_stride,
                                                call.accumulate);
        });
      });
}

// --- int8 ---------------------------------------------------------------------------------------------------------------
template <class T>
void pack_a_int8(const GemmPack& call) {
  const GemmOperand& source = call.source;
  for (int64_t row = 0; row < call.count; ++row) {
    const T* from = static_cast<const T*>(source.data) + row * source.stride;
    int16_t* to = reinterpret_cast<int16_t*>(static_cast<char*>(call.panels) + row / panel_rows * call.panel_bytes) +
                  row % panel_rows * 2;
    call.scales[row] = scale_of(from, source.depth_stride, call.depth);
    const auto put = [&](int64_t k, int32_t value) { to[k / 2 * 2 * panel_rows + k % 2] = static_cast<int16_t>(value); };
    quantise(from, source.depth_stride, call.depth, call.scales[row], put);
    if (call.depth % 2 != 0) put(call.depth, 0);
  }
}

template <class T>
void pack_b_int8(const GemmPack& call) {
  constexpr int cols = panel_cols<float>;
  const GemmOperand& source = call.source;
  for (int64_t col = 0; col < rounded_up(call.count, cols); ++col) {
    int8_t* to = reinterpret_cast<int8_t*>(static_cast<char*>(call.panels) + col / cols * call.panel_bytes) + col % cols * 2;
    const auto put = [&](int64_t k, int32_t value) { to[k / 2 * 2 * cols + k % 2] = static_cast<int8_t>(value); };
    if (col < call.count) {
      const T* from = static_cast<const T*>(source.data) + col * source.stride;
      call.scales[col] = scale_of(from, source.depth_stride, call.depth);
      quantise(from, source.depth_stride, call.depth, call.scales[col], put);
    } else {
      for (int64_t k = 0; k < call.depth; ++k) put(k, 0);
    }
    if (call.depth % 2 != 0) put(call.depth, 0);
  }
}

// --- epilogue -----------------------------------------------------------------------------------------------------------
template <class T, Activation activation>
void epilogue_of(const GemmEpilogue& call) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  for (int64_t row = 0; row < call.rows; ++row) {
    A* up = static_cast<A*>(call.up) + row * call.stride;
    const A* gate = call.gate == nullptr ? nullptr : static_cast<const A*>(call.gate) + row * call.stride;
    const A* bias = static_cast<const A*>(call.bias);
    const A* bias_gate = static_cast<const A*>(call.bias_gate);
    const int64_t to = call.out_rows == nullptr ? row : call.out_rows[row];
    const A* weight = call.row_weights == nullptr ? nullptr : static_cast<const A*>(call.row_weights) + row;
    const T* residual = call.residual == nullptr ? nullptr : static_cast<const T*>(call.residual) + to * call.residual_stride;
    T* out = call.out == nullptr ? nullptr : static_cast<T*>(call.out) + to * call.out_stride;
    T* pre = call.pre == nullptr ? nullptr : static_cast<T*>(call.pre) + row * call.pre_stride;
    T* pre_gate = call.pre_gate == nullptr ? nullptr : static_cast<T*>(call.pre_gate) + row * call.pre_stride;
    for_each_vector<A>(call.cols, [&](int64_t col, int64_t lanes) {
      Register value = V::load(up + col);  // the accumulators are there for whole panels
      if (bias != nullptr) value = value + load_lanes<A>(bias + col, lanes);
      if (pre != nullptr) store_lanes<A>(pre + col, value, lanes);
      if (gate == nullptr) {
        value = activate<activation, A>(value);
      } else {
        Register of_gate = V::load(gate + col);
        if (bias_gate != nullptr) of_gate = of_gate + load_lanes<A>(bias_gate + col, lanes);
        if (pre_gate != nullptr) store_lanes<A>(pre_gate + col, of_gate, lanes);
        value = activate<activation, A>(of_gate) * value;
      }
      if (weight != nullptr) value = value * V::set(*weight);
      if (residual != nullptr) value = value + load_lanes<A>(residual + col, lanes);
      if (out != nullptr) {
        store_lanes<A>(out + col, value, lanes);
      } else {
        V::store(up + col, value);
      }
    });
  }
}

// f with the activation as a constant.
template <class F>
inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::quick_gelu:
      return f.template operator()<Activation::quick_gelu>();
  }
}

template <class T>
void epilogue(const GemmEpilogue& call) {
  with_activation(call.activation, [&]<Activation activation>() { epilogue_of<T, activation>(call); });
}

// --- gradients ------------------------------------------------------------------------------------------------------------
template <class T, Activation activation>
void activation_gradient_of(const ActivationGradient& call, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  using Register = typename V::Register;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * call.cols;
    const T* grad = static_cast<const T*>(call.grad) + row * call.grad_stride;
    const A* wide_grad = static_cast<const A*>(call.grad) + row * call.grad_stride;
    const T* pre = static_cast<const T*>(call.pre) + at;
    const T* up = call.up == nullptr ? nullptr : static_cast<const T*>(call.up) + at;
    T* grad_pre = static_cast<T*>(call.grad_pre) + at;
    T* grad_up = call.grad_up == nullptr ? nullptr : static_cast<T*>(call.grad_up) + at;
    T* hidden = call.hidden == nullptr ? nullptr : static_cast<T*>(call.hidden) + at;
    const bool weighted = call.row_weights != nullptr;
    const Register weight = V::set(weighted ? static_cast<const A*>(call.row_weights)[row] : A(1));
    Register dot = V::zero();
    for_each_vector<A>(call.cols, [&](int64_t col, int64_t lanes) {
      Register upstream = call.wide_grad ? load_lanes<A>(wide_grad + col, lanes) : load_lanes<A>(grad + col, lanes);
      const Register x = load_lanes<A>(pre + col, lanes);
      Register slope = activate_gradient<activation, A>(x);
      const bool wanted = hidden != nullptr || call.row_dots != nullptr;
      Register value = up != nullptr || wanted ? activate<activation, A>(x) : x, activated = value;
      if (up != nullptr) {
        const Register other = load_lanes<A>(up + col, lanes);
        activated = value * other;
        slope = slope * other;
      }
      // Lanes beyond the row are zeros in both factors.
      if (call.row_dots != nullptr) dot = V::fma(upstream, activated, dot);
      if (weighted) {
        upstream = upstream * weight;
        activated = activated * weight;
      }
      if (up != nullptr) store_lanes<A>(grad_up + col, upstream * value, lanes);
      if (hidden != nullptr) store_lanes<A>(hidden + col, activated, lanes);
      store_lanes<A>(grad_pre + col, upstream * slope, lanes);
    });
    if (call.row_dots != nullptr) static_cast<A*>(call.row_dots)[row] = V::sum(dot);
  }
}

template <class T>
void activation_gradient(const ActivationGradient& call, int64_t begin, int64_t end) {
  with_activation(call.activation, [&]<Activation activation>() { activation_gradient_of<T, activation>(call, begin, end); });
}

template <class T>
void column_sums(const void* from, int64_t stride, int64_t begin, int64_t end, int64_t cols, const void* row_weights, void* sums) {
  using A = accumulator_t<T>;
  using V = Vec<A>;
  A* to = static_cast<A*>(sums);
  memset(to, 0, static_cast<size_t>(cols) * sizeof(A));
  for (int64_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(from) + row * stride;
    const typename V::Register weight = V::set(row_weights == nullptr ? A(1) : static_cast<const A*>(row_weights)[row]);
    for_each_vector<A>(cols, [&](int64_t col, int64_t lanes) {
      store_lanes<A>(to + col, V::fma(load_lanes<A>(values + col, lanes), weight, load_lanes<A>(to + col, lanes)), lanes);
    });
  }
}

// --- tables -------------------------------------------------------------------------------------------------------------
template <class A>
constexpr GemmArithmetic arithmetic_of(int64_t b_bytes, void (*multiply)(const GemmBlock&)) {
  return {panel_rows,
          panel_cols<A>,
          depth_block,
          1,
          sizeof(A),
          b_bytes,
          (Vec<A>::width - panel_rows % Vec<A>::width) % Vec<A>::width * static_cast<int64_t>(sizeof(A)),
          sizeof(A),
          true,
          b_bytes == sizeof(A),
          {},
          {},
          multiply,
          nullptr};
}

constexpr GemmArithmetic floats() {
  GemmArithmetic result = arithmetic_of<float>(sizeof(float), multiply<float>);
  result.pack_a[0] = pack_a<float, float>;
  result.pack_a[1] = pack_a<float, bfloat16>;
  result.pack_a[2] = pack_a<float, float16>;
  result.pack_b[0] = pack_b<float, float>;
  result.pack_b[1] = pack_b<float, bfloat16>;
  result.pack_b[2] = pack_b<float, float16>;
  return result;
}

template <class T>
constexpr GemmArithmetic half_weights() {
  GemmArithmetic result = floats();
  result.b_bytes = sizeof(T);
  result.multiply = multiply_half<T>;
  result.reads_rows = false;
  for (auto& pack : result.pack_b) pack = nullptr;
  return result;
}

constexpr GemmArithmetic bfloat16_weights() {
  GemmArithmetic result = half_weights<bfloat16>();
  result.pack_b[1] = pack_b<float, bfloat16, bfloat16>;
  return result;
}

constexpr GemmArithmetic float16_weights() {
  GemmArithmetic result = half_weights<float16>();
  result.pack_b[2] = pack_b<float, float16, float16>;
  return result;
}

constexpr GemmArithmetic int8_weights() {
  GemmArithmetic result = arithmetic_of<float>(sizeof(int8_t), multiply_int8);
  result.depth_step = 2;
  result.a_bytes = sizeof(int16_t);
  result.a_slack = 0;
  result.rows_exact = false;  // nor are they floats yet
  result.pack_a[0] = pack_a_int8<float>;
  result.pack_a[1] = pack_a_int8<bfloat16>;
  result.pack_a[2] = pack_a_int8<float16>;
  result.pack_b[0] = pack_b_int8<float>;
  result.pack_b[1] = pack_b_int8<bfloat16>;
  result.pack_b[2] = pack_b_int8<float16>;
  result.rescale = rescale_int8;
  return result;
}

constexpr GemmArithmetic doubles() {
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
  GemmArithmetic result = arithmetic_of<double>(sizeof(double), multiply<double>);
  result.pack_a[3] = pack_a<double, double>;
  result.pack_b[3] = pack_b<double, double>;
  return result;
#else
  return {};
#endif
}

}  // namespace

const GemmKernels gemm_kernels = {
    floats(),
    bfloat16_weights(),
    float16_weights(),
    int8_weights(),
    doubles(),
#if MMK_TIER_ID(MMK_TIER) == MMK_TIER_IS_generic
    {epilogue<float>, epilogue<bfloat16>, epilogue<float16>, epilogue<double>},
    {activation_gradient<float>, activation_gradient<bfloat16>, activation_gradient<float16>, activation_gradient<double>},
    {column_sums<float>, column_sums<bfloat16>, column_sums<float16>, column_sums<double>},
#else
    {epilogue<float>, epilogue<bfloat16>, epilogue<float16>, nullptr},
    {activation_gradient<float>, activation_gradient<bfloat16>, activation_gradient<float16>, nullptr},
    {column_sums<float>, column_sums<bfloat16>, column_sums<float16>, nullptr},
#endif
};

}  // namespace mmk::MMK_TIER
