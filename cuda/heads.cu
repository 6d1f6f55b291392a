// The heads of q, k and v from their common product, q and k rotated: csrc/ops/heads/lora_qkv.cpp. The arithmetic is that of
// rope.cu.
//
// joint [B*T, (H + 2G)*D] and q [B,H,T,D], k and v [B,G,T,D] in T, arithmetic in float32, rounded once; BACK goes from their
// gradients to joint's. A thread has one pair of a token, or one element after the first `dims`, in some of its heads.
//
// positions [T] if PACKED, freqs [dims/2]; TRADITIONAL pairs neighbours, otherwise halves.

namespace segtrain {

template <bool TRADITIONAL, bool PACKED, bool BACK, typename Joint, typename Own>
__device__ void heads(Joint* joint, Own* q, Own* k, Own* v, const float* freqs, const int* positions, const int* at, float scale) {
  const int B = at[0], N = at[1], H = at[2], G = at[3], D = at[4], half = at[5] / 2, items = D - half, all = H + 2 * G;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const int item = i % items, row = i / items;
  if (row >= B * N) return;
  const int t = row % N, b = row / N, each = (all + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * each;
  float c = 1, s = 0;
  if (item < half) {
    /// angle = position*scale / freqs
    const float angle = scale * static_cast<float>(PACKED ? positions[t] : t) / freqs[item];
    c = cosf(angle), s = BACK ? -sinf(angle) : sinf(angle);
  }
  const int first = item >= half ? half + item : TRADITIONAL ? 2 * item : item, second = TRADITIONAL ? first + 1 : item + half;
  for (int head = begin; head < min(all, begin + each); ++head) {
    const bool of_q = head < H, of_v = head >= H + G;
    const int own = of_q ? head : head - (of_v ? H + G : H);
    auto* x = joint + (static_cast<size_t>(row) * all + head) * D;
    auto* y = (of_q ? q : of_v ? v : k) + ((static_cast<size_t>(b) * (of_q ? H : G) + own) * N + t) * D;
    auto move = [&](int place, auto value) {
      if constexpr (BACK)
        put(x[place], value);
      else
        put(y[place], value);
    };
    auto from = [&](int place) { return to_float(BACK ? y[place] : x[place]); };
    if (item >= half) {
      move(first, from(first));
      continue;
    }
    const float u = from(first), w = from(second);
    /// (u, v) -> (u*cos - v*sin, u*sin + v*cos)
    move(first, of_v ? u : u * c - w * s);
    move(second, of_v ? w : u * s + w * c);
  }
}

}  // namespace segtrain

// Bodies, each behind a line that names the kernel, its inputs and its outputs; at = {B, T, H, G, D, dims}, args = {scale}.

//: heads: joint freqs positions at args -> q k v
heads<TRADITIONAL, PACKED, false>(joint, q, k, v, freqs, positions, at, args[0]);
//: heads_vjp: q k v freqs positions at args -> joint
heads<TRADITIONAL, PACKED, true>(joint, q, k, v, freqs, positions, at, args[0]);
