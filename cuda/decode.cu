// Linear layers that read the same few rows in a decoding step. One launch computes up to three layers with frozen
// weights, including the low-rank updates of the adapter that each row selects. The host code is in
// csrc/ops/linear/decode_linears.cpp.
//
// y_j [m, n_j] = (x·W_jᵀ + z_j·b_jᵀ)·gain_j + bias_j with z = x·aᵀ, for m rows of k inputs, n_j outputs of layer j, and
// E adapters with rank R_j in layer j and total rank R. All y_j have the dtype T and are consecutive in one output.
// x [m, k], a [E, R, k] and b_j [E, n_j, R_j] have the dtype T too; gain_j is [E, n_j], bias_j [n_j], and picks [m]
// contains the adapter's index for each row. The arithmetic is in float32. In decode_linear, a warp computes OUT
// elements of each row at a time, and each lane reads 16 neighbouring elements of a weight's row. decode_product
// computes several rows on the tensor cores, with operands in half precision; products of codes and x are exact.
//
// BITS is the number of bits per value of a quantized weight, or 0 for a dense weight; GROUP is the size of a
// quantization group.

namespace segtrain {

constexpr int WARPS = 8, OUT = 2, PIECE = 16, MOST_RANK = 64;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

template <typename T>
__device__ inline void load16(const T* from, float (&x)[PIECE]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + 8 * h);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[8 * h + i] = to_float(pack.x[i]);
  }
}

/// Reads 16 codes of a quantized weight from the row that begins at `row`.
template <int BITS>
__device__ inline void load_codes(const unsigned* row, int column, float (&x)[PIECE]) {
  constexpr int N = BITS / 2;
  struct alignas(4 * N) Words {
    unsigned w[N];
  };
  const Words words = *reinterpret_cast<const Words*>(row + column * BITS / 32);
#pragma unroll
  for (int i = 0; i < PIECE; ++i)
    x[i] = static_cast<float>((words.w[i * BITS / 32] >> (i * BITS % 32)) & ((1u << BITS) - 1));
}

/// Returns the dot product of two rows of k elements, in every lane.
template <typename T>
__device__ inline float row_product(const T* x, const T* y, int k) {
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32 * 8; i < k; i += 256) {
    const Pack<T> u = *reinterpret_cast<const Pack<T>*>(x + i), v = *reinterpret_cast<const Pack<T>*>(y + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += to_float(u.x[j]) * to_float(v.x[j]);
  }
  return warp_sum(sum);
}

/// Computes z [m, R] = x·aᵀ with one warp per element.
template <typename T>
__device__ void decode_factors(const T* x, const T* a, const unsigned* picks, int m, int k, int ranks, float* z) {
  const int i = blockIdx.x * WARPS + threadIdx.x / 32;
  if (i >= m * ranks) return;
  const int row = i / ranks, r = i % ranks;
  const float sum = row_product(x + static_cast<size_t>(row) * k, a + (static_cast<size_t>(picks[row]) * ranks + r) * k, k);
  if (threadIdx.x % 32 == 0) z[i] = sum;
}

/// Returns the low-rank update Σ z_j·b_j for one output of one row, where j runs over the rank.
template <typename T>
__device__ inline float update(const float* z, const T* b, int rank) {
  float sum = 0;
  int j = 0;
  if (rank % 8 == 0)
    for (; j < rank; j += 8) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(b + j);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += z[j + i] * to_float(pack.x[i]);
    }
  for (; j < rank; ++j) sum += z[j] * to_float(b[j]);
  return sum;
}

template <typename T, typename S, typename W>
struct Part {
  const W* weight;
  const S *scales, *biases;
  const T *b, *bias;
  const float* gain;
  int n, rank, begin;  ///< the layer's ranks are [begin, begin + rank) of the total rank R
  bool has_bias, has_gain;
  T* y;
};

/// Computes a layer for up to ROWS rows. If `z` is null, there is a single row, and each block computes its part of z
/// itself.
template <int BITS, int GROUP, int ROWS, typename T, typename S, typename W>
__device__ void decode_linear(const T* x, const Part<T, S, W>& part, const T* a, const float* z, const unsigned* picks, int m,
                              int k, int ranks, int block, int blocks) {
  __shared__ float own_z[MOST_RANK];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!z && part.rank) {
    const T* first = a + (static_cast<size_t>(picks[0]) * ranks + part.begin) * k;
    for (int r = warp; r < part.rank; r += WARPS) {
      const float sum = row_product(x, first + static_cast<size_t>(r) * k, k);
      if (lane == 0) own_z[r] = sum;
    }
    __syncthreads();
  }
  for (int o = (block * WARPS + warp) * OUT; o < part.n; o += blocks * WARPS * OUT) {
    float sum[OUT][ROWS] = {};
#pragma unroll 2
    for (int i = lane * PIECE; i < k; i += 32 * PIECE) {
      float w[OUT][PIECE], scale[OUT], bias[OUT];
#pragma unroll
      for (int u = 0; u < OUT; ++u) {
        const size_t row = min(o + u, part.n - 1);
        if constexpr (BITS == 0) {
          load16(part.weight + row * k + i, w[u]);
        } else {
          load_codes<BITS>(part.weight + row * (k / 32 * BITS), i, w[u]);
          const size_t at = row * (k / GROUP) + i / GROUP;
          scale[u] = to_float(part.scales[at]), bias[u] = to_float(part.biases[at]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (r >= m) break;
        float v[PIECE], all = 0;
        load16(x + static_cast<size_t>(r) * k + i, v);
#pragma unroll
        for (int j = 0; j < PIECE; ++j) all += v[j];
#pragma unroll
        for (int u = 0; u < OUT; ++u) {
          float dot = 0;
#pragma unroll
          for (int j = 0; j < PIECE; ++j) dot += w[u][j] * v[j];
          if constexpr (BITS == 0) sum[u][r] += dot;
          else sum[u][r] += scale[u] * dot + bias[u] * all;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r >= m) break;
      const size_t pick = part.rank || part.has_gain ? picks[r] : 0;
#pragma unroll
      for (int u = 0; u < OUT; ++u) {
        const int out = min(o + u, part.n - 1);
        for (int j = lane; j < part.rank; j += 32)
          sum[u][r] += (z ? z[r * ranks + part.begin + j] : own_z[j]) * to_float(part.b[(pick * part.n + out) * part.rank + j]);
        float y = warp_sum(sum[u][r]);
        if (lane || o + u >= part.n) continue;
        if (part.has_gain) y *= part.gain[pick * part.n + out];
        if (part.has_bias) y += to_float(part.bias[out]);
        put(part.y[static_cast<size_t>(r) * part.n + out], y);
      }
    }
  }
}

// ---- several rows, with tensor cores

/// N neighbouring elements of a weight's row as they are stored: codes, or pairs of half-precision values.
template <int BITS, int N>
struct Share {
  static constexpr int BYTES = N * (BITS ? BITS : 16) / 8, WORDS = (BYTES + 3) / 4, AT_ONCE = WORDS < 4 ? WORDS : 4;
  unsigned words[WORDS] = {};

  template <typename W>
  __device__ void load(const W* row, int column) {
    struct alignas(4 * AT_ONCE) Words {
      unsigned w[AT_ONCE];
    };
    const char* from = reinterpret_cast<const char*>(row) + static_cast<size_t>(column) * BYTES / N;
    if constexpr (BYTES == 2) {
      words[0] = *reinterpret_cast<const unsigned short*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i += AT_ONCE) {
        const Words some = *reinterpret_cast<const Words*>(from + 4 * i);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) words[i + j] = some.w[j];
      }
    }
  }

  /// Returns elements 2i and 2i + 1 as a pair in T.
  template <typename T>
  __device__ unsigned pair(int i) const {
    if constexpr (BITS == 0) {
      return words[i];
    } else {
      const unsigned word = words[2 * i * BITS / 32] >> (2 * i * BITS % 32);
      const unsigned low = word & ((1u << BITS) - 1), high = word >> BITS & ((1u << BITS) - 1);
      if constexpr (BITS == 8) return pack2<T>(static_cast<float>(low), static_cast<float>(high));
      else return small_pair<T>(low | high << 16);
    }
  }
};

/// Computes the outputs of a block: TILES tiles of 16 outputs for up to ROWS rows, where ROWS is a multiple of 8. The
/// warps divide k into chunks, each of which lies within one quantization group. From a chunk, a lane reads N
/// neighbouring elements of two outputs and of one row of x. These are the elements that the tensor cores expect in
/// this lane if the columns are numbered in another order. Which products a warp sums, and in which order, depends only
/// on k, so the result of a row does not depend on other rows.
template <int BITS, int GROUP, int ROWS, int TILES, typename T, typename S, typename W>
__device__ void decode_product(const T* x, const Part<T, S, W>& part, const float* z, const unsigned* picks, int m, int k,
                               int ranks, int block) {
  constexpr int N = BITS && GROUP < 64 ? 8 : 16, CHUNK = 4 * N, NEXT = WARPS * CHUNK, AHEAD = 4 / TILES, OUTS = 16 * TILES;
  constexpr unsigned ONES = is_bfloat16<T> ? 0x3f803f80 : 0x3c003c00;
  __shared__ float sums[WARPS][ROWS][OUTS + 4];
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, first = block * OUTS;
  float total[TILES][ROWS / 8][4] = {};
  for (int begin = warp * CHUNK; begin < k; begin += AHEAD * NEXT) {
    Share<BITS, N> weights[AHEAD][TILES][2];
    float scale[AHEAD][TILES][2] = {}, bias[AHEAD][TILES][2] = {};
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) {
      const int column = begin + s * NEXT + threadIdx.x % 4 * N;
      if (column >= k) continue;
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const size_t out = min(first + 16 * i + 8 * h + row, part.n - 1);
          if constexpr (BITS == 0) {
            weights[s][i][h].load(part.weight + out * k, column);
          } else {
            weights[s][i][h].load(part.weight + out * (k / 32 * BITS), column);
            const size_t at = out * (k / GROUP) + column / GROUP;
            scale[s][i][h] = to_float(part.scales[at]), bias[s][i][h] = to_float(part.biases[at]);
          }
        }
    }
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) {
      if (begin + s * NEXT >= k) break;
      const int column = begin + s * NEXT + threadIdx.x % 4 * N;
      Share<0, N> v[ROWS / 8];
      if (column < k)
#pragma unroll
        for (int c = 0; c < ROWS / 8; ++c) v[c].load(x + static_cast<size_t>(min(8 * c + row, m - 1)) * k, column);
      float own[TILES][ROWS / 8][4] = {}, all[ROWS / 8][4] = {};  // `all` contains sums of x
#pragma unroll
      for (int j = 0; j < N / 2; j += 2) {
        if constexpr (BITS != 0) {
          const unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
          for (int c = 0; c < ROWS / 8; ++c) multiply_add<T>(all[c], ones, v[c].words[j], v[c].words[j + 1]);
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          const auto& w = weights[s][i];
          const unsigned a[4] = {w[0].template pair<T>(j), w[1].template pair<T>(j), w[0].template pair<T>(j + 1),
                                 w[1].template pair<T>(j + 1)};
#pragma unroll
          for (int c = 0; c < ROWS / 8; ++c) multiply_add<T>(own[i][c], a, v[c].words[j], v[c].words[j + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int c = 0; c < ROWS / 8; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if constexpr (BITS == 0) total[i][c][e] += own[i][c][e];
            else  // explicit fmaf, so that rounding does not depend on ROWS
              total[i][c][e] = fmaf(scale[s][i][e / 2], own[i][c][e], fmaf(bias[s][i][e / 2], all[c][e], total[i][c][e]));
    }
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int c = 0; c < ROWS / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[warp][8 * c + col_of(e)][16 * i + row_of(e)] = total[i][c][e];
  __syncthreads();
  for (int i = threadIdx.x; i < m * OUTS; i += 32 * WARPS) {
    const int r = i / OUTS, out = first + i % OUTS;
    if (out >= part.n) continue;
    float y = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) y += sums[w][r][i % OUTS];
    const size_t pick = part.rank || part.has_gain ? picks[r] : 0;
    if (part.rank) y += update(z + r * ranks + part.begin, part.b + (pick * part.n + out) * part.rank, part.rank);
    if (part.has_gain) y *= part.gain[pick * part.n + out];
    if (part.has_bias) y += to_float(part.bias[out]);
    put(part.y[static_cast<size_t>(r) * part.n + out], y);
  }
}

/// Finds which of the three layers a block computes, and the index of the block in that layer. `at` contains k, the
/// total rank, whether z is given, and for each layer: blocks, n, rank, begin, has_bias, has_gain. TILES = 0 means that
/// tensor cores are not used.
template <int BITS, int GROUP, int ROWS, int TILES, typename T, typename S, typename W>
__device__ void decode_linears(const T* x, const W* const (&weights)[3], const S* const (&scales)[3], const S* const (&biases)[3],
                               const T* const (&bs)[3], const float* const (&gains)[3], const T* const (&bias)[3], const T* a,
                               const float* z, const unsigned* picks, const int* at, int m, T* y) {
  int part = 0, block = blockIdx.x;
  while (part < 2 && block >= at[3 + 6 * part]) {
    block -= at[3 + 6 * part];
    y += static_cast<size_t>(m) * at[4 + 6 * part];
    ++part;
  }
  const int* own = at + 3 + 6 * part;
  const Part<T, S, W> of{pick(weights, part), pick(scales, part), pick(biases, part), pick(bs, part), pick(bias, part),
                         pick(gains, part), own[1], own[2], own[3], own[4] != 0, own[5] != 0, y};
  if constexpr (TILES == 0)
    decode_linear<BITS, GROUP, ROWS>(x, of, a, at[2] ? z : nullptr, picks, m, at[0], at[1], block, own[0]);
  else decode_product<BITS, GROUP, ROWS, TILES>(x, of, z, picks, m, at[0], at[1], block);
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs.

//: decode_factors: x a picks at rows -> low
decode_factors(x, a, picks, rows[0], at[0], at[1], low);
//: decode_linears: x w0 scales0 biases0 b0 gain0 bias0 w1 scales1 biases1 b1 gain1 bias1 w2 scales2 biases2 b2 gain2 bias2 a z picks at rows -> outs
decode_linears<BITS, GROUP, ROWS, TILES>(x, {w0, w1, w2}, {scales0, scales1, scales2}, {biases0, biases1, biases2},
                                         {b0, b1, b2}, {gain0, gain1, gain2}, {bias0, bias1, bias2}, a, z, picks, at, rows[0],
                                         outs);
