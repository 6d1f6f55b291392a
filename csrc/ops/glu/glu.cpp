// Gated linear units. The forward and the backward pass are one kernel each (csrc/cpu/rows.cpp,
// metal/glu.metal, cuda/glu.cu).
//
// Both activations are g·σ(u), where g is the gate. With u = g this is SiLU. With u = k·(g + 0.044715·g³) and
// k = 2·√(2/π) it is the tanh approximation of GELU, since (1 + tanh z)/2 = σ(2z). Because this form does not
// use tanh, it does not lose precision for large negative gates.
#include "ops/glu/glu.h"

#include <climits>

#include "core/binding.h"
#include "core/gpu.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain {

namespace {

struct Glu {
  bool gelu;
  mx::StreamOrDevice s;
};

// ---- CPU

Arrays cpu_forward(const Glu& c, const Arrays& x) {
  return cpu_op(
      "glu", x, {x[0].shape()},
      [glu = cpu::rows().glu[c.gelu], n = x[0].size()](auto& in, auto& out) {
        cpu::over(n, cpu::WORTH_A_THREAD,
                  [&](size_t i, size_t end) { glu(in[0] + i, in[1] + i, out[0] + i, end - i); });
      },
      c.s);
}

Arrays cpu_vjp(const Glu& c, const Arrays& x, const mx::array& dy) {
  auto shape = x[0].shape();
  return cpu_op(
      "glu_vjp", {x[0], x[1], dy}, {shape, shape},
      [glu_vjp = cpu::rows().glu_vjp[c.gelu], n = x[0].size()](auto& in, auto& out) {
        cpu::over(n, cpu::WORTH_A_THREAD, [&](size_t i, size_t end) {
          glu_vjp(in[0] + i, in[1] + i, in[2] + i, out[0] + i, out[1] + i, end - i);
        });
      },
      c.s);
}

// ---- GPU

constexpr int GLU_THREADS = 256;
constexpr int OF_A_THREAD_METAL = 4, OF_A_THREAD_CUDA = 8;  ///< elements per thread

/// Returns the number of thread groups; n may be INT_MAX.
int groups_for(int n, int of_a_thread) {
  return (n - 1) / (GLU_THREADS * of_a_thread) + 1;
}

std::string gpu_unfit(size_t n) {
  if (n == 0) return "the arrays are empty";
  return n > INT_MAX ? "it supports arrays of up to 2³¹ − 1 elements" : "";
}

Arrays gpu_launch(const Glu& c, const std::string& name, std::map<std::string, mx::array> values,
                  int n_outputs) {
  const auto& gate = values.at("gate");
  auto shape = gate.shape();
  auto dtype = gate.dtype();
  int n = static_cast<int>(gate.size());
  for (auto& [_, x] : values) x = mx::reshape(x, {n}, c.s);
  values.insert({"at", device_ints({n})});
  const bool metal = gpu() == Gpu::metal;
  int groups = groups_for(n, metal ? OF_A_THREAD_METAL : OF_A_THREAD_CUDA);
  Template arguments{{"T", dtype}, {"GELU", c.gelu}};
  if (metal) arguments.push_back({"PER", OF_A_THREAD_METAL});
  return launch(name, values, std::vector<mx::Shape>(n_outputs, shape),
                std::vector<mx::Dtype>(n_outputs, dtype), arguments, {{groups, 1, 1}, GLU_THREADS}, c.s);
}

Arrays gpu_forward(const Glu& c, const Arrays& x) {
  return gpu_launch(c, "glu", {{"gate", x[0]}, {"up", x[1]}}, 1);
}

Arrays gpu_vjp(const Glu& c, const Arrays& x, const mx::array& dy) {
  return gpu_launch(c, "glu_vjp", {{"gate", x[0]}, {"up", x[1]}, {"dy", mx::astype(dy, x[0].dtype(), c.s)}},
                    2);
}

/// Launches a kernel on gate_up [rows, 2·f].
mx::array joint_launch(const std::string& name, bool gelu, std::map<std::string, mx::array> values,
                       const mx::Shape& shape, mx::StreamOrDevice s) {
  const auto& gate_up = values.at("gate_up");
  auto dtype = gate_up.dtype();
  int f = gate_up.shape(1) / 2, n = gate_up.shape(0) * f;
  values.insert({"at", device_ints({n, f})});
  return launch(name, values, {shape}, {dtype}, {{"T", dtype}, {"GELU", gelu}},
                {{groups_for(n, OF_A_THREAD_CUDA), 1, 1}, GLU_THREADS}, s)[0];
}

// ---- stock

mx::array scaled(const mx::array& x, float factor, mx::StreamOrDevice s) {
  return mx::multiply(x, mx::array(factor), s);
}

constexpr float K = 1.5957691216f, CUBIC = 0.044715f;

/// Returns {u, du/dg}.
std::pair<mx::array, mx::array> inner(const Glu& c, const mx::array& g) {
  auto one = mx::array(1.0f);
  if (!c.gelu) return {g, one};
  // For |g| > 32, σ is 0 or 1. q is clamped, because an infinite du would result in 0·∞.
  auto q = mx::minimum(mx::square(g, c.s), mx::array(1024.0f), c.s);
  auto u = mx::multiply(scaled(g, K, c.s), mx::add(one, scaled(q, CUBIC, c.s), c.s), c.s);
  return {u, scaled(mx::add(one, scaled(q, 3 * CUBIC, c.s), c.s), K, c.s)};
}

Arrays stock_forward(const Glu& c, const Arrays& x) {
  auto g = f32(x[0], c.s);
  auto act = mx::multiply(g, mx::sigmoid(inner(c, g).first, c.s), c.s);
  return {mx::multiply(act, f32(x[1], c.s), c.s)};
}

/// act' = σ + g·σ·(1 − σ)·u'
Arrays stock_vjp(const Glu& c, const Arrays& x, const mx::array& dy) {
  auto g = f32(x[0], c.s), d = f32(dy, c.s);
  auto [u, du] = inner(c, g);
  auto sigma = mx::sigmoid(u, c.s), act = mx::multiply(g, sigma, c.s);
  auto bend = mx::multiply(mx::multiply(act, mx::subtract(mx::array(1.0f), sigma, c.s), c.s), du, c.s);
  auto slope = mx::add(sigma, bend, c.s);
  return {mx::multiply(mx::multiply(d, f32(x[1], c.s), c.s), slope, c.s), mx::multiply(d, act, c.s)};
}

mx::array glu(const std::string& op, bool gelu, const mx::array& gate, const mx::array& up,
              const std::string& impl, mx::StreamOrDevice s) {
  check(gate.shape() == up.shape(), "[", op, "] gate and up must have the same shape; got ", gate.shape(),
        " and ", up.shape(), ".");
  check(gate.dtype() == up.dtype() && mx::issubdtype(gate.dtype(), mx::floating), "[", op,
        "] gate and up must have the same floating dtype; got ", gate.dtype(), " and ", up.dtype(), ".");
  bool cpu = on_cpu(s);
  Way way = cpu ? cpu_kernel(s) : gpu_kernel(op, gpu_unfit(gate.size()));
  bool kernel = choose(op, impl, {way, {"stock", true, ""}}) == "kernel";
  Glu c{gelu, s};
  auto forward = kernel ? (cpu ? cpu_forward : gpu_forward) : stock_forward;
  auto vjp = kernel ? (cpu ? cpu_vjp : gpu_vjp) : stock_vjp;
  auto with_dtype = [dtype = gate.dtype(), s](Arrays arrays) {
    for (auto& x : arrays) x = mx::astype(x, dtype, s);
    return arrays;
  };
  auto f = mx::custom_vjp(
      [=](const Arrays& x) { return with_dtype(forward(c, x)); },
      [=](const Arrays& x, const Arrays& dy, const Arrays&) { return with_dtype(vjp(c, x, dy[0])); });
  return f({gate, up})[0];
}

}  // namespace

mx::array glu_joint(bool gelu, const mx::array& gate_up, mx::StreamOrDevice s) {
  return joint_launch("glu_joint", gelu, {{"gate_up", gate_up}}, {gate_up.shape(0), gate_up.shape(1) / 2}, s);
}

mx::array glu_joint_vjp(bool gelu, const mx::array& gate_up, const mx::array& dh, mx::StreamOrDevice s) {
  return joint_launch("glu_joint_vjp", gelu, {{"gate_up", gate_up}, {"dh", dh}}, gate_up.shape(), s);
}

mx::array swiglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s) {
  return glu("swiglu", false, gate, up, impl, s);
}

mx::array geglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s) {
  return glu("geglu", true, gate, up, impl, s);
}

const Binding glu_binding([](nb::module_& m) {
  m.def("swiglu", &swiglu, "gate"_a, "up"_a, nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "silu(gate)·up. [..., F] → [..., F].");
  m.def("geglu", &geglu, "gate"_a, "up"_a, nb::kw_only(), "impl"_a = "auto", "stream"_a = nb::none(),
        "gelu(gate)·up with the tanh approximation of GELU. [..., F] → [..., F].");
});

}  // namespace segtrain
