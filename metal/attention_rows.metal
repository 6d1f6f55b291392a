// Softmax over the rows of a block of scores, and its derivative, for blocked attention. Blocked attention
// computes everything else with plain matrix products.
//
// There are R = B*G*share*nq rows and nk columns: B is the batch size, G the number of key/value heads, `share`
// the number of query heads per key/value head, nq the number of queries in the block, and nk the number of
// keys in each row. Row r is query t = q0 + i with i = r % nq, and its column c is key k0 + i / period * period
// + c, so with a window the keys move along with the queries. Query t sees the keys first[t] to q_start + t;
// `first` has at least q0 + nq elements. s, dp [R, nk] are in the dtype T or float32; p, ds [R, nk] are in T;
// lse, delta [R] are float32; first is int32.
//
//   function           threads per group    grid        per group
//   softmax_rows       256                  256, R      a row
//   softmax_vjp_rows   256                  256, R      a row

using namespace metal;

namespace segtrain {

// The columns [begin, end) of a row that its query sees.
struct Seen {
  int begin, end;
};
template <typename Ints>
Seen seen(Ints first, int q_start, int q0, int k0, int nq, int period, int nk, uint row) {
  const int i = int(row) % nq, t = q0 + i;
  k0 += i / period * period;
  return {clamp(first[t] - k0, 0, nk), clamp(q_start + t + 1 - k0, 0, nk)};
}

template <bool CAP>
float capped(float s, float cap) {
  return CAP ? cap * tanh(s / cap) : s;
}

template <int THREADS, bool CAP, typename T, typename Scores, typename Ints>
void softmax_rows(Scores s, Ints first, int q_start, int q0, int k0, int nq, int period, int nk, float cap,
                  device T* p, device float* lse, threadgroup float* tops, threadgroup float* sums, uint row,
                  uint thread_index, uint simd, uint lane) {
  s += size_t(row) * nk;
  p += size_t(row) * nk;
  const Seen see = seen(first, q_start, q0, k0, nq, period, nk, row);

  /// m = max S, l = sum of exp(S - m) over the keys that the row sees, S capped
  float m = -INFINITY, l = 0;
  for (int c = see.begin + int(thread_index); c < see.end; c += THREADS) {
    const float x = capped<CAP>(float(s[c]), cap);
    if (x > m) {
      l *= fast::exp(m - x);
      m = x;
    }
    l += fast::exp(x - m);
  }

  // Reduces over this thread's columns first, and then over the row.
  const float simd_top = simd_max(m);
  const float simd_l = simd_sum(l > 0 ? l * fast::exp(m - simd_top) : 0.0f);
  if (lane == 0) {
    tops[simd] = simd_top;
    sums[simd] = simd_l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  m = -INFINITY;
  for (int i = 0; i < THREADS / 32; ++i) m = max(m, tops[i]);
  l = 0;
  for (int i = 0; i < THREADS / 32; ++i) l += sums[i] > 0 ? sums[i] * fast::exp(tops[i] - m) : 0.0f;

  /// lse = m + log l, P = exp(S - lse), 0 where unseen
  const float row_lse = l > 0 ? m + log(l) : -INFINITY;
  if (thread_index == 0) lse[row] = row_lse;
  for (int c = thread_index; c < nk; c += THREADS)
    p[c] = c < see.begin || c >= see.end ? T(0.0f) : T(fast::exp(capped<CAP>(float(s[c]), cap) - row_lse));
}

template <int THREADS, bool CAP, typename T, typename Scores, typename Rows, typename Ints>
void softmax_vjp_rows(Scores s, Scores dp, Rows lse, Rows delta, Ints first, int q_start, int q0, int k0, int nq,
                      int period, int nk, float scale, float cap, device T* p, device T* ds, uint row,
                      uint thread_index) {
  const size_t at = size_t(row) * nk;
  const Seen see = seen(first, q_start, q0, k0, nq, period, nk, row);
  const float row_lse = lse[row], row_delta = delta[row];

  /// P = exp(S - lse), dS = P (dP - delta) scale (1 - (S/c)^2) with S capped, 0 where unseen
  for (int c = thread_index; c < nk; c += THREADS) {
    float p_c = 0, ds_c = 0;
    if (c >= see.begin && c < see.end) {
      const float x = capped<CAP>(float(s[at + c]), cap);
      p_c = fast::exp(x - row_lse);
      ds_c = p_c * (float(dp[at + c]) - row_delta) * scale;
      if (CAP) ds_c *= 1 - (x / cap) * (x / cap);
    }
    p[at + c] = T(p_c);
    ds[at + c] = T(ds_c);
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. T, CAP and THREADS are
// constants in both of them.
//: softmax_rows: s first q_start q0 k0 nq period cap -> p lse
threadgroup float tops[THREADS / 32];
threadgroup float sums[THREADS / 32];
segtrain::softmax_rows<THREADS, CAP>(
    s, first, q_start, q0, k0, nq, period, s_shape[1], cap, p, lse, tops, sums, threadgroup_position_in_grid.y,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
//: softmax_vjp_rows: s dp lse delta first q_start q0 k0 nq period scale cap -> p ds
segtrain::softmax_vjp_rows<THREADS, CAP>(
    s, dp, lse, delta, first, q_start, q0, k0, nq, period, s_shape[1], scale, cap, p, ds,
    threadgroup_position_in_grid.y, thread_index_in_threadgroup);
