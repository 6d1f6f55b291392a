// Rotary embeddings for packed rows. The Metal twin is metal/rope.metal; the CPU code is in csrc/ops/rope/rope.cpp.
//
// x and rotated have the same dtype, the arithmetic is in float32, and results are rounded once. In the forward pass x
// is [B,T,H,D] and rotated is [B,H,T,D]: B batch, T tokens, H heads, D head size. With BACK, x is [B,H,T,D], rotated is
// [B,T,H,D], and the rotation is inverted. A thread processes one pair of elements of a row, or one of the elements
// after the first `dims`, which are not rotated.
//
// positions is [T], and freqs is [dims/2]. If TRADITIONAL is set, a pair consists of neighbouring elements; otherwise it
// consists of one element from each half.

namespace segtrain {

template <bool TRADITIONAL, bool BACK, typename T>
__device__ void rope(const T* x, const float* freqs, const int* positions, T* rotated, const int* at, float scale) {
  const int B = at[0], H = at[1], N = at[2], D = at[3], dims = at[4], half = dims / 2, items = D - half;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const int item = i % items, row = i / items;
  if (row >= B * N * H) return;
  const int head = row % H, t = row / H % N, b = row / H / N;
  const size_t by_token = static_cast<size_t>(row) * D, by_head = ((static_cast<size_t>(b) * H + head) * N + t) * D;
  const size_t from = BACK ? by_head : by_token, to = BACK ? by_token : by_head;
  if (item >= half) {
    rotated[to + half + item] = x[from + half + item];
    return;
  }
  /// angle = position*scale / freqs
  const float angle = scale * static_cast<float>(positions[t]) / freqs[item];
  const float c = cosf(angle), s = BACK ? -sinf(angle) : sinf(angle);
  const int first = TRADITIONAL ? 2 * item : item, second = TRADITIONAL ? first + 1 : item + half;
  const float u = to_float(x[from + first]), v = to_float(x[from + second]);
  /// (u, v) -> (u*cos - v*sin, u*sin + v*cos)
  put(rotated[to + first], u * c - v * s);
  put(rotated[to + second], u * s + v * c);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. Here, at = {B, H, T, D, dims},
// args = {scale}.

//: rope: x freqs positions at args -> rotated
rope<TRADITIONAL, BACK>(x, freqs, positions, rotated, at, args[0]);
