// Gated linear units: y = act(gate)·up, and both of its gradients in one pass. The Metal twin is metal/glu.metal; the
// CPU code is in csrc/cpu/rows.cpp.
//
// gate, up, dy, y, dgate and dup [n] have the dtype T, where n is the number of elements. The arithmetic is in float32,
// and results are rounded once. GELU selects the activation (GELU or SiLU). A thread processes eight neighbouring
// elements. It reads and writes sixteen bytes at a time if all arrays begin at a multiple of 16 bytes, which is not
// always true for slices.

namespace segtrain {

/// s = sigmoid(u), bend = g·ds/dg. Both are computed from exp(−|u|), which cannot overflow and avoids the loss of
/// precision in 1 − s.
struct Gate {
  float s, bend;
};
template <bool GELU>
__device__ inline Gate gate_of(float g) {
  const float k = 1.5957691216f, cubic = 0.044715f;
  // For |g| > 32, e is 0. q is clamped, because an infinite q would result in 0·∞.
  const float q = fminf(g * g, 1024.0f);
  const float u = GELU ? k * g * (1 + cubic * q) : g;
  const float du = GELU ? k * (1 + 3 * cubic * q) : 1;
  const float e = exp2_of(-LOG2E * fabsf(u)), r = __fdividef(1.0f, 1 + e);
  return {u < 0 ? e * r : r, e * r * r * du * g};
}

/// A thread's eight elements: where they begin, how many exist, and whether they may be read and written as a Pack.
struct Mine {
  unsigned begin;
  int count;
  bool whole;
};
template <typename... Pointers>
__device__ inline Mine mine(unsigned n, Pointers... arrays) {
  const unsigned begin = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  const int count = begin < n ? min(n - begin, 8u) : 0;
  return {begin, count, count == 8 && (... | reinterpret_cast<size_t>(arrays)) % 16 == 0};
}

template <typename T>
__device__ void load(const T* x, const Mine& at, float (&y)[8]) {
  Pack<T> pack = {};
  if (at.whole) {
    pack = *reinterpret_cast<const Pack<T>*>(x + at.begin);
  } else {
    for (int i = 0; i < 8; ++i)
      if (i < at.count) pack.x[i] = x[at.begin + i];
  }
  for (int i = 0; i < 8; ++i) y[i] = to_float(pack.x[i]);
}

template <typename T>
__device__ void store(T* y, const Mine& at, const float (&x)[8]) {
  Pack<T> pack;
  for (int i = 0; i < 8; ++i) put(pack.x[i], x[i]);
  if (at.whole) {
    *reinterpret_cast<Pack<T>*>(y + at.begin) = pack;
  } else {
    for (int i = 0; i < 8; ++i)
      if (i < at.count) y[at.begin + i] = pack.x[i];
  }
}

template <bool GELU, typename T>
__device__ void glu(const T* gate, const T* up, T* y, int n) {
  const Mine at = mine(n, gate, up, y);
  float g[8], u[8];
  load(gate, at, g);
  load(up, at, u);
  for (int i = 0; i < 8; ++i) {
    /// s = sigmoid(u), u = g or k*(g + 0.044715*g^3), k = 2*sqrt(2/pi)
    const Gate now = gate_of<GELU>(g[i]);
    /// y = g*s*up
    u[i] = g[i] * now.s * u[i];
  }
  store(y, at, u);
}

template <bool GELU, typename T>
__device__ void glu_vjp(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int n) {
  const Mine at = mine(n, gate, up, dy, dgate, dup);
  float g[8], u[8], d[8];
  load(gate, at, g);
  load(up, at, u);
  load(dy, at, d);
  for (int i = 0; i < 8; ++i) {
    /// s = sigmoid(u), u = g or k*(g + 0.044715*g^3), k = 2*sqrt(2/pi)
    const Gate now = gate_of<GELU>(g[i]);
    /// dgate = dy*up*(s + g*s*(1 - s)*du/dg)
    u[i] = d[i] * u[i] * (now.s + now.bend);
    /// dup = dy*g*s
    d[i] = d[i] * (g[i] * now.s);
  }
  store(dgate, at, u);
  store(dup, at, d);
}

// ---- gate and up side by side in one array [rows, 2·f], the result of one matrix product; f is the width of each, a
// multiple of 8

/// Returns the offset of a thread's eight gate elements. The corresponding up elements are f elements further.
__device__ inline size_t joint_gates(unsigned begin, unsigned f) { return static_cast<size_t>(begin / f) * 2 * f + begin % f; }

template <bool GELU, typename T>
__device__ void glu_joint(const T* gate_up, T* y, int n, int f) {
  const Mine to = mine(n, y);
  if (!to.count) return;
  const Mine at = {0, 8, true};
  const T* from = gate_up + joint_gates(to.begin, f);
  float g[8], u[8];
  load(from, at, g);
  load(from + f, at, u);
  for (int i = 0; i < 8; ++i) u[i] = g[i] * gate_of<GELU>(g[i]).s * u[i];
  store(y, to, u);
}

template <bool GELU, typename T>
__device__ void glu_joint_vjp(const T* gate_up, const T* dy, T* dgate_up, int n, int f) {
  const Mine from = mine(n, dy);
  if (!from.count) return;
  const Mine at = {0, 8, true};
  const size_t begin = joint_gates(from.begin, f);
  float g[8], u[8], d[8];
  load(gate_up + begin, at, g);
  load(gate_up + begin + f, at, u);
  load(dy, from, d);
  for (int i = 0; i < 8; ++i) {
    const Gate now = gate_of<GELU>(g[i]);
    u[i] = d[i] * u[i] * (now.s + now.bend);
    d[i] = d[i] * (g[i] * now.s);
  }
  store(dgate_up + begin, at, u);
  store(dgate_up + begin + f, at, d);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. T and GELU are constants in
// all of them. at = {n}, and {n, f} in the joint kernels.

//: glu: gate up at -> y
glu<GELU>(gate, up, y, at[0]);
//: glu_vjp: gate up dy at -> dgate dup
glu_vjp<GELU>(gate, up, dy, dgate, dup, at[0]);
//: glu_joint: gate_up at -> h
glu_joint<GELU>(gate_up, h, at[0], at[1]);
//: glu_joint_vjp: gate_up dh at -> dgate_up
glu_joint_vjp<GELU>(gate_up, dh, dgate_up, at[0], at[1]);
