// Rotary embeddings for packed rows. The CUDA twin is cuda/rope.cu; the CPU code is in csrc/ops/rope/rope.cpp.
//
// x and rotated have the same dtype, the arithmetic is in float32, and results are rounded once. In the forward
// pass x is [B,T,H,D] and rotated is [B,H,T,D]: B batch, T tokens, H heads, D head size. With BACK, x is
// [B,H,T,D], rotated is [B,T,H,D], and the rotation is inverted. A thread processes one pair of elements of a
// row, or one of the elements after the first `dims`, which are not rotated.
//
// positions is [T], and freqs is [dims/2]. If TRADITIONAL is set, a pair consists of neighbouring elements;
// otherwise it consists of one element from each half.
//
//   function   threads per group    grid                               per group
//   rope       256                  ceil(B*T*H * (D - dims/2) / 256)   256 pairs or single elements

using namespace metal;

namespace segtrain {

// MLX passes arrays with fewer than 8 elements in constant memory, so In, Freqs and Ints are pointers to
// constant or device memory.
template <bool TRADITIONAL, bool BACK, typename T, typename In, typename Freqs, typename Ints>
void rope(In x, Freqs freqs, const device int* positions, device T* rotated, Ints at, float scale, uint i) {
  const int B = at[0], H = at[1], N = at[2], D = at[3], dims = at[4], half_dims = dims / 2, items = D - half_dims;
  const int item = int(i % uint(items)), row = int(i / uint(items));
  if (row >= B * N * H) return;
  const int head = row % H, t = row / H % N, b = row / H / N;
  const size_t by_token = size_t(row) * D, by_head = ((size_t(b) * H + head) * N + t) * D;
  const size_t from = BACK ? by_head : by_token, to = BACK ? by_token : by_head;
  if (item >= half_dims) {
    rotated[to + half_dims + item] = x[from + half_dims + item];
    return;
  }
  /// angle = position*scale / freqs
  const float angle = scale * float(positions[t]) / freqs[item];
  const float c = precise::cos(angle), s = BACK ? -precise::sin(angle) : precise::sin(angle);
  const int first = TRADITIONAL ? 2 * item : item, second = TRADITIONAL ? first + 1 : item + half_dims;
  const float u = float(x[from + first]), v = float(x[from + second]);
  /// (u, v) -> (u*cos - v*sin, u*sin + v*cos)
  rotated[to + first] = T(u * c - v * s);
  rotated[to + second] = T(u * s + v * c);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. Here, at = {B, H, T,
// D, dims}, args = {scale}.
//: rope: x freqs positions at args -> rotated
segtrain::rope<TRADITIONAL, BACK>(x, freqs, positions, rotated, at, args[0],
                                  threadgroup_position_in_grid.x * THREADS + thread_index_in_threadgroup);
