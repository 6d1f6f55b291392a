// Linear layers that read the same few rows in a decoding step: one launch for up to three frozen weights, each with the
// update of the adapter that a row picks. Host: csrc/ops/linear/decode_linears.cpp.
//
// y_j [m, n_j] = (x·W_jᵀ + z_j·b_jᵀ)·gain_j + bias_j with z = x·aᵀ. All y_j are in T, one after the other in one output; x [m,
// k], and a [E, R, k] and b_j [E, n_j, R_j] of the adapters are in T; gain_j [E, n_j], bias_j [n_j]; picks [m]: the adapter of
// a row. Arithmetic in float32. A warp computes OUT elements of each row at a time; its lanes share a weight's row, 16
// neighbours each.
//
// BITS per value of a quantized weight, in groups of GROUP; BITS = 0: dense.

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

/// 16 codes of a quantized weight, whose row begins at `row`.
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

/// The dot product of two rows of k elements, in every lane.
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

/// z [m, R] = x·aᵀ, one warp per element.
template <typename T>
__device__ void decode_factors(const T* x, const T* a, const unsigned* picks, int m, int k, int ranks, float* z) {
  const int i = blockIdx.x * WARPS + threadIdx.x / 32;
  if (i >= m * ranks) return;
  const int row = i / ranks, r = i % ranks;
  const float sum = row_product(x + static_cast<size_t>(row) * k, a + (static_cast<size_t>(picks[row]) * ranks + r) * k, k);
  if (threadIdx.x % 32 == 0) z[i] = sum;
}

template <typename T, typename S, typename W>
struct Part {
  const W* weight;
  const S *scales, *biases;
  const T *b, *bias;
  const float* gain;
  int n, rank, begin;  ///< its ranks are [begin, begin + rank) of all
  bool has_bias, has_gain;
  T* y;
};

/// For up to ROWS rows. If `z` is null there is a single row, and each block computes the part of z that it needs.
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

/// Finds which of the three parts a block works on, and its index there; at = {k, ranks, z is given, then for each part:
/// blocks, n, rank, begin, has_bias, has_gain}.
template <int BITS, int GROUP, int ROWS, typename T, typename S, typename W>
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
  decode_linear<BITS, GROUP, ROWS>(x, of, a, at[2] ? z : nullptr, picks, m, at[0], at[1], block, own[0]);
}

}  // namespace segtrain

// Kernel bodies, each after a line that names the kernel, its inputs and its outputs.

//: decode_factors: x a picks at rows -> low
decode_factors(x, a, picks, rows[0], at[0], at[1], low);
//: decode_linears: x w0 scales0 biases0 b0 gain0 bias0 w1 scales1 biases1 b1 gain1 bias1 w2 scales2 biases2 b2 gain2 bias2 a z picks at rows -> outs
decode_linears<BITS, GROUP, ROWS>(x, {w0, w1, w2}, {scales0, scales1, scales2}, {biases0, biases1, biases2}, {b0, b1, b2},
                                  {gain0, gain1, gain2}, {bias0, bias1, bias2}, a, z, picks, at, rows[0], outs);
