// The whole C++ surface of mlx_segtrain on one screen. Ops are functions of arrays; each has a hand-written
// VJP.
//
// B batch · H query heads · G key/value heads · T queries · S keys · D head size · F feed-forward width
// M rows · R LoRA rank · V vocabulary. Gradients are called dx; `lse` is a row's log-sum-exp.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "schedule/plan.h"

namespace segtrain {

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;
using Ranges = std::vector<std::pair<int, int>>;  ///< [begin, end) each

/// A frozen weight [out, in]: dense (scales absent) or quantized as mx::quantize writes it.
struct Base {
  mx::array weight;
  std::optional<mx::array> scales;
  std::optional<mx::array> biases;
  std::optional<mx::array> bias;  ///< [out], added to the product
  int group_size = 0;
  int bits = 0;
  std::string mode = "affine";

  int out() const;
  int in() const;
};

/// A frozen linear and its low-rank update: y = x·Wᵀ (+ bias) + scale·(x·a)·b. a [in, R], b [R, out] float32,
/// both or neither.
struct Linear {
  Base base;
  std::optional<mx::array> a, b;
  float scale = 1;

  Linear with_factors(const mx::array& a, const mx::array& b) const { return {base, a, b, scale}; }
};

/// Linear layers that read the same few rows in a step of generation, each with the updates of several
/// adapters, of which each row has one: y_j = (x·W_jᵀ + z_j·b_jᵀ)·gain_j + bias_j, z = x·aᵀ. Made once for
/// many calls. Has no gradient.
class DecodeLinears {
 public:
  /// a [E, R, in]: below one another those of all linears, as b [E, out, R_j] has ranks; gains [E, out]
  /// float32.
  DecodeLinears(std::vector<Base> bases, std::optional<mx::array> a, std::vector<std::optional<mx::array>> b,
                std::vector<std::optional<mx::array>> gains);

  /// x [..., in] → [..., out] of each linear. picks [rows] uint32: the adapter of each row.
  Arrays operator()(const mx::array& x, const mx::array& picks, const std::string& impl,
                    mx::StreamOrDevice s);

  /// Why no kernel serves rows of this type; empty if one does.
  std::string unfit(mx::Dtype dtype, int rows) const;

 private:
  struct Calls;
  Arrays plain(const mx::array& x, const mx::array& picks, mx::StreamOrDevice s) const;
  std::shared_ptr<const Calls> calls(mx::Dtype dtype, int rows);

  std::vector<Base> bases_;
  std::optional<mx::array> a_;
  std::vector<std::optional<mx::array>> b_, gains_;
  std::map<std::pair<int, int>, std::shared_ptr<Calls>> calls_;  ///< by dtype and most rows
};

/// Query t stands at position q_start + t (default S − T). It sees keys up to itself, of the last `window`
/// ones, and of its own segment, one of the rising `segments`. A position in none of them is padding: it sees
/// nothing, is seen by nothing, and gets zeros.
struct AttentionOptions {
  float scale;
  std::optional<int> window;
  std::optional<Ranges> segments;
  std::optional<float> softcap;
  std::optional<int> q_start;
};

/// softmax(scale·q·kᵀ)·v over the keys a query may see, without an array of T × S.
/// q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → [B,H,T,Dv].
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v,
                    const AttentionOptions& options, const std::optional<Arrays>& saved,
                    const std::string& impl, mx::StreamOrDevice s);

/// {o, and what else the backward pass needs}: `saved` for attention of the same arguments, which then runs
/// its backward pass only. Empty where the implementation that serves them does not give it (`stock`). Has no
/// gradient itself.
Arrays attention_forward(const mx::array& q, const mx::array& k, const mx::array& v,
                         const AttentionOptions& options, const std::string& impl, mx::StreamOrDevice s);

/// The implementations of attention that the default device has, whether or not they serve a given call.
std::vector<std::string> attention_impls();

/// On Metal 'auto' takes `way` from now on where it serves calls with such heads that are plain causal ones,
/// or are not. Empty: the order that is built in.
void prefer_attention(int head, mx::Dtype dtype, bool causal, const std::string& way);

/// Whether 'auto' takes only what gives the same bits again; returns what was set before. On CUDA those of
/// cuDNN, MLX's own among them, add dq up in any order.
bool set_repeatable(bool on);

/// What set_repeatable set last.
bool is_repeatable();

/// The implementation that 'auto' takes for plain causal attention of many tokens on a device ("cpu",
/// "metal", "cuda") that need not be here: with `cudnn` as the package may have it on CUDA, `nax` as Metal
/// may have it, and repeatable as `repeats` says.
std::string attention_way(const std::string& device, int head, mx::Dtype dtype, bool cudnn, bool nax,
                          bool repeats);

/// Does MLX on this machine's GPU have attention kernels for neural accelerators (M5)?
bool has_neural_accelerators();

/// silu(gate)·up. [..., F] → [..., F].
mx::array swiglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s);

/// gelu(gate)·up with the tanh form of GELU. [..., F] → [..., F].
mx::array geglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s);

/// x / sqrt(mean(x²) + eps) · weight. x [..., H], weight [H] (frozen: no gradient) → [..., H].
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, const std::string& impl,
                   mx::StreamOrDevice s);

/// h, and its norm: the gradients of both are added in the norm's backward pass. h [..., H].
Arrays rms_norm_beside(const mx::array& h, const mx::array& weight, float eps, const std::string& impl,
                       mx::StreamOrDevice s);

/// (h + norm of x)·factor, one number that is frozen, if there is one. h, x [..., H] → [..., H].
mx::array add_rms_norm(const mx::array& h, const mx::array& x, const mx::array& weight, float eps,
                       const std::optional<mx::array>& factor, const std::string& impl, mx::StreamOrDevice s);

/// Rotary embedding of x [B, H, T, D] at positions offset + t, counted from the begin of their segment if
/// there are any; angles = position · base^(−2i/D) or position / freqs.
mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               int offset, const std::optional<mx::array>& freqs, const std::optional<Ranges>& segments,
               const std::string& impl, mx::StreamOrDevice s);

/// x[index]: x [N, ...], index [...] → [..., ...].
mx::array take_rows(const mx::array& x, const mx::array& index, const std::string& impl,
                    mx::StreamOrDevice s);

/// Columns [begin, end) of the rows of a frozen table [V, ·] that index [...] names, times factor → [..., end
/// − begin]. No gradient.
mx::array embedded_rows(const Base& table, const mx::array& index, int begin, std::optional<int> end,
                        float factor, const std::string& impl, mx::StreamOrDevice s);

/// (norm of x·f0 + rows·f1)·f2 with a table's rows from column `begin` on: the own input of a layer of
/// Gemma 4. x [..., D] → [..., D]. No gradient.
mx::array own_input(const mx::array& x, const mx::array& weight, float eps, const Base& table,
                    const mx::array& index, int begin, const std::vector<float>& factors,
                    const std::string& impl, mx::StreamOrDevice s);

/// What makes q and k of heads: an RMS norm of each head if it has one, and rotation as by `rope`.
struct HeadNorm {
  mx::array weight;  ///< [D], frozen
  float eps;
};
struct Heads {
  int heads, groups;  ///< of q; of k and of v
  int dims;           ///< that rotate
  bool traditional = false;
  std::optional<float> base;
  float scale = 1;
  int offset = 0;
  std::optional<mx::array> freqs;
  std::optional<Ranges> segments;
  std::vector<std::optional<HeadNorm>> norms;  ///< of q, k and v; or none
};

/// q and k, normed and rotated, and v, normed, of linears that read the same x [B, T, ·] → [B, H, T, D], [B,
/// G, T, D] and alike. Of two linears the second gives both keys and values, of one there is q alone.
Arrays lora_qkv(const mx::array& x, const std::vector<Linear>& linears, const Heads& heads,
                const std::string& impl, mx::StreamOrDevice s);

/// o [B, H, T, D] → [B, T, H·D], as an output projection reads it.
mx::array merge_heads(const mx::array& o, mx::StreamOrDevice s);

/// y of linears that read the same x [..., in] → [..., out] each, keeping x and x·a. Dropout p of x on a
/// low-rank branch is drawn from the linear's key [2] uint32, again in the backward pass.
Arrays lora_linears(const mx::array& x, const std::vector<Linear>& linears, float dropout, const Arrays& keys,
                    const std::string& impl, mx::StreamOrDevice s);

/// down(act(gate(x))·up(x)) with act GELU's tanh form or SiLU. x [..., H] → [..., H]. Keeps x, gate and up;
/// with `tile_rows` only x: that many rows at a time are computed, and again in the backward pass.
mx::array lora_glu_mlp(const mx::array& x, const Linear& gate, const Linear& up, const Linear& down,
                       bool gelu, std::optional<int> tile_rows, const std::string& impl,
                       mx::StreamOrDevice s);

/// Σ weights·(lse(z) − (1 − ε)·z[target] − ε·mean(z)) with z = h·Wᵀ + bias, softcapped, and ε the label
/// smoothing; rows with target < 0 count nothing, and there are none unless the targets are `padded`. h [M,
/// H], targets [M] int32, weights [M] float32 → [] float32. dh is formed in the same pass, over chunks of
/// rows.
mx::array linear_cross_entropy(const mx::array& h, const Base& head, const mx::array& targets,
                               const std::optional<mx::array>& weights, std::optional<float> softcap,
                               float label_smoothing, bool needs_grad, bool padded, const std::string& impl,
                               mx::StreamOrDevice s);

/// z[target] − lse(z) for each row, z as above, keeping h and lse; 0 where target < 0, and such rows are not
/// touched. h [M, H], targets [M] int32 → [M] float32.
mx::array linear_log_probs(const mx::array& h, const Base& head, const mx::array& targets,
                           std::optional<float> softcap, bool needs_grad, bool padded,
                           const std::string& impl, mx::StreamOrDevice s);

/// A quantized weight as an array [out, in] of `dtype`.
mx::array dequantize(const Base& base, mx::Dtype dtype, mx::StreamOrDevice s);

/// The numbers of arrays one behind the other, as a float32 vector.
mx::array join(const Arrays& arrays, mx::StreamOrDevice s);

/// Row-major product a·b with optional transposes of the last two axes; through OpenBLAS or Accelerate on the
/// CPU.
mx::array matmul(const mx::array& a, const mx::array& b, bool transpose_a, bool transpose_b, float alpha,
                 mx::StreamOrDevice s);

/// (params, reads) → writes. One that saves returns, if it is to `save`, something behind its writes that it
/// is given again as `saved` when it is run once more.
using StageFn =
    std::function<Arrays(const Arrays& params, const Arrays& reads, const Arrays& saved, bool save)>;

/// (params, reads) → {loss, anything else...}.
using HeadFn = std::function<Arrays(const Arrays& params, const Arrays& reads)>;

/// Waits for arrays that are being computed, maybe none, with whatever the caller wants around it; throws if
/// the step is to end there.
using Wait = std::function<void(const Arrays&)>;

/// Gives arrays to the device, with whatever the caller wants around it.
using Launch = std::function<void(const Arrays&)>;

/// Called when a move is through; may be empty.
using Watch = std::function<void()>;

class Recordings;

struct StepResult {
  Arrays outputs;             ///< of the head, loss first
  std::vector<Arrays> grads;  ///< per owner, in the order of its params
  Arrays head_grads;
  Arrays incoming;  ///< cotangents of the inputs that have one, in their order
};

/// A plan that is to run, in two calls. `forward` gives what the head reads, `backward` the result. Without a
/// head, whose place stages on another device take, `backward` is given the cotangents of the differentiable
/// ones of these values; until then only what the plan keeps is there.
struct Passes {
  std::function<Arrays()> forward;
  std::function<StepResult(const Arrays& cotangents)> backward;
};

/// Loss and gradients of every parameter, with only the plan's boundary values kept in between.
/// Stage i has the parameters `params[owners[i]]`; the gradients of stages that share an owner are added.
/// `reads` of a stage arrive in the order of its spec. One move runs at a time (on CUDA up to two), and the
/// next is prepared meanwhile. With `recordings`, those of the steps before with the same functions, a
/// function whose calls were alike is not called again: its graph is made from them.
Passes passes_of(const Plan& plan, const std::vector<StageFn>& fns, const std::optional<HeadFn>& head,
                 const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
                 const Arrays& inputs, const Wait& wait, const Launch& launch, const Watch& watch,
                 Recordings* recordings = nullptr);

}  // namespace segtrain
