// y = x·Wᵀ + bias + scale·(x·A)·B with W frozen.
//   dx = dy·W + u·Aᵀ, dA = xᵀ·u, dB = zᵀ·dy   with u = scale·dy·Bᵀ, z = scale·x·A  (both [rows, R],
//   recomputed)
#include "base.h"

namespace segtrain {

int Base::out() const {
  return weight.shape(0);
}
int Base::in() const {
  return scales ? weight.shape(1) * 32 / bits : weight.shape(1);
}

void check_base(const std::string& op, const Base& base) {
  check(base.weight.ndim() == 2, "[", op, "] expected a weight [out, in]; got ", base.weight.shape(), ".");
  if (base.scales) {
    check(base.weight.dtype() == mx::uint32, "[", op, "] a quantized weight must be uint32; got ",
          base.weight.dtype(), ".");
    check(base.bits > 0 && base.group_size > 0 && base.scales->shape(0) == base.out() &&
              base.scales->shape(-1) * base.group_size == base.in(),
          "[", op, "] scales ", base.scales->shape(), " do not fit weight ", base.weight.shape(), " at ",
          base.bits, " bits in groups of ", base.group_size, ".");
    check(base.mode != "affine" || (base.biases && base.biases->shape() == base.scales->shape()), "[", op,
          "] affine quantization needs biases of the shape of the scales.");
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
      dense(!base.scales || base.mode != "affine") {
  if (dense)
    arrays = {base.scales ? dequantize(base, mx::float32, s) : f32(base.weight, s)};
  else
    arrays = {base.weight, f32(*base.scales, s), f32(*base.biases, s)};
}

cpu::Weight CpuBase::weight(const std::vector<const void*>& in, int first) const {
  auto real = [&](int i) { return static_cast<const float*>(in[first + i]); };
  if (dense) return {real(0), nullptr, nullptr, nullptr, 0, 0, n, k};
  return {nullptr, static_cast<const uint32_t*>(in[first]), real(1), real(2), bits, group, n, k};
}

mx::array dequantize(const Base& base, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_base("dequantize", base);
  check(base.scales.has_value(), "[dequantize] the weight is not quantized.");
  if (!on_cpu(s) || base.mode != "affine")
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
  auto y = mx::quantized_matmul(x, base.weight, *base.scales, base.biases, transpose, base.group_size,
                                base.bits, base.mode, s);
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
                      const std::optional<mx::array>& b, float scale, const std::string& impl,
                      mx::StreamOrDevice s) {
  check_base("lora_linear", base);
  check(x.ndim() >= 1 && x.shape(-1) == base.in() && mx::issubdtype(x.dtype(), mx::floating),
        "[lora_linear] expected floating x [..., ", base.in(), "]; got ", x.shape(), " ", x.dtype(), ".");
  check(a.has_value() == b.has_value(), "[lora_linear] give both a and b, or neither.");
  if (a)
    check(a->ndim() == 2 && b->ndim() == 2 && a->shape(0) == base.in() && b->shape(1) == base.out() &&
              a->shape(1) == b->shape(0),
          "[lora_linear] expected a [", base.in(), ", R] and b [R, ", base.out(), "]; got ", a->shape(),
          " and ", b->shape(), ".");
  bool kernel = choose("lora_linear", impl, {cpu_kernel(s), {"stock", true, ""}}) == "kernel";
  auto dtype = x.dtype();
  int in = base.in(), out = base.out();
  auto cast = [=](const mx::array& y) { return mx::astype(y, dtype, s); };
  auto down = [=](const Arrays& p) { return matmul(p[0], cast(p[1]), false, false, scale, s); };  // z

  auto forward = [=](const Arrays& p) -> Arrays {
    if (p.size() == 1) return {product(p[0], base, true, std::nullopt, std::nullopt, kernel, s)};
    return {product(p[0], base, true, down(p), p[2], kernel, s)};
  };
  auto vjp = [=](const Arrays& p, const Arrays& dys, const Arrays&) -> Arrays {
    const auto& dy = dys[0];
    if (p.size() == 1) return {product(dy, base, false, std::nullopt, std::nullopt, kernel, s)};
    auto u = matmul(dy, cast(p[2]), false, true, scale, s);
    return {product(dy, base, false, u, p[1], kernel, s),
            mx::astype(matmul(p[0], u, true, false, 1, s), p[1].dtype(), s),
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
