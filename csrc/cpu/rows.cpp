// Compiled with SEGTRAIN_ISA = baseline, avx2, avx512. Includes no C++ library header: an inline function
// from one could be the copy that the linker keeps for the whole program, and would then run on processors
// without AVX.
#include "cpu/rows.h"

#include <math.h>
#include <string.h>

namespace segtrain::cpu {

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define ROWS_TABLE JOIN(rows_, SEGTRAIN_ISA)

namespace {

/// exp to 1 ulp or so over float's normal range; below it 0 (subnormals flushed), above it inf.
inline float exp1(float x) {
  float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  // Adding 1.5·2²³ rounds to the nearest integer.
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
  // 2ⁿ in two factors, since n may be 128.
  int32_t k = (int32_t)n, k1 = k >> 1, k2 = k - k1;
  int32_t bits1 = (k1 + 127) << 23, bits2 = (k2 + 127) << 23;
  float s1, s2;
  memcpy(&s1, &bits1, 4);
  memcpy(&s2, &bits2, 4);
  float y = p * s1 * s2;
  return x < -87.33f ? 0.0f : y;
}

inline float sigmoid1(float x) {
  return 1.0f / (1.0f + exp1(-x));
}

inline float tanh1(float x) {
  // For small |x| the form by exp loses digits: there the series is used.
  float x2 = x * x;
  float small =
      x * (1.0f + x2 * (-0.333333333f + x2 * (0.133333333f + x2 * (-0.0539682540f + x2 * 0.0218694885f))));
  float large = 1.0f - 2.0f / (exp1(2.0f * x) + 1.0f);
  return x2 < 0.04f ? small : large;
}

void dequantize(const uint32_t* packed, const float* scales, const float* biases, int bits, int group,
                int begin, int end, float* out) {
  for (int i = begin; i < end;) {
    int g = i / group;
    int stop = (g + 1) * group < end ? (g + 1) * group : end;
    float scale = scales[g], bias = biases[g];
    float* y = out + (i - begin);
    int n = stop - i;
    if (bits == 4) {
      const uint32_t* word = packed + i / 8;
      for (int w = 0; w < n / 8; ++w)
#pragma omp simd
        for (int j = 0; j < 8; ++j)
          y[w * 8 + j] = scale * (float)(int32_t)((word[w] >> (4 * j)) & 15u) + bias;
    } else if (bits == 8) {
      const uint8_t* byte = (const uint8_t*)packed + i;
#pragma omp simd
      for (int j = 0; j < n; ++j) y[j] = scale * (float)byte[j] + bias;
    } else if (bits == 2) {
      const uint32_t* word = packed + i / 16;
      for (int w = 0; w < n / 16; ++w)
#pragma omp simd
        for (int j = 0; j < 16; ++j)
          y[w * 16 + j] = scale * (float)(int32_t)((word[w] >> (2 * j)) & 3u) + bias;
    } else {
      // 3, 5 and 6 bits: a little-endian stream in which a value may straddle bytes.
      const uint8_t* bytes = (const uint8_t*)packed;
      const uint32_t mask = (1u << bits) - 1;
      for (int j = 0; j < n; ++j) {
        size_t bit = (size_t)(i + j) * bits;
        uint32_t low = bytes[bit / 8], shift = bit % 8;
        uint32_t high = shift + bits > 8 ? bytes[bit / 8 + 1] : 0;
        y[j] = scale * (float)(((low | high << 8) >> shift) & mask) + bias;
      }
    }
    i = stop;
  }
}

float max(const float* x, int n) {
  float m = -INFINITY;
#pragma omp simd reduction(max : m)
  for (int i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
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

void exp_scale(float* x, int n, float shift, float w) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] = exp1(x[i] - shift) * w;
}

void softcap(float* x, int n, float cap) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] = cap * tanh1(x[i] / cap);
}

void softcap_cross_entropy(float* x, int n, float shift, float w, int target, float cap) {
  float at_target = target >= 0 && target < n ? x[target] : 0;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float t = x[i] / cap;
    x[i] = exp1(x[i] - shift) * w * (1.0f - t * t);
  }
  if (target >= 0 && target < n) x[target] -= w * (1.0f - (at_target / cap) * (at_target / cap));
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

void swiglu(const float* gate, const float* up, float* y, size_t n) {
#pragma omp simd
  for (size_t i = 0; i < n; ++i) y[i] = gate[i] * sigmoid1(gate[i]) * up[i];
}

void swiglu_vjp(const float* gate, const float* up, const float* dy, float* dgate, float* dup, size_t n) {
#pragma omp simd
  for (size_t i = 0; i < n; ++i) {
    float s = sigmoid1(gate[i]), silu = gate[i] * s;
    dgate[i] = dy[i] * up[i] * (s + silu * (1.0f - s));
    dup[i] = dy[i] * silu;
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
const Rows ROWS_TABLE = {dequantize, max, exp_sum,     sum_exp, exp_scale,  softcap,  softcap_cross_entropy,
                         scale,      dot, softmax_vjp, swiglu,  swiglu_vjp, rms_norm, rms_norm_vjp,
                         rotate};

}  // namespace segtrain::cpu
