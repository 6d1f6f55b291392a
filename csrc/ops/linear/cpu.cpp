#include "ops/linear/cpu.h"

#include <algorithm>

#include "cpu/blas.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain::cpu {

namespace {
// A tile of 256 rows of a weight with 1024 columns is 1 MB of float32, about the size of a core's
// second-level cache.
constexpr int TILE_ROWS = 256, TILE_COLUMNS = 512, TILE_M = 1024;
}  // namespace

Tile tile(const Weight& w, int n0, int n1, int k0, int k1, float* scratch) {
  if (w.dense) return {w.dense + static_cast<size_t>(n0) * w.k + k0, w.k};
  size_t words = static_cast<size_t>(w.k) * w.bits / 32, groups = w.k / w.group;
  for (int n = n0; n < n1; ++n) {
    float* out = scratch + static_cast<size_t>(n - n0) * (k1 - k0);
    if (w.biases)
      rows().dequantize(w.packed + n * words, static_cast<const float*>(w.scales) + n * groups,
                        w.biases + n * groups, w.bits, w.group, k0, k1, out);
    else
      rows().dequantize_fp(w.packed + n * words, static_cast<const uint8_t*>(w.scales) + n * groups, w.bits,
                           w.group, k0, k1, out);
  }
  return {scratch, k1 - k0};
}

void dequantize(const Weight& w, float* out) {
  int length = split(w.n, TILE_ROWS, 1);
  parallel_for((w.n + length - 1) / length, [&](int job) {
    int n0 = job * length, n1 = std::min(w.n, n0 + length);
    tile(w, n0, n1, 0, w.k, out + static_cast<size_t>(n0) * w.k);
  });
}

void matmul(bool ta, bool tb, int batch, int m, int n, int k, float alpha, const float* a, const float* b,
            float* c) {
  // The longer side of c is divided, so that even a narrow matrix product (as in LoRA) keeps all threads
  // busy.
  bool by_rows = m >= n;
  int length = split(by_rows ? m : n, 1024, 16);
  int runs = ((by_rows ? m : n) + length - 1) / length;
  int lda = ta ? m : k, ldb = tb ? k : n;
  parallel_for(batch * runs, [&](int job) {
    size_t i = job / runs;
    int begin = job % runs * length;
    const float* a_i = a + i * m * k;
    const float* b_i = b + i * n * k;
    float* c_i = c + i * m * n;
    if (by_rows)
      gemm(ta, tb, std::min(length, m - begin), n, k, alpha,
           a_i + (ta ? begin : static_cast<size_t>(begin) * k), lda, b_i, ldb, 0,
           c_i + static_cast<size_t>(begin) * n, n);
    else
      gemm(ta, tb, m, std::min(length, n - begin), k, alpha, a_i, lda,
           b_i + (tb ? static_cast<size_t>(begin) * k : begin), ldb, 0, c_i + begin, n);
  });
}

size_t linear_scratch(int n, int k) {
  int length = split(n, TILE_ROWS, 16);
  return sizeof(float) * std::min(n_threads(), (n + length - 1) / length) * length * k;
}

void linear(const Weight& w, int m, const float* x, const float* bias, int r, const float* z, const float* b,
            float* y) {
  int length = split(w.n, TILE_ROWS, 16);
  parallel_for((w.n + length - 1) / length, [&](int job) {
    int n0 = job * length, n1 = std::min(w.n, n0 + length);
    Scratch scratch(w.dense ? 0 : static_cast<size_t>(n1 - n0) * w.k);
    auto [data, ld] = tile(w, n0, n1, 0, w.k, scratch);
    for (int m0 = 0; m0 < m; m0 += TILE_M) {
      int rows_here = std::min(TILE_M, m - m0);
      float* y_tile = y + static_cast<size_t>(m0) * w.n + n0;
      if (bias)
        for (int i = 0; i < rows_here; ++i)
          std::copy(bias + n0, bias + n1, y_tile + static_cast<size_t>(i) * w.n);
      gemm(false, true, rows_here, n1 - n0, w.k, 1, x + static_cast<size_t>(m0) * w.k, w.k, data, ld,
           bias ? 1 : 0, y_tile, w.n);
      if (z)
        gemm(false, false, rows_here, n1 - n0, r, 1, z + static_cast<size_t>(m0) * r, r, b + n0, w.n, 1,
             y_tile, w.n);
    }
  });
}

size_t linear_dx_scratch(int n, int k) {
  int length = split(k, TILE_COLUMNS, 32);
  return sizeof(float) * std::min(n_threads(), (k + length - 1) / length) * std::min(TILE_ROWS, n) * length;
}

void linear_dx(const Weight& w, int m, const float* dy, int r, const float* u, const float* a, float* dx) {
  int length = split(w.k, TILE_COLUMNS, 32);
  parallel_for((w.k + length - 1) / length, [&](int job) {
    int k0 = job * length, k1 = std::min(w.k, k0 + length);
    Scratch scratch(w.dense ? 0 : static_cast<size_t>(TILE_ROWS) * (k1 - k0));
    for (int n0 = 0; n0 < w.n; n0 += TILE_ROWS) {
      int n1 = std::min(w.n, n0 + TILE_ROWS);
      auto [data, ld] = tile(w, n0, n1, k0, k1, scratch);
      gemm(false, false, m, k1 - k0, n1 - n0, 1, dy + n0, w.n, data, ld, n0 ? 1 : 0, dx + k0, w.k);
    }
    if (u) gemm(false, true, m, k1 - k0, r, 1, u, r, a + static_cast<size_t>(k0) * r, r, 1, dx + k0, w.k);
  });
}

}  // namespace segtrain::cpu
