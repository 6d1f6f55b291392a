// y = down(h), h = act(gate(x))·up(x). x and the outputs of gate and up are kept; h is recomputed.
//   lora_linears (down) computes dh; glu computes dgate and dup; lora_linears (gate and up) computes dx.
// On CUDA, one matrix product computes gate and up as one array; their gradient is one array too.
#include "core/binding.h"
#include "core/cost.h"
#include "core/gpu.h"
#include "ops/glu/glu.h"
#include "ops/linear/joint_linear.h"

namespace segtrain {

namespace {

struct Mlp {
  Linear gate, up, down;
  bool gelu;
  std::string impl;
  mx::StreamOrDevice s;

  Arrays primals(const mx::array& x) const { return primals_of(x, {gate, up, down}); }
  size_t at_up() const { return gate.a ? 3 : 1; }
  size_t at_down() const { return at_up() + (up.a ? 2 : 0); }

  /// Returns the layer with p[at] and p[at + 1] as its factors. A layer without factors is returned
  /// unchanged.
  static Linear with(const Linear& linear, const Arrays& p, size_t at) {
    return linear.a ? linear.with_factors(p[at], p[at + 1]) : linear;
  }
  /// Returns the MLP with its factors replaced by those in the primals `p`.
  Mlp with(const Arrays& p) const {
    return {with(gate, p, 1), with(up, p, at_up()), with(down, p, at_down()), gelu, impl, s};
  }

  mx::array hidden(const Arrays& gate_up) const {
    return gelu ? geglu(gate_up[0], gate_up[1], impl, s) : swiglu(gate_up[0], gate_up[1], impl, s);
  }
};

mx::array by_ops(const Mlp& c, const mx::array& x) {
  auto rest = [=](const Arrays& in) {
    return lora_linears(c.hidden(in), {Mlp::with(c.down, in, 2)}, 0, {}, c.impl, c.s);
  };
  auto in = lora_linears(x, {c.gate, c.up}, 0, {}, c.impl, c.s);
  if (c.down.a) in.insert(in.end(), {*c.down.a, *c.down.b});
  auto again = [=](const Arrays& in, const Arrays& dy, const Arrays&) {
    return mx::vjp(rest, in, dy).second;
  };
  return with_vjp(in, 1, rest, again)[0];
}

mx::array by_joint_kernels(const Mlp& c, const mx::array& x) {
  const JointLinear both({c.gate, c.up}, x.dtype(), c.s), down({c.down}, x.dtype(), c.s);
  auto factors = [c](const Arrays& p, bool of_down) {
    return of_down ? Arrays(p.begin() + c.at_down(), p.end())
                   : Arrays(p.begin() + 1, p.begin() + c.at_down());
  };
  auto forward = [=](const Arrays& p) {
    auto [gate_up, kept] = both.forward(p[0], factors(p, false));
    auto [y, kept_down] = down.forward(glu_joint(c.gelu, gate_up, c.s), factors(p, true));
    Arrays out{y, gate_up};
    for (const auto* some : {&kept, &kept_down}) out.insert(out.end(), some->begin(), some->end());
    return out;
  };
  auto vjp = [=](const Arrays& p, const Arrays& dys, const Arrays& y) {
    const auto at_down = y.end() - (c.down.a ? 3 : 0);
    const Arrays kept(y.begin() + 2, at_down), kept_down(at_down, y.end());
    auto dy = mx::astype(dys[0], p[0].dtype(), c.s);
    auto [dh, u_down] = down.dx(dy, kept_down);
    auto d_both = glu_joint_vjp(c.gelu, y[1], dh, c.s);
    Arrays of_both, of_down;
    if (u_down) {
      auto h = glu_joint(c.gelu, after(y[1], {d_both}), c.s);  // after dh is freed
      of_down = down.gradients(factors(p, true), h, dy, kept_down[0], *u_down);
      d_both = after(d_both, of_down);  // after h and gate_up are freed
    }
    auto [dx, u] = both.dx(d_both, kept);
    if (u) of_both = both.gradients(factors(p, false), p[0], d_both, kept[0], *u);
    Arrays grads{after(dx, of_both)};
    for (const auto* some : {&of_both, &of_down}) grads.insert(grads.end(), some->begin(), some->end());
    return grads;
  };
  return with_vjp(c.primals(x), 1, forward, vjp)[0];
}

mx::array whole(const Mlp& c, const mx::array& x) {
  int rows = x.shape(0);
  auto fits = [&](const std::vector<Linear>& linears) {
    return gpu_kernel("lora_linear", JointLinear::unfit(linears, rows, x.dtype(), c.s)).ok;
  };
  bool joint = !on_cpu(c.s) && c.impl != "stock" && fits({c.gate, c.up}) && fits({c.down}) &&
               gpu_kernel(c.gelu ? "geglu" : "swiglu", "").ok &&
               static_cast<double>(rows) * c.gate.base.out() < (1LL << 31) - 4096;
  return joint ? by_joint_kernels(c, x) : by_ops(c, x);
}

/// Computes the MLP in tiles and keeps only x. Each tile waits for the previous one, so only one tile is in
/// memory at a time.
mx::array tiled(const Mlp& c, const mx::array& x, int tile) {
  auto slice = [s = c.s](const mx::array& y, int begin, int end) {
    return mx::slice(y, {begin, 0}, {end, y.shape(1)}, s);
  };
  auto forward = [=](const Arrays& p) -> Arrays {
    const auto here = c.with(p);
    Arrays ys;
    for (int begin = 0; begin < p[0].shape(0); begin += tile) {
      auto part = slice(p[0], begin, std::min(p[0].shape(0), begin + tile));
      ys.push_back(whole(here, after(part, ys.empty() ? Arrays{} : Arrays{ys.back()})));
    }
    return {mx::concatenate(ys, 0, c.s)};
  };
  auto vjp = [=](const Arrays& p, const Arrays& dys, const Arrays&) -> Arrays {
    Arrays dxs, sums;
    for (int begin = 0; begin < p[0].shape(0); begin += tile) {
      int end = std::min(p[0].shape(0), begin + tile);
      auto in = p;
      in[0] = slice(p[0], begin, end);
      if (begin) {
        Arrays before = sums;
        before.push_back(dxs.back());
        in[0] = after(in[0], before);
      }
      auto f = [&](const Arrays& q) { return Arrays{whole(c.with(q), q[0])}; };
      auto grads = mx::vjp(f, in, {slice(dys[0], begin, end)}).second;
      dxs.push_back(grads[0]);
      for (size_t i = 1; i < grads.size(); ++i)
        if (begin)
          sums[i - 1] = mx::add(sums[i - 1], grads[i], c.s);
        else
          sums.push_back(grads[i]);
    }
    sums.insert(sums.begin(), mx::concatenate(dxs, 0, c.s));
    return sums;
  };
  return mx::custom_vjp(forward, vjp)(c.primals(x))[0];
}

}  // namespace

mx::array lora_glu_mlp(const mx::array& x, const Linear& gate, const Linear& up, const Linear& down,
                       bool gelu, std::optional<int> tile_rows, const std::string& impl,
                       mx::StreamOrDevice s) {
  for (const auto* linear : {&gate, &up, &down}) check_linear("lora_glu_mlp", *linear);
  const int h = gate.base.in(), f = gate.base.out();
  check(x.ndim() >= 1 && x.shape(-1) == h && up.base.in() == h && up.base.out() == f && down.base.in() == f,
        "[lora_glu_mlp] expected x [..., H], gate and up [F, H] and down [·, F]; got ", x.shape(), ", (", f,
        ",", h, "), (", up.base.out(), ",", up.base.in(), ") and (", down.base.out(), ",", down.base.in(),
        ").");
  check(!tile_rows || *tile_rows > 0, "[lora_glu_mlp] tile_rows must be above 0; got ", tile_rows.value_or(0),
        ".");
  Mlp c{gate, up, down, gelu, impl, s};
  auto flat = mx::reshape(x, {static_cast<int>(x.size() / h), h}, s);
  auto y = tile_rows && *tile_rows < flat.shape(0) ? tiled(c, flat, *tile_rows) : whole(c, flat);
  auto shape = x.shape();
  shape.back() = down.base.out();
  return mx::reshape(y, shape, s);
}

namespace {

OpCost lora_glu_mlp_cost(const Device& device, int rows, int inputs, int hidden,
                         std::optional<int> tile_rows) {
  const int tile = std::min(rows, tile_rows.value_or(rows));
  const int64_t h = static_cast<int64_t>(device.size) * hidden, f = h * tile, size = device.size;
  // With tiles, only x is kept. The outputs of the tiles are concatenated at the end; on a GPU, measurements
  // showed that this needs twice the size of the outputs.
  const int64_t kept = tile < rows ? 0 : 2 * f;
  const int64_t copies = device.gpu() == Gpu::none ? 1 : 2;
  const int64_t joined = tile < rows ? copies * size * rows * inputs : 0;
  if (device.gpu() == Gpu::none) {
    auto either = [&](auto scratch) {
      return static_cast<int64_t>(std::max(scratch(hidden, inputs), scratch(inputs, hidden)));
    };
    return {.forward = 3 * f + joined + either(cpu::linear_scratch),
            .backward = 6 * f + joined + either(cpu::linear_dx_scratch),
            .kept = kept};
  }
  // During the first matrix product, the dequantized weights and the workspace of this product are also in
  // memory.
  const auto weights = static_cast<int64_t>(1.6 * 2 * static_cast<double>(h * inputs));
  const int64_t first = 2 * f + weights + device.workspace;
  return {.forward = std::max(first, 3 * f) + joined, .backward = 5 * f + joined, .kept = kept};
}

}  // namespace

const Binding lora_glu_mlp_binding([](nb::module_& m) {
  m.def("lora_glu_mlp_cost", &lora_glu_mlp_cost, "device"_a, nb::kw_only(), "rows"_a, "inputs"_a, "hidden"_a,
        "tile_rows"_a = nb::none(), "Returns the memory that lora_glu_mlp needs on a device.");
  m.def("lora_glu_mlp", &lora_glu_mlp, "x"_a, "gate"_a, "up"_a, "down"_a, nb::kw_only(), "gelu"_a = false,
        "tile_rows"_a = nb::none(), "impl"_a = "auto", "stream"_a = nb::none(),
        "down(act(gate(x))·up(x)). x [..., H] → [..., H].");
});

}  // namespace segtrain
