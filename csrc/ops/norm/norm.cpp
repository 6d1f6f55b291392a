// RMS norm, alone or together with the residual sum that precedes or follows it in a layer. On the CPU we use
// our own kernel, because MLX's norm is a sequence of small ops there. On CUDA we use our own kernel
// (cuda/norm.cu), because MLX's kernel also computes the gradient of the weight, which is not needed here,
// and because the residual sum would take a second launch. On Metal we use MLX's kernel.
#include "core/binding.h"
#include "core/gpu.h"
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

/// Calls run(i) for each row i, on all threads.
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

// ---- CUDA

constexpr int MOST_THREADS = 256, MOST_PACKS = 8;

std::string cuda_unfit(const Norm& c, const mx::array& x) {
  const auto dtype = x.dtype();
  if (dtype != mx::float32 && dtype != mx::float16 && dtype != mx::bfloat16)
    return "it supports float32, float16 and bfloat16";
  if (c.weight.dtype() != dtype) return "the weight and x have different dtypes";
  if (c.n % 8 || c.n > 8 * MOST_THREADS * MOST_PACKS)
    return "the width of rows must be a multiple of 8 up to " + std::to_string(8 * MOST_THREADS * MOST_PACKS);
  return c.m ? "" : "x is empty";
}

Way way_of(const Norm& c, const mx::array& x) {
  return on_cuda(c.s) ? gpu_kernel("rms_norm", cuda_unfit(c, x)) : cpu_kernel(c.s);
}

bool by_cuda(const Norm& c, const mx::array& x) {
  return !on_cpu(c.s) && way_of(c, x).ok;
}

/// Launches a kernel with `n` outputs, each with the shape and dtype of x.
Arrays cuda_norm(const Norm& c, const char* kernel, const mx::array& x,
                 std::map<std::string, mx::array> more = {}, size_t n = 1) {
  more.insert({{"x", x}, {"weight", c.weight}, {"at", device_ints({c.n})}, {"args", device_floats({c.eps})}});
  const int packs = tiles(c.n, 8 * MOST_THREADS), threads = tiles(c.n, 8 * 32 * packs) * 32;
  return launch(kernel, more, std::vector<mx::Shape>(n, x.shape()), std::vector<mx::Dtype>(n, x.dtype()),
                {{"PACKS", packs}}, {{c.m, 1, 1}, threads}, c.s);
}

Norm checked(const char* op, const mx::array& x, const mx::array& weight, float eps, mx::StreamOrDevice s) {
  check(x.ndim() >= 1 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0), "[", op,
        "] expected x [..., H] and weight [H]; got ", x.shape(), " and ", weight.shape(), ".");
  const int n = x.shape(-1);
  return {static_cast<int>(x.size() / std::max(n, 1)), n, eps, mx::stop_gradient(weight, s), s};
}

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, const std::string& impl,
                   mx::StreamOrDevice s) {
  const auto c = checked("rms_norm", x, weight, eps, s);
  if (choose("rms_norm", impl, {way_of(c, x), {"stock", true, ""}}) == "stock")
    return mx::fast::rms_norm(x, c.weight, eps, s);
  const bool cuda = !on_cpu(s);
  auto cast = [=, dtype = x.dtype()](const mx::array& y) { return mx::astype(y, dtype, s); };
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays {
        return {cuda ? cuda_norm(c, "rms_norm", in[0])[0] : cast(norm(c, in[0]))};
      },
      [=](const Arrays& in, const Arrays& dy, const Arrays&) -> Arrays {
        if (cuda) return cuda_norm(c, "rms_norm_vjp", in[0], {{"dy", cast(dy[0])}});
        return {cast(norm_vjp(c, in[0], dy[0]))};
      });
  return op({x})[0];
}

Arrays rms_norm_beside(const mx::array& h, const mx::array& weight, float eps, const std::string& impl,
                       mx::StreamOrDevice s) {
  const auto c = checked("rms_norm_beside", h, weight, eps, s);
  if (impl == "stock" || !by_cuda(c, h)) return {h, rms_norm(h, weight, eps, impl, s)};
  auto cast = [=, dtype = h.dtype()](const mx::array& y) { return mx::astype(y, dtype, s); };
  return mx::custom_vjp(
      [=](const Arrays& in) -> Arrays { return {in[0], cuda_norm(c, "rms_norm", in[0])[0]}; },
      [=](const Arrays& in, const Arrays& dy, const Arrays&) -> Arrays {
        return cuda_norm(c, "rms_norm_beside_vjp", in[0], {{"dh", cast(dy[0])}, {"dy", cast(dy[1])}});
      })({h});
}

mx::array add_rms_norm(const mx::array& h, const mx::array& x, const mx::array& weight, float eps,
                       const std::optional<mx::array>& factor, const std::string& impl,
                       mx::StreamOrDevice s) {
  const auto c = checked("add_rms_norm", x, weight, eps, s);
  check(h.shape() == x.shape(), "[add_rms_norm] h must have x's shape ", x.shape(), "; got ", h.shape(), ".");
  check(!factor || factor->size() == 1, "[add_rms_norm] factor must be a single number; got ",
        factor ? factor->shape() : mx::Shape{}, ".");
  const bool alike = h.dtype() == x.dtype() && (!factor || factor->dtype() == x.dtype());
  if (impl == "stock" || !alike || !by_cuda(c, x)) {
    auto y = mx::add(h, rms_norm(x, weight, eps, impl, s), s);
    return factor ? mx::multiply(y, *factor, s) : y;
  }
  std::map<std::string, mx::array> times;
  if (factor) times.insert({"factor", mx::stop_gradient(*factor, s)});
  auto cast = [=, dtype = x.dtype()](const mx::array& y) { return mx::astype(y, dtype, s); };
  return mx::custom_vjp(
      [=](const Arrays& in) -> Arrays {
        auto values = times;
        values.insert({"h", in[0]});
        return cuda_norm(c, times.empty() ? "add_rms_norm" : "add_rms_norm_times", in[1], values);
      },
      [=](const Arrays& in, const Arrays& dys, const Arrays&) -> Arrays {
        auto values = times;
        const auto dy = cast(dys[0]);
        values.insert({"dy", dy});
        if (times.empty()) return {dy, cuda_norm(c, "rms_norm_vjp", in[1], values)[0]};
        auto both = cuda_norm(c, "add_rms_norm_times_vjp", in[1], values, 2);
        return {both[1], both[0]};
      })({h, x})[0];
}

const Binding norm_binding([](nb::module_& m) {
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, nb::kw_only(), "impl"_a = "auto",
        "stream"_a = nb::none(), "x / sqrt(mean(x²) + eps)·weight. x [..., H], weight [H] → [..., H].");
  m.def("rms_norm_beside", &rms_norm_beside, "h"_a, "weight"_a, "eps"_a, nb::kw_only(), "impl"_a = "auto",
        "stream"_a = nb::none(),
        "Returns h and rms_norm(h). The norm's backward pass also adds the gradient of the "
        "output h. h [..., H], weight [H] → [..., H], [..., H].");
  m.def("add_rms_norm", &add_rms_norm, "h"_a, "x"_a, "weight"_a, "eps"_a, "factor"_a = nb::none(),
        nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "(h + rms_norm(x))·factor. h, x [..., H], weight [H], frozen scalar factor → [..., H].");
});

}  // namespace segtrain
