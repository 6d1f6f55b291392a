// Dequantizes frozen weights to the dtype T and appends low-rank factors to them (csrc/ops/linear/joint_linear.h
// explains why). Also dequantizes rows of a frozen table (csrc/ops/embedding/embedding.cpp).
//
// A thread dequantizes eight neighbouring elements of w at a time. They are in one quantization group, and their codes
// occupy BITS bytes. Up to three weights W with n rows in total and k columns are stacked. The weights have the same
// format and belong to linear layers that read the same x.
//
//   w = [ W  columns ]   [n + below, k + beside]; `beside` is 0 without `columns`, and `below` is 0 without `rows`
//       [ rows      0 ]

namespace segtrain {

enum Mode { AFFINE, MXFP4, MXFP8, NVFP4, DENSE };

/// Decodes E4M3: 4 exponent bits and 3 mantissa bits. If all of these bits are ones, the value is NaN.
__device__ inline float e4m3(unsigned code) {
  const unsigned exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return __int_as_float(0x7fc00000);
  const float x = exponent ? __uint_as_float((exponent + 120) << 23 | mantissa << 20) : mantissa * 0x1p-9f;
  return code & 128 ? -x : x;
}
/// Decodes E8M0, which is a power of two: 2^(code − 127). The code 255 is NaN, as in MLX on CUDA (on the CPU it is ∞ in
/// MLX).
__device__ inline float e8m0(unsigned code) { return __uint_as_float(code == 255 ? 0x7fc00000 : code ? code << 23 : 0x400000); }
/// Decodes E2M1, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
__device__ inline float e2m1(unsigned code) {
  const float x = 0.5f * (0xC8643210u >> (4 * (code & 7)) & 15);
  return code & 8 ? -x : x;
}

/// Reads eight codes of BITS bits each, in little-endian order.
template <int BITS>
__device__ inline unsigned long long eight_codes(const unsigned char* bytes) {
  if constexpr (BITS == 8) return *reinterpret_cast<const unsigned long long*>(bytes);
  if constexpr (BITS == 4) return *reinterpret_cast<const unsigned*>(bytes);
  if constexpr (BITS == 2) return *reinterpret_cast<const unsigned short*>(bytes);
  unsigned long long codes = 0;
  for (int i = 0; i < BITS; ++i) codes |= static_cast<unsigned long long>(bytes[i]) << (8 * i);
  return codes;
}

/// The data that a thread reads for eight elements of a row, and the code that converts it.
template <int MODE, int BITS, int GROUP, typename W, typename S>
struct Eight {
  unsigned long long codes;
  Pack<W> dense;
  S scale, bias;

  __device__ void read(const W* row, const S* scales, const S* biases, int i) {
    if constexpr (MODE == DENSE) {
      dense = *reinterpret_cast<const Pack<W>*>(row + i);
    } else {
      codes = eight_codes<BITS>(reinterpret_cast<const unsigned char*>(row) + i / 8 * BITS);
      scale = scales[i / GROUP];
      if constexpr (MODE == AFFINE) bias = biases[i / GROUP];
    }
  }

  template <typename T>
  __device__ Pack<T> values() const {
    Pack<T> y;
    if constexpr (MODE == DENSE) {
#pragma unroll
      for (int j = 0; j < 8; ++j) put(y.x[j], to_float(dense.x[j]));
    } else {
      constexpr unsigned mask = (1u << BITS) - 1;
      if constexpr (MODE == AFFINE && BITS == 4) {
        // The bits of a code become the last bits of a float 2^23 + code·16^j. This takes fewer instructions than
        // shifting each code and converting it to a float, and yields the same numbers, since all steps are exact.
        float s[4] = {to_float(scale)};
        const float b = to_float(bias);
#pragma unroll
        for (int j = 1; j < 4; ++j) s[j] = s[j - 1] * 0.0625f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const unsigned half = static_cast<unsigned>(codes) >> (j / 4 * 16);
          const float code = __uint_as_float((half & 15u << (4 * (j % 4))) | 0x4B000000u) - 0x1p23f;
          put(y.x[j], fmaf(s[j % 4], code, b));
        }
      } else if constexpr (MODE == AFFINE) {
        const float s = to_float(scale), b = to_float(bias);
#pragma unroll
        for (int j = 0; j < 8; ++j) put(y.x[j], fmaf(s, static_cast<float>(static_cast<unsigned>(codes >> (BITS * j)) & mask), b));
      } else {
        const float s = MODE == NVFP4 ? e4m3(scale) : e8m0(scale);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const unsigned code = static_cast<unsigned>(codes >> (BITS * j)) & mask;
          put(y.x[j], s * (MODE == MXFP8 ? e4m3(code) : e2m1(code)));
        }
      }
    }
    return y;
  }
};

template <int MODE, int BITS, int GROUP, typename T, typename W, typename S>
__device__ void dequantize(const W* const (&weights)[3], const S* const (&scales)[3], const S* const (&biases)[3],
                           const T* columns, const T* rows, const int* at, T* w) {
  constexpr int AT_ONCE = 2;  // number of reads in flight per thread
  const unsigned ends[3] = {0u + at[0], 0u + at[0] + at[1], 0u + at[0] + at[1] + at[2]};
  const unsigned k = at[3], beside = at[4], packs = (k + beside) / 8, all = (ends[2] + at[5]) * packs;
  Eight<MODE, BITS, GROUP, W, S> eight[AT_ONCE];
  const unsigned begin = blockIdx.x * blockDim.x * AT_ONCE, first = begin + threadIdx.x;
  const unsigned begin_row = begin / packs, begin_pack = begin - begin_row * packs;
  auto place = [&](int j) { return reinterpret_cast<Pack<T>*>(w) + first + j * blockDim.x; };
  bool quantized[AT_ONCE];
#pragma unroll
  for (int j = 0; j < AT_ONCE; ++j) {
    const unsigned i = first + j * blockDim.x;
    unsigned row = begin_row, pack = begin_pack + threadIdx.x + j * blockDim.x;
    for (; pack >= packs; pack -= packs) ++row;
    const unsigned col = pack * 8;
    quantized[j] = row < ends[2] && col < k;
    if (quantized[j]) {
      const int part = (row >= ends[0]) + (row >= ends[1]);
      const size_t own = row - (part == 0 ? 0 : part == 1 ? ends[0] : ends[1]), groups = own * (k / GROUP);
      eight[j].read(pick(weights, part) + (MODE == DENSE ? own * k : own * (k / 32) * BITS), pick(scales, part) + groups,
                    pick(biases, part) + groups, col);
    } else if (i < all) {
      const T* from = row < ends[2] ? columns + static_cast<size_t>(row) * beside + (col - k)
                                    : rows + static_cast<size_t>(row - ends[2]) * k + col;
      *place(j) = *reinterpret_cast<const Pack<T>*>(from);
    }
  }
#pragma unroll
  for (int j = 0; j < AT_ONCE; ++j)
    if (quantized[j]) *place(j) = eight[j].template values<T>();
}

// ---- rows of a table

/// Returns eight elements of the table's row index[row], from column `col` of the columns that are read.
template <int MODE, int BITS, int GROUP, typename T, typename W, typename S>
__device__ inline Pack<T> eight_of(const W* w, const S* scales, const S* biases, const int* index, const int* at, int row, int col) {
  const size_t own = index[row], k = at[1], groups = own * (k / GROUP);
  Eight<MODE, BITS, GROUP, W, S> eight;
  eight.read(w + (MODE == DENSE ? own * k : own * (k / 32) * BITS), scales + groups, biases + groups, at[2] + col);
  return eight.template values<T>();
}

/// Writes rows·factor to y [rows, columns]; both the rows and the result are rounded to T.
template <int MODE, int BITS, int GROUP, typename T, typename W, typename S>
__device__ void embedded_rows(const W* w, const S* scales, const S* biases, const int* index, const int* at, float factor, T* y) {
  const unsigned packs = at[3] / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= packs * at[0]) return;
  Pack<T> pack = eight_of<MODE, BITS, GROUP, T>(w, scales, biases, index, at, i / packs, i % packs * 8);
#pragma unroll
  for (int j = 0; j < 8; ++j) put(pack.x[j], to_float(pack.x[j]) * factor);
  reinterpret_cast<Pack<T>*>(y)[i] = pack;
}

/// Writes (norm(x·f0) + rows·f1)·f2 to y [rows, columns]. Each step is rounded, as in a sequence of ops. One block
/// computes one row.
template <int MODE, int BITS, int GROUP, typename T, typename W, typename S>
__device__ void own_input(const T* x, const T* weight, const W* w, const S* scales, const S* biases, const int* index, const int* at,
                          float eps, const float* factors, T* y) {
  const int n = at[3], col = threadIdx.x * 8;
  const size_t begin = static_cast<size_t>(blockIdx.x) * n + col;
  float own[8], sum = 0;
  Pack<T> row = {}, given = {}, scale = {};
  if (col < n) {
    row = eight_of<MODE, BITS, GROUP, T>(w, scales, biases, index, at, blockIdx.x, col);
    given = *reinterpret_cast<const Pack<T>*>(x + begin), scale = *reinterpret_cast<const Pack<T>*>(weight + col);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    own[j] = rounded<T>(to_float(given.x[j]) * factors[0]);
    sum += own[j] * own[j];
  }
  const float r = rsqrtf(block_reduce<false>(sum) / n + eps);
  if (col >= n) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float normed = rounded<T>(rounded<T>(own[j] * r) * to_float(scale.x[j]));
    put(given.x[j], rounded<T>(normed + rounded<T>(to_float(row.x[j]) * factors[1])) * factors[2]);
  }
  *reinterpret_cast<Pack<T>*>(y + begin) = given;
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs.
// at = {rows of each of three weights, k, beside, below}. If there are no columns or rows, any array may be passed in
// their place.

//: dequantize: w0 w1 w2 scales0 scales1 scales2 biases0 biases1 biases2 columns rows at -> w
dequantize<MODE, BITS, GROUP, T>({w0, w1, w2}, {scales0, scales1, scales2}, {biases0, biases1, biases2}, reinterpret_cast<const T*>(columns),
                                  reinterpret_cast<const T*>(rows), at, w);
// These kernels read one table. at = {rows, k, begin, columns}, args = factors.
//: embedded_rows: w scales biases index at args -> embedded
embedded_rows<MODE, BITS, GROUP, T>(w, scales, biases, index, at, args[0], embedded);
//: own_input: x weight w scales biases index at eps args -> own
own_input<MODE, BITS, GROUP, T>(x, weight, w, scales, biases, index, at, eps[0], args, own);
