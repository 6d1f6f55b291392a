// RMS norm and rotary embedding: MLX's own on GPUs, where a CUDA kernel of ours did not beat its norm; on the
// CPU, where those are chains of small ops, ours.
#include "core/kernel.h"
#include "cpu/kernels.h"
#include "mlx/fast.h"

namespace segtrain {

namespace {

struct Norm {
  int m, n;
  float eps;
  mx::array weight;
  mx::StreamOrDevice s;
};

mx::array norm(const Norm& c, const mx::array& x) {
  return cpu_op(
      "rms_norm", {f32(x, c.s), f32(c.weight, c.s)}, {x.shape()}, {mx::float32},
      [m = c.m, n = c.n, eps = c.eps](auto& i, auto& o) {
        cpu::rms_norm((const float*)i[0], (const float*)i[1], eps, (float*)o[0], m, n);
      },
      c.s)[0];
}

mx::array norm_vjp(const Norm& c, const mx::array& x, const mx::array& dy) {
  return cpu_op(
      "rms_norm_vjp", {f32(x, c.s), f32(c.weight, c.s), f32(dy, c.s)}, {x.shape()}, {mx::float32},
      [m = c.m, n = c.n, eps = c.eps](auto& i, auto& o) {
        cpu::rms_norm_vjp((const float*)i[0], (const float*)i[1], (const float*)i[2], eps, (float*)o[0], m,
                          n);
      },
      c.s)[0];
}

bool by_mlx(const std::string& op, const Norm& c, const std::string& impl) {
  return choose(op, impl, {cpu_kernel(c.s), {"stock", true, ""}}) == "stock";
}

Norm norm_of(const std::string& op, const mx::array& x, const mx::array& weight, float eps,
             mx::StreamOrDevice s) {
  check(x.ndim() >= 1 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0), "[", op,
        "] expected x [..., H] and weight [H]; got ", x.shape(), " and ", weight.shape(), ".");
  int n = x.shape(-1);
  return {static_cast<int>(x.size() / n), n, eps, mx::stop_gradient(weight, s), s};
}

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, const std::string& impl,
                   mx::StreamOrDevice s) {
  auto c = norm_of("rms_norm", x, weight, eps, s);
  if (by_mlx("rms_norm", c, impl)) return mx::fast::rms_norm(x, c.weight, eps, s);
  auto op =
      mx::custom_vjp([=](const Arrays& in) -> Arrays { return {mx::astype(norm(c, in[0]), x.dtype(), s)}; },
                     [=](const Arrays& in, const Arrays& dy, const Arrays&) -> Arrays {
                       return {mx::astype(norm_vjp(c, in[0], dy[0]), x.dtype(), s)};
                     });
  return op({x})[0];
}

Arrays add_rms_norm(const mx::array& x, const mx::array& r, const mx::array& weight, float eps,
                    const std::string& impl, mx::StreamOrDevice s) {
  auto c = norm_of("add_rms_norm", x, weight, eps, s);
  check(x.shape() == r.shape() && x.dtype() == r.dtype(),
        "[add_rms_norm] x and r must agree in shape and dtype; got ", x.shape(), " ", x.dtype(), " and ",
        r.shape(), " ", r.dtype(), ".");
  if (by_mlx("add_rms_norm", c, impl)) {
    auto h = mx::add(x, r, s);
    return {h, mx::fast::rms_norm(h, c.weight, eps, s)};
  }
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays {
        auto h = mx::add(in[0], in[1], s);
        return {h, mx::astype(norm(c, h), x.dtype(), s)};
      },
      [=](const Arrays&, const Arrays& d, const Arrays& out) -> Arrays {
        auto dx = mx::astype(mx::add(f32(d[0], s), norm_vjp(c, out[0], d[1]), s), x.dtype(), s);
        return {dx, dx};
      });
  return op({x, r});
}

mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               int offset, const std::optional<mx::array>& freqs, const std::string& impl,
               mx::StreamOrDevice s) {
  check(x.ndim() == 4, "[rope] expected x [B,H,T,D]; got ", x.shape(), ".");
  check(dims > 0 && dims % 2 == 0 && dims <= x.shape(3),
        "[rope] dims must be even and at most D = ", x.shape(3), "; got ", dims, ".");
  check(base.has_value() != freqs.has_value(), "[rope] give either base or freqs.");
  if (choose("rope", impl, {cpu_kernel(s), {"stock", true, ""}}) == "stock")
    return mx::fast::rope(x, dims, traditional, base, scale, offset, freqs, s);
  // Angles are position · scale / freqs; from a base, freqs[i] = base^(2i / dims).
  auto divisors = freqs ? f32(*freqs, s)
                        : mx::power(mx::array(*base),
                                    mx::divide(mx::arange(0.0, dims, 2.0, mx::float32, s),
                                               mx::array(static_cast<float>(dims)), s),
                                    s);
  int T = x.shape(2), D = x.shape(3), rows = static_cast<int>(x.size() / std::max<size_t>(1, size_t(T) * D));
  auto shape = x.shape();
  auto dtype = x.dtype();
  auto rotate = [=](const mx::array& y, float sign) {
    auto z = cpu_op(
        "rope", {f32(y, s), divisors}, {shape}, {mx::float32},
        [=](auto& i, auto& o) {
          cpu::rope((const float*)i[0], (const float*)i[1], scale, sign, offset, traditional, rows, T, D,
                    dims, (float*)o[0]);
        },
        s);
    return mx::astype(z[0], dtype, s);
  };
  // A rotation's transpose is the rotation back.
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays { return {rotate(in[0], 1)}; },
      [=](const Arrays&, const Arrays& dy, const Arrays&) -> Arrays { return {rotate(dy[0], -1)}; });
  return op({x})[0];
}

}  // namespace segtrain
