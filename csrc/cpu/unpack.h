// Dequantizes rows of a weight to floats. These loops are compiled once per instruction set. They are
// separate from rows.cpp, where the compiler may fuse a multiplication with an addition; here, both are
// rounded separately, as in MLX.
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
