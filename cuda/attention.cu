// Attention in tiles of queries × keys on the tensor cores. For the derivation, see docs/attention.md. The CPU twin is
// csrc/ops/attention/cpu.cpp.
//
// q, o [B,H,T,D], k, v [B,G,S,D]: B batch, H query heads, G key/value heads (each for a group of H/G query heads), T
// queries, S keys, D head size; b, h and g are indices. attention and attention_dq use one thread block per (tile of
// queries, b, h) and 16·MT queries per warp; p and ds stay in registers. attention_dkv uses one thread block per (tile
// of keys, b, g, part of the group's heads), so only one block writes each element of dk and dv; its warps form a WM ×
// WN grid and exchange pᵀ and dsᵀ through shared memory. Query t sees the keys first[t] … q_start + t, and `first` is
// non-decreasing, so the key tiles that a query tile sees form one range, and so do the query tiles that see a key
// tile. The tile shapes and the launch parameters depend only on D; see struct Shapes.
//
// These kernels run on every GPU with tensor cores. On Hopper, attention_hopper.cu is used for the calls that it
// supports, because Hopper's own matrix instructions are up to 1.6 times as fast as the instructions that these kernels
// use.

namespace segtrain {

// ---- tiles in shared memory: a row has LD = DP + 8 elements, so that the 16-byte pieces of eight rows are in
// different banks

/// Copies x [rows, D] to the tile [ROWS, DP] and fills the rest of the tile with zeros.
template <int ROWS, int D, int DP, int THREADS, typename T>
__device__ inline void copy_tile(T* tile, const T* x, int rows) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * DP / 8; i += THREADS) {
    int row = i / (DP / 8), col = i % (DP / 8) * 8;
    bool ok = row < rows && col < D;
    copy_async<16>(shared_address(tile + row * (DP + 8) + col), x + (ok ? static_cast<size_t>(row) * D + col : 0), ok);
  }
}

/// c [16·MT, 8·NT] += a [16·MT, K] · b, where a is in shared memory.
template <int K, bool B_DOWN, typename T, int MT, int NT>
__device__ inline void product(float (&c)[MT][NT][4], const T* a, int lda, const T* b, int ldb) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    unsigned r[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) load_block<false>(r[m], a + m * 16 * lda + k, lda);
    step<T, B_DOWN>(c, r, B_DOWN ? b + k * ldb : b + k, ldb);
  }
}

/// c [16·MT, 8·NT] += a [16·MT, 8·KT] · b [8·KT, 8·NT], where a consists of the accumulators of another matrix product:
/// two 16×8 accumulator tiles have the layout of one 16×16 block.
template <typename T, int MT, int NT, int KT>
__device__ inline void product(float (&c)[MT][NT][4], const float (&a)[MT][KT][4], const T* b, int ldb) {
#pragma unroll
  for (int k = 0; k < KT; k += 2) {
    unsigned r[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) r[m][i] = pack2<T>(a[m][k + i / 2][i % 2 * 2], a[m][k + i / 2][i % 2 * 2 + 1]);
    step<T, true>(c, r, b + k * 8 * ldb, ldb);
  }
}

/// Writes scale·c to y [.., D], for rows below `rows` and columns below `cols`.
template <typename T, int MT, int NT>
__device__ inline void store_rows(T* y, int ld, int rows, int cols, const float (&c)[MT][NT][4], float scale) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      int row = m * 16 + row_of(i);
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n * 8 >= cols) continue;
        struct alignas(2 * sizeof(T)) Pair {
          T x[2];
        } pair;
        put(pair.x[0], c[m][n][i] * scale), put(pair.x[1], c[m][n][i + 1] * scale);
        *reinterpret_cast<Pair*>(y + static_cast<size_t>(row) * ld + n * 8 + col_of(i)) = pair;
      }
    }
}

// ---- the tiles

/// Tile shapes for each head size, chosen for 227 KB of shared memory and 255 registers per thread.
template <int D>
struct Shapes {
  static constexpr int DP = D <= 128 ? (D + 31) / 32 * 32 : (D + 63) / 64 * 64, LD = DP + 8;
  // For D ≤ 128, a warp has enough registers for 32 queries, so k and v are read half as often. Two blocks also fit on
  // a multiprocessor.
  static constexpr int MT = D <= 128 ? 2 : 1, WARPS = D <= 128 ? 4 : 8, BQ = 16 * MT * WARPS;
  static constexpr int BK = D <= 128 ? 32 : 64, BK_DQ = 32;
  static constexpr int WM = D <= 128 ? 4 : 2, WN = 8 / WM, BK_DKV = 32 * WM, BQ_DKV = 64;
  static constexpr int FORWARD_BYTES = (BQ + 4 * BK) * LD * 2;
  static constexpr int DQ_BYTES = (2 * BQ + 4 * BK_DQ) * LD * 2;
  static constexpr int DKV_BYTES = (2 * BK_DKV + 4 * BQ_DKV) * LD * 2 + 2 * BK_DKV * (BQ_DKV + 8) * 2 + 4 * BQ_DKV * 4;
};

// ---- o, lse

template <int D, bool CAP, typename T>
__device__ void attention(const T* q, const T* k, const T* v, Call c, T* o, float* lse) {
  using X = Shapes<D>;
  constexpr int MT = X::MT, BQ = X::BQ, BK = X::BK, LD = X::LD, DP = X::DP, THREADS = X::WARPS * 32, NT = BK / 8;
  const QueryTile t(c, BQ);
  const Score<CAP> score(c);
  const int w0 = threadIdx.x / 32 * 16 * MT, q_warp = t.q0 + w0;
  T *q_tile = shared_tiles<T>(), *k_tile = q_tile + BQ * LD, *v_tile = k_tile + 2 * BK * LD;
  k += t.bg * c.S * D, v += t.bg * c.S * D;

  auto copy_keys = [&](int k0, int stage) {
    copy_tile<BK, D, DP, THREADS>(k_tile + stage * BK * LD, k + static_cast<size_t>(k0) * D, c.S - k0);
    copy_tile<BK, D, DP, THREADS>(v_tile + stage * BK * LD, v + static_cast<size_t>(k0) * D, c.S - k0);
  };
  copy_tile<BQ, D, DP, THREADS>(q_tile, q + (t.bh * c.T + t.q0) * D, t.rows);
  copy_keys(t.k_begin, 0);

  float sum[MT][DP / 8][4] = {}, m[MT][2], l[MT][2] = {};
#pragma unroll
  for (int i = 0; i < MT; ++i) m[i][0] = m[i][1] = -infinity();

  for (int k0 = t.k_begin, stage = 0; k0 < t.k_end; k0 += BK, stage ^= 1) {
    wait_copies();
    __syncthreads();
    if (k0 + BK < t.k_end) copy_keys(k0 + BK, stage ^ 1);
    if (k0 > c.q_start + q_warp + 16 * MT - 1 || k0 + BK <= c.first_of(q_warp)) continue;

    /// S = scale·q·kᵀ, capped
    float s[MT][NT][4] = {};
    product<DP, false>(s, q_tile + w0 * LD, LD, k_tile + stage * BK * LD, LD);
    const bool all = c.all_seen(q_warp, q_warp + 16 * MT, k0, k0 + BK);
#pragma unroll
    for (int a = 0; a < MT; ++a)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[a][n][i] = score(s[a][n][i]);
    if (!all) {
#pragma unroll
      for (int a = 0; a < MT; ++a)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = q_warp + a * 16 + row_of(i), begin = c.first_of(query) - k0, end = c.q_start + query - k0;
#pragma unroll
          for (int n = 0; n < NT; ++n)
            if (n * 8 + col_of(i) < begin || n * 8 + col_of(i) > end) s[a][n][i] = -infinity();
        }
    }

    /// Online softmax: rescales the sums, which are relative to the old maximum.
#pragma unroll
    for (int a = 0; a < MT; ++a)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = m[a][r];
#pragma unroll
        for (int n = 0; n < NT; ++n) top = fmaxf(top, fmaxf(s[a][n][2 * r], s[a][n][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float base = top == -infinity() ? 0 : top, shrink = exp2_of(m[a][r] - base);
        m[a][r] = top;
        l[a][r] *= shrink;
#pragma unroll
        for (int n = 0; n < DP / 8; ++n) sum[a][n][2 * r] *= shrink, sum[a][n][2 * r + 1] *= shrink;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) l[a][r] += s[a][n][i] = exp2_of(s[a][n][i] - base);
      }

    /// O += P·V
    product(sum, s, v_tile + stage * BK * LD, LD);
  }

  /// O/l, lse = m + log l
#pragma unroll
  for (int a = 0; a < MT; ++a)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = l[a][r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const float inverse = total > 0 ? 1 / total : 0;
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) sum[a][n][2 * r] *= inverse, sum[a][n][2 * r + 1] *= inverse;
      const int row = w0 + a * 16 + row_of(2 * r);
      if (threadIdx.x % 4 == 0 && row < t.rows)
        lse[t.bh * c.T + t.q0 + row] = total > 0 ? m[a][r] * LN2 + logf(total) : -infinity();
    }
  store_rows(o + (t.bh * c.T + q_warp) * D, D, t.rows - w0, D, sum, 1);
}

// ---- dq

template <int D, bool CAP, typename T>
__device__ void attention_dq(const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o,
                             Call c, T* dq) {
  using X = Shapes<D>;
  constexpr int MT = X::MT, BQ = X::BQ, BK = X::BK_DQ, LD = X::LD, DP = X::DP, THREADS = X::WARPS * 32, NT = BK / 8;
  const QueryTile t(c, BQ);
  const Score<CAP> score(c);
  const int w0 = threadIdx.x / 32 * 16 * MT, q_warp = t.q0 + w0;
  T *q_tile = shared_tiles<T>(), *do_tile = q_tile + BQ * LD, *k_tile = do_tile + BQ * LD, *v_tile = k_tile + 2 * BK * LD;
  k += t.bg * c.S * D, v += t.bg * c.S * D;

  auto copy_keys = [&](int k0, int stage) {
    copy_tile<BK, D, DP, THREADS>(k_tile + stage * BK * LD, k + static_cast<size_t>(k0) * D, c.S - k0);
    copy_tile<BK, D, DP, THREADS>(v_tile + stage * BK * LD, v + static_cast<size_t>(k0) * D, c.S - k0);
  };
  copy_tile<BQ, D, DP, THREADS>(q_tile, q + (t.bh * c.T + t.q0) * D, t.rows);
  copy_tile<BQ, D, DP, THREADS>(do_tile, d_o + (t.bh * c.T + t.q0) * D, t.rows);
  copy_keys(t.k_begin, 0);

  float sum[MT][DP / 8][4] = {}, lse_r[MT][2], delta_r[MT][2];
#pragma unroll
  for (int a = 0; a < MT; ++a)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const size_t row = t.bh * c.T + min(c.T - 1, q_warp + a * 16 + row_of(2 * r));
      lse_r[a][r] = lse[row] * LOG2E, delta_r[a][r] = delta[row];
    }

  for (int k0 = t.k_begin, stage = 0; k0 < t.k_end; k0 += BK, stage ^= 1) {
    wait_copies();
    __syncthreads();
    if (k0 + BK < t.k_end) copy_keys(k0 + BK, stage ^ 1);
    if (k0 > c.q_start + q_warp + 16 * MT - 1 || k0 + BK <= c.first_of(q_warp)) continue;

    /// P = exp(S − lse), dP = dO·Vᵀ
    float s[MT][NT][4] = {}, dp[MT][NT][4] = {};
    product<DP, false>(s, q_tile + w0 * LD, LD, k_tile + stage * BK * LD, LD);
    product<DP, false>(dp, do_tile + w0 * LD, LD, v_tile + stage * BK * LD, LD);

    /// dS = P·(dP − delta)
    const bool all = c.all_seen(q_warp, q_warp + 16 * MT, k0, k0 + BK);
#pragma unroll
    for (int a = 0; a < MT; ++a)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = q_warp + a * 16 + row_of(i);
        const int begin = all ? 0 : c.first_of(query) - k0, end = all ? BK : c.q_start + query - k0;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float y = score(s[a][n][i]);
          const bool see = begin <= n * 8 + col_of(i) && n * 8 + col_of(i) <= end;
          const float p = see ? exp2_of(y - lse_r[a][i / 2]) : 0;
          s[a][n][i] = p * (dp[a][n][i] - delta_r[a][i / 2]) * score.slope(y);
        }
      }

    /// dQ += dS·K
    product(sum, s, k_tile + stage * BK * LD, LD);
  }
  /// dQ·scale
  store_rows(dq + (t.bh * c.T + q_warp) * D, D, t.rows - w0, D, sum, c.scale);
}

// ---- dk, dv

/// Computes dk and dv [B,G,parts,S,D]. Each part is the sum over 1/parts of the query heads of a group.
template <int D, bool CAP, typename T, typename Out>
__device__ void attention_dkv(const T* q, const T* k, const T* v, const float* lse, const float* delta, const T* d_o,
                              Call c, int parts, Out* dk, Out* dv) {
  using X = Shapes<D>;
  constexpr int BK = X::BK_DKV, BQ = X::BQ_DKV, LD = X::LD, LP = BQ + 8, DP = X::DP, THREADS = 256;
  constexpr int NQ = BQ / X::WN / 8, ND = DP / X::WN / 8;  // columns of pᵀ and of dk per warp, divided by 8
  const int jobs = c.B * c.G * parts, share = c.H / c.G / parts;
  const size_t job = blockIdx.x % jobs, bg = job / parts;
  // Blocks for the first keys start first: with a causal mask, most queries see these keys, so these blocks take the
  // longest.
  const int k0 = blockIdx.x / jobs * BK;
  const size_t bh = bg / c.G * c.H + (bg % c.G * parts + job % parts) * share;
  const int wm = threadIdx.x / 32 / X::WN * 32, wn = threadIdx.x / 32 % X::WN;
  const Score<CAP> score(c);

  T *k_tile = shared_tiles<T>(), *v_tile = k_tile + BK * LD, *q_tile = v_tile + BK * LD, *do_tile = q_tile + 2 * BQ * LD;
  T *p_tile = do_tile + 2 * BQ * LD, *ds_tile = p_tile + BK * LP;
  float *lse_tile = reinterpret_cast<float*>(ds_tile + BK * LP), *delta_tile = lse_tile + 2 * BQ;

  // The loop runs over the queries that see the tile, once for each head.
  const int q_begin = max(0, k0 - c.q_start), q_end = queries_before(c, k0 + BK);
  auto copy_queries = [&](int head, int q0, int stage) {
    const size_t row = (bh + head) * c.T + q0;
    const int rows = c.T - q0;
    copy_tile<BQ, D, DP, THREADS>(q_tile + stage * BQ * LD, q + row * D, rows);
    copy_tile<BQ, D, DP, THREADS>(do_tile + stage * BQ * LD, d_o + row * D, rows);
    if (threadIdx.x < 2 * BQ) {
      const int i = threadIdx.x % BQ, ok = i < rows;
      copy_async<4>(shared_address((threadIdx.x < BQ ? lse_tile : delta_tile) + stage * BQ + i),
                    (threadIdx.x < BQ ? lse : delta) + row + (ok ? i : 0), ok);
    }
  };
  copy_tile<BK, D, DP, THREADS>(k_tile, k + (bg * c.S + k0) * D, c.S - k0);
  copy_tile<BK, D, DP, THREADS>(v_tile, v + (bg * c.S + k0) * D, c.S - k0);
  if (q_begin < q_end) copy_queries(0, q_begin, 0);

  float sum_k[2][ND][4] = {}, sum_v[2][ND][4] = {};
  for (int head = 0, q0 = q_begin, stage = 0; head < share && q_begin < q_end; stage ^= 1) {
    const int next_q0 = q0 + BQ < q_end ? q0 + BQ : q_begin, next_head = head + (next_q0 == q_begin);
    wait_copies();
    __syncthreads();
    if (next_head < share) copy_queries(next_head, next_q0, stage ^ 1);
    const T *q_now = q_tile + stage * BQ * LD, *do_now = do_tile + stage * BQ * LD;

    /// P = exp(S − lse), dP = dO·Vᵀ, both transposed
    const int n0 = wn * NQ * 8;
    float s[2][NQ][4] = {}, dp[2][NQ][4] = {};
    product<DP, false>(s, k_tile + wm * LD, LD, q_now + n0 * LD, LD);
    product<DP, false>(dp, v_tile + wm * LD, LD, do_now + n0 * LD, LD);

    /// dS = P·(dP − delta)
    const bool all = c.all_seen(q0, q0 + BQ, k0, k0 + BK);
#pragma unroll
    for (int n = 0; n < NQ; ++n) {
      float p[2][4], ds[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int col = n0 + n * 8 + col_of(j), query = q0 + col;
        const float lse_r = lse_tile[stage * BQ + col] * LOG2E, delta_r = delta_tile[stage * BQ + col];
        const int begin = all ? 0 : c.first_of(query) - k0, end = all ? BK : c.q_start + query - k0;
#pragma unroll
        for (int a = 0; a < 2; ++a)
#pragma unroll
          for (int i = j; i < 4; i += 2) {
            const int key = wm + a * 16 + row_of(i);
            const float y = score(s[a][n][i]);
            p[a][i] = begin <= key && key <= end ? exp2_of(y - lse_r) : 0;
            ds[a][i] = p[a][i] * (dp[a][n][i] - delta_r) * score.slope(y);
          }
      }
#pragma unroll
      for (int a = 0; a < 2; ++a)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int to = (wm + a * 16 + row_of(i)) * LP + n0 + n * 8 + col_of(0);
          *reinterpret_cast<unsigned*>(p_tile + to) = pack2<T>(p[a][i], p[a][i + 1]);
          *reinterpret_cast<unsigned*>(ds_tile + to) = pack2<T>(ds[a][i], ds[a][i + 1]);
        }
    }
    __syncthreads();

    /// dV += Pᵀ·dO, dK += dSᵀ·Q
    product<BQ, true>(sum_v, p_tile + wm * LP, LP, do_now + wn * ND * 8, LD);
    product<BQ, true>(sum_k, ds_tile + wm * LP, LP, q_now + wn * ND * 8, LD);
    head = next_head, q0 = next_q0;
  }
  wait_copies();
  /// dK·scale
  const size_t out = (job * c.S + k0 + wm) * D + wn * ND * 8;
  store_rows(dk + out, D, c.S - k0 - wm, D - wn * ND * 8, sum_k, c.scale);
  store_rows(dv + out, D, c.S - k0 - wm, D - wn * ND * 8, sum_v, 1);
}

/// y [B·G, n] is the sum over the parts of x [B·G, parts, n]. Each thread computes four elements.
template <typename T>
__device__ void sum_parts(const float* x, int parts, size_t n, size_t at, T* y) {
  const size_t from = at / n * parts * n + at % n;
  float sum[4] = {};
  for (int part = 0; part < parts; ++part) {
    const float4 more = *reinterpret_cast<const float4*>(x + from + part * n);
    sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
  }
  *reinterpret_cast<uint2*>(y + at) = make_uint2(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]));
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. D and CAP are constants in all
// of them. at = {q_start, parts, B, H, G, T, S}, args = {scale, cap}.

//: attention: q k v first at args -> o lse
using X = Shapes<D>;
static_assert(ROWS == X::BQ && THREADS == X::WARPS * 32 && SHARED_BYTES == X::FORWARD_BYTES);
attention<D, CAP>(q, k, v, make_call(first, at, args), o, lse);
//: attention_vjp_q: q k v lse delta d_o first at args -> dq
using X = Shapes<D>;
static_assert(ROWS == X::BQ && THREADS == X::WARPS * 32 && SHARED_BYTES == X::DQ_BYTES);
attention_dq<D, CAP>(q, k, v, lse, delta, d_o, make_call(first, at, args), dq);
//: attention_vjp_kv: q k v lse delta d_o first at args -> dk dv
using X = Shapes<D>;
static_assert(ROWS == X::BK_DKV && THREADS == 32 * X::WM * X::WN && SHARED_BYTES == X::DKV_BYTES);
attention_dkv<D, CAP>(q, k, v, lse, delta, d_o, make_call(first, at, args), at[1], dk, dv);
//: attention_delta: o d_o at -> delta
row_dot(o, d_o, at[2] * at[3] * at[5], D, delta);
//: attention_sum_parts: dk_parts dv_parts at -> dk dv
const size_t n = static_cast<size_t>(at[6]) * D, i = (static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x) * 4;
if (i < at[2] * at[4] * n) {
  sum_parts(dk_parts, at[1], n, i, dk);
  sum_parts(dv_parts, at[1], n, i, dv);
}
