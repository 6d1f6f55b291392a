#include "ops/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <tuple>

#include "core/binding.h"
#include "core/gpu.h"
#include "mlx/backend/metal/metal.h"
#include "ops/attention/cudnn/cudnn.h"
#include "ops/attention/parts.h"

namespace segtrain {

namespace {

/// Returns whether MLX's attention has a kernel for this GPU's neural accelerators. MLX has no function that
/// reports this, so we make a call that requires such a kernel. Without one, the call throws immediately.
bool has_nax() {
  static const bool has = [] {
    if (!mx::metal::is_available()) return false;
    auto x = mx::zeros({1, 1, 9, 512}, mx::bfloat16, mx::Device::gpu);
    try {
      mx::fast::scaled_dot_product_attention(x, x, x, 1, "causal", {}, {}, true, mx::Device::gpu);
    } catch (const std::invalid_argument&) {
      return false;
    }
    return true;
  }();
  return has;
}

Call make_call(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
               mx::StreamOrDevice s) {
  const auto& [scale, window, segments, softcap, q_start] = options;
  check(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4,
        "[attention] expected q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv]; got ", q.shape(), ", ", k.shape(), ", ",
        v.shape(), ".");
  Gpu device = on_cpu(s) ? Gpu::none : gpu();
  Call c{.B = q.shape(0),
         .H = q.shape(1),
         .G = k.shape(1),
         .T = q.shape(2),
         .S = k.shape(2),
         .D = q.shape(3),
         .Dv = v.shape(3),
         .scale = scale,
         .cap = softcap.value_or(0),
         .window = window.value_or(0),
         .dtype = q.dtype(),
         .s = s,
         .device = device};
  check(k.shape(0) == c.B && v.shape(0) == c.B && v.shape(1) == c.G && v.shape(2) == c.S && k.shape(3) == c.D,
        "[attention] q, k and v must agree in B and D, k and v in G and S; got ", q.shape(), ", ", k.shape(),
        ", ", v.shape(), ".");
  check(q.dtype() == k.dtype() && q.dtype() == v.dtype() && mx::issubdtype(q.dtype(), mx::floating),
        "[attention] q, k and v must have the same floating dtype; got ", q.dtype(), ", ", k.dtype(), ", ",
        v.dtype(), ".");
  check(c.G > 0 && c.H % c.G == 0,
        "[attention] the number of query heads must be a multiple of the number of key heads; got ", c.H,
        " and ", c.G, ".");
  c.q_start = q_start.value_or(c.S - c.T);
  check(c.q_start >= 0 && c.q_start + c.T <= c.S,
        "[attention] queries q_start … q_start + T must lie within the ", c.S, " keys; got q_start ",
        c.q_start, " and T ", c.T, ".");
  check(!window || *window >= 1, "[attention] window must be at least 1; got ", window.value_or(0), ".");
  check(!softcap || *softcap > 0, "[attention] softcap must be above 0; got ", softcap.value_or(0), ".");
  const Ranges all{{0, c.S}}, &ranges = segments ? *segments : all;
  for (int i = 0, end = 0; i < static_cast<int>(ranges.size()); end = ranges[i++].second)
    check(end <= ranges[i].first && ranges[i].first < ranges[i].second && ranges[i].second <= c.S,
          "[attention] expected segments as ascending ranges of the ", c.S, " keys; got ", ranges[i].first,
          " … ", ranges[i].second, " after ", end, ".");
  auto segment = ranges.begin();
  for (int t = 0; t < c.T; ++t) {
    int position = c.q_start + t;
    while (segment != ranges.end() && segment->second <= position) ++segment;
    bool padding = segment == ranges.end() || position < segment->first;
    int in_window = window ? position - *window + 1 : 0;
    c.first.push_back(padding ? position + 1 : std::max(in_window, segment->first));
  }
  c.nax = device == Gpu::metal && c.D == 512 && has_nax();
  c.causal_only = !softcap && c.T == c.S && c.first == std::vector<int32_t>(c.T, 0);
  return c;
}

/// Returns why MLX's attention would materialize T × S scores for this head size in the forward or the
/// backward pass, or an empty string if it would not. The conditions are those of MLX 0.32.4: see
/// has_fused_kernel in scaled_dot_product_attention.cpp, in mlx/backend/metal and mlx/backend/cuda.
std::string stock_heads_unfit(const Call& c) {
  bool half = c.dtype == mx::float16 || c.dtype == mx::bfloat16;
  std::string sizes;
  if (c.device == Gpu::metal) {
    for (int d : {64, 72, 80, 96, 128, 192, 256})
      if (c.D == d && c.Dv == d) return "";
    if (c.D == 512 && c.Dv == 512 && c.nax && half) return "";
    sizes = "of 64, 72, 80, 96, 128, 192 and 256 and, with neural accelerators, 512 in half precision";
  } else {
    if (!half) return "it has no float32 kernel on CUDA";
    if (int has = compute_capability(); has && has < 80) return "it needs compute capability 8.0 or higher";
    if (c.D % 8 == 0 && c.D <= 128 && c.D == c.Dv) return "";
    sizes = "in multiples of 8 up to 128";
  }
  return "its memory is linear in S only for D = Dv " + sizes;
}

/// Returns MLX's attention as an implementation. It is ok only if the memory of both the forward and the
/// backward pass is linear in T and S.
Way stock_way(const Call& c) {
  if (c.device == Gpu::none) return {"stock", false, "on the CPU it keeps an array of T × S scores"};
  if (!c.causal_only)
    return {"stock", false, "it supports windows, segments, caps and T < S only through mask arrays"};
  auto unfit = stock_heads_unfit(c);
  // The forward pass is a single launch, and so is the backward pass. Neither can be split.
  constexpr double LONGEST = 4;  // seconds
  if (unfit.empty() && c.device == Gpu::metal && causal_seconds(c, DKV_PRODUCTS) > LONGEST * m1s_of_gpu())
    unfit = "a single launch would take so long that macOS might end the program";
  Way way = c.device == Gpu::metal ? gpu_kernel("attention_stock", unfit, c.device)
                                   : Way{"stock", unfit.empty(), unfit};
  way.name = "stock";
  return way;
}

/// On CUDA, MLX uses its fused kernel only if T is a multiple of 128, so we append zeros, which no query
/// sees. On Metal, MLX does not use the fused kernel for wide heads if there is no backward pass, because its
/// other implementation is faster; we request the fused kernel explicitly to save memory. For up to 8 queries
/// MLX uses another kernel, which has no backward pass; with so few queries, memory is small in any case.
mx::array stock(const Call& c, const mx::array& q, const mx::array& k, const mx::array& v) {
  int more = c.device == Gpu::cuda ? (128 - c.T % 128) % 128 : 0;
  bool insist = c.device == Gpu::metal && c.T > 8;
  auto longer = [&](const mx::array& x) {
    return more ? mx::pad(x, {{0, 0}, {0, 0}, {0, more}, {0, 0}}, mx::array(0, x.dtype()), "constant", c.s)
                : x;
  };
  auto o = mx::fast::scaled_dot_product_attention(longer(q), longer(k), longer(v), c.scale, "causal", {}, {},
                                                  insist, c.s);
  return more ? mx::slice(o, {0, 0, 0, 0}, {c.B, c.H, c.T, c.Dv}, c.s) : o;
}

}  // namespace

mx::array sum_share(const mx::array& x, const Call& c) {
  if (c.share() == 1) return x;
  return mx::sum(mx::reshape(x, {c.B, c.G, c.share(), c.S, x.shape(3)}, c.s), 2, false, c.s);
}

mx::array add_rows(const mx::array& sum, const mx::array& part, int begin, mx::StreamOrDevice s) {
  const mx::Shape from{0, 0, begin, 0}, to{sum.shape(0), sum.shape(1), begin + part.shape(2), sum.shape(3)};
  return mx::slice_update(sum, mx::add(mx::slice(sum, from, to, s), part, s), from, to, s);
}

mx::array row_delta(const Call& c, const mx::array& o, const mx::array& d_o) {
  return mx::sum(mx::multiply(f32(o, c.s), f32(d_o, c.s), c.s), -1, false, c.s);
}

std::vector<std::string> attention_impls() {
  std::vector<std::string> names{"kernel", "blocked"};
  if (mx::default_device() == mx::Device::cpu) return names;
  names.push_back("stock");
  if (compute_capability() == 90) names.push_back("hopper");
  if (has_cudnn()) names.push_back("cudnn");
  return names;
}

namespace {

std::atomic<bool> repeatable{false};

}  // namespace

bool set_repeatable(bool on) {
  return repeatable.exchange(on);
}

bool is_repeatable() {
  return repeatable;
}

bool has_neural_accelerators() {
  return gpu() == Gpu::metal && has_nax();
}

namespace {

/// Returns whether MLX's attention and cuDNN may be used. On CUDA, 'auto' may use them only if results need
/// not be repeatable.
bool may_use_libraries(Gpu device, const std::string& impl, bool repeats) {
  return impl != "auto" || !repeats || device != Gpu::cuda;
}

/// The properties of a call on which the fastest implementation for this machine's GPU depends: D, the dtype,
/// and whether the call is plain causal.
using Alike = std::tuple<int, mx::Dtype::Val, bool>;
std::mutex preferred_lock;
std::map<Alike, std::string> preferred;

Alike alike(const Call& c) {
  return {c.D, c.dtype.val(), c.causal_only};
}

/// Chooses an implementation. From fastest to slowest, as measured on an H100 and an H200 (bench/LOG.md), the
/// implementations are our use of cuDNN, our kernels for Hopper, MLX's attention, our kernel for any GPU, and
/// matrix products of whole blocks.
std::string way_among(const Call& c, const std::string& impl, const Way& cudnn, bool libraries) {
  Way kernel = c.device == Gpu::none ? Way{"kernel", true, ""}
                                     : gpu_kernel("attention", gpu_attention_unfit(c), c.device);
  Way hopper = gpu_kernel("attention_hopper", hopper_attention_unfit(c), c.device);
  hopper.name = "hopper";
  Way blocked{"blocked", true, ""};
  Way stock = libraries ? stock_way(c) : Way{"stock", false, ""};
  std::vector<Way> ways{cudnn, hopper, stock, kernel, blocked};
  if (c.device == Gpu::metal) {
    std::lock_guard lock(preferred_lock);
    if (auto found = preferred.find(alike(c)); found != preferred.end())
      std::stable_partition(ways.begin(), ways.end(),
                            [&](const Way& way) { return way.name == found->second; });
  }
  return choose("attention", impl, ways);
}

std::string way_for(const Call& c, const std::string& impl) {
  bool libraries = may_use_libraries(c.device, impl, repeatable);
  bool plain = !c.window && !c.cap && c.T == c.S;
  bool ask = impl == "cudnn" || (impl == "auto" && plain && libraries);
  return way_among(c, impl, ask ? cudnn_way(c) : Way{"cudnn", false, ""}, libraries);
}

AttentionWay way_of(const Call& c, const std::string& name) {
  return name == "blocked"       ? blocked_attention
         : name == "hopper"      ? hopper_attention
         : name == "cudnn"       ? cudnn_attention()
         : c.device == Gpu::none ? cpu_attention
                                 : gpu_attention;
}

Arrays forward(const Call& c, const AttentionWay& way, const Arrays& qkv) {
  auto y = way.forward(c, qkv);
  return {mx::astype(y[0], c.dtype, c.s), y[1]};
}

}  // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v,
                    const AttentionOptions& options, const std::optional<Arrays>& saved,
                    const std::string& impl, mx::StreamOrDevice s) {
  auto c = make_call(q, k, v, options, s);
  auto name = way_for(c, impl);
  check(!saved ||
            (name != "stock" && saved->size() == 2 && (*saved)[0].shape() == mx::Shape{c.B, c.H, c.T, c.Dv}),
        "[attention] saved must be the result of attention_forward with the same arguments.");
  if (name == "stock") return stock(c, q, k, v);
  auto way = way_of(c, name);
  auto op = mx::custom_vjp([c, way, saved](const Arrays& x) { return saved ? *saved : forward(c, way, x); },
                           [c, way](const Arrays& x, const Arrays& dy, const Arrays& y) {
                             auto grads = way.vjp(c, x, dy[0], y[0], y[1]);
                             for (auto& grad : grads) grad = mx::astype(grad, c.dtype, c.s);
                             return grads;
                           });
  return op({q, k, v})[0];
}

Arrays attention_forward(const mx::array& q, const mx::array& k, const mx::array& v,
                         const AttentionOptions& options, const std::string& impl, mx::StreamOrDevice s) {
  auto c = make_call(q, k, v, options, s);
  auto name = way_for(c, impl);
  return name == "stock" ? Arrays{} : forward(c, way_of(c, name), {q, k, v});
}

namespace {

/// Returns a Call with the parameters that the planner knows. The planner knows the window, but not exactly
/// which keys each query sees.
Call planned_call(const Device& device, int B, int H, int G, int D, int T, int S, int window, bool cap) {
  return {.B = B,
          .H = H,
          .G = G,
          .T = T,
          .S = S,
          .D = D,
          .Dv = D,
          .scale = 1,
          .cap = static_cast<float>(cap),
          .causal_only = !cap && T == S && (!window || window >= S),
          .window = window,
          .dtype = device.dtype(),
          .device = device.gpu(),
          .nax = device.nax};
}

/// Returns the implementation that 'auto' chooses on a device, which need not be in this machine.
std::string planned_way(const Device& device, const Call& c) {
  bool libraries = may_use_libraries(c.device, "auto", device.repeatable);
  bool cudnn = libraries && device.cudnn && c.device == Gpu::cuda && cudnn_call_unfit(c).empty();
  return way_among(c, "auto", {"cudnn", cudnn, ""}, libraries);
}

/// Returns the cost that bench/memory.py measured on an H100, for every implementation except the fused
/// kernels for Hopper. It consists of dk and dv in float32 (with cuDNN, for each query head) and of the
/// scores that the kernel for wide heads writes to memory.
OpCost gpu_attention_cost(const Device& device, const Call& c, int keys, int behind) {
  const int64_t of_keys = static_cast<int64_t>(c.B) * keys * c.G * c.D, wide = 256 << 20, other = 12 << 20;
  const int64_t scores = 4LL * c.H * c.S * std::min(c.S, (c.window ? c.window : c.S) + 128);
  const double parts = c.D > 128 ? 1.5 : 6;
  return {.backward = static_cast<int64_t>(parts * static_cast<double>(of_keys * device.size)) +
                      (c.D > 256 ? std::min(wide, scores) : other) +
                      8LL * c.B * behind * c.H * c.D};  // our kernel sums each query head in float32
}

struct AttentionCost : OpCost {
  int64_t saved = 0;  ///< bytes that attention_forward returns for the backward pass
};

/// Returns the cost of attention in a stage. A row has `keys` tokens, the last `queries` of which are also
/// queries. If there is a branch, the last `branch` queries and keys are a second sequence that continues the
/// first `shared` keys, and attention is called a second time for this sequence. `groups` is 0 if another
/// layer computes the keys and values; that layer's cost then includes them. `packed` says whether the row
/// consists of several segments.
AttentionCost attention_cost(const Device& device, int rows, int heads, int groups, int head, int queries,
                             int keys, std::optional<int> window, bool softcap, int branch, int shared,
                             bool packed) {
  auto call = [&](int T, int S) {
    auto c = planned_call(device, rows, heads, std::max(groups, 1), head, T, S, window.value_or(0), softcap);
    c.causal_only = c.causal_only && !packed;
    return c;
  };
  std::vector<Call> calls{call(std::max(queries - branch, 0), keys - branch)};
  if (branch) calls.push_back(call(std::min(branch, queries), shared + branch));
  AttentionCost cost;
  bool gives = true, fused = true;
  int64_t sums = 0, written = 0;
  for (const auto& c : calls) {
    const auto way = planned_way(device, c);
    gives = gives && way != "stock";
    fused = fused && way == "hopper" && fused_vjp_fits(c);
    if (fused) sums += fused_vjp_scratch(c);
    cost.saved += static_cast<int64_t>(rows) * heads * c.T * (head * device.size + 4);
    if (c.device == Gpu::metal && way == "kernel") written = std::max(written, metal_vjp_scratch(c));
    if (c.device != Gpu::none) continue;
    auto own = cpu_attention_cost(c);
    cost.forward += own.forward;
    cost.backward += own.backward;
    cost.kept += own.kept;
  }
  if (!gives) cost.saved = 0;
  if (fused)
    cost.backward = sums;
  else if (device.gpu() != Gpu::none)
    static_cast<OpCost&>(cost) =
        gpu_attention_cost(device, calls[0], groups ? keys : 0, branch ? shared + branch : 0);
  cost.backward += written;
  return cost;
}

}  // namespace

void prefer_attention(int head, mx::Dtype dtype, bool causal, const std::string& way) {
  std::lock_guard lock(preferred_lock);
  if (way.empty())
    preferred.erase({head, dtype.val(), causal});
  else
    preferred[{head, dtype.val(), causal}] = way;
}

std::string attention_way(const std::string& device, int head, mx::Dtype dtype, bool cudnn, bool nax,
                          bool repeats) {
  constexpr int T = 1024;
  const Device on{device, static_cast<int>(mx::size_of(dtype)), 0, cudnn, nax, repeats};
  return planned_way(on, planned_call(on, 1, 1, 1, head, T, T, 0, false));
}

const Binding attention_binding([](nb::module_& m) {
  nb::class_<AttentionOptions>(m, "AttentionOptions",
                               "Defines which keys a query sees, and how scores are scaled and capped.")
      .def(nb::init<float, std::optional<int>, std::optional<Ranges>, std::optional<float>,
                    std::optional<int>>(),
           nb::kw_only(), "scale"_a, "window"_a = nb::none(), "segments"_a = nb::none(),
           "softcap"_a = nb::none(), "q_start"_a = nb::none())
      .def_ro("segments", &AttentionOptions::segments);
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "options"_a, nb::kw_only(), "saved"_a = nb::none(),
        "impl"_a = "auto", "stream"_a = nb::none(),
        "softmax(scale·q·kᵀ)·v, causal. q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → [B,H,T,Dv].");
  m.def("attention_forward", &attention_forward, "q"_a, "k"_a, "v"_a, "options"_a, nb::kw_only(),
        "impl"_a = "auto", "stream"_a = nb::none(),
        "Returns {o, statistics}, which can be passed to attention as `saved`.");
  m.def("attention_impls", &attention_impls,
        "Returns the names of the attention implementations for the default device.");
  m.def("prefer_attention", &prefer_attention, "head"_a, "dtype"_a, "causal"_a, "way"_a,
        "Makes 'auto' prefer the implementation `way` on Metal for calls with this head size, dtype and kind "
        "(plain causal, or with a window, segments or a cap), if `way` supports the call. An empty name "
        "restores the built-in order.");
  m.def("set_repeatable", &set_repeatable, "on"_a,
        "Sets whether 'auto' uses only implementations whose results are bit-identical when a call is "
        "repeated, and returns the previous setting.");
  m.def("is_repeatable", &is_repeatable, "Returns the value that was last passed to set_repeatable.");
  m.def("attention_way", &attention_way, "device"_a, "head"_a, "dtype"_a = mx::bfloat16, nb::kw_only(),
        "cudnn"_a = false, "nax"_a = false, "repeatable"_a = false,
        "Returns the implementation that 'auto' chooses for plain causal attention over many tokens on a "
        "'cpu', 'metal' or 'cuda' device, which this machine need not have.");
  nb::class_<AttentionCost, OpCost>(
      m, "AttentionCost",
      "The cost of attention, including the memory that attention_forward keeps for the backward pass.")
      .def_ro("saved", &AttentionCost::saved);
  m.def("attention_cost", &attention_cost, "device"_a, nb::kw_only(), "rows"_a, "heads"_a, "groups"_a,
        "head"_a, "queries"_a, "keys"_a, "window"_a = nb::none(), "softcap"_a = false, "branch"_a = 0,
        "shared"_a = 0, "packed"_a = false,
        "Returns the cost of attention in a stage on a device; see csrc/ops/attention/attention.cpp.");
  m.def("has_neural_accelerators", &has_neural_accelerators,
        "Returns whether this machine's GPU has neural accelerators for which MLX has attention kernels.");
});

}  // namespace segtrain
