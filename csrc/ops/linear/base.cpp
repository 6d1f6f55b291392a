#include "ops/linear/base.h"

#include "core/binding.h"
#include "core/gpu.h"
#include "cpu/bfloat16.h"

namespace segtrain {

int Base::out() const {
  return weight.shape(0);
}
int Base::in() const {
  return scales ? weight.shape(1) * 32 / bits : weight.shape(1);
}

namespace {

/// A quantization mode. `code` is the value of MODE in cuda/dequantize.cu. The scales are floats in modes
/// that have biases, and bytes in the other modes.
struct Mode {
  std::string name;
  std::vector<int> bits, groups;
  int code;
  bool float_scales;
};

/// The quantization modes that mx::quantize supports.
const std::vector<Mode> MODES{{"affine", {2, 3, 4, 5, 6, 8}, {32, 64, 128}, 0, true},
                              {"mxfp4", {4}, {32}, 1, false},
                              {"mxfp8", {8}, {32}, 2, false},
                              {"nvfp4", {4}, {16}, 3, false}};
constexpr int DENSE = 4;  ///< the code of a weight that is not quantized

std::vector<Mode>::const_iterator mode_of(const Base& base) {
  return std::find_if(MODES.begin(), MODES.end(), [&](const Mode& mode) { return mode.name == base.mode; });
}

void check_quantization(const std::string& op, const Base& base) {
  std::ostringstream text;
  text << base.mode << " at " << base.bits << " bits in groups of " << base.group_size;
  auto given = text.str();
  auto has = [](const std::vector<int>& all, int x) {
    return std::find(all.begin(), all.end(), x) != all.end();
  };
  auto list = [](const std::vector<int>& all) {
    std::string names;
    for (int x : all) names += (names.empty() ? "" : ", ") + std::to_string(x);
    return names;
  };
  auto mode = mode_of(base);
  check(mode != MODES.end(), "[", op, "] the quantization mode must be affine, mxfp4, mxfp8 or nvfp4; got ",
        given, ".");
  check(has(mode->bits, base.bits) && has(mode->groups, base.group_size), "[", op, "] ", base.mode,
        " supports bits ", list(mode->bits), " and groups of ", list(mode->groups), "; got ", given, ".");
  check(base.weight.dtype() == mx::uint32, "[", op, "] a weight quantized as ", given,
        " must be uint32; got ", base.weight.dtype(), ".");
  const auto& scales = *base.scales;
  bool floats = mode->float_scales;
  check(floats ? mx::issubdtype(scales.dtype(), mx::floating) : scales.dtype() == mx::uint8, "[", op,
        "] scales of ", given, " must be ", floats ? "floating" : "uint8", "; got ", scales.dtype(), ".");
  check(scales.ndim() == 2 && scales.shape(0) == base.out() && scales.shape(1) * base.group_size == base.in(),
        "[", op, "] scales ", scales.shape(), " do not fit weight ", base.weight.shape(), " quantized as ",
        given, ".");
  if (floats)
    check(base.biases && base.biases->shape() == scales.shape() &&
              mx::issubdtype(base.biases->dtype(), mx::floating),
          "[", op, "] ", given, " needs floating biases with the shape of the scales.");
  else
    check(!base.biases, "[", op, "] ", given, " must not have biases.");
}

}  // namespace

void check_base(const std::string& op, const Base& base) {
  check(base.weight.ndim() == 2, "[", op, "] expected a weight [out, in]; got ", base.weight.shape(), ".");
  if (base.scales) {
    check_quantization(op, base);
  } else {
    check(mx::issubdtype(base.weight.dtype(), mx::floating), "[", op,
          "] a dense weight must be floating; got ", base.weight.dtype(), ".");
  }
  check(!base.bias || (base.bias->ndim() == 1 && base.bias->shape(0) == base.out()), "[", op,
        "] bias must be [", base.out(), "].");
}

Arrays primals_of(const mx::array& x, const std::vector<Linear>& linears) {
  Arrays all{x};
  for (const auto& linear : linears)
    if (linear.a) all.insert(all.end(), {*linear.a, *linear.b});
  return all;
}

CpuBase::CpuBase(const Base& base)
    : arrays{base.weight},
      bits(base.bits),
      group(base.group_size),
      n(base.out()),
      k(base.in()),
      dense(!base.scales),
      affine(base.biases.has_value()),
      rounded(cpu::rounds_products()) {
  if (!dense) arrays.push_back(*base.scales);
  if (affine) arrays.push_back(*base.biases);
}

cpu::Weight CpuBase::weight(const Inputs& in, int first) const {
  if (dense) return {in[first], nullptr, nullptr, nullptr, 0, 0, n, k, rounded};
  auto biases = affine ? in[first + 2] : nullptr;
  return {nullptr, in.as<uint32_t>(first), in.at(first + 1), biases, bits, group, n, k, rounded};
}

std::string unpack_unfit(const std::vector<Base>& bases, mx::Dtype dtype) {
  const auto& first = bases[0];
  auto way = gpu_kernel("dequantize", gpu() == Gpu::cuda ? "" : "it needs CUDA");
  if (!way.ok) return way.reason;
  if (dtype != mx::float32 && dtype != mx::float16 && dtype != mx::bfloat16)
    return "its output must be float32, float16 or bfloat16";
  if (bases.size() > 3) return "it supports up to three weights";
  for (const auto& base : bases) {
    if (base.in() != first.in() || base.in() % 8) return "the widths differ or are not multiples of 8";
    bool alike = base.weight.dtype() == first.weight.dtype() && base.mode == first.mode &&
                 base.bits == first.bits && base.group_size == first.group_size &&
                 base.scales.has_value() == first.scales.has_value() &&
                 (!base.scales || base.scales->dtype() == first.scales->dtype()) &&
                 (!base.biases || base.biases->dtype() == first.scales->dtype());
    if (!alike) return "the weights must have the same format";
  }
  return "";
}

namespace {

Template unpack_arguments(const Base& base, mx::Dtype dtype) {
  return {{"T", dtype},
          {"MODE", base.scales ? mode_of(base)->code : DENSE},
          {"BITS", base.scales ? base.bits : 32},
          {"GROUP", base.scales ? base.group_size : 32}};
}

}  // namespace

UnpackTable unpack_table(const Base& base, mx::Dtype dtype) {
  const auto scales = base.scales.value_or(base.weight);
  return {{{"w", base.weight}, {"scales", scales}, {"biases", base.biases.value_or(scales)}},
          unpack_arguments(base, dtype)};
}

mx::array unpack(const std::vector<Base>& bases, mx::Dtype dtype, const std::optional<mx::array>& columns,
                 const std::optional<mx::array>& rows, mx::StreamOrDevice s) {
  const auto& first = bases[0];
  const int k = first.in(), beside = columns ? columns->shape(1) : 0, below = rows ? rows->shape(0) : 0;
  std::vector<int32_t> at;
  std::map<std::string, mx::array> values{{"columns", columns.value_or(first.weight)},
                                          {"rows", rows.value_or(first.weight)}};
  int n = 0;
  for (size_t i = 0; i < 3; ++i) {
    const auto& base = bases[std::min(i, bases.size() - 1)];
    at.push_back(i < bases.size() ? base.out() : 0);
    n += at.back();
    auto number = std::to_string(i);
    auto scales = base.scales.value_or(base.weight);
    values.insert({{"w" + number, base.weight},
                   {"scales" + number, scales},
                   {"biases" + number, base.biases.value_or(scales)}});
  }
  at.insert(at.end(), {k, beside, below});
  values.insert({"at", device_ints(at)});
  int groups = tiles((n + below) * ((k + beside) / 8), 512);
  return launch("dequantize", values, {{n + below, k + beside}}, {dtype}, unpack_arguments(first, dtype),
                {{groups, 1, 1}, 256}, s)[0];
}

mx::array dequantize(const Base& base, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_base("dequantize", base);
  check(base.scales.has_value(), "[dequantize] the weight is not quantized.");
  if (!on_cpu(s)) {
    if (unpack_unfit({base}, dtype).empty()) return unpack({base}, dtype, std::nullopt, std::nullopt, s);
    return mx::astype(mx::dequantize(base.weight, *base.scales, base.biases, base.group_size, base.bits,
                                     base.mode, std::nullopt, std::nullopt, s),
                      dtype, s);
  }
  CpuBase w(base);
  auto y = cpu_op(
      "dequantize", w.arrays, {{w.n, w.k}},
      [w](auto& in, auto& out) { cpu::dequantize(w.weight(in, 0), out[0]); }, s);
  return mx::astype(y[0], dtype, s);
}

mx::array matmul(const mx::array& a, const mx::array& b, bool ta, bool tb, float alpha,
                 mx::StreamOrDevice s) {
  int nd = a.ndim();
  check(nd >= 2 && static_cast<int>(b.ndim()) == nd &&
            std::equal(a.shape().begin(), a.shape().end() - 2, b.shape().begin(), b.shape().end() - 2),
        "[matmul] a and b must agree in all axes except the last two; got ", a.shape(), " and ", b.shape(),
        ".");
  int m = a.shape(ta ? -1 : -2), k = a.shape(ta ? -2 : -1), n = b.shape(tb ? -2 : -1);
  check(b.shape(tb ? -1 : -2) == k, "[matmul] inner sizes differ: ", a.shape(), " and ", b.shape(), ".");
  if (!on_cpu(s)) {
    auto y = mx::matmul(ta ? mx::swapaxes(a, -1, -2, s) : a, tb ? mx::swapaxes(b, -1, -2, s) : b, s);
    return alpha == 1 ? y : mx::multiply(y, mx::array(alpha, y.dtype()), s);
  }
  mx::Shape shape(a.shape().begin(), a.shape().end() - 2);
  int batch = 1;
  for (int d : shape) batch *= d;
  shape.push_back(m);
  shape.push_back(n);
  auto y = cpu_op(
      "matmul", {a, b}, {shape},
      [=](auto& in, auto& out) { cpu::matmul(ta, tb, batch, m, n, k, alpha, in[0], in[1], out[0]); }, s);
  return mx::astype(y[0], a.dtype(), s);
}

mx::array stock_product(const mx::array& x, const Base& base, bool transpose, mx::StreamOrDevice s) {
  if (!base.scales) return matmul(x, mx::astype(base.weight, x.dtype(), s), false, transpose, 1, s);
  // On CUDA, MLX's quantized matrix multiplication is four times slower than dequantizing the weight once and
  // calling cuBLAS, and its kernel takes minutes to compile. On Metal it is as fast as a dense matrix
  // multiplication.
  bool whole = x.size() / x.shape(-1) >= 16 && on_cuda(s);
  if (whole) return matmul(x, dequantize(base, x.dtype(), s), false, transpose, 1, s);
  // On the CPU, x is cast to float32, because MLX accumulates half-precision matrix products in half
  // precision.
  auto y = mx::quantized_matmul(on_cpu(s) ? f32(x, s) : x, base.weight, *base.scales, base.biases, transpose,
                                base.group_size, base.bits, base.mode, s);
  return mx::astype(y, x.dtype(), s);
}

bool has_bfloat16_products() {
  return cpu::bfloat16();
}

bool set_bfloat16_products(bool on) {
  check(!on || has_bfloat16_products(), "This processor has no AVX512-BF16 instructions.");
  return cpu::set_rounds_products(on);
}

bool is_bfloat16_products() {
  return cpu::rounds_products();
}

const Binding base_binding([](nb::module_& m) {
  m.def("has_bfloat16_products", &has_bfloat16_products,
        "Returns whether this machine's CPU has the instructions (AVX512-BF16) for set_bfloat16_products.");
  m.def("set_bfloat16_products", &set_bfloat16_products, "on"_a,
        "Sets whether products with frozen weights on a CPU round their factors to bfloat16, and returns the "
        "previous setting.");
  m.def("is_bfloat16_products", &is_bfloat16_products,
        "Returns the value that was last passed to set_bfloat16_products.");
  nb::class_<Base>(m, "Base",
                   "A frozen weight [out, in]: dense, or quantized in the format of `mx.quantize`.")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>, std::optional<mx::array>,
                    int, int, std::string>(),
           "weight"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "bias"_a = nb::none(), nb::kw_only(),
           "group_size"_a = 0, "bits"_a = 0, "mode"_a = "affine")
      .def_ro("weight", &Base::weight)
      .def_ro("scales", &Base::scales)
      .def_ro("biases", &Base::biases)
      .def_ro("bias", &Base::bias)
      .def_ro("group_size", &Base::group_size)
      .def_ro("bits", &Base::bits)
      .def_ro("mode", &Base::mode)
      .def_prop_ro("out_dims", &Base::out)
      .def_prop_ro("in_dims", &Base::in);

  nb::class_<Linear>(m, "Linear", "A frozen weight and its low-rank update: x·Wᵀ + bias + scale·(x·a)·b.")
      .def(nb::init<Base, std::optional<mx::array>, std::optional<mx::array>, float>(), "base"_a,
           "a"_a = nb::none(), "b"_a = nb::none(), "scale"_a = 1.0f)
      .def_ro("base", &Linear::base)
      .def("with_factors", &Linear::with_factors, "a"_a, "b"_a,
           "Returns a copy of this layer with other factors.")
      .def_ro("a", &Linear::a)
      .def_ro("b", &Linear::b)
      .def_ro("scale", &Linear::scale);
  m.def("dequantize", &dequantize, "base"_a, "dtype"_a = mx::float32, nb::kw_only(), "stream"_a = nb::none(),
        "Returns a weight as a dense array [out, in].");
});

}  // namespace segtrain
