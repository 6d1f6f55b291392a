// Attention by one kernel a direction: cpu.cpp, metal/attention.metal, cuda/attention.cu.
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

constexpr int CUDA_BYTES = 227 * 1024;  // of shared memory that a block may ask for on Hopper

/// The launch of a CUDA kernel follows from D, as struct Shapes in cuda/attention.cu, which checks it.
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
  // MLX passes inputs of fewer than 8 elements in another address space: `first` is never that short.
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

/// `rows`: queries or keys that a block takes, which the text checks.
Template gpu_template(const Call& c, int rows = 0) {
  Template all{{"T", c.dtype}, {"D", c.D}, {"CAP", c.cap > 0}};
  if (rows) all.push_back({"ROWS", rows});
  return all;
}

int query_rows(const Call& c) {
  return c.device == Gpu::metal ? METAL_ROWS : CudaTiles(c.D).bq;
}

Grid query_grid(const Call& c, bool backward) {
  if (c.device == Gpu::metal) return {{tiles(c.T, METAL_ROWS), c.H, c.B}, 128};
  CudaTiles t(c.D);
  return {{tiles(c.T, t.bq) * c.B * c.H, 1, 1}, t.threads, backward ? t.dq : t.forward};
}

/// Rows [begin, end) of arrays [B, ·, rows, ...].
mx::array rows_of(const mx::array& x, std::pair<int, int> part, mx::StreamOrDevice s) {
  if (part.first == 0 && part.second == x.shape(2)) return x;
  mx::Shape begin(x.ndim(), 0), end = x.shape();
  begin[2] = part.first;
  end[2] = part.second;
  return mx::slice(x, begin, end, s);
}

/// What `launches` gives for each part, put together along the rows.
template <class Launches>
Arrays of_parts(const Ranges& parts, const Launches& launches, mx::StreamOrDevice s) {
  if (parts.size() == 1) return launches(parts[0]);
  std::vector<Arrays> pieces;
  for (const auto& part : parts) {
    auto made = launches(part);
    pieces.resize(made.size());
    for (size_t i = 0; i < made.size(); ++i) pieces[i].push_back(made[i]);
  }
  Arrays whole;
  for (const auto& piece : pieces) whole.push_back(mx::concatenate(piece, 2, s));
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
  return of_parts(c.device == Gpu::metal ? query_parts(c, FORWARD_PRODUCTS) : whole(c.T), part, c.s);
}

/// `values`: of the whole call.
Arrays metal_vjp(const Call& c, const Arrays& x, const std::map<std::string, mx::array>& values) {
  auto with = [&](const Call& own, const Arrays& qkv, std::pair<int, int> queries) {
    auto all = gpu_values(own, qkv, 1);
    for (const char* name : {"lse", "delta", "d_o"})
      all.insert({name, rows_of(values.at(name), queries, c.s)});
    return all;
  };
  auto dq = [&](std::pair<int, int> queries) {
    const Call own = of_queries(c, queries);
    return launch("attention_vjp_q", with(own, {rows_of(x[0], queries, c.s), x[1], x[2]}, queries),
                  {{c.B, c.H, own.T, c.D}}, {c.dtype}, gpu_template(c, METAL_ROWS), query_grid(own, true),
                  c.s);
  };
  auto dkv = [&](std::pair<int, int> keys) {
    const Call own = of_keys(c, keys);
    const mx::Shape shape{c.B, c.G, own.S, c.D};
    return launch("attention_vjp_kv",
                  with(own, {x[0], rows_of(x[1], keys, c.s), rows_of(x[2], keys, c.s)}, {0, c.T}),
                  {shape, shape}, {c.dtype, c.dtype}, gpu_template(c, METAL_ROWS),
                  {{tiles(own.S, METAL_ROWS), c.G, c.B}, 256}, c.s);
  };
  auto of_q = of_parts(query_parts(c, DQ_PRODUCTS), dq, c.s);
  auto of_kv = of_parts(key_parts(c, DKV_PRODUCTS), dkv, c.s);
  return {of_q[0], of_kv[0], of_kv[1]};
}

Arrays gpu_vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o,
               const mx::array& lse) {
  // On CUDA the heads of a group are split over `parts` blocks where there are few tiles of keys, and summed
  // after.
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
  if (metal) return metal_vjp(c, x, values);
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
  // dk and dv of each query head, until those of a group are added up.
  int64_t parts = c.share() > 1 ? 4LL * c.B * c.H * c.S * (c.D + c.Dv) : 0;
  int64_t lse = 4LL * c.B * c.H * c.T, forward = cpu::attention_scratch(cpu_args(c), false),
          backward = cpu::attention_scratch(cpu_args(c), true);
  return {.forward = lse + forward, .backward = lse + parts + backward, .kept = lse};
}

std::string gpu_attention_unfit(const Call& c) {
  if (c.D != c.Dv) return "D and Dv differ";
  if (c.device == Gpu::metal) {
    bool fits = c.D == 64 || c.D == 80 || c.D == 96 || c.D == 128 || c.D == 192 || c.D == 256;
    return fits ? "" : "its head sizes are 64, 80, 96, 128, 192 and 256";
  }
  if (c.dtype == mx::float32) return "its matrix units take half precision only";
  CudaTiles t(c.D);
  bool fits = c.D % 8 == 0 && c.D <= 256 && std::max({t.forward, t.dq, t.dkv}) <= CUDA_BYTES;
  return fits ? "" : "its head sizes are multiples of 8 up to 256";
}

const AttentionWay cpu_attention{cpu_forward, cpu_vjp}, gpu_attention{gpu_forward, gpu_vjp};

}  // namespace segtrain
