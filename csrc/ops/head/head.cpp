#include "ops/head/head.h"

#include "core/binding.h"
#include "core/cost.h"
#include "core/gpu.h"

namespace segtrain {

HeadCall::HeadCall(const std::string& op, const mx::array& h, const Base& head, const mx::array& targets,
                   std::optional<float> softcap, mx::StreamOrDevice s)
    : head(head), targets(targets), M(h.ndim() ? h.shape(0) : 0), cap(softcap.value_or(0)), s(s) {
  check_base(op, head);
  check(h.ndim() == 2 && h.shape(1) == head.in() && M > 0 && mx::issubdtype(h.dtype(), mx::floating), "[", op,
        "] expected floating h [M, ", head.in(), "] with at least one row; got ", h.shape(), " ", h.dtype(),
        ".");
  check(targets.ndim() == 1 && targets.shape(0) == M && mx::issubdtype(targets.dtype(), mx::integer), "[", op,
        "] expected integer targets [", M, "]; got ", targets.shape(), " ", targets.dtype(), ".");
  check(!softcap || *softcap > 0, "[", op, "] softcap must be above 0; got ", cap, ".");
  this->targets = mx::astype(targets, mx::int32, s);
}

HeadKernel::HeadKernel(const HeadCall& call, const mx::array& h)
    : base(call.head), m(call.M), cap(call.cap), bias(call.head.bias.has_value()) {
  arrays = {h, call.targets};
  arrays.insert(arrays.end(), base.arrays.begin(), base.arrays.end());
  if (bias) arrays.push_back(*call.head.bias);
}

cpu::HeadInput HeadKernel::input(const Inputs& in) const {
  return {m, cap, in[0], bias ? in[2 + base.arrays.size()] : nullptr, in.as<int32_t>(1)};
}

void for_each_block(const HeadCall& call, const mx::array& h,
                    const std::function<Arrays(const RowBlock&)>& use) {
  const auto& s = call.s;
  int V = call.head.out();
  int rows =
      std::clamp(static_cast<int>((1LL << 26) / V) / 128 * 128, 128, 1024);  // 256 MB of float32 logits
  auto vocabulary = mx::reshape(mx::arange(0, V, mx::int32, s), {1, V}, s);
  auto rest = h;
  Arrays made;
  for (int m0 = 0; m0 < call.M; m0 += rows) {
    int m1 = std::min(call.M, m0 + rows);
    if (m0) rest = mx::depends({rest}, made)[0];
    auto z = f32(stock_product(mx::slice(rest, {m0, 0}, {m1, h.shape(1)}, s), call.head, true, s), s);
    if (call.head.bias) z = mx::add(z, f32(*call.head.bias, s), s);
    if (call.cap > 0)
      z = mx::multiply(mx::tanh(mx::divide(z, mx::array(call.cap), s), s), mx::array(call.cap), s);
    auto target = mx::reshape(mx::slice(call.targets, {m0}, {m1}, s), {m1 - m0, 1}, s);
    auto onehot = mx::equal(vocabulary, target, s);
    made = use({m0, m1, z, mx::greater_equal(target, mx::array(0), s), mx::maximum(target, mx::array(0), s),
                onehot});
  }
}

mx::array column(const mx::array& x, const RowBlock& block, mx::StreamOrDevice s) {
  return mx::reshape(mx::slice(x, {block.begin}, {block.end}, s), {block.end - block.begin, 1}, s);
}

mx::array block_dh(const HeadCall& call, mx::array dz, const RowBlock& block, mx::Dtype dtype) {
  const auto& s = call.s;
  if (call.cap > 0) {
    auto t = mx::divide(block.z, mx::array(call.cap), s);
    dz = mx::multiply(dz, mx::subtract(mx::array(1.0f), mx::square(t, s), s), s);
  }
  return f32(stock_product(mx::astype(dz, dtype, s), call.head, false, s), s);
}

// ---- tiles of the vocabulary
//
// As in flash attention, Σ exp(z − max)·w of a row is accumulated over the tiles, and rescaled when the
// maximum increases. Each tile of the head's weight is dequantized once, and its logits are freed before the
// next tile is computed. The sums exclude the target, because computing 1 − p as a difference would lose all
// precision if the target's probability p is nearly 1.

namespace {

constexpr int TILE = 16384, ROWS = 2048, PACK = 8, THREADS = 256;

Base rows_of(const Base& base, const std::function<mx::array(const mx::array&)>& take) {
  Base part = base;
  part.weight = take(base.weight);
  if (base.scales) part.scales = take(*base.scales);
  if (base.biases) part.biases = take(*base.biases);
  return part;
}

/// Returns {loss, dh} for up to ROWS rows.
Arrays tile_pass(const HeadCall& call, const mx::array& h, const mx::array& targets, bool needs_grad) {
  const auto& s = call.s;
  const int m = h.shape(0), hidden = h.shape(1), vocabulary = call.head.out();
  const auto dtype = h.dtype();
  const Template plain{{"T", dtype}, {"CAP", call.cap > 0}};
  auto state = mx::concatenate({mx::full({1, m}, -std::numeric_limits<float>::infinity(), mx::float32, s),
                                mx::zeros({2, m}, mx::float32, s)},
                               0, s);
  auto sum = mx::zeros({m, hidden}, mx::float32, s);
  std::map<std::string, mx::array> values{{"targets", targets}, {"args", device_floats({call.cap})}};
  auto at = [&](int v, int v0) {
    values.insert_or_assign("at", device_ints({m, v, v0, hidden, vocabulary}));
  };
  for (int v0 = 0; v0 < vocabulary; v0 += TILE) {
    const int v = std::min(TILE, vocabulary - v0);
    auto part = rows_of(call.head,
                        [&](const mx::array& x) { return mx::slice(x, {v0, 0}, {v0 + v, x.shape(1)}, s); });
    // Each tile waits for the previous one, so only one tile is in memory at a time.
    if (v0) part.weight = mx::depends({part.weight}, needs_grad ? Arrays{sum, state} : Arrays{state})[0];
    auto w = unpack({part}, dtype, {}, {}, s);
    auto z = mx::matmul(h, mx::transpose(w, s), s);
    auto bias = call.head.bias ? f32(mx::slice(*call.head.bias, {v0}, {v0 + v}, s), s) : device_floats({0});
    values.insert_or_assign("bias", bias);
    values.insert_or_assign("z", z);
    values.insert_or_assign("before", state);
    at(v, v0);
    auto arguments = plain;
    arguments.insert(arguments.end(),
                     {{"PACKS", tiles(v, PACK * THREADS)}, {"BIAS", call.head.bias.has_value()}});
    auto made = launch("head_tile", values, {{m, v}, {3, m}, {m}}, {dtype, mx::float32, mx::float32},
                       arguments, {{m, 1, 1}, THREADS, 0, 4}, s);
    state = made[1];
    if (!needs_grad) continue;
    values.insert_or_assign("before", sum);
    values.insert_or_assign("more", mx::matmul(made[0], w, s));
    values.insert_or_assign("rescale", made[2]);
    sum = launch("head_sum", values, {{m, hidden}}, {mx::float32}, plain,
                 {{tiles(m * hidden, PACK * THREADS), 1, 1}, THREADS}, s)[0];
  }
  at(0, 0);
  values.insert_or_assign("state", state);
  Arrays out =
      launch("head_loss", values, {{m}}, {mx::float32}, plain, {{tiles(m, THREADS), 1, 1}, THREADS}, s);
  if (!needs_grad) return out;
  auto index = mx::clip(targets, mx::array(0), mx::array(vocabulary - 1), s);
  auto own = rows_of(call.head, [&](const mx::array& x) { return take_rows(x, index, "auto", s); });
  values.insert_or_assign("w", unpack({own}, dtype, {}, {}, s));
  values.insert_or_assign("sum", sum);
  out.push_back(launch("head_dh", values, {h.shape()}, {dtype}, plain, {{m, 1, 1}, THREADS}, s)[0]);
  return out;
}

}  // namespace

std::string row_losses_unfit(const HeadCall& call, const mx::array& h) {
  if (!on_cuda(call.s)) return "it needs CUDA";
  if (h.dtype() != mx::float16 && h.dtype() != mx::bfloat16)
    return "its matrix units support half precision only";
  if (call.head.out() % PACK) return "the size of the vocabulary must be a multiple of 8";
  return unpack_unfit({call.head}, h.dtype());
}

mx::array row_losses(const HeadCall& call, const mx::array& h, bool needs_grad) {
  const auto& s = call.s;
  auto forward = [=](const Arrays& in) {
    Arrays losses, dhs;
    auto rest = in[0];
    for (int m0 = 0; m0 < call.M; m0 += ROWS) {
      int m1 = std::min(call.M, m0 + ROWS);
      if (m0) rest = mx::depends({rest}, {needs_grad ? dhs.back() : losses.back()})[0];
      auto made = tile_pass(call, mx::slice(rest, {m0, 0}, {m1, h.shape(1)}, s),
                            mx::slice(call.targets, {m0}, {m1}, s), needs_grad);
      losses.push_back(made[0]);
      if (needs_grad) dhs.push_back(made[1]);
    }
    Arrays out{losses.size() == 1 ? losses[0] : mx::concatenate(losses, 0, s)};
    if (needs_grad) out.push_back(dhs.size() == 1 ? dhs[0] : mx::concatenate(dhs, 0, s));
    return out;
  };
  if (!needs_grad) return mx::stop_gradient(forward({h})[0], s);
  auto vjp = [=](const Arrays& in, const Arrays& d, const Arrays& out) -> Arrays {
    return {mx::astype(mx::multiply(f32(out[1], s), mx::expand_dims(d[0], 1, s), s), in[0].dtype(), s)};
  };
  return mx::custom_vjp(forward, vjp)({h})[0];
}

namespace {

/// Returns the cost of a head. On a GPU it consists of a tile of the weight and, for a chunk of rows, the
/// tile's logits, their gradients, and dh.
OpCost head_cost(const Device& device, int rows, int inputs, int vocabulary) {
  int64_t most = cpu::head_scratch(rows, vocabulary, inputs);
  if (device.gpu() != Gpu::none) {
    const int64_t tile = std::min(vocabulary, TILE), chunk = std::min(rows, ROWS);
    most = 2 * tile * inputs + 4 * chunk * tile + 6 * chunk * inputs;
  }
  return {.forward = most, .backward = most};
}

}  // namespace

const Binding head_binding([](nb::module_& m) {
  m.def("head_cost", &head_cost, "device"_a, nb::kw_only(), "rows"_a, "inputs"_a, "vocabulary"_a,
        "Returns the memory that linear_cross_entropy or linear_log_probs needs on a device for this number "
        "of rows with a target.");
});

std::optional<mx::array> rows_with_target(const HeadCall& call, bool padded) {
  if (!padded || call.targets.is_tracer()) return std::nullopt;
  auto targets = mx::contiguous(call.targets, false, mx::Device::cpu);
  mx::eval(targets);
  std::vector<int32_t> rows;
  for (int i = 0; i < call.M; ++i)
    if (targets.data<int32_t>()[i] >= 0) rows.push_back(i);
  if (static_cast<int>(rows.size()) == call.M) return std::nullopt;
  return mx::array(rows.begin(), {static_cast<int>(rows.size())}, mx::int32);
}

HeadCall some_rows(HeadCall call, const mx::array& index) {
  call.M = index.shape(0);
  call.targets = take_rows(call.targets, index, "auto", call.s);
  return call;
}

}  // namespace segtrain
