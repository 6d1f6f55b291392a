// Code shared by the implementations of attention. Derivation and cost: docs/attention.md.
#pragma once

#include "core/cost.h"

namespace segtrain {

/// Everything that describes a call except the arrays.
struct Call {
  int B, H, G, T, S, D, Dv, q_start = 0;
  float scale, cap = 0;             ///< cap 0: none
  bool causal_only = false;         ///< every query sees all keys up to itself, T = S, and there is no cap
  int window = 0;                   ///< 0: none
  std::vector<int32_t> first = {};  ///< [T], non-decreasing: the first key that each query sees (the last is
                                    ///< its own position), or its position + 1 if it sees none
  mx::Dtype dtype;
  mx::StreamOrDevice s = {};
  Gpu device;        ///< Gpu::none is the CPU
  bool nax = false;  ///< MLX has kernels for this GPU's neural accelerators; set only where it matters

  int share() const { return H / G; }
};

/// An implementation: (q, k, v) → {o, lse}, and (q, k, v), do, o, lse → {dq, dk, dv} in any floating dtype.
struct AttentionWay {
  Arrays (*forward)(const Call&, const Arrays& qkv);
  Arrays (*vjp)(const Call&, const Arrays& qkv, const mx::array& d_o, const mx::array& o,
                const mx::array& lse);
};

extern const AttentionWay cpu_attention, gpu_attention, hopper_attention, blocked_attention;

/// The memory that cpu_attention needs.
OpCost cpu_attention_cost(const Call& c);

/// Why the GPU kernel does not support a call; empty if it does.
std::string gpu_attention_unfit(const Call& c);
std::string hopper_attention_unfit(const Call& c);

/// The kernels for Hopper that keep scores on the chip, and whether they support a call that hopper_attention
/// supports.
bool fused_forward_fits(const Call& c);
bool fused_vjp_fits(const Call& c);
Arrays fused_forward(const Call& c, const Arrays& qkv);
Arrays fused_vjp(const Call& c, const Arrays& qkv, const mx::array& d_o, const mx::array& o,
                 const mx::array& lse);
/// Bytes of scratch that fused_vjp needs besides its inputs and outputs.
int64_t fused_vjp_scratch(const Call& c);

/// Sums the query heads of each group: [B,H,S,d] → [B,G,S,d].
mx::array sum_share(const mx::array& x, const Call& c);

/// sum [B,G,S,d] with part [B,G,n,d] added to its rows from `begin` on.
mx::array add_rows(const mx::array& sum, const mx::array& part, int begin, mx::StreamOrDevice s);

/// delta = Σ o·do over a row. [B,H,T,Dv] → [B,H,T] float32.
mx::array row_delta(const Call& c, const mx::array& o, const mx::array& d_o);

}  // namespace segtrain
