// Gated linear units: y = act(gate)*up, and both of its gradients in one pass. The CUDA twin is cuda/glu.cu;
// the CPU code is in csrc/cpu/rows.cpp.
//
// gate, up, dy, y, dgate and dup [n] have the dtype T, where n is the number of elements. The arithmetic is in
// float32, and results are rounded once. GELU selects the activation (GELU or SiLU). A thread's PER elements
// are THREADS elements apart, so a simdgroup always reads neighbouring elements, regardless of the arrays'
// alignment.
//
//   function   threads per group    grid              per group
//   glu        256                  ceil(n / 1024)    1024 elements
//   glu_vjp    256                  ceil(n / 1024)    1024 elements

using namespace metal;

namespace segtrain {

// s = sigmoid(u), bend = g*ds/dg. Both are computed from exp(-|u|), which cannot overflow and avoids the loss
// of precision in 1 - s.
struct Gate {
  float s, bend;
};
template <bool GELU>
Gate gate_of(float g) {
  const float k = 1.5957691216f, cubic = 0.044715f;
  // For |g| > 32, e is 0. q is clamped, because an infinite q would result in 0*inf.
  const float q = min(g * g, 1024.0f);
  const float u = GELU ? k * g * (1.0f + cubic * q) : g;
  const float du = GELU ? k * (1.0f + 3.0f * cubic * q) : 1.0f;
  const float e = fast::exp(-abs(u)), r = 1.0f / (1.0f + e);
  return {u < 0.0f ? e * r : r, e * r * r * du * g};
}

// MLX passes arrays with fewer than 8 elements in constant memory, so In is a pointer to constant or device
// memory.
template <int THREADS, int PER, bool GELU, typename T, typename In>
void glu(In gate, In up, device T* y, int n, uint group, uint thread_index) {
  for (int j = 0; j < PER; ++j) {
    const uint i = (group * PER + j) * THREADS + thread_index;
    if (i >= uint(n)) return;
    const float g = float(gate[i]);
    /// s = sigmoid(u), u = g or k*(g + 0.044715*g^3), k = 2*sqrt(2/pi)
    const Gate at = gate_of<GELU>(g);
    /// y = g*s*up
    y[i] = T(g * at.s * float(up[i]));
  }
}

template <int THREADS, int PER, bool GELU, typename T, typename In>
void glu_vjp(In gate, In up, In dy, device T* dgate, device T* dup, int n, uint group, uint thread_index) {
  for (int j = 0; j < PER; ++j) {
    const uint i = (group * PER + j) * THREADS + thread_index;
    if (i >= uint(n)) return;
    const float g = float(gate[i]), d = float(dy[i]);
    /// s = sigmoid(u), u = g or k*(g + 0.044715*g^3), k = 2*sqrt(2/pi)
    const Gate at = gate_of<GELU>(g);
    /// dgate = dy*up*(s + g*s*(1 - s)*du/dg)
    dgate[i] = T(d * float(up[i]) * (at.s + at.bend));
    /// dup = dy*g*s
    dup[i] = T(d * (g * at.s));
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. T, GELU, PER and
// THREADS are constants in both of them.
//: glu: gate up -> y
segtrain::glu<THREADS, PER, GELU>(gate, up, y, gate_shape[0], threadgroup_position_in_grid.x,
                                  thread_index_in_threadgroup);
//: glu_vjp: gate up dy -> dgate dup
segtrain::glu_vjp<THREADS, PER, GELU>(gate, up, dy, dgate, dup, gate_shape[0], threadgroup_position_in_grid.x,
                                      thread_index_in_threadgroup);
