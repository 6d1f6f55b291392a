// float32 matrix multiplication (GEMM) on the calling thread. It does not start threads, because our kernels
// divide the work into tiles and distribute the tiles over threads.
#pragma once

#ifdef __APPLE__
#include <Accelerate/Accelerate.h>
#define SEGTRAIN_SGEMM cblas_sgemm
#else
#include <cblas.h>
#define SEGTRAIN_SGEMM scipy_cblas_sgemm
extern "C" void scipy_openblas_set_num_threads(int);
#endif

namespace segtrain::cpu {

/// c = alpha·op(a)·op(b) + beta·c; op(a) is m × k, op(b) is k × n, all row-major.
inline void gemm(bool ta, bool tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
#ifndef __APPLE__
  // Limiting this library to one thread affects no other code: NumPy and SciPy load their own copies of
  // OpenBLAS under other names.
  static const bool single = (scipy_openblas_set_num_threads(1), true);
  (void)single;
#endif
  if (m == 0 || n == 0) return;
  SEGTRAIN_SGEMM(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n, k,
                 alpha, a, lda, b, ldb, beta, c, ldc);
}

}  // namespace segtrain::cpu
