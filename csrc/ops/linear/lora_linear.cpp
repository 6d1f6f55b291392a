// y = x·Wᵀ + bias + scale·(x·A)·B with W frozen.
//   dx = dy·W + u·Aᵀ, dA = xᵀ·u, dB = zᵀ·dy   with u = scale·dy·Bᵀ, z = scale·x·A  (both [rows, R])
// With dropout p, mask∘x replaces x in x·A, and scale / (1 − p) replaces scale; then dx = dy·W + mask∘(u·Aᵀ)
// and dA = (mask∘x)ᵀ·u. The backward pass draws the same mask again from its key.
#include "core/binding.h"
#include "core/cost.h"
#include "core/gpu.h"
#include "ops/linear/base.h"
#include "ops/linear/joint_linear.h"

namespace segtrain {

namespace {

/// Returns x·Wᵀ + bias + z·b or, if `transpose` is false, x·W + z·bᵀ. x [M, ·], z [M, R].
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
  CpuBase w(base);
  Arrays inputs{x};
  inputs.insert(inputs.end(), w.arrays.begin(), w.arrays.end());
  int r = z ? z->shape(1) : 0, at_bias = static_cast<int>(inputs.size());
  bool has_bias = bias.has_value();
  if (has_bias) inputs.push_back(*bias);
  int at_z = static_cast<int>(inputs.size());
  if (z) inputs.insert(inputs.end(), {*z, *b});
  auto run = [=](const Inputs& in, const std::vector<float*>& out) {
    auto z = r ? in[at_z] : nullptr, b = r ? in[at_z + 1] : nullptr;
    if (transpose)
      cpu::linear(w.weight(in, 1), m, in[0], has_bias ? in[at_bias] : nullptr, r, z, b, out[0]);
    else
      cpu::linear_dx(w.weight(in, 1), m, in[0], r, z, b, out[0]);
  };
  return mx::astype(cpu_op("lora_linear", inputs, {{m, transpose ? w.n : w.k}}, run, s)[0], x.dtype(), s);
}

/// Returns the output of one linear layer. x [M, in].
mx::array single(const mx::array& x, const Linear& linear, float dropout, const std::optional<mx::array>& key,
                 bool kernel, mx::StreamOrDevice s) {
  const auto& base = linear.base;
  float scale = linear.scale / (1 - dropout);
  auto dtype = x.dtype();
  auto cast = [=](const mx::array& y) { return mx::astype(y, dtype, s); };
  auto mask = [=](const mx::array& y) {
    if (!key) return y;
    return mx::where(mx::random::bernoulli(mx::array(1 - dropout), y.shape(), key, s), y,
                     mx::array(0, y.dtype()), s);
  };
  auto down = [=](const Arrays& p) { return matmul(mask(p[0]), cast(p[1]), false, false, scale, s); };  // z

  auto forward = [=](const Arrays& p) -> Arrays {
    if (p.size() == 1) return {product(p[0], base, true, std::nullopt, std::nullopt, kernel, s)};
    auto z = down(p);
    return {product(p[0], base, true, z, p[2], kernel, s), z};
  };
  auto vjp = [=](const Arrays& p, const Arrays& dys, const Arrays& y) -> Arrays {
    const auto& dy = dys[0];
    if (p.size() == 1) return {product(dy, base, false, std::nullopt, std::nullopt, kernel, s)};
    auto u = matmul(dy, cast(p[2]), false, true, scale, s);
    auto dx = [&] {
      if (!key) return product(dy, base, false, u, p[1], kernel, s);
      auto through_w = product(dy, base, false, std::nullopt, std::nullopt, kernel, s);
      return mx::add(through_w, mask(matmul(u, cast(p[1]), false, true, 1, s)), s);
    };
    auto da = mx::astype(matmul(mask(p[0]), u, true, false, 1, s), p[1].dtype(), s);
    auto db = mx::astype(matmul(y[1], dy, true, false, 1, s), p[2].dtype(), s);
    return {after(dx(), {da, db}), da, db};
  };
  return with_vjp(primals_of(x, {linear}), 1, forward, vjp)[0];
}

/// Returns the outputs of all linear layers, computed as one matrix product. x [M, in].
Arrays joint(const mx::array& x, const std::vector<Linear>& linears, mx::StreamOrDevice s) {
  mx::Shape ends;
  for (size_t i = 0, end = 0; i + 1 < linears.size(); ++i) ends.push_back(end += linears[i].base.out());
  auto split = [=](const mx::array& y) { return ends.empty() ? Arrays{y} : mx::split(y, ends, -1, s); };
  auto join = [=](const Arrays& dys, const std::optional<mx::array>&) {
    return ends.empty() ? dys[0] : mx::concatenate(dys, -1, s);
  };
  return joint_linears(x, linears, {linears.size(), split, join}, s);
}

}  // namespace

void check_linear(const std::string& op, const Linear& linear) {
  const auto& [base, a, b, scale] = linear;
  check_base(op, base);
  check(a.has_value() == b.has_value(), "[", op, "] give both a and b, or neither.");
  if (a)
    check(a->ndim() == 2 && b->ndim() == 2 && a->shape(0) == base.in() && b->shape(1) == base.out() &&
              a->shape(1) == b->shape(0),
          "[", op, "] expected a [", base.in(), ", R] and b [R, ", base.out(), "]; got ", a->shape(), " and ",
          b->shape(), ".");
}

namespace {

void check_call(const mx::array& x, const Linear& linear, float dropout,
                const std::optional<mx::array>& key) {
  check_linear("lora_linear", linear);
  check(x.ndim() >= 1 && x.shape(-1) == linear.base.in() && mx::issubdtype(x.dtype(), mx::floating),
        "[lora_linear] expected floating x [..., ", linear.base.in(), "]; got ", x.shape(), " ", x.dtype(),
        ".");
  check(dropout >= 0 && dropout < 1, "[lora_linear] dropout must be at least 0 and below 1; got ", dropout,
        ".");
  check(dropout == 0 || linear.a, "[lora_linear] dropout applies to the low-rank branch: give a and b.");
  check((dropout > 0) == key.has_value(),
        "[lora_linear] dropout and its key must be given together; got dropout ", dropout,
        key ? " and a key." : " and no key.");
  check(!key || (key->shape() == mx::Shape{2} && key->dtype() == mx::uint32),
        "[lora_linear] expected a key [2] of uint32; got ", key ? key->shape() : mx::Shape{}, " ",
        key ? key->dtype() : mx::uint32, ".");
}

}  // namespace

Arrays lora_linears(const mx::array& x, const std::vector<Linear>& linears, float dropout, const Arrays& keys,
                    const std::string& impl, mx::StreamOrDevice s) {
  check(!linears.empty(), "[lora_linear] expected at least one linear layer.");
  check(keys.empty() || keys.size() == linears.size(), "[lora_linear] expected a key for each of ",
        linears.size(), " linear layers; got ", keys.size(), ".");
  auto key = [&](size_t i) { return keys.empty() ? std::nullopt : std::optional(keys[i]); };
  for (size_t i = 0; i < linears.size(); ++i) check_call(x, linears[i], dropout, key(i));
  int in = linears[0].base.in(), rows = static_cast<int>(x.size() / in);
  auto unfit = [&](const std::vector<Linear>& some) {
    return dropout > 0 ? "it does not support dropout" : JointLinear::unfit(some, rows, x.dtype(), s);
  };
  auto flat = mx::reshape(x, {rows, in}, s);
  auto run = [&](const std::vector<Linear>& some, size_t first) {
    Way way = on_cpu(s) ? cpu_kernel(s) : gpu_kernel("lora_linear", unfit(some));
    bool kernel = choose("lora_linear", impl, {way, {"stock", true, ""}}) == "kernel";
    if (kernel && !on_cpu(s)) return joint(flat, some, s);
    return Arrays{single(flat, some[0], dropout, key(first), kernel, s)};
  };
  Arrays out;
  if (!on_cpu(s) && linears.size() > 1 && impl != "stock" && unfit(linears).empty()) {
    out = run(linears, 0);
  } else {
    for (size_t i = 0; i < linears.size(); ++i) out.push_back(run({linears[i]}, i)[0]);
  }
  auto shape = x.shape();
  for (size_t i = 0; i < out.size(); ++i) {
    shape.back() = linears[i].base.out();
    out[i] = mx::reshape(out[i], shape, s);
  }
  return out;
}

namespace {

/// Returns the cost of linear layers with this total number of outputs. On GPUs it consists of the
/// dequantized weights and the workspace of the matrix product, as measured by bench/memory.py.
OpCost lora_linears_cost(const Device& device, int inputs, int outputs) {
  if (device.gpu() == Gpu::none)
    return {.forward = static_cast<int64_t>(cpu::linear_scratch(outputs, inputs)),
            .backward = static_cast<int64_t>(cpu::linear_dx_scratch(outputs, inputs))};
  return {.forward = static_cast<int64_t>(inputs) * outputs * device.size + device.workspace};
}

/// Returns the number of bytes that dropout needs for the random bits and for x after dropout, where
/// `numbers` is the number of elements of x.
int64_t dropout_bytes(const Device& device, int64_t numbers) {
  return numbers * (4 + device.size);
}

}  // namespace

const Binding lora_linear_binding([](nb::module_& m) {
  m.def("lora_linears_cost", &lora_linears_cost, "device"_a, nb::kw_only(), "inputs"_a, "outputs"_a,
        "Returns the memory that linear layers with this total number of outputs need on a device.");
  m.def("dropout_bytes", &dropout_bytes, "device"_a, "numbers"_a,
        "Returns the memory, in bytes, that dropout on a linear layer's input of this many elements needs.");
  m.def("lora_linears", &lora_linears, "x"_a, "linears"_a, nb::kw_only(), "dropout"_a = 0.0f,
        "keys"_a = Arrays{}, "impl"_a = "auto", "stream"_a = nb::none(),
        "x·Wᵀ + bias + scale·(x·a)·b for each linear layer. x [..., in] → [..., out] for each layer.");
});

}  // namespace segtrain
