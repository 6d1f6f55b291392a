// RMS norm: MLX's own on GPUs, where a CUDA kernel of ours did not beat it; on the CPU, where that is a chain
// of small ops, ours.
#include "core/binding.h"
#include "core/kernel.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "mlx/fast.h"

namespace segtrain {

namespace {

struct Norm {
  int m, n;
  float eps;
  mx::array weight;
  mx::StreamOrDevice s;
};

/// Calls run(i) for each of the rows, on all threads.
template <class Run>
void each_row(int m, int n, const Run& run) {
  cpu::over(m, cpu::WORTH_A_THREAD / n, [&](size_t i, size_t end) {
    for (; i < end; ++i) run(i);
  });
}

mx::array norm(const Norm& c, const mx::array& x) {
  return cpu_op(
      "rms_norm", {x, c.weight}, {x.shape()},
      [m = c.m, n = c.n, eps = c.eps](auto& in, auto& out) {
        each_row(m, n, [&](size_t i) { cpu::rows().rms_norm(in[0] + i * n, in[1], eps, out[0] + i * n, n); });
      },
      c.s)[0];
}

mx::array norm_vjp(const Norm& c, const mx::array& x, const mx::array& dy) {
  return cpu_op(
      "rms_norm_vjp", {x, c.weight, dy}, {x.shape()},
      [m = c.m, n = c.n, eps = c.eps](auto& in, auto& out) {
        each_row(m, n, [&](size_t i) {
          cpu::rows().rms_norm_vjp(in[0] + i * n, in[1], in[2] + i * n, eps, out[0] + i * n, n);
        });
      },
      c.s)[0];
}

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, const std::string& impl,
                   mx::StreamOrDevice s) {
  check(x.ndim() >= 1 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0),
        "[rms_norm] expected x [..., H] and weight [H]; got ", x.shape(), " and ", weight.shape(), ".");
  const int n = x.shape(-1);
  const Norm c{static_cast<int>(x.size() / n), n, eps, mx::stop_gradient(weight, s), s};
  if (choose("rms_norm", impl, {cpu_kernel(s), {"stock", true, ""}}) == "stock")
    return mx::fast::rms_norm(x, c.weight, eps, s);
  auto op =
      mx::custom_vjp([=](const Arrays& in) -> Arrays { return {mx::astype(norm(c, in[0]), x.dtype(), s)}; },
                     [=](const Arrays& in, const Arrays& dy, const Arrays&) -> Arrays {
                       return {mx::astype(norm_vjp(c, in[0], dy[0]), x.dtype(), s)};
                     });
  return op({x})[0];
}

const Binding binding([](nb::module_& m) {
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, nb::kw_only(), "impl"_a = "auto",
        "stream"_a = nb::none(), "x / sqrt(mean(x²) + eps)·weight. x [..., H], weight [H] → [..., H].");
});

}  // namespace segtrain
