// Attention with our kernels in cpu.cpp, metal/attention.metal and cuda/attention.cu.
#include "core/gpu.h"
#include "ops/attention/attention.h"
#include "ops/attention/cpu.h"
#include "ops/attention/parts.h"

namespace segtrain {

namespace {

// ---- CPU

cpu::Attention cpu_args(const Call& c) {
  return {c.B, c.H, c.G, c.T, c.S, c.D, c.Dv, c.q_start, c.scale, c.cap, c.first.data()};
}

Arrays cpu_forward(const Call& c, const Arrays& x) {
  return cpu_op(
      "attention", x, {{c.B, c.H, c.T, c.Dv}, {c.B, c.H, c.T}},
      [c](auto& in, auto& out) { cpu::attention(cpu_args(c), in[0], in[1], in[2], out[0], out[1]); }, c.s);
}

Arrays cpu_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
               const mx::array& lse) {
  auto grads = cpu_op(
      "attention_vjp", {x[0], x[1], x[2], o, lse, d_o},
      {{c.B, c.H, c.T, c.D}, {c.B, c.H, c.S, c.D}, {c.B, c.H, c.S, c.Dv}},
      [c](auto& in, auto& out) {
        cpu::attention_vjp(cpu_args(c), in[0], in[1], in[2], in[3], in[4], in[5], out[0], out[1], out[2]);
      },
      c.s);
  return {grads[0], sum_share(grads[1], c), sum_share(grads[2], c)};
}

// ---- GPU

constexpr int CUDA_BYTES = 227 * 1024;  // maximum shared memory of a block on Hopper

/// The launch parameters of the CUDA kernels. They are computed from D as in struct Shapes of
/// cuda/attention.cu, which checks that they match.
struct CudaTiles {
  int bq, threads, bk_dkv, forward, dq, dkv;
  explicit CudaTiles(int D) {
    bool small = D <= 128;
    int ld = (small ? (D + 31) / 32 * 32 : (D + 63) / 64 * 64) + 8;
    bq = 128, threads = small ? 128 : 256, bk_dkv = small ? 128 : 64;
    int bk = small ? 32 : 64, bq_dkv = 64;
    forward = (bq + 4 * bk) * ld * 2;
    dq = (2 * bq + 4 * 32) * ld * 2;
    dkv = (2 * bk_dkv + 4 * bq_dkv) * ld * 2 + 2 * bk_dkv * (bq_dkv + 8) * 2 + 4 * bq_dkv * 4;
  }
};

std::map<std::string, mx::array> gpu_values(const Call& c, const Arrays& x, int parts) {
  // MLX passes inputs with fewer than 8 elements in a different address space, so `first` is padded to at
  // least 8 elements.
  std::vector<int32_t> first = c.first;
  first.resize(std::max<size_t>(first.size(), 8), c.first.back());
  return {{"q", x[0]},
          {"k", x[1]},
          {"v", x[2]},
          {"first", device_ints(first)},
          {"at", device_ints({c.q_start, parts, c.B, c.H, c.G, c.T, c.S})},
          {"args", device_floats({c.scale, c.cap})},
          {"q_start", mx::array(c.q_start, mx::int32)},
          {"scale", mx::array(c.scale)},
          {"cap", mx::array(c.cap)}};
}

/// Returns a kernel's template arguments. `rows` is the number of queries or keys per block; the kernel
/// source checks this number.
Template gpu_template(const Call& c, int rows = 0) {
  Template all{{"T", c.dtype}, {"D", c.D}, {"CAP", c.cap > 0}};
  if (rows) all.push_back({"ROWS", rows});
  return all;
}

int query_rows(const Call& c) {
  return c.device == Gpu::metal ? metal_forward_rows(c.D) : CudaTiles(c.D).bq;
}

Grid query_grid(const Call& c, bool backward) {
  if (c.device == Gpu::metal) return {{tiles(c.T, query_rows(c)), c.H, c.B}, 128};
  CudaTiles t(c.D);
  return {{tiles(c.T, t.bq) * c.B * c.H, 1, 1}, t.threads, backward ? t.dq : t.forward};
}

/// Returns the elements [begin, end) of x along an axis: 1 for heads, 2 for rows.
mx::array part_of(const mx::array& x, int axis, std::pair<int, int> part, mx::StreamOrDevice s) {
  if (part.first == 0 && part.second == x.shape(axis)) return x;
  mx::Shape begin(x.ndim(), 0), end = x.shape();
  begin[axis] = part.first;
  end[axis] = part.second;
  return mx::slice(x, begin, end, s);
}
mx::array rows_of(const mx::array& x, std::pair<int, int> part, mx::StreamOrDevice s) {
  return part_of(x, 2, part, s);
}

/// Calls `launches` for each part and concatenates the results along an axis.
template <class Launches>
Arrays of_parts(const Ranges& parts, int axis, const Launches& launches, mx::StreamOrDevice s) {
  if (parts.size() == 1) return launches(parts[0]);
  std::vector<Arrays> pieces;
  for (const auto& part : parts) {
    auto made = launches(part);
    pieces.resize(made.size());
    for (size_t i = 0; i < made.size(); ++i) pieces[i].push_back(made[i]);
  }
  Arrays whole;
  for (const auto& piece : pieces) whole.push_back(mx::concatenate(piece, axis, s));
  return whole;
}

Ranges whole(int rows) {
  return {{0, rows}};
}

Arrays gpu_forward(const Call& c, const Arrays& x) {
  auto part = [&](std::pair<int, int> queries) {
    const Call own = of_queries(c, queries);
    return launch("attention", gpu_values(own, {rows_of(x[0], queries, c.s), x[1], x[2]}, 1),
                  {{c.B, c.H, own.T, c.Dv}, {c.B, c.H, own.T}}, {c.dtype, mx::float32},
                  gpu_template(c, query_rows(c)), query_grid(own, false), c.s);
  };
  return of_parts(c.device == Gpu::metal ? forward_parts(c) : whole(c.T), 2, part, c.s);
}

/// Returns dq, dk and dv for the queries of one launch. dk and dv cover all keys of the call and have the
/// dtype `sums`. `x` contains q, k, v, lse, delta and d_o.
Arrays metal_vjp_launches(const Call& c, const Arrays& x, mx::Dtype sums) {
  const auto blocks = score_blocks(c);
  const mx::Shape of_q{c.B, c.H, c.T, c.D}, of_k{c.B, c.G, c.S, c.D};
  if (blocks.count == 0)  // no query sees a key
    return {mx::zeros(of_q, c.dtype, c.s), mx::zeros(of_k, sums, c.s), mx::zeros(of_k, sums, c.s)};
  auto values = gpu_values(c, {x[0], x[1], x[2]}, 1);
  values.insert({{"lse", x[3]},
                 {"delta", x[4]},
                 {"d_o", x[5]},
                 {"index", device_ints(blocks.index)},
                 {"blocks", mx::array(blocks.count, mx::int32)}});
  auto with_sums = gpu_template(c, METAL_ROWS);
  with_sums.push_back({"SUM", sums});
  const auto kept = metal_score_dtype(c.dtype);
  auto of_keys = launch("attention_vjp_kv_ds", values, {of_k, of_k, {c.B * c.H, blocks.count, SCORE_BLOCK}},
                        {sums, sums, kept}, with_sums, {{tiles(c.S, METAL_ROWS), c.G, c.B}, 256}, c.s);
  values.insert({"ds", of_keys[2]});
  const int rows = metal_vjp_rows(c.D);
  auto dq = launch("attention_vjp_q_ds", values, {of_q}, {c.dtype},
                   {{"T", c.dtype}, {"D", c.D}, {"ROWS", rows}}, {{tiles(c.T, rows), c.H, c.B}, 128}, c.s);
  // dk and dv wait for dq. Otherwise, if a caller evaluated dk first, the dS of all launches would stay in
  // memory until dq is computed.
  auto sum = mx::depends({of_keys[0], of_keys[1]}, {dq[0]});
  return {dq[0], sum[0], sum[1]};
}

/// Returns dq, dk and dv. The ranges of queries are computed one after another, so the dS of only one range
/// is in memory at a time.
Arrays metal_vjp_of_heads(const Call& c, Arrays x, const Ranges& parts) {
  if (parts.size() == 1) return metal_vjp_launches(c, x, c.dtype);
  auto zero = mx::zeros({c.B, c.G, c.S, c.D}, mx::float32, c.s), dk = zero, dv = zero;
  Arrays dqs;
  for (const auto& queries : parts) {
    if (!dqs.empty()) x[0] = mx::depends({x[0]}, {dqs.back(), dk, dv})[0];
    const auto keys = keys_of_queries(c, queries);
    Arrays own = x;
    for (int i : {0, 3, 4, 5}) own[i] = rows_of(x[i], queries, c.s);
    for (int i : {1, 2}) own[i] = rows_of(x[i], keys, c.s);
    auto made = metal_vjp_launches(of_keys(of_queries(c, queries), keys), own, mx::float32);
    dqs.push_back(made[0]);
    dk = add_rows(dk, made[1], keys.first, c.s);
    dv = add_rows(dv, made[2], keys.first, c.s);
  }
  return {mx::concatenate(dqs, 2, c.s), dk, dv};
}

/// Returns dq, dk and dv. `x` contains q, k, v, lse, delta and d_o.
Arrays metal_vjp(const Call& c, const Arrays& x) {
  // If a launch over all heads could process only a few queries, we process a few groups of heads at a time
  // instead.
  int groups = c.G;
  auto parts = vjp_parts(c);
  while (groups % 2 == 0 && parts.size() > 1 && c.T < 1024 * static_cast<int>(parts.size())) {
    groups /= 2;
    parts = vjp_parts(of_groups(c, groups));
  }
  Ranges heads;
  for (int g = 0; g < c.G; g += groups) heads.push_back({g, g + groups});
  auto some = [&](std::pair<int, int> part) {
    const std::pair<int, int> of_q{part.first * c.share(), part.second * c.share()};
    Arrays own;
    for (size_t i = 0; i < x.size(); ++i)
      own.push_back(part_of(x[i], 1, i == 1 || i == 2 ? part : of_q, c.s));
    return metal_vjp_of_heads(of_groups(c, groups), own, parts);
  };
  return of_parts(heads, 1, some, c.s);
}

Arrays gpu_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
               const mx::array& lse) {
  // On CUDA, if there are few key tiles, the heads of a group are divided among `parts` blocks, whose results
  // are then summed.
  bool metal = c.device == Gpu::metal;
  CudaTiles t(c.D);
  int parts = 1;
  while (!metal && parts < c.share() && c.share() % (2 * parts) == 0 &&
         tiles(c.S, t.bk_dkv) * c.B * c.G * parts < 264)
    parts *= 2;
  auto values = gpu_values(c, x, parts);
  values.insert({{"lse", lse}, {"o", o}, {"d_o", mx::astype(d_o, c.dtype, c.s)}});
  auto delta = metal ? row_delta(c, o, d_o)
                     : launch("attention_delta", values, {{c.B, c.H, c.T}}, {mx::float32}, gpu_template(c),
                              {{tiles(c.B * c.H * c.T, 8), 1, 1}, 256}, c.s)[0];
  values.insert({"delta", delta});
  if (metal) return metal_vjp(c, {x[0], x[1], x[2], lse, delta, values.at("d_o")});
  auto dq = launch("attention_vjp_q", values, {{c.B, c.H, c.T, c.D}}, {c.dtype}, gpu_template(c, t.bq),
                   query_grid(c, true), c.s)[0];
  auto dtype = parts > 1 ? mx::float32 : c.dtype;
  mx::Shape shape{c.B, c.G, parts, c.S, c.D};
  Grid grid{{tiles(c.S, t.bk_dkv) * c.B * c.G * parts, 1, 1}, 256, t.dkv};
  auto dkv = launch("attention_vjp_kv", values, {shape, shape}, {dtype, dtype}, gpu_template(c, t.bk_dkv),
                    grid, c.s);
  mx::Shape keys{c.B, c.G, c.S, c.D};
  if (parts == 1) return {dq, mx::reshape(dkv[0], keys, c.s), mx::reshape(dkv[1], keys, c.s)};
  values.insert({{"dk_parts", dkv[0]}, {"dv_parts", dkv[1]}});
  dkv = launch("attention_sum_parts", values, {keys, keys}, {c.dtype, c.dtype}, gpu_template(c),
               {{tiles(c.B * c.G * c.S * c.D, 1024), 1, 1}, 256}, c.s);
  return {dq, dkv[0], dkv[1]};
}

}  // namespace

OpCost cpu_attention_cost(const Call& c) {
  // The number of bytes of dk and dv of all query heads, which stay in memory until the heads of a group are
  // summed.
  int64_t parts = c.share() > 1 ? 4LL * c.B * c.H * c.S * (c.D + c.Dv) : 0;
  int64_t lse = 4LL * c.B * c.H * c.T, forward = cpu::attention_scratch(cpu_args(c), false),
          backward = cpu::attention_scratch(cpu_args(c), true);
  return {.forward = lse + forward, .backward = lse + parts + backward, .kept = lse};
}

std::string gpu_attention_unfit(const Call& c) {
  if (c.D != c.Dv) return "D and Dv differ";
  if (c.device == Gpu::metal) {
    bool fits = c.D == 64 || c.D == 80 || c.D == 96 || c.D == 128 || c.D == 192 || c.D == 256;
    return fits ? "" : "it supports head sizes of 64, 80, 96, 128, 192 and 256";
  }
  if (c.dtype == mx::float32) return "its matrix units support half precision only";
  CudaTiles t(c.D);
  bool fits = c.D % 8 == 0 && c.D <= 256 && std::max({t.forward, t.dq, t.dkv}) <= CUDA_BYTES;
  return fits ? "" : "it supports head sizes in multiples of 8 up to 256";
}

const AttentionWay cpu_attention{cpu_forward, cpu_vjp}, gpu_attention{gpu_forward, gpu_vjp};

}  // namespace segtrain
