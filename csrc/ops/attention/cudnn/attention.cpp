// Computes causal attention through cuDNN's graph API, with support for packed segments. MLX's own use of
// cuDNN is slower and limited to D ≤ 128.
//
// This code does not link to any CUDA library. It uses the cuDNN that libmlx.so has loaded, and cuDNN's
// frontend looks up the CUDA runtime itself. Of MLX's symbols, it uses only those that libmlx.so exports.
#include <cuda_runtime.h>
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <compare>
#include <mutex>

#include "mlx/backend/cuda/device.h"
#include "mlx/fast.h"
#include "mlx/primitives.h"
#include "ops/attention/cudnn/cudnn.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // where the frontend looks up cuDNN's functions
}

namespace segtrain {

namespace {

namespace fe = cudnn_frontend;

DeviceInts* device_ints;  // points to the function in _core

/// The oldest cuDNN version that we support. With older versions, the frontend makes copies if a length is
/// not a multiple of 128; when a CUDA graph is replayed, these copies would read freed memory.
constexpr size_t CUDNN_MIN = 91600;

/// The parameters for which a cuDNN plan is built.
struct Problem {
  int device;
  mx::Dtype::Val dtype;
  int B, H, G, T, D, Dv;
  int segments;  ///< maximum number of segments in the whole batch; 0 if each row is one segment
  int longest;   ///< maximum length of a segment; T if each row is one segment
  bool backward;

  auto operator<=>(const Problem&) const = default;
};

struct Plan {
  std::shared_ptr<fe::graph::Graph> graph;
  int64_t workspace = 0;
  std::string error;
};

std::mutex lock;  // guards handles and plans, which two threads must not use at the same time

template <class F>
F* cudnn_function(const char* name) {
  auto function = reinterpret_cast<F*>(dlsym(fe::cudnn_dlhandle, name));
  if (!function) throw std::runtime_error(std::string("cuDNN does not export ") + name);
  return function;
}

void check_cudnn(cudnnStatus_t status) {
  if (status != CUDNN_STATUS_SUCCESS)
    throw std::runtime_error(cudnn_function<decltype(cudnnGetErrorString)>("cudnnGetErrorString")(status));
}

void check_cudnn(fe::error_t status) {
  if (status.is_bad()) throw std::runtime_error(status.get_message());
}

cudnnHandle_t handle_of(mx::cu::Device& device) {
  static auto& handles = *new std::map<int, cudnnHandle_t>;  // never destroyed: CUDA shuts down first
  auto [found, fresh] = handles.try_emplace(device.cuda_device());
  if (fresh) {
    device.make_current();
    check_cudnn(cudnn_function<decltype(cudnnCreate)>("cudnnCreate")(&found->second));
  }
  return found->second;
}

/// Identifiers of tensors. The last five tensors describe packed segments: their lengths, and their offsets
/// in q, k, v and o.
enum Uid { Q, K, V, O, LSE, D_O, D_Q, D_K, D_V, SCALE, LENGTHS, AT_Q, AT_K, AT_V, AT_O };

using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

void add_nodes(fe::graph::Graph& graph, const Problem& p) {
  auto half = p.dtype == mx::Dtype::Val::float16 ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16;
  graph.set_io_data_type(half)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const int64_t B = p.segments ? p.segments : p.B;
  auto small = [&](Uid uid, int64_t n, fe::DataType_t dtype) {
    return graph.tensor(fe::graph::Tensor_attributes()
                            .set_uid(uid)
                            .set_dim({n, 1, 1, 1})
                            .set_stride({1, 1, 1, 1})
                            .set_is_pass_by_value(uid == SCALE)
                            .set_data_type(dtype));
  };
  std::map<Uid, Tensor> at;
  if (p.segments)
    for (auto uid : {AT_Q, AT_K, AT_V, AT_O}) at[uid] = small(uid, B + 1, fe::DataType_t::INT32);
  auto shape = [&](fe::graph::Tensor_attributes& tensor, Uid uid, Uid at_uid, int64_t heads, int64_t width) {
    tensor.set_uid(uid)
        .set_dim({B, heads, p.longest, width})
        .set_stride({heads * p.T * width, p.T * width, width, 1})
        .set_data_type(half);
    if (p.segments) tensor.set_ragged_offset(at.at(at_uid));
  };
  auto input = [&](Uid uid, Uid at_uid, int heads, int width) {
    fe::graph::Tensor_attributes tensor;
    shape(tensor, uid, at_uid, heads, width);
    return graph.tensor(tensor);
  };
  auto output = [&](const Tensor& tensor, Uid uid, Uid at_uid, int heads, int width) {
    shape(*tensor, uid, at_uid, heads, width);
    tensor->set_output(true);
  };
  auto of_rows = [&](fe::graph::Tensor_attributes& tensor) {
    tensor.set_uid(LSE)
        .set_dim({B, p.H, p.longest, 1})
        .set_stride({p.H * p.longest, p.longest, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
  };
  auto scale = small(SCALE, 1, fe::DataType_t::FLOAT);
  auto causal = [&](auto options, const char* name) {
    options.set_name(name)
        .set_attn_scale(scale)
        .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
    if (p.segments) {
      auto lengths = small(LENGTHS, B, fe::DataType_t::INT32);
      options.set_padding_mask(true).set_seq_len_q(lengths).set_seq_len_kv(lengths);
    }
    return options;
  };
  auto q = input(Q, AT_Q, p.H, p.D), k = input(K, AT_K, p.G, p.D), v = input(V, AT_V, p.G, p.Dv);
  if (!p.backward) {
    auto [o, lse] =
        graph.sdpa(q, k, v, causal(fe::graph::SDPA_attributes(), "attention").set_generate_stats(true));
    output(o, O, AT_O, p.H, p.Dv);
    of_rows(*lse);
    lse->set_output(true);
    return;
  }
  // We use cuDNN's nondeterministic algorithm, which sums dq in an unspecified order. The deterministic
  // algorithm either keeps dP, a T × S array for each head, or needs cuDNN 9.25.
  fe::graph::Tensor_attributes kept;
  of_rows(kept);
  auto o = input(O, AT_O, p.H, p.Dv), lse = graph.tensor(kept), d_o = input(D_O, AT_O, p.H, p.Dv);
  auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, o, d_o, lse,
                                          causal(fe::graph::SDPA_backward_attributes(), "attention_vjp"));
  output(dq, D_Q, AT_Q, p.H, p.D);
  output(dk, D_K, AT_K, p.G, p.D);
  output(dv, D_V, AT_V, p.G, p.Dv);
}

Plan build(const Problem& p, cudnnHandle_t handle) {
  Plan plan;
  try {
    auto graph = std::make_shared<fe::graph::Graph>();
    // Plans are never freed, so CUDA graphs need not keep them alive.
    graph->set_cuda_graph_retention(fe::CudaGraphRetention_t::NONE);
    add_nodes(*graph, p);
    check_cudnn(graph->validate());
    check_cudnn(graph->build_operation_graph(handle));
    check_cudnn(graph->create_execution_plans({fe::HeurMode_t::A}));
    check_cudnn(graph->check_support());
    check_cudnn(graph->build_plans());
    check_cudnn(graph->get_workspace_size(plan.workspace));
    plan.graph = std::move(graph);
  } catch (const std::exception& failure) {
    plan.error = failure.what();
    if (plan.error.empty()) plan.error = "no engine for this shape";
  }
  return plan;
}

/// Returns the plan for p, which is built at the first call. Plans are never freed, because CUDA graphs in
/// MLX's cache refer to their code.
const Plan& plan_of(const Problem& p, mx::cu::Device& device) {
  static auto& plans = *new std::map<Problem, Plan>;
  std::lock_guard guard(lock);
  auto found = plans.find(p);
  if (found == plans.end()) {
    device.make_current();
    found = plans.emplace(p, build(p, handle_of(device))).first;
  }
  return found->second;
}

/// Returns the primitive of a kernel that does nothing. We use it to allocate outputs, because MLX does not
/// export its allocator.
std::shared_ptr<mx::Primitive> allocation(mx::Stream s) {
  static auto& known = *new std::map<int, std::shared_ptr<mx::Primitive>>;
  std::lock_guard guard(lock);
  auto& primitive = known[s.index];
  if (!primitive)
    primitive = mx::fast::precompiled_cuda_kernel("segtrain_nothing",
                                                  ".version 7.0\n.target sm_80\n.address_size 64\n"
                                                  ".visible .entry segtrain_nothing() { ret; }\n",
                                                  {}, {{1}}, {mx::float32}, {}, {1, 1, 1}, {1, 1, 1}, 0,
                                                  std::nullopt, false, s)[0]
                    .primitive_ptr();
  return primitive;
}

class CudnnOp : public mx::Primitive {
 public:
  CudnnOp(mx::Stream s, const Problem& problem, const Plan& plan, float scale, std::vector<Uid> uids)
      : Primitive(s),
        problem_(problem),
        plan_(plan),
        scale_(scale),
        uids_(std::move(uids)),
        allocation_(allocation(s)) {}

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error("[attention] cuDNN does not run on the CPU.");
  }

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cu::get_command_encoder(stream());
    encoder.device().make_current();
    Arrays fresh = outputs;
    void* workspace = nullptr;
    if (plan_.workspace) fresh.push_back(scratch(plan_.workspace));
    allocation_->eval_gpu({}, fresh);
    if (plan_.workspace) {
      workspace = mx::gpu_ptr<void>(fresh.back());
      encoder.add_temporary(fresh.back());
      encoder.set_output_array(fresh.back());
    }
    for (const auto& x : inputs) encoder.set_input_array(x);
    for (const auto& y : outputs) encoder.set_output_array(y);

    std::lock_guard guard(lock);
    auto handle = handle_of(encoder.device());
    mx::cu::CommandEncoder::CaptureContext capture(encoder);
    capture.discard = true;  // discards the graph if an exception is thrown before the capture is complete
    check_cudnn(cudnn_function<decltype(cudnnSetStream)>("cudnnSetStream")(handle, encoder.stream()));
    std::unordered_map<int64_t, void*> pointers{{SCALE, &scale_}};
    auto uid = uids_.begin();
    for (const auto& x : inputs) pointers[*uid++] = mx::gpu_ptr<void>(x);
    for (const auto& y : outputs) pointers[*uid++] = mx::gpu_ptr<void>(y);
    check_cudnn(plan_.graph->execute(handle, pointers, workspace));
    capture.discard = false;
  }

  const char* name() const override { return problem_.backward ? "CudnnAttentionVJP" : "CudnnAttention"; }

 private:
  /// Allocates scratch memory as an array with 8-byte elements. The sizes in a shape are ints, so an array of
  /// single bytes would be limited to 2 GiB.
  static mx::array scratch(int64_t bytes) {
    return mx::array({static_cast<int>((bytes + 7) / 8)}, mx::uint64, nullptr, {});
  }

  Problem problem_;
  const Plan& plan_;
  float scale_;
  std::vector<Uid> uids_;  ///< identifiers of the inputs, then of the outputs
  std::shared_ptr<mx::Primitive> allocation_;
};

mx::cu::Device& device_of(const Call& c) {
  return mx::cu::device(mx::to_stream(c.s).device);
}

/// Returns the segments of a row, each as [begin, end).
Ranges segments_of(const Call& c) {
  Ranges ranges;
  for (int t = 0; t < c.T; ++t) {
    if (c.first[t] > t) continue;
    if (ranges.empty() || ranges.back().first != c.first[t]) ranges.push_back({c.first[t], t});
    ranges.back().second = t + 1;
  }
  return ranges;
}

/// Rounds a size up to a power of two. Building a plan takes a second. A plan works for all smaller sizes, so
/// with rounded sizes, a run with packed rows needs only a few plans.
int round_up(int n, int least) {
  int power = least;
  while (power < n) power *= 2;
  return power;
}

Problem problem_of(const Call& c, bool backward) {
  Problem p{device_of(c).cuda_device(), c.dtype.val(), c.B, c.H, c.G, c.T, c.D, c.Dv, 0, c.T, backward};
  if (c.causal_only) return p;
  auto ranges = segments_of(c);
  int longest = 1;
  for (auto [begin, end] : ranges) longest = std::max(longest, end - begin);
  p.segments = round_up(std::max(1, c.B * static_cast<int>(ranges.size())), 1);
  p.longest = round_up(longest, 128);
  return p;
}

std::string unfit(const Call& c) {
  if (auto any = cudnn_call_unfit(c); !any.empty()) return any;
  if (!c.causal_only) {
    auto p = problem_of(c, false);
    if (int64_t{p.segments} * p.longest > std::max(int64_t{4096}, 2 * int64_t{c.B} * c.T))
      return "its workspace would reserve the longest segment's length for every segment";
    if (int64_t{c.B} * c.H * c.T * std::max(c.D, c.Dv) > INT32_MAX)
      return "it supports packed segments in arrays of up to 2³¹ − 1 elements";
  }
  if (cudnn_function<decltype(cudnnGetVersion)>("cudnnGetVersion")() < CUDNN_MIN)
    return "it needs cuDNN 9.16 or newer";
  for (bool backward : {false, true}) {
    const auto& plan = plan_of(problem_of(c, backward), device_of(c));
    if (!plan.error.empty()) return "cuDNN cannot build a plan for it: " + plan.error;
  }
  return "";
}

/// Returns the arrays that describe packed segments to cuDNN, in the order LENGTHS … AT_O.
Arrays packing(const Call& c, const Problem& p) {
  const auto ranges = segments_of(c);
  std::vector<int32_t> lengths;
  for (int row = 0; row < c.B; ++row)
    for (auto [begin, end] : ranges) lengths.push_back(end - begin);
  lengths.resize(p.segments, 0);
  Arrays arrays{device_ints(lengths)};
  for (auto [heads, width] : {std::pair{c.H, c.D}, {c.G, c.D}, {c.G, c.Dv}, {c.H, c.Dv}}) {
    std::vector<int32_t> at;
    for (int row = 0; row < c.B; ++row)
      for (auto [begin, end] : ranges) at.push_back((row * heads * c.T + begin) * width);
    at.resize(p.segments + 1, 0);
    arrays.push_back(device_ints(at));
  }
  return arrays;
}

Arrays op(const Call& c, bool backward, const Arrays& inputs, std::vector<Uid> uids,
          std::vector<mx::Shape> shapes, const std::vector<mx::Dtype>& dtypes) {
  auto problem = problem_of(c, backward);
  const auto& plan = plan_of(problem, device_of(c));
  check(plan.error.empty(), "[attention] cuDNN cannot build a plan for this call: ", plan.error);
  Arrays rows;
  for (const auto& x : inputs) rows.push_back(mx::contiguous(x, false, c.s));
  if (problem.segments) {
    const std::vector<Uid> more{LENGTHS, AT_Q, AT_K, AT_V, AT_O};
    uids.insert(uids.begin() + inputs.size(), more.begin(), more.end());
    for (auto& x : packing(c, problem)) rows.push_back(x);
  }
  auto stream = mx::to_stream(c.s);
  auto ys = mx::array::make_arrays(std::move(shapes), dtypes,
                                   std::make_shared<CudnnOp>(stream, problem, plan, c.scale, uids), rows);
  // cuDNN does not write to positions outside all segments, so we set these positions to 0 ourselves.
  std::vector<int32_t> seen;
  for (int t = 0; t < c.T; ++t) seen.push_back(c.first[t] <= t);
  if (std::find(seen.begin(), seen.end(), 0) != seen.end()) {
    auto mask = mx::reshape(device_ints(seen), {c.T, 1}, c.s);
    for (auto& y : ys)
      if (y.ndim() == 4) y = mx::where(mx::astype(mask, mx::bool_, c.s), y, mx::array(0, y.dtype()), c.s);
  }
  return ys;
}

Arrays forward(const Call& c, const Arrays& x) {
  auto p = problem_of(c, false);
  return op(c, false, x, {Q, K, V, O, LSE},
            {{c.B, c.H, c.T, c.Dv}, {p.segments ? p.segments : c.B, c.H, p.longest}}, {c.dtype, mx::float32});
}

Arrays vjp(const Call& c, const Arrays& x, const mx::array& d_o, const mx::array& o, const mx::array& lse) {
  return op(c, true, {x[0], x[1], x[2], o, lse, mx::astype(d_o, c.dtype, c.s)},
            {Q, K, V, O, LSE, D_O, D_Q, D_K, D_V},
            {{c.B, c.H, c.T, c.D}, {c.B, c.G, c.S, c.D}, {c.B, c.G, c.S, c.Dv}}, {c.dtype, c.dtype, c.dtype});
}

}  // namespace

}  // namespace segtrain

__attribute__((visibility("default"))) const segtrain::CudnnAttention* segtrain_cudnn_attention(
    segtrain::DeviceInts* device_ints) {
  using namespace segtrain;
  static const CudnnAttention attention{unfit, {forward, vjp}};
  segtrain::device_ints = device_ints;
  fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);  // libmlx.so has loaded it
  return fe::cudnn_dlhandle ? &attention : nullptr;
}
