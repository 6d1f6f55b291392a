// This file is compiled three times, with SEGTRAIN_ISA = baseline, avx2 and avx512. It includes no C++
// library headers, because the linker keeps one copy of each inline function for the whole program. A copy
// that was compiled here with AVX would then also run on processors without AVX.
#include "cpu/rows.h"

#include <math.h>
#include <string.h>

#include "cpu/unpack.h"

namespace segtrain::cpu {

#define ROWS_TABLE SEGTRAIN_FOR_ISA(rows_)

namespace {

/// Returns exp(x), accurate to about 1 ulp if the result is a normal float. It returns 0 below that range and
/// inf above it.
inline float exp1(float x) {
  float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  // Adding and subtracting 1.5·2²³ rounds to the nearest integer.
  float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2ⁿ is computed as two factors, because n may be 128, and 2¹²⁸ exceeds the range of float.
  int32_t k = (int32_t)n, k1 = k >> 1, k2 = k - k1;
  int32_t bits1 = (k1 + 127) << 23, bits2 = (k2 + 127) << 23;
  float s1, s2;
  memcpy(&s1, &bits1, 4);
  memcpy(&s2, &bits2, 4);
  float y = p * s1 * s2;
  return x < -87.33f ? 0.0f : y;
}

inline float tanh1(float x) {
  // For small |x| the formula with exp loses precision, so a series is used instead.
  float x2 = x * x;
  float small =
      x * (1.0f + x2 * (-0.333333333f + x2 * (0.133333333f + x2 * (-0.0539682540f + x2 * 0.0218694885f))));
  float large = 1.0f - 2.0f / (exp1(2.0f * x) + 1.0f);
  return x2 < 0.04f ? small : large;
}

float max(const float* x, int n) {
  // One maximum per lane: Clang does not vectorize a max reduction of floats, because of NaN.
  constexpr int LANES = 16;
  float tops[LANES];
  for (float& top : tops) top = -INFINITY;
  int i = 0;
  for (; i + LANES <= n; i += LANES)
#pragma omp simd
    for (int j = 0; j < LANES; ++j) tops[j] = x[i + j] > tops[j] ? x[i + j] : tops[j];
  float m = -INFINITY;
  for (float top : tops) m = top > m ? top : m;
  for (; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

float exp_sum(float* x, int n, float shift) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    x[i] = exp1(x[i] - shift);
    sum += x[i];
  }
  return sum;
}

float sum_exp(const float* x, int n, float shift) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += exp1(x[i] - shift);
  return sum;
}

double sum(const float* x, int n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += x[i];
  return sum;
}

void exp_scale(float* x, int n, float shift, float w) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] = exp1(x[i] - shift) * w;
}

void softcap(float* x, int n, float cap) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] = cap * tanh1(x[i] / cap);
}

void cross_entropy_vjp(float* x, int n, float lse, float w, int target, float smoothing, float cap) {
  float uniform = smoothing / (float)n, certain = w * (1.0f - smoothing);
  bool inside = target >= 0 && target < n;
  if (cap > 0) {
    float t = inside ? x[target] / cap : 0;
    certain *= 1.0f - t * t;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float t = x[i] / cap;
      x[i] = (exp1(x[i] - lse) - uniform) * w * (1.0f - t * t);
    }
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) x[i] = (exp1(x[i] - lse) - uniform) * w;
  }
  if (inside) x[target] -= certain;
}

void scale(float* x, int n, float factor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] *= factor;
}

float dot(const float* x, const float* y, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

void softmax_vjp(float* dp, const float* p, const float* capped, int n, float delta, float factor,
                 float cap) {
  if (!capped) {
#pragma omp simd
    for (int i = 0; i < n; ++i) dp[i] = p[i] * (dp[i] - delta) * factor;
    return;
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float t = capped[i] / cap;
    dp[i] = p[i] * (dp[i] - delta) * factor * (1.0f - t * t);
  }
}

/// s = sigmoid(u), bend = g·ds/dg. Both are computed from exp(−|u|), which cannot overflow and avoids the
/// loss of precision in 1 − s.
struct Gate {
  float s, bend;
};
template <bool GELU>
inline Gate gate_of(float g) {
  const float k = 1.5957691216f, cubic = 0.044715f;
  // For |g| > 32, e is 0. q is clamped, because an infinite q would result in 0·∞.
  float q = g * g < 1024.0f ? g * g : 1024.0f;
  float u = GELU ? k * g * (1.0f + cubic * q) : g;
  float du = GELU ? k * (1.0f + 3.0f * cubic * q) : 1.0f;
  float e = exp1(-fabsf(u)), r = 1.0f / (1.0f + e);
  return {u < 0.0f ? e * r : r, e * r * r * du * g};
}

template <bool GELU>
void glu(const float* gate, const float* up, float* y, size_t n) {
#pragma omp simd
  for (size_t i = 0; i < n; ++i) {
    float g = gate[i];
    /// s = sigmoid(u), u = g or k*(g + 0.044715*g^3), k = 2*sqrt(2/pi)
    Gate at = gate_of<GELU>(g);
    /// y = g*s*up
    y[i] = g * at.s * up[i];
  }
}

template <bool GELU>
void glu_vjp(const float* gate, const float* up, const float* dy, float* dgate, float* dup, size_t n) {
#pragma omp simd
  for (size_t i = 0; i < n; ++i) {
    float g = gate[i], d = dy[i];
    /// s = sigmoid(u), u = g or k*(g + 0.044715*g^3), k = 2*sqrt(2/pi)
    Gate at = gate_of<GELU>(g);
    /// dgate = dy*up*(s + g*s*(1 - s)*du/dg)
    dgate[i] = d * up[i] * (at.s + at.bend);
    /// dup = dy*g*s
    dup[i] = d * (g * at.s);
  }
}

inline float inverse_rms(const float* x, float eps, int n) {
  return 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
}

void rms_norm(const float* x, const float* weight, float eps, float* y, int n) {
  float r = inverse_rms(x, eps, n);
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = x[i] * r * weight[i];
}

void rms_norm_vjp(const float* x, const float* weight, const float* dy, float eps, float* dx, int n) {
  float r = inverse_rms(x, eps, n), sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += dy[i] * weight[i] * x[i];
  float c = sum * r * r * r / (float)n;
#pragma omp simd
  for (int i = 0; i < n; ++i) dx[i] = dy[i] * weight[i] * r - x[i] * c;
}

void rotate(const float* x, const float* cosine, const float* sine, float* y, int half, bool traditional) {
  int step = traditional ? 2 : 1, other = traditional ? 1 : half;
#pragma omp simd
  for (int i = 0; i < half; ++i) {
    float a = x[i * step], b = x[i * step + other];
    y[i * step] = a * cosine[i] - b * sine[i];
    y[i * step + other] = a * sine[i] + b * cosine[i];
  }
}

}  // namespace

extern const Rows ROWS_TABLE;
const Rows ROWS_TABLE = {SEGTRAIN_FOR_ISA(dequantize_),
                         SEGTRAIN_FOR_ISA(dequantize_fp_),
                         max,
                         exp_sum,
                         sum_exp,
                         sum,
                         exp_scale,
                         softcap,
                         cross_entropy_vjp,
                         scale,
                         dot,
                         softmax_vjp,
                         {glu<false>, glu<true>},
                         {glu_vjp<false>, glu_vjp<true>},
                         rms_norm,
                         rms_norm_vjp,
                         rotate};

}  // namespace segtrain::cpu
