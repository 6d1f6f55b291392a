// Loops over rows of floats. They are compiled once per instruction set (baseline, AVX2 and AVX-512); the
// version to use is chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace segtrain::cpu {

struct Rows {
  /// Dequantizes columns [begin, end) of a row that is packed with `bits` bits per value: out[i] =
  /// scale[group]·q + bias[group]. `begin` is a multiple of 32; `end` is a multiple of 32 or the length of
  /// the row.
  void (*dequantize)(const uint32_t* packed, const float* scales, const float* biases, int bits, int group,
                     int begin, int end, float* out);
  /// Dequantizes E2M1 (4 bits) or E4M3 (8 bits) values: out[i] = scale[group]·value. The scales are E4M3 if
  /// groups have 16 values, and E8M0 otherwise.
  void (*dequantize_fp)(const uint32_t* packed, const uint8_t* scales, int bits, int group, int begin,
                        int end, float* out);
  float (*max)(const float* x, int n);
  /// x = exp(x − shift); returns the sum.
  float (*exp_sum)(float* x, int n, float shift);
  /// Returns the sum of exp(x − shift) and leaves x unchanged.
  float (*sum_exp)(const float* x, int n, float shift);
  double (*sum)(const float* x, int n);
  /// x = exp(x − shift)·w.
  void (*exp_scale)(float* x, int n, float shift, float w);
  /// x = cap·tanh(x / cap).
  void (*softcap)(float* x, int n, float cap);
  /// x = w·(exp(x − lse) − (1 − smoothing)·[i = target] − smoothing/n), times 1 − (x / cap)² if cap > 0. The
  /// input x contains logits after the softcap.
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
  /// Rotates the pairs (x[i], x[i + half]), or (x[2i], x[2i+1]) if `traditional`, by the angles whose cosines
  /// and sines are given.
  void (*rotate)(const float* x, const float* cosine, const float* sine, float* y, int half,
                 bool traditional);
};

/// Returns the fastest version of the loops that this processor supports.
const Rows& rows();

}  // namespace segtrain::cpu
