// Attention on raw row-major float32 memory. It uses all threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace segtrain::cpu {

struct Attention {
  int batch, heads, groups, t, s, d, dv;
  int q_start;
  float scale, cap;      ///< cap 0 means no softcap
  const int32_t* first;  ///< [t]; see Call::first
};
/// q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → o [B,H,T,Dv], lse [B,H,T].
void attention(const Attention& a, const float* q, const float* k, const float* v, float* o, float* lse);
/// Computes dq [B,H,T,D], dk [B,H,S,D] and dv [B,H,S,Dv]. dk and dv are per query head; the caller sums the
/// heads of each group.
void attention_vjp(const Attention& a, const float* q, const float* k, const float* v, const float* o,
                   const float* lse, const float* d_o, float* dq, float* dk, float* dv);

/// Returns the bytes of scratch memory that attention or attention_vjp needs, over all threads.
size_t attention_scratch(const Attention& a, bool backward);

}  // namespace segtrain::cpu
