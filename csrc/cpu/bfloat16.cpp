// Like rows.cpp, this file is compiled for a later instruction set than the rest of the program and
// therefore includes no C++ library headers.
#include "cpu/bfloat16.h"

#include <immintrin.h>
#include <string.h>

namespace segtrain::cpu {

extern const Bfloat16 bfloat16_avx512;

namespace {

// A block of a kernel keeps ROWS × PANEL sums in 24 of the 32 vector registers. A panel of BLOCK rows of b is
// 16 KB, half of the smallest first-level cache.
constexpr int ROWS = 12, BLOCK = 256;

inline __mmask16 first(int n) {
  return n <= 0 ? 0 : (n >= 16 ? 0xffff : (1 << n) - 1);
}

/// Rounds 32 floats, of which the first n are read; the others count as zeros.
inline __m512i round32(const float* x, int n) {
  __m512 low = _mm512_maskz_loadu_ps(first(n), x), high = _mm512_maskz_loadu_ps(first(n - 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/// Transposes 16 × 16 elements of 32 bits.
inline void transpose(__m512i* r) {
  __m512i t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

void round(const float* a, int lda, int m, int k, uint16_t* out) {
  for (int i = 0; i < m; ++i, out += padded(k))
    for (int j = 0; j < k; j += 32)
      _mm512_storeu_si512(out + j, round32(a + static_cast<size_t>(i) * lda + j, k - j));
}

// In a panel, the numbers of rows 2i and 2i + 1 of b alternate, because an instruction multiplies such pairs.

void pack_transposed(const float* b, int ldb, int n, int k, uint16_t* out) {
  for (int half = 0; half < PANEL; half += 16)
    for (int j = 0; j < k; j += 32) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = half + i < n ? round32(b + static_cast<size_t>(half + i) * ldb + j, k - j)
                            : _mm512_setzero_si512();
      transpose(r);
      uint16_t* at = out + static_cast<size_t>(j) * PANEL + 2 * half;
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(at + static_cast<size_t>(i) * 2 * PANEL, r[i]);
    }
}

void pack(const float* b, int ldb, int n, int k, uint16_t* out) {
  for (int i = 0; i < padded(k); i += 2)
    for (int half = 0; half < PANEL; half += 16, out += 32) {
      const float* row = b + static_cast<size_t>(i) * ldb + half;
      __mmask16 even = i < k ? first(n - half) : 0, odd = i + 1 < k ? first(n - half) : 0;
      // The lower half of r has the numbers of the even row, and the upper half those of the odd row.
      __m512i r = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(odd, row + ldb),
                                               _mm512_maskz_loadu_ps(even, row));
      __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(r));
      __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(r, 1));
      _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/// Multiplies M rows of a by k rows of a panel, of whose columns n are used. Each sum is computed in the
/// order of k, independently of M, n and the position of its row and column.
template <int M>
void block(const uint16_t* a, int lda, const uint16_t* b, int n, int k, float* c, int ldc, bool add) {
  const __mmask16 mask[2] = {first(n), first(n - 16)};
  __m512 sums[M][2];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < 2; ++j)
      sums[i][j] = add ? _mm512_maskz_loadu_ps(mask[j], c + static_cast<size_t>(i) * ldc + 16 * j)
                       : _mm512_setzero_ps();
  for (int p = 0; p < k; p += 2, b += 2 * PANEL) {
    __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + PANEL);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      int pair;
      memcpy(&pair, a + static_cast<size_t>(i) * lda + p, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, b0);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, b1);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < 2; ++j)
      _mm512_mask_storeu_ps(c + static_cast<size_t>(i) * ldc + 16 * j, mask[j], sums[i][j]);
}

using Block = void (*)(const uint16_t*, int, const uint16_t*, int, int, float*, int, bool);
constexpr Block blocks[ROWS + 1] = {nullptr,  block<1>, block<2>, block<3>,  block<4>,  block<5>, block<6>,
                                    block<7>, block<8>, block<9>, block<10>, block<11>, block<12>};

void multiply(const uint16_t* a, const uint16_t* b, int m, int n, int k, float* c, int ldc, bool add) {
  const int lda = padded(k);
  for (int k0 = 0; k0 < lda; k0 += BLOCK) {
    const int length = lda - k0 < BLOCK ? lda - k0 : BLOCK;
    for (int n0 = 0; n0 < n; n0 += PANEL)
      for (int i = 0; i < m; i += ROWS)
        blocks[m - i < ROWS ? m - i : ROWS](a + static_cast<size_t>(i) * lda + k0, lda,
                                            b + panel_at(n0, k0, k), n - n0, length,
                                            c + static_cast<size_t>(i) * ldc + n0, ldc, add || k0);
  }
}

}  // namespace

const Bfloat16 bfloat16_avx512 = {round, pack_transposed, pack, multiply};

}  // namespace segtrain::cpu
