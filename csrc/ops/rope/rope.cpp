// Rotary embedding: MLX's own on GPUs; on the CPU, where that is a chain of small ops, ours.
#include <cmath>

#include "core/binding.h"
#include "core/kernel.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "mlx/fast.h"

namespace segtrain {

namespace {

/// y = x with the first `dims` of each row rotated by angle (offset + t)·scale / freqs[i]; `sign` −1 rotates
/// back.
void rotate_rows(const float* x, const float* freqs, float scale, float sign, int offset, bool traditional,
                 int n_rows, int t, int d, int dims, float* y) {
  int half = dims / 2;
  std::vector<float> cosine(static_cast<size_t>(t) * half), sine(cosine.size());
  cpu::over(t, cpu::WORTH_A_THREAD / half / 8, [&](size_t i, size_t end) {
    for (; i < end; ++i)
      for (int j = 0; j < half; ++j) {
        float angle = scale * static_cast<float>(offset + static_cast<int>(i)) / freqs[j];
        cosine[i * half + j] = std::cos(angle);
        sine[i * half + j] = sign * std::sin(angle);
      }
  });
  cpu::over(static_cast<size_t>(n_rows) * t, cpu::WORTH_A_THREAD / d, [&](size_t i, size_t end) {
    for (; i < end; ++i) {
      const float* x_i = x + i * d;
      float* y_i = y + i * d;
      size_t at = i % t * half;
      cpu::rows().rotate(x_i, &cosine[at], &sine[at], y_i, half, traditional);
      std::copy(x_i + dims, x_i + d, y_i + dims);
    }
  });
}

}  // namespace

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
        "rope", {y, divisors}, {shape},
        [=](auto& in, auto& out) {
          rotate_rows(in[0], in[1], scale, sign, offset, traditional, rows, T, D, dims, out[0]);
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

const Binding binding([](nb::module_& m) {
  m.def("rope", &rope, "x"_a, "dims"_a, nb::kw_only(), "traditional"_a = false, "base"_a = nb::none(),
        "scale"_a = 1.0f, "offset"_a = 0, "freqs"_a = nb::none(), "impl"_a = "auto", "stream"_a = nb::none(),
        "Rotary embedding. x [B,H,T,D] → [B,H,T,D].");
});

}  // namespace segtrain
