// Attention on Hopper that never writes scores to device memory (cuda/attention_fused.cu). See
// docs/attention.md, "hopper".
#include "core/gpu.h"
#include "ops/attention/attention.h"

namespace segtrain {

namespace {

constexpr int FUSED_ALIGN = 1024, BARRIERS = 256, BK = 128;

/// Launch parameters for a head size. They must have the same values as in the structs Forward and Backward
/// of the kernel source, which checks this.
struct Launch {
  int bq, threads, bytes;
};

int padded(int D) {
  return tiles(D, 64) * 64;
}

Launch forward_launch(int D) {
  const int groups = D <= 64 ? 3 : 2, bq = 64 * groups, bk = D <= 128 ? 128 : 64;
  return {bq, 128 * (groups + 1), FUSED_ALIGN + (bq + 4 * bk) * padded(D) * 2 + BARRIERS};
}

Launch backward_launch(int D) {
  const int bq = D <= 64 ? 128 : 64, rows = 2 * BK + 5 * bq;
  return {bq, 384,
          FUSED_ALIGN + rows * padded(D) * 2 + 2 * BK * bq * 2 + bq * padded(D) * 4 + 8 * bq * 4 + BARRIERS};
}

/// The total number of query tiles of all query heads, and of key tiles of all key/value heads.
struct Tiles {
  int queries, keys;
  explicit Tiles(const Call& c)
      : queries(c.B * c.H * tiles(c.T, backward_launch(c.D).bq)), keys(c.B * c.G * tiles(c.S, BK)) {}
};

Template fused_template_of(const Call& c) {
  return {{"T", c.dtype}, {"D", c.D}, {"CAP", c.cap > 0}};
}

Template with_rows(const Call& c, const Launch& l) {
  auto all = fused_template_of(c);
  all.push_back({"ROWS", l.bq});
  return all;
}

std::map<std::string, mx::array> fused_values_of(const Call& c, const Arrays& x) {
  return {{"q", x[0]},
          {"k", x[1]},
          {"v", x[2]},
          {"first", device_ints(c.first)},
          {"at", device_ints({c.q_start, 0, c.B, c.H, c.G, c.T, c.S})},
          {"args", device_floats({c.scale, c.cap})}};
}

}  // namespace

bool fused_forward_fits(const Call& c) {
  return c.D == c.Dv && c.D <= 256;
}

bool fused_vjp_fits(const Call& c) {
  return c.D == c.Dv && c.D <= 128;
}

Arrays fused_forward(const Call& c, const Arrays& x) {
  const auto l = forward_launch(c.D);
  return launch("attention_fused", fused_values_of(c, x), {{c.B, c.H, c.T, c.D}, {c.B, c.H, c.T}},
                {c.dtype, mx::float32}, with_rows(c, l),
                {{tiles(c.T, l.bq) * c.B * c.H, 1, 1}, l.threads, l.bytes}, c.s);
}

Arrays fused_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
                 const mx::array& lse) {
  const auto l = backward_launch(c.D);
  const Tiles all(c);
  const int of_query = l.bq * padded(c.D), of_key = BK * padded(c.D);
  auto values = fused_values_of(c, x);
  values.insert({{"lse", lse}, {"o", o}, {"d_o", mx::astype(d_o, c.dtype, c.s)}});
  auto begun =
      launch("attention_fused_begin", values, {{c.B, c.H, c.T}, {1 + all.queries + all.keys}},
             {mx::float32, mx::int32}, fused_template_of(c), {{tiles(c.B * c.H * c.T, 8), 1, 1}, 256}, c.s);
  values.insert({{"delta", begun[0]}, {"counts", begun[1]}});
  auto sums =
      launch("attention_fused_vjp", values, {{all.queries, of_query}, {all.keys, of_key}, {all.keys, of_key}},
             {mx::float32, mx::float32, mx::float32}, with_rows(c, l),
             {{tiles(c.S, BK) * c.B * c.H, 1, 1}, l.threads, l.bytes}, c.s);
  values.insert({{"dq_sum", sums[0]}, {"dk_sum", sums[1]}, {"dv_sum", sums[2]}});
  const int jobs = all.queries * (of_query / 4096) + 2 * all.keys * (of_key / 4096);
  mx::Shape keys{c.B, c.G, c.S, c.D};
  return launch("attention_fused_round", values, {{c.B, c.H, c.T, c.D}, keys, keys},
                {c.dtype, c.dtype, c.dtype}, fused_template_of(c), {{jobs, 1, 1}, 256}, c.s);
}

int64_t fused_vjp_scratch(const Call& c) {
  const Tiles all(c);
  const int64_t of_query = backward_launch(c.D).bq * padded(c.D), of_key = BK * padded(c.D);
  return 4 * (all.queries * (of_query + 1) + all.keys * (2 * of_key + 1) + 1LL * c.B * c.H * c.T);
}

}  // namespace segtrain
