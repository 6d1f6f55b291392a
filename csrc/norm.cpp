// RMS norm: ours on the CPU and on CUDA. Rotary embedding: ours on the CPU, where MLX's is a chain of small
// ops.
#include "cpu/kernels.h"
#include "gpu.h"
#include "kernel.h"
#include "mlx/fast.h"

namespace segtrain {

namespace {

struct Norm {
  int m, n;
  float eps;
  mx::array weight;
  mx::StreamOrDevice s;
};

// ---- CPU

mx::array cpu_norm(const Norm& c, const mx::array& x) {
  return cpu_op(
      "rms_norm", {f32(x, c.s), f32(c.weight, c.s)}, {x.shape()}, {mx::float32},
      [m = c.m, n = c.n, eps = c.eps](auto& i, auto& o) {
        cpu::rms_norm((const float*)i[0], (const float*)i[1], eps, (float*)o[0], m, n);
      },
      c.s)[0];
}

mx::array cpu_norm_vjp(const Norm& c, const mx::array& x, const mx::array& dy) {
  return cpu_op(
      "rms_norm_vjp", {f32(x, c.s), f32(c.weight, c.s), f32(dy, c.s)}, {x.shape()}, {mx::float32},
      [m = c.m, n = c.n, eps = c.eps](auto& i, auto& o) {
        cpu::rms_norm_vjp((const float*)i[0], (const float*)i[1], (const float*)i[2], eps, (float*)o[0], m,
                          n);
      },
      c.s)[0];
}

// ---- CUDA

constexpr int OF_A_PACK = 256, MOST = 32 * OF_A_PACK, ROWS = 4;  // rows of a block, a warp each

std::string cuda_unfit(const Norm& c, mx::Dtype dtype) {
  if (gpu() != Gpu::cuda) return "it is for CUDA";
  if (dtype != mx::float16 && dtype != mx::bfloat16) return "it takes half precision only";
  return c.n % 8 == 0 && c.n <= MOST ? "" : "its rows have a multiple of 8 columns, up to 8192";
}

Arrays cuda_launch(const Norm& c, const std::string& name, std::map<std::string, mx::array> values,
                   int outputs) {
  const auto& x = values.begin()->second;
  auto shape = x.shape();
  auto dtype = x.dtype();
  values.insert({{"weight", c.weight}, {"at", device_ints({c.m, c.n})}, {"args", device_floats({c.eps})}});
  return launch(name, values, std::vector<mx::Shape>(outputs, shape), std::vector<mx::Dtype>(outputs, dtype),
                {{"PACKS", (c.n + OF_A_PACK - 1) / OF_A_PACK}}, {{(c.m + ROWS - 1) / ROWS, 1, 1}, 32 * ROWS},
                c.s);
}

enum class By { cpu, cuda, mlx };

By way_of(const std::string& op, const Norm& c, mx::Dtype dtype, const std::string& impl) {
  Way way = on_cpu(c.s) ? cpu_kernel(c.s) : gpu_kernel("rms_norm", cuda_unfit(c, dtype));
  if (choose(op, impl, {way, {"stock", true, ""}}) == "stock") return By::mlx;
  return on_cpu(c.s) ? By::cpu : By::cuda;
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
  auto dtype = x.dtype();
  auto by = way_of("rms_norm", c, dtype, impl);
  if (by == By::mlx) return mx::fast::rms_norm(x, c.weight, eps, s);
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays {
        if (by == By::cuda) return cuda_launch(c, "rms_norm", {{"x", in[0]}}, 1);
        return {mx::astype(cpu_norm(c, in[0]), dtype, s)};
      },
      [=](const Arrays& in, const Arrays& d, const Arrays&) -> Arrays {
        auto dy = mx::astype(d[0], dtype, s);
        if (by == By::cuda) return cuda_launch(c, "rms_norm_vjp", {{"h", in[0]}, {"dy", dy}}, 1);
        return {mx::astype(cpu_norm_vjp(c, in[0], dy), dtype, s)};
      });
  return op({x})[0];
}

Arrays add_rms_norm(const mx::array& x, const mx::array& r, const mx::array& weight, float eps,
                    const std::string& impl, mx::StreamOrDevice s) {
  auto c = norm_of("add_rms_norm", x, weight, eps, s);
  check(x.shape() == r.shape() && x.dtype() == r.dtype(),
        "[add_rms_norm] x and r must agree in shape and dtype; got ", x.shape(), " ", x.dtype(), " and ",
        r.shape(), " ", r.dtype(), ".");
  auto dtype = x.dtype();
  auto by = way_of("add_rms_norm", c, dtype, impl);
  if (by == By::mlx) {
    auto h = mx::add(x, r, s);
    return {h, mx::fast::rms_norm(h, c.weight, eps, s)};
  }
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays {
        if (by == By::cuda) return cuda_launch(c, "add_rms_norm", {{"r", in[1]}, {"x", in[0]}}, 2);
        auto h = mx::add(in[0], in[1], s);
        return {h, mx::astype(cpu_norm(c, h), dtype, s)};
      },
      [=](const Arrays&, const Arrays& d, const Arrays& out) -> Arrays {
        auto dh = mx::astype(d[0], dtype, s), dy = mx::astype(d[1], dtype, s);
        auto dx = by == By::cuda
                      ? cuda_launch(c, "add_rms_norm_vjp", {{"dh", dh}, {"dy", dy}, {"h", out[0]}}, 1)[0]
                      : mx::astype(mx::add(f32(dh, s), cpu_norm_vjp(c, out[0], dy), s), dtype, s);
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
