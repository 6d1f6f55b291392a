// log_p = z[target] − lse(z), z = cap(h·Wᵀ + bias).
//   dz = dlog_p·(onehot − exp(z − lse))·cap'(z), dh = dz·W   with z recomputed, one chunk of rows at a time
#include "core/binding.h"
#include "core/gpu.h"
#include "ops/head/head.h"

namespace segtrain {

namespace {

/// Computes {log_p, lse} with the kernel in cpu.cpp.
Arrays kernel_forward(const HeadCall& call, const mx::array& h) {
  HeadKernel head(call, h);
  const Arrays inputs = std::exchange(head.arrays, {});
  return cpu_op(
      "linear_log_probs", inputs, {{call.M}, {call.M}},
      [head](auto& in, auto& out) { cpu::log_probs(head.weight(in), head.input(in), out[0], out[1]); },
      call.s);
}

mx::array kernel_vjp(const HeadCall& call, const mx::array& h, const mx::array& lse,
                     const mx::array& dlog_p) {
  HeadKernel head(call, h);
  Arrays inputs = std::exchange(head.arrays, {});
  inputs.insert(inputs.end(), {lse, dlog_p});
  return cpu_op(
      "linear_log_probs_vjp", inputs, {h.shape()},
      [head](auto& in, auto& out) {
        auto lse = in.size() - 2, dlog_p = in.size() - 1;
        cpu::log_probs_vjp(head.weight(in), head.input(in), in[lse], in[dlog_p], out[0]);
      },
      call.s)[0];
}

/// Computes {log_p, lse} with MLX's ops on blocks of rows.
Arrays blocked_forward(const HeadCall& call, const mx::array& h) {
  const auto& s = call.s;
  Arrays log_ps, lses;
  for_each_block(call, h, [&](const RowBlock& block) -> Arrays {
    auto lse = mx::logsumexp(block.z, -1, true, s);
    auto log_p = mx::subtract(mx::take_along_axis(block.z, block.target, -1, s), lse, s);
    log_ps.push_back(mx::squeeze(mx::where(block.counts, log_p, mx::array(0.0f), s), -1, s));
    lses.push_back(mx::squeeze(lse, -1, s));
    return {log_ps.back(), lses.back()};
  });
  return {mx::concatenate(log_ps, 0, s), mx::concatenate(lses, 0, s)};
}

mx::array blocked_vjp(const HeadCall& call, const mx::array& h, const mx::array& lse,
                      const mx::array& dlog_p) {
  const auto& s = call.s;
  Arrays dhs;
  for_each_block(call, h, [&](const RowBlock& block) -> Arrays {
    auto d = mx::where(block.counts, column(dlog_p, block, s), mx::array(0.0f), s);
    auto p = mx::exp(mx::subtract(block.z, column(lse, block, s), s), s);
    auto dz = mx::multiply(mx::subtract(mx::astype(block.onehot, mx::float32, s), p, s), d, s);
    dhs.push_back(block_dh(call, dz, block, h.dtype()));
    return {dhs.back()};
  });
  return mx::concatenate(dhs, 0, s);
}

}  // namespace

mx::array linear_log_probs(const mx::array& h, const Base& head, const mx::array& targets,
                           std::optional<float> softcap, bool needs_grad, bool padded,
                           const std::string& impl, mx::StreamOrDevice s) {
  HeadCall whole("linear_log_probs", h, head, targets, softcap, s);
  bool cpu = on_cpu(s);
  Way way = cpu ? cpu_kernel(s) : gpu_kernel("linear_cross_entropy", row_losses_unfit(whole, h));
  bool kernel = choose("linear_log_probs", impl, {way, {"blocked", true, ""}}) == "kernel";
  auto forward = kernel ? kernel_forward : blocked_forward;
  auto vjp = kernel ? kernel_vjp : blocked_vjp;
  auto run = [=](const HeadCall& c, const mx::array& x) {
    if (kernel && !cpu) return mx::negative(row_losses(c, x, needs_grad), s);
    auto op = mx::custom_vjp([=](const Arrays& in) { return forward(c, in[0]); },
                             [=](const Arrays& in, const Arrays& d, const Arrays& out) -> Arrays {
                               return {mx::astype(vjp(c, in[0], out[1], d[0]), in[0].dtype(), s)};
                             });
    return op({x})[0];
  };
  if (kernel && cpu) return run(whole, h);

  // The C++ kernel skips rows without a target. The other implementations compute all rows, so we pass them
  // only the rows with a target.
  auto index = rows_with_target(whole, padded);
  if (!index) return run(whole, h);
  auto none = mx::zeros({whole.M}, mx::float32, s);
  if (!index->size()) return none;
  return mx::put_along_axis(none, *index, run(some_rows(whole, *index), take_rows(h, *index, "auto", s)), 0,
                            s);
}

const Binding linear_log_probs_binding([](nb::module_& m) {
  m.def("linear_log_probs", &linear_log_probs, "h"_a, "head"_a, "targets"_a, nb::kw_only(),
        "softcap"_a = nb::none(), "needs_grad"_a = true, "padded"_a = true, "impl"_a = "auto",
        "stream"_a = nb::none(), "log softmax(h·Wᵀ)[targets]. h [M, H], targets [M] → [M] float32.");
});

}  // namespace segtrain
