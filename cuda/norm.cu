// RMS norm, with the residual sum before it, and both gradients. A warp has a row of up to 256·PACKS columns in registers.

namespace segtrain {

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

/// A warp's row.
struct Row {
  size_t begin;
  int col;
  bool mine;
  __device__ Row(int m, int n) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    begin = static_cast<size_t>(row) * n, col = threadIdx.x % 32 * 8, mine = row < m;
  }
};

/// h = x + r, y = h / sqrt(mean h² + eps)·w. Without SUM h is x, and is not written.
template <int PACKS, bool SUM, typename T, typename W>
__device__ void rms_norm(const T* x, const T* r, const W* w, int m, int n, float eps, T* h, T* y) {
  const Row at(m, n);
  if (!at.mine) return;
  Pack<T> row[PACKS];
  float squares = 0;
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int col = at.col + p * 256;
    if (col >= n) break;
    row[p] = *reinterpret_cast<const Pack<T>*>(x + at.begin + col);
    if constexpr (SUM) {
      const Pack<T> more = *reinterpret_cast<const Pack<T>*>(r + at.begin + col);
#pragma unroll
      for (int i = 0; i < 8; ++i) put(row[p].x[i], to_float(row[p].x[i]) + to_float(more.x[i]));
      *reinterpret_cast<Pack<T>*>(h + at.begin + col) = row[p];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += to_float(row[p].x[i]) * to_float(row[p].x[i]);
  }
  const float inverse = rsqrtf(warp_sum(squares) / n + eps);
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int col = at.col + p * 256;
    if (col >= n) break;
    const Pack<W> weight = *reinterpret_cast<const Pack<W>*>(w + col);
#pragma unroll
    for (int i = 0; i < 8; ++i) put(row[p].x[i], to_float(row[p].x[i]) * inverse * to_float(weight.x[i]));
    *reinterpret_cast<Pack<T>*>(y + at.begin + col) = row[p];
  }
}

/// dx = s·(g − h·s²·mean(g·h)) + dh, g = dy·w, s = 1 / sqrt(mean h² + eps). Without SUM there is no dh.
template <int PACKS, bool SUM, typename T, typename W>
__device__ void rms_norm_vjp(const T* h, const T* dy, const T* dh, const W* w, int m, int n, float eps, T* dx) {
  const Row at(m, n);
  if (!at.mine) return;
  Pack<T> row[PACKS], d[PACKS];
  float squares = 0, dot = 0;
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int col = at.col + p * 256;
    if (col >= n) break;
    row[p] = *reinterpret_cast<const Pack<T>*>(h + at.begin + col);
    d[p] = *reinterpret_cast<const Pack<T>*>(dy + at.begin + col);
    const Pack<W> weight = *reinterpret_cast<const Pack<W>*>(w + col);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = to_float(row[p].x[i]);
      squares += x * x, dot += x * to_float(d[p].x[i]) * to_float(weight.x[i]);
    }
  }
  const float s = rsqrtf(warp_sum(squares) / n + eps), mean = warp_sum(dot) / n * s * s;
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    const int col = at.col + p * 256;
    if (col >= n) break;
    const Pack<W> weight = *reinterpret_cast<const Pack<W>*>(w + col);
    Pack<T> more;
    if constexpr (SUM) more = *reinterpret_cast<const Pack<T>*>(dh + at.begin + col);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      put(d[p].x[i], s * (to_float(d[p].x[i]) * to_float(weight.x[i]) - to_float(row[p].x[i]) * mean) +
                         (SUM ? to_float(more.x[i]) : 0));
    *reinterpret_cast<Pack<T>*>(dx + at.begin + col) = d[p];
  }
}

}  // namespace segtrain

// Bodies, each behind a line that names the kernel, its inputs and its outputs; all take PACKS. at = {m, n}, args = {eps}.

//: rms_norm: x weight at args -> y
rms_norm<PACKS, false>(x, x, weight, at[0], at[1], args[0], y, y);
//: add_rms_norm: x r weight at args -> h y
rms_norm<PACKS, true>(x, r, weight, at[0], at[1], args[0], h, y);
//: rms_norm_vjp: h dy weight at args -> dx
rms_norm_vjp<PACKS, false>(h, dy, dy, weight, at[0], at[1], args[0], dx);
//: add_rms_norm_vjp: h dy dh weight at args -> dx
rms_norm_vjp<PACKS, true>(h, dy, dh, weight, at[0], at[1], args[0], dx);
