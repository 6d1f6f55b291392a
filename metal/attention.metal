// Attention in tiles of queries x keys. One kernel computes the forward pass, a second one dk and dv, and a
// third one dq. The CPU twin is csrc/ops/attention/cpu.cpp.
//
// q, o, d_o [B,H,T,D] and k, v [B,G,S,D] have the dtype T; lse, delta [B,H,T] are float32; first [T] is int32.
// In the shapes, B is the batch size, H the number of query heads, G the number of key/value heads, T the
// number of queries, S the number of keys, and D the head size. Query t sees the keys first[t] to q_start + t,
// and `first` is non-decreasing. D is a multiple of 16, and H a multiple of G; rows begin at multiples of 8
// bytes. R is the number of a simdgroup's rows, divided by 8.
//
//   function              threads per group    grid                         per group      per simdgroup
//   attention             128                  128*ceil(T/(32 R)), H, B     32 R queries   8 R queries
//   attention_vjp_kv_ds   256                  256*ceil(S/32), G, B         32 keys        8 keys, for dv or for dk
//   attention_vjp_q_ds    128                  128*ceil(T/(32 R)), H, B     32 R queries   8 R queries
//
// The backward pass needs five matrix products: attention_vjp_kv_ds writes dS to memory in the dtype W, and
// attention_vjp_q_ds multiplies it by K. W is the same as T, unless T is half: then W is float32, because small
// gradients would underflow in half.
//
// Each simdgroup has its own rows (queries, or keys for dk and dv), which no other simdgroup of the threadgroup
// reads. It reads them directly from device memory, and only once if they fit in registers. The rows by which
// they are multiplied (keys, or queries for dk and dv) are staged in threadgroup memory for all simdgroups. The
// operands of matrix products have the dtype T; sums and scores are float32. Of the intermediate results, only
// the dS for dQ is rounded.

using namespace metal;

// Arrays of matrices stay in registers only if every index is known at compile time.
#define UNROLL _Pragma("clang loop unroll(full)")

namespace segtrain {

using Matrix = simdgroup_matrix<float, 8, 8>;

// A tile contains the rows that are staged at the same time. Two tiles need at most 17 KiB.
template <typename T, int D>
struct Tile {
  static constant constexpr int bytes = D * sizeof(T);
  static constant constexpr int rows = bytes <= 256 ? 32 : bytes <= 512 ? 16 : 8;
  static constant constexpr int stride = D + 16 / sizeof(T);  // rows start in different banks
  static constant constexpr int size = rows * stride;
};

constant constexpr int SIMDS = 4;         // per threadgroup for queries, or per half of a threadgroup for keys
constant constexpr int BLOCK = 32;        // number of queries and of keys in a block of dS
constant constexpr int KEYS = 8 * SIMDS;  // keys per threadgroup

// These functions return R, the number of a simdgroup's rows divided by 8: as many rows as fit in registers.
constexpr int forward_blocks(int D) {
  return D <= 64 ? 2 : 1;
}
constexpr int queries_blocks(int D) {
  return D <= 64 ? 4 : D <= 128 ? 2 : 1;
}

// The position of the first of a lane's two neighbouring matrix elements.
struct Place {
  int row, col;
  Place(uint lane) : row((lane / 4 & 4) + lane / 2 % 4), col((lane / 4 & 2) * 2 + lane % 2 * 2) {}
};

// The sizes of a call, and the indices of its heads.
struct Shape {
  int heads, groups, queries, keys;
  Shape(const constant int* q_shape, const constant int* k_shape)
      : heads(q_shape[1]), groups(k_shape[1]), queries(q_shape[2]), keys(k_shape[2]) {}
  size_t q_head(uint b, uint h) thread { return size_t(b) * heads + h; }
  size_t k_head(uint b, uint g) thread { return size_t(b) * groups + g; }
  int share() thread { return heads / groups; }
};

template <int N, typename T>
vec<T, N> read(const device T* x) {
  return *reinterpret_cast<const device vec<T, N>*>(x);
}
template <int N, typename T>
vec<T, N> read(const threadgroup T* x) {
  return *reinterpret_cast<const threadgroup vec<T, N>*>(x);
}
template <int N, typename T>
void write(device T* x, vec<T, N> values) {
  *reinterpret_cast<device vec<T, N>*>(x) = values;
}
template <int N, typename T>
void write(threadgroup T* x, vec<T, N> values) {
  *reinterpret_cast<threadgroup vec<T, N>*>(x) = values;
}

// Copies rows [begin, begin + Tile::rows) of x to the tile. Beyond the end of x, the last row is repeated;
// the repeated rows are masked later, or their results are not stored.
template <int D, typename T>
void stage(threadgroup T* tile, const device T* x, int begin, int end, uint simd, uint simds, uint lane) {
  constexpr int fours = D / 4;
  for (int i = 32 * simd + lane; i < Tile<T, D>::rows * fours; i += 32 * simds) {
    const int row = i / fours, col = i % fours * 4;
    write<4>(tile + row * Tile<T, D>::stride + col, read<4>(x + size_t(min(begin + row, end - 1)) * D + col));
  }
}

template <int N>
void fill(thread Matrix* x, float value) {
  UNROLL
  for (int n = 0; n < N; ++n) x[n] = make_filled_simdgroup_matrix<float, 8, 8>(value);
}

// A matrix product may sum in any order, and the columns of its result may be in any order. This makes it
// possible to put elements that are neighbours in memory into different matrices, so that a lane can read
// several of its elements in one go. Matrix f of `wide` matrices has the columns wide i + f for i < 8.
constexpr int wide_of(int D) {
  return D % 32 == 0 ? 4 : 2;
}

// Reads W matrices of 8 rows from device memory; `row` is this lane's row.
template <int W, typename T>
void along(thread simdgroup_matrix<T, 8, 8>* a, const device T* row, Place at) {
  const vec<T, W> left = read<W>(row + W * at.col), right = read<W>(row + W * at.col + W);
  UNROLL
  for (int f = 0; f < W; ++f) {
    a[f].thread_elements()[0] = left[f];
    a[f].thread_elements()[1] = right[f];
  }
}

// Reads W transposed matrices of 8 staged rows.
template <int W, typename T>
void across(thread simdgroup_matrix<T, 8, 8>* b, const threadgroup T* rows, int stride, Place at) {
  const threadgroup T* from = rows + at.col * stride + W * at.row;
  const vec<T, W> left = read<W>(from), right = read<W>(from + stride);
  UNROLL
  for (int f = 0; f < W; ++f) {
    b[f].thread_elements()[0] = left[f];
    b[f].thread_elements()[1] = right[f];
  }
}

// Returns the number of matrices that hold 8 rows of D elements in registers, or 0 if they do not fit together
// with R sums.
template <typename T>
constexpr int kept_of(int D, int R) {
  return R * D / 4 + R * D / 16 * int(sizeof(T)) <= 80 ? D / 8 : 0;
}

// Loads the simdgroup's rows into registers; `own` is this lane's row.
template <int KEPT, int W, typename T>
void keep(thread simdgroup_matrix<T, 8, 8>* kept, const device T* own, Place at) {
  UNROLL
  for (int n = 0; n < KEPT; n += W) along<W>(kept + n, own + 8 * n, at);
}

// Computes x = own tile^T [8 R, Tile::rows]. The simdgroup's own rows are R times KEPT matrices in `kept`; if
// KEPT is 0, the rows are read from memory at `own`, which points to this lane's row.
template <int D, int R, int KEPT, typename T>
void product(thread Matrix* x, const device T* own, thread simdgroup_matrix<T, 8, 8>* kept, const threadgroup T* tile,
             Place at) {
  constexpr int N = Tile<T, D>::rows / 8, W = wide_of(D);
  static_assert(KEPT > 0 || R == 1, "rows can be read from memory again only if R is 1");
  fill<R * N>(x, 0);
  UNROLL
  for (int d = 0; d < D; d += 8 * W) {
    simdgroup_matrix<T, 8, 8> a[R * W], b[N * W];
    UNROLL
    for (int n = 0; n < N; ++n) across<W>(b + n * W, tile + 8 * n * Tile<T, D>::stride + d, Tile<T, D>::stride, at);
    if (KEPT == 0) along<W>(a, own + d, at);
    UNROLL
    for (int f = 0; f < W; ++f) {
      UNROLL
      for (int r = 0; r < R; ++r) {
        if (KEPT > 0) a[r * W + f] = kept[r * KEPT + d / 8 + f];
        UNROLL
        for (int n = 0; n < N; ++n)
          simdgroup_multiply_accumulate(x[r * N + n], a[r * W + f], b[n * W + f], x[r * N + n]);
      }
    }
  }
}

// Computes sum += x tile [8 R, D]. In each pair of neighbouring matrices of the sum, the first matrix has the
// columns 4 i and 4 i + 1 for i < 4.
template <int D, int R, typename T>
void accumulate(thread Matrix* sum, thread Matrix* x, const threadgroup T* tile, Place at) {
  constexpr int N = Tile<T, D>::rows / 8;
  UNROLL
  for (int n = 0; n < N; ++n) {
    UNROLL
    for (int d = 0; d < D / 8; d += 2) {
      const vec<T, 4> four = read<4>(tile + (8 * n + at.row) * Tile<T, D>::stride + 8 * d + 2 * at.col);
      UNROLL
      for (int f = 0; f < 2; ++f) {
        simdgroup_matrix<T, 8, 8> b;
        b.thread_elements()[0] = four[2 * f];
        b.thread_elements()[1] = four[2 * f + 1];
        UNROLL
        for (int r = 0; r < R; ++r)
          simdgroup_multiply_accumulate(sum[r * (D / 8) + d + f], x[r * N + n], b, sum[r * (D / 8) + d + f]);
      }
    }
  }
}

// Writes sum * factor to `to`, which is this lane's row. The sum has the column order of `accumulate`.
template <int D, typename T>
void store(device T* to, thread Matrix* sum, float factor, Place at) {
  UNROLL
  for (int d = 0; d < D / 8; d += 2) {
    vec<T, 4> four;
    UNROLL
    for (int e = 0; e < 4; ++e) four[e] = T(sum[d + e / 2].thread_elements()[e % 2] * factor);
    write<4>(to + 8 * d + 2 * at.col, four);
  }
}

// Returns the score s for the dot product of q and k, and sets `slope` to ds / d(scale q k).
template <bool CAP>
float score(float qk, float scale, float cap, thread float& slope) {
  slope = 1;
  if (!CAP) return qk * scale;
  const float t = tanh(qk * scale / cap);
  slope = 1 - t * t;
  return cap * t;
}

// Reduces x with f over the lanes of one row, whose indices differ only in bits 0 and 3.
template <typename F>
float of_row(float x, F f) {
  x = f(x, simd_shuffle_xor(x, ushort(1)));
  return f(x, simd_shuffle_xor(x, ushort(8)));
}
struct Max {
  float operator()(float a, float b) thread { return max(a, b); }
};
struct Sum {
  float operator()(float a, float b) thread { return a + b; }
};

template <int D, bool CAP, typename T, typename Ints>
void attention(const device T* q, const device T* k, const device T* v, Ints first, int q_start, float scale,
               float cap, Shape shape, device T* o, device float* lse, threadgroup T* tiles, uint3 group, uint simd,
               uint lane) {
  constexpr int BK = Tile<T, D>::rows, N = BK / 8, R = forward_blocks(D), ROWS = 8 * R * SIMDS;
  const Place at(lane);
  // The last tiles are processed first, because with a causal mask they need the most work.
  const int q0 = ((shape.queries - 1) / ROWS - int(group.x)) * ROWS, q1 = min(q0 + ROWS, shape.queries);
  const int own0 = min(q0 + 8 * R * int(simd), q1 - 1), own1 = min(own0 + 8 * R, q1);
  const size_t bh = shape.q_head(group.z, group.y), bg = shape.k_head(group.z, group.y / shape.share());
  q += bh * shape.queries * D;
  o += bh * shape.queries * D;
  lse += bh * shape.queries;
  k += bg * shape.keys * D;
  v += bg * shape.keys * D;
  threadgroup T* k_tile = tiles;
  threadgroup T* v_tile = tiles + Tile<T, D>::size;
  constexpr int KEPT = kept_of<T>(D, R), C = D / 8;
  Matrix sum[R * C], s[R * N];
  simdgroup_matrix<T, 8, 8> q_kept[R * KEPT + 1];
  fill<R * C>(sum, 0);
  int row[R], t[R], begin[R];
  float m[R], l[R];
  UNROLL
  for (int r = 0; r < R; ++r) {
    row[r] = q0 + 8 * (R * int(simd) + r) + at.row;
    t[r] = min(row[r], q1 - 1);
    begin[r] = first[t[r]];
    m[r] = -INFINITY;
    l[r] = 0;
    keep<KEPT, wide_of(D)>(q_kept + r * KEPT, q + size_t(t[r]) * D, at);
  }
  // No row of this simdgroup sees a key before own_begin, all rows see the keys [all_begin, all_end), and no
  // row sees a later key than own_end - 1.
  const int own_begin = first[own0], all_begin = first[own1 - 1], all_end = q_start + own0 + 1,
            own_end = q_start + own1;

  for (int k0 = first[q0] / BK * BK; k0 < q_start + q1; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<D>(k_tile, k, k0, shape.keys, simd, SIMDS, lane);
    stage<D>(v_tile, v, k0, shape.keys, simd, SIMDS, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (k0 >= own_end || k0 + BK <= own_begin) continue;

    /// S = scale q k^T, capped
    product<D, R, KEPT>(s, q + size_t(t[0]) * D, q_kept, k_tile, at);
    const bool edge = k0 < all_begin || k0 + BK > all_end;
    UNROLL
    for (int r = 0; r < R; ++r) {
      float top = m[r];
      UNROLL
      for (int n = 0; n < N; ++n) {
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const int key = k0 + 8 * n + at.col + e;
          float slope, x = score<CAP>(s[r * N + n].thread_elements()[e], scale, cap, slope);
          if (edge && (key < begin[r] || key > q_start + t[r])) x = -INFINITY;
          s[r * N + n].thread_elements()[e] = x;
          top = max(top, x);
        }
      }

      /// Online softmax: rescales the sums, which are relative to the old maximum.
      top = of_row(top, Max());
      const float base = top == -INFINITY ? 0 : top;  // no key seen yet
      const float shrink = fast::exp(m[r] - base);
      float part = 0;
      UNROLL
      for (int n = 0; n < N; ++n) {
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const float p = fast::exp(s[r * N + n].thread_elements()[e] - base);
          s[r * N + n].thread_elements()[e] = p;
          part += p;
        }
      }
      l[r] = l[r] * shrink + of_row(part, Sum());
      m[r] = top;
      UNROLL
      for (int d = 0; d < C; ++d) {
        sum[r * C + d].thread_elements()[0] *= shrink;
        sum[r * C + d].thread_elements()[1] *= shrink;
      }
    }

    /// O += P V
    accumulate<D, R>(sum, s, v_tile, at);
  }

  /// O/l, lse = m + log l
  UNROLL
  for (int r = 0; r < R; ++r) {
    if (row[r] >= q1) continue;
    store<D>(o + size_t(t[r]) * D, sum + r * C, l[r] > 0 ? 1 / l[r] : 0, at);
    if (at.col == 0) lse[t[r]] = l[r] > 0 ? m[r] + log(l[r]) : -INFINITY;
  }
}

// The dS of one head is stored in blocks of 32 keys x 32 queries. For the keys 32 i to 32 i + 31, there are
// consecutive blocks for the queries that see one of these keys: block index[i] + j contains the 32 queries that
// begin at 32 j. A block consists of 8 x 8 matrices whose rows are keys. A lane's elements of two matrices are
// consecutive: [two of queries][four of keys][lane][4].
constant constexpr int BLOCK_SIZE = BLOCK * BLOCK;
constexpr int in_block(int query, int key, int lane) {
  return ((query / 16 * (BLOCK / 8) + key / 8) * 32 + lane) * 4 + query / 8 % 2 * 2;
}

// Simdgroups 0 to 3 compute p and dv, and simdgroups 4 to 7 compute dp and dk for the same keys, so each
// simdgroup needs only one sum [8, D]. Simdgroup 4 + i receives p from simdgroup i through `weights`.
template <int D, bool CAP, typename T, typename Rows, typename Ints, typename Index, typename Grad, typename W>
void attention_vjp_kv_ds(const device T* q, const device T* k, const device T* v, Rows lse, Rows delta,
                         const device T* d_o, Ints first, Index index, int blocks, int q_start, float scale, float cap,
                         Shape shape, device Grad* dk, device Grad* dv, device W* ds, threadgroup T* tiles,
                         threadgroup float* weights, uint3 group, uint simd, uint lane) {
  constexpr int BQ = Tile<T, D>::rows, N = BQ / 8, E = N == 1 ? 2 : 4;
  const Place at(lane);
  const bool makes_dk = simd >= SIMDS;
  const int own = 8 * int(simd % SIMDS), k0 = int(group.x) * KEYS, k1 = min(k0 + KEYS, shape.keys);
  const int row = k0 + own + at.row, key = min(row, k1 - 1);
  const size_t bg = shape.k_head(group.z, group.y), at_key = (bg * shape.keys + key) * D;
  const device T* own_row = (makes_dk ? v : k) + at_key;
  threadgroup T* q_tile = tiles;
  threadgroup T* do_tile = tiles + Tile<T, D>::size;
  weights += simd % SIMDS * (N * 64) + lane * E;
  constexpr int KEPT = kept_of<T>(D, 1);
  Matrix sum[D / 8], x[N];
  simdgroup_matrix<T, 8, 8> kept[KEPT + 1];
  fill<D / 8>(sum, 0);
  keep<KEPT, wide_of(D)>(kept, own_row, at);

  for (int h = 0; h < shape.share(); ++h) {
    const size_t bh = shape.q_head(group.z, group.y * shape.share() + h), bht = bh * shape.queries;

    for (int q0 = max(0, k0 - q_start) / BLOCK * BLOCK; q0 < (shape.queries + BLOCK - 1) / BLOCK * BLOCK; q0 += BQ) {
      const int q1 = min(q0 + BQ, shape.queries);
      if (q0 % BLOCK == 0 && first[q0] >= k1) break;  // no later query sees these keys either
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<D>(q_tile, q + bht * D, q0, shape.queries, simd, 2 * SIMDS, lane);
      stage<D>(do_tile, d_o + bht * D, q0, shape.queries, simd, 2 * SIMDS, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const bool seen = q1 > q0 && q_start + q1 > k0 + own && first[q0] < k0 + own + 8;

      /// P = exp(S - lse), dP = dO V^T, both transposed
      if (seen) product<D, 1, KEPT>(x, own_row, kept, makes_dk ? do_tile : q_tile, at);

      /// dS = P (dP - delta)
      if (seen && !makes_dk) {
        // Rows after the last key need no separate check, because their positions are later than those of all
        // queries.
        const bool edge = first[q1 - 1] > k0 + own || k0 + own + 8 > q_start + q0 + 1 || q0 + BQ > shape.queries;
        UNROLL
        for (int n = 0; n < N; n += E / 2) {
          vec<float, E> shares;
          UNROLL
          for (int e = 0; e < E; ++e) {
            const int col = q0 + 8 * (n + e / 2) + at.col + e % 2, t = min(col, shape.queries - 1);
            float slope, s = score<CAP>(x[n + e / 2].thread_elements()[e % 2], scale, cap, slope);
            float p = fast::exp(s - lse[bht + t]);
            if (edge && (row < first[t] || row > q_start + t || col >= shape.queries)) p = 0;
            x[n + e / 2].thread_elements()[e % 2] = p;
            shares[e] = p * slope;
          }
          write<E>(weights + n * 64, shares);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (makes_dk) {
        device W* block = ds + (bh * blocks + size_t(index[k0 / BLOCK] + q0 / BLOCK)) * BLOCK_SIZE;
        UNROLL
        for (int n = 0; n < N; n += E / 2) {
          vec<W, E> rounded;
          UNROLL
          for (int e = 0; e < E; ++e) rounded[e] = W(0.0f);
          if (seen) {
            const vec<float, E> shares = read<E>(weights + n * 64);
            UNROLL
            for (int e = 0; e < E; ++e) {
              const int t = min(q0 + 8 * (n + e / 2) + at.col + e % 2, shape.queries - 1);
              const float x_e = shares[e] * (x[n + e / 2].thread_elements()[e % 2] - delta[bht + t]);
              x[n + e / 2].thread_elements()[e % 2] = x_e;
              rounded[e] = W(x_e);
            }
          }
          write<E>(block + in_block(q0 % BLOCK + 8 * n, own, lane), rounded);
        }
      }

      /// dV += P^T dO, dK += dS^T Q
      if (seen) accumulate<D, 1>(sum, x, makes_dk ? q_tile : do_tile, at);
    }
  }

  /// dK scale
  if (row < k1) store<D>((makes_dk ? dk : dv) + at_key, sum, makes_dk ? scale : 1, at);
}

// Computes dQ as dQ^T = K^T dS^T, because this product can read dS in the layout in which it was written. The
// columns of dQ are the rows of the matrices.
template <int D, typename T, typename W, typename Ints, typename Index>
void attention_vjp_q_ds(const device T* k, const device W* ds, Ints first, Index index, int blocks, int q_start,
                        float scale, Shape shape, device T* dq, threadgroup T* tile, uint3 group, uint simd,
                        uint lane) {
  constexpr int BK = Tile<T, D>::rows, WIDE = wide_of(D), C = D / 8, R = queries_blocks(D), ROWS = 8 * R * SIMDS,
                E = R == 1 ? 2 : 4;
  const Place at(lane);
  const int q0 = ((shape.queries - 1) / ROWS - int(group.x)) * ROWS, q1 = min(q0 + ROWS, shape.queries);
  const int own = q0 + 8 * R * int(simd), own_block = own / BLOCK;
  const size_t bh = shape.q_head(group.z, group.y), bg = shape.k_head(group.z, group.y / shape.share());
  k += bg * shape.keys * D;
  dq += bh * shape.queries * D;
  ds += bh * blocks * BLOCK_SIZE;
  Matrix sum[R * C];
  fill<R * C>(sum, 0);
  // Blocks with this simdgroup's queries exist only for the keys in this range.
  const int own_begin = first[min(own_block * BLOCK, q1 - 1)] / BLOCK * BLOCK,
            own_end = own < q1 ? q_start + (own_block + 1) * BLOCK : 0;
  const int end = min(q_start + (q1 + BLOCK - 1) / BLOCK * BLOCK, shape.keys);

  for (int k0 = first[q0] / BLOCK * BLOCK; k0 < end; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<D>(tile, k, k0, shape.keys, simd, SIMDS, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int from = k0 / BLOCK * BLOCK;
    if (from < own_begin || from >= own_end) continue;

    /// dQ += dS K
    const device W* block = ds + size_t(index[k0 / BLOCK] + own_block) * BLOCK_SIZE;
    UNROLL
    for (int n = 0; n < BK / 8; ++n) {
      simdgroup_matrix<W, 8, 8> b[R];
      UNROLL
      for (int r = 0; r < R; r += E / 2) {
        const vec<W, E> shares = read<E>(block + in_block(own % BLOCK + 8 * r, k0 % BLOCK + 8 * n, lane));
        UNROLL
        for (int e = 0; e < E; ++e) b[r + e / 2].thread_elements()[e % 2] = shares[e];
      }
      UNROLL
      for (int d = 0; d < C; d += WIDE) {
        simdgroup_matrix<T, 8, 8> a[WIDE];
        across<WIDE>(a, tile + 8 * n * Tile<T, D>::stride + 8 * d, Tile<T, D>::stride, at);
        UNROLL
        for (int f = 0; f < WIDE; ++f) {
          UNROLL
          for (int r = 0; r < R; ++r)
            simdgroup_multiply_accumulate(sum[r * C + d + f], a[f], b[r], sum[r * C + d + f]);
        }
      }
    }
  }

  /// dQ scale
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int e = 0; e < 2; ++e) {
      const int t = own + 8 * r + at.col + e;
      if (t >= q1) continue;
      UNROLL
      for (int d = 0; d < C; d += WIDE) {
        vec<T, WIDE> some;
        UNROLL
        for (int f = 0; f < WIDE; ++f) some[f] = T(sum[r * C + d + f].thread_elements()[e] * scale);
        write<WIDE>(dq + size_t(t) * D + 8 * d + WIDE * at.row, some);
      }
    }
  }
}

}  // namespace segtrain

// Kernel bodies. The line before each body names the kernel, its inputs and its outputs. T, D, ROWS and
// THREADS are constants in all of them. ROWS and THREADS, the rows and threads of a threadgroup, must equal
// the host's values.
//: attention: q k v first q_start scale cap -> o lse
static_assert(ROWS == 8 * segtrain::forward_blocks(D) * segtrain::SIMDS && THREADS == 32 * segtrain::SIMDS,
              "the host launches groups of another size");
threadgroup T tiles[2 * segtrain::Tile<T, D>::size];
segtrain::attention<D, CAP>(
    q, k, v, first, q_start, scale, cap, segtrain::Shape(q_shape, k_shape), o, lse, tiles,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
//: attention_vjp_kv_ds: q k v lse delta d_o first index blocks q_start scale cap -> dk dv ds
static_assert(ROWS == segtrain::KEYS && THREADS == 2 * 32 * segtrain::SIMDS,
              "the host launches groups of another size");
threadgroup T tiles[2 * segtrain::Tile<T, D>::size];
threadgroup float weights[segtrain::KEYS * segtrain::Tile<T, D>::rows];
segtrain::attention_vjp_kv_ds<D, CAP>(
    q, k, v, lse, delta, d_o, first, index, blocks, q_start, scale, cap, segtrain::Shape(q_shape, k_shape), dk, dv, ds,
    tiles, weights, threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
//: attention_vjp_q_ds: lse k ds first index blocks q_start scale -> dq
static_assert(ROWS == 8 * segtrain::queries_blocks(D) * segtrain::SIMDS && THREADS == 32 * segtrain::SIMDS,
              "the host launches groups of another size");
threadgroup T tile[segtrain::Tile<T, D>::size];
segtrain::attention_vjp_q_ds<D>(
    k, ds, first, index, blocks, q_start, scale, segtrain::Shape(lse_shape, k_shape), dq, tile,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
