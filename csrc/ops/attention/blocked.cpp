// Computes attention as plain matrix products: each block of queries is multiplied by the range of keys that
// these queries see. See docs/attention.md, "blocked".
//
// Scores are float32. On CUDA a matrix product has the dtype of its operands, so half-precision operands are
// cast to float32 first. TF32 represents their values exactly, so the cast costs speed but no accuracy.
#include <cmath>

#include "core/gpu.h"
#include "ops/attention/attention.h"

namespace segtrain {

namespace {

/// Queries [q0, q1), divided into runs of `period` queries. Each run is multiplied by `nk` keys. The first
/// run's keys begin at k0; each following run's keys begin `period` keys later. Without a window, one run
/// contains all queries; with a window, there are many runs (bands).
struct Block {
  int q0, q1, k0, nk, period;
  int runs() const { return (q1 - q0) / period; }
};

mx::array number(int x) {
  return mx::array(x, mx::int32);
}

// ---- passes over rows: each pass is one kernel on a GPU, and a sequence of MLX's ops elsewhere

/// Returns the inputs and parameters of a block that the row kernels need.
std::map<std::string, mx::array> row_values(const Call& c, const Block& b, const mx::array& s) {
  std::vector<int32_t> first = c.first;
  first.resize(std::max<int>(b.q1, c.T), c.S);  // a padding query sees no key
  return {{"s", s},
          {"first", device_ints(first)},
          {"at", device_ints({b.q0, b.q1 - b.q0, b.k0, c.q_start, b.period, b.nk})},
          {"args", mx::array({c.scale, c.cap}, {2}, mx::float32)},
          {"q0", number(b.q0)},
          {"nq", number(b.q1 - b.q0)},
          {"k0", number(b.k0)},
          {"q_start", number(c.q_start)},
          {"period", number(b.period)},
          {"scale", mx::array(c.scale)},
          {"cap", mx::array(c.cap)}};
}

bool row_kernels(const Call& c) {
  return !on_cpu(c.s) && gpu_kernel("attention_rows", "").ok;
}

Grid row_grid(int rows) {
  if (gpu() == Gpu::metal) return {{1, rows, 1}, 256};
  return {{rows, 1, 1}, 128};
}

/// Returns the mask of the keys that each query of the block sees: [nq, nk], reshaped to [runs, period, nk].
mx::array seen(const Call& c, const Block& b) {
  auto at = mx::reshape(mx::arange(b.q0, b.q1, mx::int32, c.s), {b.runs(), b.period, 1}, c.s);
  auto run = mx::reshape(mx::arange(0, b.runs(), mx::int32, c.s), {b.runs(), 1, 1}, c.s);
  auto key = mx::add(mx::add(mx::arange(0, b.nk, mx::int32, c.s), number(b.k0), c.s),
                     mx::multiply(run, number(b.period), c.s), c.s);
  std::vector<int32_t> first(c.first.begin() + b.q0, c.first.begin() + std::min(b.q1, c.T));
  first.resize(b.q1 - b.q0, c.S);
  auto from = mx::array(first.begin(), {b.runs(), b.period, 1}, mx::int32);
  auto position = mx::add(at, number(c.q_start), c.s);
  return mx::logical_and(mx::greater_equal(key, from, c.s), mx::less_equal(key, position, c.s), c.s);
}

mx::array capped(const mx::array& s, const Call& c) {
  if (c.cap == 0) return s;
  return mx::multiply(mx::tanh(mx::divide(s, mx::array(c.cap), c.s), c.s), mx::array(c.cap), c.s);
}

/// s [..., runs, period, nk] float32 → p of the call's dtype, lse [..., runs, period, 1] float32.
Arrays softmax_rows(const Call& c, const Block& b, const mx::array& s) {
  auto lse_shape = s.shape();
  lse_shape.back() = 1;
  if (row_kernels(c)) {
    int rows = static_cast<int>(s.size() / b.nk);
    auto y = launch("softmax_rows", row_values(c, b, mx::reshape(s, {rows, b.nk}, c.s)),
                    {{rows, b.nk}, {rows}}, {c.dtype, mx::float32},
                    {{"S", mx::float32}, {"T", c.dtype}, {"CAP", c.cap > 0}}, row_grid(rows), c.s);
    return {mx::reshape(y[0], s.shape(), c.s), mx::reshape(y[1], lse_shape, c.s)};
  }
  auto see = seen(c, b);
  auto top = mx::where(see, capped(s, c), mx::array(-INFINITY), c.s);
  auto lse = mx::logsumexp(top, -1, true, c.s);
  // A row that sees no key has lse = −∞ and p = 0.
  auto p = mx::where(see, mx::exp(mx::subtract(top, lse, c.s), c.s), mx::array(0.0f), c.s);
  return {mx::astype(p, c.dtype, c.s), lse};
}

/// s, dp [..., runs, period, nk]; lse, delta [..., runs, period, 1] → p, ds of the call's dtype.
Arrays softmax_vjp_rows(const Call& c, const Block& b, const mx::array& s, const mx::array& dp,
                        const mx::array& lse, const mx::array& delta) {
  if (row_kernels(c)) {
    int rows = static_cast<int>(s.size() / b.nk);
    auto values = row_values(c, b, mx::reshape(s, {rows, b.nk}, c.s));
    values.insert({{"dp", mx::reshape(dp, {rows, b.nk}, c.s)},
                   {"lse", mx::reshape(lse, {rows}, c.s)},
                   {"delta", mx::reshape(delta, {rows}, c.s)}});
    auto y = launch("softmax_vjp_rows", values, {{rows, b.nk}, {rows, b.nk}}, {c.dtype, c.dtype},
                    {{"S", mx::float32}, {"T", c.dtype}, {"CAP", c.cap > 0}}, row_grid(rows), c.s);
    return {mx::reshape(y[0], s.shape(), c.s), mx::reshape(y[1], s.shape(), c.s)};
  }
  auto top = capped(s, c);
  auto p = mx::where(seen(c, b), mx::exp(mx::subtract(top, lse, c.s), c.s), mx::array(0.0f), c.s);
  auto ds = mx::multiply(p, mx::multiply(mx::subtract(dp, delta, c.s), mx::array(c.scale), c.s), c.s);
  if (c.cap > 0) {
    auto slope = mx::subtract(mx::array(1.0f), mx::square(mx::divide(top, mx::array(c.cap), c.s), c.s), c.s);
    ds = mx::multiply(ds, slope, c.s);
  }
  return {mx::astype(p, c.dtype, c.s), mx::astype(ds, c.dtype, c.s)};
}

// ---- the matrix products of a block

/// The blocks of a call, and the number of zero rows that pad the queries and keys to full blocks.
struct Blocks {
  std::vector<Block> list;
  int more_queries = 0, keys_before = 0, keys_behind = 0;
};

Blocks blocks(const Call& c) {
  const long long heads = static_cast<long long>(c.B) * c.H;
  Blocks all;
  // With a window, each run is at least as long as the window, so its queries see only keys of this run and
  // the previous one. All of these bands have the same shape.
  int run = std::max(128, (c.window - 1 + 127) / 128 * 128);
  if (c.window > 0 && c.T > 2 * run) {
    int n = (c.T + run - 1) / run;
    int at_once = static_cast<int>(std::clamp<long long>((1LL << 24) / (heads * run * 2 * run), 1, n));
    for (int i = 0; i < n; i += at_once)
      all.list.push_back({i * run, std::min(n, i + at_once) * run, c.q_start + (i - 1) * run, 2 * run, run});
    all.more_queries = n * run - c.T;
    all.keys_before = std::max(0, run - c.q_start);
    all.keys_behind = std::max(0, c.q_start + n * run - c.S);
    return all;
  }
  // Without bands, at most 2²⁵ scores (128 MB) are computed at a time, in multiples of 128 rows.
  int rows = std::clamp(static_cast<int>((1LL << 25) / (heads * c.S)) / 128 * 128, 128, 1024);
  for (int q0 = 0; q0 < c.T; q0 += rows) {
    int q1 = std::min(c.T, q0 + rows);
    int k0 = std::min(c.first[q0], c.q_start + q1 - 1);  // at least one key, even if no query sees a key
    all.list.push_back({q0, q1, k0, c.q_start + q1 - k0, q1 - q0});
  }
  return all;
}

mx::array widen(const mx::array& x, int before, int behind, const Call& c) {
  if (before + behind == 0) return x;
  return mx::pad(x, {{0, 0}, {0, 0}, {before, behind}, {0, 0}}, mx::array(0, x.dtype()), "constant", c.s);
}

mx::array cut(const mx::array& x, int begin, int end, const Call& c) {
  return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)}, c.s);
}

/// Returns the queries of a block as operands [B,G,·,runs,·,d]. If there is only one run, all heads of a
/// group form the rows of a single matrix product.
mx::array rows_of(const mx::array& x, const Block& b, const Call& c) {
  auto part = cut(x, b.q0, b.q1, c);
  if (b.runs() == 1) return mx::reshape(part, {c.B, c.G, 1, 1, c.share() * b.period, x.shape(3)}, c.s);
  return mx::reshape(part, {c.B, c.G, c.share(), b.runs(), b.period, x.shape(3)}, c.s);
}

/// Returns the keys of a block, [B,G,1,runs,nk,d]. For each run, these are the keys of the previous run and
/// of the run itself.
mx::array keys_of(const mx::array& x, const Block& b, int keys_before, const Call& c) {
  int begin = b.k0 + keys_before, d = x.shape(3);
  if (b.nk != 2 * b.period || b.runs() == 1)
    return mx::reshape(cut(x, begin, begin + b.nk, c), {c.B, c.G, 1, 1, b.nk, d}, c.s);
  auto part = [&](int from) {
    return mx::reshape(cut(x, from, from + b.runs() * b.period, c), {c.B, c.G, 1, b.runs(), b.period, d},
                       c.s);
  };
  return mx::concatenate({part(begin), part(begin + b.period)}, 4, c.s);
}

mx::Shape row_shape(const Block& b, const Call& c, int width) {
  return {c.B, c.G, c.share(), b.runs(), b.period, width};
}

mx::array product(const mx::array& a, const mx::array& b, bool ta, bool tb, const Call& c) {
  if (on_cpu(c.s) && a.shape(2) == b.shape(2)) return matmul(a, b, ta, tb, 1, c.s);
  return mx::matmul(ta ? mx::swapaxes(a, -1, -2, c.s) : a, tb ? mx::swapaxes(b, -1, -2, c.s) : b, c.s);
}

/// a·bᵀ in float32, [B,G,share,runs,period,nk].
mx::array scores(const mx::array& a, const mx::array& b, const Block& block, const Call& c) {
  return mx::reshape(product(f32(a, c.s), f32(b, c.s), false, true, c), row_shape(block, c, block.nk), c.s);
}

/// Reshapes rows [B,G,share,runs,period,w] to the shape of operands.
mx::array as_operand(const mx::array& x, const Block& b, const Call& c) {
  if (b.runs() > 1) return x;
  return mx::reshape(x, {c.B, c.G, 1, 1, c.share() * b.period, x.shape(5)}, c.s);
}

mx::array to_heads(const mx::array& x, const Block& b, const Call& c) {
  return mx::reshape(x, {c.B, c.H, b.q1 - b.q0, x.shape(5)}, c.s);
}

Arrays blocked_forward(const Call& c, const Arrays& x) {
  auto all = blocks(c);
  auto q = widen(x[0], 0, all.more_queries, c);
  auto k = widen(x[1], all.keys_before, all.keys_behind, c),
       v = widen(x[2], all.keys_before, all.keys_behind, c);
  q = mx::multiply(f32(q, c.s), mx::array(c.scale), c.s);
  Arrays os, lses;
  for (const auto& b : all.list) {
    // A block's queries are made to depend on the previous block's output, so that only one block is in
    // memory at a time.
    if (!os.empty()) q = mx::depends({q}, {os.back()})[0];
    auto y = softmax_rows(c, b, scores(rows_of(q, b, c), keys_of(k, b, all.keys_before, c), b, c));
    auto o = product(as_operand(y[0], b, c), keys_of(v, b, all.keys_before, c), false, false, c);
    os.push_back(to_heads(o, b, c));
    lses.push_back(mx::reshape(y[1], {c.B, c.H, b.q1 - b.q0}, c.s));
  }
  auto o = cut(mx::concatenate(os, 2, c.s), 0, c.T, c);
  return {o, mx::slice(mx::concatenate(lses, 2, c.s), {0, 0, 0}, {c.B, c.H, c.T}, c.s)};
}

/// Adds up pieces of dk or dv in float32. Each piece covers a range of keys.
class KeySum {
 public:
  KeySum(const Call& c, const mx::array& like) : c_(c), sum_(mx::zeros(like.shape(), mx::float32, c.s)) {}

  /// Adds a piece [B,G,·,runs,nk,d], where each run shares half of its keys with the next run.
  void add(const mx::array& piece, const Block& b, int begin) {
    auto y = mx::sum(f32(piece, c_.s), 2, false, c_.s);
    if (b.runs() == 1) return add(mx::reshape(y, {c_.B, c_.G, b.nk, y.shape(4)}, c_.s), begin);
    for (int half = 0; half < 2; ++half) {
      auto part = mx::slice(y, {0, 0, 0, half * b.period, 0},
                            {c_.B, c_.G, b.runs(), (half + 1) * b.period, y.shape(4)}, c_.s);
      add(mx::reshape(part, {c_.B, c_.G, b.runs() * b.period, y.shape(4)}, c_.s), begin + half * b.period);
    }
  }
  const mx::array& sum() const { return sum_; }

 private:
  void add(const mx::array& part, int begin) { sum_ = add_rows(sum_, part, begin, c_.s); }

  const Call& c_;
  mx::array sum_;
};

Arrays blocked_vjp(const Call& c, const Arrays& x, const mx::array& d_out, const mx::array& o,
                   const mx::array& lse) {
  auto all = blocks(c);
  auto q = widen(x[0], 0, all.more_queries, c);
  auto q_scaled = mx::multiply(f32(q, c.s), mx::array(c.scale), c.s);
  auto d_o = widen(mx::astype(d_out, c.dtype, c.s), 0, all.more_queries, c);
  auto k = widen(x[1], all.keys_before, all.keys_behind, c),
       v = widen(x[2], all.keys_before, all.keys_behind, c);
  auto per_row = [&](const mx::array& y, const Block& b) {  // [B,H,T] → [B,G,share,runs,period,1]
    auto wide = widen(mx::expand_dims(y, 3, c.s), 0, all.more_queries, c);
    return mx::reshape(cut(wide, b.q0, b.q1, c), row_shape(b, c, 1), c.s);
  };
  auto delta = row_delta(c, o, d_out);
  KeySum dk(c, k), dv(c, v);
  Arrays dqs;
  for (const auto& b : all.list) {
    if (!dqs.empty()) q_scaled = mx::depends({q_scaled}, {dqs.back(), dk.sum(), dv.sum()})[0];
    auto q_b = rows_of(q, b, c), do_b = rows_of(d_o, b, c);
    auto k_b = keys_of(k, b, all.keys_before, c), v_b = keys_of(v, b, all.keys_before, c);
    auto s = scores(rows_of(q_scaled, b, c), k_b, b, c), dp = scores(do_b, v_b, b, c);
    auto y = softmax_vjp_rows(c, b, s, dp, per_row(lse, b), per_row(delta, b));
    auto p = as_operand(y[0], b, c), ds = as_operand(y[1], b, c);
    dqs.push_back(to_heads(product(ds, k_b, false, false, c), b, c));
    dk.add(product(ds, q_b, true, false, c), b, b.k0 + all.keys_before);
    dv.add(product(p, do_b, true, false, c), b, b.k0 + all.keys_before);
  }
  auto of_keys = [&](const KeySum& sum) { return cut(sum.sum(), all.keys_before, all.keys_before + c.S, c); };
  return {cut(mx::concatenate(dqs, 2, c.s), 0, c.T, c), of_keys(dk), of_keys(dv)};
}

}  // namespace

const AttentionWay blocked_attention{blocked_forward, blocked_vjp};

}  // namespace segtrain
