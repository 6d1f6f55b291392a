// The C++ interface of mlx_segtrain. Ops are functions of arrays, each with a hand-written VJP.
//
// B batch · H query heads · G key/value heads · T queries · S keys · D head size · F feed-forward width · M
// rows · R LoRA rank · V vocabulary size. dx is the gradient with respect to x; `lse` is the log-sum-exp of a
// row.
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
using Ranges = std::vector<std::pair<int, int>>;  ///< each range is [begin, end)

/// A frozen weight [out, in]. It is dense if there are no scales; otherwise it is quantized in the format of
/// mx::quantize.
struct Base {
  mx::array weight;
  std::optional<mx::array> scales;
  std::optional<mx::array> biases;
  std::optional<mx::array> bias;  ///< [out], added to x·Wᵀ
  int group_size = 0;
  int bits = 0;
  std::string mode = "affine";

  int out() const;
  int in() const;
};

/// A frozen linear layer and its low-rank update: y = x·Wᵀ (+ bias) + scale·(x·a)·b. a [in, R] and b [R, out]
/// are float32, and either both or neither are given.
struct Linear {
  Base base;
  std::optional<mx::array> a, b;
  float scale = 1;

  Linear with_factors(const mx::array& a, const mx::array& b) const { return {base, a, b, scale}; }
};

/// Linear layers that read the same few rows in a decoding step. Each layer has the low-rank updates of
/// several adapters, and each row selects one adapter: y_j = (x·W_jᵀ + z_j·b_jᵀ)·gain_j + bias_j, where z =
/// x·aᵀ. An object is created once and called many times. Its output has no gradient.
class DecodeLinears {
 public:
  /// For E adapters, `a` [E, R, in] stacks the first factors of all layers, b_j is [E, out, R_j] with Σ R_j =
  /// R, and the gains are [E, out] float32.
  DecodeLinears(std::vector<Base> bases, std::optional<mx::array> a, std::vector<std::optional<mx::array>> b,
                std::vector<std::optional<mx::array>> gains);

  /// x [..., in] → [..., out] for each layer. picks [rows] uint32 contains the adapter's index for each row.
  Arrays operator()(const mx::array& x, const mx::array& picks, const std::string& impl,
                    mx::StreamOrDevice s);

  /// Returns why no kernel supports `rows` rows of `dtype`, or an empty string if a kernel does.
  std::string unfit(mx::Dtype dtype, int rows) const;

 private:
  struct Calls;
  Arrays plain(const mx::array& x, const mx::array& picks, mx::StreamOrDevice s) const;
  std::shared_ptr<const Calls> calls(mx::Dtype dtype, int rows);

  std::vector<Base> bases_;
  std::optional<mx::array> a_;
  std::vector<std::optional<mx::array>> b_, gains_;
  std::map<std::pair<int, int>, std::shared_ptr<Calls>> calls_;  ///< by dtype and number of rows
};

/// Query t is at position q_start + t (q_start is S − T by default). It attends to the keys up to its own
/// position. With `window`, it attends only to the last `window` of these keys; with `segments` (in ascending
/// order), only to the keys in its own segment. A position outside all segments is padding: its query attends
/// to no key, no query attends to its key, and its output is 0.
struct AttentionOptions {
  float scale;
  std::optional<int> window;
  std::optional<Ranges> segments;
  std::optional<float> softcap;
  std::optional<int> q_start;
};

/// softmax(scale·q·kᵀ)·v over the keys to which each query attends, without materializing a T × S array.
/// q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → [B,H,T,Dv].
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v,
                    const AttentionOptions& options, const std::optional<Arrays>& saved,
                    const std::string& impl, mx::StreamOrDevice s);

/// Returns o, followed by the arrays that the backward pass needs. If the result is passed as `saved` to
/// attention() with the same arguments, attention() computes only the backward pass. The result is empty if
/// the implementation (`stock`) cannot provide these arrays. This function has no gradient.
Arrays attention_forward(const mx::array& q, const mx::array& k, const mx::array& v,
                         const AttentionOptions& options, const std::string& impl, mx::StreamOrDevice s);

/// Returns the names of the attention implementations for the default device. Some of them may not support a
/// given call.
std::vector<std::string> attention_impls();

/// Makes 'auto' prefer the implementation `way` on Metal for calls with this head size, dtype and kind (plain
/// causal or not), if `way` supports the call. An empty `way` restores the built-in order.
void prefer_attention(int head, mx::Dtype dtype, bool causal, const std::string& way);

/// Sets whether 'auto' is limited to implementations whose results are bit-identical when a call is repeated,
/// and returns the previous setting. On CUDA, implementations that use cuDNN, including MLX's, sum dq in an
/// unspecified order.
bool set_repeatable(bool on);

/// Returns the value that was last passed to set_repeatable.
bool is_repeatable();

/// Whether this machine's CPU has the instructions (AVX512-BF16) for set_bfloat16_products.
bool has_bfloat16_products();

/// Sets whether products of activations or gradients with frozen weights, in ops that are created from now
/// on, round their factors to bfloat16 on a CPU; sums are float32. Returns the previous setting. Throws
/// std::invalid_argument if the CPU does not have the instructions.
bool set_bfloat16_products(bool on);

/// Returns the value that was last passed to set_bfloat16_products.
bool is_bfloat16_products();

/// Returns the implementation that 'auto' chooses for plain causal attention over many tokens on a device
/// ("cpu", "metal" or "cuda"). The device need not be in this machine. `cudnn` says whether the package
/// includes cuDNN's attention (CUDA), and `nax` whether the GPU has neural accelerators (Metal); `repeats` is
/// the setting of set_repeatable.
std::string attention_way(const std::string& device, int head, mx::Dtype dtype, bool cudnn, bool nax,
                          bool repeats);

/// Whether this machine's GPU has neural accelerators (M5) for which MLX has attention kernels.
bool has_neural_accelerators();

/// silu(gate)·up. [..., F] → [..., F].
mx::array swiglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s);

/// gelu(gate)·up with the tanh approximation of GELU. [..., F] → [..., F].
mx::array geglu(const mx::array& gate, const mx::array& up, const std::string& impl, mx::StreamOrDevice s);

/// x / sqrt(mean(x²) + eps) · weight. x [..., H], weight [H] (frozen: no gradient) → [..., H].
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, const std::string& impl,
                   mx::StreamOrDevice s);

/// Returns h and rms_norm(h). The norm's backward pass also adds the gradient of the output h. h [..., H].
Arrays rms_norm_beside(const mx::array& h, const mx::array& weight, float eps, const std::string& impl,
                       mx::StreamOrDevice s);

/// (h + rms_norm(x))·factor; the factor is an optional frozen scalar. h, x [..., H] → [..., H].
mx::array add_rms_norm(const mx::array& h, const mx::array& x, const mx::array& weight, float eps,
                       const std::optional<mx::array>& factor, const std::string& impl, mx::StreamOrDevice s);

/// Applies rotary embeddings to x [B, H, T, D] at positions offset + t; positions restart in each segment.
/// The angles are scale · position · base^(−2i/dims), or scale · position / freqs if `freqs` is given.
mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               int offset, const std::optional<mx::array>& freqs, const std::optional<Ranges>& segments,
               const std::string& impl, mx::StreamOrDevice s);

/// x[index]: x [N, ...], index [...] → [..., ...].
mx::array take_rows(const mx::array& x, const mx::array& index, const std::string& impl,
                    mx::StreamOrDevice s);

/// factor · table[index, begin:end] for a frozen table [V, ·] and index [...] → [..., end − begin]. The
/// result has no gradient.
mx::array embedded_rows(const Base& table, const mx::array& index, int begin, std::optional<int> end,
                        float factor, const std::string& impl, mx::StreamOrDevice s);

/// (rms_norm(x·f0) + rows·f1)·f2, where `rows` are D columns of the table's rows at `index`, starting at
/// column `begin`. This is the per-layer input of Gemma 4. x [..., D] → [..., D]. The result has no gradient.
mx::array own_input(const mx::array& x, const mx::array& weight, float eps, const Base& table,
                    const mx::array& index, int begin, const std::vector<float>& factors,
                    const std::string& impl, mx::StreamOrDevice s);

/// The norm of q, k or v, which is applied to each head before the rotation of q and k.
struct HeadNorm {
  mx::array weight;  ///< [D], frozen
  float eps;
};
struct Heads {
  int heads, groups;  ///< query heads; key/value heads
  int dims;           ///< number of dimensions that are rotated
  bool traditional = false;
  std::optional<float> base;
  float scale = 1;
  int offset = 0;
  std::optional<mx::array> freqs;
  std::optional<Ranges> segments;
  std::vector<std::optional<HeadNorm>> norms;  ///< the norms of q, k and v, or empty
};

/// Computes q, k and v with linear layers that read the same x. x [B, T, ·] → [B, H, T, D], [B, G, T, D], [B,
/// G, T, D]. Each of the three is normalized if it has a norm; q and k are rotated. With two layers, the
/// second one computes both k and v; with one layer, only q is returned.
Arrays lora_qkv(const mx::array& x, const std::vector<Linear>& linears, const Heads& heads,
                const std::string& impl, mx::StreamOrDevice s);

/// o [B, H, T, D] → [B, T, H·D], the layout that the output projection reads.
mx::array merge_heads(const mx::array& o, mx::StreamOrDevice s);

/// Returns the outputs of linear layers that read the same x. x [..., in] → [..., out] for each layer. Keeps
/// x and x·a for the backward pass. Dropout applies only to the input of the low-rank branches; each layer
/// draws its mask from its key [2] uint32, and draws the same mask again in the backward pass.
Arrays lora_linears(const mx::array& x, const std::vector<Linear>& linears, float dropout, const Arrays& keys,
                    const std::string& impl, mx::StreamOrDevice s);

/// down(act(gate(x))·up(x)), where act is SiLU or the tanh approximation of GELU. x [..., H] → [..., H].
/// Keeps x and the outputs of gate and up for the backward pass. With `tile_rows`, keeps only x: that many
/// rows are computed at a time, and recomputed in the backward pass.
mx::array lora_glu_mlp(const mx::array& x, const Linear& gate, const Linear& up, const Linear& down,
                       bool gelu, std::optional<int> tile_rows, const std::string& impl,
                       mx::StreamOrDevice s);

/// Σ weights·(lse(z) − (1 − ε)·z[target] − ε·mean(z)), where z is h·Wᵀ + bias after the softcap, and ε is the
/// label smoothing. Rows with target < 0 do not contribute; such rows are allowed only if `padded` is set. h
/// [M, H], targets [M] int32, weights [M] float32 → [] float32. dh is computed in the same pass, in chunks of
/// rows.
mx::array linear_cross_entropy(const mx::array& h, const Base& head, const mx::array& targets,
                               const std::optional<mx::array>& weights, std::optional<float> softcap,
                               float label_smoothing, bool needs_grad, bool padded, const std::string& impl,
                               mx::StreamOrDevice s);

/// z[target] − lse(z) for each row, with z as in linear_cross_entropy. Keeps h and lse for the backward pass.
/// Rows with target < 0 are skipped, and their result is 0. h [M, H], targets [M] int32 → [M] float32.
mx::array linear_log_probs(const mx::array& h, const Base& head, const mx::array& targets,
                           std::optional<float> softcap, bool needs_grad, bool padded,
                           const std::string& impl, mx::StreamOrDevice s);

/// Returns a weight as a dense array [out, in] of `dtype`.
mx::array dequantize(const Base& base, mx::Dtype dtype, mx::StreamOrDevice s);

/// Returns the elements of all arrays, concatenated into one float32 vector.
mx::array join(const Arrays& arrays, mx::StreamOrDevice s);

/// Returns the row-major matrix product alpha·a·b. The last two axes of a and b are optionally transposed.
/// The CPU implementation uses OpenBLAS or Accelerate.
mx::array matmul(const mx::array& a, const mx::array& b, bool transpose_a, bool transpose_b, float alpha,
                 mx::StreamOrDevice s);

/// (params, reads) → writes. If `save` is set, a stage that can save arrays returns them after its writes.
/// They are passed back as `saved` when the stage is run again.
using StageFn =
    std::function<Arrays(const Arrays& params, const Arrays& reads, const Arrays& saved, bool save)>;

/// (params, reads) → {loss, other outputs...}.
using HeadFn = std::function<Arrays(const Arrays& params, const Arrays& reads)>;

/// Waits for arrays that are being computed (possibly none). The caller provides this function, which may
/// also do other work, such as releasing a lock. If it throws an exception, the step ends.
using Wait = std::function<void(const Arrays&)>;

/// Launches the evaluation of arrays. The caller provides this function, which may also do other work.
using Launch = std::function<void(const Arrays&)>;

/// Called after each move; may be empty.
using Watch = std::function<void()>;

class Recordings;

struct StepResult {
  Arrays outputs;             ///< the outputs of the head, loss first
  std::vector<Arrays> grads;  ///< for each owner, the gradients of its parameters, in order
  Arrays head_grads;
  Arrays incoming;  ///< cotangents of the inputs that have one, in input order
};

/// Runs a plan in two calls: `forward` returns the values that the head reads, and `backward` returns the
/// result. If the chain continues on another device, this device has no head, and `backward` is called with
/// the cotangents of the differentiable values that `forward` returned. Between the two calls, memory
/// contains only what the plan keeps.
struct Passes {
  std::function<Arrays()> forward;
  std::function<StepResult(const Arrays& cotangents)> backward;
};

/// Returns two passes that compute the loss and the gradients of all parameters, and that keep only the
/// plan's boundary values between moves. Stage i has the parameters `params[owners[i]]`; if stages share an
/// owner, their gradients are added. A stage is called with its `reads` in the order of its spec. While one
/// move runs (on CUDA, up to two moves), the host prepares the next move. `recordings` contains graphs from
/// earlier steps with the same functions: once several calls of a function have built equal graphs, the
/// function is no longer called, and its graph is rebuilt from the recording.
Passes passes_of(const Plan& plan, const std::vector<StageFn>& fns, const std::optional<HeadFn>& head,
                 const std::vector<Arrays>& params, const std::vector<int>& owners, const Arrays& head_params,
                 const Arrays& inputs, const Wait& wait, const Launch& launch, const Watch& watch,
                 Recordings* recordings = nullptr);

}  // namespace segtrain
