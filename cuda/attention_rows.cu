// The row-wise passes of blocked attention, which computes everything else with plain matrix products. See
// docs/attention.md. On the CPU, csrc/ops/attention/blocked.cpp computes these passes with MLX's ops.
//
// softmax_rows and softmax_vjp_rows use one thread block per row of s [R, cols], where R is the number of rows. Row r
// is query q0 + r % nq, where nq is the number of queries in the block of scores, and it sees the columns first[query]
// − k0 … q_start + query − k0. `at` = {q0, nq, k0, q_start, period, cols}: after every `period` queries, k0 increases
// by `period`, as in the bands of a window. `args` = {scale, cap}. All blocks of scores use the same compiled kernel
// and differ only in these inputs.

namespace segtrain {

constexpr int KEPT = 4;  // packs of s that a thread keeps in registers; each pass reads the other packs again

/// The columns [begin, end) that a row sees.
struct Seen {
  int begin, end;
  __device__ bool has(int col) const { return begin <= col && col < end; }
};

__device__ inline Seen seen(const int* first, const int* at, int row, int cols) {
  int i = row % at[1], query = at[0] + i, k0 = at[2] + i / at[4] * at[4], position = at[3] + query;
  int end = max(0, min(cols, position + 1 - k0));
  return {min(end, max(0, first[query] - k0)), end};
}

/// Returns x[col … col + 8) as float32. Columns that the row does not see are not read; their value is `other`.
template <typename T>
__device__ void load(const T* x, int col, Seen see, bool aligned, float other, float (&y)[8]) {
  if (aligned) {
    auto pack = *reinterpret_cast<const Pack<T>*>(x + col);
    for (int i = 0; i < 8; ++i) y[i] = see.has(col + i) ? to_float(pack.x[i]) : other;
  } else {
    for (int i = 0; i < 8; ++i) y[i] = see.has(col + i) ? to_float(x[col + i]) : other;
  }
}

template <typename T>
__device__ void store(T* y, int col, int cols, bool aligned, const float (&x)[8]) {
  Pack<T> pack;
  for (int i = 0; i < 8; ++i) put(pack.x[i], x[i]);
  if (aligned) {
    *reinterpret_cast<Pack<T>*>(y + col) = pack;
  } else {
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) y[col + i] = pack.x[i];
  }
}

/// Writes zeros to all packs outside [begin, end).
template <typename T>
__device__ void store_zeros(T* y, int begin, int end, int cols, bool aligned) {
  const float zeros[8] = {};
  for (int col = threadIdx.x * 8; col < begin; col += blockDim.x * 8) store(y, col, cols, aligned, zeros);
  for (int col = end + threadIdx.x * 8; col < cols; col += blockDim.x * 8) store(y, col, cols, aligned, zeros);
}

template <typename S, typename T, bool CAP>
__device__ void softmax_rows(const S* s, const int* first, const int* at, const float* args, T* p, float* lse, int cols) {
  const size_t row = blockIdx.x;
  const Seen see = seen(first, at, row, cols);
  const bool aligned = cols % 8 == 0;
  const int begin = see.begin / 8 * 8, end = (see.end + 7) / 8 * 8, stride = blockDim.x * 8;
  const int mine = begin + threadIdx.x * 8, rest = mine + KEPT * stride;
  s += row * cols;
  p += row * cols;

  /// m = max S, l = sum of exp(S − m) over the keys that the row sees, S capped
  auto scores = [&](int col, float (&x)[8]) {
    load(s, col, see, aligned, -infinity(), x);
    for (int i = 0; i < 8; ++i)
      if (CAP) x[i] = see.has(col + i) ? args[1] * tanh_of(x[i] / args[1]) : -infinity();
  };
  float kept[KEPT][8], x[8], top = -infinity(), sum = 0;
#pragma unroll
  for (int n = 0; n < KEPT; ++n)
    if (mine + n * stride < end) scores(mine + n * stride, kept[n]);

#pragma unroll
  for (int n = 0; n < KEPT; ++n)
    for (int i = 0; i < 8; ++i)
      if (mine + n * stride < end) top = fmaxf(top, kept[n][i]);
  for (int col = rest; col < end; col += stride) {
    scores(col, x);
    for (int i = 0; i < 8; ++i) top = fmaxf(top, x[i]);
  }
  top = block_reduce<true>(top);
  if (top == -infinity()) top = 0;  // p = 0 in a row that sees no key

  auto exps = [&](float (&y)[8]) {
    for (int i = 0; i < 8; ++i) y[i] = exp2_of((y[i] - top) * LOG2E);
  };
#pragma unroll
  for (int n = 0; n < KEPT; ++n) {
    if (mine + n * stride >= end) continue;
    exps(kept[n]);
    for (int i = 0; i < 8; ++i) sum += kept[n][i];
  }
  for (int col = rest; col < end; col += stride) {
    scores(col, x);
    exps(x);
    for (int i = 0; i < 8; ++i) sum += x[i];
  }
  sum = block_reduce<false>(sum);

  /// lse = m + log l, P = exp(S − lse), 0 where unseen
  const float inverse = sum > 0 ? 1 / sum : 0;
  auto write = [&](int col, float (&y)[8]) {
    for (int i = 0; i < 8; ++i) y[i] *= inverse;
    store(p, col, cols, aligned, y);
  };
#pragma unroll
  for (int n = 0; n < KEPT; ++n)
    if (mine + n * stride < end) write(mine + n * stride, kept[n]);
  for (int col = rest; col < end; col += stride) {
    scores(col, x);
    exps(x);
    write(col, x);
  }
  store_zeros(p, begin, end, cols, aligned);
  if (threadIdx.x == 0) lse[row] = sum > 0 ? top + logf(sum) : -infinity();
}

template <typename S, typename T, bool CAP>
__device__ void softmax_vjp_rows(const S* s, const S* dp, const float* lse, const float* delta, const int* first,
                                 const int* at, const float* args, T* p, T* ds, int cols) {
  const size_t row = blockIdx.x;
  const Seen see = seen(first, at, row, cols);
  const bool aligned = cols % 8 == 0;
  const int begin = see.begin / 8 * 8, end = (see.end + 7) / 8 * 8;
  const float lse_r = lse[row], delta_r = delta[row], scale = args[0], cap = args[1];
  s += row * cols, dp += row * cols, p += row * cols, ds += row * cols;

#pragma unroll 2
  for (int col = begin + threadIdx.x * 8; col < end; col += blockDim.x * 8) {
    float x[8], dx[8];
    load(s, col, see, aligned, 0, x);
    load(dp, col, see, aligned, 0, dx);
    for (int i = 0; i < 8; ++i) {
      /// P = exp(S − lse), dS = P·(dP − delta)·scale·(1 − (S/c)²) with S capped, 0 where unseen
      float t = CAP ? tanh_of(x[i] / cap) : 0, y = CAP ? cap * t : x[i];
      x[i] = see.has(col + i) ? exp2_of((y - lse_r) * LOG2E) : 0;
      dx[i] = x[i] * (dx[i] - delta_r) * scale * (1 - t * t);
    }
    store(p, col, cols, aligned, x);
    store(ds, col, cols, aligned, dx);
  }
  store_zeros(p, begin, end, cols, aligned);
  store_zeros(ds, begin, end, cols, aligned);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. S, T (dtypes) and CAP are
// constants in all of them.

//: softmax_rows: s first at args -> p lse
softmax_rows<S, T, CAP>(s, first, at, args, p, lse, at[5]);
//: softmax_vjp_rows: s dp lse delta first at args -> p ds
softmax_vjp_rows<S, T, CAP>(s, dp, lse, delta, first, at, args, p, ds, at[5]);
