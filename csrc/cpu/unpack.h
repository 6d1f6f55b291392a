// Unpacks rows of a quantized weight to floats; compiled once per instruction set. The multiplication and the
// addition are rounded separately, as in MLX, so these loops are compiled apart from rows.cpp, where the
// compiler may fuse the two.
#pragma once

#include <stdint.h>

#define SEGTRAIN_JOIN_(a, b) a##b
#define SEGTRAIN_JOIN(a, b) SEGTRAIN_JOIN_(a, b)
/// name_baseline, name_avx2, name_avx512
#define SEGTRAIN_FOR_ISA(name) SEGTRAIN_JOIN(name, SEGTRAIN_ISA)

namespace segtrain::cpu {

/// The implementations of Rows::dequantize and Rows::dequantize_fp.
void SEGTRAIN_FOR_ISA(dequantize_)(const uint32_t* packed, const float* scales, const float* biases, int bits,
                                   int group, int begin, int end, float* out);
void SEGTRAIN_FOR_ISA(dequantize_fp_)(const uint32_t* packed, const uint8_t* scales, int bits, int group,
                                      int begin, int end, float* out);

}  // namespace segtrain::cpu
