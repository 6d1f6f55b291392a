// loss = Σ w·(lse(z) − (1 − ε)·z[target] − ε·mean(z)), z = cap(h·Wᵀ + bias);
// dz = w·(softmax(z) − (1 − ε)·onehot − ε/V)·cap'(z);  dh = dz·W.
// ε is the label smoothing and V the vocabulary size. dh is computed while the z of a chunk of rows is in
// memory, so z is neither kept nor recomputed.
#include "core/binding.h"
#include "core/gpu.h"
#include "ops/head/head.h"

namespace segtrain {

namespace {

struct Loss {
  mx::array weights;  ///< [M] float32
  float smoothing;    ///< ε
  bool needs_grad;
};

/// Computes {loss, dh} with the kernel in cpu.cpp.
Arrays kernel_pass(const HeadCall& call, const mx::array& h, const Loss& loss) {
  HeadKernel head(call, h);
  Arrays inputs = std::exchange(head.arrays, {});
  inputs.push_back(loss.weights);
  std::vector<mx::Shape> shapes{{}};
  if (loss.needs_grad) shapes.push_back(h.shape());
  return cpu_op(
      "linear_cross_entropy", inputs, shapes,
      [head, smoothing = loss.smoothing](auto& in, auto& out) {
        const float* weights = in[in.size() - 1];
        float* dh = out.size() > 1 ? out[1] : nullptr;
        cpu::cross_entropy(head.weight(in), {head.input(in), smoothing, weights, out[0], dh});
      },
      call.s);
}

/// Computes {loss, dh} with MLX's ops on blocks of rows.
Arrays blocked_pass(const HeadCall& call, const mx::array& h, const Loss& loss) {
  const auto& s = call.s;
  auto total = mx::array(0.0f);
  auto certain = mx::array(1 - loss.smoothing), smoothing = mx::array(loss.smoothing);
  auto uniform = mx::array(loss.smoothing / static_cast<float>(call.head.out()));
  Arrays dhs;
  for_each_block(call, h, [&](const RowBlock& block) -> Arrays {
    const auto& z = block.z;
    auto w = mx::where(block.counts, column(loss.weights, block, s), mx::array(0.0f), s);
    auto lse = mx::logsumexp(z, -1, true, s);
    auto likely = mx::take_along_axis(z, block.target, -1, s);
    if (loss.smoothing > 0)
      likely =
          mx::add(mx::multiply(certain, likely, s), mx::multiply(smoothing, mx::mean(z, -1, true, s), s), s);
    total = mx::add(total, mx::sum(mx::multiply(w, mx::subtract(lse, likely, s), s), false, s), s);
    if (!loss.needs_grad) return {total};
    auto dz = mx::subtract(mx::exp(mx::subtract(z, lse, s), s),
                           mx::multiply(certain, mx::astype(block.onehot, mx::float32, s), s), s);
    if (loss.smoothing > 0) dz = mx::subtract(dz, uniform, s);
    dhs.push_back(block_dh(call, mx::multiply(dz, w, s), block, h.dtype()));
    return {total, dhs.back()};
  });
  if (!loss.needs_grad) return {total};
  return {total, mx::concatenate(dhs, 0, s)};
}

}  // namespace

mx::array linear_cross_entropy(const mx::array& h, const Base& head, const mx::array& targets,
                               const std::optional<mx::array>& weights, std::optional<float> softcap,
                               float label_smoothing, bool needs_grad, bool padded, const std::string& impl,
                               mx::StreamOrDevice s) {
  HeadCall call("linear_cross_entropy", h, head, targets, softcap, s);
  check(!weights || weights->shape() == mx::Shape{call.M}, "[linear_cross_entropy] weights must be [", call.M,
        "]; got ", weights ? weights->shape() : mx::Shape{}, ".");
  check(label_smoothing >= 0 && label_smoothing < 1,
        "[linear_cross_entropy] label_smoothing must be at least 0 and below 1; got ", label_smoothing, ".");
  auto by_tiles = label_smoothing > 0 ? "it does not support label smoothing" : row_losses_unfit(call, h);
  Way way = on_cpu(s) ? cpu_kernel(s) : gpu_kernel("linear_cross_entropy", by_tiles);
  bool kernel = choose("linear_cross_entropy", impl, {way, {"blocked", true, ""}}) == "kernel";
  Loss loss{weights ? f32(*weights, s) : mx::ones({call.M}, mx::float32, s), label_smoothing, needs_grad};

  if (kernel && !on_cpu(s)) {
    auto rows = h;
    if (auto index = rows_with_target(call, padded)) {
      if (!index->size()) return mx::array(0.0f);
      call = some_rows(call, *index);
      rows = take_rows(h, *index, "auto", s);
      loss.weights = take_rows(loss.weights, *index, "auto", s);
    }
    auto w = loss.weights;
    if (padded) w = mx::where(mx::less(call.targets, mx::array(0), s), mx::array(0.0f), w, s);
    return mx::sum(mx::multiply(mx::stop_gradient(w, s), row_losses(call, rows, needs_grad), s), false, s);
  }
  auto pass = kernel ? kernel_pass : blocked_pass;
  if (!needs_grad) return mx::reshape(pass(call, h, loss)[0], {}, s);
  auto op = mx::custom_vjp([=](const Arrays& in) { return pass(call, in[0], loss); },
                           [=](const Arrays& in, const Arrays& dloss, const Arrays& out) -> Arrays {
                             return {mx::astype(mx::multiply(out[1], dloss[0], s), in[0].dtype(), s)};
                           });
  return op({h})[0];
}

const Binding linear_cross_entropy_binding([](nb::module_& m) {
  m.def("linear_cross_entropy", &linear_cross_entropy, "h"_a, "head"_a, "targets"_a, "weights"_a = nb::none(),
        nb::kw_only(), "softcap"_a = nb::none(), "label_smoothing"_a = 0.0f, "needs_grad"_a = true,
        "padded"_a = true, "impl"_a = "auto", "stream"_a = nb::none(),
        "Σ weights·cross_entropy(h·Wᵀ, targets). h [M, H], targets [M], weights [M] → [] float32.");
});

}  // namespace segtrain
