// The parts of Apple's header that our code uses. ACCELERATE_NEW_LAPACK adds a suffix to symbols.
#pragma once

#ifndef ACCELERATE_NEW_LAPACK
#error "MLX's wheels are built with ACCELERATE_NEW_LAPACK"
#endif

extern "C" {
enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112, CblasConjTrans = 113 };

void cblas_sgemm(CBLAS_ORDER, CBLAS_TRANSPOSE, CBLAS_TRANSPOSE, int m, int n, int k, float alpha, const float* a,
                 int lda, const float* b, int ldb, float beta, float* c, int ldc) __asm__("_cblas_sgemm$NEWLAPACK");
}
