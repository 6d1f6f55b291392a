// The rank-R parts of linear layers with LoRA. Each kernel makes one pass over the rows. The host code is in
// csrc/ops/linear/joint_linear.cpp. m is the number of rows, k the input width, n the output width and R the total
// rank.
//
// The speed of a matrix product with R columns is limited by its reads: the tensor cores wait for memory, regardless of
// the tile sizes. Fragments are therefore read directly from global memory, sixteen bytes per thread. This permutes the
// summed index (or the columns) of both operands in the same way. R is a multiple of 16 up to 96.

namespace segtrain {

constexpr int WARPS = 8;

struct alignas(16) Words {
  unsigned w[4];  // eight values
};

/// Computes z [m, R] = x·lᵀ from x [m, k] and l [R, k], and wide [m, k + R] = [x z]. A thread block processes 32 rows
/// of x, and its warps divide the columns among themselves. With fewer rows, the blocks would read more from l than
/// from x.
template <int R, typename T>
__device__ void low_rank_widen(const T* x, const T* l, int m, int k, T* wide, T* z) {
  constexpr int NT = R / 8, TILES = 2, AT_ONCE = 2;  // reads of each row in flight per thread
  __shared__ float sums[WARPS][16][R];
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  auto row_at = [&](int tile, int half) { return blockIdx.x * 16 * TILES + tile * 16 + half * 8 + group; };
  float sum[TILES][NT][4] = {};
  for (int i0 = warp * 32 + quad * 8; i0 < k; i0 += AT_ONCE * WARPS * 32) {
    Words a[AT_ONCE][TILES][2] = {};
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row_at(t, h), i = i0 + j * WARPS * 32;
          if (row < m && i < k) a[j][t][h] = *reinterpret_cast<const Words*>(x + static_cast<size_t>(row) * k + i);
        }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int i = i0 + j * WARPS * 32;
      if (i - quad * 8 >= k) break;  // the same for all threads of a warp
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row_at(t, h);
          if (row < m && i < k) *reinterpret_cast<Words*>(wide + static_cast<size_t>(row) * (k + R) + i) = a[j][t][h];
        }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        Words b = {};
        if (i < k) b = *reinterpret_cast<const Words*>(l + static_cast<size_t>(n * 8 + group) * k + i);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int s = 0; s < 4; s += 2) {
            const auto& x2 = a[j][t];
            const unsigned block[4] = {x2[0].w[s], x2[1].w[s], x2[0].w[s + 1], x2[1].w[s + 1]};
            multiply_add<T>(sum[t][n], block, b.w[s], b.w[s + 1]);
          }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    if (t) __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][row_of(i)][n * 8 + col_of(i)] = sum[t][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * R; i += WARPS * 32) {
      const int row = (blockIdx.x * TILES + t) * 16 + i / R, col = i % R;
      if (row >= m) break;
      float all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) all += sums[w][i / R][col];
      put(z[static_cast<size_t>(row) * R + col], all);
      put(wide[static_cast<size_t>(row) * (k + R) + k + col], all);
    }
  }
}

/// Computes y [m, n] = y0 + z·lᵀ from wide [m, n + R] = [y0 z] and l [n, R], and copies z [m, R] out of wide. A thread
/// block processes 32 rows, and a warp 32 columns at a time.
template <int R, typename T>
__device__ void low_rank_up(const T* wide, const T* l, int m, int n, T* y, T* z) {
  constexpr int STEPS = R / 16;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, row0 = blockIdx.x * 32;
  const size_t ld = n + R;
  unsigned a[2][STEPS][4] = {};
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + t * 16 + h * 8 + group;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        if (row >= m) continue;
        const uint2 pair = *reinterpret_cast<const uint2*>(wide + row * ld + n + s * 16 + quad * 4);
        a[t][s][h] = pair.x, a[t][s][h + 2] = pair.y;
        if (blockIdx.y == 0 && warp == 0) *reinterpret_cast<uint2*>(z + static_cast<size_t>(row) * R + s * 16 + quad * 4) = pair;
      }
    }
  for (int n0 = (blockIdx.y * WARPS + warp) * 32; n0 < n; n0 += gridDim.y * WARPS * 32) {
    // The four tiles are interleaved, so that a thread has eight neighbouring elements, beginning at this column.
    const int first = n0 + quad * 8;
    Pack<T> out[2][2];
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + t * 16 + h * 8 + group;
        if (row < m && first < n) out[t][h] = *reinterpret_cast<const Pack<T>*>(wide + row * ld + first);
      }
    float sum[2][4][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = n0 + group / 2 * 8 + 2 * j + group % 2;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        uint2 b = {};
        if (col < n) b = *reinterpret_cast<const uint2*>(l + static_cast<size_t>(col) * R + s * 16 + quad * 4);
#pragma unroll
        for (int t = 0; t < 2; ++t) multiply_add<T>(sum[t][j], a[t][s], b.x, b.y);
      }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + t * 16 + h * 8 + group;
        if (row >= m || first >= n) continue;
        auto& eight = out[t][h];
#pragma unroll
        for (int j = 0; j < 8; ++j) put(eight.x[j], to_float(eight.x[j]) + sum[t][j / 2][h * 2 + j % 2]);
        *reinterpret_cast<Pack<T>*>(y + static_cast<size_t>(row) * n + first) = eight;
      }
  }
}

/// Up to three layers that read the same x: the rank of each, whose first index in R is a multiple of 8, and the output
/// width of each.
struct Projections {
  const int *ranks, *widths;
  int k;

  /// Returns the layer to which rank r belongs, or 3 if there is none. Sets r to the index of the rank within that
  /// layer.
  __device__ int of_rank(int& r) const {
    int part = 0;
    while (part < 3 && r >= (ranks[part] + 7) / 8 * 8) r -= (ranks[part++] + 7) / 8 * 8;
    return part < 3 && r < ranks[part] ? part : 3;
  }
};

/// Computes part `blockIdx.y` of the sums over rows that are the gradients of all layers' factors, concatenated: da [k,
/// r] = xᵀ·u and db [r, width] = scale·zᵀ·dy for each layer of rank r. x [m, k], dy [m, n], z and u [m, R]. A thread
/// block processes 128 columns of x or dy, and a warp 16 of them.
template <int R, typename T>
__device__ void low_rank_outer(const T* x, const T* u, const T* dy, const T* z, const Projections& all, int m, const float* scales,
                               float* sums) {
  constexpr int ROWS = 64, LD = 128 + 8, LZ = R + 8, MT = R / 16, STAGE = ROWS * (LD + LZ);
  T* tiles = shared_tiles<T>();
  const int n = all.widths[0] + all.widths[1] + all.widths[2], of_x = (all.k + 127) / 128;
  const bool of_a = blockIdx.x < of_x;
  const int warp = threadIdx.x / 32, k = of_a ? all.k : n, col0 = (blockIdx.x - (of_a ? 0 : of_x)) * 128;
  const T *wide = of_a ? x : dy, *low = of_a ? u : z;
  const int length = (m + gridDim.y * ROWS - 1) / (gridDim.y * ROWS) * ROWS, begin = blockIdx.y * length, end = min(m, begin + length);
  auto copy = [&](int row0, int stage) {
    T *x_tile = tiles + stage * STAGE, *z_tile = x_tile + ROWS * LD;
    for (int i = threadIdx.x; i < ROWS * 16; i += WARPS * 32) {
      const int row = i / 16, col = i % 16 * 8;
      const bool ok = row0 + row < end && col0 + col < k;
      copy_async<16>(shared_address(x_tile + row * LD + col), wide + (ok ? static_cast<size_t>(row0 + row) * k + col0 + col : 0), ok);
    }
    for (int i = threadIdx.x; i < ROWS * R / 8; i += WARPS * 32) {
      const int row = i / (R / 8), col = i % (R / 8) * 8;
      const bool ok = row0 + row < end;
      copy_async<16>(shared_address(z_tile + row * LZ + col), low + (ok ? static_cast<size_t>(row0 + row) * R + col : 0), ok);
    }
  };
  float sum[MT][2][4] = {};
  if (begin < end) copy(begin, 0);
  for (int row0 = begin, stage = 0; row0 < end; row0 += ROWS, stage ^= 1) {
    wait_copies();
    __syncthreads();
    if (row0 + ROWS < end) copy(row0 + ROWS, stage ^ 1);
    const T *x_tile = tiles + stage * STAGE, *z_tile = x_tile + ROWS * LD;
#pragma unroll
    for (int row = 0; row < ROWS; row += 16) {
      unsigned a[MT][4];
#pragma unroll
      for (int t = 0; t < MT; ++t) {
        unsigned r[4];
        load_block<true>(r, z_tile + row * LZ + t * 16, LZ);
        a[t][0] = r[0], a[t][1] = r[2], a[t][2] = r[1], a[t][3] = r[3];
      }
      step<T, true>(sum, a, x_tile + row * LD + warp * 16, LD);
    }
  }
  int size = 0;
  for (int i = 0; i < 3; ++i) size += all.ranks[i] * (all.k + all.widths[i]);
  sums += static_cast<size_t>(blockIdx.y) * size;
#pragma unroll
  for (int t = 0; t < MT; ++t)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // elements i and i + 1 are neighbours and belong to the same rank
      int r = t * 16 + row_of(i), first = 0;
      const int part = all.of_rank(r);
      if (part == 3) continue;
      const int rank = all.ranks[part], width = all.widths[part];
      float* own = sums;
      for (int j = 0; j < part; ++j) own += all.ranks[j] * (all.k + all.widths[j]), first += all.widths[j];
      if (of_a) first = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int col = col0 + warp * 16 + n * 8 + col_of(i + j) - first;
          if (of_a && col < all.k) own[static_cast<size_t>(col) * rank + r] = sum[t][n][i + j];
          if (!of_a && col >= 0 && col < width)
            own[static_cast<size_t>(all.k) * rank + static_cast<size_t>(r) * width + col] = scales[part] * sum[t][n][i + j];
        }
    }
}

/// Computes the joint factors of all layers: the concatenated a as rows [R, k], and scale·b as a block-diagonal matrix
/// of columns [n, R]. For the backward pass it also computes a as columns [k, R] if OF_A is set, and b as rows [R, n]
/// otherwise. A thread processes eight ranks of one column of a or b.
template <int R, bool OF_A, typename T>
__device__ void low_rank_factors(const float* const (&a)[3], const float* const (&b)[3], const Projections& all, const float* scales,
                                 T* a_rows, T* b_columns, T* back) {
  const int* widths = all.widths;
  const int i = blockIdx.x * 256 + threadIdx.x, k = all.k, n = widths[0] + widths[1] + widths[2], r0 = blockIdx.y * 8;
  if (i >= k + n) return;
  const bool of_a = i < k;
  const int column = of_a ? i : i - k;
  // The layer to which these ranks belong, and the index of the column in this layer.
  int first = r0, own = column;
  const int part = all.of_rank(first);
  for (int j = 0; !of_a && j < part; ++j) own -= widths[j];
  const bool mine = part < 3 && (of_a || (own >= 0 && own < widths[part]));
  const int count = mine ? min(8, all.ranks[part] - first) : 0;
  Pack<T> y;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    float x = 0;
    if (r < count)
      x = of_a ? pick(a, part)[static_cast<size_t>(own) * all.ranks[part] + first + r]
               : scales[part] * pick(b, part)[static_cast<size_t>(first + r) * widths[part] + own];
    put(y.x[r], x);
    if (of_a) a_rows[static_cast<size_t>(r0 + r) * k + column] = y.x[r];
    if (!of_a && !OF_A) back[static_cast<size_t>(r0 + r) * n + column] = y.x[r];
  }
  if (!of_a || OF_A) *reinterpret_cast<Pack<T>*>((of_a ? back : b_columns) + static_cast<size_t>(column) * R + r0) = y;
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. R is a constant in all of
// them. at = {m, k}; for low_rank_outer and low_rank_factors it is {three ranks, three widths, k, m}, and args =
// {scales}.

//: low_rank_widen: x l at -> wide z
low_rank_widen<R>(x, l, at[0], at[1], wide, z);
//: low_rank_up: wide l at -> y z
low_rank_up<R>(wide, l, at[0], at[1], y, z);
//: low_rank_outer: x u dy z at args -> sums
low_rank_outer<R>(x, u, dy, z, {at, at + 3, at[6]}, at[7], args, sums);
//: low_rank_factors: a0 a1 a2 b0 b1 b2 at args -> a_rows b_columns back
low_rank_factors<R, OF_A>({a0, a1, a2}, {b0, b1, b2}, {at, at + 3, at[6]}, args, a_rows, b_columns, back);
