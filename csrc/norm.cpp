// RMS norm and rotary embedding: MLX's own on GPUs; on the CPU, where those are chains of small ops, ours.
#include "cpu/kernels.h"
#include "kernel.h"
#include "mlx/fast.h"

namespace segtrain {

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, const std::string& impl,
                   mx::StreamOrDevice s) {
  check(x.ndim() >= 1 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0),
        "[rms_norm] expected x [..., H] and weight [H]; got ", x.shape(), " and ", weight.shape(), ".");
  if (choose("rms_norm", impl, {cpu_kernel(s), {"stock", true, ""}}) == "stock")
    return mx::fast::rms_norm(x, mx::stop_gradient(weight, s), eps, s);
  int n = x.shape(-1), m = static_cast<int>(x.size() / n);
  auto w = f32(weight, s);
  auto shape = x.shape();
  auto dtype = x.dtype();
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays {
        auto y = cpu_op(
            "rms_norm", {f32(in[0], s), w}, {shape}, {mx::float32},
            [=](auto& i, auto& o) {
              cpu::rms_norm((const float*)i[0], (const float*)i[1], eps, (float*)o[0], m, n);
            },
            s);
        return {mx::astype(y[0], dtype, s)};
      },
      [=](const Arrays& in, const Arrays& dy, const Arrays&) -> Arrays {
        auto dx = cpu_op(
            "rms_norm_vjp", {f32(in[0], s), w, f32(dy[0], s)}, {shape}, {mx::float32},
            [=](auto& i, auto& o) {
              cpu::rms_norm_vjp((const float*)i[0], (const float*)i[1], (const float*)i[2], eps, (float*)o[0],
                                m, n);
            },
            s);
        return {mx::astype(dx[0], dtype, s)};
      });
  return op({x})[0];
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
