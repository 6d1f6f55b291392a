// Like rows.cpp, this file is compiled three times and includes no C++ library headers. Unlike rows.cpp, it
// is compiled with -ffp-contract=off.
#include "cpu/unpack.h"

#include <string.h>

namespace segtrain::cpu {

namespace {

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float flip_sign(float x, uint32_t sign) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return from_bits(bits ^ sign);
}

/// Decodes E4M3: 4 exponent bits and 3 mantissa bits. If all of these bits are ones, the value is NaN.
inline float e4m3(uint32_t code) {
  uint32_t exponent = (code >> 3) & 15, normal = exponent ? 1 : 0;
  int32_t mantissa = (int32_t)((code & 7) + 8 * normal);
  float scale = from_bits((exponent + 1 - normal + 117) << 23);
  float x = (code & 127) == 127 ? from_bits(0x7fc00000) : (float)mantissa * scale;
  return flip_sign(x, (code & 128) << 24);
}

/// Decodes E8M0, which is a power of two: 2^(code − 127).
inline float e8m0(uint32_t code) {
  return from_bits(code ? code << 23 : 0x400000);
}

/// Unpacks 32 values from a little-endian bit stream, where a value may straddle two words.
template <int BITS>
inline void unpack32(const uint32_t* word, int32_t* q) {
#pragma GCC unroll 32
  for (int j = 0; j < 32; ++j) {
    const int at = j * BITS / 32, shift = j * BITS % 32;
    uint32_t value = word[at] >> shift;
    if (shift + BITS > 32) value |= word[at + 1] << (32 - shift);
    q[j] = (int32_t)(value & ((1u << BITS) - 1));
  }
}

/// Dequantizes n values of one group; n is a multiple of 32.
template <int BITS>
inline void dequantize_group(const uint32_t* word, float scale, float bias, int n, float* y) {
  for (int j0 = 0; j0 < n; j0 += 32, word += BITS) {
    int32_t q[32];
    unpack32<BITS>(word, q);
#pragma omp simd
    for (int j = 0; j < 32; ++j) y[j0 + j] = scale * (float)q[j] + bias;
  }
}

}  // namespace

void SEGTRAIN_FOR_ISA(dequantize_)(const uint32_t* packed, const float* scales, const float* biases, int bits,
                                   int group, int begin, int end, float* out) {
  for (int i = begin; i < end;) {
    int g = i / group;
    int stop = (g + 1) * group < end ? (g + 1) * group : end;
    float scale = scales[g], bias = biases[g];
    float* y = out + (i - begin);
    int n = stop - i;
    const uint32_t* word = packed + i / 32 * bits;
    if (bits == 4) {
      for (int w = 0; w < n / 8; ++w)
#pragma omp simd
        for (int j = 0; j < 8; ++j)
          y[w * 8 + j] = scale * (float)(int32_t)((word[w] >> (4 * j)) & 15u) + bias;
    } else if (bits == 8) {
      const uint8_t* byte = (const uint8_t*)word;
#pragma omp simd
      for (int j = 0; j < n; ++j) y[j] = scale * (float)byte[j] + bias;
    } else if (bits == 2) {
      for (int w = 0; w < n / 16; ++w)
#pragma omp simd
        for (int j = 0; j < 16; ++j)
          y[w * 16 + j] = scale * (float)(int32_t)((word[w] >> (2 * j)) & 3u) + bias;
    } else if (bits == 3) {
      dequantize_group<3>(word, scale, bias, n, y);
    } else if (bits == 5) {
      dequantize_group<5>(word, scale, bias, n, y);
    } else {
      dequantize_group<6>(word, scale, bias, n, y);
    }
    i = stop;
  }
}

void SEGTRAIN_FOR_ISA(dequantize_fp_)(const uint32_t* packed, const uint8_t* scales, int bits, int group,
                                      int begin, int end, float* out) {
  for (int i = begin; i < end; i += group) {
    float scale = group == 16 ? e4m3(scales[i / group]) : e8m0(scales[i / group]);
    float* y = out + (i - begin);
    if (bits == 8) {
      const uint8_t* code = (const uint8_t*)packed + i;
#pragma omp simd
      for (int j = 0; j < group; ++j) y[j] = e4m3(code[j]) * scale;
    } else {
      const uint32_t* word = packed + i / 8;
      float half = 0.5f * scale;
      for (int w = 0; w < group / 8; ++w)
#pragma omp simd
        for (int j = 0; j < 8; ++j) {
          // The hexadecimal digits of 0xC8643210 are the doubled magnitudes of E2M1, which are 0, 0.5, 1,
          // 1.5, 2, 3, 4 and 6.
          uint32_t code = word[w] >> (4 * j), twice = (0xC8643210u >> (4 * (code & 7))) & 15u;
          y[w * 8 + j] = flip_sign((float)(int32_t)twice * half, (code & 8) << 28);
        }
    }
  }
}

}  // namespace segtrain::cpu
