// Code that is common to the implementations of attention. For the derivation and the cost, see
// docs/attention.md.
#pragma once

#include "core/cost.h"

namespace segtrain {

/// The parameters of an attention call, without its arrays.
struct Call {
  int B, H, G, T, S, D, Dv, q_start = 0;
  float scale, cap = 0;      ///< 0 means no softcap
  bool causal_only = false;  ///< every query sees all keys up to itself, T = S, and there is no cap
  int window = 0;            ///< 0 means no window
  /// [T], non-decreasing: the first key that each query sees, or the query's position + 1 if it sees no key.
  /// The last key that a query sees is at its own position.
  std::vector<int32_t> first = {};
  mx::Dtype dtype;
  mx::StreamOrDevice s = {};
  Gpu device;        ///< Gpu::none means the CPU
  bool nax = false;  ///< MLX has kernels for this GPU's neural accelerators; used only for D = 512

  int share() const { return H / G; }
};

/// An implementation of attention. `forward` maps (q, k, v) to {o, lse}, and `vjp` maps (q, k, v), do, o and
/// lse to {dq, dk, dv} in any floating dtype.
struct AttentionWay {
  Arrays (*forward)(const Call&, const Arrays& qkv);
  Arrays (*vjp)(const Call&, const Arrays& qkv, const mx::array& d_o, const mx::array& o,
                const mx::array& lse);
};

extern const AttentionWay cpu_attention, gpu_attention, hopper_attention, blocked_attention;

/// Returns the memory that the CPU implementation needs for a call.
OpCost cpu_attention_cost(const Call& c);

/// Returns why the GPU kernel does not support a call, or an empty string if it does.
std::string gpu_attention_unfit(const Call& c);
std::string hopper_attention_unfit(const Call& c);

/// Return whether the Hopper kernels that never write scores to device memory support a call that
/// hopper_attention supports.
bool fused_forward_fits(const Call& c);
bool fused_vjp_fits(const Call& c);
Arrays fused_forward(const Call& c, const Arrays& qkv);
Arrays fused_vjp(const Call& c, const Arrays& qkv, const mx::array& d_o, const mx::array& o,
                 const mx::array& lse);
/// Returns the bytes of scratch memory that fused_vjp needs in addition to its inputs and outputs.
int64_t fused_vjp_scratch(const Call& c);

/// Sums over the query heads of each group: [B,H,S,d] → [B,G,S,d].
mx::array sum_share(const mx::array& x, const Call& c);

/// Returns `sum` [B,G,S,d] after adding `part` [B,G,n,d] to its rows [begin, begin + n).
mx::array add_rows(const mx::array& sum, const mx::array& part, int begin, mx::StreamOrDevice s);

/// Returns delta, the sum of o·do over each row. [B,H,T,Dv] → [B,H,T] float32.
mx::array row_delta(const Call& c, const mx::array& o, const mx::array& d_o);

}  // namespace segtrain
