// Matrix products c = a·b whose factors are rounded to bfloat16 and whose sums are float32. They need a
// processor with AVX512-BF16, which multiplies pairs of bfloat16 numbers at twice the rate of float32.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace segtrain::cpu {

/// Number of columns of b in a panel.
constexpr int PANEL = 32;

/// Returns the length of a row of a, and of a column of b, after padding with zeros.
constexpr int padded(int k) {
  return (k + 31) / 32 * 32;
}

/// Returns the size of b [k, n] in panels, in bfloat16 numbers.
constexpr size_t panels_size(int n, int k) {
  return static_cast<size_t>((n + PANEL - 1) / PANEL) * PANEL * padded(k);
}

/// Returns the position of column n (a multiple of PANEL) and row k (a multiple of 32) of b in its panels.
constexpr size_t panel_at(int n, int k, int rows) {
  return static_cast<size_t>(n) * padded(rows) + static_cast<size_t>(k) * PANEL;
}

struct Bfloat16 {
  /// Rounds a [m, k], whose row stride is lda, to out [m, padded(k)].
  void (*round)(const float* a, int lda, int m, int k, uint16_t* out);
  /// Rounds bᵀ [n, k], whose row stride is ldb, to a panel; n ≤ PANEL.
  void (*pack_transposed)(const float* b, int ldb, int n, int k, uint16_t* out);
  /// Rounds b [k, n], whose row stride is ldb, to a panel; n ≤ PANEL.
  void (*pack)(const float* b, int ldb, int n, int k, uint16_t* out);
  /// c = a·b, or c += a·b if `add` is set. a [m, padded(k)], b [k, n] in panels, c [m, n] with row stride
  /// ldc.
  void (*multiply)(const uint16_t* a, const uint16_t* b, int m, int n, int k, float* c, int ldc, bool add);
};

/// Returns the functions above, or null if this processor does not have the instructions.
const Bfloat16* bfloat16();

/// Whether ops that are created now round the factors of products with a frozen weight to bfloat16.
bool rounds_products();

/// Sets the above, and returns the previous value.
bool set_rounds_products(bool on);

}  // namespace segtrain::cpu
