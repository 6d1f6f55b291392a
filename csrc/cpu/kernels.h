// The CPU kernels on raw row-major float32 memory. They use all threads (cpu/threads.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace segtrain::cpu {

/// A frozen weight [n, k]: dense, or packed with scales [n, k / group], which are floats beside biases
/// (affine modes) and bytes without (floating-point modes).
struct Weight {
  const float* dense;
  const uint32_t* packed;
  const void* scales;
  const float* biases;
  int bits, group;
  int n, k;
};

/// A piece of a weight as float32, row stride `ld`.
struct Tile {
  const float* data;
  int ld;
};

/// Rows [n0, n1) and columns [k0, k1) of w; unpacked into `scratch` ((n1−n0)·(k1−k0) floats) unless w is
/// dense.
Tile tile(const Weight& w, int n0, int n1, int k0, int k1, float* scratch);

/// All of w, unpacked: out [n, k].
void dequantize(const Weight& w, float* out);

/// c = alpha·op(a)·op(b) for each of `batch` row-major matrices.
void matmul(bool ta, bool tb, int batch, int m, int n, int k, float alpha, const float* a, const float* b,
            float* c);

/// y = x·wᵀ + bias + z·b. x [m, k], z [m, r], b [r, n], bias [n] → y [m, n]; bias and z may be null.
void linear(const Weight& w, int m, const float* x, const float* bias, int r, const float* z, const float* b,
            float* y);

/// dx = dy·w + u·aᵀ. dy [m, n], u [m, r], a [k, r] → dx [m, k]; u may be null.
void linear_dx(const Weight& w, int m, const float* dy, int r, const float* u, const float* a, float* dx);

/// What meets a head [V, hidden]. A target of V or above makes its row's results NaN.
struct HeadInput {
  int m;
  float cap;               ///< of the logits; 0: none
  const float* h;          ///< [m, hidden]
  const float* bias;       ///< [V], or null
  const int32_t* targets;  ///< [m]; below 0: the row is not touched
};

struct CrossEntropy {
  HeadInput in;
  float smoothing;
  const float* weights;
  float* loss;  ///< scalar
  float* dh;    ///< [m, hidden], or null
};
void cross_entropy(const Weight& head, const CrossEntropy& args);

/// log softmax(z)[target] and lse, [m] each; 0 where the target is below 0.
void log_probs(const Weight& head, const HeadInput& in, float* log_p, float* lse);
/// dh [m, hidden] from log_probs' lse and the cotangent [m].
void log_probs_vjp(const Weight& head, const HeadInput& in, const float* lse, const float* dlog_p, float* dh);

struct Attention {
  int batch, heads, groups, t, s, d, dv;
  int q_start;
  float scale, cap;      ///< cap 0: none
  const int32_t* first;  ///< [t], as in Call
};
/// q [B,H,T,D], k [B,G,S,D], v [B,G,S,Dv] → o [B,H,T,Dv], lse [B,H,T].
void attention(const Attention& a, const float* q, const float* k, const float* v, float* o, float* lse);
/// dq as q. dk, dv come per query head, [B,H,S,D]: the caller sums the heads of a group.
void attention_vjp(const Attention& a, const float* q, const float* k, const float* v, const float* o,
                   const float* lse, const float* d_o, float* dq, float* dk, float* dv);

/// silu(gate)·up, or gelu(gate)·up.
void glu(bool gelu, const float* gate, const float* up, float* y, size_t n);
void glu_vjp(bool gelu, const float* gate, const float* up, const float* dy, float* dgate, float* dup,
             size_t n);
void rms_norm(const float* x, const float* weight, float eps, float* y, int m, int n);
void rms_norm_vjp(const float* x, const float* weight, const float* dy, float eps, float* dx, int m, int n);

/// y = x with the first `dims` of each row rotated by angle (offset + t)·scale / freqs[i]; `sign` −1 rotates
/// back.
void rope(const float* x, const float* freqs, float scale, float sign, int offset, bool traditional,
          int n_rows, int t, int d, int dims, float* y);

}  // namespace segtrain::cpu
