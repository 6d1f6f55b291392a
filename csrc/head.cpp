#include "head.h"

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
    : base(call.head, call.s), m(call.M), cap(call.cap), bias(call.head.bias.has_value()) {
  arrays = {f32(h, call.s), call.targets};
  arrays.insert(arrays.end(), base.arrays.begin(), base.arrays.end());
  if (bias) arrays.push_back(f32(*call.head.bias, call.s));
}

cpu::HeadInput HeadKernel::input(const std::vector<const void*>& in) const {
  auto at_bias = 2 + base.arrays.size();
  return {m, cap, static_cast<const float*>(in[0]), bias ? static_cast<const float*>(in[at_bias]) : nullptr,
          static_cast<const int32_t*>(in[1])};
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

}  // namespace segtrain
