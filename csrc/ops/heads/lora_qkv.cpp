// q, k and v of attention from the x that they read: lora_linears, the heads one after the other, rope of q
// and k.
// On CUDA one kernel makes the heads of the common product, and one makes its gradient of theirs:
// cuda/heads.cu.
#include "core/binding.h"
#include "core/gpu.h"
#include "ops/linear/joint_linear.h"
#include "ops/rope/rope.h"

namespace segtrain {

namespace {

struct Heads {
  int B, T, H, G, D;
  int dims;
  bool traditional;
  std::optional<float> base;
  float scale;
  std::optional<mx::array> freqs;
  std::optional<Ranges> segments;
  std::string impl;
  mx::StreamOrDevice s;
};

Arrays by_ops(const Heads& c, const mx::array& x, const std::vector<Linear>& linears) {
  auto ys = lora_linears(x, linears, 0, {}, c.impl, c.s);
  for (size_t i = 0; i < 3; ++i) {
    auto heads = mx::reshape(ys[i], {c.B, c.T, i ? c.G : c.H, c.D}, c.s);
    ys[i] = mx::transpose(heads, {0, 2, 1, 3}, c.s);
    if (i < 2)
      ys[i] = rope(ys[i], c.dims, c.traditional, c.base, c.scale, 0, c.freqs, c.segments, c.impl, c.s);
  }
  return ys;
}

Arrays by_joint_kernels(const Heads& c, const mx::array& x, const std::vector<Linear>& linears) {
  constexpr int THREADS = 256, AT_ONCE = 4;  // heads of a thread
  const int all = c.H + 2 * c.G;
  const mx::Shape of_q{c.B, c.H, c.T, c.D}, of_k{c.B, c.G, c.T, c.D};
  const auto at = device_ints({c.B, c.T, c.H, c.G, c.D, c.dims});
  std::map<std::string, mx::array> values{
      {"freqs", device_divisors(c.dims, c.base, c.freqs, c.s)},
      {"positions", c.segments ? device_ints(positions_of(0, c.T, *c.segments)) : at},
      {"at", at},
      {"args", device_floats({c.scale})}};
  const Template arguments{
      {"T", x.dtype()}, {"TRADITIONAL", c.traditional}, {"PACKED", c.segments.has_value()}};
  const Grid grid{{tiles(c.B * c.T * (c.D - c.dims / 2), THREADS), tiles(all, AT_ONCE), 1}, THREADS};
  auto run = [=](const char* name, std::map<std::string, mx::array> arrays, std::vector<mx::Shape> shapes) {
    arrays.insert(values.begin(), values.end());
    const std::vector<mx::Dtype> dtypes(shapes.size(), x.dtype());
    return launch(name, arrays, shapes, dtypes, arguments, grid, c.s);
  };
  auto split = [=](const mx::array& y) { return run("heads", {{"joint", y}}, {of_q, of_k, of_k}); };
  auto join = [=](const Arrays& d) {
    return run("heads_vjp", {{"q", d[0]}, {"k", d[1]}, {"v", d[2]}}, {{c.B * c.T, all * c.D}})[0];
  };
  return joint_linears(mx::reshape(x, {c.B * c.T, -1}, c.s), linears, split, join, c.s);
}

}  // namespace

Arrays lora_qkv(const mx::array& x, const std::vector<Linear>& linears, int heads, int groups, int dims,
                bool traditional, std::optional<float> base, float scale,
                const std::optional<mx::array>& freqs, const std::optional<Ranges>& segments,
                const std::string& impl, mx::StreamOrDevice s) {
  check(x.ndim() == 3 && linears.size() == 3, "[lora_qkv] expected x [B,T,H] and three linears; got ",
        x.shape(), " and ", linears.size(), ".");
  for (const auto& linear : linears) check_linear("lora_qkv", linear);
  const int width = linears[1].base.out(), D = linears[0].base.out() / heads;
  check(linears[0].base.out() == heads * D && width == groups * D && linears[2].base.out() == width,
        "[lora_qkv] expected q of ", heads, " heads and k and v of ", groups, "; got widths ",
        linears[0].base.out(), ", ", width, " and ", linears[2].base.out(), ".");
  const Heads c{x.shape(0), x.shape(1), heads, groups,   D,    dims, traditional,
                base,       scale,      freqs, segments, impl, s};
  const int rows = c.B * c.T;
  check(dims > 0 && dims % 2 == 0 && dims <= D, "[lora_qkv] dims must be even and at most D = ", D, "; got ",
        dims, ".");
  check(base.has_value() != freqs.has_value(), "[lora_qkv] give either base or freqs.");
  bool joint = !on_cpu(s) && impl != "stock" &&
               gpu_kernel("lora_linear", JointLinear::unfit(linears, rows, x.dtype(), s)).ok &&
               gpu_kernel("heads", "").ok &&
               static_cast<double>(rows) * (heads + 2 * groups) * D < (1LL << 31);
  return joint ? by_joint_kernels(c, x, linears) : by_ops(c, x, linears);
}

mx::array merge_heads(const mx::array& o, mx::StreamOrDevice s) {
  check(o.ndim() == 4, "[merge_heads] expected o [B,H,T,D]; got ", o.shape(), ".");
  const int B = o.shape(0), H = o.shape(1), T = o.shape(2), D = o.shape(3);
  auto turned = [s](const mx::array& x) { return mx::transpose(x, {0, 2, 1, 3}, s); };
  // Attention's kernels want its gradient in rows: one copy, not one for each of them.
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays { return {mx::reshape(turned(in[0]), {B, T, H * D}, s)}; },
      [=](const Arrays&, const Arrays& dy, const Arrays&) -> Arrays {
        return {mx::contiguous(turned(mx::reshape(dy[0], {B, T, H, D}, s)), false, s)};
      });
  return op({o})[0];
}

const Binding binding([](nb::module_& m) {
  m.def("lora_qkv", &lora_qkv, "x"_a, "linears"_a, "heads"_a, "groups"_a, "dims"_a, nb::kw_only(),
        "traditional"_a = false, "base"_a = nb::none(), "scale"_a = 1.0f, "freqs"_a = nb::none(),
        "segments"_a = nb::none(), "impl"_a = "auto", "stream"_a = nb::none(),
        "Rotated q and k, and v. x [B,T,H] → [B,heads,T,D], [B,groups,T,D] and alike.");
  m.def("merge_heads", &merge_heads, "o"_a, nb::kw_only(), "stream"_a = nb::none(),
        "o [B,H,T,D] → [B,T,H·D].");
});

}  // namespace segtrain
