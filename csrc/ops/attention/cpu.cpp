// Computes attention in tiles of queries × keys. For the derivation and the names, see docs/attention.md.
#include "ops/attention/cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/blas.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace segtrain::cpu {

namespace {

constexpr int BQ = 128, BK = 256;

/// The part of a tile's row that the query sees: columns [begin, end), relative to the tile's first key.
struct Seen {
  int begin, end;
};

Seen seen(const Attention& a, int query, int k0, int k1) {
  int last = a.q_start + query + 1;
  return {std::clamp(a.first[query] - k0, 0, k1 - k0), std::clamp(last - k0, 0, k1 - k0)};
}

/// Returns the range of key tiles that queries [q0, q1) see.
Seen tiles(const Attention& a, int q0, int q1) {
  return {a.first[q0] / BK, (a.q_start + q1 + BK - 1) / BK};
}

/// Computes S = scale·q·kᵀ, softcapped. [nq, nk]
void scores(const Attention& a, const float* q, const float* k, int nq, int nk, float* s) {
  gemm(false, true, nq, nk, a.d, a.scale, q, a.d, k, a.d, 0, s, nk);
  if (a.cap > 0) rows().softcap(s, nq * nk, a.cap);
}

/// Sets x outside [begin, end) to 0.
void keep_only(float* x, int n, Seen s) {
  std::fill(x, x + s.begin, 0.0f);
  std::fill(x + std::max(s.begin, s.end), x + n, 0.0f);
}

}  // namespace

size_t attention_scratch(const Attention& a, bool backward) {
  const int jobs = a.batch * a.heads * (backward ? 1 : (a.t + BQ - 1) / BQ);
  const int arrays = backward ? 2 + (a.cap > 0) : 1;
  return sizeof(float) * std::min(n_threads(), jobs) * arrays * BQ * BK;
}

void attention(const Attention& a, const float* q, const float* k, const float* v, float* o, float* lse) {
  const int q_tiles = (a.t + BQ - 1) / BQ, share = a.heads / a.groups;
  parallel_for(a.batch * a.heads * q_tiles, [&](int job) {
    // The last tiles are processed first, because with a causal mask they need the most work.
    const int q0 = (q_tiles - 1 - job / (a.batch * a.heads)) * BQ, q1 = std::min(a.t, q0 + BQ), nq = q1 - q0;
    const size_t bh = job % (a.batch * a.heads), bg = bh / a.heads * a.groups + bh % a.heads / share;
    const float* q_tile = q + (bh * a.t + q0) * a.d;
    float* o_tile = o + (bh * a.t + q0) * a.dv;
    float* lse_tile = lse + bh * a.t + q0;
    Scratch s(static_cast<size_t>(BQ) * BK);
    std::vector<float> m(nq, -INFINITY), l(nq, 0.0f);
    std::fill(o_tile, o_tile + static_cast<size_t>(nq) * a.dv, 0.0f);

    auto range = tiles(a, q0, q1);
    for (int j = range.begin; j < range.end; ++j) {
      const int k0 = j * BK, k1 = std::min(a.s, k0 + BK), nk = k1 - k0;
      /// S = scale·q·kᵀ, capped
      scores(a, q_tile, k + (bg * a.s + k0) * a.d, nq, nk, s);
      /// Online softmax: rescales the sums, which are relative to the old maximum.
      for (int i = 0; i < nq; ++i) {
        float* row = s + static_cast<size_t>(i) * nk;
        auto see = seen(a, q0 + i, k0, k1);
        keep_only(row, nk, see);
        if (see.begin >= see.end) continue;
        float top = std::max(m[i], rows().max(row + see.begin, see.end - see.begin));
        float sum = rows().exp_sum(row + see.begin, see.end - see.begin, top);
        if (top > m[i] && l[i] > 0) {
          float shrink = std::exp(m[i] - top);
          l[i] *= shrink;
          rows().scale(o_tile + static_cast<size_t>(i) * a.dv, a.dv, shrink);
        }
        m[i] = top;
        l[i] += sum;
      }
      /// O += P·V
      gemm(false, false, nq, a.dv, nk, 1, s, nk, v + (bg * a.s + k0) * a.dv, a.dv, 1, o_tile, a.dv);
    }
    /// O/l, lse = m + log l
    for (int i = 0; i < nq; ++i) {
      if (l[i] > 0) rows().scale(o_tile + static_cast<size_t>(i) * a.dv, a.dv, 1 / l[i]);
      lse_tile[i] = l[i] > 0 ? m[i] + std::log(l[i]) : -INFINITY;
    }
  });
}

void attention_vjp(const Attention& a, const float* q, const float* k, const float* v, const float* o,
                   const float* lse, const float* d_o, float* dq, float* dk, float* dv) {
  const int share = a.heads / a.groups, q_tiles = (a.t + BQ - 1) / BQ;
  // Each job handles one query head, so each part of dq, dk and dv is written by only one thread, and sums
  // have a fixed order.
  parallel_for(a.batch * a.heads, [&](int job) {
    const size_t bh = job, bg = bh / a.heads * a.groups + bh % a.heads / share;
    const float *q_bh = q + bh * a.t * a.d, *k_bg = k + bg * a.s * a.d, *v_bg = v + bg * a.s * a.dv;
    const float *o_bh = o + bh * a.t * a.dv, *do_bh = d_o + bh * a.t * a.dv, *lse_bh = lse + bh * a.t;
    float *dq_bh = dq + bh * a.t * a.d, *dk_bh = dk + bh * a.s * a.d, *dv_bh = dv + bh * a.s * a.dv;
    std::fill(dq_bh, dq_bh + static_cast<size_t>(a.t) * a.d, 0.0f);
    std::fill(dk_bh, dk_bh + static_cast<size_t>(a.s) * a.d, 0.0f);
    std::fill(dv_bh, dv_bh + static_cast<size_t>(a.s) * a.dv, 0.0f);
    Scratch p(static_cast<size_t>(BQ) * BK), dp(static_cast<size_t>(BQ) * BK);
    Scratch capped(a.cap > 0 ? static_cast<size_t>(BQ) * BK : 0);
    std::vector<float> delta(BQ);

    for (int tile = 0; tile < q_tiles; ++tile) {
      const int q0 = tile * BQ, q1 = std::min(a.t, q0 + BQ), nq = q1 - q0;
      const float *q_tile = q_bh + static_cast<size_t>(q0) * a.d,
                  *do_tile = do_bh + static_cast<size_t>(q0) * a.dv;
      for (int i = 0; i < nq; ++i)
        delta[i] = rows().dot(o_bh + static_cast<size_t>(q0 + i) * a.dv,
                              do_tile + static_cast<size_t>(i) * a.dv, a.dv);

      auto range = tiles(a, q0, q1);
      for (int j = range.begin; j < range.end; ++j) {
        const int k0 = j * BK, k1 = std::min(a.s, k0 + BK), nk = k1 - k0;
        const float *k_tile = k_bg + static_cast<size_t>(k0) * a.d,
                    *v_tile = v_bg + static_cast<size_t>(k0) * a.dv;
        // P = exp(S − lse), dP = dO·Vᵀ
        scores(a, q_tile, k_tile, nq, nk, p);
        if (a.cap > 0) std::copy(p + 0, p + static_cast<size_t>(nq) * nk, capped + 0);
        gemm(false, true, nq, nk, a.dv, 1, do_tile, a.dv, v_tile, a.dv, 0, dp, nk);
        for (int i = 0; i < nq; ++i) {
          auto see = seen(a, q0 + i, k0, k1);
          float *p_row = p + static_cast<size_t>(i) * nk, *dp_row = dp + static_cast<size_t>(i) * nk;
          keep_only(p_row, nk, see);
          keep_only(dp_row, nk, see);
          int n = see.end - see.begin;
          if (n <= 0) continue;
          rows().exp_scale(p_row + see.begin, n, lse_bh[q0 + i], 1);
          // dS = P·(dP − delta)·scale
          const float* s_row = a.cap > 0 ? capped + static_cast<size_t>(i) * nk + see.begin : nullptr;
          rows().softmax_vjp(dp_row + see.begin, p_row + see.begin, s_row, n, delta[i], a.scale, a.cap);
        }
        // dV += Pᵀ·dO, dK += dSᵀ·Q, dQ += dS·K
        gemm(true, false, nk, a.dv, nq, 1, p, nk, do_tile, a.dv, 1, dv_bh + static_cast<size_t>(k0) * a.dv,
             a.dv);
        gemm(true, false, nk, a.d, nq, 1, dp, nk, q_tile, a.d, 1, dk_bh + static_cast<size_t>(k0) * a.d, a.d);
        gemm(false, false, nq, a.d, nk, 1, dp, nk, k_tile, a.d, 1, dq_bh + static_cast<size_t>(q0) * a.d,
             a.d);
      }
    }
  });
}

}  // namespace segtrain::cpu
