// Computes the heads of q, k and v from the result of their joint matrix product: each has an optional RMS norm, and q
// and k are then rotated. The host code is in csrc/ops/heads/lora_qkv.cpp. The arithmetic and the rounding are the same
// as in rope.cu and norm.cu.
//
// joint [B*T, heads*D], q [B,H,T,D], k and v [B,G,T,D] have the dtype T, and the arithmetic is in float32. In the
// shapes, B is the batch size, H the number of query heads, G the number of key/value heads, T the number of tokens,
// and D the head size. The backward kernel computes the gradient of joint from the gradients of q, k and v. joint
// contains the heads of q, then of k, then of v. If the keys are also the values (SAME), joint contains no heads of v;
// if there is only q, G is 0. A warp processes AT_ONCE heads of one token. A lane processes the slots lane, lane + 32,
// … of each head or, if PAIRS is set, the slots 2·lane and 2·lane + 1, whose elements are read together. A slot is a
// pair of elements, and the first dims/2 slots are rotated.
//
// Token t is at positions[t] (positions [T]) if PACKED is set, and at offset + t otherwise. freqs is [dims/2]. If
// TRADITIONAL is set, a pair consists of neighbouring elements; otherwise it consists of one element from each half.
// Bits 0, 1 and 2 of NORMS are set if q, k and v, respectively, have a norm.

namespace segtrain {

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

template <typename T>
struct Norm {
  const T* weight;
  float eps;
};

template <int D, bool PAIRS, typename T>
struct Slots {
  static constexpr int N = (D / 2 + 31) / 32;
  static_assert(!PAIRS || (N == 2 && sizeof(T) == 2));
  int first[N], second[N];
  float cosine[N], sine[N];
  bool there[N], turned[N];

  template <bool TRADITIONAL>
  __device__ void place(const float* freqs, int dims, float position) {
    const int half = dims / 2;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int slot = PAIRS ? threadIdx.x % 32 * 2 + j : threadIdx.x % 32 + 32 * j;
      there[j] = slot < D / 2, turned[j] = slot < half;
      first[j] = !turned[j] ? half + slot : TRADITIONAL ? 2 * slot : slot;
      second[j] = !turned[j] ? first[j] + (D - dims) / 2 : TRADITIONAL ? first[j] + 1 : half + slot;
      /// angle = position*scale / freqs
      const float angle = turned[j] ? position / freqs[slot] : 0;
      cosine[j] = cosf(angle), sine[j] = sinf(angle);
    }
  }
  struct alignas(2 * sizeof(T)) Two {
    T x[2];
  };
  __device__ void load(const T* x, float2 (&y)[N]) const {
    if constexpr (PAIRS) {
      const Two a = *reinterpret_cast<const Two*>(x + first[0]), b = *reinterpret_cast<const Two*>(x + second[0]);
      y[0] = make_float2(to_float(a.x[0]), to_float(b.x[0])), y[1] = make_float2(to_float(a.x[1]), to_float(b.x[1]));
      return;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = there[j] ? make_float2(to_float(x[first[j]]), to_float(x[second[j]])) : float2{};
  }
  __device__ void store(T* y, const float2 (&x)[N]) const {
    if constexpr (PAIRS) {
      Two a, b;
      put(a.x[0], x[0].x), put(a.x[1], x[1].x), put(b.x[0], x[0].y), put(b.x[1], x[1].y);
      *reinterpret_cast<Two*>(y + first[0]) = a, *reinterpret_cast<Two*>(y + second[0]) = b;
      return;
    }
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (there[j]) put(y[first[j]], x[j].x), put(y[second[j]], x[j].y);
  }
  /// (u, v) -> (u*cos - v*sin, u*sin + v*cos), or back
  template <bool BACK>
  __device__ void rotate(float2 (&x)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!turned[j]) continue;
      const float c = cosine[j], s = BACK ? -sine[j] : sine[j], u = x[j].x, v = x[j].y;
      x[j] = make_float2(u * c - v * s, u * s + v * c);
    }
  }
  static __device__ float dot(const float2 (&x)[N], const float2 (&y)[N]) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += x[j].x * y[j].x + x[j].y * y[j].y;
    return warp_sum(sum);
  }
  __device__ float2 weight(const T* w, int j) const {
    return there[j] ? make_float2(to_float(w[first[j]]), to_float(w[second[j]])) : float2{};
  }
  /// y = x*r*weight, r = 1 / sqrt(mean(x^2) + eps)
  __device__ void norm(float2 (&x)[N], const Norm<T>& own) const {
    const float r = rsqrtf(dot(x, x) / D + own.eps);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float2 w = weight(own.weight, j);
      x[j] = make_float2(rounded<T>(x[j].x * r) * w.x, rounded<T>(x[j].y * r) * w.y);
    }
  }
  /// dx = r*g - x*r^3*mean(g*x), g = dy*weight
  __device__ void norm_back(const float2 (&x)[N], float2 (&g)[N], const Norm<T>& own) const {
    const float r = rsqrtf(dot(x, x) / D + own.eps);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float2 w = weight(own.weight, j);
      g[j] = make_float2(g[j].x * w.x, g[j].y * w.y);
    }
    const float along = dot(g, x) / D * r * r * r;
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = make_float2(r * g[j].x - x[j].x * along, r * g[j].y - x[j].y * along);
  }
  __device__ void round(float2 (&x)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = make_float2(rounded<T>(x[j].x), rounded<T>(x[j].y));
  }
};

template <typename T>
struct Heads {
  const T *q_weight, *k_weight, *v_weight;
  const float *freqs, *args;
  const int *positions, *at;

  __device__ int tokens() const { return at[0] * at[1]; }
  __device__ int of_q() const { return at[2]; }
  __device__ int of_k() const { return at[3]; }
  template <bool PACKED>
  __device__ float position(int row) const {
    const int t = row % at[1];
    return args[0] * static_cast<float>(PACKED ? positions[t] : at[5] + t);
  }
  /// Returns 0, 1 or 2 for a head of q, k or v.
  __device__ int kind(int head) const { return (head >= at[2]) + (head >= at[2] + at[3]); }
  __device__ Norm<T> norm(int kind) const {
    const T* const weights[3] = {q_weight, k_weight, v_weight};
    return {pick(weights, kind), args[1 + kind]};
  }
  /// Returns the offset, in q, k or v, of a row of the head with the index `head` in joint.
  __device__ size_t place(int kind, int head, int row, int D) const {
    const int own = head - (kind > 0 ? at[2] : 0) - (kind > 1 ? at[3] : 0), all = kind > 0 ? at[3] : at[2];
    return ((static_cast<size_t>(row / at[1]) * all + own) * at[1] + row % at[1]) * D;
  }
};

template <int D, int NORMS, int AT_ONCE, bool SAME, bool TRADITIONAL, bool PAIRS, bool PACKED, typename T>
__device__ void heads(const T* __restrict__ joint, T* q, T* k, T* v, const Heads<T>& c) {
  using Mine = Slots<D, PAIRS, T>;
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, begin = blockIdx.y * AT_ONCE;
  if (row >= c.tokens()) return;
  const int given = c.of_q() + (SAME ? 1 : 2) * c.of_k(), made = c.of_q() + 2 * c.of_k();
  Mine mine;
  mine.template place<TRADITIONAL>(c.freqs, c.at[4], c.template position<PACKED>(row));
  float2 x[AT_ONCE][Mine::N];
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    const int head = begin + i, from = SAME && head >= given ? head - c.of_k() : head;
    if (head < made) mine.load(joint + (static_cast<size_t>(row) * given + from) * D, x[i]);
  }
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    const int head = begin + i, kind = c.kind(head);
    if (head >= made) return;
    if (NORMS >> kind & 1) {
      mine.norm(x[i], c.norm(kind));
      if (kind < 2) mine.round(x[i]);
    }
    if (kind < 2) mine.template rotate<false>(x[i]);
    T* const three[3] = {q, k, v};
    mine.store(pick(three, kind) + c.place(kind, head, row, D), x[i]);
  }
}

template <int D, int NORMS, int AT_ONCE, bool SAME, bool TRADITIONAL, bool PAIRS, bool PACKED, typename T>
__device__ void heads_back(const T* __restrict__ joint, const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                           T* __restrict__ d_joint, const Heads<T>& c) {
  using Mine = Slots<D, PAIRS, T>;
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, begin = blockIdx.y * AT_ONCE;
  if (row >= c.tokens()) return;
  const int given = c.of_q() + (SAME ? 1 : 2) * c.of_k();
  Mine mine;
  mine.template place<TRADITIONAL>(c.freqs, c.at[4], c.template position<PACKED>(row));
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    const int head = begin + i, kind = c.kind(head);
    if (head >= given) return;
    const size_t at = (static_cast<size_t>(row) * given + head) * D;
    float2 x[Mine::N], g[Mine::N];
    const T* const three[3] = {q, k, v};
    mine.load(pick(three, kind) + c.place(kind, head, row, D), g);
    if (NORMS) mine.load(joint + at, x);
    if (kind < 2) mine.template rotate<true>(g);
    if (NORMS >> kind & 1) {
      if (kind < 2) mine.round(g);
      mine.norm_back(x, g, c.norm(kind));
    }
    if (SAME && kind == 1) {  // these keys are also the values
      float2 more[Mine::N];
      mine.load(v + c.place(1, head, row, D), more);
      if (NORMS >> 2 & 1) mine.norm_back(x, more, c.norm(2));
      mine.round(g);
      mine.round(more);
#pragma unroll
      for (int j = 0; j < Mine::N; ++j) g[j] = make_float2(g[j].x + more[j].x, g[j].y + more[j].y);
    }
    mine.store(d_joint + at, g);
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. Here, at = {B, T, H, G, dims,
// offset}, args = {scale and three eps}. Any array of T may be passed for an input that is not needed: for the weight
// of an absent norm, for joint if there is no norm, and for k and v if there is only q.

//: heads: joint q_weight k_weight v_weight freqs positions at args -> q k v
heads<D, NORMS, AT_ONCE, SAME, TRADITIONAL, PAIRS, PACKED, T>(joint, q, k, v, {q_weight, k_weight, v_weight, freqs, args, positions, at});
//: heads_of_q: joint q_weight freqs positions at args -> queries
heads<D, NORMS, AT_ONCE, SAME, TRADITIONAL, PAIRS, PACKED, T>(joint, queries, queries, queries, {q_weight, q_weight, q_weight, freqs, args, positions, at});
//: heads_vjp: joint q k v q_weight k_weight v_weight freqs positions at args -> d_joint
heads_back<D, NORMS, AT_ONCE, SAME, TRADITIONAL, PAIRS, PACKED, T>(joint, q, k, v, d_joint, {q_weight, k_weight, v_weight, freqs, args, positions, at});
