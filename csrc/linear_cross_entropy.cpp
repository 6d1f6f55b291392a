// loss = Σ w·(lse(z) − z[target]), z = cap(h·Wᵀ);  dz = w·(softmax(z) − onehot)·cap'(z);  dh = dz·W.
// dh is formed while a chunk's z is at hand, so that neither z nor a second product with W is ever kept or
// repeated.
#include "base.h"

namespace segtrain {

namespace {

struct Problem {
  int M;
  float cap;
  bool needs_grad;
  mx::StreamOrDevice s;
};

/// {loss, dh}: csrc/cpu/cross_entropy.cpp
Arrays kernel_pass(const Problem& p, const mx::array& h, const Base& head, const mx::array& targets,
                   const mx::array& weights) {
  CpuBase w(head, p.s);
  Arrays inputs{f32(h, p.s), targets, weights};
  inputs.insert(inputs.end(), w.arrays.begin(), w.arrays.end());
  std::vector<mx::Shape> shapes{{}};
  if (p.needs_grad) shapes.push_back(h.shape());
  return cpu_op(
      "linear_cross_entropy", inputs, shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
      [p, w](auto& in, auto& out) {
        cpu::cross_entropy(w.weight(in, 3),
                           {p.M, w.k, p.cap, (const float*)in[0], (const int32_t*)in[1], (const float*)in[2],
                            (float*)out[0], p.needs_grad ? (float*)out[1] : nullptr});
      },
      p.s);
}

/// {loss, dh} by whole products over chunks of rows.
Arrays blocked_pass(const Problem& p, const mx::array& h, const Base& head, const mx::array& targets,
                    const mx::array& weights) {
  const auto& s = p.s;
  int V = head.out();
  int rows =
      std::clamp(static_cast<int>((1LL << 26) / V) / 128 * 128, 128, 1024);  // 256 MB of float32 logits
  auto loss = mx::array(0.0f);
  Arrays dhs;
  auto rest = h;
  for (int m0 = 0; m0 < p.M; m0 += rows) {
    int m1 = std::min(p.M, m0 + rows);
    if (m0) rest = mx::depends({rest}, p.needs_grad ? Arrays{loss, dhs.back()} : Arrays{loss})[0];
    auto z = f32(stock_product(mx::slice(rest, {m0, 0}, {m1, h.shape(1)}, s), head, true, s), s);
    if (p.cap > 0) z = mx::multiply(mx::tanh(mx::divide(z, mx::array(p.cap), s), s), mx::array(p.cap), s);
    auto target = mx::reshape(mx::slice(targets, {m0}, {m1}, s), {m1 - m0, 1}, s);
    auto w = mx::where(mx::less(target, mx::array(0), s), mx::array(0.0f),
                       mx::reshape(mx::slice(weights, {m0}, {m1}, s), {m1 - m0, 1}, s), s);
    target = mx::maximum(target, mx::array(0), s);
    auto lse = mx::logsumexp(z, -1, true, s);
    auto picked = mx::take_along_axis(z, target, -1, s);
    loss = mx::add(loss, mx::sum(mx::multiply(w, mx::subtract(lse, picked, s), s), false, s), s);
    if (!p.needs_grad) continue;
    auto onehot = mx::equal(mx::reshape(mx::arange(0, V, mx::int32, s), {1, V}, s), target, s);
    auto dz = mx::multiply(
        mx::subtract(mx::exp(mx::subtract(z, lse, s), s), mx::astype(onehot, mx::float32, s), s), w, s);
    if (p.cap > 0)
      dz = mx::multiply(
          dz, mx::subtract(mx::array(1.0f), mx::square(mx::divide(z, mx::array(p.cap), s), s), s), s);
    dhs.push_back(f32(stock_product(mx::astype(dz, h.dtype(), s), head, false, s), s));
  }
  if (!p.needs_grad) return {loss};
  return {loss, mx::concatenate(dhs, 0, s)};
}

}  // namespace

mx::array linear_cross_entropy(const mx::array& h, const Base& head, const mx::array& targets,
                               const std::optional<mx::array>& weights, std::optional<float> softcap,
                               bool needs_grad, const std::string& impl, mx::StreamOrDevice s) {
  check_base("linear_cross_entropy", head);
  check(h.ndim() == 2 && h.shape(1) == head.in() && h.shape(0) > 0 && mx::issubdtype(h.dtype(), mx::floating),
        "[linear_cross_entropy] expected floating h [M, ", head.in(), "] with at least one row; got ",
        h.shape(), ".");
  int M = h.shape(0);
  check(targets.ndim() == 1 && targets.shape(0) == M && mx::issubdtype(targets.dtype(), mx::integer),
        "[linear_cross_entropy] expected integer targets [", M, "]; got ", targets.shape(), " ",
        targets.dtype(), ".");
  check(!weights || weights->shape() == mx::Shape{M}, "[linear_cross_entropy] weights must be [", M, "].");
  check(!softcap || *softcap > 0, "[linear_cross_entropy] softcap must be above 0; got ", softcap.value_or(0),
        ".");
  check(!head.bias, "[linear_cross_entropy] a head with a bias is not supported.");
  bool kernel = choose("linear_cross_entropy", impl, {cpu_kernel(s), {"blocked", true, ""}}) == "kernel";

  Problem p{M, softcap.value_or(0), needs_grad, s};
  auto pass = kernel ? kernel_pass : blocked_pass;
  auto t = mx::astype(targets, mx::int32, s);
  auto w = weights ? f32(*weights, s) : mx::ones({M}, mx::float32, s);
  if (!needs_grad) return mx::reshape(pass(p, h, head, t, w)[0], {}, s);
  auto op = mx::custom_vjp([=](const Arrays& in) { return pass(p, in[0], head, t, w); },
                           [=](const Arrays& in, const Arrays& dloss, const Arrays& out) -> Arrays {
                             return {mx::astype(mx::multiply(out[1], dloss[0], s), in[0].dtype(), s)};
                           });
  return op({h})[0];
}

}  // namespace segtrain
