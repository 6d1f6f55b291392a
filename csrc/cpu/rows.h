// Loops over rows of floats, compiled once per instruction set (baseline, AVX2, AVX-512), one of which is
// chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace segtrain::cpu {

struct Rows {
  /// Columns [begin, end) of a row packed with `bits` bits per value: out[i] = scale[group]·q + bias[group].
  /// begin and end are multiples of 32, or end is the row's length.
  void (*dequantize)(const uint32_t* packed, const float* scales, const float* biases, int bits, int group,
                     int begin, int end, float* out);
  /// The same for E2M1 (4 bits) or E4M3 (8 bits) values: out[i] = scale[group]·value. Scales are E4M3 in
  /// groups of 16, otherwise E8M0.
  void (*dequantize_fp)(const uint32_t* packed, const uint8_t* scales, int bits, int group, int begin,
                        int end, float* out);
  float (*max)(const float* x, int n);
  /// x = exp(x − shift); returns the sum.
  float (*exp_sum)(float* x, int n, float shift);
  /// Sum of exp(x − shift); leaves x unchanged.
  float (*sum_exp)(const float* x, int n, float shift);
  double (*sum)(const float* x, int n);
  /// x = exp(x − shift)·w.
  void (*exp_scale)(float* x, int n, float shift, float w);
  /// x = cap·tanh(x / cap).
  void (*softcap)(float* x, int n, float cap);
  /// x = w·(exp(x − lse) − (1 − smoothing)·[i = target] − smoothing/n), times 1 − (x / cap)² if cap > 0. x
  /// holds logits, which are already capped.
  void (*cross_entropy_vjp)(float* x, int n, float lse, float w, int target, float smoothing, float cap);
  void (*scale)(float* x, int n, float factor);
  float (*dot)(const float* x, const float* y, int n);
  /// ds = p·(dp − delta)·factor, written to dp. If the capped scores s are given as `capped`, ds is also
  /// multiplied by 1 − (s/cap)².
  void (*softmax_vjp)(float* dp, const float* p, const float* capped, int n, float delta, float factor,
                      float cap);
  /// silu(gate)·up, and gelu(gate)·up.
  void (*glu[2])(const float* gate, const float* up, float* y, size_t n);
  void (*glu_vjp[2])(const float* gate, const float* up, const float* dy, float* dgate, float* dup, size_t n);
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, int n);
  void (*rms_norm_vjp)(const float* x, const float* weight, const float* dy, float eps, float* dx, int n);
  /// Rotates pairs (x[i], x[i + half]), or (x[2i], x[2i+1]) if traditional, by angles with these cosines and
  /// sines.
  void (*rotate)(const float* x, const float* cosine, const float* sine, float* y, int half,
                 bool traditional);
};

/// The best set of loops that this processor supports.
const Rows& rows();

}  // namespace segtrain::cpu
