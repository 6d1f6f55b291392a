// Attention in tiles of queries x keys: forward, dq, and dk with dv. Twin: csrc/ops/attention/cpu.cpp.
//
// q, o, d_o [B,H,T,D], k, v [B,G,S,D] in T; lse, delta [B,H,T] float32; first [T] int32. Query t sees the keys
// first[t] to q_start + t, and first never falls with t. D is a multiple of 8, H of G.
//
//   function           threads of a group   grid                   a group owns   a simdgroup owns
//   attention          128                  128*ceil(T/32), H, B   32 queries     8 queries
//   attention_vjp_q    128                  128*ceil(T/32), H, B   32 queries     8 queries
//   attention_vjp_kv   256                  256*ceil(S/32), G, B   32 keys        8 keys, for dv or for dk
//
// Own rows are read by one simdgroup only, so straight from device memory: once, where registers have room for them. The
// rows of the other side are staged in threadgroup memory for all. Products are of float32 matrices, as in MLX's own
// attention: p and ds are never rounded.

using namespace metal;

// Arrays of matrices stay in registers only where every index is known.
#define UNROLL _Pragma("clang loop unroll(full)")

namespace segtrain {

using Matrix = simdgroup_matrix<float, 8, 8>;

// The rows of the other side that are staged at a time: two such tiles take at most 17 KiB.
template <typename T, int D>
struct Tile {
  static constant constexpr int bytes = D * sizeof(T);
  static constant constexpr int rows = bytes <= 256 ? 32 : bytes <= 512 ? 16 : 8;
  static constant constexpr int stride = D + 16 / sizeof(T);  // rows start in different banks
  static constant constexpr int size = rows * stride;
};

constant constexpr int OWN = 32, SIMDS = OWN / 8;  // rows of a group, 8 for each simdgroup

// The element of a matrix that a lane holds; it holds the next one of the row as well.
struct Place {
  int row, col;
  Place(uint lane) : row((lane / 4 & 4) + lane / 2 % 4), col((lane / 4 & 2) * 2 + lane % 2 * 2) {}
};

// What the arrays' shapes say, and which heads a group of threads works on.
struct Shape {
  int heads, groups, queries, keys;
  Shape(const constant int* q_shape, const constant int* k_shape)
      : heads(q_shape[1]), groups(k_shape[1]), queries(q_shape[2]), keys(k_shape[2]) {}
  size_t q_head(uint b, uint h) thread { return size_t(b) * heads + h; }
  size_t k_head(uint b, uint g) thread { return size_t(b) * groups + g; }
  int share() thread { return heads / groups; }
};

// tile = rows [begin, begin + Tile::rows) of x; past the end the last row, which is masked or not stored.
template <int D, typename T>
void stage(threadgroup T* tile, const device T* x, int begin, int end, uint simd, uint simds, uint lane) {
  for (int row = simd; row < Tile<T, D>::rows; row += simds) {
    const device T* from = x + size_t(min(begin + row, end - 1)) * D;
    for (int col = 2 * lane; col < D; col += 64) {
      tile[row * Tile<T, D>::stride + col] = from[col];
      tile[row * Tile<T, D>::stride + col + 1] = from[col + 1];
    }
  }
}

template <int N>
void fill(thread Matrix* x, float value) {
  UNROLL
  for (int n = 0; n < N; ++n) x[n] = make_filled_simdgroup_matrix<float, 8, 8>(value);
}

// A lane's part of 8 columns of a row.
template <typename T>
void part(thread Matrix& a, const device T* row, int d, Place at) {
  a.thread_elements()[0] = float(row[d + at.col]);
  a.thread_elements()[1] = float(row[d + at.col + 1]);
}

// Matrices that hold a row of D numbers in registers: none where there is no room for them.
constexpr int kept_of(int D, int most) {
  return D <= most ? D / 8 : 0;
}

// kept = own; `own` is this lane's row.
template <int KEPT, typename T>
void keep(thread Matrix* kept, const device T* own, Place at) {
  UNROLL
  for (int n = 0; n < KEPT; ++n) part(kept[n], own, 8 * n, at);
}

// x = own tile^T [8, Tile::rows]; `own` is this lane's row, and `kept` the same if KEPT.
template <int D, int KEPT, typename T>
void product(thread Matrix* x, const device T* own, thread Matrix* kept, const threadgroup T* tile, Place at) {
  fill<Tile<T, D>::rows / 8>(x, 0);
  UNROLL
  for (int d = 0; d < D; d += 8) {
    Matrix a, b;
    if (KEPT > 0) {
      a = kept[d / 8];
    } else {
      part(a, own, d, at);
    }
    UNROLL
    for (int n = 0; n < Tile<T, D>::rows / 8; ++n) {
      const threadgroup T* across = tile + (8 * n + at.col) * Tile<T, D>::stride + d + at.row;
      b.thread_elements()[0] = float(across[0]);
      b.thread_elements()[1] = float(across[Tile<T, D>::stride]);
      simdgroup_multiply_accumulate(x[n], a, b, x[n]);
    }
  }
}

// sum += x tile [8, D]
template <int D, typename T>
void accumulate(thread Matrix* sum, thread Matrix* x, const threadgroup T* tile, Place at) {
  UNROLL
  for (int n = 0; n < Tile<T, D>::rows / 8; ++n) {
    UNROLL
    for (int d = 0; d < D / 8; ++d) {
      const threadgroup T* from = tile + (8 * n + at.row) * Tile<T, D>::stride + 8 * d + at.col;
      const vec<T, 2> two = *reinterpret_cast<const threadgroup vec<T, 2>*>(from);
      Matrix b;
      b.thread_elements()[0] = float(two[0]);
      b.thread_elements()[1] = float(two[1]);
      simdgroup_multiply_accumulate(sum[d], x[n], b, sum[d]);
    }
  }
}

// to = sum * factor; `to` is this lane's row.
template <int D, typename T>
void store(device T* to, thread Matrix* sum, float factor, Place at) {
  UNROLL
  for (int d = 0; d < D / 8; ++d) {
    to[8 * d + at.col] = T(sum[d].thread_elements()[0] * factor);
    to[8 * d + at.col + 1] = T(sum[d].thread_elements()[1] * factor);
  }
}

// s from q k; `slope` becomes ds / d(scale q k).
template <bool CAP>
float score(float qk, float scale, float cap, thread float& slope) {
  slope = 1;
  if (!CAP) return qk * scale;
  const float t = tanh(qk * scale / cap);
  slope = 1 - t * t;
  return cap * t;
}

// f over the lanes that hold one row: their numbers differ in bits 0 and 3.
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
  constexpr int BK = Tile<T, D>::rows, N = BK / 8;
  const Place at(lane);
  // Long rows first: the last tiles of a causal triangle are the heaviest.
  const int q0 = ((shape.queries - 1) / OWN - int(group.x)) * OWN, q1 = min(q0 + OWN, shape.queries);
  const int row = q0 + 8 * int(simd) + at.row, t = min(row, q1 - 1);
  const size_t bh = shape.q_head(group.z, group.y), bg = shape.k_head(group.z, group.y / shape.share());
  const device T* q_row = q + (bh * shape.queries + t) * D;
  k += bg * shape.keys * D;
  v += bg * shape.keys * D;
  threadgroup T* k_tile = tiles;
  threadgroup T* v_tile = tiles + Tile<T, D>::size;
  const int begin = first[t], end = q_start + t + 1, last_begin = first[q1 - 1];
  float m = -INFINITY, l = 0;
  constexpr int KEPT = kept_of(D, 128);
  Matrix sum[D / 8], s[N], q_kept[KEPT + 1];
  fill<D / 8>(sum, 0);
  keep<KEPT>(q_kept, q_row, at);

  for (int k0 = first[q0] / BK * BK; k0 < q_start + q1; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<D>(k_tile, k, k0, shape.keys, simd, SIMDS, lane);
    stage<D>(v_tile, v, k0, shape.keys, simd, SIMDS, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    /// S = scale q k^T, capped
    product<D, KEPT>(s, q_row, q_kept, k_tile, at);
    const bool edge = k0 < last_begin || k0 + BK > q_start + q0 + 1;
    float top = m;
    UNROLL
    for (int n = 0; n < N; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int key = k0 + 8 * n + at.col + e;
        float slope, x = score<CAP>(s[n].thread_elements()[e], scale, cap, slope);
        if (edge && (key < begin || key >= end)) x = -INFINITY;
        s[n].thread_elements()[e] = x;
        top = max(top, x);
      }
    }

    /// Online softmax: what is summed so far was relative to the old maximum.
    top = of_row(top, Max());
    const float base = top == -INFINITY ? 0 : top;  // nothing seen yet
    const float shrink = fast::exp(m - base);
    float part = 0;
    UNROLL
    for (int n = 0; n < N; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const float p = fast::exp(s[n].thread_elements()[e] - base);
        s[n].thread_elements()[e] = p;
        part += p;
      }
    }
    l = l * shrink + of_row(part, Sum());
    m = top;

    /// O += P V
    UNROLL
    for (int d = 0; d < D / 8; ++d) {
      sum[d].thread_elements()[0] *= shrink;
      sum[d].thread_elements()[1] *= shrink;
    }
    accumulate<D>(sum, s, v_tile, at);
  }

  /// O/l, lse = m + log l
  if (row >= q1) return;
  store<D>(o + (bh * shape.queries + t) * D, sum, l > 0 ? 1 / l : 0, at);
  if (at.col == 0) lse[bh * shape.queries + t] = l > 0 ? m + log(l) : -INFINITY;
}

template <int D, bool CAP, typename T, typename Rows, typename Ints>
void attention_vjp_q(const device T* q, const device T* k, const device T* v, Rows lse, Rows delta, const device T* d_o,
                     Ints first, int q_start, float scale, float cap, Shape shape, device T* dq, threadgroup T* tiles,
                     uint3 group, uint simd, uint lane) {
  constexpr int BK = Tile<T, D>::rows, N = BK / 8;
  const Place at(lane);
  const int q0 = ((shape.queries - 1) / OWN - int(group.x)) * OWN, q1 = min(q0 + OWN, shape.queries);
  const int row = q0 + 8 * int(simd) + at.row, t = min(row, q1 - 1);
  const size_t bh = shape.q_head(group.z, group.y), bg = shape.k_head(group.z, group.y / shape.share());
  const size_t bht = bh * shape.queries + t;
  const device T* q_row = q + bht * D;
  const device T* do_row = d_o + bht * D;
  k += bg * shape.keys * D;
  v += bg * shape.keys * D;
  threadgroup T* k_tile = tiles;
  threadgroup T* v_tile = tiles + Tile<T, D>::size;
  const int begin = first[t], end = q_start + t + 1, last_begin = first[q1 - 1];
  const float lse_row = lse[bht], delta_row = delta[bht];
  constexpr int KEPT_Q = kept_of(D, 128), KEPT_DO = kept_of(D, 64);
  Matrix sum[D / 8], s[N], dp[N], q_kept[KEPT_Q + 1], do_kept[KEPT_DO + 1];
  fill<D / 8>(sum, 0);
  keep<KEPT_Q>(q_kept, q_row, at);
  keep<KEPT_DO>(do_kept, do_row, at);

  for (int k0 = first[q0] / BK * BK; k0 < q_start + q1; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<D>(k_tile, k, k0, shape.keys, simd, SIMDS, lane);
    stage<D>(v_tile, v, k0, shape.keys, simd, SIMDS, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    /// P = exp(S - lse), dP = dO V^T
    product<D, KEPT_Q>(s, q_row, q_kept, k_tile, at);
    product<D, KEPT_DO>(dp, do_row, do_kept, v_tile, at);

    /// dS = P (dP - delta)
    const bool edge = k0 < last_begin || k0 + BK > q_start + q0 + 1;
    UNROLL
    for (int n = 0; n < N; ++n) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int key = k0 + 8 * n + at.col + e;
        float slope, x = score<CAP>(s[n].thread_elements()[e], scale, cap, slope);
        float p = fast::exp(x - lse_row);
        if (edge && (key < begin || key >= end)) p = 0;
        s[n].thread_elements()[e] = p * (dp[n].thread_elements()[e] - delta_row) * slope;
      }
    }

    /// dQ += dS K
    accumulate<D>(sum, s, k_tile, at);
  }

  /// dQ scale
  if (row < q1) store<D>(dq + bht * D, sum, scale, at);
}

// Simdgroups 0 to 3 make p and dv, simdgroups 4 to 7 dp and dk of the same keys: either holds one sum of [8, D].
// Simdgroup 4 + i takes p from simdgroup i through `weights`.
template <int D, bool CAP, typename T, typename Rows, typename Ints>
void attention_vjp_kv(const device T* q, const device T* k, const device T* v, Rows lse, Rows delta,
                      const device T* d_o, Ints first, int q_start, float scale, float cap, Shape shape, device T* dk,
                      device T* dv, threadgroup T* tiles, threadgroup float* weights, uint3 group, uint simd,
                      uint lane) {
  constexpr int BQ = Tile<T, D>::rows, N = BQ / 8;
  const Place at(lane);
  const bool makes_dk = simd >= SIMDS;
  const int k0 = int(group.x) * OWN, k1 = min(k0 + OWN, shape.keys);
  const int row = k0 + 8 * int(simd % SIMDS) + at.row, key = min(row, k1 - 1);
  const size_t bg = shape.k_head(group.z, group.y), own = (bg * shape.keys + key) * D;
  const device T* own_row = (makes_dk ? v : k) + own;
  threadgroup T* q_tile = tiles;
  threadgroup T* do_tile = tiles + Tile<T, D>::size;
  weights += simd % SIMDS * (N * 64) + lane;
  constexpr int KEPT = kept_of(D, 128);
  Matrix sum[D / 8], x[N], kept[KEPT + 1];
  fill<D / 8>(sum, 0);
  keep<KEPT>(kept, own_row, at);

  for (int h = 0; h < shape.share(); ++h) {
    const size_t bht = shape.q_head(group.z, group.y * shape.share() + h) * shape.queries;

    for (int q0 = max(0, k0 - q_start) / BQ * BQ; q0 < shape.queries; q0 += BQ) {
      const int q1 = min(q0 + BQ, shape.queries);
      if (first[q0] >= k1) break;  // nor does any later query see them
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<D>(q_tile, q + bht * D, q0, shape.queries, simd, 2 * SIMDS, lane);
      stage<D>(do_tile, d_o + bht * D, q0, shape.queries, simd, 2 * SIMDS, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);

      /// P = exp(S - lse), dP = dO V^T, both transposed
      product<D, KEPT>(x, own_row, kept, makes_dk ? do_tile : q_tile, at);

      /// dS = P (dP - delta)
      if (!makes_dk) {
        const bool edge = first[q1 - 1] > k0 || k0 + OWN > q_start + q0 + 1 || q0 + BQ > shape.queries;
        UNROLL
        for (int n = 0; n < N; ++n) {
          UNROLL
          for (int e = 0; e < 2; ++e) {
            const int col = q0 + 8 * n + at.col + e, t = min(col, shape.queries - 1);
            float slope, s = score<CAP>(x[n].thread_elements()[e], scale, cap, slope);
            float p = fast::exp(s - lse[bht + t]);
            if (edge && (key < first[t] || key > q_start + t || col >= shape.queries)) p = 0;
            x[n].thread_elements()[e] = p;
            weights[(2 * n + e) * 32] = p * slope;
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (makes_dk) {
        UNROLL
        for (int n = 0; n < N; ++n) {
          UNROLL
          for (int e = 0; e < 2; ++e) {
            const int t = min(q0 + 8 * n + at.col + e, shape.queries - 1);
            x[n].thread_elements()[e] = weights[(2 * n + e) * 32] * (x[n].thread_elements()[e] - delta[bht + t]);
          }
        }
      }

      /// dV += P^T dO, dK += dS^T Q
      accumulate<D>(sum, x, makes_dk ? q_tile : do_tile, at);
    }
  }

  /// dK scale
  if (row < k1) store<D>((makes_dk ? dk : dv) + own, sum, makes_dk ? scale : 1, at);
}

}  // namespace segtrain

// Bodies, each behind a line that names the kernel, its inputs and its outputs; all take T, D and CAP, and ROWS
// of a group and its THREADS, by which the host counts.
//: attention: q k v first q_start scale cap -> o lse
static_assert(ROWS == segtrain::OWN && THREADS == 32 * segtrain::SIMDS, "the host launches other groups");
threadgroup T tiles[2 * segtrain::Tile<T, D>::size];
segtrain::attention<D, CAP>(
    q, k, v, first, q_start, scale, cap, segtrain::Shape(q_shape, k_shape), o, lse, tiles,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
//: attention_vjp_q: q k v lse delta d_o first q_start scale cap -> dq
static_assert(ROWS == segtrain::OWN && THREADS == 32 * segtrain::SIMDS, "the host launches other groups");
threadgroup T tiles[2 * segtrain::Tile<T, D>::size];
segtrain::attention_vjp_q<D, CAP>(
    q, k, v, lse, delta, d_o, first, q_start, scale, cap, segtrain::Shape(q_shape, k_shape), dq, tiles,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
//: attention_vjp_kv: q k v lse delta d_o first q_start scale cap -> dk dv
static_assert(ROWS == segtrain::OWN && THREADS == 2 * 32 * segtrain::SIMDS, "the host launches other groups");
threadgroup T tiles[2 * segtrain::Tile<T, D>::size];
threadgroup float weights[segtrain::OWN * segtrain::Tile<T, D>::rows];
segtrain::attention_vjp_kv<D, CAP>(
    q, k, v, lse, delta, d_o, first, q_start, scale, cap, segtrain::Shape(q_shape, k_shape), dk, dv, tiles, weights,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
