// Computes matrix products with a frozen weight on raw row-major float32 memory, using all threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace segtrain::cpu {

/// A frozen weight [n, k]. It is dense, or quantized with scales [n, k / group]. The scales are floats if
/// there are biases (affine mode), and bytes otherwise (floating-point modes).
struct Weight {
  const float* dense;
  const uint32_t* packed;
  const void* scales;
  const float* biases;
  int bits, group;
  int n, k;
  bool rounded;  ///< whether products round both factors to bfloat16 (cpu/bfloat16.h)
};

/// A piece of a weight in float32; `ld` is the row stride.
struct Tile {
  const float* data;
  int ld;
};

/// Returns rows [n0, n1) and columns [k0, k1) of w. If w is quantized, they are dequantized into `scratch`,
/// which has (n1−n0)·(k1−k0) floats.
Tile tile(const Weight& w, int n0, int n1, int k0, int k1, float* scratch);

/// Dequantizes all of w into out [n, k].
void dequantize(const Weight& w, float* out);

/// c = alpha·op(a)·op(b) for each of `batch` row-major matrices.
void matmul(bool ta, bool tb, int batch, int m, int n, int k, float alpha, const float* a, const float* b,
            float* c);

/// y = x·wᵀ + bias + z·b. x [m, k], z [m, r], b [r, n], bias [n] → y [m, n]; bias and z may be null.
void linear(const Weight& w, int m, const float* x, const float* bias, int r, const float* z, const float* b,
            float* y);

/// Computes columns [n0, n1) of `linear` on the calling thread.
void linear_tile(const Weight& w, int n0, int n1, int m, const float* x, const float* bias, int r,
                 const float* z, const float* b, float* y);

/// Returns the number of bytes of scratch memory that `linear` needs for all threads together, if w is
/// quantized.
size_t linear_scratch(int n, int k);

/// dx = dy·w + u·aᵀ. dy [m, n], u [m, r], a [k, r] → dx [m, k]; u may be null.
void linear_dx(const Weight& w, int m, const float* dy, int r, const float* u, const float* a, float* dx);

size_t linear_dx_scratch(int n, int k);

}  // namespace segtrain::cpu
