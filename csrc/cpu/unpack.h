// Rows of a quantized weight as floats, once per instruction set. Multiplication and addition round each by
// itself, as MLX's do, so these loops are compiled apart from rows.cpp, where the two may fuse.
#pragma once

#include <stdint.h>

#define SEGTRAIN_JOIN_(a, b) a##b
#define SEGTRAIN_JOIN(a, b) SEGTRAIN_JOIN_(a, b)
/// name_baseline, name_avx2, name_avx512
#define SEGTRAIN_FOR_ISA(name) SEGTRAIN_JOIN(name, SEGTRAIN_ISA)

namespace segtrain::cpu {

/// As Rows::dequantize and Rows::dequantize_fp.
void SEGTRAIN_FOR_ISA(dequantize_)(const uint32_t* packed, const float* scales, const float* biases, int bits,
                                   int group, int begin, int end, float* out);
void SEGTRAIN_FOR_ISA(dequantize_fp_)(const uint32_t* packed, const uint8_t* scales, int bits, int group,
                                      int begin, int end, float* out);

}  // namespace segtrain::cpu
