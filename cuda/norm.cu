// RMS norm of m rows, its backward pass, and the residual sums that precede or follow a norm in a layer. The host code
// is in csrc/ops/norm/norm.cpp, the CPU code in csrc/cpu/rows.cpp.
//
// One block processes one row of n elements, where n is a multiple of 8; a thread processes PACKS packs of eight
// neighbouring elements. The elements have the dtype T, and the arithmetic is in float32. As in MLX's kernels, x·r with
// r = 1 / sqrt(mean(x²) + eps) is rounded before it is multiplied by the weight, and dx is rounded once. Residual sums
// add rounded values.

namespace segtrain {

template <int PACKS, typename T>
struct Row {
  float x[PACKS][8];

  /// Returns the column at which pack p of this thread begins.
  static __device__ int column(int p) { return (p * blockDim.x + threadIdx.x) * 8; }

  __device__ void load(const T* row, int n) {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      Pack<T> pack = {};
      if (column(p) < n) pack = *reinterpret_cast<const Pack<T>*>(row + column(p));
#pragma unroll
      for (int i = 0; i < 8; ++i) x[p][i] = to_float(pack.x[i]);
    }
  }
  __device__ void store(T* row, int n) const {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      if (column(p) >= n) continue;
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < 8; ++i) put(pack.x[i], x[p][i]);
      *reinterpret_cast<Pack<T>*>(row + column(p)) = pack;
    }
  }
  /// x = f(x, y)
  template <typename F>
  __device__ void with(const Row& y, F f) {
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
      for (int i = 0; i < 8; ++i) x[p][i] = f(x[p][i], y.x[p][i]);
  }
  __device__ float dot(const Row& y) const {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[p][i] * y.x[p][i];
    return block_reduce<false>(sum);
  }
};

__device__ inline size_t row_begin(int n) { return static_cast<size_t>(blockIdx.x) * n; }

/// Writes norm(x) to y [m, n]. If ADDED is set, it writes h + norm(x) instead; if FACTOR is set, it multiplies the
/// result by factor [1].
template <int PACKS, bool ADDED, bool FACTOR, typename T, typename F>
__device__ void rms_norm(const T* x, const T* weight, const T* h, const F* factor, float eps, int n, T* y) {
  Row<PACKS, T> own, w, other;
  own.load(x + row_begin(n), n);
  w.load(weight, n);
  if (ADDED) other.load(h + row_begin(n), n);
  const float r = rsqrtf(own.dot(own) / n + eps);
  own.with(w, [&](float x, float w) { return rounded<T>(x * r) * w; });
  if (ADDED) own.with(other, [](float x, float h) { return h + rounded<T>(x); });
  if (FACTOR) own.with(own, [scale = to_float(factor[0])](float x, float) { return rounded<T>(x) * scale; });
  own.store(y + row_begin(n), n);
}

/// Computes dx [m, n] from dy. If FACTOR is set, dy is first multiplied by factor [1], and the result is also written to
/// dh. If BESIDE is set, the gradient `beside` is added to dx.
template <int PACKS, bool BESIDE, bool FACTOR, typename T, typename F>
__device__ void rms_norm_back(const T* x, const T* weight, const T* dy, const T* beside, const F* factor, float eps, int n, T* dx, T* dh) {
  Row<PACKS, T> own, g, other;
  own.load(x + row_begin(n), n);
  g.load(dy + row_begin(n), n);
  if (FACTOR) {
    g.with(g, [scale = to_float(factor[0])](float g, float) { return rounded<T>(g * scale); });
    g.store(dh + row_begin(n), n);
  }
  if (BESIDE) other.load(beside + row_begin(n), n);
  {
    Row<PACKS, T> w;
    w.load(weight, n);
    g.with(w, [](float g, float w) { return g * w; });
  }
  const float r = rsqrtf(own.dot(own) / n + eps), along = own.dot(g) / n * r * r * r;
  own.with(g, [&](float x, float g) { return r * g - x * along; });
  if (BESIDE) own.with(other, [](float x, float h) { return h + rounded<T>(x); });
  own.store(dx + row_begin(n), n);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. Here, at = {n}, args = {eps}.

//: rms_norm: x weight at args -> normed
rms_norm<PACKS, false, false>(x, weight, x, args, args[0], at[0], normed);
//: rms_norm_vjp: x weight dy at args -> d_normed
rms_norm_back<PACKS, false, false>(x, weight, dy, x, args, args[0], at[0], d_normed, d_normed);
//: rms_norm_beside_vjp: x weight dy dh at args -> d_both
rms_norm_back<PACKS, true, false>(x, weight, dy, dh, args, args[0], at[0], d_both, d_both);
//: add_rms_norm: x weight h at args -> added
rms_norm<PACKS, true, false>(x, weight, h, args, args[0], at[0], added);
//: add_rms_norm_times: x weight h factor at args -> stretched
rms_norm<PACKS, true, true>(x, weight, h, factor, args[0], at[0], stretched);
//: add_rms_norm_times_vjp: x weight dy factor at args -> d_normed d_h
rms_norm_back<PACKS, false, true>(x, weight, dy, x, factor, args[0], at[0], d_normed, d_h);
