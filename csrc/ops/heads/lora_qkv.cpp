// Computes q, k and v of attention from x with lora_linears, an optional rms_norm per head, a transpose to
// [B, heads, T, D], and rope for q and k. On CUDA, one matrix product computes the linear layers together,
// and one kernel computes the heads from its result. Another kernel computes the gradient of this result from
// the gradients of the heads (cuda/heads.cu). If there is a norm, the result of the matrix product is kept
// for the backward pass.
#include "core/binding.h"
#include "core/gpu.h"
#include "ops/linear/joint_linear.h"
#include "ops/rope/rope.h"

namespace segtrain {

namespace {

struct Call : Heads {
  int B, T, D;
  std::string impl;
  mx::StreamOrDevice s;

  std::optional<HeadNorm> norm(size_t of) const { return of < norms.size() ? norms[of] : std::nullopt; }
};

Arrays by_ops(const Call& c, const mx::array& x, const std::vector<Linear>& linears) {
  auto ys = lora_linears(x, linears, 0, {}, c.impl, c.s);
  if (ys.size() == 2) ys.push_back(ys[1]);
  for (size_t i = 0; i < ys.size(); ++i) {
    auto heads = mx::reshape(ys[i], {c.B, c.T, i ? c.groups : c.heads, c.D}, c.s);
    if (auto norm = c.norm(i)) heads = rms_norm(heads, norm->weight, norm->eps, c.impl, c.s);
    ys[i] = mx::transpose(heads, {0, 2, 1, 3}, c.s);
    if (i < 2)
      ys[i] = rope(ys[i], c.dims, c.traditional, c.base, c.scale, c.offset, c.freqs, c.segments, c.impl, c.s);
  }
  return ys;
}

constexpr int WARPS = 8, MOST_D = 512;

Arrays by_joint_kernels(const Call& c, const mx::array& x, const std::vector<Linear>& linears) {
  const bool same = linears.size() == 2;
  const int groups = linears.size() == 1 ? 0 : c.groups, given = c.heads + (same ? 1 : 2) * groups;
  const int at_once = c.D <= 128 ? 4 : c.D <= 256 ? 2 : 1;  // each lane keeps its elements in registers
  // Neighbouring slots are read and written together if their elements are neighbours, too.
  const bool pairs = c.D == 128 && c.dims % 4 == 0 && !c.traditional && x.dtype() != mx::float32;
  const mx::Shape of_q{c.B, c.heads, c.T, c.D}, of_k{c.B, groups, c.T, c.D};
  const auto at = device_ints({c.B, c.T, c.heads, groups, c.dims, c.offset});
  int bits = 0;
  std::vector<float> args{c.scale, 0, 0, 0};
  std::map<std::string, mx::array> values{
      {"freqs", device_divisors(c.dims, c.base, c.freqs, c.s)},
      {"positions", c.segments ? device_ints(positions_of(c.offset, c.T, *c.segments)) : at},
      {"at", at}};
  const char* const names[] = {"q_weight", "k_weight", "v_weight"};
  for (size_t i = 0; i < 3; ++i) {
    auto norm = c.norm(i);
    if (!norm) continue;
    bits |= 1 << i, args[1 + i] = norm->eps;
    values.insert({names[i], norm->weight});
  }
  values.insert({"args", device_floats(args)});
  const Template arguments{{"T", x.dtype()},
                           {"D", c.D},
                           {"NORMS", bits},
                           {"SAME", same},
                           {"TRADITIONAL", c.traditional},
                           {"PAIRS", pairs},
                           {"PACKED", c.segments.has_value()}};
  auto run = [=](const char* name, int heads, int at_once, std::map<std::string, mx::array> arrays,
                 std::vector<mx::Shape> shapes) {
    const auto any = arrays.begin()->second;
    arrays.insert(values.begin(), values.end());
    for (const char* weight : names) arrays.insert({weight, any});
    const std::vector<mx::Dtype> dtypes(shapes.size(), x.dtype());
    const Grid grid{{tiles(c.B * c.T, WARPS), tiles(heads, at_once), 1}, 32 * WARPS};
    auto own = arguments;
    own.push_back({"AT_ONCE", at_once});
    return launch(name, arrays, shapes, dtypes, own, grid, c.s);
  };
  auto split = [=](const mx::array& y) {
    if (!groups) return run("heads_of_q", c.heads, at_once, {{"joint", y}}, {of_q});
    return run("heads", c.heads + 2 * groups, at_once, {{"joint", y}}, {of_q, of_k, of_k});
  };
  auto join = [=](const Arrays& d, const std::optional<mx::array>& y) {
    // A lane keeps one head at a time. The angles of a token are computed once for all of these heads.
    return run("heads_vjp", given, 2 * at_once,
               {{"joint", y.value_or(d[0])}, {"q", d[0]}, {"k", d[groups ? 1 : 0]}, {"v", d[groups ? 2 : 0]}},
               {{c.B * c.T, given * c.D}})[0];
  };
  const Parts parts{groups ? size_t{3} : 1, split, join, bits > 0};
  return joint_linears(mx::reshape(x, {c.B * c.T, -1}, c.s), linears, parts, c.s);
}

/// Returns why the kernels do not support a call, or an empty string if they do.
std::string unfit(const Call& c, const mx::array& x, const std::vector<Linear>& linears) {
  if (c.D % 2 || c.D > MOST_D) return "it supports even head sizes up to 512";
  for (size_t i = 0; i < c.norms.size(); ++i)
    if (c.norms[i] && c.norms[i]->weight.dtype() != x.dtype()) return "the norm weights must have x's dtype";
  return JointLinear::unfit(linears, c.B * c.T, x.dtype(), c.s);
}

}  // namespace

Arrays lora_qkv(const mx::array& x, const std::vector<Linear>& linears, const Heads& heads,
                const std::string& impl, mx::StreamOrDevice s) {
  check(x.ndim() == 3 && !linears.empty() && linears.size() <= 3,
        "[lora_qkv] expected x [B,T,H] and one to three linear layers; got ", x.shape(), " and ",
        linears.size(), ".");
  check(heads.heads > 0 && heads.groups >= 0,
        "[lora_qkv] expected at least one head and a non-negative number of groups; got ", heads.heads,
        " and ", heads.groups, ".");
  for (const auto& linear : linears) check_linear("lora_qkv", linear);
  const int D = linears[0].base.out() / heads.heads;
  bool fits = linears[0].base.out() == heads.heads * D;
  std::string widths;
  for (size_t i = 0; i < linears.size(); ++i) {
    fits = fits && (!i || linears[i].base.out() == heads.groups * D);
    widths += (i ? ", " : "") + std::to_string(linears[i].base.out());
  }
  check(fits, "[lora_qkv] expected q of ", heads.heads, " heads and k and v of ", heads.groups,
        " heads; got widths ", widths, ".");
  const Call c{heads, x.shape(0), x.shape(1), D, impl, s};
  check(c.dims > 0 && c.dims % 2 == 0 && c.dims <= D, "[lora_qkv] dims must be even and at most D = ", D,
        "; got ", c.dims, ".");
  check(c.base.has_value() != c.freqs.has_value(), "[lora_qkv] specify either base or freqs.");
  check(c.norms.size() <= 3, "[lora_qkv] expected at most three norms, of q, k and v; got ", c.norms.size(),
        ".");
  for (const auto& norm : c.norms)
    check(!norm || norm->weight.shape() == mx::Shape{D}, "[lora_qkv] expected norm weights [", D, "]; got ",
          norm ? norm->weight.shape() : mx::Shape{}, ".");
  bool joint =
      !on_cpu(s) && impl != "stock" && gpu_kernel("lora_linear", unfit(c, x, linears)).ok &&
      gpu_kernel("heads", "").ok &&
      static_cast<double>(x.shape(0)) * x.shape(1) * (heads.heads + 2 * heads.groups) * D < (1LL << 31);
  return joint ? by_joint_kernels(c, x, linears) : by_ops(c, x, linears);
}

mx::array merge_heads(const mx::array& o, mx::StreamOrDevice s) {
  check(o.ndim() == 4, "[merge_heads] expected o [B,H,T,D]; got ", o.shape(), ".");
  const int B = o.shape(0), H = o.shape(1), T = o.shape(2), D = o.shape(3);
  auto turned = [s](const mx::array& x) { return mx::transpose(x, {0, 2, 1, 3}, s); };
  // The attention kernels need a row-contiguous gradient. Making the copy here avoids one copy per kernel.
  auto op = mx::custom_vjp(
      [=](const Arrays& in) -> Arrays { return {mx::reshape(turned(in[0]), {B, T, H * D}, s)}; },
      [=](const Arrays&, const Arrays& dy, const Arrays&) -> Arrays {
        return {mx::contiguous(turned(mx::reshape(dy[0], {B, T, H, D}, s)), false, s)};
      });
  return op({o})[0];
}

const Binding lora_qkv_binding([](nb::module_& m) {
  nb::class_<HeadNorm>(m, "HeadNorm", "The RMS norm of a head: weight [D], frozen.")
      .def(nb::init<mx::array, float>(), "weight"_a, "eps"_a)
      .def_ro("weight", &HeadNorm::weight)
      .def_ro("eps", &HeadNorm::eps);
  m.def(
      "lora_qkv",
      [](const mx::array& x, const std::vector<Linear>& linears, int heads, int groups, int dims,
         bool traditional, std::optional<float> base, float scale, int offset, std::optional<mx::array> freqs,
         std::optional<Ranges> segments, std::vector<std::optional<HeadNorm>> norms, const std::string& impl,
         mx::StreamOrDevice s) {
        const Heads how{heads, groups, dims, traditional, base, scale, offset, freqs, segments, norms};
        return lora_qkv(x, linears, how, impl, s);
      },
      "x"_a, "linears"_a, "heads"_a, "groups"_a, "dims"_a, nb::kw_only(), "traditional"_a = false,
      "base"_a = nb::none(), "scale"_a = 1.0f, "offset"_a = 0, "freqs"_a = nb::none(),
      "segments"_a = nb::none(), "norms"_a = std::vector<std::optional<HeadNorm>>{}, "impl"_a = "auto",
      "stream"_a = nb::none(),
      "Returns the normalized and rotated q and k, and the normalized v. x [B,T,H] → [B,heads,T,D], "
      "[B,groups,T,D], [B,groups,T,D].");
  m.def("merge_heads", &merge_heads, "o"_a, nb::kw_only(), "stream"_a = nb::none(),
        "o [B,H,T,D] → [B,T,H·D].");
});

}  // namespace segtrain
