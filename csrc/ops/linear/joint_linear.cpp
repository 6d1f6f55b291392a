#include "ops/linear/joint_linear.h"

#include "core/binding.h"
#include "core/gpu.h"

namespace segtrain {

namespace {

constexpr int MOST_RANKS = 96, LEAST_ROWS = 16;

int up_to(int n, int multiple) {
  return tiles(n, multiple) * multiple;
}

/// Returns the total number of columns of all low-rank branches. Each branch begins at a multiple of 8.
int padded_ranks(const std::vector<int>& ranks) {
  int all = 0;
  for (int r : ranks) all += up_to(r, 8);
  return up_to(all, 16);
}

int rank_of(const Linear& linear) {
  return linear.a ? linear.a->shape(1) : 0;
}

thread_local KeptProducts* kept_products = nullptr;

}  // namespace

KeptProducts::KeptProducts(Arrays given) : given_(std::move(given)), outer_(kept_products) {
  kept_products = this;
}

KeptProducts::~KeptProducts() {
  kept_products = outer_;
}

mx::array KeptProducts::exchange(const mx::array& z) {
  auto* own = kept_products;
  if (!own) return z;
  if (own->given_.empty()) {
    own->made.push_back(z);
    return z;
  }
  check(own->next_ < own->given_.size() && own->given_[own->next_].shape() == z.shape(),
        "[lora_linear] the kept products do not fit the layers that use them.");
  return own->given_[own->next_++];
}

std::string JointLinear::unfit(const std::vector<Linear>& linears, int rows, mx::Dtype dtype,
                               mx::StreamOrDevice s) {
  if (!on_cuda(s)) return "it needs CUDA";
  if (dtype != mx::float16 && dtype != mx::bfloat16) return "its matrix units support half precision only";
  if (rows < LEAST_ROWS) return "it needs at least 16 rows, because it first dequantizes the whole weight";
  std::vector<Base> bases;
  std::vector<int> ranks;
  for (const auto& linear : linears) {
    if (linear.base.out() % 8) return "the widths must be multiples of 8";
    bases.push_back(linear.base);
    ranks.push_back(rank_of(linear));
  }
  if (padded_ranks(ranks) > MOST_RANKS) return "the ranks must add up to at most 96";
  return unpack_unfit(bases, dtype);
}

JointLinear::JointLinear(const std::vector<Linear>& linears, mx::Dtype dtype, mx::StreamOrDevice s)
    : k_(linears[0].base.in()), dtype_(dtype), s_(s) {
  for (const auto& linear : linears) {
    bases_.push_back(linear.base);
    scales_.push_back(linear.scale);
    ranks_.push_back(rank_of(linear));
    widths_.push_back(linear.base.out());
    n_ += widths_.back();
  }
  r_ = padded_ranks(ranks_);
}

mx::array JointLinear::places(int rows) const {
  std::vector<int32_t> at(ranks_);
  at.resize(3);
  at.insert(at.end(), widths_.begin(), widths_.end());
  at.resize(6);
  at.insert(at.end(), {k_, rows});
  return device_ints(at);
}

mx::array JointLinear::scales() const {
  auto scales = scales_;
  scales.resize(3);
  return device_floats(scales);
}

std::pair<mx::array, mx::array> JointLinear::product(const mx::array& x, bool transpose,
                                                     const mx::array& beside, const mx::array& other) const {
  const int m = x.shape(0), in = transpose ? k_ : n_, out = transpose ? n_ : k_;
  const Template arguments{{"T", dtype_}, {"R", r_}};
  const int at_once = r_ <= 48 ? 2 : 1;  // with a larger R, 2 blocks need too many registers
  const bool sum = in <= out, columns = sum == transpose;
  auto w = unpack(bases_, dtype_, columns ? std::optional(beside) : std::nullopt,
                  columns ? std::nullopt : std::optional(beside), s_);
  if (transpose) w = mx::transpose(w, s_);
  if (sum) {
    auto wide = launch("low_rank_widen", {{"x", x}, {"l", other}, {"at", device_ints({m, in})}},
                       {{m, in + r_}, {m, r_}}, {dtype_, dtype_}, arguments,
                       {{tiles(m, 32), 1, 1}, 256, 0, at_once}, s_);
    return {mx::matmul(wide[0], w, s_), wide[1]};
  }
  auto both =
      launch("low_rank_up", {{"wide", mx::matmul(x, w, s_)}, {"l", other}, {"at", device_ints({m, out})}},
             {{m, out}, {m, r_}}, {dtype_, dtype_}, arguments, {{tiles(m, 32), 4, 1}, 256, 0, at_once}, s_);
  return {both[0], both[1]};
}

mx::array JointLinear::bias() const {
  Arrays all;
  for (const auto& base : bases_)
    all.push_back(base.bias ? mx::astype(*base.bias, dtype_, s_) : mx::zeros({base.out()}, dtype_, s_));
  return mx::concatenate(all, 0, s_);
}

JointLinear::Forward JointLinear::forward(const mx::array& x, const Arrays& ab) const {
  auto with_bias = [&](const mx::array& y) {
    bool any = std::any_of(bases_.begin(), bases_.end(), [](const Base& base) { return !!base.bias; });
    return any ? mx::add(y, bias(), s_) : y;
  };
  if (!r_) {
    auto w = unpack(bases_, dtype_, {}, {}, s_);
    return {with_bias(mx::matmul(x, mx::transpose(w, s_), s_)), {}};
  }
  std::map<std::string, mx::array> values{{"at", places(0)}, {"args", scales()}};
  size_t next = 0;
  for (size_t i = 0; i < 3; ++i) {
    bool has = i < ranks_.size() && ranks_[i];
    auto number = std::to_string(i);
    values.insert(
        {{"a" + number, f32(ab[has ? next : 0], s_)}, {"b" + number, f32(ab[has ? next + 1 : 1], s_)}});
    if (has) next += 2;
  }
  // If x is narrower than y, the forward pass computes [x z]·[W b]ᵀ, and the backward pass dy·[W b] = [dx u].
  // If x is wider, the forward pass computes x·[W; aᵀ]ᵀ, and the backward pass [dy u]·[W; aᵀ]. If x and y
  // have the same width, columns are appended to both x and dy.
  const bool of_a = k_ < n_;
  auto made =
      launch("low_rank_factors", values, {{r_, k_}, {n_, r_}, of_a ? mx::Shape{k_, r_} : mx::Shape{r_, n_}},
             std::vector<mx::Dtype>(3, dtype_), {{"T", dtype_}, {"R", r_}, {"OF_A", of_a}},
             {{tiles(k_ + n_, 256), r_ / 8, 1}, 256}, s_);
  const auto &a_rows = made[0], &b_columns = made[1], &back = made[2];
  const bool wider = k_ > n_;
  auto [y, z] = wider ? product(x, true, a_rows, b_columns) : product(x, true, b_columns, a_rows);
  return {with_bias(y), {wider ? KeptProducts::exchange(z) : z, of_a ? b_columns : a_rows, back}};
}

JointLinear::Backward JointLinear::dx(const mx::array& dy, const Arrays& kept) const {
  if (!r_) return {mx::matmul(dy, unpack(bases_, dtype_, {}, {}, s_), s_), {}};
  auto [dx, u] = product(dy, false, kept[1], kept[2]);
  return {dx, u};
}

Arrays JointLinear::gradients(const Arrays& ab, const mx::array& x, const mx::array& dy, const mx::array& z,
                              const mx::array& u) const {
  const int m = x.shape(0), columns = tiles(k_, 128) + tiles(n_, 128);
  const int parts = std::clamp(264 / columns, 1, tiles(m, 256));
  int size = 0;
  for (size_t i = 0; i < ranks_.size(); ++i) size += ranks_[i] * (k_ + widths_[i]);
  auto all = launch("low_rank_outer",
                    {{"x", x}, {"u", u}, {"dy", dy}, {"z", z}, {"at", places(m)}, {"args", scales()}},
                    {{parts, size}}, {mx::float32}, {{"T", dtype_}, {"R", r_}},
                    {{columns, parts, 1}, 256, 2 * 64 * (128 + 8 + r_ + 8) * 2}, s_)[0];
  if (parts > 1) all = mx::sum(all, 0, true, s_);
  Arrays grads;
  int begin = 0;
  auto next = [&](const mx::array& factor) {
    const int n = static_cast<int>(factor.size());
    auto grad = mx::reshape(mx::slice(all, {0, begin}, {1, begin + n}, s_), factor.shape(), s_);
    begin += n;
    return mx::astype(grad, factor.dtype(), s_);
  };
  for (const auto& factor : ab) grads.push_back(next(factor));
  return grads;
}

Arrays joint_linears(const mx::array& x, const std::vector<Linear>& linears, const Parts& parts,
                     mx::StreamOrDevice s) {
  const JointLinear all(linears, x.dtype(), s);
  auto ab = [](const Arrays& p) { return Arrays(p.begin() + 1, p.end()); };
  auto forward = [=](const Arrays& p) {
    auto [y, kept] = all.forward(p[0], ab(p));
    auto made = parts.split(y);
    made.insert(made.end(), kept.begin(), kept.end());
    if (parts.keeps_y) made.push_back(y);
    return made;
  };
  auto vjp = [=, dtype = x.dtype()](const Arrays& p, const Arrays& dys, const Arrays& made) {
    const Arrays kept(made.begin() + parts.n, made.end() - parts.keeps_y);
    Arrays given;
    for (const auto& dy : dys) given.push_back(mx::astype(dy, dtype, s));
    auto dy = parts.join(given, parts.keeps_y ? std::optional(made.back()) : std::nullopt);
    auto [dx, u] = all.dx(dy, kept);
    if (!u) return Arrays{dx};
    auto grads = all.gradients(ab(p), p[0], dy, kept[0], *u);
    grads.insert(grads.begin(), after(dx, grads));
    return grads;
  };
  return with_vjp(primals_of(x, linears), parts.n, forward, vjp);
}

const Binding joint_linear_binding([](nb::module_& m) {
  m.def(
      "keeping_products",
      [](const Arrays& given, const std::function<Arrays()>& run) {
        KeptProducts kept(given);
        auto out = run();
        return std::pair(out, kept.made);
      },
      "given"_a, "run"_a,
      "Calls `run`, and returns its arrays and the arrays that recomputing them can reuse. If `given` "
      "contains such arrays of an earlier call, uses them instead of recomputing them.");
});

}  // namespace segtrain
