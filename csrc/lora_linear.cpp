// y = x·Wᵀ + bias + scale·(x·A)·B with W frozen.
//   dx = dy·W + u·Aᵀ, dA = xᵀ·u, dB = zᵀ·dy   with u = scale·dy·Bᵀ, z = scale·x·A  (both [rows, R],
//   recomputed)
// With dropout p, x·A reads mask∘x and scale is scale / (1 − p); then dx = dy·W + mask∘(u·Aᵀ), dA =
// (mask∘x)ᵀ·u. The mask is drawn again from its key.
#include "base.h"

namespace segtrain {

int Base::out() const {
  return weight.shape(0);
}
int Base::in() const {
  return scales ? weight.shape(1) * 32 / bits : weight.shape(1);
}

namespace {

/// What MLX quantizes to, and no more.
void check_quantization(const std::string& op, const Base& base) {
  struct Mode {
    std::vector<int> bits, groups;
  };
  static const std::map<std::string, Mode> modes{{"affine", {{2, 3, 4, 5, 6, 8}, {32, 64, 128}}},
                                                 {"mxfp4", {{4}, {32}}},
                                                 {"mxfp8", {{8}, {32}}},
                                                 {"nvfp4", {{4}, {16}}}};
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
  auto mode = modes.find(base.mode);
  check(mode != modes.end(), "[", op, "] the quantization mode must be affine, mxfp4, mxfp8 or nvfp4; got ",
        given, ".");
  const auto& [bits, groups] = mode->second;
  check(has(bits, base.bits) && has(groups, base.group_size), "[", op, "] ", base.mode, " takes bits ",
        list(bits), " and groups of ", list(groups), "; got ", given, ".");
  check(base.weight.dtype() == mx::uint32, "[", op, "] a weight quantized as ", given,
        " must be uint32; got ", base.weight.dtype(), ".");
  const auto& scales = *base.scales;
  bool affine = base.mode == "affine";
  check(affine ? mx::issubdtype(scales.dtype(), mx::floating) : scales.dtype() == mx::uint8, "[", op,
        "] scales of ", given, " must be ", affine ? "floating" : "uint8", "; got ", scales.dtype(), ".");
  check(scales.ndim() == 2 && scales.shape(0) == base.out() && scales.shape(1) * base.group_size == base.in(),
        "[", op, "] scales ", scales.shape(), " do not fit weight ", base.weight.shape(), " quantized as ",
        given, ".");
  if (affine)
    check(base.biases && base.biases->shape() == scales.shape() &&
              mx::issubdtype(base.biases->dtype(), mx::floating),
          "[", op, "] ", given, " needs floating biases of the shape of the scales.");
  else
    check(!base.biases, "[", op, "] ", given, " has no biases.");
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

CpuBase::CpuBase(const Base& base, mx::StreamOrDevice s)
    : bits(base.bits),
      group(base.group_size),
      n(base.out()),
      k(base.in()),
      dense(!base.scales),
      affine(base.biases.has_value()) {
  if (dense)
    arrays = {f32(base.weight, s)};
  else if (affine)
    arrays = {base.weight, f32(*base.scales, s), f32(*base.biases, s)};
  else
    arrays = {base.weight, *base.scales};
}

cpu::Weight CpuBase::weight(const std::vector<const void*>& in, int first) const {
  auto real = [&](int i) { return static_cast<const float*>(in[first + i]); };
  if (dense) return {real(0), nullptr, nullptr, nullptr, 0, 0, n, k};
  return {nullptr,
          static_cast<const uint32_t*>(in[first]),
          in[first + 1],
          affine ? real(2) : nullptr,
          bits,
          group,
          n,
          k};
}

mx::array dequantize(const Base& base, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_base("dequantize", base);
  check(base.scales.has_value(), "[dequantize] the weight is not quantized.");
  if (!on_cpu(s))
    return mx::astype(mx::dequantize(base.weight, *base.scales, base.biases, base.group_size, base.bits,
                                     base.mode, std::nullopt, std::nullopt, s),
                      dtype, s);
  CpuBase w(base, s);
  auto y = cpu_op(
      "dequantize", w.arrays, {{w.n, w.k}}, {mx::float32},
      [w](auto& in, auto& out) { cpu::dequantize(w.weight(in, 0), (float*)out[0]); }, s);
  return mx::astype(y[0], dtype, s);
}

mx::array matmul(const mx::array& a, const mx::array& b, bool ta, bool tb, float alpha,
                 mx::StreamOrDevice s) {
  int nd = a.ndim();
  check(nd >= 2 && static_cast<int>(b.ndim()) == nd &&
            std::equal(a.shape().begin(), a.shape().end() - 2, b.shape().begin(), b.shape().end() - 2),
        "[matmul] a and b must agree in all but the last two axes; got ", a.shape(), " and ", b.shape(), ".");
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
      "matmul", {f32(a, s), f32(b, s)}, {shape}, {mx::float32},
      [=](auto& in, auto& out) {
        cpu::matmul(ta, tb, batch, m, n, k, alpha, (const float*)in[0], (const float*)in[1], (float*)out[0]);
      },
      s);
  return mx::astype(y[0], a.dtype(), s);
}

mx::array stock_product(const mx::array& x, const Base& base, bool transpose, mx::StreamOrDevice s) {
  if (!base.scales) return matmul(x, mx::astype(base.weight, x.dtype(), s), false, transpose, 1, s);
  // CUDA's quantized GEMM runs at a quarter of the rate of unpacking once and cuBLAS; for a few rows it is
  // the other way round. Metal's is at GEMM speed.
  bool unpack = x.size() / x.shape(-1) >= 128 && !mx::metal::is_available() && !on_cpu(s);
  if (unpack) return matmul(x, dequantize(base, x.dtype(), s), false, transpose, 1, s);
  // On the CPU MLX adds half-precision products up in half precision.
  auto y = mx::quantized_matmul(on_cpu(s) ? f32(x, s) : x, base.weight, *base.scales, base.biases, transpose,
                                base.group_size, base.bits, base.mode, s);
  return mx::astype(y, x.dtype(), s);
}

namespace {

/// x·Wᵀ + bias + z·b, or with `transpose` false dy·W + z·bᵀ; x [M, ·], z [M, R].
mx::array product(const mx::array& x, const Base& base, bool transpose, const std::optional<mx::array>& z,
                  const std::optional<mx::array>& b, bool kernel, mx::StreamOrDevice s) {
  int m = x.shape(0);
  auto bias = transpose ? base.bias : std::nullopt;
  if (!kernel) {
    auto y = stock_product(x, base, transpose, s);
    if (bias) y = mx::add(y, mx::astype(*bias, y.dtype(), s), s);
    if (!z) return y;
    auto b_cast = mx::astype(*b, y.dtype(), s);
    return mx::addmm(y, mx::astype(*z, y.dtype(), s), transpose ? b_cast : mx::transpose(b_cast, s), 1, 1, s);
  }
  CpuBase w(base, s);
  Arrays inputs{f32(x, s)};
  inputs.insert(inputs.end(), w.arrays.begin(), w.arrays.end());
  int r = z ? z->shape(1) : 0, at_bias = static_cast<int>(inputs.size());
  if (bias) inputs.push_back(f32(*bias, s));
  int at_z = static_cast<int>(inputs.size());
  if (z) inputs.insert(inputs.end(), {f32(*z, s), f32(*b, s)});
  bool has_bias = bias.has_value();
  auto run = [=](const std::vector<const void*>& in, const std::vector<void*>& out) {
    auto real = [&](int i) { return static_cast<const float*>(in[i]); };
    const float *z_in = r ? real(at_z) : nullptr, *b_in = r ? real(at_z + 1) : nullptr;
    if (transpose)
      cpu::linear(w.weight(in, 1), m, real(0), has_bias ? real(at_bias) : nullptr, r, z_in, b_in,
                  (float*)out[0]);
    else
      cpu::linear_dx(w.weight(in, 1), m, real(0), r, z_in, b_in, (float*)out[0]);
  };
  return mx::astype(cpu_op("lora_linear", inputs, {{m, transpose ? w.n : w.k}}, {mx::float32}, run, s)[0],
                    x.dtype(), s);
}

}  // namespace

mx::array lora_linear(const mx::array& x, const Base& base, const std::optional<mx::array>& a,
                      const std::optional<mx::array>& b, float scale, float dropout,
                      const std::optional<mx::array>& key, const std::string& impl, mx::StreamOrDevice s) {
  check_base("lora_linear", base);
  check(x.ndim() >= 1 && x.shape(-1) == base.in() && mx::issubdtype(x.dtype(), mx::floating),
        "[lora_linear] expected floating x [..., ", base.in(), "]; got ", x.shape(), " ", x.dtype(), ".");
  check(a.has_value() == b.has_value(), "[lora_linear] give both a and b, or neither.");
  if (a)
    check(a->ndim() == 2 && b->ndim() == 2 && a->shape(0) == base.in() && b->shape(1) == base.out() &&
              a->shape(1) == b->shape(0),
          "[lora_linear] expected a [", base.in(), ", R] and b [R, ", base.out(), "]; got ", a->shape(),
          " and ", b->shape(), ".");
  check(dropout >= 0 && dropout < 1, "[lora_linear] dropout must be at least 0 and below 1; got ", dropout,
        ".");
  check(dropout == 0 || a, "[lora_linear] dropout acts on the low-rank branch: give a and b.");
  check((dropout > 0) == key.has_value(), "[lora_linear] dropout and its key go together; got dropout ",
        dropout, key ? " and a key." : " and no key.");
  check(!key || (key->shape() == mx::Shape{2} && key->dtype() == mx::uint32),
        "[lora_linear] expected a key [2] of uint32; got ", key ? key->shape() : mx::Shape{}, " ",
        key ? key->dtype() : mx::uint32, ".");
  bool kernel = choose("lora_linear", impl, {cpu_kernel(s), {"stock", true, ""}}) == "kernel";
  scale /= 1 - dropout;
  auto dtype = x.dtype();
  int in = base.in(), out = base.out();
  auto cast = [=](const mx::array& y) { return mx::astype(y, dtype, s); };
  auto mask = [=](const mx::array& y) {
    if (!key) return y;
    return mx::where(mx::random::bernoulli(mx::array(1 - dropout), y.shape(), key, s), y,
                     mx::array(0, y.dtype()), s);
  };
  auto down = [=](const Arrays& p) { return matmul(mask(p[0]), cast(p[1]), false, false, scale, s); };  // z

  auto forward = [=](const Arrays& p) -> Arrays {
    if (p.size() == 1) return {product(p[0], base, true, std::nullopt, std::nullopt, kernel, s)};
    return {product(p[0], base, true, down(p), p[2], kernel, s)};
  };
  auto vjp = [=](const Arrays& p, const Arrays& dys, const Arrays&) -> Arrays {
    const auto& dy = dys[0];
    if (p.size() == 1) return {product(dy, base, false, std::nullopt, std::nullopt, kernel, s)};
    auto u = matmul(dy, cast(p[2]), false, true, scale, s);
    auto dx = [&] {
      if (!key) return product(dy, base, false, u, p[1], kernel, s);
      auto through_w = product(dy, base, false, std::nullopt, std::nullopt, kernel, s);
      return mx::add(through_w, mask(matmul(u, cast(p[1]), false, true, 1, s)), s);
    };
    return {dx(), mx::astype(matmul(mask(p[0]), u, true, false, 1, s), p[1].dtype(), s),
            mx::astype(matmul(down(p), dy, true, false, 1, s), p[2].dtype(), s)};
  };
  auto rows = mx::reshape(x, {static_cast<int>(x.size() / in), in}, s);
  Arrays primals{rows};
  if (a) primals.insert(primals.end(), {*a, *b});
  auto shape = x.shape();
  shape.back() = out;
  return mx::reshape(mx::custom_vjp(forward, vjp)(primals)[0], shape, s);
}

}  // namespace segtrain
