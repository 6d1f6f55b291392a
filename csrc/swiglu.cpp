#include "cpu/kernels.h"
#include "kernel.h"

namespace segtrain {

mx::array swiglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s) {
  check(gate.shape() == up.shape(), "[swiglu] gate and up must have one shape; got ", gate.shape(), " and ",
        up.shape(), ".");
  check(gate.dtype() == up.dtype() && mx::issubdtype(gate.dtype(), mx::floating),
        "[swiglu] gate and up must have one floating dtype; got ", gate.dtype(), " and ", up.dtype(), ".");
  bool kernel = choose("swiglu", impl, {cpu_kernel(s), {"stock", true, ""}}) == "kernel";
  size_t n = gate.size();
  auto shape = gate.shape();
  auto dtype = gate.dtype();

  auto forward = [=](const Arrays& x) -> Arrays {
    if (!kernel) return {mx::multiply(mx::multiply(x[0], mx::sigmoid(x[0], s), s), x[1], s)};
    auto y = cpu_op(
        "swiglu", {f32(x[0], s), f32(x[1], s)}, {shape}, {mx::float32},
        [n](auto& in, auto& out) {
          cpu::swiglu((const float*)in[0], (const float*)in[1], (float*)out[0], n);
        },
        s);
    return {mx::astype(y[0], dtype, s)};
  };
  auto vjp = [=](const Arrays& x, const Arrays& dy, const Arrays&) -> Arrays {
    auto g = f32(x[0], s), u = f32(x[1], s), d = f32(dy[0], s);
    Arrays grads;
    if (kernel) {
      grads = cpu_op(
          "swiglu_vjp", {g, u, d}, {shape, shape}, {mx::float32, mx::float32},
          [n](auto& in, auto& out) {
            cpu::swiglu_vjp((const float*)in[0], (const float*)in[1], (const float*)in[2], (float*)out[0],
                            (float*)out[1], n);
          },
          s);
    } else {
      // silu'(g) = σ + g·σ·(1 − σ)
      auto sigma = mx::sigmoid(g, s), silu = mx::multiply(g, sigma, s);
      auto slope = mx::add(sigma, mx::multiply(silu, mx::subtract(mx::array(1.0f), sigma, s), s), s);
      grads = {mx::multiply(mx::multiply(d, u, s), slope, s), mx::multiply(d, silu, s)};
    }
    return {mx::astype(grads[0], dtype, s), mx::astype(grads[1], dtype, s)};
  };
  return mx::custom_vjp(forward, vjp)({gate, up})[0];
}

}  // namespace segtrain
