// Derivation and cost: docs/attention.md.
#include <cmath>

#include "cpu/kernels.h"
#include "kernel.h"

namespace segtrain {

namespace {

/// Everything about a call but the arrays.
struct Call {
  int B, H, G, T, S, D, Dv, q_start;
  float scale, cap;
  std::vector<int32_t> first;  ///< [T]: the first key that a query sees; the last is its own position
  mx::StreamOrDevice s;

  int share() const { return H / G; }
};

Call make_call(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
               std::optional<int> window, const std::optional<std::vector<int>>& segments,
               std::optional<float> softcap, std::optional<int> q_start, mx::StreamOrDevice s) {
  check(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4,
        "[attention] expected q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv]; got ", q.shape(), ", ", k.shape(), ", ",
        v.shape(), ".");
  Call c{q.shape(0), q.shape(1), k.shape(1), q.shape(2),          k.shape(2), q.shape(3),
         v.shape(3), 0,          scale,      softcap.value_or(0), {},         s};
  check(k.shape(0) == c.B && v.shape(0) == c.B && v.shape(1) == c.G && v.shape(2) == c.S && k.shape(3) == c.D,
        "[attention] q, k and v must agree in B and D, k and v in G and S; got ", q.shape(), ", ", k.shape(),
        ", ", v.shape(), ".");
  check(q.dtype() == k.dtype() && q.dtype() == v.dtype() && mx::issubdtype(q.dtype(), mx::floating),
        "[attention] q, k and v must have one floating dtype; got ", q.dtype(), ", ", k.dtype(), ", ",
        v.dtype(), ".");
  check(c.G > 0 && c.H % c.G == 0, "[attention] query heads must be a multiple of key heads; got ", c.H,
        " and ", c.G, ".");
  c.q_start = q_start.value_or(c.S - c.T);
  check(c.q_start >= 0 && c.q_start + c.T <= c.S,
        "[attention] queries q_start … q_start + T must lie within the ", c.S, " keys; got q_start ",
        c.q_start, " and T ", c.T, ".");
  check(!window || *window >= 1, "[attention] window must be at least 1; got ", window.value_or(0), ".");
  check(!softcap || *softcap > 0, "[attention] softcap must be above 0; got ", softcap.value_or(0), ".");
  if (segments) {
    check(!segments->empty() && segments->front() == 0 && segments->back() == c.S &&
              std::is_sorted(segments->begin(), segments->end()),
          "[attention] segments must be rising offsets from 0 to S = ", c.S, ".");
  }
  for (int t = 0; t < c.T; ++t) {
    int position = c.q_start + t, first = 0;
    if (window) first = std::max(first, position - *window + 1);
    if (segments)
      first = std::max(first, *std::prev(std::upper_bound(segments->begin(), segments->end(), position)));
    c.first.push_back(first);
  }
  return c;
}

/// Sums the query heads of each group: [B,H,S,D] → [B,G,S,D].
mx::array sum_share(const mx::array& x, const Call& c, int d) {
  if (c.share() == 1) return x;
  return mx::sum(mx::reshape(x, {c.B, c.G, c.share(), c.S, d}, c.s), 2, false, c.s);
}

// ---- kernel: csrc/cpu/attention.cpp

cpu::Attention cpu_args(const Call& c) {
  return {c.B, c.H, c.G, c.T, c.S, c.D, c.Dv, c.q_start, c.scale, c.cap, c.first.data()};
}

const float* in(const std::vector<const void*>& p, int i) {
  return static_cast<const float*>(p[i]);
}
float* out(const std::vector<void*>& p, int i) {
  return static_cast<float*>(p[i]);
}

Arrays kernel_forward(const Call& c, const Arrays& x) {
  return cpu_op(
      "attention", {f32(x[0], c.s), f32(x[1], c.s), f32(x[2], c.s)}, {{c.B, c.H, c.T, c.Dv}, {c.B, c.H, c.T}},
      {mx::float32, mx::float32},
      [c](auto& i, auto& o) {
        cpu::attention(cpu_args(c), in(i, 0), in(i, 1), in(i, 2), out(o, 0), out(o, 1));
      },
      c.s);
}

Arrays kernel_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
                  const mx::array& lse) {
  auto grads = cpu_op(
      "attention_vjp", {f32(x[0], c.s), f32(x[1], c.s), f32(x[2], c.s), f32(o, c.s), lse, f32(d_o, c.s)},
      {{c.B, c.H, c.T, c.D}, {c.B, c.H, c.S, c.D}, {c.B, c.H, c.S, c.Dv}},
      {mx::float32, mx::float32, mx::float32},
      [c](auto& i, auto& o) {
        cpu::attention_vjp(cpu_args(c), in(i, 0), in(i, 1), in(i, 2), in(i, 3), in(i, 4), in(i, 5), out(o, 0),
                           out(o, 1), out(o, 2));
      },
      c.s);
  return {grads[0], sum_share(grads[1], c, c.D), sum_share(grads[2], c, c.Dv)};
}

// ---- blocked: blocks of queries against the range of keys they see, as products of whole matrices

/// Queries [q0, q1) and the keys [k0, k1) that any of them sees.
struct Block {
  int q0, q1, k0, k1;
  int nq() const { return q1 - q0; }
  int nk() const { return k1 - k0; }
};

std::vector<Block> blocks(const Call& c) {
  // At most 2²⁵ scores at a time (128 MB of float32), in multiples of 128 rows.
  int rows = static_cast<int>((1LL << 25) / (static_cast<long long>(c.B) * c.H * c.S)) / 128 * 128;
  rows = std::clamp(rows, 128, 1024);
  std::vector<Block> all;
  for (int q0 = 0; q0 < c.T; q0 += rows) {
    int q1 = std::min(c.T, q0 + rows);
    all.push_back({q0, q1, *std::min_element(c.first.begin() + q0, c.first.begin() + q1), c.q_start + q1});
  }
  return all;
}

mx::array cut(const mx::array& x, int begin, int end, const Call& c) {
  return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)}, c.s);
}

/// [B,H,n,d] → [B,G,share·n,d]: the heads of a group become rows of one product.
mx::array to_groups(const mx::array& x, const Call& c) {
  return mx::reshape(x, {c.B, c.G, c.share() * x.shape(2), x.shape(3)}, c.s);
}

/// [B,H,n] → [B,G,share,n,1]
mx::array per_row(const mx::array& x, const Block& b, const Call& c) {
  return mx::reshape(x, {c.B, c.G, c.share(), b.nq(), 1}, c.s);
}

struct Scores {
  mx::array s;     ///< [B,G,share,nq,nk] float32, capped; −inf where unseen
  mx::array seen;  ///< [nq,nk]
};

Scores scores(const mx::array& q_b, const mx::array& k_b, const Block& b, const Call& c) {
  auto s = f32(matmul(q_b, k_b, false, true, c.scale, c.s), c.s);
  s = mx::reshape(s, {c.B, c.G, c.share(), b.nq(), b.nk()}, c.s);
  if (c.cap > 0) s = mx::multiply(mx::tanh(mx::divide(s, mx::array(c.cap), c.s), c.s), mx::array(c.cap), c.s);
  auto key = mx::reshape(mx::arange(b.k0, b.k1, mx::int32, c.s), {1, b.nk()}, c.s);
  auto position =
      mx::reshape(mx::arange(c.q_start + b.q0, c.q_start + b.q1, mx::int32, c.s), {b.nq(), 1}, c.s);
  auto first = mx::array(c.first.begin() + b.q0, {b.nq(), 1}, mx::int32);
  auto seen = mx::logical_and(mx::greater_equal(key, first, c.s), mx::less_equal(key, position, c.s), c.s);
  return {mx::where(seen, s, mx::array(-INFINITY), c.s), seen};
}

Arrays blocked_forward(const Call& c, const Arrays& x) {
  Arrays os, lses;
  auto q = x[0];
  for (const auto& b : blocks(c)) {
    // One block at a time: the next one's queries wait for this one's output.
    if (!os.empty()) q = mx::depends({q}, {os.back()})[0];
    auto s = scores(to_groups(cut(q, b.q0, b.q1, c), c), cut(x[1], b.k0, b.k1, c), b, c).s;
    auto lse = mx::logsumexp(s, -1, true, c.s);
    auto p = mx::astype(mx::exp(mx::subtract(s, lse, c.s), c.s), x[2].dtype(), c.s);
    p = mx::reshape(p, {c.B, c.G, c.share() * b.nq(), b.nk()}, c.s);
    auto o = matmul(p, cut(x[2], b.k0, b.k1, c), false, false, 1, c.s);
    os.push_back(mx::reshape(o, {c.B, c.H, b.nq(), c.Dv}, c.s));
    lses.push_back(mx::reshape(lse, {c.B, c.H, b.nq()}, c.s));
  }
  return {mx::concatenate(os, 2, c.s), mx::concatenate(lses, 2, c.s)};
}

/// Sums pieces of dk or dv that cover ranges of keys, in float32.
class KeySum {
 public:
  KeySum(const Call& c, int d) : c_(c), sum_(mx::zeros({c.B, c.G, c.S, d}, mx::float32, c.s)) {}
  void add(const mx::array& piece, const Block& b) {
    auto old = cut(sum_, b.k0, b.k1, c_);
    sum_ = mx::slice_update(sum_, mx::add(old, f32(piece, c_.s), c_.s), mx::Shape{0, 0, b.k0, 0},
                            mx::Shape{c_.B, c_.G, b.k1, sum_.shape(3)}, c_.s);
  }
  const mx::array& sum() const { return sum_; }

 private:
  const Call& c_;
  mx::array sum_;
};

Arrays blocked_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
                   const mx::array& lse) {
  auto delta = mx::sum(mx::multiply(f32(o, c.s), f32(d_o, c.s), c.s), -1, false, c.s);
  auto rows = [&](const mx::array& y, const Block& b) {  // [B,H,T] → per_row
    return per_row(mx::slice(y, {0, 0, b.q0}, {c.B, c.H, b.q1}, c.s), b, c);
  };
  Arrays dqs;
  KeySum dk(c, c.D), dv(c, c.Dv);
  auto q = x[0];
  for (const auto& b : blocks(c)) {
    if (!dqs.empty()) q = mx::depends({q}, {dqs.back(), dk.sum(), dv.sum()})[0];
    auto q_b = to_groups(cut(q, b.q0, b.q1, c), c), do_b = to_groups(cut(d_o, b.q0, b.q1, c), c);
    auto k_b = cut(x[1], b.k0, b.k1, c), v_b = cut(x[2], b.k0, b.k1, c);
    auto [s, seen] = scores(q_b, k_b, b, c);
    auto p = mx::exp(mx::subtract(s, rows(lse, b), c.s), c.s);
    auto dp = mx::reshape(f32(matmul(do_b, v_b, false, true, 1, c.s), c.s), p.shape(), c.s);
    auto ds =
        mx::multiply(p, mx::multiply(mx::subtract(dp, rows(delta, b), c.s), mx::array(c.scale), c.s), c.s);
    if (c.cap > 0) {
      auto t = mx::where(seen, mx::divide(s, mx::array(c.cap), c.s), mx::array(0.0f), c.s);
      ds = mx::multiply(ds, mx::subtract(mx::array(1.0f), mx::square(t, c.s), c.s), c.s);
    }
    mx::Shape flat{c.B, c.G, c.share() * b.nq(), b.nk()};
    auto p_b = mx::reshape(mx::astype(p, q.dtype(), c.s), flat, c.s);
    auto ds_b = mx::reshape(mx::astype(ds, q.dtype(), c.s), flat, c.s);
    dqs.push_back(mx::reshape(matmul(ds_b, k_b, false, false, 1, c.s), {c.B, c.H, b.nq(), c.D}, c.s));
    dk.add(matmul(ds_b, q_b, true, false, 1, c.s), b);
    dv.add(matmul(p_b, do_b, true, false, 1, c.s), b);
  }
  return {mx::concatenate(dqs, 2, c.s), dk.sum(), dv.sum()};
}

}  // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    std::optional<int> window, std::optional<std::vector<int>> segments,
                    std::optional<float> softcap, std::optional<int> q_start, const std::string& impl,
                    mx::StreamOrDevice s) {
  auto c = make_call(q, k, v, scale, window, segments, softcap, q_start, s);
  bool kernel = choose("attention", impl, {cpu_kernel(s), {"blocked", true, ""}}) == "kernel";
  auto forward = kernel ? kernel_forward : blocked_forward;
  auto vjp = kernel ? kernel_vjp : blocked_vjp;
  auto op = mx::custom_vjp(
      [c, forward](const Arrays& x) {
        auto y = forward(c, x);
        return Arrays{mx::astype(y[0], x[0].dtype(), c.s), y[1]};
      },
      [c, vjp](const Arrays& x, const Arrays& dy, const Arrays& y) {
        auto grads = vjp(c, x, dy[0], y[0], y[1]);
        for (size_t i = 0; i < grads.size(); ++i) grads[i] = mx::astype(grads[i], x[i].dtype(), c.s);
        return grads;
      });
  return op({q, k, v})[0];
}

}  // namespace segtrain
