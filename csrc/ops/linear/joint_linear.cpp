#include "ops/linear/joint_linear.h"

#include "core/gpu.h"

namespace segtrain {

namespace {

constexpr int MOST_RANKS = 96, LEAST_ROWS = 16;

int up_to(int n, int multiple) {
  return tiles(n, multiple) * multiple;
}

/// Columns of all low-rank branches: each begins at a multiple of 8.
int padded_ranks(const std::vector<int>& ranks) {
  int all = 0;
  for (int r : ranks) all += up_to(r, 8);
  return up_to(all, 16);
}

int rank_of(const Linear& linear) {
  return linear.a ? linear.a->shape(1) : 0;
}

}  // namespace

std::string JointLinear::unfit(const std::vector<Linear>& linears, int rows, mx::Dtype dtype,
                               mx::StreamOrDevice s) {
  if (on_cpu(s) || gpu() != Gpu::cuda) return "it is for CUDA";
  if (dtype != mx::float16 && dtype != mx::bfloat16) return "its matrix units take half precision only";
  if (rows < LEAST_ROWS) return "it takes 16 rows or more, since it unpacks the weight";
  std::vector<Base> bases;
  std::vector<int> ranks;
  for (const auto& linear : linears) {
    if (linear.base.out() % 8) return "its widths are multiples of 8";
    bases.push_back(linear.base);
    ranks.push_back(rank_of(linear));
  }
  if (padded_ranks(ranks) > MOST_RANKS) return "its ranks are 96 or less in all";
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

JointLinear::Factors JointLinear::prepare(const Arrays& ab) const {
  if (!r_) return {};
  std::vector<int32_t> at;
  std::vector<float> scales;
  std::map<std::string, mx::array> values;
  size_t next = 0;
  for (size_t i = 0; i < 3; ++i) {
    bool has = i < ranks_.size() && ranks_[i];
    at.push_back(has ? ranks_[i] : 0);
    scales.push_back(i < scales_.size() ? scales_[i] : 0);
    auto number = std::to_string(i);
    values.insert(
        {{"a" + number, f32(ab[has ? next : 0], s_)}, {"b" + number, f32(ab[has ? next + 1 : 1], s_)}});
    if (has) next += 2;
  }
  for (size_t i = 0; i < 3; ++i) at.push_back(i < widths_.size() ? widths_[i] : 0);
  at.push_back(k_);
  values.insert({{"at", device_ints(at)}, {"args", device_floats(scales)}});
  auto made = launch("low_rank_factors", values, {{r_, k_}, {k_, r_}, {r_, n_}, {n_, r_}},
                     std::vector<mx::Dtype>(4, dtype_), {{"T", dtype_}, {"R", r_}},
                     {{tiles(k_ + n_, 256), r_ / 8, 1}, 256}, s_);
  return {made[0], made[1], made[2], made[3]};
}

JointLinear::Result JointLinear::product(const mx::array& x, bool transpose, const Factors& f) const {
  auto times = [&](const mx::array& left, const mx::array& w) {
    return mx::matmul(left, transpose ? mx::transpose(w, s_) : w, s_);
  };
  if (!r_) return {times(x, unpack(bases_, dtype_, {}, {}, s_)), {}};
  const int m = x.shape(0), in = transpose ? k_ : n_, out = transpose ? n_ : k_;
  const auto& down = transpose ? f.a_rows : f.b_rows;
  const auto& up = transpose ? f.b_columns : f.a_columns;
  const Template arguments{{"T", dtype_}, {"R", r_}};
  const int at_once = r_ == 16 ? 4 : 1;  // more would not have the registers
  // What stands beside or below the weight is summed over, or makes columns of the result.
  const bool sum = in <= out, beside = sum == transpose;
  auto w = unpack(bases_, dtype_, beside ? f.b_columns : std::nullopt, beside ? std::nullopt : f.a_rows, s_);
  if (sum) {
    auto wide = launch("low_rank_widen", {{"x", x}, {"l", *down}, {"at", device_ints({m, in})}},
                       {{m, in + r_}, {m, r_}}, {dtype_, dtype_}, arguments,
                       {{tiles(m, 16), 1, 1}, 256, 0, at_once}, s_);
    return {times(wide[0], w), wide[1]};
  }
  auto both =
      launch("low_rank_up", {{"wide", times(x, w)}, {"l", *up}, {"at", device_ints({m, out})}},
             {{m, out}, {m, r_}}, {dtype_, dtype_}, arguments, {{tiles(m, 32), 4, 1}, 256, 0, at_once}, s_);
  return {both[0], both[1]};
}

JointLinear::Result JointLinear::forward(const mx::array& x, const Factors& f) const {
  auto result = product(x, true, f);
  if (std::none_of(bases_.begin(), bases_.end(), [](const Base& base) { return base.bias.has_value(); }))
    return result;
  Arrays bias;
  for (const auto& base : bases_)
    bias.push_back(base.bias ? mx::astype(*base.bias, dtype_, s_) : mx::zeros({base.out()}, dtype_, s_));
  result.y = mx::add(result.y, mx::concatenate(bias, 0, s_), s_);
  return result;
}

JointLinear::Result JointLinear::dx(const mx::array& dy, const Factors& f) const {
  return product(dy, false, f);
}

/// Σ over rows lowᵀ·x: [R, columns of x], or its transpose.
mx::array JointLinear::outer(const mx::array& x, const mx::array& low, bool turned) const {
  const int m = x.shape(0), n = x.shape(1), columns = tiles(n, 128);
  const int parts = std::clamp(264 / columns, 1, tiles(m, 256));
  auto shape = turned ? mx::Shape{parts, n, r_} : mx::Shape{parts, r_, n};
  auto sums = launch("low_rank_outer", {{"x", x}, {"z", low}, {"at", device_ints({m, n})}}, {shape},
                     {mx::float32}, {{"T", dtype_}, {"R", r_}, {"TURNED", turned}},
                     {{columns, parts, 1}, 256, 2 * 64 * (128 + 8 + r_ + 8) * 2}, s_)[0];
  return parts == 1 ? mx::squeeze(sums, 0, s_) : mx::sum(sums, 0, false, s_);
}

Arrays JointLinear::gradients(const Arrays& ab, const mx::array& x, const mx::array& dy, const mx::array& z,
                              const mx::array& u) const {
  auto da = outer(x, u, true), db = outer(dy, z, false);
  Arrays all;
  int row = 0, column = 0;
  for (size_t i = 0; i < ranks_.size(); column += widths_[i++]) {
    if (!ranks_[i]) continue;
    auto grad_a = mx::slice(da, {0, row}, {k_, row + ranks_[i]}, s_);
    auto grad_b = mx::slice(db, {row, column}, {row + ranks_[i], column + widths_[i]}, s_);
    all.push_back(mx::astype(grad_a, ab[all.size()].dtype(), s_));
    all.push_back(mx::astype(mx::multiply(grad_b, mx::array(scales_[i]), s_), ab[all.size()].dtype(), s_));
    row += up_to(ranks_[i], 8);
  }
  return all;
}

Arrays JointLinear::split(const mx::array& y) const {
  if (widths_.size() == 1) return {y};
  mx::Shape ends;
  for (size_t i = 0, end = 0; i + 1 < widths_.size(); ++i) ends.push_back(end += widths_[i]);
  return mx::split(y, ends, -1, s_);
}

}  // namespace segtrain
