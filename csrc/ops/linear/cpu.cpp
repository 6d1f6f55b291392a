#include "ops/linear/cpu.h"

#include <algorithm>

#include "cpu/bfloat16.h"
#include "cpu/blas.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain::cpu {

namespace {
// A tile of 256 rows of a weight with 1024 columns is 1 MB of float32, about the size of a core's
// second-level cache.
constexpr int TILE_ROWS = 256, TILE_COLUMNS = 512, TILE_M = 1024;
// Number of rows of x that are rounded to bfloat16 at a time. With fewer rows than LEAST_ROUNDED in all,
// rounding the weight would take longer than the product.
constexpr int ROUNDED_M = 192, LEAST_ROUNDED = 16;
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
  size_t rounded = (panels_size(length, k) + static_cast<size_t>(ROUNDED_M) * padded(k)) / 2 + PANEL * k;
  size_t floats = static_cast<size_t>(length) * k;
  return sizeof(float) * std::min(n_threads(), (n + length - 1) / length) *
         (rounds_products() ? std::max(floats, rounded) : floats);
}

void linear_tile(const Weight& w, int n0, int n1, int m, const float* x, const float* bias, int r,
                 const float* z, const float* b, float* y) {
  const int n = n1 - n0, k = w.k;
  const bool rounds = w.rounded && m >= LEAST_ROUNDED;
  const auto* own = rounds ? bfloat16() : nullptr;
  Scratch floats(w.dense ? 0 : static_cast<size_t>(rounds ? PANEL : n) * k);
  Scratch panels(rounds ? panels_size(n, k) / 2 : 0);
  Scratch rows(rounds ? static_cast<size_t>(ROUNDED_M) * padded(k) / 2 : 0);
  Tile whole{};
  if (rounds)
    for (int i = 0; i < n; i += PANEL) {
      int count = std::min(PANEL, n - i);
      auto [data, ld] = tile(w, n0 + i, n0 + i + count, 0, k, floats);
      own->pack_transposed(data, ld, count, k, panels.as<uint16_t>() + panel_at(i, 0, k));
    }
  else
    whole = tile(w, n0, n1, 0, k, floats);
  const int step = rounds ? ROUNDED_M : TILE_M;
  for (int m0 = 0; m0 < m; m0 += step) {
    int rows_here = std::min(step, m - m0);
    const float* x_tile = x + static_cast<size_t>(m0) * k;
    float* y_tile = y + static_cast<size_t>(m0) * w.n + n0;
    if (bias)
      for (int i = 0; i < rows_here; ++i)
        std::copy(bias + n0, bias + n1, y_tile + static_cast<size_t>(i) * w.n);
    if (rounds) {
      own->round(x_tile, k, rows_here, k, rows.as<uint16_t>());
      own->multiply(rows.as<uint16_t>(), panels.as<uint16_t>(), rows_here, n, k, y_tile, w.n, bias);
    } else {
      gemm(false, true, rows_here, n, k, 1, x_tile, k, whole.data, whole.ld, bias ? 1 : 0, y_tile, w.n);
    }
    if (z)
      gemm(false, false, rows_here, n, r, 1, z + static_cast<size_t>(m0) * r, r, b + n0, w.n, 1, y_tile, w.n);
  }
}

void linear(const Weight& w, int m, const float* x, const float* bias, int r, const float* z, const float* b,
            float* y) {
  int length = split(w.n, TILE_ROWS, 16);
  parallel_for((w.n + length - 1) / length, [&](int job) {
    int n0 = job * length;
    linear_tile(w, n0, std::min(w.n, n0 + length), m, x, bias, r, z, b, y);
  });
}

size_t linear_dx_scratch(int n, int k) {
  int length = split(k, TILE_COLUMNS, 32), rows = std::min(TILE_ROWS, n);
  size_t floats = static_cast<size_t>(rows) * length;
  size_t rounded =
      (panels_size(length, rows) + static_cast<size_t>(ROUNDED_M) * padded(rows)) / 2 + 32 * length;
  return sizeof(float) * std::min(n_threads(), (k + length - 1) / length) *
         (rounds_products() ? std::max(floats, rounded) : floats);
}

void linear_dx(const Weight& w, int m, const float* dy, int r, const float* u, const float* a, float* dx) {
  int length = split(w.k, TILE_COLUMNS, 32);
  const bool rounds = w.rounded && m >= LEAST_ROUNDED;
  const auto* own = rounds ? bfloat16() : nullptr;
  parallel_for((w.k + length - 1) / length, [&](int job) {
    int k0 = job * length, k1 = std::min(w.k, k0 + length), k = k1 - k0, most = std::min(TILE_ROWS, w.n);
    Scratch floats(w.dense ? 0 : static_cast<size_t>(rounds ? 32 : TILE_ROWS) * k);
    Scratch panels(rounds ? panels_size(k, most) / 2 : 0);
    Scratch rows(rounds ? static_cast<size_t>(ROUNDED_M) * padded(most) / 2 : 0);
    for (int n0 = 0; n0 < w.n; n0 += TILE_ROWS) {
      int n1 = std::min(w.n, n0 + TILE_ROWS), n = n1 - n0;
      if (!rounds) {
        auto [data, ld] = tile(w, n0, n1, k0, k1, floats);
        gemm(false, false, m, k, n, 1, dy + n0, w.n, data, ld, n0 ? 1 : 0, dx + k0, w.k);
        continue;
      }
      for (int i = 0; i < n; i += 32) {
        int count = std::min(32, n - i);
        auto [data, ld] = tile(w, n0 + i, n0 + i + count, k0, k1, floats);
        for (int j = 0; j < k; j += PANEL)
          own->pack(data + j, ld, std::min(PANEL, k - j), count, panels.as<uint16_t>() + panel_at(j, i, n));
      }
      for (int m0 = 0; m0 < m; m0 += ROUNDED_M) {
        int rows_here = std::min(ROUNDED_M, m - m0);
        own->round(dy + static_cast<size_t>(m0) * w.n + n0, w.n, rows_here, n, rows.as<uint16_t>());
        own->multiply(rows.as<uint16_t>(), panels.as<uint16_t>(), rows_here, k, n,
                      dx + static_cast<size_t>(m0) * w.k + k0, w.k, n0 > 0);
      }
    }
    if (u) gemm(false, true, m, k, r, 1, u, r, a + static_cast<size_t>(k0) * r, r, 1, dx + k0, w.k);
  });
}

}  // namespace segtrain::cpu
